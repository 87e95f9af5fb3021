"""How an opened store and its changelog are brought together before anybody goes on from there. Pure: no broker.

Before it, a worker fences whoever published last (InitProducerId): the changelog then ends at ``Log.end``, and no
transaction of another is open. What the stream holds is applied in the same way by everybody, so two stores that have
applied the same offsets have the same rows; they may differ in users whom nobody misses (swept out, or not yet).

    the last marker in the log since the store's position    what becomes of the store
    none, or its own session's                               Resend: what was not told is told now
    another's, at the store's offset or further              Apply: the log from the position on
    another's, before the store's offset                     Rebuild: what it has was never told, and was done again
    its own session's, but further than it is (an old copy)  Apply
    the position is unusable, or older than tombstones last  Rebuild: from the log's start

A worker that holds a copy of a partition which another one owns (a standby) brings it together without a session,
and then lets it ``follow``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from state.changelog import CHUNK_RECORDS, Record, Restored, advance, fill
from state.codec import Progress
from state.exceptions import ChangelogError
from state.keys import OWNER_KEY, PROGRESS_KEY, STANDING_KEY
from state.outbox import entries, entry_key, standing
from state.outbox_codec import NO_SESSION, Entry, Owner, Standing, encode_entry
from state.store import UserStore

Read = Callable[[int], Iterable[Record]]
"""(offset) -> the log's committed records from there to ``Log.end``, in order"""

LOOK_BACK = 256
"""Offsets before the log's end where its last marker nearly always is: it and the transaction's end come last"""


@dataclass(frozen=True, slots=True)
class Local:
    """What a store says of itself."""

    progress: Progress | None
    standing: Standing | None
    entries: tuple[Entry, ...] = ()
    restoring: bool = False

    @staticmethod
    def of(store: UserStore) -> Local:
        """Of an open store (RocksUserStore: opened ``to_restore``). Raises StoreDamaged."""
        return Local(store.progress(), standing(store), entries(store), store.restoring())

    @property
    def offset(self) -> int:
        """The last source offset applied; −1: none."""
        return -1 if self.progress is None else self.progress.offset


@dataclass(frozen=True, slots=True)
class Marker:
    """The end of a publication."""

    owner: Owner | None
    """None: it is not among the records that were read"""
    progress: Progress | None
    """None: whoever told it had applied nothing"""

    @property
    def offset(self) -> int:
        """The last source offset that it covers; −1: none."""
        return -1 if self.progress is None else self.progress.offset


@dataclass(frozen=True, slots=True)
class Log:
    """What a store has to know of its changelog."""

    start: int
    """First offset held"""
    end: int
    """The offset after the last one"""
    last: Marker | None
    """The last marker from the store's position on; of the whole log where the store has no position inside it"""

    @staticmethod
    def surveyed(local: Local, start: int, end: int, read: Read) -> Log:
        """Reads the log's last offsets, and only where no marker is there all from the position on."""
        first = local.standing.position if _usable(local, start, end) and local.standing is not None else start
        near = max(first, end - LOOK_BACK)
        last = last_marker(read(near))
        if near > first and (last is None or last.owner is None):
            last = last_marker(read(first))
        return Log(start, end, last)


def last_marker(records: Iterable[Record]) -> Marker | None:
    """The last of them; raises ChangelogError where it cannot be read.

    From a session's position on it has its owner: a compacted log may lack one only where another follows. A copy that
    follows may stand between the two records of a marker.
    """
    last: Marker | None = None
    try:
        for key, value in records:
            if key == OWNER_KEY and value is not None:
                last = Marker(Owner.decode(value), None)
            elif key == PROGRESS_KEY and value is not None:
                last = replace(last or Marker(None, None), progress=Progress.decode(value))
    except ValueError as error:
        raise ChangelogError(f"the changelog's last marker cannot be used: {error}; check the topic") from None
    return last


@dataclass(frozen=True, slots=True)
class Resend:
    """The store is as far as anybody: what it has not told is told next."""

    told: tuple[int, ...]
    """Sequences of entries that the log has"""
    untold: int
    """How many entries are left for the outbox"""


@dataclass(frozen=True, slots=True)
class Apply:
    """The log is ahead: what it holds from the position on is applied."""

    position: int
    entries: tuple[Entry, ...]
    """The store's: given up, as whoever is ahead has told the same. The users they name are taken out before, for
    the log says all of them again; those they took out are told once more if they are not there afterwards."""


@dataclass(frozen=True, slots=True)
class Rebuild:
    """The store is emptied and filled from the whole log."""

    reason: str


Plan = Resend | Apply | Rebuild


def decide(local: Local, log: Log, *, tombstone_retention_ms: int, now_ms: int) -> Plan:
    """What is to be done, see the module. ChangelogError where it would lose what the store has."""
    stands, last = local.standing, log.last
    if last is None and (local.restoring or not _usable(local, log.start, log.end)):
        _refuse_loss(local, log)
    if stands is None:
        return Rebuild("it was never kept with a changelog")
    if not _usable(local, log.start, log.end):
        return Rebuild(f"it stands at {stands.position} of a changelog that holds {log.start} to {log.end}")
    owner = None if last is None else last.owner
    told = owner.sequence if owner is not None and owner.session == stands.session else None
    done = tuple(entry.sequence for entry in local.entries if told is not None and entry.sequence <= told)
    untold = len(local.entries) - len(done)
    mine = last is None or (told is not None and (untold > 0 or last.progress == local.progress))
    if mine and not local.restoring:
        return Resend(done, untold)
    if local.progress is None:
        return Rebuild("it has no rows")
    if last is None or last.offset < local.offset:
        return Rebuild(f"it is at offset {local.offset}, which was never told, and its changelog goes on from before")
    if stale(stands, tombstone_retention_ms, now_ms):
        return Rebuild("it is older than the tombstones that its changelog keeps")
    return Apply(stands.position, local.entries)


