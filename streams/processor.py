"""The one code path of every stream: ``process(partition, records)``, embedded, live or replayed (design §7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from configs.settings import StateSettings
from learner.adaptation import Adaptation, Adapted, EventColumns
from learner.event_clock import NOBODY, Ticks, advance, new_clock
from learner.features import SparseRows
from learner.interactions import Interactions
from learner.metrics import event_index
from learner.serving import ServingModel
from learner.user_state import HEADER_BYTES, ItemHashes, RowLayout, Slab, new_rows
from state.erasure import Tell, erase_user
from state.exceptions import ChangelogError
from state.expiry import Expiry, idle_up_to, pack_clock, unpack_clock
from state.histories import HistoryBook, HistoryLimits
from state.hot_rows import HotMemory, HotRows
from state.keys import STANDING_KEY
from state.outbox import CommitLog
from state.receipt import Removal
from state.store import UserStore
from state.sweep import SWEEP_ROWS, Sweeper
from streams.versions import Mover, Rebase, Serving, share_items

OpenStore = Callable[[int, RowLayout], UserStore]
"""(topic partition, layout of the rows) -> its store"""
OpenLog = Callable[[int, UserStore], CommitLog]
"""(topic partition, its store) -> what is told of every commit"""
Payload = Callable[[Interactions, Adapted], bytes]
"""(N events of one commit, what was said of them) -> what is to be told of them along with their users' rows"""

DAY_MS = 86_400_000
COMMIT_USERS = 8_192
"""Users of one commit: writing their rows holds the interpreter's lock for some 20 ms, and others wait for it"""


UNNUMBERED = -1
"""Where ``Predictions.number`` is not known"""


class Predictions(NamedTuple):
    """What was said of N records, in their order, each before its label was used."""

    logit: NDArray[np.float32]
    """(N,) NaN where the event was applied before"""
    probability: NDArray[np.float32]
    """(N,) of label 1"""
    applied: NDArray[np.bool_]
    """(N,) False where the store had the event already"""
    number: NDArray[np.int64]
    """(N,) how many of its user's events came before it; −1 where not applied, without histories and by ``predict``"""


@dataclass(slots=True)
class Counts:
    """Totals since the processor was made."""

    events: int = 0
    """Records processed, the skipped ones included"""
    skipped: int = 0
    """Already applied, by the row's own last offset"""
    guarded: int = 0
    """Updates refused because they were not finite"""
    users_created: int = 0
    users_expired: int = 0
    """Came back after they had been idle for too long, and started anew"""
    users_swept: int = 0
    """Were idle for too long and taken out before they came back"""
    users_moved: int = 0
    """Came onto another version of the shared parameters"""


@dataclass(frozen=True, slots=True)
class _Part:
    """The events of one commit: N of them, of U users."""

    events: slice
    """Of the records"""
    codes: NDArray[np.int32]
    """(U,) the users' codes in the records"""
    user: NDArray[np.int64]
    """(N,) which of the U an event is of"""
    first: NDArray[np.int64]
    """(U,) the first event of each user"""
    ticks: Ticks | None
    """The event clock at these events; None without expiry"""
    offset: int
    """The store's progress after it"""


