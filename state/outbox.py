"""The outbox: what of a partition's commits its changelog has not acknowledged. It knows no broker.

A worker writes rows to its store first and publishes them afterwards, so a kill between the two would lose what was
to be told. Each commit therefore leaves an entry in the store, in the same atomic step: who was written, who was taken
out, and a payload (predictions). Whoever opens the store finds the entries, and ``takeover`` says what becomes of them.

    commit            entry n in the store, its rows and payload in memory
    take              commits n … m as one ``Publication``: one transaction, whose marker names session and m
    acknowledged      entries up to m are done with; the next commit takes them out, and moves ``Standing``

One thread commits (``note``, ``committed``, ``settle``, ``trim``), another may ``take`` and report ``acknowledged``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np

from learner.user_state import RowLayout, Slab
from state import codec
from state.changelog import Record
from state.codec import Progress
from state.exceptions import StoreDamaged
from state.keys import LAYOUT_KEY, NOTHING, OUTBOX, OWNER_KEY, PROGRESS_KEY, STANDING_KEY, USER
from state.outbox_codec import Entry, Owner, Standing, encode_entry
from state.store import UserStore

_SEQUENCE_BYTES = 8


class CommitLog(Protocol):
    """Is told of a partition's commits, around the write of each. All of it on the thread that commits."""

    def settle(self) -> None:
        """Finds out what became of a commit whose write failed. To be called before the next; raises StoreError."""

    def note(
        self, users: Sequence[bytes], deleted: Sequence[bytes], progress: Progress | None, payload: bytes
    ) -> Mapping[bytes, bytes | None]:
        """The store's own keys to be written in the same step as this commit."""

    def committed(
        self,
        users: Sequence[bytes],
        values: list[bytes],
        deleted: Sequence[bytes],
        progress: Progress | None,
        payload: bytes,
    ) -> None:
        """The commit noted last was written; ``values`` are its rows as stored."""

    def trim(self) -> None:
        """Takes what was acknowledged out of the store now rather than at the next commit."""


def commit(
    store: UserStore,
    log: CommitLog | None,
    users: Sequence[bytes],
    rows: Slab,
    progress: Progress | None,
    *,
    deleted: Sequence[bytes] = (),
    histories: Mapping[bytes, bytes | None] = NOTHING,
    payload: bytes = b"",
) -> None:
    """Writes a batch, and what the log has to note of it, in one atomic step. Raises as ``UserStore.write_batch``."""
    if log is None:
        store.write_batch(users, rows, progress, deleted=deleted, histories=histories)
        return
    own = log.note(users, deleted, progress, payload)
    values = store.write_batch(users, rows, progress, deleted=deleted, own=own, histories=histories)
    log.committed(users, values, deleted, progress, payload)


@dataclass(frozen=True, slots=True)
class Publication:
    """Commits that are told together, as one transaction."""

    rows: dict[bytes, bytes | None]
    """User -> the latest of its rows, as stored; None: it was taken out"""
    payloads: tuple[bytes, ...]
    """Of the commits, in their order"""
    progress: Progress | None
    """The last commit's; None: the store has applied nothing yet"""
    sequence: int
    """The last commit's"""


def columns(publication: Publication, layout: RowLayout, session: bytes) -> tuple[list[bytes], list[bytes | None]]:
    """(keys, values) of a publication's records for the changelog, in order. Its payloads go elsewhere, with them."""
    keys = [USER + user for user in publication.rows]
    values = list(publication.rows.values())
    own: list[tuple[bytes, bytes]] = [
        (LAYOUT_KEY, layout.fingerprint.encode()),
        (OWNER_KEY, Owner(session, publication.sequence).encode()),
    ]
    if publication.progress is not None:
        own.append((PROGRESS_KEY, publication.progress.encode()))
    return keys + [key for key, _ in own], values + [value for _, value in own]


def records(publication: Publication, layout: RowLayout, session: bytes) -> Iterator[Record]:
    """The same as records."""
    return map(Record, *columns(publication, layout, session))


def entry_key(sequence: int) -> bytes:
    """Where an entry lies in the store: in order of the sequence."""
    return OUTBOX + sequence.to_bytes(_SEQUENCE_BYTES, "big")


