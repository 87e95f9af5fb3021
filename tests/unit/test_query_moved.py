"""A query about a user whose row stands on another version answers what the stream would say of that user now."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.features import Catalogue
from learner.interactions import Interactions
from learner.serving import ServingModel
from learner.user_hash import CANARY, drawn, user_crcs
from learner.user_state import HeadKind
from state.exceptions import StoreDamaged
from state.histories import HistoryLimits
from state.keys import HISTORY, chunk_key, history_stem
from state.query import StateReader
from state.reading.model_view import Rebase, Versions, write_model_view
from state.reading.point import Point, parse_point
from state.reading.reports import UserReport
from state.rocksdb import StoreMemory
from state.store import RocksReader, RocksUserStore
from streams.commands.query_text import diff_text, user_text
from streams.processor import OpenStore, Processor
from streams.replay import rocks_stores
from streams.versions import Serving
from tests.models import HEADS, small_model
from tests.states import DAY_MS, START_MS, take_snapshot, visits
from tests.versions import PLENTY, RING, processor, stream_of, version

EVENTS, USERS = 500, 6
FEW = HistoryLimits(1 << 30, RING)
"""Of a user's events the latest chunks alone are kept"""
HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Left:
    """A state directory, and what the run that left it would have said of events that did not come."""

    state: Path
    events: Interactions
    said: np.ndarray
    stood: list[int]
    """The version that the row of each event's user stands on"""

    @property
    def users(self) -> list[str]:
        """Of the events."""
        return [self.events.user_ids[k] for k in self.events.user.tolist()]

    def asked(self, *, follow: bool = False) -> list[UserReport]:
        """A query for the user and the item of each event."""
        items = [self.events.item_ids[k] for k in self.events.item.tolist()]
        with StateReader(self.state, follow=follow) as reader:
            return [reader.query(user, items=[item]) for user, item in zip(self.users, items, strict=True)]


def opened(state: Path) -> OpenStore:
    return rocks_stores(state, StateSettings(ring=RING))


def successor(of: ServingModel, number: int, kind: HeadKind = "full", *, second: bool = True) -> ServingModel:
    """``version(number)`` in the place of ``of``."""
    other = version(number, kind, second=second)
    return of.successor(other.fixed, other.first, other.second, number)


def write_view(run: Processor, state: Path, serving: Serving, rebase: Rebase, newest: int | None = None) -> None:
    versions = Versions(rebase, newest, serving.canary, serving.canary_share, serving.earlier)
    write_model_view(state, serving.model, run.layout, None, versions)


def left(
    state: Path,
    kind: HeadKind = "full",
    *,
    rebase: Rebase = "history",
    limits: HistoryLimits | None = PLENTY,
    second: bool = True,
    at_hand: Sequence[int] = (1, 2),
    canary_share: float = 0.0,
    users: Catalogue | None = None,
) -> Left:
    """Rows stand on version 1, but for those of the last few events, on 2; version 3 serves, and 4 as a canary."""
    stream = stream_of(EVENTS, USERS)
    if limits is None:  # features inside events are then known to nobody but the stream
        stream = replace(stream, user_features={})
    first = version(1, kind, second=second)
    first = ServingModel(first.fixed, first.first, first.second, users=users, meta_version=1)
    with processor(first, opened(state), limits=limits, rebase=rebase) as run:
        run.process(0, stream.take(slice(0, EVENTS - 2)))
        two, three, four = (successor(first, number, kind, second=second) for number in (2, 3, 4))
        run.serve(0, Serving(two, earlier=(first,)))
        run.process(0, stream.take(slice(EVENTS - 2, EVENTS)))
        earlier = tuple(model for model in (first, two) if model.meta_version in at_hand)
        serving = Serving(three, four if canary_share else None, canary_share, earlier)
        run.serve(0, serving)
        coming = replace(stream, offset=stream.offset + 100 * EVENTS).take(slice(0, 40))
        said = run.predict(0, coming).probability
        write_view(run, state, serving, rebase)
        rows = run.store(0).get_many([coming.user_ids[k].encode() for k in coming.user.tolist()])[0]
        stood = run.layout.rows(rows)["meta_version"].tolist()
    assert set(stood) == {1, 2}
    return Left(state, coming, said, stood)


# --- as the stream would


def whole(events: int) -> int:
    return events


def latest(events: int) -> int:
    """Whole chunks of FEW."""
    return events - (events - RING) // 32 * 32


def ring(events: int) -> int:
    return min(events, RING)


