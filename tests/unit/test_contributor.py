"""One partition's part in the meta-updates: whose histories feed a gradient, and on whom versions are measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.adaptation import Adaptation
from learner.anchors import AnchorSet, held_out
from learner.histories import Histories
from learner.interactions import Interactions
from learner.metrics import event_log_loss
from learner.serving import ServingModel
from learner.user_hash import CANARY, drawn, user_crcs
from learner.user_state import item_hash, ring_item
from state.lineage import Span
from state.memory_store import MemoryUserStore
from streams.meta import contributor as module
from streams.meta.contributor import HELD_OUT_USERS, SHORT_SLICE, Contributor, Rises, Task, of_partition
from streams.processor import Processor
from tests.online import HELD_OUT, LIMITS, gradient_of, meta_model, meta_settings, offline_of, taste_events, trained
from tests.versions import Kept

NO_OFFLINE = Histories.empty()


class Part:
    """A partition with its rows, histories and contributor."""

    def __init__(self, *, offline=NO_OFFLINE, seed=3, segment_of=None, model=None, **settings) -> None:
        self.settings = meta_settings(**settings)
        self.serving = model or trained().serving()
        self.processor = Processor(
            self.serving, lambda _, layout: MemoryUserStore(layout), StateSettings(ring=32), limits=LIMITS
        )
        self.layout = self.processor.layout
        self.model = meta_model()
        self.contributor = Contributor(
            0, self.processor.store(0), self.processor.book(0), offline, self.settings, self.layout,
            ordinal=0.0, seed=seed, segment_of=segment_of,
        )  # fmt: skip

    def feed(self, events):
        said = self.processor.process(0, events)
        self.contributor.observe(events)
        return said

    def gradient(self, task=None, new_items=None, teacher=None):
        return self.contributor.gradient(self.model, task or task_of(), new_items or {}, teacher)

    def adaptation(self, model):
        return Adaptation(self.layout, model.first, model.second)


def task_of(users=16, recent_share=0.5, number=0, distillation=0.0):
    return Task(number, 0, users, recent_share, distillation)


def own_items(users, per_user, *, first_offset=0, seed=0):
    """User uk sees nothing but item ik: so that a history says whose it is."""
    who = np.random.default_rng(seed).permutation(np.repeat(np.asarray(users), per_user))
    labels = np.random.default_rng(seed + 1).integers(0, 2, len(who)).astype(np.int8)
    return Interactions.from_columns(
        [f"u{u}" for u in who], [f"i{u}" for u in who], labels, 1_000 * np.arange(len(who)),
        offsets=first_offset + np.arange(len(who)),
    )  # fmt: skip


def later(events, first_offset):
    return events.with_offsets(events.offset + first_offset)


def is_held_out(users):
    return held_out(user_crcs([f"u{u}".encode() for u in users]), HELD_OUT)


@pytest.fixture
def summed(monkeypatch):
    """The histories that gradients are summed over, and with what."""
    calls = []

    def gradient_sum(model, version, histories, moves, **more):
        calls.append((histories, more))
        return gradient_of(model, version)

    monkeypatch.setattr(module, "gradient_sum", gradient_sum)
    return calls


HASHES = {ring_item(item_hash(f"i{u}")): u for u in range(400)}


def owners(histories):
    return [HASHES[int(item)] for item in histories.item[histories.starts[:-1]].tolist()]


# --- who feeds a gradient


def test_flipped_labels_of_held_out_users_change_no_bit_of_the_gradient():
    users, artifact = range(40, 80), trained()
    stream = taste_events(users, 12, seed=1)
    out = np.array([held_out(user_crcs([u.encode()]), HELD_OUT)[0] for u in stream.user_ids])
    assert 5 < out.sum() < 20
    offline = offline_of(artifact).histories(artifact.fixed.item_ids)[0]

    def gradient(labels):
        part = Part(offline=offline)
        part.feed(replace(stream, label=labels))
        return part.gradient(task_of(users=64))

    poisoned = np.where(out[stream.user], 1 - stream.label, stream.label).astype(np.int8)
    clean, dirty, other = gradient(stream.label), gradient(poisoned), gradient((1 - stream.label).astype(np.int8))
    assert (clean.users, clean.log_loss) == (dirty.users, dirty.log_loss) == (64, clean.log_loss)
    for name in clean.dense:
        assert clean.dense[name].tobytes() == dirty.dense[name].tobytes(), name
    for name in clean.tables:
        assert clean.tables[name].tobytes() == dirty.tables[name].tobytes(), name
    assert clean.item_ids == dirty.item_ids
    assert other.log_loss != clean.log_loss  # the others' labels do count


def test_nobody_who_is_held_out_is_drawn_recent_or_replayed(summed):
    part = Part()
    part.feed(own_items(range(60), 4))
    part.gradient(task_of(users=300, recent_share=0.1))
    drawn_users = set(owners(summed[0][0]))
    assert drawn_users == {u for u in range(60) if not is_held_out([u])[0]}


def test_so_many_are_recent_each_once_and_with_the_whole_history(summed):
    part = Part()
    old, new = own_items(range(60), 4), own_items(range(20, 40), 3, first_offset=240, seed=5)
    part.feed(old)
    part.contributor.end_span()
    part.feed(new)
    part.gradient(task_of(users=20, recent_share=0.5))
    histories, _ = summed[0]
    assert len(histories) == 20
    recent = owners(histories)[:10]
    assert len(set(recent)) == 10
    assert set(recent) <= set(range(20, 40))
    assert histories.lengths[:10].tolist() == [7] * 10  # of the span and before
    for k, user in enumerate(recent):
        kept = histories.take(np.array([k]))
        labels = [part.label[part.user == part.user_ids.index(f"u{user}")] for part in (old, new)]
        assert kept.label.tolist() == np.concatenate(labels).tolist()
        assert kept.first.tolist() == [0]


def test_fewer_recent_users_than_wanted_are_made_up_for_by_the_replay(summed):
    part = Part()
    part.feed(own_items(range(60), 4))
    part.contributor.end_span()
    mine = next(u for u in range(60) if not is_held_out([u])[0])
    part.feed(own_items([mine], 1, first_offset=240))
    part.gradient(task_of(users=20, recent_share=1.0))
    assert len(summed[0][0]) == 20
    assert owners(summed[0][0])[0] == mine


def test_the_replay_is_of_online_and_offline_users_in_their_proportion(summed):
    offline = offline_of(trained()).histories(trained().fixed.item_ids)[0]
    assert 20 < len(offline) < 40
    part = Part(offline=offline)
    part.feed(own_items(range(100, 115), 4))  # items that no offline user has
    part.gradient(task_of(users=4_000, recent_share=0.0))
    histories, _ = summed[0]
    online = sum(int(item) in HASHES and HASHES[int(item)] >= 100 for item in histories.item[histories.starts[:-1]])
    expected = 15 / (15 + len(offline))
    assert len(histories) == 4_000
    assert abs(online / 4_000 - expected) < 4 * np.sqrt(expected * (1 - expected) / 4_000)


def test_a_partition_without_anybody_has_no_gradient(summed):
    assert Part().gradient() is None
    assert summed == []


def test_offline_users_alone_feed_a_partition_that_has_seen_nobody(summed):
    offline = offline_of(trained()).histories(trained().fixed.item_ids)[0]
    assert Part(offline=offline).gradient(task_of(users=9)) is not None
    assert len(summed[0][0]) == 9


def test_the_same_round_draws_the_same_and_another_draws_others(summed):
    for number in (0, 0, 1):
        part = Part()
        part.feed(own_items(range(60), 4))
        part.gradient(task_of(number=number))
    same, again, other = (owners(histories) for histories, _ in summed)
    assert same == again != other
    assert summed[0][1]["seed"] == (3, 0, 0)


def test_only_under_distillation_does_the_serving_version_teach(summed):
    part = Part()
    part.feed(own_items(range(30), 4))
    teacher = (part.serving, part.adaptation(part.serving))
    part.gradient(task_of(distillation=0.0), teacher=teacher)
    part.gradient(task_of(distillation=0.5), teacher=teacher)
    (_, without), (histories, told) = summed
    assert (without["teacher"], told["distillation"]) == (None, 0.5)
    # what it says is what the version said of these events: whole histories from the start
    stream = own_items(range(30), 4)
    with Processor(part.serving, Kept(), StateSettings(ring=32)) as fresh:
        logit = fresh.process(0, stream).logit
    first = owners(histories)[0]
    assert told["teacher"][: histories.lengths[0]].tobytes() == (
        logit[stream.user == stream.user_ids.index(f"u{first}")].tobytes()
    )


def test_a_stage_that_is_off_learns_nothing():
    part = Part(moves="off")
    part.feed(own_items(range(30), 4))
    with pytest.raises(ValueError, match=r"meta\.moves is off"):
        part.gradient()


# --- the span


def test_a_span_has_its_offsets_events_and_items_until_a_round_takes_it(summed):
    part = Part()
    events = own_items(range(20), 5)
    first, second = events.take(slice(10, 40)).pruned(), events.take(slice(40, 100))  # with ids that are not in it
    part.feed(first)
    part.feed(second)
    assert part.contributor.span() == Span(0, 10, 99)
    assert part.contributor.events == 90
    part.gradient(new_items={"i99": None})
    items = [events.item_ids[k] for k in events.item[10:100].tolist()]
    assert summed[0][1]["seen"] == {item: items.count(item) for item in set(items)}
    assert summed[0][1]["new_items"] == {"i99": None}
    part.contributor.end_span()
    assert part.contributor.events == 0
    part.feed(later(own_items([1], 2), 300))
    assert part.contributor.span() == Span(0, 300, 301)


def turned_around(events):
    """The same events, with dictionaries in the opposite order."""
    return replace(
        events, user_ids=events.user_ids[::-1], item_ids=events.item_ids[::-1],
        user=len(events.user_ids) - 1 - events.user, item=len(events.item_ids) - 1 - events.item,
    )  # fmt: skip


def test_how_a_span_came_in_changes_nothing_of_what_is_drawn(summed):
    events = own_items(range(60), 4)
    for size, dictionaries in ((7, Interactions.pruned), (100, turned_around), (240, turned_around)):
        part = Part()
        for first in range(0, 240, size):
            part.feed(dictionaries(events.take(slice(first, first + size))))
        part.gradient(task_of(recent_share=1.0))
    one, two, three = (owners(histories) for histories, _ in summed)
    assert one == two == three
    orders = [list(more["seen"]) for _, more in summed]
    assert orders[0] == orders[1] == orders[2] == list(dict.fromkeys(events.item_ids[k] for k in events.item.tolist()))


def test_no_events_leave_the_span_as_it_is():
    part = Part()
    part.contributor.observe(Interactions.empty())
    assert part.contributor.span() == Span(0, -1, -1)
    assert part.contributor.events == 0


# --- anchors


def few_users():
    """Three who are held out and three who are not: enough events of each for ``warm`` cohorts."""
    out = [u for u in range(60) if is_held_out([u])[0]][:3]
    return [*out, *[u for u in range(60) if not is_held_out([u])[0]][:3]], {f"u{u}" for u in out}


def assert_frozen_events(anchors, stream, out, bounds):
    """Each cohort holds the held-out users' first events within its slice (first, last), and nothing else."""
    by_crc = {int(user_crcs([u.encode()])[0]): u for u in stream.user_ids}
    for cohort in anchors.cohorts:
        first, last = bounds[cohort.slice]
        assert {by_crc[crc] for crc in cohort.crc32.tolist()} <= out
        for place, crc in enumerate(cohort.crc32.tolist()):
            mine = np.flatnonzero(stream.user == stream.user_ids.index(by_crc[crc]))
            here = mine[(mine >= first) & (mine < last)]
            here = here[: int(cohort.support[place]) + anchors.query]
            history = cohort.histories.take(np.array([place]))
            assert history.label.tolist() == stream.label[here].tolist()
            assert history.item.tolist() == [ring_item(item_hash(stream.item_ids[i])) for i in stream.item[here]]
            assert int(history.first[0]) == int((mine < first).sum())


