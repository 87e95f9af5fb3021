"""A partition's changelog: its rows as records of a compacted log, and its store restored from them. Pure: no broker.

    key                           value
    ``keys.user_key(user)``       the sealed row (``codec.encode``); None, a tombstone, when the user was taken out
    ``keys.LAYOUT_KEY``           fingerprint of the rows' layout
    ``keys.OWNER_KEY``            ``outbox_codec.Owner``: who wrote the marker that follows; ``takeover`` reads it
    ``keys.PROGRESS_KEY``         the marker: ``codec.Progress`` of the commit whose rows and tombstones it follows

Keys are those of the database, so no user's id can be the marker's. The log may be compacted as Kafka does it: of a
key the older records may be missing, and a tombstone vanishes when its retention is over. Rows may stand behind the
last marker, when their producer died before it: they are kept, for a row carries its own last offset and the stream
skips what it has applied.

What must hold in the log for each user: rows written later have a later last offset, or more events, or a later meta
version. A tombstone has no offset, so a store that is ahead of its log loses what the log takes out: whoever
publishes sends the rest of the commits before the store is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.user_state import RowLayout, Slab
from state import codec
from state.codec import UNKNOWN, Progress
from state.exceptions import ChangelogError, RowDamaged
from state.keys import LAYOUT_KEY, NOTHING, OWNER_KEY, PROGRESS_KEY, user_key
from state.outbox_codec import Owner
from state.store import UserStore

CHUNK_RECORDS = 8192
"""Records that are applied as one batch: 8 MB of rows at d = 16; a larger one is no faster."""
KNOWN_USERS = 1 << 20
"""Users that a restore into an empty store remembers, 100 MB at most: as long as none comes twice, the store has none
of them and is not asked, which is a third faster."""
_USER_PREFIX = user_key(b"")
"""One byte"""
_DELETED = -1


class Record(NamedTuple):
    """One record of a changelog."""

    key: bytes
    value: bytes | None
    """None: a tombstone"""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore has done so far."""

    records: int = 0
    """Read"""
    written: int = 0
    """Rows that the store did not have; of a user with several rows in one batch the latest counts"""
    kept: int = 0
    """Rows that the store had already, or newer ones"""
    deleted: int = 0
    """Users taken out by a tombstone"""
    rebuilt: bool = False
    """The store was too old for the tombstones that are left, and was emptied first"""
    progress: Progress | None = None
    """The store's at the end; None before, and for a changelog and a store without anything"""


def committed(
    layout: RowLayout, users: Sequence[bytes], rows: Slab, progress: Progress | None, *, deleted: Sequence[bytes] = ()
) -> Iterator[Record]:
    """The records of a batch as ``UserStore.write_batch`` takes it, in order; without a progress there is no marker."""
    for user, value in zip(users, codec.encode(layout, users, rows), strict=True):
        yield Record(user_key(user), value)
    yield from map(tombstone, deleted)
    if progress is not None:
        yield Record(LAYOUT_KEY, layout.fingerprint.encode())
        yield Record(PROGRESS_KEY, progress.encode())


def tombstone(user: bytes) -> Record:
    """Takes a user out of the log, and out of every store that is restored from it."""
    return Record(user_key(user), None)


def restore(
    store: UserStore,
    records: Iterable[Record],
    *,
    tombstone_retention_ms: int,
    now_ms: int,
    on_progress: Callable[[Restored], None] = lambda _: None,
    chunk_records: int = CHUNK_RECORDS,
) -> Restored:
    """Brings a store to the state that the log holds; ``on_progress`` is told after every batch.

    ``records`` are all that the log held at ``now_ms``, from its beginning. A row that the store has, or has a newer
    one of, is skipped. A store whose progress was written longer ago than the log keeps tombstones (or nobody knows
    when) may hold users whose tombstones are gone: it is emptied and filled anew. Afterwards it is of ``now_ms``:
    it knows every tombstone until then. Restoring twice changes nothing else.

    Interrupted at any point, the store says that it is ``restoring`` and is refused until a restore has ended; the
    progress it holds is the old one, or none. Raises RowDamaged and ChangelogError, which name the record, the
    store's own errors, and whatever ``on_progress`` does: so it is called off.
    """
    held = store.progress()
    stale = held is not None and (held.written_at_ms <= 0 or now_ms - held.written_at_ms >= tombstone_retention_ms)
    remaining = iter(records)
    first = next(remaining, None)
    if first is None:
        _refuse_nothing(store, stale)
        return Restored(progress=held)
    return fill(
        store, chain((first,), remaining), empty=stale, now_ms=now_ms, on_progress=on_progress,
        chunk_records=chunk_records,
    )  # fmt: skip