class Processor:
    """Predicts and learns every event, and makes the users' rows durable, commit by commit.

    A commit is at most ``state.commit_events`` events: their users' rows are read (``HotRows``), walked event by event,
    and those that learned are written together with the offset of the last. A crash between commits loses nothing: the
    stream goes on after the store's offset, and a row skips what it has applied. How the stream is cut changes no bit.
    After an error nothing of the commit counts, and the same records may come again.
    With ``state.expire_after_days``, each commit first sweeps a few rows of idle users out.
    ``serve`` names the versions of the shared parameters from there on; until then it is ``model``. With ``limits``,
    users' whole histories are kept beside their rows, of as many users as the limits allow (``state.histories``).
    ``log`` makes what is told of a partition's commits, those that take users out too (``state.outbox``).
    Use as a context: it closes the stores it opened. Not for several threads at once.
    """

    def __init__(
        self,
        model: ServingModel,
        open_store: OpenStore,
        state: StateSettings,
        *,
        log: OpenLog | None = None,
        limits: HistoryLimits | None = None,
        rebase: Rebase = "history",
    ) -> None:
        self.model = model
        self.layout = RowLayout.of(model.first, model.second, state.ring)
        self.counts = Counts()
        self._commit_events = state.commit_events
        self._open_store = open_store
        self._expiry = None if state.expire_after_days is None else Expiry(round(state.expire_after_days * DAY_MS))
        rows = max((state.hot_rows_mb << 20) // self.layout.row_bytes, min(state.commit_events, COMMIT_USERS))
        self._memory = HotMemory(self.layout, rows)
        self._hot: dict[int, HotRows] = {}
        self._sweepers: dict[int, Sweeper] = {}
        self._log = log
        self._adaptations = {model: Adaptation(self.layout, model.first, model.second)}
        self._serving: dict[int, Serving] = {}
        self._limits = limits
        self._books: dict[int, HistoryBook] = {}
        self._mover = Mover(self.layout, rebase)
        self._moved = {"history": 0, "ring": 0, "closed": 0}
        self._hashes = ItemHashes()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every store it opened."""
        while self._hot:
            self.release(next(reversed(self._hot)))

    def adopt(self, partition: int, store: UserStore) -> None:
        """Takes a store that was opened, and brought together with its changelog, as this partition's.

        From here on it is the processor's to close. ValueError where the partition has one; ChangelogError where the
        store's commits have to be told and there is no log.
        """
        if partition in self._hot:
            raise ValueError(f"partition {partition} has a store already: release it first")
        if self._log is None and store.own(STANDING_KEY):
            raise ChangelogError(
                "the store is a worker's, which tells a changelog of every commit, and this run would not: give "
                "another state directory"
            )
        self._hot[partition] = HotRows(store, self._memory, None if self._log is None else self._log(partition, store))
        if self._limits is not None:
            self._books[partition] = HistoryBook(store, self.layout, self._limits, len(self.model.fixed.grades))

    def serve(self, partition: int, serving: Serving) -> None:
        """From the next event on these versions serve the partition's users; their rows move when they come.

        To be called between two calls of ``process``, at a source offset that the caller records.
        """
        share_items((*self._serves(partition).models(), *serving.models()))
        self._serving[partition] = serving
        served = [model for each in self._serving.values() for model in each.models()]
        self._adaptations = {
            model: self._adaptations.get(model) or Adaptation(self.layout, model.first, model.second)
            for model in (self.model, *served)
        }

    @property
    def moved(self) -> Mapping[str, int]:
        """Rows that came onto another version, by the way they took."""
        return self._moved

    def book(self, partition: int) -> HistoryBook:
        """The histories of the partition's users. ValueError without ``limits``."""
        if self._limits is None:
            raise ValueError("this processor keeps no histories")
        self._rows(partition)
        return self._books[partition]

    def release(self, partition: int) -> None:
        """Closes the partition's store and drops its rows from memory; without one, nothing is done."""
        hot = self._hot.pop(partition, None)
        for of_partition in (self._sweepers, self._serving, self._books):
            of_partition.pop(partition, None)
        if hot is not None:
            hot.forget()
            hot.store.close()

    def store(self, partition: int) -> UserStore:
        """The partition's store, opened at first use."""
        return self._rows(partition).store

    def process(
        self, partition: int, records: Interactions, *, through: int | None = None, payload: Payload | None = None
    ) -> Predictions:
        """Predicts each record, then learns it; on return all rows are in the partition's store.

        Offsets must rise within the records. Records that were applied before change nothing and may come again.
        ``through``: the source offset that the store's progress ends at, where no events follow the last of the
        records, or there are none; ValueError if it is before the last. What ``payload`` makes of a commit's events
        goes to the log in the same atomic step as their rows; those that were applied before are not in it, unless
        their rows alone say that they were (``Adapted.applied``).
        """
        hot, n = self._rows(partition), len(records)
        if through is not None and n and through < records.offset[-1]:
            raise ValueError(f"the records end at offset {records.offset[-1]}, after the {through} they are to go to")
        result = _no_predictions(n)
        serving = self._serves(partition)
        columns = {model: self._columns(model, records, settle=True) for model in serving.models()}
        done = self._skipped(hot, records, result)
        while done < n:
            self.sweep(partition)
            part = self._next_part(hot, records, done, through)
            try:
                adapted, index = self._learn(partition, records, columns, part, payload)
            except BaseException:
                hot.forget()  # rows in memory may have learned what the store has not
                raise
            result.logit[part.events], result.probability[part.events] = adapted.logit, adapted.probability
            result.applied[part.events] = adapted.applied
            result.number[part.events] = index
            done = part.events.stop
        if through is not None:
            self._advance(partition, through)
        return result

    def predict(self, partition: int, records: Interactions) -> Predictions:
        """Predicts each record from its user's row as it stands: no label is used and nothing is written."""
        hot, serving = self._rows(partition), self._serves(partition)
        codes, user = np.unique(records.user, return_inverse=True)
        users = [records.user_ids[code].encode() for code in codes.tolist()]
        rows, found = hot.store.get_many(users)
        found &= self.layout.rows(rows)["last_offset"] > self._idle_now(hot)
        said = _nothing_adapted(len(records))
        for model, places in serving.groups(users):
            self._ready(partition, model, rows, places, users, records, codes, ~found)
            chosen = np.flatnonzero(np.isin(user, places))
            events = _part(self._columns(model, records, settle=False), chosen, user[chosen].astype(np.int32))
            said = _put(said, chosen, self._adaptations[model].predict(rows, events, model.items))
        return Predictions(said.logit, said.probability, said.applied, np.full(len(records), UNNUMBERED))

    def sweep(self, partition: int, rows: int = SWEEP_ROWS) -> int:
        """Goes on with the sweep over the partition's next ``rows`` rows; returns how many idle users it took out.

        It changes no prediction. ``process`` does it at every commit. Raises StoreError.
        """
        if self._expiry is None:
            return 0
        sweeper = self._sweepers.setdefault(partition, Sweeper())
        swept = sweeper.sweep(self._rows(partition), rows)
        self.counts.users_swept += swept
        return swept

    def erase(self, partition: int, user_id: str, tell: Tell | None = None) -> Removal:
        """Erases a user from the partition's store and from memory, whether it is there or not; see ``state.erasure``.

        To be called between two calls of ``process``; ``tell`` where there is a log. Raises StoreError, and what
        ``tell`` does; erase again then.
        """
        hot = self._rows(partition)
        return erase_user(hot.store, user_id.encode(), partition, hot=hot, tell=tell)

    def _advance(self, partition: int, offset: int) -> None:
        """A commit without rows, unless the store is there already."""
        hot = self._hot[partition]
        progress = hot.progress()
        if progress is None or progress.offset < offset:
            clock = b"" if progress is None else progress.clock
            hot.write(np.zeros(0, np.int32), offset, self._serves(partition).model.meta_version, clock)

    def _skipped(self, hot: HotRows, records: Interactions, result: Predictions) -> int:
        """How many of the records the store's offset covers: applied before, even if their users are gone since."""
        progress = hot.progress()
        done = 0 if progress is None else int(np.searchsorted(records.offset, progress.offset, side="right"))
        result.logit[:done], result.probability[:done], result.applied[:done] = np.nan, np.nan, False
        self.counts.events += done
        self.counts.skipped += done
        return done

    def _rows(self, partition: int) -> HotRows:
        if partition not in self._hot:
            store = self._open_store(partition, self.layout)
            try:
                self.adopt(partition, store)
            except BaseException:
                store.close()
                raise
        return self._hot[partition]

    def _serves(self, partition: int) -> Serving:
        return self._serving.get(partition) or Serving(self.model)

    def _columns(self, model: ServingModel, records: Interactions, settle: bool) -> EventColumns:
        item_rows = model.item_rows(records.item_ids, records.item_features, settle=settle)
        return EventColumns(
            records.user, records.item, records.label, model.grades(records.value), records.event_time_ms,
            records.offset, item_rows, self._hashes.of(records.item_ids),
        )  # fmt: skip

    def _next_part(self, hot: HotRows, records: Interactions, start: int, through: int | None) -> _Part:
        """The next commit's events: fewer where they are of many users, or one is idle for too long between two."""
        stop, ticks = start + _of_few_users(records.user[start : start + self._commit_events]), None
        if self._expiry is not None:
            events = slice(start, stop)
            ticks = self._ticks(self._expiry, hot, records, events)
            stop = start + _until_someone_expires(records.user[events], records.offset[events], ticks.idle)
            if stop < events.stop:
                ticks = self._ticks(self._expiry, hot, records, slice(start, stop))
        codes, first, user = np.unique(records.user[start:stop], return_index=True, return_inverse=True)
        offset = int(records.offset[stop - 1]) if through is None or stop < len(records) else through
        return _Part(slice(start, stop), codes, user.astype(np.int64), first, ticks, offset)

    def _learn(
        self,
        partition: int,
        records: Interactions,
        columns: Mapping[ServingModel, EventColumns],
        part: _Part,
        payload: Payload | None,
    ) -> tuple[Adapted, NDArray[np.int64]]:
        """One commit: reads the users' rows, walks the events, writes the rows that learned something.

        Returns what was said, and ``Predictions.number``.
        """
        book, users = self._books.get(partition), [records.user_ids[code].encode() for code in part.codes.tolist()]
        slots, unknown = self._hot[partition].acquire(users)
        starting, expired = np.zeros(len(slots), np.bool_), 0
        starting[unknown] = True
        if part.ticks is not None:
            idle = (self._memory.rows["last_offset"][slots] <= part.ticks.idle[part.first]) & ~starting
            starting |= idle
            expired = int(idle.sum())
        groups, ways = list(self._serves(partition).groups(users)), Counter[Rebase]()
        for model, places in groups:
            ways += self._ready(
                partition, model, self._memory.slab, places, users, records, part.codes, starting, slots
            )
        histories, index = dict[bytes, bytes | None](), np.full(len(part.user), UNNUMBERED)
        if book is None:
            adapted = self._walked(groups, columns, part, slots)
        else:
            before = self._memory.rows["events"][slots].astype(np.int64)
            pending = book.before(
                users, self._memory.rows, slots, starting, self._memory.stored_events[slots],
                lambda places: self._features(records, part.codes[places]),
            )  # fmt: skip
            adapted = self._walked(groups, columns, part, slots)
            of_commit = _taken(next(iter(columns.values())), part.events)
            histories = book.after(pending, part.user, of_commit, adapted.applied)
            applied = np.flatnonzero(adapted.applied)
            index[applied] = before[part.user[applied]] + event_index(part.user[applied])
        told = b"" if payload is None else payload(records.take(part.events), adapted)
        self._write(partition, part, slots, adapted.applied, told, histories)
        self.counts.events += len(part.user)
        self.counts.skipped += len(part.user) - int(adapted.applied.sum())
        self.counts.guarded += adapted.guarded
        self.counts.users_created += len(unknown)
        self.counts.users_expired += expired
        self.counts.users_moved += ways.total()
        for way, rows in ways.items():
            self._moved[way] += rows
        return adapted, index

    def _walked(
        self,
        groups: Sequence[tuple[ServingModel, NDArray[np.int64]]],
        columns: Mapping[ServingModel, EventColumns],
        part: _Part,
        slots: NDArray[np.int32],
    ) -> Adapted:
        """The part's events, each by the version that serves its user; the rows at ``slots`` learn."""
        adapted = _nothing_adapted(len(part.user))
        for model, places in groups:
            chosen = slice(None) if len(groups) == 1 else np.flatnonzero(np.isin(part.user, places))
            events = _part(_taken(columns[model], part.events), chosen, slots[part.user[chosen]])
            adapted = _put(adapted, chosen, self._adaptations[model].learn(self._memory.slab, events, model.items))
        return adapted

    def _ready(
        self,
        partition: int,
        model: ServingModel,
        slab: Slab,
        places: NDArray[np.int64],
        users: Sequence[bytes],
        records: Interactions,
        codes: NDArray[np.int32],
        starting: NDArray[np.bool_],
        slots: NDArray[np.int32] | None = None,
    ) -> Counter[Rebase]:
        """The rows at ``places`` of the users stand on ``model``: the starting ones begin, others move if they must.

        Returns how many moved, by the way they took.
        """
        at = places if slots is None else slots[places]
        new = starting[places]
        slab[at[new]] = self._started(model, records, codes[places[new]])
        stale = np.flatnonzero(self.layout.rows(slab)["meta_version"][at] != model.meta_version)
        if not len(stale):
            return Counter()
        moving = places[stale]
        moved = self._mover.move(
            slab[at[stale]], [users[k] for k in moving.tolist()], model, self._adaptations[model],
            lambda some: self._features(records, codes[moving[some]]), self._books.get(partition),
            self._serves(partition).earlier,
        )  # fmt: skip
        slab[at[stale]] = moved.slab
        return moved.ways

    def _features(self, records: Interactions, codes: NDArray[np.int32]) -> SparseRows:
        chosen = codes.tolist()
        carried = {name: tuple(column[code] for code in chosen) for name, column in records.user_features.items()}
        return self.model.user_features([records.user_ids[code] for code in chosen], carried)

    def _started(self, model: ServingModel, records: Interactions, codes: NDArray[np.int32]) -> Slab:
        """(len(codes), row_bytes) rows of these users before their first event."""
        means = model.means_of(self._features(records, codes))
        return new_rows(self.layout, model.first, model.second, means, model.meta_version)

    def _write(
        self,
        partition: int,
        part: _Part,
        slots: NDArray[np.int32],
        applied: NDArray[np.bool_],
        payload: bytes,
        histories: Mapping[bytes, bytes | None],
    ) -> None:
        """Writes the rows that learned something, with the part's offset."""
        learned = np.zeros(len(slots), np.bool_)
        learned[part.user[applied]] = True
        clock = b"" if part.ticks is None else pack_clock(part.ticks.state)
        version = self._serves(partition).model.meta_version
        self._hot[partition].write(slots[learned], part.offset, version, clock, payload, histories=histories)

    def _ticks(self, expiry: Expiry, hot: HotRows, records: Interactions, events: slice) -> Ticks:
        """The event clock at these events, none of which the store has applied."""
        progress = hot.progress()
        state = unpack_clock(b"" if progress is None else progress.clock)
        state = new_clock() if state is None else state
        return advance(state, records.take(events), expiry.pace)

    def _idle_now(self, hot: HotRows) -> int:
        """The offset of the latest event at or before which a user is idle."""
        progress = hot.progress()
        return NOBODY if self._expiry is None or progress is None else idle_up_to(progress.clock)


def _part(columns: EventColumns, part: slice | NDArray[np.int64], slot: NDArray[np.int32]) -> EventColumns:
    return EventColumns(
        slot, columns.item[part], columns.label[part], columns.grade[part], columns.event_time_ms[part],
        columns.offset[part], columns.item_row, columns.item_hash,
    )  # fmt: skip


def _taken(columns: EventColumns, part: slice) -> EventColumns:
    return _part(columns, part, columns.slot[part])


def _no_predictions(n: int) -> Predictions:
    return Predictions(*_nothing_adapted(n)[:3], np.full(n, UNNUMBERED))


def _nothing_adapted(n: int) -> Adapted:
    return Adapted(np.empty(n, np.float32), np.empty(n, np.float32), np.zeros(n, np.bool_), 0)


def _put(into: Adapted, places: slice | NDArray[np.int64], found: Adapted) -> Adapted:
    """``into`` with what was found of the events at ``places``."""
    if isinstance(places, slice):
        return found
    into.logit[places], into.probability[places], into.applied[places] = found.logit, found.probability, found.applied
    return into._replace(guarded=into.guarded + found.guarded)


def _of_few_users(user: NDArray[np.int32]) -> int:
    """How many of the events, from the first on, are of COMMIT_USERS users at most; not always all that are."""
    taken = min(COMMIT_USERS, len(user))
    while taken < len(user) and np.count_nonzero(np.bincount(user[:taken])) <= COMMIT_USERS // 2:
        taken = min(2 * taken, len(user))
    return taken


def _until_someone_expires(user: NDArray[np.int32], offset: NDArray[np.int64], idle: NDArray[np.int64]) -> int:
    """How many of the events come before one whose user is idle since an event before it among them."""
    if not len(user) or idle[-1] < offset[0]:
        return len(user)
    order = np.argsort(user, kind="stable")
    earlier, later = order[:-1], order[1:]
    late = later[(user[earlier] == user[later]) & (offset[earlier] <= idle[later])]
    return int(late.min()) if len(late) else len(user)


def row_parts(layout: RowLayout) -> dict[str, float]:
    """What a user's row is made of, in bytes."""
    ring = 8 * layout.ring
    return {"header": HEADER_BYTES, "adaptive part": layout.row_bytes - HEADER_BYTES - ring, "event ring": ring}
