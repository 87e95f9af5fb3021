"""What ``meta-versions`` holds, key by key: a compacted topic of one partition. Pure: bytes and arrays, no broker.

    n/<first row>           items that joined the vocabulary, in order, with their encoded features; never replaced
    d/<version>/<k>         an open version's delta to its parent: ``Excerpt``, in pieces; None once it is decided on
    r/<item id>             the promoted version's row of an item: counts, then value and moments of each item table
    p/<k>                   the promoted version's other parameters and their moments, in pieces
    v/<version>             its record and all decisions
    s/line  s/best/<k>  s/served/<k>  s/scores/<version>/<k>  s/matrix/<row>    what the line goes on from
    m                       ``Marker``, the last record of every transaction

Values in pieces are blocks of ``messages.packing`` cut by ``messages.chunks``; v, s/line and m are JSON with a SHA-256
over it. So a compacted log has one row for each item that a promoted version ever touched, one set of parameters, the
deltas of open versions, and the small records. An item keeps its row whatever becomes of the version that brought it:
n/ is the vocabulary of all. What a version serves is verified by its hash in the marker, the marker by an HMAC where
a key is set; moments and counts, which no prediction depends on, by their checksums alone.

A row, little-endian, of tables that ``RowForm`` names:

    0  u32  FORMAT   4  u32  crc32 of what follows   8  u32  crc32 of the form   12  u32  0
    16 i64  item_events   24 i64  item_steps   32  f32  for each table: value, first moment, second moment
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from learner.features import SparseRows
from learner.histories import starts_of, take_rows
from learner.meta_model import Excerpt, MetaModel, Values
from learner.meta_update import Moves, moves_with
from learner.recommender import ITEM_TABLES
from state.changelog import Record
from state.lineage.record import Kind
from streams.meta.contributor import Task
from streams.meta.messages.chunks import MAX_BYTES, cut, joined
from streams.meta.messages.packing import Array, MessageRefused, pack, pack_texts, unpack, unpack_texts

FORMAT = 1
MARKER, VOCABULARY, DELTA, ROW, PARAMETERS, VERSION = b"m", b"n/", b"d/", b"r/", b"p", b"v/"
LINE, BEST, SERVED, SCORES, MATRIX = b"s/line", b"s/best", b"s/served", b"s/scores/", b"s/matrix/"
ITEMS_AT_ONCE = 4_096
"""New items in one record: ids and features of so many are some 200 kB"""
_ROW_HEAD = struct.Struct("<IIIIqq")
_ROW_CHECKED = 8

Contents = Mapping[bytes, bytes | None]
"""By key the latest value; None: a tombstone"""


# --- JSON -----------------------------------------------------------------------------------------------------


def sealed(content: Mapping[str, Any], key: bytes | None = None) -> bytes:
    """JSON with its format, an HMAC-SHA-256 where there is a key, and a SHA-256 over all of that."""
    inner: dict[str, Any] = {"format": FORMAT, "content": content}
    inner["hmac"] = None if key is None else _hmac(inner, key)
    return _canonical({**inner, "sha256": hashlib.sha256(_canonical(inner)).hexdigest()})


def opened(value: bytes, what: str, key: bytes | None = None) -> dict[str, Any]:
    """What ``sealed`` sealed. Raises MessageRefused: "damaged", "format" or "signature"."""
    try:
        found = json.loads(value)
        sha256, form = found.pop("sha256"), found["format"]
        content, signature = found["content"], found["hmac"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MessageRefused("damaged", f"{what} is no record of this program's") from None
    if form != FORMAT:
        raise MessageRefused("format", f"{what} is of format {form!a}, this program reads {FORMAT}")
    if hashlib.sha256(_canonical(found)).hexdigest() != sha256:
        raise MessageRefused("damaged", f"{what} does not match its hash")
    if key is not None and not hmac.compare_digest(
        _hmac({"format": form, "content": content}, key).encode(), str(signature).encode()
    ):
        raise MessageRefused("signature", f"{what} is not signed with the key (meta.hmac)")
    return cast(dict[str, Any], content)


def _hmac(content: Mapping[str, Any], key: bytes) -> str:
    return hmac.new(key, _canonical(content), hashlib.sha256).hexdigest()


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


# --- the marker -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mark:
    """A version that serves, or is to be decided on."""

    version: int
    stage: Kind
    sha256: str
    """``serving_sha256`` of it"""
    items: int
    """Of the vocabulary, as it was made"""


@dataclass(frozen=True, slots=True)
class Marker:
    """The end of a transaction: all that whoever follows has to know."""

    sequence: int
    """From 0, one more with each marker"""
    model: str
    """Fingerprint of the trained model"""
    moves: Moves
    round: int
    events: int
    """Of the stream, in all spans consumed"""
    vocabulary: int
    """Items, those of versions that were rejected too"""
    current: Mark
    open: tuple[Mark, ...]
    """The oldest first"""
    canary_share: float
    consumed: dict[int, int]
    """Partition -> the last offset that a round has consumed"""
    task: Task | None
    """For the next round; None: findings only"""

    @property
    def head(self) -> Mark:
        """The version that gradients are taken at."""
        return self.open[-1] if self.open else self.current

    def encode(self, key: bytes | None) -> bytes:
        """As published."""
        return sealed(msgspec.to_builtins(self, str_keys=True), key)

    @staticmethod
    def decode(value: bytes, key: bytes | None) -> Marker:
        """Raises MessageRefused."""
        content = opened(value, "the marker of meta-versions", key)
        try:
            return msgspec.convert(content, Marker, strict=False)
        except msgspec.ValidationError as error:
            raise MessageRefused(
                "shape", f"the marker of meta-versions does not hold what it should: {error}"
            ) from None


# --- values in pieces -----------------------------------------------------------------------------------------


def piece_key(name: bytes, k: int) -> bytes:
    """Of the k-th piece of a value."""
    return name + b"/%04d" % k


def version_key(prefix: bytes, version: int) -> bytes:
    """In order of the number."""
    return prefix + b"%08d" % version


class Shelf:
    """How many pieces each value has in the log, so that none is left behind."""

    def __init__(self, contents: Contents | None = None) -> None:
        self._pieces: dict[bytes, int] = {}
        for key, value in (contents or {}).items():
            name, _, k = key.rpartition(b"/")
            if value is not None and name.startswith((DELTA, SCORES, PARAMETERS, BEST, SERVED)):
                self._pieces[name] = max(self._pieces.get(name, 0), int(k) + 1)

    def put(self, name: bytes, block: bytes) -> list[Record]:
        """Records that hold it, in place of what the name holds now."""
        values: list[bytes | None] = [*cut(block)]
        before, self._pieces[name] = self._pieces.get(name, 0), len(values)
        values += [None] * (before - len(values))
        return [Record(piece_key(name, k), value) for k, value in enumerate(values)]

    def __contains__(self, name: bytes) -> bool:
        return name in self._pieces

    def remove(self, name: bytes) -> list[Record]:
        """Tombstones for all of it; none if it is not there."""
        return [Record(piece_key(name, k), None) for k in range(self._pieces.pop(name, 0))]


def block_of(contents: Contents, name: bytes, what: str) -> bytes | None:
    """A value of all its pieces; None: it is not there. Raises MessageRefused."""
    values: list[bytes] = []
    while (value := contents.get(piece_key(name, len(values)))) is not None:
        values.append(value)
    return joined(values, what) if values else None


# --- parameters -----------------------------------------------------------------------------------------------


def moving(model: MetaModel, moves: Moves) -> tuple[list[str], list[str]]:
    """(item tables, other parameters) that move."""
    names = [name for name in model.parameters if moves_with(name, moves)]
    return [n for n in names if n in ITEM_TABLES], [n for n in names if n not in ITEM_TABLES]


_PARTS = ("value", "first", "second")


def pack_excerpt(excerpt: Excerpt) -> bytes:
    """As a block."""
    arrays: dict[str, Array] = {
        f"{part}.{name}": array
        for name, values in excerpt.tensors.items()
        for part, array in zip(_PARTS, values, strict=True)
    }
    arrays |= {"rows": excerpt.rows, "item_events": excerpt.item_events, "item_steps": excerpt.item_steps}
    return pack("excerpt", {"steps": excerpt.steps, "tensors": list(excerpt.tensors)}, arrays)


def unpack_excerpt(block: bytes, what: str) -> Excerpt:
    """Raises MessageRefused."""
    content, arrays = unpack(block, "excerpt", what)
    try:
        tensors = {
            name: cast(Values, tuple(arrays[f"{part}.{name}"] for part in _PARTS)) for name in content["tensors"]
        }
        return Excerpt(
            tensors, arrays["rows"], arrays["item_events"], arrays["item_steps"], int(content["steps"])
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise MessageRefused("shape", f"{what} does not hold what it should: {error!r}") from None


class RowForm:
    """Which tables a row has, and how wide they are."""

    def __init__(self, model: MetaModel, tables: Sequence[str]) -> None:
        self.tables = tuple(tables)
        self._shapes = [tuple(model.parameters[name].shape[1:]) for name in tables]
        self._widths = [int(np.prod(shape)) for shape in self._shapes]
        self._crc = zlib.crc32(json.dumps([self.tables, self._widths]).encode())
        self.row_bytes = _ROW_HEAD.size + 3 * 4 * sum(self._widths)

    def pack(self, excerpt: Excerpt, item_ids: Sequence[str]) -> list[Record]:
        """A record for each row; ``item_ids`` (R,) are theirs."""
        count = len(excerpt.rows)
        slab = np.zeros((count, self.row_bytes), np.uint8)
        heads = slab[:, : _ROW_HEAD.size]
        heads[:, 0:4] = np.array([FORMAT], "<u4").view(np.uint8)
        heads[:, 8:12] = np.array([self._crc], "<u4").view(np.uint8)
        heads[:, 16:32] = np.stack([excerpt.item_events, excerpt.item_steps], 1).astype("<i8").view(np.uint8)
        numbers = [v.reshape(count, -1) for name in self.tables for v in excerpt.tensors[name]]
        if numbers:
            flat = np.ascontiguousarray(np.concatenate(numbers, axis=1), "<f4")
            slab[:, _ROW_HEAD.size :] = flat.view(np.uint8)
        crcs = np.fromiter((zlib.crc32(row[_ROW_CHECKED:].data) for row in slab), "<u4", count)
        heads[:, 4:8] = crcs[:, None].view(np.uint8)
        return [Record(ROW + item.encode(), row.tobytes()) for item, row in zip(item_ids, slab, strict=True)]

    def unpack(self, values: Sequence[bytes], rows: NDArray[np.int64], steps: int) -> Excerpt:
        """Rows as published, at these rows of the vocabulary. Raises MessageRefused."""
        for value in values:
            if len(value) != self.row_bytes or zlib.crc32(memoryview(value)[_ROW_CHECKED:]) != value_crc(value):
                raise MessageRefused("damaged", "a row of meta-versions fails its checksum, or is of another length")
        slab = np.frombuffer(b"".join(values), np.uint8).reshape(len(values), self.row_bytes)
        heads = np.ascontiguousarray(slab[:, : _ROW_HEAD.size])
        words = heads.view("<u4")
        if (words[:, 0] != FORMAT).any() or (words[:, 2] != self._crc).any():
            raise MessageRefused("format", "a row of meta-versions is of another format, or of another model")
        counts = heads[:, 16:].copy().view("<i8")
        flat = np.ascontiguousarray(slab[:, _ROW_HEAD.size :]).view("<f4")
        tensors: dict[str, Values] = {}
        start = 0
        for name, width, shape in zip(self.tables, self._widths, self._shapes, strict=True):
            cuts = [flat[:, start + k * width : start + (k + 1) * width].reshape(-1, *shape) for k in range(3)]
            tensors[name], start = (cuts[0], cuts[1], cuts[2]), start + 3 * width
        return Excerpt(tensors, rows, counts[:, 0].copy(), counts[:, 1].copy(), steps)


def value_crc(value: bytes) -> int:
    """That a row's value claims."""
    return int.from_bytes(value[4:8], "little")