def fill(
    store: UserStore,
    records: Iterable[Record],
    *,
    empty: bool,
    now_ms: int,
    gone: Sequence[bytes] = (),
    own: Callable[[], Mapping[bytes, bytes | None]] = lambda: NOTHING,
    on_progress: Callable[[Restored], None] = lambda _: None,
    chunk_records: int = CHUNK_RECORDS,
) -> Restored:
    """Applies records to a store that is emptied before, or lacks nothing of what the log held before them.

    First the users ``gone`` are taken out. At the end, in the step after which the store is no longer ``restoring``,
    what ``own`` then returns is put. Interrupted and raising as ``restore``.
    """
    held = store.progress()
    empty = empty or held is None
    store.begin_restore(empty=empty)
    work = _Restore(store, None if empty else held, Restored(rebuilt=empty and held is not None))
    if gone and not empty:
        work.apply(list(map(tombstone, gone)))
        work.done = Restored()
    remaining = iter(records)
    while chunk := list(islice(remaining, chunk_records)):
        work.apply(chunk)
        on_progress(work.done)
    progress = replace(work.final_progress(), written_at_ms=now_ms)
    store.end_restore(progress, own())
    return replace(work.done, progress=progress)


def advance(store: UserStore, records: Sequence[Record], own: Mapping[bytes, bytes | None]) -> Restored:
    """Applies the records that come next in the log, and puts ``own``, in one atomic step.

    The store lacks nothing of what the log held before them. Raises as ``restore``; nothing of it counts then.
    """
    held = store.progress() or Progress(-1, 0, 0, 0)
    work = _Restore(store, held, Restored())
    work.apply(list(records), own)
    return replace(work.done, progress=store.progress())