def stale(stands: Standing, tombstone_retention_ms: int, now_ms: int) -> bool:
    """Whether tombstones that the store lacks may be gone from the log."""
    return now_ms - stands.known_at_ms >= tombstone_retention_ms


def bring_together(
    store: UserStore,
    plan: Plan,
    read: Read,
    log: Log,
    *,
    session: bytes = NO_SESSION,
    now_ms: int,
    on_progress: Callable[[Restored], None] = lambda _: None,
    chunk_records: int = CHUNK_RECORDS,
) -> Restored:
    """Does as planned. The store is then ``session``'s, and has in it all of the log; an ``Outbox`` may be opened.

    ``now_ms``: when ``log.end`` was asked for, or before. ``session``: new for each call; none for a copy that only
    follows, which is a ValueError as long as it has something to tell (whoever owns the partition gets there: decide
    again later). Called off by an error of ``on_progress`` or ``read``, or killed, it is decided and begun again.
    Raises what ``changelog.restore`` does.
    """
    own: dict[bytes, bytes | None] = {STANDING_KEY: Standing(session, log.end, now_ms).encode()}
    match plan:
        case Resend(told, untold):
            if untold and session == NO_SESSION:
                raise ValueError("a store that has something to tell cannot only follow: decide again later")
            own |= {entry_key(sequence): None for sequence in told}
            return _claimed(store, own)
        case Apply(position, left):
            gone = list(dict.fromkeys(user for entry in left for user in entry.users))
            return fill(
                store, read(position), empty=False, now_ms=now_ms, gone=gone, own=lambda: _given_up(store, left) | own,
                on_progress=on_progress, chunk_records=chunk_records,
            )  # fmt: skip
        case Rebuild():
            records = iter(read(log.start))
            first = next(records, None)
            if first is None:
                return _claimed(store, own)
            return fill(
                store, chain((first,), records), empty=True, now_ms=now_ms, own=lambda: own, on_progress=on_progress,
                chunk_records=chunk_records,
            )  # fmt: skip


def follow(
    store: UserStore,
    records: Sequence[Record],
    position: int,
    *,
    known_at_ms: int,
    now_ms: int,
    tombstone_retention_ms: int,
) -> Restored:
    """Applies what comes next in the log to a copy that only follows: ``records`` are all from its position on.

    In one atomic step the copy is at ``position``, the offset after them. ``known_at_ms``: the log had no record from
    there on at this time (now, if it ended there; else the time of the last of the records). Whoever takes over
    applies what is left. ValueError for a store that a session owns; ChangelogError where it has fallen back too far
    and is to be brought together anew; else raises as ``changelog.restore``, and nothing counts then.
    """
    stands = standing(store)
    if stands is None or stands.session != NO_SESSION:
        raise ValueError("only a copy that was brought together without a session follows")
    if stale(stands, tombstone_retention_ms, now_ms):
        raise ChangelogError(
            f"a copy at offset {stands.position} of its changelog is older than the tombstones that are kept there: "
            "bring it together anew"
        )
    own = {STANDING_KEY: Standing(NO_SESSION, position, known_at_ms).encode()}
    return advance(store, records, own) if records else _claimed(store, own)


def _usable(local: Local, start: int, end: int) -> bool:
    return local.standing is not None and start <= local.standing.position <= end


def _refuse_loss(local: Local, log: Log) -> None:
    held = {
        "an interrupted restore to end": local.restoring,
        "rows": local.progress is not None,
        "commits to tell": bool(local.entries),
    }
    for what, is_so in held.items():
        if is_so:
            stands = "at no offset of it" if local.standing is None else f"at its offset {local.standing.position}"
            raise ChangelogError(
                f"the changelog (offsets {log.start} to {log.end}) holds no marker, but the store has {what} and "
                f"stands {stands}: was the topic made anew, or is it another one? Bring the topic back, or remove the "
                "store to begin anew with the stream"
            )


def _claimed(store: UserStore, own: Mapping[bytes, bytes | None]) -> Restored:
    """The store as it is, with these keys."""
    store.write_batch([], np.zeros((0, store.layout.row_bytes), np.uint8), None, own=own)
    return Restored(progress=store.progress())


def _given_up(store: UserStore, left: Sequence[Entry]) -> dict[bytes, bytes | None]:
    """The outbox without these entries, but for the users they took out who are not there now: they are told again.

    Whoever is ahead may have them still; for the stream they are gone.
    """
    own: dict[bytes, bytes | None] = {entry_key(entry.sequence): None for entry in left}
    deleted = list(dict.fromkeys(user for entry in left for user in entry.deleted))
    there = store.get_many(deleted)[1].tolist() if deleted else []
    if missing := [user for user, held in zip(deleted, there, strict=True) if not held]:
        own[entry_key(left[-1].sequence + 1)] = encode_entry([], missing, b"")
    return own
