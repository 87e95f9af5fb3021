"""All events of a source in the order of their time, kept on disk: an external merge sort.

One pass over the source writes fixed-width records to a spool, in sorted runs. If the source was in time order the
spool is the result; else the runs are merged. Sorting is stable: events of the same time keep the source's order.
Only dictionaries (ids and feature texts) are held in memory.

A spool belongs to one process and is read back by it: little-endian records of ``_record_type``, no header.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from learner.interactions import Interactions
from streams.columns import NO_FEATURE, EventBlock, EventFeature
from streams.exceptions import SourceError

if TYPE_CHECKING:
    from streams.sources import EventSource

Records = NDArray[Any]

BATCH_EVENTS = 65_536
"""Events of a batch read back."""
RUN_EVENTS = 1 << 20
"""Events of a sorted run: 32 MB of records in memory, twice that while they are sorted."""
MERGE_EVENTS = 1 << 21
"""Events of all runs together that a merge holds at once (64 MB); each run gets its part of them."""
LEAST_WINDOW_EVENTS = 1 << 10
"""A smaller part would spend the time on seeking."""


@dataclass(slots=True)
class _Dictionary:
    """Codes of ids or texts in order of first appearance."""

    codes: dict[str, int] = field(default_factory=dict)

    def encode(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """(len(texts),) codes; new texts are added."""
        codes, add = self.codes, self.codes.setdefault
        return np.fromiter((add(text, len(codes)) for text in texts), dtype=np.int32, count=len(texts))


class OrderedEvents:
    """Events in time order, spooled; iterate as often as needed. Use as a context to remove the spool."""

    def __init__(
        self,
        path: Path,
        events: int,
        user_ids: tuple[str, ...],
        first_event_ms: NDArray[np.int64],
        item_ids: tuple[str, ...],
        features: tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]],
    ) -> None:
        self.path = path
        self.events = events
        """How many there are."""
        self.user_ids = user_ids
        """(U,) in the order of their first events."""
        self.first_event_ms = first_event_ms
        """(U,) the time of each user's first event."""
        self.item_ids = item_ids
        """(I,) in order of first appearance in the source."""
        self._features = features

    def __enter__(self) -> OrderedEvents:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the spool; the events cannot be read after it."""
        self.path.unlink(missing_ok=True)

    def batches(self, first: int = 0, last: int | None = None) -> Iterator[Interactions]:
        """The events ``first .. last - 1`` of the time order (all of them by default), 65,536 at a time."""
        last = self.events if last is None else min(last, self.events)
        record_type = _record_type(*self._features)
        with self.path.open("rb") as file:
            file.seek(first * record_type.itemsize)
            while first < last:
                records = np.fromfile(file, dtype=record_type, count=min(BATCH_EVENTS, last - first))
                if not len(records):
                    raise SourceError(f"{self.path}: the spool has lost events; run again")
                first += len(records)
                yield self._interactions(records)

    def _interactions(self, records: Records) -> Interactions:
        user_ids, user = _local(records["user"], self.user_ids)
        item_ids, item = _local(records["item"], self.item_ids)
        label, value, time, offset = (
            np.ascontiguousarray(records[name]) for name in ("label", "value", "time", "offset")
        )
        events = Interactions(user_ids, item_ids, user, item, label, value, time, offset)
        users, items = (
            {name: EventFeature(np.ascontiguousarray(records[prefix + name]), texts) for name, texts in names.items()}
            for prefix, names in zip(("user:", "item:"), self._features, strict=True)
        )
        return EventBlock(events, users, items).interactions()


def order_by_time(source: EventSource, spool_directory: Path) -> OrderedEvents:
    """Reads the source once and spools it in time order; needs 32 bytes of disk an event, twice if it is unsorted.

    Raises:
        SourceError: what reading the source raises.
    """
    spool_directory.mkdir(parents=True, exist_ok=True)
    path = spool_directory / "events.spool"
    runs = _Runs(spool_directory / "runs.spool")
    try:
        for block in source.blocks():
            runs.add(block)
        runs.finish()
        users = list(runs.users.codes)
        if runs.in_order:
            runs.path.replace(path)
            order, first_event_ms = np.arange(len(users)), runs.first_event_ms(path)
        else:
            order, first_event_ms = _merge(runs, path, len(users))
    finally:
        runs.close()
    return OrderedEvents(
        path, runs.events, tuple(users[k] for k in order), first_event_ms, tuple(runs.items.codes), runs.features
    )


class _Runs:
    """Sorted runs of records in one file, and the dictionaries of their codes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.users, self.items = _Dictionary(), _Dictionary()
        self.lengths: list[int] = []
        self.in_order = True
        """Whether the source itself was in time order."""
        self.record_type = _record_type({}, {})
        self._user_texts: dict[str, _Dictionary] = {}
        self._item_texts: dict[str, _Dictionary] = {}
        self._latest = np.iinfo(np.int64).min
        self._buffer: list[Records] = []
        self._buffered = 0
        self._file: BinaryIO = path.open("wb")

    @property
    def events(self) -> int:
        """Events of all runs."""
        return sum(self.lengths)

    @property
    def features(self) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        """The texts of user and item features by name."""
        user, item = (
            {name: tuple(dictionary.codes) for name, dictionary in texts.items()}
            for texts in (self._user_texts, self._item_texts)
        )
        return user, item

    def add(self, block: EventBlock) -> None:
        """Appends a block's events."""
        if not self._buffered and not self.lengths:
            self._user_texts = {name: _Dictionary() for name in block.user_features}
            self._item_texts = {name: _Dictionary() for name in block.item_features}
            self.record_type = _record_type(block.user_features, block.item_features)
        records = self._records(block)
        times = records["time"]
        if len(times):
            self.in_order = bool(self.in_order and times[0] >= self._latest and (times[1:] >= times[:-1]).all())
            self._latest = max(self._latest, int(times[-1]))
            self._buffer.append(records)
            self._buffered += len(records)
        if self._buffered >= RUN_EVENTS:
            self._write_run()

    def finish(self) -> None:
        """Writes what is left and closes the file."""
        if self._buffered:
            self._write_run()
        self._file.close()

    def close(self) -> None:
        """Closes and removes the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def first_event_ms(self, path: Path) -> NDArray[np.int64]:
        """(U,) the time of each user's first event, from a file of records in order."""
        first = np.full(len(self.users.codes), -1, dtype=np.int64)
        for records in _read_records(path, self.record_type):
            _note_first(first, records)
        return first

    def _records(self, block: EventBlock) -> Records:
        e = block.events
        records = np.zeros(len(e), dtype=self.record_type)
        records["time"], records["offset"] = e.event_time_ms, e.offset
        records["user"] = self.users.encode(e.user_ids)[e.user]
        records["item"] = self.items.encode(e.item_ids)[e.item]
        records["value"], records["label"] = e.value, e.label
        for prefix, features, texts in (
            ("user:", block.user_features, self._user_texts),
            ("item:", block.item_features, self._item_texts),
        ):
            for name, feature in features.items():
                codes = np.append(texts[name].encode(feature.texts), np.int32(NO_FEATURE))
                records[prefix + name] = codes[feature.codes]
        return records

    def _write_run(self) -> None:
        run = np.concatenate(self._buffer)
        if not self.in_order:
            run = run[np.argsort(run["time"], kind="stable")]
        run.tofile(self._file)
        self.lengths.append(len(run))
        self._buffer, self._buffered = [], 0


