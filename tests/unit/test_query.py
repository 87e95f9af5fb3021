"""Asking about users: what is shown is what the rows hold and what the stream would say, and nothing is changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from typer.testing import CliRunner

from learner.interactions import Interactions
from learner.user_state import RowLayout
from state.codec import Progress
from state.exceptions import QueryError, StoreDamaged, StoreMismatch, StoreUnreadable
from state.query import StateReader
from state.reading.model_view import FILE, write_model_view
from state.reading.point import NOW
from state.store import RocksReader, RocksUserStore
from streams.cli import app
from streams.commands.query_text import user_text
from tests.models import HEADS, random_stream, small_model
from tests.states import DAY_MS, left_behind, running, visits

RING_EVENTS = 7

HOSTILE = [
    "", "u" * 65_536, "a\0b", "../../etc/passwd", "partition-0/../x", "‮evil", "🦆", "progress", "uprogress",
    "mprogress", "mlayout", "a\nb", "'; drop table", "%s", "\\x00", "user", "user ",
]  # fmt: skip


@pytest.fixture
def store(tmp_path):
    """One row of known numbers, its writer open; no model beside it."""
    layout = RowLayout("full", 2, 0, 4)
    slab = np.zeros((1, layout.row_bytes), np.uint8)
    row = layout.rows(slab)
    row["events"], row["last_offset"], row["first_time_ms"], row["last_time_ms"] = 3, 9, 1_000, 3_000
    row["ledger"], row["meta_version"] = 255, 2
    row["mean"], row["covariance"] = [0.5, -1.0], [0.3, 0.1, 0.2]
    row["ring"][0, :3] = [1 << 23, 0, 1 << 23]
    with RocksUserStore(tmp_path / "partition-0", layout) as store:
        store.write_batch([b"ann"], slab, Progress(9, 2))
        yield tmp_path


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A state directory of a run over 400 events of 30 users."""
    return left_behind(tmp_path_factory.mktemp("run") / "state", small_model(), random_stream(400, 30))


def fingerprint(directory):
    """Every row and the model's bytes; not RocksDB's own files."""
    with RocksReader(directory / "partition-0") as reader:
        rows = {user: row.tobytes() for user, row in reader.iterate()}
        return rows, reader.progress(), hashlib.sha256((directory / FILE).read_bytes()).hexdigest()


def asked(user, items):
    """Records that ask a processor for what a query is asked for."""
    n = len(items)
    return Interactions.from_columns([user] * n, list(items), [0] * n, [0] * n, offsets=10**9 + np.arange(n))


# --- the row


def test_a_row_is_read_while_its_writer_is_open(store):
    with StateReader(store) as reader:
        report = reader.query("ann")
    assert (report.user_id, report.known, report.partition, report.events) == ("ann", True, 0, 3)
    assert (report.first_event_ms, report.last_event_ms) == (1_000, 3_000)
    assert (report.last_offset, report.ledger, report.meta_version, report.guarded) == (9, "00000000000000ff", 2, 0)
    assert report.mean == (0.5, -1.0)
    assert report.covariance == pytest.approx((0.3, 0.1, 0.2))
    assert report.variance == pytest.approx((0.3, 0.2))
    assert report.recent_labels == (1, 0, 1)
    assert (report.distance, report.explanation, report.model) == (None, None, None)
    assert (report.at.source, report.at.exact, report.stream_offset) == ("the live row", True, 9)


def test_an_unknown_user_is_said_to_be_unknown_and_not_created(store):
    result = CliRunner().invoke(app, ["query", "bob", "--state", str(store)])
    assert result.exit_code == 1
    assert "unknown user 'bob': no event was learned" in result.output
    shown = json.loads(CliRunner().invoke(app, ["query", "bob", "--state", str(store), "--json"]).output)
    assert (shown["known"], shown["events"], shown["partition"]) == (False, 0, None)
    with RocksReader(store / "partition-0") as reader:
        assert [user for user, _ in reader.iterate()] == [b"ann"]


