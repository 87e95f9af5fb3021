"""Which events are duplicates follows from the topic alone: not from the batches, a retry, or a worker's new start."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streams.live.duplicates import DuplicateWindow


@dataclass(frozen=True)
class Topic:
    offset: np.ndarray
    event_id: np.ndarray

    def part(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.offset[start:stop], self.event_id[start:stop]

    def __len__(self) -> int:
        return len(self.offset)


def topic(gaps: list[int], ids: list[int]) -> Topic:
    return Topic(np.cumsum(np.array(gaps, np.int64)), np.array(ids[: len(gaps)], np.uint64))


def by_the_rule(events: Topic, window: int) -> list[bool]:
    """Every pair of events looked at."""
    pairs = list(zip(events.offset.tolist(), events.event_id.tolist(), strict=True))
    return [
        name != 0 and any(other == name and offset - window <= at < offset for at, other in pairs[:n])
        for n, (offset, name) in enumerate(pairs)
    ]


@st.composite
def topics(draw: st.DrawFn) -> Topic:
    length = draw(st.integers(0, 80))
    gaps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 5, 40]), min_size=length, max_size=length))
    # Few ids, so that they come again, some of which meet in one slot of the table.
    names = [0, 1, 2, 3, 1 << 11, 1 << 63, 2**64 - 1]
    return topic(gaps, draw(st.lists(st.sampled_from(names), min_size=length, max_size=length)))


def cuts_of(events: Topic) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(events)), max_size=8).map(lambda c: [0, *sorted(c), len(events)])


@given(st.data(), topics(), st.integers(1, 30))
def test_the_rule_holds_however_the_events_are_cut(data, events, window):
    seen, cuts = DuplicateWindow(window), data.draw(cuts_of(events))
    answers = [seen.duplicates(*events.part(a, b)) for a, b in pairwise(cuts)]
    assert np.concatenate(answers).tolist() == by_the_rule(events, window)


@given(st.data(), topics(), st.integers(1, 30))
def test_a_batch_that_is_tried_again_or_cut_anew_gets_the_same_answer(data, events, window):
    seen, cuts = DuplicateWindow(window), data.draw(cuts_of(events))
    expected = by_the_rule(events, window)
    for start, stop in pairwise(cuts):
        seen.duplicates(*events.part(start, stop))
        again = data.draw(st.integers(start, stop))
        assert seen.duplicates(*events.part(again, stop)).tolist() == expected[again:stop]


@given(st.data(), topics(), st.integers(1, 30))
def test_a_worker_that_first_reads_one_window_back_decides_as_one_that_never_stopped(data, events, window):
    at = data.draw(st.integers(0, len(events)))
    before = np.flatnonzero(events.offset >= events.offset[at] - window)[0] if at < len(events) else at
    started_anew = DuplicateWindow(window)
    started_anew.duplicates(*events.part(before, at))
    assert started_anew.duplicates(*events.part(at, len(events))).tolist() == by_the_rule(events, window)[at:]


@given(st.integers(1, 3_000), st.integers(1, 2_000), st.integers(0, 2**32))
@example(window=1024, batch=1500, seed=0)
def test_the_rule_holds_where_the_tables_are_full_and_grow(window, batch, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 2_500, 4_000).astype(np.uint64) << np.uint64(rng.integers(0, 52))
    offset, seen = np.arange(len(ids)), DuplicateWindow(window)
    answers = [seen.duplicates(offset[a : a + batch], ids[a : a + batch]) for a in range(0, len(ids), batch)]
    last: dict[int, int] = {}
    expected = []
    for n, name in enumerate(ids.tolist()):
        expected.append(n - last.get(name, -window - 1) <= window)
        last[name] = n
    assert np.concatenate(answers).tolist() == expected


def test_an_event_counts_again_one_offset_after_the_window():
    events = topic([10, 5, 6], [7, 7, 7])
    assert DuplicateWindow(5).duplicates(*events.part(0, 3)).tolist() == [False, True, False]


def test_a_chain_of_repetitions_counts_once():
    events = topic([1] * 100, [7] * 100)
    assert DuplicateWindow(1).duplicates(*events.part(0, 100)).sum() == 99


def test_events_without_an_id_are_never_duplicates():
    events = topic([1] * 4, [0] * 4)
    assert not DuplicateWindow(10).duplicates(*events.part(0, 4)).any()


def test_offsets_from_before_the_last_call_are_refused_until_all_is_forgotten():
    seen, events = DuplicateWindow(10), topic([1] * 6, [1, 2, 3, 1, 2, 3])
    seen.duplicates(*events.part(0, 3))
    seen.duplicates(*events.part(3, 6))
    with pytest.raises(ValueError, match=r"^offset 3 comes before 4, where the last call began: forget\(\) first$"):
        seen.duplicates(*events.part(2, 6))
    seen.forget()
    assert seen.duplicates(*events.part(2, 6)).tolist() == [False, False, False, True]


def test_memory_stays_bounded_by_the_window_and_a_batch():
    seen = DuplicateWindow(1_000)
    for start in range(0, 100_000, 500):
        offset = np.arange(start, start + 500)
        seen.duplicates(offset, offset.astype(np.uint64) + np.uint64(1))
    held = [*vars(seen).values(), *seen._table]
    assert sum(a.nbytes for a in held if isinstance(a, np.ndarray)) == 48 * 2048
