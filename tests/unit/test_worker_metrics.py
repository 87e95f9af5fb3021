"""What Prometheus reads of a worker: names, labels and values."""

from __future__ import annotations

import threading

import pytest

from streams.live.metrics import DELAY_SPAN_S, Outcome, SlidingMax, Stage, WorkerMetrics
from streams.rejects import Reason

LABELS = {"outcome", "partition", "stage", "reason", "version", "model"}
PYTHON_INFO = {"version", "implementation", "major", "minor", "patchlevel"}
NAMES = {
    "coldstream_events_total",
    "coldstream_lag_events",
    "coldstream_lag_seconds",
    "coldstream_batch_events_bucket",
    "coldstream_stage_seconds_bucket",
    "coldstream_restore_records",
    "coldstream_restore_share",
    "coldstream_dead_letters_total",
    "coldstream_users",
    "coldstream_state_events",
    "coldstream_changelog_rows_total",
    "coldstream_changelog_pending_commits",
    "coldstream_partition_owned",
    "coldstream_standby_lag_records",
    "coldstream_loop_delay_seconds_bucket",
    "coldstream_loop_delay_max_seconds",
    "coldstream_rebalances_total",
    "coldstream_fenced_total",
    "coldstream_gap_events_total",
    "coldstream_retries_total",
    "coldstream_poison_red",
    "coldstream_build_info",
    "process_resident_memory_bytes",
    "python_info",
}


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def wall() -> Clock:
    return Clock(1_700_000_000.0)


@pytest.fixture
def metrics(clock: Clock, wall: Clock) -> WorkerMetrics:
    return WorkerMetrics("1.2", "v3", clock=clock, wall_clock=wall)


def value(metrics: WorkerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"coldstream_{name}", labels)


def partitions_told_of(metrics: WorkerMetrics) -> set[str]:
    samples = [s for family in metrics.registry.collect() for s in family.samples]
    return {s.labels["partition"] for s in samples if "partition" in s.labels}


def everything(metrics: WorkerMetrics, partition: int = 3) -> None:
    """Tells one of each fact."""
    metrics.owns(partition)
    metrics.restore(partition, 1, 2)
    for outcome in Outcome:
        metrics.events(outcome, 1)
    for stage in Stage:
        metrics.retried(stage)
        with metrics.timed(stage):
            pass
    metrics.dead_letters(Reason.MISSING_FIELD, 1)
    metrics.batch(10)
    metrics.lag(partition, 5, 1_699_999_999_000)
    metrics.poison(partition, False)
    metrics.changelog_rows(4)
    metrics.pending_commits(partition, 1)
    metrics.state(partition, 2, 10)
    metrics.fenced()
    metrics.follows(partition + 1, 7)
    metrics.loop_delay(0.01)
    metrics.rebalanced()
    metrics.gap(3)


def test_every_name_is_there_and_no_label_but_those_known_beforehand(metrics):
    everything(metrics)
    families = list(metrics.registry.collect())
    assert {s.name for family in families for s in family.samples} >= NAMES
    for family in families:
        for sample in family.samples:
            known = PYTHON_INFO if sample.name == "python_info" else LABELS | {"le"}
            assert set(sample.labels) <= known, sample


def test_label_values_are_of_the_worker_never_of_an_event(metrics):
    everything(metrics)
    allowed = {
        "outcome": set(Outcome),
        "stage": set(Stage),
        "reason": set(Reason),
        "partition": {"3", "4"},
        "version": {"1.2"},
        "model": {"v3"},
    }
    samples = [s for family in metrics.registry.collect() for s in family.samples if s.name.startswith("coldstream_")]
    told = {(label, text) for s in samples for label, text in s.labels.items() if label != "le"}
    assert {label for label, _ in told} == set(allowed)
    assert all(text in allowed[label] for label, text in told)


def test_events_are_counted_by_outcome_and_every_outcome_begins_at_zero(metrics):
    metrics.events(Outcome.APPLIED, 40)
    metrics.events(Outcome.APPLIED, 2)
    metrics.events(Outcome.SKIPPED, 5)
    counted = {outcome: value(metrics, "events_total", outcome=outcome) for outcome in Outcome}
    assert counted == {"applied": 42, "duplicate": 0, "skipped": 5, "dead_letter": 0, "guarded": 0}


def test_dead_letters_are_counted_by_reason(metrics):
    metrics.dead_letters(Reason.MISSING_FIELD, 1)
    metrics.dead_letters(Reason.MISSING_FIELD, 2)
    metrics.dead_letters(Reason.NOT_FINITE, 1)
    assert value(metrics, "dead_letters_total", reason="missing field") == 3
    assert value(metrics, "dead_letters_total", reason="not finite") == 1


def test_a_stage_is_timed_even_if_it_fails(metrics, clock):
    def fail() -> None:
        with metrics.timed(Stage.ADAPT):
            clock.now += 0.25
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert value(metrics, "stage_seconds_sum", stage="adapt") == 0.25
    assert value(metrics, "stage_seconds_count", stage="adapt") == 1


def test_lag_in_seconds_grows_by_itself_and_is_zero_without_lag(metrics, wall):
    metrics.owns(0)
    metrics.lag(0, 7)
    assert value(metrics, "lag_seconds", partition="0") is None
    metrics.lag(0, 7, int(wall.now * 1000) - 4_000)
    assert value(metrics, "lag_events", partition="0") == 7
    assert value(metrics, "lag_seconds", partition="0") == 4
    wall.now += 30
    metrics.lag(0, 8)
    assert value(metrics, "lag_seconds", partition="0") == 34
    metrics.lag(0, 0)
    assert value(metrics, "lag_seconds", partition="0") == 0


