"""A user's row: the memory that holds one user's adaptive part, its ledger and its latest events.

    0   u32  layout_version   LAYOUT_VERSION
    4   u32  checksum         of the row as it lies on disk: ``state.codec`` sets and checks it, the learner does not
    8   u64  events           events applied so far
    16  i64  last_offset      source offset of the latest applied event, −1 before the first
    24  i64  first_time_ms    event time of the first applied event
    32  i64  last_time_ms     event time of the latest applied event (in stream order, so it may step back)
    40  u64  ledger           hash chain over the applied events, see ``learner.ledger``
    48  u64  meta_version     version of the model that the adaptive part starts from
    56  u32  guarded          events whose update was refused because it was not finite
    60  u32  owner            hash of the user's id: a row read under another id is damage, see ``state.codec``
    64  f32  mean[d]  covariance[P or d or 0]  second_mean[e]  second_covariance[e(e+1)/2]   (padded to 8 bytes)
        u64  ring[R]          latest events; event number n (from 0) stands at n mod R

All is little-endian. n rows are a *slab*: one C-contiguous uint8 array (n, row_bytes), so that a row is stored and
sent as the bytes that the kernel works on, without any conversion.

A ring entry is 8 bytes, which keeps a user with both filters (d = 16, e = 8, R = 32) at 1,104 bytes:

    bits 24–63  the high 40 bits of the item's hash     bit 23  label
    bits 17–22  grade (63: none)                        bits 0–16  age: time since first_time_ms, see ``age_code``

The item is named by a hash of its id, because a row number in the model's item table means nothing after a restart
for an item that training has not seen. With 40 bits, among 100,000 items some pair collides with a chance of 0.5 %
(among 1 M: 37 %); a collision misreads one event when a state is re-derived, and is never seen by the live path.
Label, grade and order are exact, since re-deriving needs them; the time is a floating-point number of 13 significant
bits: exact to the second for 2.3 hours, then to a 4,096th of the age (a day: 16 s; a year: 2 hours).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # a reader of rows needs no compiled code
    from learner.serving import FirstFilter, SecondFilter

HeadKind = Literal["full", "diagonal", "gradient"]

LAYOUT_VERSION = 2
"""Of the bytes above; whoever changes them raises it and writes the way up."""
HEADER_BYTES = 64
"""One cache line: the walk over a batch touches it first."""
NO_GRADE = 63
"""Grade of a ring entry whose event carried none; so a model has at most 63 grades."""
AGE_DIGITS = 13
"""Significant bits of a ring entry's age"""
KNOWN_HASHES = 1 << 20
"""Hashes of item ids that are kept at hand, some 150 MB at most; beyond it they are computed anew"""
MAX_AGE_S = ((1 << AGE_DIGITS) - 1) << 30
"""The largest age that a ring entry can hold (279,000 years); what is older reads as this."""

_HEADER: list[tuple[str, str]] = [
    ("layout_version", "<u4"), ("checksum", "<u4"), ("events", "<u8"), ("last_offset", "<i8"),
    ("first_time_ms", "<i8"), ("last_time_ms", "<i8"), ("ledger", "<u8"), ("meta_version", "<u8"),
    ("guarded", "<u4"), ("owner", "<u4"),
]  # fmt: skip

_FINGERPRINT = re.compile(r"row-v\d+ head=(full|diagonal|gradient) d=(\d+) second=(\d+) ring=(\d+)")

Slab = NDArray[np.uint8]
Rows = NDArray[np.void]

if sys.byteorder != "little":
    raise ImportError("user rows are little-endian and are used in place; this machine is big-endian")


