"""Who is served by which version, and how rows come onto one: at the user's next event, as if they had always been."""

from __future__ import annotations

import numpy as np
import pytest

from learner.adaptation import Adaptation, EventColumns
from learner.interactions import Interactions
from learner.metrics import event_index
from learner.prior_exchange import Prior, exchange_prior
from learner.rebasing import latest_events, put_adaptive, relearn
from learner.user_hash import CANARY, drawn, user_crcs
from learner.user_state import HEADER_BYTES, ItemHashes
from state.histories import HistoryLimits
from state.memory_store import MemoryUserStore
from state.rocksdb import StoreMemory
from state.store import RocksUserStore
from streams.versions import Serving
from tests.models import HEADS, at
from tests.versions import PLENTY, RING, Kept, processor, stream_of, streamed, version

EVENTS, MOVE = 600, 400
USERS = 12
"""Some 33 events each before the move, more than a ring holds for most"""


def header_and_ring(layout, row):
    """All of a row but the adaptive part, its version and its checksum."""
    held = layout.rows(np.frombuffer(row, np.uint8).reshape(1, -1))[0]
    names = [n for n in ("owner", "last_offset", "events", "ledger", "first_time_ms", "last_time_ms", "guarded", "ring")
             if n in held.dtype.names]  # fmt: skip
    assert len(names) >= 6
    return {name: held[name].tolist() for name in names}


def slab_of(row):
    return np.frombuffer(row, np.uint8).reshape(1, -1).copy()


def adaptive(layout, row):
    return bytes(row[HEADER_BYTES : layout.row_bytes - 8 * layout.ring])


def version_of(layout, row):
    return int(layout.rows(slab_of(row))["meta_version"][0])


# --- who is served by whom


def test_without_a_canary_one_version_serves_everybody():
    ((model, places),) = Serving(only := version(3)).groups([b"a", b"b", b"c"])
    assert model is only
    assert places.tolist() == [0, 1, 2]
    assert Serving(only).models() == (only,)


def test_the_canary_serves_its_share_by_the_users_hash():
    users = [f"user-{k}".encode() for k in range(4_000)]
    current, canary = version(1), version(2)
    serving = Serving(current, canary, 0.25)
    groups = dict(serving.groups(users))
    assert serving.models() == (current, canary)
    assert groups[canary].tolist() == np.flatnonzero(drawn(user_crcs(users), CANARY, 0.25)).tolist()
    assert sorted([*groups[current].tolist(), *groups[canary].tolist()]) == list(range(4_000))
    assert 900 < len(groups[canary]) < 1_100  # 1,000 ± 3.6 standard deviations
    assert sorted(dict(serving.groups(users[::-1]))[canary].tolist()) == sorted(
        3_999 - k for k in groups[canary].tolist()
    )  # by the id, not by the place


def test_a_group_without_users_is_left_out():
    current, canary = version(1), version(2)
    users = [f"user-{k}".encode() for k in range(100)]
    chosen = drawn(user_crcs(users), CANARY, 0.25)
    one = [user for user, is_canary in zip(users, chosen, strict=True) if is_canary]
    assert [model for model, _ in Serving(current, canary, 0.25).groups(one)] == [canary]
    assert [model for model, _ in Serving(current, canary, 0.0).groups(users)] == [current]


def test_of_no_users_the_current_version_has_none():
    ((model, places),) = Serving(current := version(1), version(2), 0.5).groups([])
    assert model is current
    assert len(places) == 0


# --- moving


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_with_its_history_a_row_is_as_if_it_had_been_on_the_version_from_the_start(kind, second):
    stream, moved, always = stream_of(EVENTS, USERS), Kept(), Kept()
    new = version(1, kind, second=second)
    with processor(version(0, kind, second=second), moved) as work:
        found = streamed(work, stream, {MOVE: Serving(new)})
        layout, ways, count = work.layout, dict(work.moved), work.counts.users_moved
    with processor(version(1, kind, second=second), always) as work:
        expected = streamed(work, stream, {})
    assert moved.rows() == always.rows()  # every user came again; header, ledger and ring too
    np.testing.assert_array_equal(found[MOVE:], expected[MOVE:])
    assert not np.array_equal(found[:MOVE], expected[:MOVE])
    assert {version_of(layout, row) for row in moved.rows().values()} == {1}
    known = len(set(stream.user[:MOVE].tolist()))
    assert ways == {"history": known, "ring": 0, "closed": 0}
    assert count == known == USERS