def test_the_command_prints_the_row_as_text_and_as_json(store):
    text = CliRunner().invoke(app, ["query", "ann", "--state", str(store)]).output
    assert "user ann: 3 events from 1970-01-01 00:00:01 UTC to 1970-01-01 00:00:03 UTC" in text
    assert "last offset 9, ledger 00000000000000ff, meta version 2" in text
    assert "adaptive part +0.500 -1.000" in text
    shown = json.loads(CliRunner().invoke(app, ["query", "ann", "--state", str(store), "--json"]).output)
    assert (shown["events"], shown["recent_labels"]) == (3, [1, 0, 1])


def test_a_directory_without_a_store_is_an_error(tmp_path):
    with pytest.raises(StoreUnreadable, match="holds no store: name the --state directory"):
        StateReader(tmp_path)
    with (
        StateReader(tmp_path, partition=3) as reader,
        pytest.raises(StoreUnreadable, match="partition-3 holds no store"),
    ):
        reader.query("ann")


def test_a_damaged_store_is_an_error_that_names_it(tmp_path):
    (tmp_path / "partition-0").mkdir()
    (tmp_path / "partition-0" / "CURRENT").write_text("MANIFEST-999999\n")
    with (
        StateReader(tmp_path) as reader,
        pytest.raises(StoreUnreadable, match=r"partition-0 cannot be read: .*run again"),
    ):
        reader.query("ann")


def test_without_the_model_scores_and_differences_are_refused(store):
    with StateReader(store) as reader:
        with pytest.raises(QueryError, match=r"model.safetensors is missing, so no item can be scored"):
            reader.query("ann", items=["i1"])
        with pytest.raises(QueryError, match=r"model.safetensors is missing, so no states can be compared"):
            reader.diff("ann", NOW, NOW)


def test_a_model_of_another_run_is_refused(store):
    model = small_model()
    write_model_view(store, model, RowLayout.of(model.first, model.second, 4), None)
    with StateReader(store) as reader, pytest.raises(StoreMismatch, match="belongs to another run"):
        reader.query("ann")


def test_a_damaged_model_is_refused_by_the_command_too(state, tmp_path):
    copy = tmp_path / "state"
    shutil.copytree(state, copy)
    packed = bytearray((copy / FILE).read_bytes())
    packed[-1] ^= 1
    (copy / FILE).write_bytes(packed)
    with StateReader(copy) as reader, pytest.raises(StoreDamaged, match="does not match its seal"):
        reader.query("u1")


# --- scores


@pytest.mark.parametrize("second", [False, True], ids=["one filter", "two filters"])
@pytest.mark.parametrize("kind", HEADS)
def test_scores_are_what_the_stream_would_say_to_the_bit(tmp_path, kind, second):
    items = [f"i{k}" for k in range(12)] + ["stranger", "i13"]
    with running(tmp_path, small_model(kind, second=second)) as processor:
        processor.process(0, random_stream(300, 20))
        for user in ("u3", "u11", "nobody"):
            said = processor.predict(0, asked(user, items))
            with StateReader(tmp_path) as reader:
                scores = reader.query(user, items=items).scores
            assert [score.item_id for score in scores] == items
            assert np.array([s.logit for s in scores], np.float32).tobytes() == said.logit.tobytes()
            assert np.array([s.probability for s in scores], np.float32).tobytes() == said.probability.tobytes()
            assert [score.known for score in scores] == [True] * 12 + [False] * 2


def test_the_best_items_are_those_with_the_highest_scores(state):
    with StateReader(state) as reader:
        everything = reader.query("u3", items=[f"i{k}" for k in range(12)]).scores
        best = reader.query("u3", count=4).top
        assert best == tuple(sorted(everything, key=lambda score: -score.logit)[:4])
        assert len(reader.query("u3", count=10**6).top) == 15  # 12 trained ones, and 3 that the run met
        assert reader.query("u3").top == ()