def nothing(_events: int) -> int:
    return 0


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    ("rebase", "limits", "at_hand", "learned", "how"),
    [
        ("history", PLENTY, (), whole, "re-derived from all {events} events in its history"),
        ("history", FEW, (), latest, "re-derived from the latest {learned} of {events} events in its history"),
        ("history", None, (), ring, "re-derived from the latest 32 of {events} events in its ring"),
        ("ring", PLENTY, (), ring, "re-derived from the latest 32 of {events} events in its ring"),
        ("closed", PLENTY, (1, 2), nothing, "its prior exchanged"),
        ("closed", None, (1, 2), nothing, "its prior exchanged"),
        ("closed", PLENTY, (), ring, "re-derived from the latest 32 of {events} events in its ring"),
    ],
)
def test_it_is_answered_as_the_stream_would(tmp_path, kind, second, rebase, limits, at_hand, learned, how):
    run = left(tmp_path, kind, rebase=rebase, limits=limits, second=second, at_hand=at_hand)

    for report, said, stood in zip(run.asked(), run.said, run.stood, strict=True):
        assert np.float32(report.scores[0].probability) == said
        assert (report.meta_version, report.model.meta_version, report.model.canary) == (3, 3, False)
        moved = report.at.moved
        assert (moved.from_version, moved.to_version, moved.way) == (stood, 3, "ring" if "ring" in how else rebase)
        assert moved.events == learned(report.events)
        derived = how.format(learned=moved.events, events=report.events)
        assert moved.text == f"row stands on version {stood}; answered on version 3, {derived}"


@pytest.mark.parametrize("rebase", ["ring", "closed"])
def test_users_of_the_catalogue_start_by_its_features_under_every_version(tmp_path, rebase):
    plans = {f"u{k}": ("free", "paid", None)[k % 3 : k % 3 + 1] for k in range(USERS)}
    catalogue = Catalogue(small_model().fixed.user_encoder.fields, plans)
    run = left(tmp_path, rebase=rebase, limits=None, users=catalogue)

    assert [np.float32(report.scores[0].probability) for report in run.asked()] == run.said.tolist()
    assert {report.at.moved.way for report in run.asked()} == {rebase}
    assert len(run.said) == len(left(tmp_path / "other", rebase=rebase, limits=None).said)
    assert (run.said != left(tmp_path / "another", rebase=rebase, limits=None).said).any()


def test_a_following_reader_answers_the_same(tmp_path):
    run = left(tmp_path)
    assert run.asked(follow=True) == run.asked()


def test_a_following_reader_answers_on_the_version_that_has_come(tmp_path):
    stream = stream_of(EVENTS, USERS)
    with processor(version(1), opened(tmp_path)) as run:
        run.process(0, stream.take(slice(0, 300)))
        write_view(run, tmp_path, Serving(run.model), "history")
        with StateReader(tmp_path, follow=True) as reader:
            assert reader.query("u1").at.moved is None
            two = successor(run.model, 2)
            run.serve(0, Serving(two))
            write_view(run, tmp_path, Serving(two), "history")
            reader.catch_up()
            assert reader.query("u1").at.moved.to_version == 2
            run.process(0, stream.take(slice(300, EVENTS)))
            reader.catch_up()
            assert reader.query("u1").at.moved is None


def test_a_row_that_stands_there_is_not_moved(tmp_path):
    stream = stream_of(EVENTS, USERS)
    with processor(version(3), opened(tmp_path)) as run:
        run.process(0, stream)
        write_view(run, tmp_path, Serving(run.model), "history")
    with StateReader(tmp_path) as reader:
        report = reader.query("u1")
    assert report.at.moved is None
    assert "version 3" in user_text(report)
    assert "answered on" not in user_text(report)


