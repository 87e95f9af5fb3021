"""The history reservoir of one partition: every event of sampled users, 8 bytes each, bounded, beside their rows.

Meta-updates train on it, and users' rows are re-derived from it. Kept are the users with the smallest sampling hashes
(a bottom-k sample): the CRC-32 of a user's id below the book's threshold, which starts above all and is halved
whenever there are more events than the limit. Who is kept depends on ids alone, never on what a user did.

A commit's events become what is to be written along with its rows, in the same atomic step:

    pending = book.before(…)      the rows as they are before the kernel walks the events
    (the walk)
    hot.write(…, histories=book.after(pending, …))

So rows and histories never disagree, and what is kept does not depend on how the stream was cut. A store whose rows
are written without their histories drops all of them (``UserStore.write_batch``): a user whose row came before the
book, or without it, has a history from the oldest chunk on that the row's ring has whole. Where the bytes lie, and
what they are: ``state.keys``, ``state.history_codec``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from learner.features import SparseRows
from learner.histories import Histories, starts_of
from learner.user_state import NO_GRADE, RowLayout, Rows, Slab, age_code
from state.codec import owner, owners
from state.exceptions import StoreDamaged
from state.history_codec import (
    ALL_USERS,
    CHUNK_EVENTS,
    Book,
    Head,
    chunk_events,
    decode_chunks,
    encode_chunks,
    oldest_chunk,
    unbroken,
)
from state.history_cursor import Entry, HistoryCursor
from state.keys import HISTORY, NOTHING, after_stem, chunk_key, first_stem, history_stem
from state.store import UserStore

if TYPE_CHECKING:  # an erasure needs no compiled code
    from learner.adaptation import EventColumns

Features = Callable[[NDArray[np.int64]], SparseRows]
"""(places among the users of a commit) -> the encoded feature columns of these users, one row each"""
Skip = Callable[[NDArray[np.uint32]], NDArray[np.bool_]]
"""(sampling hashes of users) -> who of them may not be drawn"""

_NO_FEATURES = SparseRows(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
_STEM_BYTES = 13
_STRIDE = 16
"""A draw goes on from a random hash by up to so many users. Without, a user would be drawn as often as the gap before
its hash is wide, which makes a sample worth half as much; with 16 it is worth 94 %."""
_DRAWS = 32
"""Rounds of drawing until too many users were skipped"""


@dataclass(frozen=True, slots=True)
class HistoryLimits:
    """Bounds of one partition's histories."""

    events: int
    """Kept of all users; exceeded until the next ``shrink``"""
    events_per_user: int
    """The latest that are kept of one user, at least; up to a chunk more, as whole chunks go"""

    def __post_init__(self) -> None:
        if self.events < 1 or self.events_per_user < CHUNK_EVENTS:
            raise ValueError(
                f"histories of {self.events} events, {self.events_per_user} a user: meta.histories.events is at least "
                f"1 and meta.histories.events_per_user at least {CHUNK_EVENTS}"
            )


@dataclass(frozen=True, slots=True)
class Pending:
    """What a commit has to know of its s sampled users as they were before its events."""

    book: Book
    member: NDArray[np.int64]
    """(n,) which of the s each of the commit's users is; −1: not sampled"""
    users: list[bytes]
    """s ids"""
    count: NDArray[np.int64]
    """(s,) events before; 0 for who starts"""
    first_time_ms: NDArray[np.int64]
    """(s,) of the first event; undefined for who starts"""
    headless: NDArray[np.bool_]
    """(s,) without a history so far, or the one there is to go"""
    window: NDArray[np.uint64]
    """(s, CHUNK_EVENTS) ring entries of the chunk that the next event falls into"""
    features: SparseRows
    """One row for each who is ``headless``, in order"""
    expired: dict[int, list[Entry]]
    """Which of the s start anew -> what there is of their old histories"""


