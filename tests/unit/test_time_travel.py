"""A state at an earlier point is that of a run that ended there, to the bit; else it is said that it cannot be told."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from learner.interactions import Interactions
from state.exceptions import QueryError, SnapshotError
from state.query import StateReader
from state.reading.point import NOW, Point, parse_point
from streams.commands.query_text import diff_text
from tests.models import HEADS, small_model
from tests.states import RING, START_MS, left_behind, running, take_snapshot, visits

HOUR_MS = 3_600_000


def offset(value):
    return Point("offset", value, str(value))


def at_ms(value):
    return Point("time", value, f"{value}ms")


def truth(tmp_path_factory, stream, events, kind="full"):
    """(mean, covariance) of the user after so many events of the stream, by a run over those alone."""
    state = left_behind(tmp_path_factory.mktemp("truth") / "s", small_model(kind), stream.take(slice(0, events)))
    with StateReader(state) as reader:
        report = reader.query(stream.user_ids[0])
    return report.mean, report.covariance, report.second_mean, report.second_covariance


def parameters(report):
    return report.mean, report.covariance, report.second_mean, report.second_covariance


# --- points


def test_points_are_offsets_times_and_now():
    assert parse_point(" 1200 ") == Point("offset", 1200, "1200")
    assert parse_point("-1").kind == "offset"
    assert parse_point("1767427200123ms") == Point("time", 1_767_427_200_123, "1767427200123ms")
    assert parse_point("now") == NOW
    written = int(datetime(2026, 1, 3, 8, 0, 0, 250_000, UTC).timestamp() * 1000)
    for text in ("2026-01-03T08:00:00.250", "2026-01-03 08:00:00.250Z", "2026-01-03T09:00:00.250+01:00"):
        assert parse_point(text)[:2] == ("time", written)
    assert parse_point("2026-01-03")[1] == int(datetime(2026, 1, 3, tzinfo=UTC).timestamp() * 1000)
    assert parse_point("1960-01-01")[1] < 0


@pytest.mark.parametrize("text", ["", "soon", "12.5", "1e3", "2026-13-01", "5 ms", "99999999999999999999", "１２"])
def test_anything_else_is_refused_with_examples(text):
    with pytest.raises(QueryError, match=r"is no point of a stream: give `now`, an offset"):
        parse_point(text)


# --- from the ring


@pytest.mark.parametrize("kind", HEADS)
def test_a_ring_that_holds_every_event_tells_the_state_after_each(tmp_path, tmp_path_factory, kind):
    stream = visits("ann", RING)
    left_behind(tmp_path, small_model(kind), stream)
    with StateReader(tmp_path) as reader:
        for events in range(1, RING):
            time_ms = START_MS + HOUR_MS * events - HOUR_MS // 2
            report = reader.query("ann", at=at_ms(time_ms))
            assert (report.events, report.at.exact) == (events, True)
            assert report.at.source == f"{events} events replayed from the start, proven by the live row"
            assert parameters(report) == truth(tmp_path_factory, stream, events, kind)
            assert len(report.explanation.events) == events
            assert report.explanation.replayed_from == "the start"
            assert (report.ledger, report.last_offset) == (None, None)


def test_before_the_first_event_is_the_start(tmp_path):
    model = small_model()
    left_behind(tmp_path, model, visits("ann", 3))
    with StateReader(tmp_path) as reader:
        for point in (at_ms(START_MS - 1), at_ms(-5)):
            report = reader.query("ann", at=point)
            assert (report.events, report.known, report.at.source, report.at.exact) == (0, False, "the start", True)
            np.testing.assert_array_equal(np.array(report.mean, np.float32), model.first.initialization)


def test_before_the_first_event_known_there_may_have_been_others_where_users_expire(tmp_path):
    with running(tmp_path, small_model(), expire_after_days=5.0) as processor:
        processor.process(0, visits("ann", 3))
    with StateReader(tmp_path) as reader:
        report = reader.query("ann", at=at_ms(START_MS - 1))
    assert (report.events, report.at.exact) == (0, False)
    assert report.at.note == "events before the user last expired would have left no trace"


def test_at_and_after_the_last_event_is_the_live_row(tmp_path):
    stream = visits("ann", 20)
    left_behind(tmp_path, small_model(), stream)
    last_ms, last_offset = int(stream.event_time_ms[-1]), int(stream.offset[-1])
    with StateReader(tmp_path) as reader:
        now = reader.query("ann")
        for point in (at_ms(last_ms), at_ms(last_ms + 10**9), offset(last_offset)):
            report = reader.query("ann", at=point)
            assert (report.at.source, report.at.exact, report.ledger) == ("the live row", True, now.ledger)
        future = reader.query("ann", at=offset(last_offset + 1))
    assert (future.at.exact, future.at.note) == (False, f"the stream has come to offset {last_offset} only")


def test_a_time_within_the_rounding_of_the_ring_is_answered_but_not_called_exact(tmp_path, tmp_path_factory):
    stream = visits("ann", RING)
    left_behind(tmp_path, small_model(), stream)
    with StateReader(tmp_path) as reader:
        rounded = reader.query("ann").explanation.events[5]
        assert rounded.latest_ms - rounded.earliest_ms + 1 == 4_000
        true_ms = int(stream.event_time_ms[5])
        assert rounded.earliest_ms <= true_ms <= rounded.latest_ms
        report = reader.query("ann", at=at_ms(rounded.earliest_ms))
        surely = reader.query("ann", at=at_ms(rounded.latest_ms))
        before = reader.query("ann", at=at_ms(rounded.earliest_ms - 1))
    assert (report.events, report.at.exact) == (6, False)
    assert report.at.note == ("the time of event 5 is known to 4 s only; it is taken to lie at or before the point")
    assert (surely.events, surely.at.exact, before.events, before.at.exact) == (6, True, 5, True)


def test_older_events_than_the_ring_holds_are_not_guessed(tmp_path):
    stream = visits("ann", 20)
    left_behind(tmp_path, small_model(), stream)
    with StateReader(tmp_path) as reader:
        with pytest.raises(QueryError) as refused:
            reader.query("ann", at=at_ms(START_MS + 15 * HOUR_MS + 1000))
        with pytest.raises(QueryError, match=r"at offset 100 cannot be told"):
            reader.query("ann", at=offset(100))
    said = str(refused.value)
    assert f"the state of user 'ann' at time {START_MS + 15 * HOUR_MS + 1000}ms cannot be told" in said
    assert "known: offsets 190 to 190 (the live row); times from 2020-09-14 07:26:40 UTC on" in said
    assert said.endswith("a snapshot from about then (--snapshots) or a larger state.ring would tell more")


def test_a_replay_that_does_not_lead_to_the_row_is_not_an_answer(tmp_path):
    stream = visits("ann", 5)
    paid = Interactions(
        stream.user_ids, stream.item_ids, stream.user, stream.item, stream.label, stream.value, stream.event_time_ms,
        stream.offset, {"plan": ("paid",)},
    )  # fmt: skip
    left_behind(tmp_path, small_model(), paid)
    with StateReader(tmp_path) as reader:
        with pytest.raises(QueryError, match="cannot be told"):
            reader.query("ann", at=at_ms(START_MS + 2 * HOUR_MS + 1))
        start = reader.query("ann", at=at_ms(START_MS - 1))
    assert (start.at.exact, start.at.note) == (
        False, "features that came inside the events may have given another start",
    )  # fmt: skip


def test_an_offset_needs_rows_for_the_ring_has_none(tmp_path):
    left_behind(tmp_path, small_model(), visits("ann", 4))
    with StateReader(tmp_path) as reader, pytest.raises(QueryError, match="at offset 15 cannot be told"):
        reader.query("ann", at=offset(15))


# --- from snapshots


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """(state, snapshots, stream): 30 events of ann at offsets 0, 10 …; snapshots after 10, after 16 and after 25.

    Another user's event at offset 94 comes before the first snapshot, which so stands there.
    """
    base = tmp_path_factory.mktemp("snapshots")
    stream = visits("ann", 30)
    with running(base / "state", small_model()) as processor:
        for events, name in ((10, "a"), (16, "b"), (25, "c")):
            done = {"a": 0, "b": 10, "c": 16}[name]
            processor.process(0, stream.take(slice(done, events)))
            if name == "a":
                processor.process(0, visits("bob", 1, first_offset=94))
            take_snapshot(processor, base / "snapshots" / name)
        processor.process(0, stream.take(slice(25, 30)))
    return base / "state", base / "snapshots", stream


def test_a_snapshots_row_answers_for_every_offset_until_the_next_event(snapshots, tmp_path_factory):
    state, kept, stream = snapshots
    with StateReader(state) as reader:
        for point in (offset(90), offset(94), at_ms(START_MS + 9 * HOUR_MS)):
            report = reader.query("ann", at=point, snapshots=kept)
            assert (report.at.source, report.at.exact, report.events) == ("snapshot a", True, 10)
            assert report.last_offset == 90
            assert parameters(report) == truth(tmp_path_factory, stream, 10)


def test_one_snapshot_may_be_named_itself(snapshots):
    state, kept, _ = snapshots
    with StateReader(state) as reader:
        assert reader.query("ann", at=offset(90), snapshots=kept / "a").at.source == "snapshot a"


def test_between_two_snapshots_times_are_replayed_from_the_earlier_and_proven_by_the_later(snapshots, tmp_path_factory):
    state, kept, stream = snapshots
    with StateReader(state) as reader:
        for events in range(11, 16):
            time_ms = START_MS + HOUR_MS * events - HOUR_MS // 2
            report = reader.query("ann", at=at_ms(time_ms), snapshots=kept)
            assert report.at.source == f"{events - 10} events replayed from snapshot a, proven by snapshot b"
            assert (report.at.exact, report.events) == (True, events)
            assert parameters(report) == truth(tmp_path_factory, stream, events)


def test_an_offset_is_answered_where_the_rows_leave_no_choice(snapshots):
    state, kept, _ = snapshots
    with StateReader(state) as reader:
        for value, events in ((94, 10), (150, 16), (240, 25), (290, 30)):
            assert reader.query("ann", at=offset(value), snapshots=kept).events == events
        with pytest.raises(QueryError, match="at offset 95 cannot be told"):
            reader.query("ann", at=offset(95), snapshots=kept)
        with pytest.raises(QueryError) as refused:
            reader.query("ann", at=offset(130), snapshots=kept)
    assert "offsets 290 to 290 (the live row)" in str(refused.value)
    assert "offsets 90 to 94 (snapshot a); offsets 150 to 150 (snapshot b)" in str(refused.value)


def test_the_offset_of_one_event_more_pins_the_count_down(tmp_path):
    stream = visits("ann", 12)
    with running(tmp_path / "state", small_model()) as processor:
        processor.process(0, stream.take(slice(0, 11)))
        take_snapshot(processor, tmp_path / "kept" / "a")
        processor.process(0, stream.take(slice(11, 12)))
    with StateReader(tmp_path / "state") as reader:
        for value in (100, 105, 109):
            report = reader.query("ann", at=offset(value), snapshots=tmp_path / "kept")
            assert (report.events, report.at.source, report.at.exact) == (11, "snapshot a", True)


def test_a_snapshot_without_the_user_says_that_there_were_no_events(tmp_path):
    with running(tmp_path / "state", small_model()) as processor:
        processor.process(0, visits("bob", 1, first_offset=50))
        take_snapshot(processor, tmp_path / "kept" / "early")
        processor.process(0, visits("ann", 12, first_offset=100))
    with StateReader(tmp_path / "state") as reader:
        report = reader.query("ann", at=offset(50), snapshots=tmp_path / "kept")
        assert (report.events, report.known, report.at.source) == (0, False, "the start")
        with pytest.raises(QueryError, match=r"offsets up to 50 \(snapshot early: no events yet\)"):
            reader.query("ann", at=offset(150), snapshots=tmp_path / "kept")


def test_a_snapshot_lets_the_events_since_be_replayed_exactly_now(snapshots):
    state, kept, _ = snapshots
    with StateReader(state) as reader:
        plain = reader.query("ann").explanation
        helped = reader.query("ann", snapshots=kept).explanation
    assert plain.replayed_from is None
    assert helped.replayed_from == "snapshot c"
    assert [event.method for event in helped.events[-5:]] == ["replayed"] * 5
    assert {event.method for event in helped.events[:-5]} == {"influence"}


def test_a_user_who_is_gone_is_told_from_the_snapshot(tmp_path):
    stream = visits("ann", 6)
    with running(tmp_path / "state", small_model()) as processor:
        processor.process(0, stream)
        take_snapshot(processor, tmp_path / "kept" / "a")
        store, progress = processor.store(0), processor.store(0).progress()
        store.write_batch([], np.zeros((0, processor.layout.row_bytes), np.uint8), progress, deleted=[b"ann"])
    with StateReader(tmp_path / "state") as reader:
        assert not reader.query("ann").known
        then = reader.query("ann", at=offset(50), snapshots=tmp_path / "kept")
        assert (then.at.source, then.events) == ("snapshot a", 6)
        middle = reader.query("ann", at=at_ms(START_MS + 2 * HOUR_MS + 1000), snapshots=tmp_path / "kept")
        assert (middle.events, middle.at.exact) == (3, True)
        with pytest.raises(QueryError, match="cannot be told"):
            reader.query("ann", at=offset(51), snapshots=tmp_path / "kept")


def test_an_earlier_life_of_the_user_is_kept_apart(tmp_path):
    with running(tmp_path / "state", small_model()) as processor:
        processor.process(0, visits("ann", 12))
        take_snapshot(processor, tmp_path / "kept" / "first life")
        store = processor.store(0)
        store.write_batch([], np.zeros((0, processor.layout.row_bytes), np.uint8), store.progress(), deleted=[b"ann"])
    with running(tmp_path / "state", small_model()) as processor:
        processor.process(0, visits("ann", 3, first_offset=1_000, start_ms=START_MS + 100 * HOUR_MS))
    with StateReader(tmp_path / "state") as reader:
        kept = tmp_path / "kept"
        assert reader.query("ann", snapshots=kept).explanation.replayed_from == "the start"
        assert reader.query("ann", at=offset(110), snapshots=kept).events == 12
        assert reader.query("ann", at=at_ms(START_MS + 101 * HOUR_MS), snapshots=kept).events == 2
        change = reader.diff("ann", offset(110), NOW, snapshots=kept)
        assert (change.anew, change.events_before, change.events_after, len(change.between)) == (True, 12, 3, 3)
        assert "the user started anew in between" in diff_text(change)


def test_a_directory_without_snapshots_or_of_another_run_is_refused(snapshots, tmp_path):
    state, kept, _ = snapshots
    with StateReader(state) as reader, pytest.raises(SnapshotError, match="holds no snapshot: name a directory"):
        reader.query("ann", at=offset(90), snapshots=tmp_path)
    other = left_behind(tmp_path / "other", small_model("diagonal"), visits("ann", 2))
    with StateReader(other) as reader, pytest.raises(SnapshotError, match="it is of another run"):
        reader.query("ann", at=offset(90), snapshots=kept)


# --- differences


def test_a_difference_is_that_of_the_two_states(snapshots):
    state, kept, stream = snapshots
    with StateReader(state) as reader:
        one, other = (reader.query("ann", at=offset(o), snapshots=kept) for o in (150, 240))
        change = reader.diff("ann", offset(150), offset(240), snapshots=kept)
        shown = {item: [] for item in stream.item_ids}
        for point in (150, 240):
            for score in reader.query("ann", items=stream.item_ids, at=offset(point), snapshots=kept).scores:
                shown[score.item_id].append(score.probability)
    for name in ("mean", "variance", "covariance", "second_mean", "second_covariance"):
        expected = np.array(getattr(other, name)) - np.array(getattr(one, name))
        np.testing.assert_array_equal(getattr(change.change, name), expected)
    assert change.moved == pytest.approx(np.linalg.norm(np.array(other.mean) - np.array(one.mean)))
    assert (change.before.source, change.after.source) == ("snapshot b", "snapshot c")
    assert (change.events_before, change.events_after, change.anew) == (16, 25, False)
    assert [event.number for event in change.between] == list(range(17, 25))
    assert change.between_unknown == 1
    for moves, sign in ((change.risen, 1), (change.fallen, -1)):
        steps = [sign * (c.after - c.before) for c in moves]
        assert steps == sorted(steps, reverse=True)
        assert all(step > 0 for step in steps)
        for moved in moves:
            assert [moved.before, moved.after] == shown[moved.item_id]
    assert len(change.risen) + len(change.fallen) <= 10
    steps = sorted(after - before for before, after in shown.values())
    assert [c.after - c.before for c in change.fallen] == [step for step in steps[:5] if step < 0]
    assert [c.after - c.before for c in change.risen] == [step for step in steps[::-1][:5] if step > 0]


def test_events_between_that_nobody_remembers_are_counted(snapshots):
    state, kept, _ = snapshots
    with StateReader(state) as reader:
        change = reader.diff("ann", offset(90), NOW, snapshots=kept / "a")
        text = diff_text(change)
    assert (len(change.between), change.between_unknown) == (8, 12)
    assert "20 events between, 12 of them no longer in the ring" in text


def test_from_before_the_first_event_the_difference_is_all_that_was_learned(tmp_path):
    left_behind(tmp_path, small_model(), visits("ann", 5))
    with StateReader(tmp_path) as reader:
        change, report = reader.diff("ann", at_ms(START_MS - 1), NOW), reader.query("ann")
    assert change.moved == pytest.approx(report.distance.l2)
    assert change.moved_prior_sd == pytest.approx(report.distance.prior_sd)
    assert change.between == report.explanation.events


def test_points_in_the_wrong_order_are_refused(tmp_path):
    left_behind(tmp_path, small_model(), visits("ann", 5))
    with StateReader(tmp_path) as reader, pytest.raises(QueryError, match="the first point is after the second; swap"):
        reader.diff("ann", NOW, at_ms(START_MS))


def test_the_same_point_twice_is_no_difference(tmp_path):
    left_behind(tmp_path, small_model(), visits("ann", 5))
    with StateReader(tmp_path) as reader:
        change = reader.diff("ann", NOW, NOW)
    assert (change.moved, change.risen, change.fallen, change.between) == (0.0, (), (), ())