def test_a_row_moves_at_its_users_next_event_only():
    stream, opened = stream_of(EVENTS, USERS), Kept()
    absent = "u3"
    here = stream.take(np.flatnonzero(stream.user != stream.user_ids.index(absent)))
    with processor(version(0), opened) as work:
        work.process(0, stream.take(slice(0, MOVE)))
        before = opened.rows()
        work.serve(0, Serving(version(1)))
        assert opened.rows() == before  # nothing at the adoption itself
        assert work.counts.users_moved == 0
        later = here.take(np.flatnonzero(here.offset > stream.offset[MOVE - 1])).pruned()
        work.process(0, later.take(slice(0, 1)))
        moved = {user for user, row in opened.rows().items() if row != before[user]}
        assert moved == {later.user_ids[later.user[0]].encode()}
        assert work.counts.users_moved == 1
        assert at(opened.stores[0]) == (int(later.offset[0]), 1)
        work.process(0, later.take(slice(1, len(later))))
        rows, layout = opened.rows(), work.layout
    assert rows[absent.encode()] == before[absent.encode()]
    assert {user for user, row in rows.items() if version_of(layout, row) == 0} == {absent.encode()}


def test_a_user_who_comes_first_after_the_adoption_starts_on_the_new_version():
    opened, alone = Kept(), Kept()
    stream = stream_of(100, 5)
    stranger = Interactions.from_columns(["new"] * 3, ["i1", "i2", "i3"], [1, 0, 1], [1, 2, 3], offsets=[900, 901, 902])
    with processor(version(0), opened) as work:
        work.process(0, stream)
        work.serve(0, Serving(version(1)))
        found = work.process(0, stranger)
        assert work.counts.users_moved == 0
    with processor(version(1), alone) as work:
        np.testing.assert_array_equal(work.process(0, stranger).logit, found.logit)
    assert opened.rows()[b"new"] == alone.rows()[b"new"]


@pytest.mark.parametrize("limits", [None, PLENTY], ids=["no histories", "histories"])
@pytest.mark.parametrize("kind", HEADS)
def test_from_the_ring_the_latest_events_are_learned_again(kind, limits):
    stream, opened = stream_of(EVENTS, USERS), Kept()
    new = version(1, kind)
    with processor(version(0, kind), opened, limits=limits, rebase="ring") as work:
        layout = work.layout
        work.process(0, stream.take(slice(0, MOVE)))
        before = opened.rows()
        work.serve(0, Serving(new))
        found = work.process(0, stream.take(slice(MOVE, MOVE + 1)))
        assert work.moved == {"history": 0, "ring": 1, "closed": 0}
    user = stream.user_ids[stream.user[MOVE]].encode()
    slab = slab_of(before[user])
    events = latest_events(layout, slab)
    assert events.first[0] > 0  # there were more than the ring holds
    adaptation = Adaptation(layout, new.first, new.second)
    features = new.user_features([user.decode()], {"plan": (plan_of(stream, user),)})
    put_adaptive(layout, slab, np.zeros(1, np.int64), relearn(adaptation, new, events, new.means_of(features)).slab, 1)
    assert header_and_ring(layout, slab.tobytes()) == header_and_ring(layout, before[user])
    assert adaptive(layout, slab.tobytes()) != adaptive(layout, before[user])
    said = adaptation.learn(slab, event_at(stream, MOVE, new), new.items)
    assert found.logit.tobytes() == said.logit.tobytes()
    row = opened.rows()[user]
    assert adaptive(layout, row) == adaptive(layout, slab.tobytes())
    assert header_and_ring(layout, row)["events"] == header_and_ring(layout, before[user])["events"] + 1