def _refuse_nothing(store: UserStore, stale: bool) -> None:
    if stale or store.restoring():
        raise ChangelogError(
            "the changelog holds no record, but the store has "
            + ("an interrupted restore to end" if store.restoring() else "rows that are too old to be kept without it")
            + ": check the topic and its partition, or remove the store to begin anew"
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """n records that carry rows, decoded."""

    users: list[bytes]
    slab: Slab
    order: NDArray[np.void]
    """(n,) last_offset, events, meta_version, ledger"""

    def take(self, places: Sequence[int]) -> _Rows:
        return _Rows([self.users[k] for k in places], self.slab[places], self.order[places])


class _Restore:
    """A restore that has begun."""

    def __init__(self, store: UserStore, held: Progress | None, done: Restored) -> None:
        self.done = done
        self._store = store
        self._held = held
        self._marker: Progress | None = None
        self._users = 0 if held is None else held.users
        self._events = 0 if held is None else held.events
        self._known = self._users != UNKNOWN and self._events != UNKNOWN
        self._seen: set[bytes] | None = set() if held is None else None

    def final_progress(self) -> Progress:
        """The further one of the log's marker and the store's own; without any, nothing was applied yet."""
        held, marker = self._held or Progress(-1, 0), self._marker or Progress(-1, 0)
        further = marker if (marker.offset, marker.written_at_ms) >= (held.offset, held.written_at_ms) else held
        return self._counted(further)

    def apply(self, chunk: list[Record], own: Mapping[bytes, bytes | None] = NOTHING) -> None:
        """Applies records in their order as one batch of the store. Nothing of it counts when one cannot be used.

        With ``own``, which goes into the same batch, the progress becomes that of the log: nothing else follows.
        """
        rows, tombstones = self._read(chunk)
        erased: list[bytes] = []
        forgotten = np.zeros(len(rows.users), np.bool_)
        if tombstones or len(set(rows.users)) < len(rows.users):
            rows, erased, forgotten = _settled(rows, _steps(chunk))
        before, found = self._stored([*rows.users, *erased])
        n = len(rows.users)
        newer = ~found[:n] | forgotten | _newer(rows.order, before[:n])
        written = np.flatnonzero(newer).tolist()
        chosen = rows if len(written) == n else rows.take(written)
        there = found[n:]
        self._users += int((~found[:n][newer]).sum()) - int(there.sum())
        self._events += int(chosen.order["events"].sum()) - int(before["events"][:n][newer].sum())
        self._events -= int(before["events"][n:].sum())
        deleted = [user for user, held in zip(erased, there.tolist(), strict=True) if held]
        progress = self.final_progress() if own else None if self._held is None else self._counted(self._held)
        if chosen.users or deleted or own:
            self._store.write_batch(chosen.users, chosen.slab, progress, deleted=deleted, own=own)
        self.done = replace(
            self.done,
            records=self.done.records + len(chunk),
            written=self.done.written + len(written),
            kept=self.done.kept + n - len(written),
            deleted=self.done.deleted + len(deleted),
        )

    def _stored(self, users: list[bytes]) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
        """(order, found) of the rows that the store has of these users."""
        layout, seen = self._store.layout, self._seen
        new = seen is not None and seen.isdisjoint(users)
        if seen is not None:
            seen.update(users)
            self._seen = seen if len(seen) <= KNOWN_USERS else None
        if new:
            return _order(layout, np.zeros((len(users), layout.row_bytes), np.uint8)), np.zeros(len(users), np.bool_)
        slab, found = self._store.get_many(users)
        return _order(layout, slab), found

    def _counted(self, progress: Progress) -> Progress:
        users, events = (self._users, self._events) if self._known else (UNKNOWN, UNKNOWN)
        return replace(progress, users=users, events=events)

    def _read(self, chunk: list[Record]) -> tuple[_Rows, int]:
        """The rows, and how many tombstones there are beside them; the store's own records are put down."""
        users: list[bytes] = []
        values: list[bytes] = []
        own = 0
        for place, (key, value) in enumerate(chunk):
            if key[:1] != _USER_PREFIX:
                own += 1
                self._own_record(self.done.records + place + 1, key, value)
            elif value is not None:
                users.append(key[1:])
                values.append(value)
        layout = self._store.layout
        try:
            slab = codec.decode(layout, users, values)
        except RowDamaged as error:
            raise error.at(f"record {self.done.records + 1 + self._damaged(chunk)} of the changelog") from None
        return _Rows(users, slab, _order(layout, slab)), len(chunk) - len(users) - own

    def _damaged(self, chunk: list[Record]) -> int:
        """The place of the first record whose row is damaged; there is one."""
        for place, (key, value) in enumerate(chunk):
            if key[:1] == _USER_PREFIX and value is not None:
                try:
                    codec.decode(self._store.layout, [key[1:]], [value])
                except RowDamaged:
                    return place
        raise AssertionError("a chunk was refused, and none of its rows is damaged")

    def _own_record(self, number: int, key: bytes, value: bytes | None) -> None:
        layout = self._store.layout
        wrong = "no tombstone may stand there"
        if key == PROGRESS_KEY and value is not None:
            try:
                self._marker = Progress.decode(value)
                return
            except ValueError as error:
                wrong = str(error)
        elif key == LAYOUT_KEY and value is not None:
            if RowLayout.parse(value.decode(errors="replace")) == layout:
                return
            wrong = f"its rows are of {value.decode(errors='replace')!a}, this store's of {layout.fingerprint}"
        elif key == OWNER_KEY and value is not None:
            try:
                Owner.decode(value)
                return
            except ValueError as error:
                wrong = str(error)
        elif key not in (PROGRESS_KEY, LAYOUT_KEY, OWNER_KEY):
            wrong = "nobody knows this key"
        shown = ascii(key[:60].decode(errors="backslashreplace"))
        raise ChangelogError(
            f"record {number} of the changelog, key {shown}, cannot be used: {wrong}; check that the topic is this "
            "store's changelog, or restore a snapshot"
        )


def _order(layout: RowLayout, slab: Slab) -> NDArray[np.void]:
    return layout.rows(slab)[["last_offset", "events", "meta_version", "ledger"]]


def _newer(records: NDArray[np.void], held: NDArray[np.void]) -> NDArray[np.bool_]:
    """(n,) which records replace the row held: later ones, and those of another history of the same length."""
    newer: NDArray[np.bool_] = records["ledger"] != held["ledger"]
    for field in ("meta_version", "events", "last_offset"):
        newer = (records[field] > held[field]) | ((records[field] == held[field]) & newer)
    return newer


def _steps(chunk: list[Record]) -> Iterator[tuple[bytes, int]]:
    """For each record of a user its id and the place of its row among the rows, or _DELETED."""
    place = 0
    for key, value in chunk:
        if key[:1] == _USER_PREFIX:
            yield key[1:], _DELETED if value is None else place
            place += value is not None


def _settled(rows: _Rows, steps: Iterable[tuple[bytes, int]]) -> tuple[_Rows, list[bytes], NDArray[np.bool_]]:
    """What stands for each user after all steps: (rows, users taken out, which of the rows come after a tombstone)."""
    ranks = list(zip(*(rows.order[name].tolist() for name in ("last_offset", "events", "meta_version")), strict=True))
    last: dict[bytes, int] = {}
    erased: set[bytes] = set()
    for user, place in steps:
        best = last.get(user, _DELETED)
        if place == _DELETED:
            erased.add(user)
            last[user] = _DELETED
        elif best == _DELETED or ranks[place] >= ranks[best]:
            last[user] = place
    kept = rows.take([place for place in last.values() if place != _DELETED])
    forgotten = np.fromiter((user in erased for user in kept.users), np.bool_, len(kept.users))
    return kept, [user for user, place in last.items() if place == _DELETED], forgotten
