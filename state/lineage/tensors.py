"""A version's tensors on disk, and their hashes.

One safetensors file holds the tensors under their own names, and the vocabulary they belong to as ``items.text``
(UTF-8 bytes of all ids, one after the other) and ``items.ends`` (where each ends). It appears under its name whole and
on the disk, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from state.lineage.exceptions import LineageError

Array = NDArray[Any]

NOT_SERVING = ("moments.", "counts.")
"""How the names of tensors begin that the next update needs and no prediction does: no part of the serving hash"""
PARTIAL = ".partial"
_ITEMS, _TEXT, _ENDS = "items.", "items.text", "items.ends"
_DTYPES = frozenset(
    {"bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"}
)
"""Those that numpy and the file format both have"""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a version is, verified. The arrays are the reader's own."""

    tensors: dict[str, Array]
    item_ids: tuple[str, ...]
    """Vocabulary of the item tables, in the order of their rows"""

    @property
    def serving(self) -> dict[str, Array]:
        """Those that predictions depend on."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(NOT_SERVING)}


def file_name(version: int) -> str:
    """Of a version's file."""
    return f"version-{version:08}.safetensors"


def serving_sha256(tensors: Mapping[str, Array], item_ids: Sequence[str]) -> str:
    """SHA-256, hex, over what predictions depend on: names, types, shapes and bytes of the tensors, and the vocabulary.

    Whatever the order of the mapping, the byte order and the layout in memory.
    """
    hashed = hashlib.sha256(b"coldstream serving tensors 1\n")
    for name, tensor in sorted(Parameters(dict(tensors), ()).serving.items()):
        head = json.dumps([name, tensor.dtype.name, list(tensor.shape)]).encode()
        hashed.update(len(head).to_bytes(8, "little") + head)
        hashed.update(_bytes(tensor))
    for part in _packed_ids(item_ids).values():
        hashed.update(part.nbytes.to_bytes(8, "little"))
        hashed.update(_bytes(part))
    return hashed.hexdigest()


def write_tensors(path: Path, parameters: Parameters) -> str:
    """Writes the file, durably, over one that is there; returns the SHA-256 of its bytes.

    Raises ValueError for a name or a type that it cannot hold, LineageError or OSError for a failed write, after which
    the name holds what it held before.
    """
    for name, tensor in parameters.tensors.items():
        if not name or name.startswith(_ITEMS):
            raise ValueError(f"a tensor cannot be named {name!a}: {_ITEMS}* is the vocabulary's")
        if tensor.dtype.name not in _DTYPES:
            raise ValueError(f"tensor {name} is of {tensor.dtype}, which the file cannot hold: give numbers")
    held = {**parameters.tensors, **_packed_ids(parameters.item_ids)}
    partial = path.with_name(path.name + PARTIAL)
    try:
        save_file({name: np.asarray(tensor, order="C") for name, tensor in held.items()}, partial)
    except SafetensorError as error:  # its word for what the system says too
        with suppress(OSError):
            partial.unlink()
        raise LineageError(f"{path} cannot be written: {error}; check its rights and the space on its disk") from None
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    partial.replace(path)
    sync_directory(path.parent)
    return sha256


def read_tensors(path: Path, file_sha256: str) -> Parameters:
    """Reads a file whose bytes hash to this. ValueError says what does not verify; FileNotFoundError."""
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != file_sha256:
        raise ValueError("does not match the hash in its record")
    try:
        tensors = load(packed)
        text, ends = tensors.pop(_TEXT).tobytes(), tensors.pop(_ENDS).tolist()
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    starts = [0, *ends[:-1]]
    return Parameters(tensors, tuple(text[s:e].decode() for s, e in zip(starts, ends, strict=False)))


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _packed_ids(item_ids: Sequence[str]) -> dict[str, Array]:
    packed = [item.encode() for item in item_ids]
    ends = np.cumsum(np.fromiter(map(len, packed), np.int64, len(packed)))
    return {_TEXT: np.frombuffer(b"".join(packed), np.uint8), _ENDS: ends}


def _bytes(tensor: Array) -> memoryview:
    little = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data