def event_at(stream, place, model):
    """One event as the kernel takes it, of the row in slot 0."""
    event = stream.take(slice(place, place + 1)).pruned()
    return EventColumns(
        np.zeros(1, np.int32), event.item, event.label, model.grades(event.value), event.event_time_ms, event.offset,
        model.item_rows(event.item_ids, event.item_features), ItemHashes().of(event.item_ids),
    )  # fmt: skip


def plan_of(stream, user):
    return stream.user_features["plan"][stream.user_ids.index(user.decode())]


@pytest.mark.parametrize("kind", HEADS)
def test_in_closed_form_the_prior_alone_is_exchanged(kind):
    stream, opened = stream_of(EVENTS, USERS), Kept()
    old, new = version(0, kind), version(1, kind)
    with processor(old, opened, rebase="closed") as work:
        layout = work.layout
        work.process(0, stream.take(slice(0, MOVE)))
        before = opened.rows()
        work.serve(0, Serving(new, earlier=(old,)))
        said = work.predict(0, stream.take(slice(MOVE, MOVE + 1)))
        found = work.process(0, stream.take(slice(MOVE, MOVE + 1)))
        assert work.moved == {"history": 0, "ring": 0, "closed": 1}
    user = stream.user_ids[stream.user[MOVE]].encode()
    slab = slab_of(before[user])
    features = new.user_features([user.decode()], {"plan": (plan_of(stream, user),)})
    priors = [
        [Prior(m.means_of(features), m.first.covariance), Prior(m.second.initialization[None], m.second.covariance)]
        for m in (old, new)
    ]
    exchange_prior(layout, slab, *priors, 1)
    assert np.isfinite(layout.rows(slab)["mean"]).all()
    adaptation = Adaptation(layout, new.first, new.second)
    expected = adaptation.predict(slab, event_at(stream, MOVE, new), new.items).logit
    assert expected.tobytes() == said.logit.tobytes() == found.logit.tobytes()


def test_closed_form_from_a_version_that_is_not_at_hand_takes_the_ring():
    stream, ring, closed = stream_of(EVENTS, USERS), Kept(), Kept()
    for opened, rebase in ((ring, "ring"), (closed, "closed")):
        with processor(version(0), opened, rebase=rebase) as work:
            streamed(work, stream, {MOVE: Serving(version(1))})  # ``earlier`` does not name version 0
            assert work.moved == {"history": 0, "ring": USERS, "closed": 0}
    assert ring.rows() == closed.rows()


def test_users_whose_histories_were_let_go_move_by_their_rings():
    stream, opened = stream_of(EVENTS, USERS), Kept()
    with processor(version(0), opened, limits=HistoryLimits(200, 1 << 20)) as work:
        work.process(0, stream.take(slice(0, MOVE)))
        work.book(0).shrink()
        kept = int(work.book(0).keeps([u.encode() for u in stream.user_ids]).sum())
        assert 0 < kept < USERS
        work.serve(0, Serving(version(1)))
        work.process(0, stream.take(slice(MOVE, EVENTS)))
        assert work.moved == {"history": kept, "ring": USERS - kept, "closed": 0}
        assert work.counts.users_moved == USERS


def test_two_versions_at_once_give_each_user_the_right_one():
    stream = stream_of(EVENTS, 40)
    users = [user.encode() for user in stream.user_ids]
    chosen = drawn(user_crcs(users), CANARY, 0.3)
    assert 0 < chosen.sum() < 40
    both, alone = Kept(), {1: Kept(), 2: Kept()}
    with processor(version(0), both) as work:
        logits = streamed(work, stream, {200: Serving(version(1), version(2), 0.3)})
        assert at(both.stores[0])[1] == 1  # the store is on the version that serves everybody else
    expected = {}
    for number, opened in alone.items():
        with processor(version(0), opened) as work:
            expected[number] = streamed(work, stream, {200: Serving(version(number))})
    canary = chosen[stream.user]
    np.testing.assert_array_equal(logits, np.where(canary, expected[2], expected[1]))
    rows = {number: opened.rows() for number, opened in alone.items()}
    assert both.rows() == {user: rows[2 if is_it else 1][user] for user, is_it in zip(users, chosen, strict=True)}