def test_asking_moves_no_row(tmp_path):
    run = left(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run.asked()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- canaries, and versions that nobody knows


def test_a_canarys_users_are_answered_by_the_canary(tmp_path):
    run = left(tmp_path, canary_share=0.5)
    chosen = drawn(user_crcs([user.encode() for user in run.users]), CANARY, 0.5)
    assert set(chosen.tolist()) == {True, False}

    for report, said, canary in zip(run.asked(), run.said, chosen.tolist(), strict=True):
        assert np.float32(report.scores[0].probability) == said
        assert (report.model.meta_version, report.model.canary) == ((4, True) if canary else (3, False))
        assert ("answered on version 4, a canary, re-derived" in user_text(report)) == canary
        assert ("meta version 4, a canary" in user_text(report)) == canary


def test_a_canary_is_found_in_a_closed_run_and_its_catalogue_too(tmp_path):
    run = left(tmp_path, canary_share=0.5, rebase="closed")
    with StateReader(tmp_path) as reader:
        for report, said in zip(run.asked(), run.said, strict=True):
            assert np.float32(report.scores[0].probability) == said
            assert report.at.moved.way == "closed"
            listed = reader.query(report.user_id, items=[report.scores[0].item_id], count=15).top
            scored = {score.item_id: score.probability for score in listed}
            assert report.scores[0].item_id not in scored or scored[report.scores[0].item_id] == pytest.approx(
                report.scores[0].probability
            )


def adopted(state: Path, *, newest: int | None) -> tuple[Interactions, np.ndarray]:
    """Rows stand on version 2, and the view is of version 1: what version 1 would say of the users' next events."""
    stream = stream_of(EVENTS, USERS)
    with processor(version(1), opened(state)) as run:
        one = run.model
        two = successor(one, 2)
        run.serve(0, Serving(two))
        run.process(0, stream)
        one.item_rows(stream.item_ids, stream.item_features)
        run.serve(0, Serving(one))
        coming = replace(stream, offset=stream.offset + 100 * EVENTS).take(slice(0, 40))
        said = run.predict(0, coming).probability
        write_view(run, state, Serving(one), "history", newest)
    return coming, said


def test_a_row_newer_than_the_model_says_so_and_what_to_do(tmp_path):
    adopted(tmp_path, newest=None)
    with StateReader(tmp_path) as reader:
        report = reader.query("u1")
    moved = report.at.moved
    assert (report.meta_version, moved.from_version, moved.to_version, moved.way) == (2, 2, 1, "none")
    assert moved.text == (
        "row stands on version 2, newer than all that the model beside it knows of, which is of version 1: what is "
        "worked out from both is not what the stream would say; ask again when the run has written its model"
    )
    assert moved.text in user_text(report)


def test_a_row_on_a_version_that_was_rejected_is_moved_back(tmp_path):
    events, said = adopted(tmp_path, newest=2)
    for report, probability in zip(Left(tmp_path, events, said, []).asked(), said, strict=True):
        assert np.float32(report.scores[0].probability) == probability
        assert report.at.moved.text.startswith("row stands on version 2; answered on version 1, re-derived from all ")


# --- other points of the stream


@pytest.fixture
def ann(tmp_path):
    """20 events under version 1, two snapshots, the last four events under version 2; version 3 serves."""
    stream = visits("ann", 20)
    with processor(version(1), opened(tmp_path / "state")) as run:
        run.process(0, stream.take(slice(0, 10)))
        take_snapshot(run, tmp_path / "kept" / "a")
        run.process(0, stream.take(slice(10, 16)))
        take_snapshot(run, tmp_path / "kept" / "b")
        run.serve(0, Serving(successor(run.model, 2)))
        run.process(0, stream.take(slice(16, 20)))
        serving = Serving(successor(run.model, 3))
        run.serve(0, serving)
        write_view(run, tmp_path / "state", serving, "history")
    return tmp_path / "state", tmp_path / "kept"


def at_ms(value: int) -> Point:
    return Point("time", value, "then")


def under_version_3(directory: Path, events: int) -> tuple[float, ...]:
    """The mean after so many of those events, all of them under version 3."""
    with processor(version(3), opened(directory)) as run:
        run.process(0, visits("ann", 20).take(slice(0, events)))
        rows = run.store(0).get_many([b"ann"])[0]
        return tuple(run.layout.rows(rows)["mean"][0].tolist())


@pytest.mark.parametrize("events", [1, 5, 12, 19])
def test_a_time_before_is_answered_under_the_version_that_serves_now(ann, tmp_path, events):
    point = at_ms(START_MS + HOUR_MS * events - HOUR_MS // 2)
    with StateReader(ann[0]) as reader:
        report = reader.query("ann", at=point)
    assert (report.events, report.at.exact, report.mean) == (events, True, under_version_3(tmp_path / "x", events))
    assert (report.at.moved.from_version, report.at.moved.to_version, report.at.moved.way) == (None, 3, "replay")
    text = "answered on version 3, which serves now; another may have served then"
    assert report.at.moved.text == text
    assert text in user_text(report).splitlines()
    assert json.loads(json.dumps(report.as_dict()))["at"]["moved"]["text"] == text


def test_a_snapshots_row_is_moved_too(ann, tmp_path):
    with StateReader(ann[0]) as reader:
        report = reader.query("ann", at=parse_point("90"), snapshots=ann[1])
    assert (report.at.source, report.events, report.mean) == ("snapshot a", 10, under_version_3(tmp_path / "x", 10))
    assert report.at.moved.text == (
        "row stands on version 1; answered on version 3, re-derived from all 10 events in its history"
    )


def test_the_start_before_the_first_event_is_of_the_version_that_serves(ann):
    with StateReader(ann[0]) as reader:
        report = reader.query("ann", at=at_ms(START_MS - 1))
    assert (report.events, report.at.moved.way) == (0, "replay")
    assert "answered on version 3" in user_text(report)


def test_a_difference_is_of_one_version_and_says_which_way_each_point_came(ann, tmp_path):
    with StateReader(ann[0]) as reader:
        report = reader.diff("ann", parse_point("90"), parse_point("now"), snapshots=ann[1])
        explained = reader.query("ann").explanation
    before, after = (np.array(under_version_3(tmp_path / f"x{n}", n)) for n in (10, 20))
    assert report.change.mean == tuple((after - before).tolist())
    assert (report.before.moved.from_version, report.after.moved.from_version) == (1, 2)
    assert [event.number for event in report.between] == list(range(10, 20))
    lines = diff_text(report).splitlines()
    assert lines[2] == f"before        {report.before.moved.text}"
    assert lines[4] == f"after         {report.after.moved.text}"
    assert {event.method for event in explained.events} == {"replayed"}


def test_where_there_was_one_version_only_no_version_is_spoken_of(tmp_path):
    with processor(small_model(), opened(tmp_path)) as run:
        run.process(0, visits("ann", 5))
        write_view(run, tmp_path, Serving(run.model), "history")
    with StateReader(tmp_path) as reader:
        report = reader.query("ann", at=at_ms(START_MS + HOUR_MS))
    assert (report.events, report.at.moved) == (2, None)


def test_who_has_expired_starts_anew_and_is_not_moved(tmp_path):
    busy = Interactions.from_columns(
        [f"busy{k % 50}" for k in range(3000)], ["i1"] * 3000, [1] * 3000,
        START_MS + DAY_MS // 100 * np.arange(3000), offsets=100 + np.arange(3000),
    )  # fmt: skip
    with processor(version(1), opened(tmp_path), expire_after_days=5.0) as run:
        run.process(0, visits("away", 3))
        run.process(0, busy)
        write_model_view(tmp_path, successor(run.model, 3), run.layout, 5.0)
    with StateReader(tmp_path) as reader:
        away, other = reader.query("away", items=["i1"]), reader.query("busy7")
        start = reader.query("nobody", items=["i1"])
    assert (away.expired, away.at.moved) == (True, None)
    assert away.scores[0].logit == start.scores[0].logit
    assert other.at.moved.to_version == 3


# --- what is refused, and what is not needed


def write_history(directory: Path, key: bytes, value: bytes | None) -> None:
    with RocksReader(directory) as reader:
        layout = reader.layout
    with RocksUserStore(directory, layout, StoreMemory(8 << 20, 8 << 20)) as store:
        store.write_batch([], np.zeros((0, layout.row_bytes), np.uint8), None, histories={key: value})


@pytest.mark.parametrize("damage", ["chunk", "head", "of another", "book"])
def test_a_damaged_history_is_named(tmp_path, damage):
    run = left(tmp_path)
    user = run.users[0].encode()
    stem, directory = history_stem(user), tmp_path / "partition-0"
    key = {"chunk": chunk_key(stem, 0), "book": HISTORY}.get(damage, stem)
    other = history_stem(next(name for name in run.users if name.encode() != user).encode())
    with RocksReader(directory) as store:
        mine, others = store.histories([key, other])
    write_history(directory, key, others if damage == "of another" else mine[:-1] + bytes([mine[-1] ^ 1]))
    message = {"of another": "is that of b'u", "book": "record of the histories fails"}.get(
        damage, "fails its checksum"
    )
    with StateReader(tmp_path) as reader, pytest.raises(StoreDamaged, match=f"{message}.*: restore a snapshot"):
        reader.query(user.decode())


def test_a_history_with_a_gap_gives_what_comes_after_it(tmp_path):
    run = left(tmp_path)
    user = run.users[0]
    write_history(tmp_path / "partition-0", chunk_key(history_stem(user.encode()), 1), None)
    with StateReader(tmp_path) as reader:
        report = reader.query(user)
    assert report.at.moved.events == report.events - 64


def test_neither_torch_nor_compiled_code_is_loaded(tmp_path):
    run = left(tmp_path, rebase="closed", canary_share=0.5)
    program = (
        "import sys; from streams.cli import app\n"
        f"for user in {sorted(set(run.users))!r}:\n"
        f"    app(['query', user, '--state', {str(tmp_path)!r}, '--top', '3'], standalone_mode=False)\n"
        "print({'torch', 'numba', 'pydantic', 'rich', 'matplotlib', 'pyarrow', 'msgspec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("its prior exchanged") == USERS
    assert done.stdout.splitlines()[-1] == "set()"