def test_items_of_the_latest_events_are_marked_or_left_out(state):
    with StateReader(state) as reader:
        report = reader.query("u3", count=100)
        recent = {event.item for event in report.explanation.events}
        assert {score.item_id for score in report.top if score.recent} == recent
        unseen = reader.query("u3", count=100, unseen=True).top
        assert {score.item_id for score in unseen} == {score.item_id for score in report.top} - recent
        assert not any(score.recent for score in unseen)


def test_an_unknown_user_gets_the_shared_initialization(state):
    with StateReader(state) as reader:
        report = reader.query("nobody", items=["i1"], count=2)
        np.testing.assert_array_equal(np.array(report.mean, np.float32), small_model().first.initialization)
    assert (report.known, report.distance.l2, len(report.scores), len(report.top)) == (False, 0.0, 1, 2)
    result = CliRunner().invoke(app, ["query", "nobody", "--state", str(state), "--items", "i1"])
    assert result.exit_code == 0
    assert "unknown user 'nobody'" in result.output


def test_lists_of_items_are_lines_of_csv(state):
    arguments = ["query", "u3", "--state", str(state), "--json", "--items", 'i1,"a,b"', "--items", "i2,i1"]
    shown = json.loads(CliRunner().invoke(app, arguments).output)
    assert [score["item_id"] for score in shown["scores"]] == ["i1", "a,b", "i2"]


# --- explanation


def test_a_user_whose_events_are_all_in_the_ring_is_replayed(tmp_path):
    stream = visits("ann", 6)
    left_behind(tmp_path, small_model(), stream)
    with StateReader(tmp_path) as reader:
        report = reader.query("ann")
    events = report.explanation.events
    assert report.explanation.replayed_from == "the start"
    assert [event.item for event in events] == [stream.item_ids[code] for code in stream.item]
    assert [event.label for event in events] == stream.label.tolist()
    assert {event.method for event in events} == {"replayed"}
    assert [event.number for event in events] == list(range(6))
    for event, time_ms in zip(events, stream.event_time_ms.tolist(), strict=True):
        assert event.earliest_ms <= time_ms <= event.latest_ms
        assert (event.probability_after > event.probability_before) == (event.label == 1)
        assert event.moved > 0
    assert events[-1].earliest_ms == events[-1].latest_ms == stream.event_time_ms[-1]


def test_what_was_predicted_before_each_replayed_event_is_what_the_stream_predicted(tmp_path):
    stream = visits("ann", RING_EVENTS)
    with running(tmp_path, small_model(), ring=RING_EVENTS) as processor:
        said = processor.process(0, stream).probability
    with StateReader(tmp_path) as reader:
        events = reader.query("ann").explanation.events
    assert np.array([event.probability_before for event in events], np.float32).tobytes() == said.tobytes()


def test_a_user_with_older_events_is_explained_by_influence(tmp_path):
    left_behind(tmp_path, small_model(), visits("ann", 30))
    with StateReader(tmp_path) as reader:
        report = reader.query("ann")
    assert report.explanation.replayed_from is None
    assert [event.number for event in report.explanation.events] == list(range(22, 30))
    assert {event.method for event in report.explanation.events} == {"influence"}
    assert all(event.moved > 0 and event.probability_before is None for event in report.explanation.events)


def test_a_start_that_came_inside_the_events_is_not_taken_for_the_shared_one(tmp_path):
    stream = visits("ann", 5)
    paid = Interactions(
        stream.user_ids, stream.item_ids, stream.user, stream.item, stream.label, stream.value, stream.event_time_ms,
        stream.offset, {"plan": ("paid",)},
    )  # fmt: skip
    left_behind(tmp_path, small_model(), paid)
    with StateReader(tmp_path) as reader:
        explanation = reader.query("ann").explanation
    assert explanation.replayed_from is None
    assert {event.method for event in explanation.events} == {"influence"}


def test_a_refused_update_is_replayed_as_refused(tmp_path):
    model = small_model()
    model.items.psi[3, 1] = np.nan
    stream = Interactions.from_columns(["a"] * 3, ["i2", "i3", "i4"], [1, 1, 0], [1_000, 2_000, 3_000])
    left_behind(tmp_path, model, stream)
    with StateReader(tmp_path) as reader:
        report = reader.query("a")
    assert report.guarded == 1
    assert [event.guarded for event in report.explanation.events] == [False, True, False]
    assert report.explanation.events[1].moved == 0