def test_a_canary_that_is_taken_back_leaves_its_users_as_they_would_be():
    stream, tried, never = stream_of(EVENTS, 40), Kept(), Kept()
    with processor(version(0), tried) as work:
        found = streamed(work, stream, {200: Serving(version(0), version(2), 0.3), 300: Serving(version(0))})
        back = work.moved["history"]
    with processor(version(0), never) as work:
        expected = streamed(work, stream, {})
    np.testing.assert_array_equal(found[300:], expected[300:])
    assert not np.array_equal(found[200:300], expected[200:300])
    came = set(stream.user[300:].tolist())
    assert {k for k, u in enumerate(stream.user_ids) if tried.rows()[u.encode()] == never.rows()[u.encode()]} >= came
    assert back > 0


def test_items_that_came_before_the_adoption_are_known_to_the_new_version():
    """i12 to i14 are in no vocabulary: their features speak, in histories too, wherever the batches end."""
    stream = stream_of(EVENTS, USERS)
    late = {"i12", "i13", "i14"}
    assert late <= {stream.item_ids[k] for k in stream.item[:MOVE].tolist()}
    found = []
    for cuts in ((), range(MOVE + 1, EVENTS)):
        opened = Kept()
        with processor(version(0), opened) as work:
            new = version(1)  # made before any of those came
            found.append((streamed(work, stream, {MOVE: Serving(new)}, cuts).tobytes(), opened.rows()))
            assert late <= set(new.met_items)
    assert found[0] == found[1]


# --- asking, failing, coming again


@pytest.mark.parametrize("rebase", ["history", "ring", "closed"])
def test_predicting_moves_nothing_but_answers_as_the_moved_row_would(rebase):
    stream, opened = stream_of(EVENTS, USERS), Kept()
    old = version(0)
    with processor(old, opened, rebase=rebase) as work:
        work.process(0, stream.take(slice(0, MOVE)))
        work.serve(0, Serving(version(1), version(2), 0.4, earlier=(old,)))
        before, counts, ways = opened.rows(), work.counts.users_moved, dict(work.moved)
        first = [int(np.flatnonzero(stream.user[MOVE:] == k)[0]) + MOVE for k in range(USERS)]
        said = work.predict(0, stream.take(np.sort(first)))
        assert opened.rows() == before
        assert (work.counts.users_moved, dict(work.moved)) == (counts, ways) == (0, dict.fromkeys(ways, 0))
        assert at(opened.stores[0]) == (int(stream.offset[MOVE - 1]), 0)
        found = work.process(0, stream.take(slice(MOVE, EVENTS)))
    np.testing.assert_array_equal(said.logit, found.logit[np.sort(first) - MOVE])


class Crash(Exception):
    """The process dies."""


@pytest.mark.parametrize("commits", [0, 1, 5, 9])
def test_a_crash_between_commits_around_an_adoption_leaves_no_trace(commits, tmp_path):
    stream, whole, commit = stream_of(EVENTS, USERS), Kept(), 64
    served = {256: Serving(version(1)), 448: Serving(version(2), version(3), 0.3)}
    with processor(version(0), whole) as work:
        expected = streamed(work, stream, served)

    class Dying(RocksUserStore):
        commits_left = commits

        def write_batch(self, users, rows, progress, **more):
            if self.commits_left == 0:
                raise Crash
            self.commits_left -= 1
            return super().write_batch(users, rows, progress, **more)

    memory = StoreMemory(8 << 20, 8 << 20)
    with (
        processor(version(0), lambda _, layout: Dying(tmp_path / "s", layout, memory), commit_events=commit) as work,
        pytest.raises(Crash),
    ):
        streamed(work, stream, served)
    with processor(
        version(0), lambda _, layout: RocksUserStore(tmp_path / "s", layout, memory), commit_events=commit
    ) as work:
        offset, adopted = at(work.store(0))
        done = 0 if offset is None else int(np.searchsorted(stream.offset, offset, side="right"))
        assert done == commits * commit
        assert adopted == (None if not commits else 0 if done <= 256 else 1 if done <= 448 else 2)
        again = streamed(work, stream, served)  # from the first record: the versions are adopted where they were
        assert np.isnan(again[:done]).all()
        np.testing.assert_array_equal(again[done:], expected[done:])
        assert {user: row.tobytes() for user, row in work.store(0).iterate()} == whole.rows()


