"""What is said of a version, and the bytes that say it. Pure.

A lineage is told line by line. Each line is one JSON object, keys sorted, without spaces, ASCII:

    format     FORMAT
    entry      "version" (a ``Record``), "decision" (a ``Decided``) or "pruned" (a ``Pruned``)
    content    its fields
    previous   ``sha256`` of the line before; 64 zeros in the first
    hmac       HMAC-SHA-256 of the line without ``hmac`` and ``sha256``, hex; null: not signed
    sha256     of the line without ``sha256``, hex

So a changed byte in any line, and a line that was taken out, put in or moved, shows in that line or in the one after
it. That guards against damage. Against somebody who writes hashes too it takes the key; and lines that were cut off at
the end are missed by neither.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import msgspec
import numpy as np

FORMAT = 1
"""Raised when a reader of the old lines would misread the new ones."""
NO_LINE = "0" * 64
"""What the first line names as the one before it"""

Kind = Literal["initial", "candidate", "shadow", "canary", "promoted", "rejected", "rollback", "promoted by hand"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SERVING: frozenset[Kind] = frozenset({"initial", "promoted", "promoted by hand", "rollback"})
"""Decisions that make a version the current one"""
OPEN: frozenset[Kind] = frozenset({"candidate", "shadow", "canary"})
"""Decisions after which another must come"""


@dataclass(frozen=True, slots=True)
class Span:
    """Events of one partition that a version learned from, both ends included."""

    partition: int
    first: int
    """Source offset"""
    last: int
    """Source offset"""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about a version, and why."""

    kind: Kind
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """JSON values; see ``plain``"""
    at_ms: int = 0
    """Set by the lineage"""


@dataclass(frozen=True, slots=True)
class Record:
    """A version as it was made. Versions count from 0, the trained model, without gaps."""

    version: int
    parent: int | None
    """The version that it started from; None: it is version 0. Of a rollback: the version that it restores"""
    model: str
    """Fingerprint of the trained model, the same in a whole lineage"""
    round: int
    """Of meta-updates, from 1; 0: the trained model. Of a rollback: that of the version before it"""
    decision: Decision
    """The first; see ``Version.decisions``"""
    spans: tuple[Span, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """JSON values; ``cohorts`` holds its row of the forgetting matrix: name -> {auc, log_loss, …}"""
    undone: tuple[int, ...] = ()
    """Of a rollback: versions whose effect it takes back. Users' rows that stand on one are re-based"""
    made_at_ms: int = 0
    """Set by the lineage, as are the hashes"""
    serving_sha256: str = ""
    """See ``tensors.serving_sha256``: equal hashes serve equal predictions"""
    file_sha256: str = ""
    """Of the whole file of tensors"""


@dataclass(frozen=True, slots=True)
class Decided:
    """A further decision about a version."""

    version: int
    decision: Decision


@dataclass(frozen=True, slots=True)
class Pruned:
    """Versions whose tensors were removed, or are about to be."""

    versions: tuple[int, ...]
    at_ms: int


Entry = Record | Decided | Pruned
_NAMES: dict[type[Entry], str] = {Record: "version", Decided: "decision", Pruned: "pruned"}
_TYPES: dict[str, type[Entry]] = {name: kind for kind, name in _NAMES.items()}
_LINE = frozenset({"format", "entry", "content", "previous", "hmac", "sha256"})


def encode_line(entry: Entry, previous: str, key: bytes | None) -> tuple[bytes, str]:
    """(the line with its end, its ``sha256``). Mappings in the entry hold plain JSON values."""
    content = msgspec.to_builtins(entry)
    line = {"format": FORMAT, "entry": _NAMES[type(entry)], "content": content, "previous": previous}
    signed = {**line, "hmac": None if key is None else _hmac(key, line)}
    sha256 = _sha256(signed)
    return _canonical({**signed, "sha256": sha256}) + b"\n", sha256


def decode_line(packed: bytes, previous: str, key: bytes | None) -> tuple[Entry, str, bool]:
    """(entry, ``sha256``, whether it is signed) of a line without its end; ``previous`` and ``key`` must fit it.

    Without a key a signed line is read, but its signature is not verified. ValueError says what does not verify.
    """
    try:
        line = json.loads(packed)
    except ValueError:
        raise ValueError("is not JSON") from None
    if not isinstance(line, dict):
        raise ValueError("is no record")
    if line.get("format") != FORMAT:
        raise ValueError(f"has format {line.get('format')!a}, this program reads {FORMAT}")
    if line.keys() != _LINE or _canonical(line) != packed:
        raise ValueError("is not as this program writes it")
    sha256 = line.pop("sha256")
    if _sha256(line) != sha256:
        raise ValueError("does not match its hash")
    if line["previous"] != previous:
        raise ValueError("does not follow the line before it: lines were taken out, put in or moved")
    signature = line.pop("hmac")
    if key is not None:
        _verify_signature(key, line, signature)
    try:
        entry: Entry = msgspec.convert(line["content"], _TYPES[line["entry"]])
    except (msgspec.ValidationError, KeyError, TypeError) as error:
        raise ValueError(f"holds no record that this program knows: {error}") from None
    return entry, sha256, signature is not None


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same as values that JSON has: numpy's numbers and arrays too; a number that is not finite as its name.

    Raises TypeError for anything else, with the key that it stands under.
    """
    return {str(key): _plain(value, str(key)) for key, value in values.items()}


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, Mapping):
        return {str(inner): _plain(held, f"{key}.{inner}") for inner, held in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(held, key) for held in value]
    raise TypeError(f"{key} holds a {type(value).__name__}, which a record cannot: give numbers, text, lists, mappings")


def _verify_signature(key: bytes, line: Mapping[str, Any], signature: Any) -> None:
    if signature is None:
        raise ValueError("is not signed, and a key is set (meta.hmac)")
    if not isinstance(signature, str) or not hmac.compare_digest(_hmac(key, line).encode(), signature.encode()):
        raise ValueError("has a signature that the key (meta.hmac) does not make: it is forged, or the key is another")


def _hmac(key: bytes, line: Mapping[str, Any]) -> str:
    return hmac.new(key, _canonical(line), hashlib.sha256).hexdigest()


def _sha256(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(line)).hexdigest()


def _canonical(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