def test_a_time_slice_becomes_cohorts_of_its_held_out_users_and_of_its_events_alone():
    part, (users, out) = Part(anchors={"slice_events": 250}), few_users()
    stream, empty = taste_events(users, 100, seed=4), AnchorSet(100, 4)
    part.feed(stream.take(slice(0, 249)))
    assert part.contributor.new_slice(empty) is empty
    part.feed(stream.take(slice(249, 300)))
    one = part.contributor.new_slice(empty)
    part.feed(stream.take(slice(300, 500)))
    assert part.contributor.new_slice(one) is one  # it began where the first was taken
    part.feed(stream.take(slice(500, 600)))
    two = part.contributor.new_slice(one)
    assert [(c.slice, c.kind) for c in two.cohorts] == [(1, "new"), (1, "warm"), (2, "warm")]  # nobody was new
    assert two.cohorts[:2] == one.cohorts
    assert [len(c.crc32) for c in two.cohorts] == [3, 3, 3]
    assert_frozen_events(two, stream, out, {1: (0, 300), 2: (300, 600)})


def test_a_forgotten_slice_is_left_out_and_the_next_one_comes_sooner():
    part, (users, out) = Part(anchors={"slice_events": 600}), few_users()
    stream, empty = taste_events(users, 100, seed=4), AnchorSet(100, 4)
    assert 600 // SHORT_SLICE == 150
    part.feed(stream.take(slice(0, 400)))
    part.contributor.forget_slice()
    part.feed(stream.take(slice(400, 549)))
    assert part.contributor.new_slice(empty) is empty
    part.feed(stream.take(slice(549, 600)))
    anchors = part.contributor.new_slice(empty)
    assert [(c.slice, c.kind) for c in anchors.cohorts] == [(1, "warm")]
    assert_frozen_events(anchors, stream, out, {1: (400, 600)})