def _merge(runs: _Runs, path: Path, users: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Writes all runs in time order, with users coded in the order of their first events.

    Returns:
        (U,) the old code of each new one, and (U,) the time of each user's first event.
    """
    rank = np.full(users, -1, dtype=np.int32)
    order: list[NDArray[np.int64]] = []
    met = 0
    first_event_ms = np.full(users, -1, dtype=np.int64)
    with path.open("wb") as out:
        for records in _merged(runs):
            appearing = pa.array(records["user"]).unique().to_numpy().astype(np.int64)
            new = appearing[rank[appearing] < 0]
            rank[new] = np.arange(met, met + len(new), dtype=np.int32)
            met += len(new)
            order.append(new)
            records["user"] = rank[records["user"]]
            _note_first(first_event_ms, records)
            records.tofile(out)
    return np.concatenate(order) if order else np.empty(0, np.int64), first_event_ms


def _merged(runs: _Runs) -> Iterator[Records]:
    """The records of all runs in time order; of the same time, those of the earlier run first.

    Each round sees a window of every run. Whatever is earlier than the end of the window that ends first can be
    given out; so can what is as late as that end in the runs before that one and in its own window, since its
    later records come after them.
    """
    window = max(LEAST_WINDOW_EVENTS, MERGE_EVENTS // len(runs.lengths))
    ends = np.cumsum(runs.lengths)
    positions = [int(end) - length for end, length in zip(ends, runs.lengths, strict=True)]
    windows: list[Records] = [np.empty(0, runs.record_type) for _ in runs.lengths]
    with runs.path.open("rb") as file:
        while True:
            for k, end in enumerate(ends):
                if not len(windows[k]) and positions[k] < end:
                    count = min(window, int(end) - positions[k])
                    file.seek(positions[k] * runs.record_type.itemsize)
                    windows[k] = np.fromfile(file, dtype=runs.record_type, count=count)
                    positions[k] += count
            unread = [k for k, end in enumerate(ends) if positions[k] < end]
            cut = min(unread, key=lambda k: (int(windows[k]["time"][-1]), k), default=None)
            parts: list[Records] = []
            for k, part in enumerate(windows):
                taken = len(part)
                if cut is not None:
                    side = "right" if k <= cut else "left"
                    taken = int(np.searchsorted(part["time"], windows[cut]["time"][-1], side=side))  # type: ignore[call-overload]
                parts.append(part[:taken])
            if cut is not None:
                windows = [part[len(given) :] for part, given in zip(windows, parts, strict=True)]
            merged = np.concatenate(parts)
            yield merged[np.argsort(merged["time"], kind="stable")]
            if cut is None:
                return


def _record_type(user_features: Iterable[str], item_features: Iterable[str]) -> np.dtype[Any]:
    """One event: 32 bytes, and 4 more for each feature inside the event."""
    return np.dtype(
        [
            ("time", "<i8"),
            ("offset", "<i8"),
            ("user", "<i4"),
            ("item", "<i4"),
            ("value", "<f4"),
            ("label", "i1"),
            ("unused", "V3"),
            *((f"user:{name}", "<i4") for name in user_features),
            *((f"item:{name}", "<i4") for name in item_features),
        ]
    )


def _read_records(path: Path, record_type: np.dtype[Any]) -> Iterator[Records]:
    with path.open("rb") as file:
        while len(records := np.fromfile(file, dtype=record_type, count=BATCH_EVENTS)):
            yield records


def _note_first(first_event_ms: NDArray[np.int64], records: Records) -> None:
    """Sets the time of users met for the first time; ``records`` are in time order."""
    appearing, rows = np.unique(records["user"], return_index=True)
    new = first_event_ms[appearing] < 0
    first_event_ms[appearing[new]] = records["time"][rows[new]]


def _local(codes: NDArray[np.int32], ids: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The batch's own dictionary, in order of first appearance, and the codes into it."""
    encoded = pa.array(codes).dictionary_encode()
    texts = tuple(ids[k] for k in encoded.dictionary.to_numpy())
    return texts, encoded.indices.to_numpy().astype(np.int32, copy=False)
