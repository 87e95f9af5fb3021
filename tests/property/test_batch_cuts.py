"""How a stream is cut into batches and commits changes no bit of any prediction or row."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.user_state import HeadKind, RowLayout
from state.memory_store import MemoryUserStore
from state.store import RocksUserStore, UserStore
from streams.processor import Processor
from tests.models import HEADS, offset_of, random_stream, small_model

EVENTS = 600
Outcome = tuple[bytes, bytes, dict[bytes, bytes], int | None]
"""Logits, probabilities, rows by user, the store's offset"""


@cache
def stream() -> Interactions:
    return random_stream(EVENTS, 25)


def batches(cuts: Iterable[int], pruned: bool) -> Iterator[Interactions]:
    for first, last in pairwise([0, *cuts, EVENTS]):
        part = stream().take(slice(first, last))
        yield part.pruned() if pruned else part


def outcome(
    kind: HeadKind, second: bool, cuts: Iterable[int], *, pruned: bool = True, commit_events: int = 16384,
    rocks: bool = False,
) -> Outcome:  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:

        def open_store(partition: int, layout: RowLayout) -> UserStore:
            return RocksUserStore(Path(directory) / str(partition), layout) if rocks else MemoryUserStore(layout)

        model = small_model(kind, second=second)
        with Processor(model, open_store, StateSettings(commit_events=commit_events, ring=4)) as work:
            found = [work.process(0, batch) for batch in batches(cuts, pruned)]
            rows = {user: row.tobytes() for user, row in work.store(0).iterate()}
            return (
                np.concatenate([f.logit for f in found]).tobytes(),
                np.concatenate([f.probability for f in found]).tobytes(), rows, offset_of(work.store(0)),
            )  # fmt: skip


@cache
def uncut(kind: HeadKind, second: bool) -> Outcome:
    return outcome(kind, second, [])


@pytest.mark.parametrize("rocks", [False, True])
@pytest.mark.parametrize("size", [1, 7, 256])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_batches_of_any_one_size_agree(kind, second, size, rocks):
    assert outcome(kind, second, range(size, EVENTS, size), rocks=rocks) == uncut(kind, second)


@settings(max_examples=25)
@given(
    cuts=st.sets(st.integers(1, EVENTS - 1), max_size=12).map(sorted),
    commit_events=st.integers(1, EVENTS),
    kind=st.sampled_from(HEADS),
    second=st.booleans(),
    pruned=st.booleans(),
    rocks=st.booleans(),
)
def test_any_cuts_and_commits_agree(cuts, commit_events, kind, second, pruned, rocks):
    found = outcome(kind, second, cuts, pruned=pruned, commit_events=commit_events, rocks=rocks)
    assert found == uncut(kind, second)


@settings(max_examples=25)
@given(steps=st.lists(st.tuples(st.integers(1, EVENTS), st.integers(1, EVENTS)), max_size=5))
def test_going_back_any_number_of_times_ends_as_one_pass_does(steps):
    """Each step streams some records and then goes back some, as after a crash."""
    expected = uncut("full", True)
    logits = np.full(EVENTS, np.nan, np.float32)
    with Processor(small_model(), lambda _, layout: MemoryUserStore(layout), StateSettings(ring=4)) as work:
        position = 0
        for forward, back in [*steps, (EVENTS, 0)]:
            last = min(position + forward, EVENTS)
            found = work.process(0, stream().take(slice(position, last)))
            logits[position:last][found.applied] = found.logit[found.applied]
            position = max(last - back, 0)
            if position + forward >= EVENTS and (forward, back) == (EVENTS, 0):
                break
        work.process(0, stream().take(slice(position, EVENTS)))
        rows = {user: row.tobytes() for user, row in work.store(0).iterate()}
    assert (logits.tobytes(), rows) == (expected[0], expected[2])