def test_a_slice_without_anybody_held_out_makes_no_anchors():
    part = Part(anchors={"slice_events": 50})
    users = [u for u in range(40) if not is_held_out([u])[0]][:10]
    part.feed(own_items(users, 10))
    empty = AnchorSet(8, 4)
    assert part.contributor.new_slice(empty) is empty


def test_of_a_slice_only_so_many_are_remembered(monkeypatch):
    assert HELD_OUT_USERS == 4096
    monkeypatch.setattr(module, "HELD_OUT_USERS", 2)
    part = Part(anchors={"slice_events": 50, "users": 100})
    out = [u for u in range(200) if is_held_out([u])[0]][:6]
    part.feed(own_items(out, 12))
    part.feed(own_items(out, 12, first_offset=100, seed=9))  # those who are remembered go on counting
    anchors = part.contributor.new_slice(AnchorSet(100, 4))
    assert {int(crc) for cohort in anchors.cohorts for crc in cohort.crc32} <= set(
        user_crcs([f"u{u}".encode() for u in out]).tolist()
    )
    assert {len(cohort.crc32) for cohort in anchors.cohorts} == {2}
    warm = next(cohort for cohort in anchors.cohorts if cohort.kind == "warm")
    assert warm.histories.lengths.tolist() == [24, 24]