def entries(store: UserStore, prefix: bytes = OUTBOX) -> tuple[Entry, ...]:
    """What the store has of its outbox, the oldest first. Raises StoreDamaged."""
    try:
        return tuple(Entry.decode(int.from_bytes(key[len(OUTBOX) :], "big"), value) for key, value in store.own(prefix))
    except ValueError as error:
        raise StoreDamaged(f"{error}: remove the store, and its changelog restores it") from None


def standing(store: UserStore) -> Standing | None:
    """How the store stands to its changelog; None: no changelog was ever kept for it. Raises StoreDamaged."""
    found = dict(store.own(STANDING_KEY)).get(STANDING_KEY)
    try:
        return None if found is None else Standing.decode(found)
    except ValueError as error:
        raise StoreDamaged(f"{error}: remove the store, and its changelog restores it") from None


class _Commit(NamedTuple):
    """A commit that waits to be told."""

    sequence: int
    users: Sequence[bytes]
    values: Sequence[bytes]
    deleted: Sequence[bytes]
    payloads: tuple[bytes, ...]
    progress: Progress | None
    size: int
    """Bytes of all that"""

    @staticmethod
    def of(
        sequence: int,
        users: Sequence[bytes],
        values: Sequence[bytes],
        deleted: Sequence[bytes],
        payloads: tuple[bytes, ...],
        progress: Progress | None,
    ) -> _Commit:
        size = sum(sum(map(len, part)) for part in (users, values, deleted, payloads))
        return _Commit(sequence, users, values, deleted, payloads, progress, size)


class _Taken(NamedTuple):
    """A publication that waits to be acknowledged."""

    sequence: int
    at_ms: int
    """When it was taken, by this machine's clock"""
    commits: int
    size: int


class _Noted(NamedTuple):
    """What a write carries beside its rows."""

    sequence: int | None
    """Of the entry; None: it only trims"""
    trimmed: tuple[int, ...]
    """Entries that it takes out"""
    standing: Standing


