"""When a partition reports, of which span, and what it makes of the markers."""

from __future__ import annotations

import pytest

from state.lineage import Span
from streams.meta.reporting import Reported, Reporter


def reporter(consumed: dict[int, int] | None = None) -> Reporter:
    """Partition 1 of 2; a round has 20 events."""
    return Reporter(1, 2, 20, consumed or {}, resend_s=60.0)


def test_enough_events_are_reported_as_one_span_from_the_first():
    partition = reporter()
    partition.observed(4, 5)
    assert partition.due(0.0) is None
    partition.observed(9, 5)
    assert partition.due(0.0) == Span(1, 0, 9)


def test_a_share_that_is_no_whole_number_is_rounded_up():
    partition = Reporter(0, 3, 10, {}, resend_s=1.0)
    partition.observed(2, 3)
    assert partition.due(0.0) is None
    partition.observed(3, 1)
    assert partition.due(0.0) == Span(0, 0, 3)


def test_a_span_begins_after_what_was_consumed_whatever_offsets_have_gaps():
    partition = reporter({1: 40, 0: 7})
    partition.observed(40, 10)  # consumed already
    assert partition.events == 0
    partition.observed(70, 10)
    assert partition.due(0.0) == Span(1, 41, 70)


def test_nothing_more_is_due_while_a_span_is_outstanding_until_it_counts_as_lost():
    partition = reporter()
    partition.observed(9, 10)
    span = partition.due(0.0)
    assert span is not None
    partition.sent(span, 100.0)
    partition.observed(30, 21)
    assert partition.due(159.0) is None
    assert partition.due(160.0) == Span(1, 0, 30)


def sent() -> Reporter:
    """0 to 9 are outstanding, 10 to 14 came since."""
    partition = reporter()
    partition.observed(9, 10)
    partition.sent(Span(1, 0, 9), 0.0)
    partition.observed(14, 5)
    return partition


def test_a_marker_that_has_consumed_the_span_ends_it():
    partition = sent()
    assert partition.marker({0: 99, 1: 9}) == Reported("over", 9)
    assert partition.events == 5
    assert partition.due(0.0) is None
    partition.observed(19, 5)
    assert partition.due(0.0) == Span(1, 10, 19)


@pytest.mark.parametrize("consumed", [{}, {0: 99}])
def test_a_marker_that_has_not_consumed_it_makes_it_due_again_with_all_that_came_since(consumed):
    partition = sent()
    assert partition.marker(consumed) == Reported("again", -1)
    assert partition.due(0.0) == Span(1, 0, 14)


def test_what_somebody_else_reported_meanwhile_is_not_told_again():
    partition = sent()
    partition.observed(24, 10)
    assert partition.marker({1: 14}) == Reported("over", 14)
    assert partition.due(0.0) == Span(1, 15, 24)
    partition = sent()
    assert partition.marker({1: 4}) == Reported("in part", 4)
    assert partition.events == 15
    assert partition.due(0.0) == Span(1, 5, 14)


def test_a_marker_while_nothing_is_outstanding_moves_the_start_of_the_next_span():
    partition = reporter()
    partition.observed(9, 10)
    assert partition.marker({1: 9}) == Reported("nothing", 9)
    assert (partition.events, partition.consumed) == (0, 9)
    assert partition.marker({1: 3}) == Reported("nothing", 9)  # it never goes back


@pytest.mark.parametrize("wrong", [(0, 20, 1.0), (2, 0, 1.0), (2, 20, -1.0)])
def test_numbers_that_nothing_comes_of_are_refused(wrong):
    partitions, events, resend_s = wrong
    with pytest.raises(ValueError, match="nothing comes of that"):
        Reporter(0, partitions, events, {}, resend_s=resend_s)