def test_an_item_that_the_model_cannot_name_is_shown_by_its_hash(tmp_path):
    model = small_model()
    with running(tmp_path, model) as processor:
        before = (tmp_path / FILE).read_bytes()
        processor.process(0, Interactions.from_columns(["a", "a"], ["i1", "stranger"], [1, 0], [1_000, 2_000]))
    (tmp_path / FILE).write_bytes(before)  # as a reader beside the running writer has it
    with StateReader(tmp_path) as reader:
        explanation = reader.query("a").explanation
    assert explanation.replayed_from == "the start"
    assert [event.item for event in explanation.events] == ["i1", None]
    text = CliRunner().invoke(app, ["query", "a", "--state", str(tmp_path)]).output
    assert f"unknown item {explanation.events[1].item_hash}" in text


@pytest.mark.parametrize("kind", HEADS)
def test_the_distance_is_from_the_shared_initialization_in_units_of_the_prior(tmp_path, kind):
    model = small_model(kind)
    left_behind(tmp_path, model, visits("ann", 9))
    with StateReader(tmp_path) as reader:
        report = reader.query("ann")
    shift = np.array(report.mean) - model.first.initialization.astype(float)
    assert report.distance.l2 == pytest.approx(np.linalg.norm(shift))
    np.testing.assert_allclose(report.distance.shift, shift, atol=1e-7)
    if kind == "gradient":
        assert (report.distance.prior_sd, report.distance.shift_sd) == (None, None)
        return
    prior = np.diag(model.first.covariance.astype(float))
    if kind == "full":
        prior = np.zeros((5, 5))
        prior[np.tril_indices(5)] = model.first.covariance
        prior = prior + np.tril(prior, -1).T
    assert report.distance.prior_sd == pytest.approx(np.sqrt(shift @ np.linalg.inv(prior) @ shift))
    np.testing.assert_allclose(report.distance.shift_sd, shift / np.sqrt(np.diag(prior)), rtol=1e-6)


# --- expiry, partitions, following


def test_a_user_who_was_away_for_too_long_is_expired_and_scored_anew(tmp_path):
    away = visits("away", 3)
    others = Interactions.from_columns(
        [f"busy{k % 50}" for k in range(3000)], ["i1"] * 3000, [1] * 3000,
        away.event_time_ms[-1] + DAY_MS // 100 * np.arange(3000),
        offsets=100 + np.arange(3000),
    )  # fmt: skip
    with running(tmp_path, small_model(), expire_after_days=5.0) as processor:
        processor.process(0, away)
        processor.process(0, others)
        said = processor.predict(0, asked("away", ["i1", "i5"]))
        with StateReader(tmp_path) as reader:
            report, busy = reader.query("away", items=["i1", "i5"]), reader.query("busy7")
    assert (report.expired, busy.expired) == (True, False)
    assert (report.events, report.known, report.model.expire_after_days) == (3, True, 5.0)
    assert np.array([score.logit for score in report.scores], np.float32).tobytes() == said.logit.tobytes()
    text = CliRunner().invoke(app, ["query", "away", "--state", str(tmp_path)]).output
    assert "expired: away for 5 days or more" in text


def test_a_user_is_looked_for_in_every_partition(tmp_path):
    with running(tmp_path, small_model()) as processor:
        processor.process(2, visits("ann", 4))
        processor.process(10, visits("bob", 5))
    with StateReader(tmp_path) as reader:
        assert [(r.partition, r.events) for r in map(reader.query, ("ann", "bob", "cid"))] == [
            (2, 4),
            (10, 5),
            (None, 0),
        ]
    with StateReader(tmp_path, partition=2) as reader:
        assert not reader.query("bob").known


