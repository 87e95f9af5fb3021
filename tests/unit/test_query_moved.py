"""A query about a user whose row stands on an older version answers what the stream would say of that user now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.meta_model import Parts
from learner.user_state import HeadKind
from state.histories import HistoryLimits
from state.query import StateReader
from state.reading.model_view import write_model_view
from streams.replay import rocks_stores
from streams.versions import Serving
from tests.models import HEADS
from tests.versions import PLENTY, processor, stream_of, version

EVENTS = 500


def left(
    directory: Path, kind: HeadKind, limits: HistoryLimits | None, *, view: int = 2
) -> tuple[Interactions, np.ndarray, list[str]]:
    """A run that adopted version 2 after its last event: what it would say of every user's first item, and of whom."""
    stream = stream_of(EVENTS, 6)
    if limits is None:  # features inside events are then known to nobody but the stream
        stream = replace(stream, user_features={})
    with processor(version(1, kind), rocks_stores(directory, state()), limits=limits) as run:
        run.process(0, stream)
        newest = run.model.successor(*parts(kind), 2)
        run.serve(0, Serving(newest))
        first = replace(stream, offset=stream.offset + 100 * EVENTS).take(slice(0, 40))
        said = run.predict(0, first).probability
        write_model_view(directory, newest if view == 2 else run.model, run.layout, None)
        if view != 2:
            run.process(0, first)
    return first, said, [first.user_ids[u] for u in first.user.tolist()]


def state() -> StateSettings:
    return StateSettings(ring=32)


def parts(kind: HeadKind) -> Parts:
    other = version(2, kind)
    return other.fixed, other.first, other.second


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("limits", "where"), [(PLENTY, "all {} events in the history"), (None, "the row's ring")])
def test_it_is_answered_as_the_stream_would(
    tmp_path: Path, kind: HeadKind, limits: HistoryLimits | None, where: str
) -> None:
    events, said, users = left(tmp_path, kind, limits)

    with StateReader(tmp_path) as reader:
        for k, user in enumerate(users):
            item = events.item_ids[int(events.item[k])]
            report = reader.query(user, items=[item])
            assert np.float32(report.scores[0].probability) == said[k]
            assert report.moved.startswith("the row stands on version 1; answered on version 2, from ")
            assert report.moved.endswith(where.format(report.events))
            assert report.meta_version == 2


def test_a_row_that_stands_there_is_not_moved(tmp_path: Path) -> None:
    events, _, users = left(tmp_path, "full", PLENTY)
    with processor(version(2), rocks_stores(tmp_path, state()), limits=PLENTY) as run:
        run.process(0, events)
    with StateReader(tmp_path) as reader:
        assert reader.query(users[0]).moved == ""


def test_a_row_newer_than_the_model_says_so(tmp_path: Path) -> None:
    _, _, users = left(tmp_path, "full", PLENTY, view=1)
    with StateReader(tmp_path) as reader:
        report = reader.query(users[0])
    assert report.moved.startswith(
        "the row stands on version 2, newer than the model beside it, which is of version 1:"
    )
    assert report.moved.endswith("ask again when the run has written its model")
    assert report.meta_version == 2