class HistoryBook:
    """The histories of one partition's store. Remembers nothing itself: what counts is what the store has.

    ``grades``: G, how many grades the model has. ValueError for a ring that is shorter than a chunk.
    """

    def __init__(self, store: UserStore, layout: RowLayout, limits: HistoryLimits, grades: int) -> None:
        if layout.ring < CHUNK_EVENTS:
            raise ValueError(
                f"rows keep {layout.ring} events, and histories need {CHUNK_EVENTS} of them: set state.ring to at "
                f"least {CHUNK_EVENTS}, or meta.moves to off"
            )
        self._store = store
        self._layout = layout
        self._limits = limits
        self._grades = grades

    def keeps(self, users: Sequence[bytes]) -> NDArray[np.bool_]:
        """(n,) whose histories are kept now."""
        book = self._book()
        kept: NDArray[np.bool_] = owners(users).astype(np.int64) < book.threshold
        return kept

    def counts(self) -> Book:
        """Users, events and keys kept, and below which threshold."""
        return self._book()

    def before(
        self,
        users: Sequence[bytes],
        rows: Rows,
        slots: NDArray[np.int32],
        starting: NDArray[np.bool_],
        stored_events: NDArray[np.int64],
        features: Features,
    ) -> Pending:
        """To be called before the kernel walks the events of a commit's n distinct users.

        ``rows`` at ``slots`` (n,) are theirs; nothing is read there of who is ``starting`` (n,) at the first event.
        ``stored_events`` (n,) are those of the row in the store, −1 where there is none: who starts and has one was
        away for too long, and loses the old history. ``features`` is asked once, for those who get a head.
        """
        book = self._book()
        places = np.flatnonzero(owners(users).astype(np.int64) < book.threshold)
        member = np.full(len(users), -1, np.int64)
        member[places] = np.arange(len(places))
        chosen, fresh = slots[places], starting[places]
        count = np.where(fresh, 0, rows["events"][chosen].astype(np.int64))
        headless = fresh | (rows["last_offset"][chosen] <= book.since)
        window = (count // CHUNK_EVENTS * CHUNK_EVENTS)[:, None] + np.arange(CHUNK_EVENTS)
        names = [users[k] for k in places.tolist()]
        expired = np.flatnonzero(fresh & (stored_events[places] >= 0)).tolist()
        return Pending(
            book, member, names, count, rows["first_time_ms"][chosen], headless,
            rows["ring"][chosen[:, None], window % self._layout.ring],
            features(places[headless]) if headless.any() else _NO_FEATURES,
            dict(zip(expired, _held(self._store, [names[k] for k in expired]), strict=True)),
        )  # fmt: skip

    def after(
        self, pending: Pending, user: NDArray[np.int64], events: EventColumns, applied: NDArray[np.bool_]
    ) -> dict[bytes, bytes | None]:
        """What is to be written along with the rows: ``histories`` of ``HotRows.write``.

        ``user`` (N,) is an event's place among the n users, ``applied`` (N,) whether the walk applied it.
        """
        member = pending.member[user]
        kept = np.flatnonzero(applied & (member >= 0))
        kept = kept[_stable_order(member[kept], len(pending.users))]
        member = member[kept]
        fresh = np.bincount(member, minlength=len(pending.users))
        number = pending.count[member] + np.arange(len(kept)) - (np.cumsum(fresh) - fresh)[member]
        time_ms = events.event_time_ms[kept]
        first_time_ms = pending.first_time_ms.copy()
        first_time_ms[member[number == 0]] = time_ms[number == 0]
        entries = self._entries(events, kept, time_ms - first_time_ms[member])
        return self._written(pending, fresh, member, number, entries)

    def read(self, users: Sequence[bytes], events: NDArray[np.int64]) -> tuple[Histories, NDArray[np.bool_]]:
        """(histories of these n users, (n,) whether one is complete): empty for who is not kept.

        ``events`` (n,) are those of the users' rows, so that every key is known. A history is complete that has all of
        them, from the first on. Raises StoreDamaged.
        """
        book = self._book()
        places = np.flatnonzero((owners(users).astype(np.int64) < book.threshold) & (events > 0)).tolist()
        stems = [history_stem(users[k]) for k in places]
        last = (events[places] - 1) // CHUNK_EVENTS
        numbers = [
            range(a, b + 1) for a, b in zip(oldest_chunk(book, events[places]).tolist(), last.tolist(), strict=True)
        ]
        keys = [
            key
            for stem, chunks in zip(stems, numbers, strict=True)
            for key in (stem, *(chunk_key(stem, k) for k in chunks))
        ]
        values = iter(self._store.histories(keys))
        parts: dict[int, _Stored] = {}
        for place, chunks in zip(places, numbers, strict=True):
            head, held = next(values), [next(values) for _ in chunks]
            whole = unbroken(held, int(events[place]) - CHUNK_EVENTS * chunks[-1])
            if head is not None and whole:
                parts[place] = _Stored(head, chunks.stop - len(whole), whole)
        found = self._unpacked(parts.values(), [users[k] for k in parts])
        complete = np.zeros(len(users), np.bool_)
        complete[list(parts)] = found.first == 0
        return _spread(found, list(parts), len(users)), complete

    def sample(self, rng: np.random.Generator, count: int, *, skip: Skip | None = None) -> Histories:
        """Histories of ``count`` users, drawn with replacement; fewer where nearly all are skipped, or none are kept.

        The same store and generator give the same users, whatever made the store. Raises StoreDamaged.
        """
        book = self._book()
        drawn: list[bytes] = []
        with closing(self._store.history_cursor()) as cursor:
            for _ in range(_DRAWS if book.users else 0):
                stems = _drawn(cursor, rng, count - len(drawn), book.threshold)
                if skip is not None:
                    hashes = np.array([int.from_bytes(stem[1:5], "big") for stem in stems], np.uint32)
                    stems = [stem for stem, out in zip(stems, skip(hashes).tolist(), strict=True) if not out]
                drawn += stems
                if len(drawn) >= count:
                    break
            distinct = {stem: k for k, stem in enumerate(dict.fromkeys(drawn))}
            found = self._unpacked(_stored(cursor, stem) for stem in distinct)
        return found.take(np.array([distinct[stem] for stem in drawn], np.int64))

    def walk(self) -> Iterator[tuple[bytes, int, Histories]]:
        """(id, sampling hash, history) of every user who is kept, as they stand now, in order of hashes.

        Raises StoreDamaged.
        """
        with closing(self._store.history_cursor()) as cursor:
            entry = cursor.seek(first_stem(0))
            while entry is not None:
                stored = _stored(cursor, entry[0][:_STEM_BYTES])
                user = self._head(stored.head).user
                yield user, owner(user), self._unpacked([stored])
                entry = cursor.seek(after_stem(entry[0][:_STEM_BYTES]))

    def shrink(self) -> int:
        """Brings the histories inside the limits; returns how many users are no longer kept.

        To be called between two commits. Where there are too many events the threshold is halved, until there are not,
        and what is above it goes in one atomic step. Limits that were set anew count from here on. Raises StoreError.
        """
        before = self._book()
        if before.events_per_user != self._limits.events_per_user:
            self._cut_users(before)
        book = self._book()
        kept = book
        with closing(self._store.history_cursor()) as cursor:
            while kept.events > self._limits.events and kept.threshold > 0:
                bound = kept.threshold // 2
                gone = _Totals.of(_range(cursor, first_stem(bound), first_stem(kept.threshold)))
                kept = gone.less(replace(kept, threshold=bound))
        if kept != book:
            self._store.cut_histories(first_stem(kept.threshold), {HISTORY: kept.encode()})
        return book.users - kept.users

    def _cut_users(self, book: Book) -> None:
        """Takes out what is beyond a lower limit of a user's events; a higher one counts from the next event on."""
        book = replace(book, events_per_user=self._limits.events_per_user)
        gone: dict[bytes, bytes | None] = {}
        with closing(self._store.history_cursor()) as cursor:
            entry = cursor.seek(first_stem(0))
            while entry is not None:
                stem = entry[0][:_STEM_BYTES]
                chunks = list(_range(cursor, stem + b"\0", after_stem(stem)))
                key, value = chunks[-1]
                events = CHUNK_EVENTS * _number(key) + chunk_events(value)
                oldest = int(oldest_chunk(book, np.array(events)))
                gone.update({key: None for key, _ in chunks if _number(key) < oldest})
                entry = cursor.seek(after_stem(stem))
        book = replace(book, events=book.events - CHUNK_EVENTS * len(gone), keys=book.keys - len(gone))
        self._store.write_batch([], _no_rows(self._layout), None, histories={**gone, HISTORY: book.encode()})

    def _book(self) -> Book:
        """The store's; where it has none, the one that the first commit will begin."""
        book = _book(self._store)
        if book is not None:
            return book
        progress = self._store.progress()
        since = -1 if progress is None else progress.offset
        return Book(ALL_USERS, since, 0, 0, 0, self._limits.events_per_user)

    def _entries(self, events: EventColumns, kept: NDArray[np.int64], age_ms: NDArray[np.int64]) -> NDArray[np.uint64]:
        """As the kernel writes them into a ring."""
        grade = events.grade[kept]
        grade = np.where(grade == self._grades, NO_GRADE, grade).astype(np.uint64)
        entries = events.item_hash[events.item[kept]] >> np.uint64(24) << np.uint64(24)
        entries |= events.label[kept].astype(np.uint64) << np.uint64(23)
        entries |= grade << np.uint64(17)
        entries |= age_code(age_ms // 1000)
        return entries

    def _written(
        self,
        pending: Pending,
        fresh: NDArray[np.int64],
        member: NDArray[np.int64],
        number: NDArray[np.int64],
        entries: NDArray[np.uint64],
    ) -> dict[bytes, bytes | None]:
        """The commit's new entries, event ``number`` of ``member`` each, and what of their chunks was there before."""
        learned, before, now = fresh > 0, pending.count, pending.count + fresh
        begun = before // CHUNK_EVENTS
        oldest = oldest_chunk(pending.book, now)
        first = np.maximum(begun, oldest)
        written = number >= CHUNK_EVENTS * first[member]
        old_user, old_place = np.nonzero(
            (np.arange(CHUNK_EVENTS) < (before % CHUNK_EVENTS)[:, None]) & (learned & (first == begun))[:, None]
        )
        chunk_user, chunks = encode_chunks(
            np.where(learned, now - CHUNK_EVENTS * first, 0),
            np.concatenate([old_user, member[written]]),
            np.concatenate([old_place, number[written] - CHUNK_EVENTS * first[member[written]]]),
            np.concatenate([pending.window[old_user, old_place], entries[written]]),
        )
        stems = [history_stem(user) for user in pending.users]
        put, book = self._taken_out(pending, learned, stems, oldest)
        numbers = np.arange(len(chunks)) - np.searchsorted(chunk_user, chunk_user) + first[chunk_user]
        whose, which = chunk_user.tolist(), numbers.tolist()
        put.update({chunk_key(stems[u], k): chunk for u, k, chunk in zip(whose, which, chunks, strict=True)})
        heads = self._heads(pending, learned, stems)
        put.update(heads)
        # A user's unfinished chunk was counted before, where there was a history.
        kept_on = learned & ~pending.headless & (first == begun)
        known = np.where(kept_on, before % CHUNK_EVENTS, 0)
        book = replace(
            book,
            users=book.users + len(heads),
            events=book.events + int((now - CHUNK_EVENTS * first - known)[learned].sum()),
            keys=book.keys + len(heads) + len(chunks) - int((known > 0).sum()),
        )
        put[HISTORY] = book.encode()
        return put

    def _taken_out(
        self, pending: Pending, learned: NDArray[np.bool_], stems: list[bytes], oldest: NDArray[np.int64]
    ) -> tuple[dict[bytes, bytes | None], Book]:
        """Old histories of users who start anew, and chunks that are too old now; the book without them."""
        gone = {key: value for u, old in pending.expired.items() if learned[u] for key, value in old}
        was = oldest_chunk(pending.book, pending.count)
        out_of_reach = np.flatnonzero(learned & ~pending.headless & (oldest > was))
        keys = [
            chunk_key(stems[u], k)
            for u in out_of_reach.tolist()
            for k in range(int(was[u]), min(int(oldest[u]), int(pending.count[u]) // CHUNK_EVENTS + 1))
        ]
        values = self._store.histories(keys) if keys else []
        gone.update({key: value for key, value in zip(keys, values, strict=True) if value is not None})
        return dict.fromkeys(gone), _Totals.of(gone.items()).less(pending.book)

    def _heads(self, pending: Pending, learned: NDArray[np.bool_], stems: list[bytes]) -> dict[bytes, bytes]:
        rows = pending.features
        heads: dict[bytes, bytes] = {}
        for k, u in enumerate(np.flatnonzero(pending.headless).tolist()):
            if learned[u]:
                cells = slice(int(rows.starts[k]), int(rows.starts[k + 1]))
                heads[stems[u]] = Head(pending.users[u], rows.columns[cells], rows.weights[cells]).encode()
        return heads

    def _unpacked(self, stored: Iterable[_Stored], users: Sequence[bytes] | None = None) -> Histories:
        """Packed into arrays and checked; ``users``: whose they must be."""
        parts = list(stored)
        heads = [self._head(part.head) for part in parts]
        for head, user in zip(heads, users or (), strict=users is not None):
            if head.user != user:
                raise self._damaged(f"the history of user {user!r} is that of {head.user!r}")
        try:
            lengths, entries = decode_chunks([chunk for part in parts for chunk in part.chunks])
        except ValueError as error:
            raise self._damaged(str(error)) from None
        chunks = starts_of(np.array([len(part.chunks) for part in parts], np.int64))
        events = starts_of(lengths)[chunks]
        last = np.zeros(len(lengths), np.bool_)
        last[chunks[1:] - 1] = True
        if (lengths[~last] != CHUNK_EVENTS).any():
            raise self._damaged("a history has a gap between two chunks")
        return Histories(
            events, entries >> np.uint64(24), (entries >> np.uint64(23) & np.uint64(1)).astype(np.int8),
            (entries >> np.uint64(17) & np.uint64(NO_GRADE)).astype(np.int32),
            CHUNK_EVENTS * np.array([part.first for part in parts], np.int64),
            SparseRows(
                starts_of(np.array([len(head.columns) for head in heads], np.int64)),
                np.concatenate([np.zeros(0, np.int64), *(head.columns for head in heads)]),
                np.concatenate([np.zeros(0, np.float32), *(head.weights for head in heads)]),
            ),
        )  # fmt: skip

    def _head(self, packed: bytes) -> Head:
        try:
            return Head.decode(packed)
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, what: str) -> StoreDamaged:
        return _damaged(self._store, what)


def without_users(store: UserStore, users: Sequence[bytes]) -> Mapping[bytes, bytes | None]:
    """What takes out the histories of these users, to be written in the step that takes out their rows."""
    book = _book(store)
    if book is None:
        return NOTHING
    kept = [user for user in users if owner(user) < book.threshold]
    gone = [entry for entries in _held(store, kept) for entry in entries]
    return {**dict.fromkeys(key for key, _ in gone), HISTORY: _Totals.of(gone).less(book).encode()}


@dataclass(frozen=True, slots=True)
class _Stored:
    """A history as it lies in the store."""

    head: bytes
    first: int
    """Number of the first chunk"""
    chunks: list[bytes]


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sums over entries."""

    users: int
    events: int
    keys: int

    @staticmethod
    def of(entries: Iterable[Entry]) -> _Totals:
        users = events = keys = 0
        for key, value in entries:
            keys += 1
            if len(key) == _STEM_BYTES:
                users += 1
            else:
                events += chunk_events(value)
        return _Totals(users, events, keys)

    def less(self, book: Book) -> Book:
        """The book when these are gone."""
        return replace(
            book, users=book.users - self.users, events=book.events - self.events, keys=book.keys - self.keys
        )


def _book(store: UserStore) -> Book | None:
    packed = store.histories([HISTORY])[0]
    try:
        return None if packed is None else Book.decode(packed)
    except ValueError as error:
        raise _damaged(store, str(error)) from None


def _damaged(store: UserStore, what: str) -> StoreDamaged:
    place = f"{path}: " if (path := getattr(store, "path", None)) else ""
    return StoreDamaged(f"{place}{what}: restore a snapshot or the changelog")


def _number(key: bytes) -> int:
    return int.from_bytes(key[_STEM_BYTES:], "big")


def _range(cursor: HistoryCursor, first: bytes, last: bytes) -> Iterator[Entry]:
    """What lies from ``first`` to before ``last``."""
    entry = cursor.seek(first)
    while entry is not None and entry[0] < last:
        yield entry
        entry = cursor.next()


def _held(store: UserStore, users: Sequence[bytes]) -> list[list[Entry]]:
    """All that there is of each user's history."""
    if not users:
        return []
    with closing(store.history_cursor()) as cursor:
        return [list(_range(cursor, stem, after_stem(stem))) for stem in map(history_stem, users)]


def _stored(cursor: HistoryCursor, stem: bytes) -> _Stored:
    """The history with this stem, which is there."""
    (_, head), *chunks = _range(cursor, stem, after_stem(stem))
    return _Stored(head, _number(chunks[0][0]), [value for _, value in chunks])


def _drawn(cursor: HistoryCursor, rng: np.random.Generator, count: int, threshold: int) -> list[bytes]:
    """Stems of so many users, with replacement."""
    points = rng.integers(0, threshold, count).tolist()
    steps = rng.integers(0, _STRIDE, count).tolist()
    return [_some_steps_on(cursor, first_stem(point), further) for point, further in zip(points, steps, strict=True)]


def _some_steps_on(cursor: HistoryCursor, key: bytes, steps: int) -> bytes:
    """The stem that is so many users after the first one from the key on; the first follows the last."""
    for _ in range(steps + 1):
        entry = cursor.seek(key) or cursor.seek(first_stem(0))
        assert entry is not None, "there are users, by the book"
        key = after_stem(entry[0][:_STEM_BYTES])
    return key[:_STEM_BYTES]


def _spread(found: Histories, places: Sequence[int], users: int) -> Histories:
    """Those of ``users`` users, of whom the ones at ``places`` are found and the others have none."""
    lengths, first, cells = (np.zeros(users, np.int64) for _ in range(3))
    where = np.array(places, np.int64)
    lengths[where], first[where], cells[where] = found.lengths, found.first, np.diff(found.features.starts)
    features = SparseRows(starts_of(cells), found.features.columns, found.features.weights)
    return Histories(starts_of(lengths), found.item, found.label, found.grade, first, features)


def _stable_order(member: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """What sorts by member and leaves the order inside; numbers of 16 bits are sorted by radix, five times as fast."""
    narrow = member.astype(np.uint16) if count <= 1 << 16 else member
    return np.argsort(narrow, kind="stable")


def _no_rows(layout: RowLayout) -> Slab:
    return np.zeros((0, layout.row_bytes), np.uint8)