class Outbox:
    """The ``CommitLog`` of a store that ``takeover.bring_together`` has made this session's.

    Entries that it finds there are told first, all in one publication with the store's progress: the rows they name
    as they stand now (a user who is no longer there: a tombstone), and their payloads. After StoreRolledBack, and
    once a publication was refused for good, it knows too much: close the store and bring it together anew.
    """

    def __init__(self, store: UserStore, session: bytes) -> None:
        stands = standing(store)
        if stands is None or stands.session != session:
            raise ValueError("the store is not this session's: takeover.bring_together comes before an outbox")
        found = entries(store)
        self._store = store
        self._lock = Lock()
        self._in_store = [entry.sequence for entry in found]
        self._sequence = found[-1].sequence if found else 0
        self._noted: _Noted | None = None
        self._acknowledged = 0
        self._standing = self._written = stands
        self._pending: deque[_Commit] = deque()
        self._taken: deque[_Taken] = deque()
        self._commits = self._bytes = 0
        if found:
            self._add(_found_again(store, found))

    @property
    def pending_commits(self) -> int:
        """Committed and not acknowledged; all entries found at the start count as one."""
        return self._commits

    @property
    def pending_bytes(self) -> int:
        """Of rows, ids and payloads that are in memory until they are acknowledged."""
        return self._bytes

    def settle(self) -> None:
        """See ``CommitLog``."""
        noted = self._noted
        if noted is None:
            return
        written = noted.sequence is not None and entries(self._store, entry_key(noted.sequence))
        self._noted = None
        if written:
            self._wrote(noted)
            self._add(_found_again(self._store, written))

    def note(
        self, users: Sequence[bytes], deleted: Sequence[bytes], progress: Progress | None, payload: bytes
    ) -> Mapping[bytes, bytes | None]:
        """See ``CommitLog``."""
        self.settle()
        noted, own = self._trimming(self._sequence + 1)
        own[entry_key(self._sequence + 1)] = encode_entry(users, deleted, payload)
        self._noted = noted
        return own

    def committed(
        self,
        users: Sequence[bytes],
        values: list[bytes],
        deleted: Sequence[bytes],
        progress: Progress | None,
        payload: bytes,
    ) -> None:
        """See ``CommitLog``. What is given is kept: nobody may change it afterwards."""
        noted, self._noted = self._noted, None
        assert noted is not None, "a commit is noted before it is written"
        self._wrote(noted)
        payloads = (payload,) if payload else ()
        self._add(_Commit.of(self._sequence, users, values, deleted, payloads, progress))

    def take(self, max_bytes: int) -> Publication | None:
        """All that was committed since the last ``take``, or as many whole commits as fit, one at least; None: nothing.

        A publication that fails and may be tried again is kept by whoever took it.
        """
        with self._lock:
            if not self._pending:
                return None
            chosen = [self._pending.popleft()]
            size = chosen[0].size
            while self._pending and size + self._pending[0].size <= max_bytes:
                chosen.append(self._pending.popleft())
                size += chosen[-1].size
            self._taken.append(_Taken(chosen[-1].sequence, _now_ms(), len(chosen), size))
        return _coalesced(chosen)

    def acknowledged(self, sequence: int, position: int) -> None:
        """The publication that ends with this commit, and all before it, are in the changelog for good.

        ``position``: the offset after its transaction. ValueError for a commit that no publication ends with.
        """
        with self._lock:
            done = [taken for taken in self._taken if taken.sequence <= sequence]
            if not done or done[-1].sequence != sequence:
                raise ValueError(f"no publication that ends with commit {sequence} waits to be acknowledged")
            for _ in done:
                self._taken.popleft()
            self._commits -= sum(taken.commits for taken in done)
            self._bytes -= sum(taken.size for taken in done)
            self._acknowledged = sequence
            self._standing = Standing(self._standing.session, position, done[-1].at_ms)

    def trim(self) -> None:
        """See ``CommitLog``; for a close that leaves nothing to look at, and before an erased user's files go."""
        self.settle()
        noted, own = self._trimming(None)
        if own:
            self._store.write_batch([], _no_rows(self._store.layout), None, own=own)
            self._wrote(noted)

    def _trimming(self, sequence: int | None) -> tuple[_Noted, dict[bytes, bytes | None]]:
        """What the next write does to the outbox, and the keys that say so but for the new entry's."""
        with self._lock:
            acknowledged, stands = self._acknowledged, self._standing
        noted = _Noted(sequence, tuple(n for n in self._in_store if n <= acknowledged), stands)
        own: dict[bytes, bytes | None] = {entry_key(n): None for n in noted.trimmed}
        if stands != self._written:
            own[STANDING_KEY] = stands.encode()
        return noted, own

    def _wrote(self, noted: _Noted) -> None:
        self._in_store = self._in_store[len(noted.trimmed) :]
        self._written = noted.standing
        if noted.sequence is not None:
            self._sequence = noted.sequence
            self._in_store.append(noted.sequence)

    def _add(self, new: _Commit) -> None:
        with self._lock:
            self._pending.append(new)
            self._commits += 1
            self._bytes += new.size


def _found_again(store: UserStore, found: Sequence[Entry]) -> _Commit:
    """One commit that tells all entries: the rows that they name, as the store has them now."""
    named = list(dict.fromkeys(user for entry in found for user in (*entry.users, *entry.deleted)))
    slab, there = store.get_many(named)
    users = [user for user, held in zip(named, there.tolist(), strict=True) if held]
    gone = [user for user, held in zip(named, there.tolist(), strict=True) if not held]
    values = codec.seal(store.layout, users, slab[there])
    payloads = tuple(entry.payload for entry in found if entry.payload)
    return _Commit.of(found[-1].sequence, users, values, gone, payloads, store.progress())


def _coalesced(commits: Sequence[_Commit]) -> Publication:
    rows: dict[bytes, bytes | None] = {}
    for one in commits:
        rows.update(zip(one.users, one.values, strict=True))
        rows.update(dict.fromkeys(one.deleted))
    payloads = tuple(payload for one in commits for payload in one.payloads)
    return Publication(rows, payloads, commits[-1].progress, commits[-1].sequence)


def _no_rows(layout: RowLayout) -> Slab:
    return np.zeros((0, layout.row_bytes), np.uint8)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