def promoted(delta: Excerpt, form: RowForm, model: MetaModel, shelf: Shelf) -> list[Record]:
    """A delta as part of the promoted version's table."""
    item_ids = [model.item_ids[row] for row in delta.rows.tolist()]
    none = np.zeros(0, np.int64)
    others = {name: values for name, values in delta.tensors.items() if name not in ITEM_TABLES}
    parameters = Excerpt(others, none, none, none, delta.steps)
    return [*form.pack(delta, item_ids), *shelf.put(PARAMETERS, pack_excerpt(parameters))]


# --- the vocabulary -------------------------------------------------------------------------------------------


def pack_vocabulary(model: MetaModel, first: int) -> list[Record]:
    """Items from a row on."""
    found, count = [], len(model.item_ids)
    for start in range(first, count, ITEMS_AT_ONCE):
        found += _items(model, start, min(start + ITEMS_AT_ONCE, count))
    return found


def _items(model: MetaModel, first: int, last: int) -> list[Record]:
    """Of rows ``first:last``; in several records where their ids or features are very long."""
    places = np.arange(first, last)
    part = take_rows(model.recommender.spec.item_features, places)
    arrays = pack_texts(model.item_ids[first:last], "items")
    arrays |= {"counts": np.diff(part.starts), "columns": part.columns, "weights": part.weights}
    value = pack("vocabulary", {"first": first}, arrays)
    if len(value) > MAX_BYTES and last - first > 1:
        middle = (first + last) // 2
        return _items(model, first, middle) + _items(model, middle, last)
    return [Record(VOCABULARY + b"%010d" % first, value)]