def test_a_timestamp_from_the_future_is_no_negative_lag(metrics, wall):
    metrics.owns(0)
    metrics.lag(0, 1, int(wall.now * 1000) + 60_000)
    assert value(metrics, "lag_seconds", partition="0") == 0


def test_figures_of_a_partition(metrics):
    metrics.owns(2)
    assert value(metrics, "partition_owned", partition="2") == 1
    metrics.restore(2, 30, 120)
    assert value(metrics, "restore_records", partition="2") == 30
    assert value(metrics, "restore_share", partition="2") == 0.25
    metrics.restore(2, 0, 0)
    assert value(metrics, "restore_share", partition="2") == 1
    metrics.state(2, 100, 5_000)
    assert value(metrics, "users", partition="2") == 100
    assert value(metrics, "state_events", partition="2") == 5_000
    metrics.pending_commits(2, 3)
    assert value(metrics, "changelog_pending_commits", partition="2") == 3
    metrics.poison(2, True)
    assert value(metrics, "poison_red", partition="2") == 1


def test_a_second_assignment_changes_no_figure(metrics):
    metrics.owns(2)
    metrics.lag(2, 9)
    metrics.owns(2)
    assert value(metrics, "lag_events", partition="2") == 9


def test_batches_are_counted_by_size(metrics):
    metrics.batch(16_000)
    metrics.batch(3)
    assert value(metrics, "batch_events_sum") == 16_003
    assert value(metrics, "batch_events_bucket", le="8000.0") == 1
    assert value(metrics, "batch_events_bucket", le="16000.0") == 2


def test_what_is_not_known_is_not_shown(metrics):
    metrics.owns(2)
    assert value(metrics, "lag_events", partition="2") is None
    assert value(metrics, "users", partition="2") is None


def test_a_revoked_partition_leaves_nothing_behind_even_if_a_late_thread_speaks_of_it(metrics):
    everything(metrics, 3)
    assert partitions_told_of(metrics) == {"3", "4"}
    metrics.gone(3)
    metrics.lag(3, 9, 1)
    metrics.restore(3, 1, 2)
    metrics.state(3, 1, 1)
    metrics.pending_commits(3, 1)
    metrics.poison(3, True)
    assert partitions_told_of(metrics) == {"4"}
    metrics.owns(3)
    assert value(metrics, "lag_events", partition="3") is None


def test_a_followed_partition_is_not_owned_until_it_is_taken_over(metrics):
    metrics.follows(5, 40)
    assert value(metrics, "partition_owned", partition="5") == 0
    assert value(metrics, "standby_lag_records", partition="5") == 40
    metrics.owns(5)
    metrics.follows(5, 30)  # the follower had not heard of it yet
    metrics.unfollowed(5)
    assert value(metrics, "partition_owned", partition="5") == 1
    assert value(metrics, "standby_lag_records", partition="5") is None
    metrics.gone(5)
    metrics.follows(6, 1)
    metrics.unfollowed(6)
    assert partitions_told_of(metrics) == set()


def test_counts_of_the_process(metrics):
    everything(metrics)
    assert value(metrics, "rebalances_total") == 1
    assert value(metrics, "fenced_total") == 1
    assert value(metrics, "gap_events_total") == 3
    assert value(metrics, "changelog_rows_total") == 4
    assert value(metrics, "retries_total", stage="adapt") == 1
    assert value(metrics, "retries_total", stage="publish") == 1
    assert value(metrics, "build_info", version="1.2", model="v3") == 1


def test_the_largest_loop_delay_is_forgotten_after_a_minute(metrics, clock):
    metrics.loop_delay(0.3)
    clock.now += 30
    metrics.loop_delay(0.1)
    assert value(metrics, "loop_delay_max_seconds") == 0.3
    clock.now += DELAY_SPAN_S - 29
    assert value(metrics, "loop_delay_max_seconds") == 0.1
    clock.now += DELAY_SPAN_S
    assert value(metrics, "loop_delay_max_seconds") == 0
    assert value(metrics, "loop_delay_seconds_count") == 2


def test_a_sliding_maximum_keeps_only_what_may_still_be_the_largest():
    clock = Clock()
    largest = SlidingMax(10.0, clock)
    for step, given in enumerate([1.0, 3.0, 2.0, 2.0, 5.0]):
        clock.now = float(step)
        largest.add(given)
    assert len(largest._falling) == 1
    clock.now = 14.0
    assert largest.value() == 5
    clock.now = 14.1
    assert largest.value() == 0


def test_two_workers_in_one_process_share_nothing(metrics):
    other = WorkerMetrics("1.2", "v3")
    metrics.events(Outcome.APPLIED, 5)
    assert value(other, "events_total", outcome="applied") == 0


def test_threads_lose_no_count(metrics):
    metrics.owns(0)

    def work() -> None:
        for n in range(500):
            metrics.events(Outcome.APPLIED, 1)
            metrics.batch(1)
            metrics.lag(0, n)
            metrics.loop_delay(0.0)
            list(metrics.registry.collect())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "events_total", outcome="applied") == 2_000
    assert value(metrics, "batch_events_count") == 2_000