def test_a_following_reader_catches_up_with_its_writer_and_a_plain_one_does_not(tmp_path):
    with running(tmp_path, small_model()) as processor:
        processor.process(0, visits("ann", 4))
        with StateReader(tmp_path, follow=True) as following, StateReader(tmp_path) as plain:
            assert (following.query("ann").events, plain.query("ann").events) == (4, 4)
            processor.process(0, visits("ann", 2, first_offset=1000))
            processor.process(0, visits("new", 1, first_offset=2000))
            following.catch_up()
            assert (following.query("ann").events, plain.query("ann").events) == (6, 4)
            assert following.query("new").known
            with pytest.raises(ValueError, match="open it with follow=True"):
                plain.catch_up()


def test_a_following_reader_takes_up_the_model_that_the_run_wrote_again(tmp_path):
    with running(tmp_path, small_model()) as processor:
        processor.process(0, Interactions.from_columns(["a"], ["stranger"], [1], [1_000]))
        following = StateReader(tmp_path, follow=True)
        assert following.query("a").explanation.events[0].item is None
    following.catch_up()
    assert following.query("a").explanation.events[0].item == "stranger"
    following.close()
    following.close()


def test_a_followers_notes_are_removed(tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(notes))
    state = left_behind(tmp_path / "state", small_model(), visits("ann", 2))
    with StateReader(state, follow=True) as following:
        assert following.query("ann").known
        assert len(list(notes.iterdir())) == 1
    assert list(notes.iterdir()) == []


# --- nothing is changed, nobody else is read


def test_asking_changes_no_byte_of_rows_and_model(state):
    before = fingerprint(state)
    with StateReader(state) as reader, StateReader(state, follow=True) as following:
        for user in ("u1", "u2", "nobody", *HOSTILE):
            reader.query(user, items=["i1", "x"], count=3)
            following.query(user, count=1, unseen=True)
    assert fingerprint(state) == before


def test_hostile_ids_read_their_own_row_alone(tmp_path):
    known = HOSTILE[::2]
    with running(tmp_path, small_model()) as processor:
        for k, user in enumerate(known):
            processor.process(0, visits(user, k + 1, first_offset=10_000 * k))
    with StateReader(tmp_path) as reader:
        for k, user in enumerate(known):
            assert (reader.query(user).events, reader.query(user).user_id) == (k + 1, user)
        for user in HOSTILE[1::2]:
            assert not reader.query(user, items=[user]).known


@pytest.mark.parametrize("user", ["a\nb", "\x1b[31mred", "‮evil", "u" * 65_536])
def test_text_shows_an_id_on_one_line_and_unharmed(tmp_path, user):
    left_behind(tmp_path, small_model(), visits(user, 2))
    with StateReader(tmp_path) as reader:
        first = user_text(reader.query(user)).splitlines()[0]
    assert first.isprintable()
    assert len(first) < 200
    assert ": 2 events from" in first


def test_an_id_that_is_no_text_is_refused(state):
    with StateReader(state) as reader:
        for arguments in (("a\udcff", []), ("u1", ["a\udcff"])):
            with pytest.raises(QueryError, match="is not UTF-8"):
                reader.query(arguments[0], items=arguments[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--unseen", "--unseen leaves items out of --top: give --top N too"),
        ("--diff 1 2 --top 3", "--diff compares two points by itself"),
        ("--at yesterday", "'yesterday' is no point of a stream"),
    ],
)
def test_options_that_say_nothing_are_refused(state, options, message):
    result = CliRunner().invoke(app, ["query", "u1", "--state", str(state), *options.split()])
    assert isinstance(result.exception, QueryError)
    assert message in str(result.exception)


def test_the_command_loads_neither_torch_nor_compiled_code(state):
    program = (
        "import sys; from streams.cli import app; "
        f"app(['query', 'u3', '--state', {str(state)!r}, '--items', 'i1', '--top', '3'], standalone_mode=False); "
        "print({'torch', 'numba', 'pydantic', 'rich', 'matplotlib', 'pyarrow', 'msgspec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("user u3: ")
    assert lines[-1] == "set()"