def extend(model: MetaModel, contents: Contents) -> None:
    """Takes in those items of the records that follow the vocabulary. Raises MessageRefused for a gap."""
    for key in sorted(key for key in contents if key.startswith(VOCABULARY)):
        value, what = contents[key], f"the items {key.decode(errors='replace')} of meta-versions"
        content, arrays = unpack(value or b"", "vocabulary", what)
        if content["first"] < len(model.item_ids):
            continue
        if content["first"] > len(model.item_ids):
            raise MessageRefused("incomplete", f"{what} follow {len(model.item_ids)} items: some between are missing")
        try:
            features = SparseRows(starts_of(arrays["counts"]), arrays["columns"], arrays["weights"])
            model.extend(unpack_texts(arrays, "items"), features)
        except (KeyError, TypeError, ValueError) as error:
            raise MessageRefused("shape", f"{what} cannot be used: {error}") from None


# --- transactions ---------------------------------------------------------------------------------------------


def settled(records: Iterable[Record]) -> tuple[dict[bytes, bytes | None], dict[bytes, bytes | None]]:
    """(what the records say up to the last marker, what comes after it); the latest value of each key."""
    contents: dict[bytes, bytes | None] = {}
    after: dict[bytes, bytes | None] = {}
    for key, value in records:
        after[key] = value
        if key == MARKER:
            contents |= after
            after = {}
    return contents, after