def test_records_of_a_commit_that_failed_give_the_same_rows_when_they_come_again():
    stream, opened, clean = stream_of(EVENTS, USERS), Kept(), Kept()
    with processor(version(0), clean) as work:
        expected = streamed(work, stream, {MOVE: Serving(version(1))})

    def fails(events, adapted):
        raise Crash

    with processor(version(0), opened) as work:
        work.process(0, stream.take(slice(0, MOVE)))
        work.serve(0, Serving(version(1)))
        with pytest.raises(Crash):
            work.process(0, stream.take(slice(MOVE, EVENTS)), payload=fails)
        found = work.process(0, stream.take(slice(MOVE, EVENTS)))
    np.testing.assert_array_equal(found.logit, expected[MOVE:])
    assert opened.rows() == clean.rows()


def test_an_idle_user_starts_on_the_version_that_serves():
    opened, turn, turns = Kept(), 600_000, 600  # 100 hours, no turn longer than a step of the clock
    early = Interactions.from_columns(["a"] * 3, ["i1", "i2", "i3"], [1, 0, 1], [0, 1, 2])
    others = Interactions.from_columns(
        [f"b{k % 7}" for k in range(turns)], ["i4"] * turns, [1] * turns, [turn * k for k in range(1, turns + 1)],
        offsets=list(range(3, turns + 3)),
    )  # fmt: skip
    back = Interactions.from_columns(["a"], ["i5"], [1], [turn * (turns + 1)], offsets=[turns + 3])
    with processor(version(0), opened, expire_after_days=2) as work:
        work.process(0, early)
        work.process(0, others)
        work.serve(0, Serving(version(1)))
        work.process(0, back)
        assert (work.counts.users_moved, sum(work.moved.values())) == (0, 0)
        assert work.counts.users_expired + work.counts.users_swept == 1
        assert version_of(work.layout, opened.rows()[b"a"]) == 1
        assert int(work.layout.rows(slab_of(opened.rows()[b"a"]))["events"][0]) == 1


@pytest.mark.parametrize("second", [False, True], ids=["one version", "two"])
def test_with_histories_an_event_is_told_how_many_came_before_it(second):
    stream = stream_of(EVENTS, USERS)
    number = event_index(stream.user)
    with processor(version(0), Kept(), commit_events=50) as work:
        one = work.process(0, stream.take(slice(0, 250)))
        work.serve(0, Serving(version(1), version(2) if second else None, 0.3))
        two = work.process(0, stream.take(slice(200, EVENTS)))
        asked = work.predict(0, stream.take(slice(0, 10)))
    assert one.number.tolist() == number[:250].tolist()
    assert two.number.tolist() == [-1] * 50 + number[250:].tolist()  # 50 were applied before
    assert asked.number.tolist() == [-1] * 10
    with processor(version(0), Kept(), limits=None) as work:
        for say in (work.process, work.predict):
            assert say(0, stream.take(slice(0, 10))).number.tolist() == [-1] * 10


def test_partitions_are_served_by_versions_of_their_own_and_a_released_one_forgets_its():
    stream, opened = stream_of(60, 6), Kept()
    with processor(version(0), opened) as work:
        work.serve(1, Serving(version(1)))
        one, two = work.process(0, stream), work.process(1, stream)
        assert not np.array_equal(one.logit, two.logit)
        assert at(opened.stores[0])[1] == 0
        assert at(opened.stores[1])[1] == 1
        work.release(1)
        opened.stores[1] = MemoryUserStore(work.layout)
        np.testing.assert_array_equal(work.process(1, stream).logit, one.logit)


def test_without_limits_there_are_no_histories_to_ask_for():
    with processor(version(0), Kept(), limits=None) as work, pytest.raises(ValueError, match="keeps no histories"):
        work.book(0)


def test_the_ring_that_histories_need_is_the_shortest_that_is_taken():
    with (
        processor(version(0), Kept(), ring=RING - 1) as work,
        pytest.raises(ValueError, match=r"set state\.ring to at least 32"),
    ):
        work.store(0)
