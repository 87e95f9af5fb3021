"""Drift of the prequential loss: what raises an alarm, on which channel, and what does not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from learner.drift import BLOCK_EVENTS, LATEST_BLOCKS, MEASURED_BLOCKS, WARM_EVENTS, DriftWatch

STEADY, SHIFTED = 80, 40
"""Blocks before a change, and after it"""


def losses(blocks, level=0.5, seed=0, spread=0.037):
    """Blocks that spread as those of a real stream do: by who is in them."""
    rng = np.random.default_rng(seed)
    return (level + rng.normal(0, spread, blocks)[:, None] + rng.normal(0, 0.4, (blocks, BLOCK_EVENTS))).ravel()


def watched(values, index=WARM_EVENTS):
    return DriftWatch().add(values, np.broadcast_to(index, len(values)))


def changed(by):
    return np.concatenate([losses(STEADY), losses(SHIFTED, 0.5 + by, seed=1)])


def test_a_sudden_rise_is_found_by_both_detectors_on_both_channels():
    found = watched(changed(0.15))
    firsts = {}
    for alarm in found:
        firsts.setdefault((alarm.channel, alarm.detector), alarm)
    assert set(firsts) == {(c, d) for c in ("all", "warm") for d in ("adwin", "page_hinkley")}
    for alarm in firsts.values():
        assert STEADY < alarm.event / BLOCK_EVENTS <= STEADY + 20
        assert alarm.event % BLOCK_EVENTS == 0
        assert alarm.before == pytest.approx(0.5, abs=0.05)
        assert alarm.after > alarm.before
    quickest = firsts["all", "page_hinkley"]
    assert quickest.event / BLOCK_EVENTS <= STEADY + LATEST_BLOCKS
    assert [alarm.event for alarm in found] == sorted(alarm.event for alarm in found)


def test_alarms_give_the_means_before_and_after():
    alarm = next(a for a in watched(changed(0.15)) if (a.channel, a.detector) == ("all", "page_hinkley"))
    means = changed(0.15).reshape(-1, BLOCK_EVENTS).mean(axis=1)
    last = alarm.event // BLOCK_EVENTS
    assert alarm.after == pytest.approx(means[last - LATEST_BLOCKS : last].mean(), abs=1e-12)
    assert alarm.before == pytest.approx(means[MEASURED_BLOCKS : last - LATEST_BLOCKS].mean(), abs=1e-12)
    assert json.loads(json.dumps(alarm.as_dict())) == {
        "channel": "all", "detector": "page_hinkley", "event": alarm.event, "before": alarm.before,
        "after": alarm.after,
    }  # fmt: skip


def test_a_fall_is_no_alarm():
    assert watched(changed(-0.15)) == []


def test_a_steady_stream_gives_no_alarm():
    assert watched(losses(300)) == []


def test_new_people_alone_raise_only_the_channel_of_all():
    values, fresh = changed(0.0), np.full((STEADY + SHIFTED) * BLOCK_EVENTS, WARM_EVENTS)
    late = np.arange(len(values)) >= STEADY * BLOCK_EVENTS
    fresh[late & (np.arange(len(values)) % 2 == 0)] = WARM_EVENTS - 1
    values[fresh < WARM_EVENTS] += 0.3
    assert {alarm.channel for alarm in watched(values, fresh)} == {"all"}


def test_warm_users_count_on_both_channels_at_the_place_of_the_event():
    """With every other event of a warm user, a block of the channel takes two of the stream's."""
    values = changed(0.3)
    index = np.where(np.arange(len(values)) % 2 == 0, WARM_EVENTS, 0)
    warm = [alarm for alarm in watched(values, index) if alarm.channel == "warm"]
    assert warm
    # the last event of such a block stands one before the end of two of the stream's blocks
    assert (warm[0].event + 1) % (2 * BLOCK_EVENTS) == 0
    assert warm[0].event > STEADY * BLOCK_EVENTS


def test_how_the_stream_is_cut_changes_nothing():
    values = changed(0.15)
    index = np.random.default_rng(3).integers(0, 60, len(values))
    whole, pieces, watch, done = watched(values, index), [], DriftWatch(), 0
    for size in np.random.default_rng(4).integers(0, 3 * BLOCK_EVENTS, 1_000):
        pieces += watch.add(values[done : done + size], index[done : done + size])
        done += int(size)
    assert done >= len(values)
    assert whole
    assert sorted(pieces, key=str) == sorted(whole, key=str)


def test_events_without_a_loss_are_left_out():
    values = changed(0.15)
    holes = np.repeat(values, 2)
    holes[1::2] = np.nan
    assert [(a.channel, a.detector, a.before, a.after) for a in watched(holes)] == [
        (a.channel, a.detector, a.before, a.after) for a in watched(values)
    ]


def test_before_the_spread_is_known_there_is_no_alarm():
    values = np.concatenate([losses(MEASURED_BLOCKS // 2), losses(MEASURED_BLOCKS // 2, 5.0)])
    assert watched(values) == []


def test_a_channel_that_does_not_spread_is_not_alarmed_by_rounding():
    values = np.full(100 * BLOCK_EVENTS, 0.5)
    values[50 * BLOCK_EVENTS :] += 1e-5
    assert watched(values) == []


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 losses, but 1 indices"):
        DriftWatch().add(np.zeros(2), np.zeros(1, np.int64))