def test_segments_become_cohorts_beside_the_others():
    part = Part(
        anchors={"slice_events": 250, "users": 100},
        segment_of=lambda users: ["even" if int(user[1:]) % 2 == 0 else "" for user in users],
    )
    part.feed(taste_events(range(10), 40, seed=4))
    anchors = part.contributor.new_slice(AnchorSet(100, 4))
    even = {int(user_crcs([f"u{u}".encode()])[0]) for u in range(0, 10, 2)}
    (segment,) = [cohort for cohort in anchors.cohorts if cohort.kind == "segment=even"]
    assert set(segment.crc32.tolist()) <= even
    assert {cohort.kind for cohort in anchors.cohorts} >= {"new", "warm", "segment=even"}


# --- findings


def worse(model):
    """The same version with its items' biases turned around."""
    fixed = replace(model.fixed, item_bias=(-3 * model.fixed.item_bias - 1).astype(np.float32))
    return ServingModel(fixed, model.first, model.second, meta_version=5, fingerprint=model.fingerprint)


def losses_by_user(model, stream):
    with Processor(model, Kept(), StateSettings(ring=32)) as fresh:
        return event_log_loss(stream.label, fresh.process(0, stream).probability)


@pytest.mark.parametrize("share", [None, 0.4])
def test_versions_are_compared_on_the_span_as_if_each_had_served_from_the_start(share):
    part = Part()
    stream = taste_events(range(30), 20, seed=6)
    part.feed(stream.take(slice(0, 400)))
    part.contributor.end_span()
    part.feed(stream.take(slice(400, 600)))
    other = worse(part.serving)
    adaptations = {model: part.adaptation(model) for model in (part.serving, other)}
    found = part.contributor.findings(other, part.serving, adaptations, None, share)
    assert (found.version, found.scores) == (5, None)
    rise = losses_by_user(other, stream) - losses_by_user(part.serving, stream)
    users = list(dict.fromkeys(stream.user_ids[k] for k in stream.user[400:].tolist()))
    if share is not None:
        users = [u for u in users if drawn(user_crcs([u.encode()]), CANARY, share)[0]]
        assert 5 < len(users) < 20
    latest = np.arange(600) >= 400
    expected = {u: (rise[latest & (stream.user == stream.user_ids.index(u))]) for u in users}
    assert sorted(found.stream.events.tolist()) == sorted(len(r) for r in expected.values())
    np.testing.assert_allclose(np.sort(found.stream.rise), np.sort([r.sum() for r in expected.values()]), atol=1e-5)
    assert found.stream.rise.sum() > 0