@dataclass(frozen=True)
class RowLayout:
    """Which parts a row has, and how wide they are. Equal layouts have equal bytes."""

    kind: HeadKind
    dim: int
    """d, width of the first filter"""
    second_dim: int
    """e, width of the second filter; 0 when it is off"""
    ring: int
    """R, how many of the latest events a row keeps"""

    @staticmethod
    def of(first: FirstFilter, second: SecondFilter | None, ring: int) -> RowLayout:
        """The layout for a model's filters. ValueError if its grades do not fit a ring entry."""
        grades = len(first.target) - 1
        if grades > NO_GRADE:
            raise ValueError(
                f"{grades} grades, but a ring entry holds at most {NO_GRADE}: name fewer in learner.grades, "
                "or set learner.graded_targets to false"
            )
        return RowLayout(first.kind, first.dim, 0 if second is None else second.dim, ring)

    @cached_property
    def covariance_width(self) -> int:
        """Floats of the first filter's covariance: d(d+1)/2, d or 0."""
        return {"full": packed_width(self.dim), "diagonal": self.dim, "gradient": 0}[self.kind]

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """A row as a structure; the fields are those of the module's table."""
        widths = {
            "mean": self.dim,
            "covariance": self.covariance_width,
            "second_mean": self.second_dim,
            "second_covariance": packed_width(self.second_dim),
            "padding": (self.dim + self.covariance_width + self.second_dim + packed_width(self.second_dim)) % 2,
        }
        fields: list[Any] = [*_HEADER, *((name, "<f4", (w,)) for name, w in widths.items())]
        return np.dtype([*fields, ("ring", "<u8", (self.ring,))])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, a multiple of 8."""
        return self.dtype.itemsize

    @property
    def fingerprint(self) -> str:
        """Text that names these bytes; a store records it and refuses another."""
        return f"row-v{LAYOUT_VERSION} head={self.kind} d={self.dim} second={self.second_dim} ring={self.ring}"

    @staticmethod
    def parse(fingerprint: str) -> RowLayout | None:
        """The layout that a fingerprint of any version names; None if it names none."""
        parts = _FINGERPRINT.fullmatch(fingerprint)
        if parts is None:
            return None
        kind: Any = parts[1]
        return RowLayout(kind, int(parts[2]), int(parts[3]), int(parts[4]))

    def rows(self, slab: Slab) -> Rows:
        """(n,) typed view of a slab (n, row_bytes): ``rows["mean"]`` is (n, d), and writing to it writes the slab."""
        if slab.shape[1] != self.row_bytes:
            raise ValueError(f"rows of {slab.shape[1]} bytes, but {self.fingerprint} has {self.row_bytes}")
        return slab.view(self.dtype).reshape(len(slab))


def packed_width(dim: int) -> int:
    """Entries of a packed lower triangle."""
    return dim * (dim + 1) // 2


def new_rows(
    layout: RowLayout,
    first: FirstFilter,
    second: SecondFilter | None,
    means: NDArray[np.float32],
    meta_version: int,
) -> Slab:
    """(n, row_bytes) users before their first event: ``means`` (n, d) and the priors S_0 of both filters."""
    slab = np.zeros((len(means), layout.row_bytes), np.uint8)
    rows = layout.rows(slab)
    rows["layout_version"] = LAYOUT_VERSION
    rows["last_offset"] = -1
    rows["meta_version"] = meta_version
    rows["mean"] = means
    rows["covariance"] = first.covariance
    if second is not None:
        rows["second_mean"] = second.initialization
        rows["second_covariance"] = second.covariance
    return slab


class RecentEvents(NamedTuple):
    """The k ≤ R latest events of one user, oldest first."""

    item: NDArray[np.uint64]
    """(k,) ``ring_item`` of the event's item"""
    label: NDArray[np.int8]
    """(k,)"""
    grade: NDArray[np.int32]
    """(k,) NO_GRADE where there was none"""
    time_ms: NDArray[np.int64]
    """(k,) event time, as exact as ``age_code`` keeps it, never later than the event's own unless that stepped back"""


def recent_events(layout: RowLayout, row: np.void) -> RecentEvents:
    """Reads the ring of one row of ``layout.rows``."""
    count = int(row["events"])
    kept = min(count, layout.ring)
    places = np.arange(count - kept, count) % max(layout.ring, 1)
    entries = row["ring"][places]
    age = age_of(entries & np.uint64(0x1FFFF))
    return RecentEvents(
        item=entries >> np.uint64(24),
        label=(entries >> np.uint64(23) & np.uint64(1)).astype(np.int8),
        grade=(entries >> np.uint64(17) & np.uint64(NO_GRADE)).astype(np.int32),
        time_ms=row["first_time_ms"] + 1000 * age,
    )


def item_hash(item_id: str) -> int:
    """64 bits of BLAKE2b over the id: the item's name in ledgers and rings, the same in every process."""
    return int.from_bytes(hashlib.blake2b(item_id.encode(), digest_size=8).digest(), "little")


class ItemHashes:
    """``item_hash`` of many ids, computed once for each."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, item_ids: Iterable[str]) -> NDArray[np.uint64]:
        """(I,)"""
        if len(self._known) > KNOWN_HASHES:
            self._known.clear()
        known = self._known
        return np.array([known.get(item) or known.setdefault(item, item_hash(item)) for item in item_ids], np.uint64)


def ring_item(hashed: int) -> int:
    """What a ring entry keeps of ``item_hash``."""
    return hashed >> 24


def age_code(seconds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """17 bits for an age in seconds, rounded down to 13 significant bits; codes rise with ages.

    With s the bits that are dropped, the code is (s << 12) + (age >> s). ``learner.kernel`` writes the same.
    """
    age = np.clip(seconds, 0, MAX_AGE_S)
    dropped = np.maximum(np.frexp(age.astype(np.float64))[1] - AGE_DIGITS, 0).astype(np.int64)
    code: NDArray[np.uint64] = ((dropped << (AGE_DIGITS - 1)) + (age >> dropped)).astype(np.uint64)
    return code


def age_of(code: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The smallest age in seconds with this ``age_code``."""
    dropped = np.maximum((code >> np.uint64(AGE_DIGITS - 1)).astype(np.int64) - 1, 0)
    kept: NDArray[np.int64] = code.astype(np.int64) - (dropped << (AGE_DIGITS - 1))
    return np.left_shift(kept, dropped)
