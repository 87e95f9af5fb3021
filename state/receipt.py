"""The receipt of an erasure: what was removed where, what lies outside its reach, and how to see that it is still so.

A receipt is a JSON file. It never holds the id: it holds a random salt and SHA-256(salt + id), so whoever knows the id
can see whose receipt it is, and a store can be searched for it. (Whoever guesses an id can test the guess, so a receipt
is to be kept like other personal data.) Its last field is the SHA-256 of all the others, so a changed receipt is
refused; that guards against mistakes, not against a forger, who can compute it too.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from state.exceptions import ReceiptError

FORMAT = "coldstream erasure receipt"
FORMAT_VERSION = 1
SALT_BYTES = 16

BEYOND_REACH = (
    "the source: topics or files that still hold the user's events; a run over them learns the user again",
    "predictions, reports and rejected lines that were written elsewhere",
    "copies, backups and snapshots of the state that are not named here",
    "the catalogue of users, and what a model view derives from it (a hash of the id, the start that features give)",
    "blocks that the file system freed and has not overwritten yet",
    "the residual influence on the shared initialization: what all users share (the fixed part, phi_0) was learned "
    "from many of them and is not unlearned",
)
"""What no erasure of this program touches"""


class Removal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was removed from one partition."""

    partition: int
    found: bool
    """Whether there was a row"""
    events: int
    """Events that the row had learned; −1: it was damaged"""
    bytes: int
    """Of the row, its event ring included"""
    offset: int | None
    """The partition's last applied source offset at the time; None: it had applied nothing"""
    meta_version: int | None


class SnapshotRemoval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was removed from one snapshot."""

    url: str
    partitions: tuple[Removal, ...]


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One erasure. ``sha256`` is that of all other fields."""

    format: str
    version: int
    erased_at_ms: int
    salt: str
    """Hex"""
    id_sha256: str
    """SHA-256 of salt and id, hex"""
    partitions: tuple[Removal, ...]
    snapshots: tuple[SnapshotRemoval, ...]
    tombstone_published: bool
    """Whether the changelog was told; where there is none, nothing had to be"""
    beyond_reach: tuple[str, ...]
    sha256: str

    @staticmethod
    def of(
        user: bytes, partitions: Sequence[Removal], snapshots: Mapping[str, Sequence[Removal]], *, published: bool
    ) -> Receipt:
        """The receipt of an erasure that was just made."""
        salt = secrets.token_bytes(SALT_BYTES)
        taken = tuple(SnapshotRemoval(url, tuple(removed)) for url, removed in snapshots.items())
        now_ms = time.time_ns() // 1_000_000
        receipt = Receipt(
            FORMAT, FORMAT_VERSION, now_ms, salt.hex(), _hash(salt, user), tuple(partitions), taken, published,
            BEYOND_REACH, "",
        )  # fmt: skip
        return msgspec.structs.replace(receipt, sha256=receipt.own_hash())

    def own_hash(self) -> str:
        """What ``sha256`` must be."""
        content = self.as_dict()
        del content["sha256"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def names(self, user: bytes) -> bool:
        """Whether it is this user's."""
        return _hash(bytes.fromhex(self.salt), user) == self.id_sha256

    def offset(self, partition: int) -> int | None:
        """The partition's last applied offset when the user was erased from it; None: it was not, or had none."""
        return next((removal.offset for removal in self.partitions if removal.partition == partition), None)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        content: dict[str, Any] = msgspec.to_builtins(self)
        return content


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Writes a new file, whole and forced to the disk. FileExistsError where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        json.dump(receipt.as_dict(), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_receipt(path: Path) -> Receipt:
    """Raises ReceiptError for what is no receipt of this version, or was changed."""
    try:
        receipt = msgspec.json.decode(path.read_bytes(), type=Receipt)
        bytes.fromhex(receipt.salt)
    except OSError as error:
        raise ReceiptError(f"the receipt {path} cannot be read: {error.strerror}; check the path") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise ReceiptError(f"{path} is no receipt of an erasure: {error}; name a file that erase wrote") from None
    if (receipt.format, receipt.version) != (FORMAT, FORMAT_VERSION):
        raise ReceiptError(
            f"{path} is a {receipt.format} of version {receipt.version}, this program reads a {FORMAT} of version "
            f"{FORMAT_VERSION}: use the program that wrote it"
        )
    if receipt.own_hash() != receipt.sha256:
        raise ReceiptError(f"the receipt {path} was changed since it was written: use the original")
    return receipt


def _hash(salt: bytes, user: bytes) -> str:
    return hashlib.sha256(salt + user).hexdigest()