def test_a_version_beside_itself_rises_by_nothing():
    part = Part()
    part.feed(taste_events(range(10), 10, seed=6))
    adaptations = {part.serving: part.adaptation(part.serving)}
    found = part.contributor.findings(part.serving, part.serving, adaptations, None, None)
    assert found.stream.rise.tolist() == [0.0] * 10
    assert found.stream.events.tolist() == [10] * 10


def test_anchors_are_scored_where_they_are_given():
    part = Part(anchors={"slice_events": 250, "users": 100})
    part.feed(taste_events(range(30), 20, seed=4))
    anchors = part.contributor.new_slice(AnchorSet(100, 4))
    adaptations = {part.serving: part.adaptation(part.serving)}
    scores = part.contributor.findings(part.serving, part.serving, adaptations, anchors, None).scores
    assert [cohort.name for cohort in scores.cohorts] == [cohort.column.name for cohort in anchors.cohorts]
    assert all(cohort.finite for cohort in scores.cohorts)


def test_of_a_span_only_so_many_users_are_compared(monkeypatch):
    monkeypatch.setattr(module, "STREAM_USERS", 3)
    part = Part()
    part.feed(taste_events(range(10), 10, seed=6))
    adaptations = {part.serving: part.adaptation(part.serving)}
    assert len(part.contributor.findings(part.serving, part.serving, adaptations, None, None).stream.rise) == 3


def test_of_a_span_without_anybody_there_is_nothing_to_compare():
    part = Part()
    adaptations = {part.serving: part.adaptation(part.serving)}
    found = part.contributor.findings(part.serving, part.serving, adaptations, None, None)
    assert (len(found.stream.rise), len(found.stream.events)) == (0, 0)


def test_rises_of_partitions_add_up():
    both = Rises(np.array([1.0]), np.array([2])) + Rises(np.array([3.0, 4.0]), np.array([5, 6])) + Rises.none()
    assert (both.rise.tolist(), both.events.tolist()) == ([1.0, 3.0, 4.0], [2, 5, 6])


def test_every_offline_user_counts_as_one_partitions():
    offline = offline_of(trained()).histories(trained().fixed.item_ids)[0]
    parts = [of_partition(offline, k, 3) for k in range(3)]
    assert sum(len(part) for part in parts) == len(offline)
    assert sum(part.events for part in parts) == offline.events
    assert all(len(part) for part in parts)
    assert of_partition(offline, 0, 1).label.tolist() == offline.label.tolist()
