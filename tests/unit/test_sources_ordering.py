"""Time order through the spool: stable, re-iterable, users by first event."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from learner.interactions import Interactions
from streams import ordering
from streams.sources import open_source, time_ordered
from tests.unit.test_sources import HEADER, data_settings, rows, written

UNSORTED = "b,i1,1,300\na,i2,0,100\nc,i1,1,200\na,i1,1,300\nb,i3,0,100\n"
SORTED = [("a", "i2", 0, 100), ("b", "i3", 0, 100), ("c", "i1", 1, 200), ("b", "i1", 1, 300), ("a", "i1", 1, 300)]


def shrink(monkeypatch: pytest.MonkeyPatch, run: int, window: int, batch: int) -> None:
    monkeypatch.setattr(ordering, "RUN_EVENTS", run)
    monkeypatch.setattr(ordering, "LEAST_WINDOW_EVENTS", window)
    monkeypatch.setattr(ordering, "MERGE_EVENTS", 1)
    monkeypatch.setattr(ordering, "BATCH_EVENTS", batch)


def test_events_come_in_time_order_and_ties_in_source_order(tmp_path: Path) -> None:
    source = open_source(data_settings(written(tmp_path, "a.csv", HEADER + UNSORTED)))
    with time_ordered(source, tmp_path / "spool") as ordered:
        batches = list(ordered.batches())
        assert rows(batches) == SORTED
        assert [int(o) for b in batches for o in b.offset] == [1, 4, 2, 0, 3]
        assert (ordered.events, ordered.user_ids) == (5, ("a", "b", "c"))
        assert ordered.first_event_ms.tolist() == [100, 100, 200]
        assert rows(list(ordered.batches())) == SORTED
        assert rows(list(ordered.batches(1, 3))) == SORTED[1:3]
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_source_in_order_is_spooled_as_it_is(tmp_path: Path) -> None:
    lines = "".join(f"{u},{i},{y},{t}\n" for u, i, y, t in SORTED)
    source = open_source(data_settings(written(tmp_path, "a.csv", HEADER + lines)))
    with time_ordered(source, tmp_path) as ordered:
        assert rows(list(ordered.batches())) == SORTED
        assert ordered.user_ids == ("a", "b", "c")
        assert ordered.first_event_ms.tolist() == [100, 100, 200]


def test_batches_own_dictionaries_in_order_of_first_appearance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, run=2, window=1, batch=2)
    source = open_source(data_settings(written(tmp_path, "a.csv", HEADER + UNSORTED)))
    with time_ordered(source, tmp_path) as ordered:
        assert [(b.user_ids, b.item_ids) for b in ordered.batches()] == [
            (("a", "b"), ("i2", "i3")),
            (("c", "b"), ("i1",)),
            (("a",), ("i1",)),
        ]


@pytest.mark.parametrize(("run", "window"), [(1, 1), (3, 1), (7, 2), (100, 5), (10_000, 1)])
@pytest.mark.parametrize("distinct_times", [1, 5, 400])
def test_merging_many_runs_is_a_stable_sort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int, window: int, distinct_times: int
) -> None:
    random = np.random.default_rng(run * 1000 + distinct_times)
    times = random.integers(0, distinct_times, 400)
    users = random.integers(0, 20, 400)
    lines = "".join(f"u{u},i,1,{t}\n" for u, t in zip(users, times, strict=True))
    for part in range(4):
        chunk = "".join(lines.splitlines(keepends=True)[part * 100 : part * 100 + 100])
        written(tmp_path, f"{part}.csv", HEADER + chunk)
    shrink(monkeypatch, run, window, batch=64)
    with time_ordered(open_source(data_settings(tmp_path)), tmp_path / "spool") as ordered:
        events = Interactions.concatenate(ordered.batches())
        order = np.argsort(times, kind="stable")
        assert events.offset.tolist() == order.tolist()
        assert ordered.user_ids == tuple(dict.fromkeys(f"u{u}" for u in users[order]))
        first = {u: int(t) for u, t in reversed([(f"u{users[k]}", times[k]) for k in order])}
        assert ordered.first_event_ms.tolist() == [first[u] for u in ordered.user_ids]


def test_features_follow_the_first_event_in_time_not_in_the_file(tmp_path: Path) -> None:
    text = "user_id,item_id,label,event_time_ms,age\nu,i,1,20,old\nu,i,1,10,young\nv,i,1,15,\n"
    data = data_settings(written(tmp_path, "a.csv", text), events__user_features={"age": {}})
    with time_ordered(open_source(data), tmp_path) as ordered:
        (batch,) = ordered.batches()
        assert (batch.user_ids, batch.user_features) == (("u", "v"), {"age": ("young", None)})


def test_an_error_while_reading_leaves_no_spool(tmp_path: Path) -> None:
    source = open_source(data_settings(written(tmp_path, "a.csv", HEADER + "u,i,7,5\n")))
    with pytest.raises(Exception, match="cannot be used"):
        time_ordered(source, tmp_path / "spool")
    assert list((tmp_path / "spool").iterdir()) == []
