"""Whatever snapshots there are: an exact answer is the state that the stream had at that point, to the bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.interactions import Interactions
from learner.retrace import AdaptivePart
from state.exceptions import QueryError
from state.query import StateReader
from state.reading.point import Point
from tests.models import HEADS, small_model
from tests.states import START_MS, running, take_snapshot

MODELS = {kind: small_model(kind) for kind in HEADS}


@st.composite
def histories(draw):
    """(stream of one user, after which of its events snapshots are taken, ring, head)"""
    events = draw(st.integers(1, 12))
    gaps = draw(st.lists(st.sampled_from([0, 1, 999, 60_000, 7_200_000, 90_000_000]), min_size=events, max_size=events))
    steps = draw(st.lists(st.integers(1, 9), min_size=events, max_size=events))
    stream = Interactions.from_columns(
        ["ann"] * events,
        [f"i{k}" for k in draw(st.lists(st.integers(0, 13), min_size=events, max_size=events))],
        draw(st.lists(st.integers(0, 1), min_size=events, max_size=events)),
        START_MS + np.cumsum(gaps),
        offsets=np.cumsum(steps),
    )
    taken = draw(st.lists(st.integers(0, events), max_size=3, unique=True))
    return stream, sorted(taken), draw(st.sampled_from([0, 1, 4, 32])), draw(st.sampled_from(HEADS))


def parts_after_each(processor, stream, taken, folder):
    """The user's state after each event, the start first; takes the snapshots on the way."""
    model = processor.model
    parts = [None]
    for done in range(len(stream) + 1):
        if done:
            processor.process(0, stream.take(slice(done - 1, done)))
            rows, _ = processor.store(0).get_many([b"ann"])
            parts.append(AdaptivePart.of(processor.layout.rows(rows)[0]))
        if done in taken:
            take_snapshot(processor, folder / f"after {done}")
    return model.first.initialization, parts


def points_of(stream):
    offsets = [0, *stream.offset.tolist(), *(stream.offset + 1).tolist(), *(stream.offset - 1).tolist()]
    times = [t + by for t in stream.event_time_ms.tolist() for by in (-1, 0, 1, 5_000, 10**7)]
    yield from (Point("offset", value, str(value)) for value in dict.fromkeys(offsets))
    yield from (Point("time", value, f"{value}ms") for value in dict.fromkeys(times))


@settings(max_examples=25)
@given(histories())
def test_an_exact_answer_is_what_the_stream_had(history):
    stream, taken, ring, kind = history
    with tempfile.TemporaryDirectory() as folder:
        state, kept = Path(folder, "state"), Path(folder, "kept")
        with running(state, MODELS[kind], ring=ring) as processor:
            start, parts = parts_after_each(processor, stream, taken, kept)
        with StateReader(state) as reader:
            answered = 0
            for point in points_of(stream):
                column = stream.offset if point.kind == "offset" else stream.event_time_ms
                events = int((column <= point.value).sum())
                try:
                    report = reader.query("ann", at=point, snapshots=kept if taken else None, explained=False)
                except QueryError:
                    assert events < len(stream)  # the present can always be told
                    continue
                answered += 1
                if not report.at.exact:
                    assert report.at.note
                    continue
                assert report.events == events
                expected = start if events == 0 else parts[events].mean
                np.testing.assert_array_equal(np.array(report.mean, np.float32), expected)
                if events:
                    np.testing.assert_array_equal(np.array(report.covariance, np.float32), parts[events].covariance)
            assert answered
            times = [point for point in points_of(stream) if point.kind == "time"]
            if ring == 32:  # it holds every event: every time can be told
                assert all(reader.query("ann", at=point, explained=False) for point in times)
