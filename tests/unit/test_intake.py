"""Deliveries reach an open partition in their order and without a hole, or are read again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from faust.types import TP

from state.exceptions import StoreRolledBack
from streams.live.closing import Closing
from streams.live.intake import Intake
from streams.transport import Delivery

SOURCE = TP("source", 2)


@dataclass
class Opened:
    next_offset: int = 40


class Records(str):
    """A chunk, by its name."""

    offset = (40,)


class Owned:
    def __init__(self, opened: Opened | None) -> None:
        self.opened = opened
        self.reopened: list[TP] = []

    def reopen(self, tp: TP) -> None:
        self.reopened.append(tp)

    @asynccontextmanager
    async def step(self, tp: TP):
        yield self.opened


@dataclass
class Consumer:
    now: int = 1
    rewound: list[tuple[TP, int]] = field(default_factory=list)

    def taken(self) -> None:
        pass

    def begun(self, tp: TP) -> int:
        return self.now

    def highwater(self, tp: TP) -> int:
        return 99

    async def rewind(self, tp: TP, offset: int) -> None:
        self.rewound.append((tp, offset))
        self.now += 1


class Desk:
    """An intake with everything around it."""

    def __init__(self, opened: Opened | None = None, error: Exception | None = None) -> None:
        self.opened, self.error = opened or Opened(), error
        self.applied: list[str] = []
        self.failures: list[BaseException] = []
        self.consumer = Consumer()
        self.owned = Owned(self.opened)
        self.intake = Intake(self.owned, {SOURCE.topic: self.apply}, self.failures.append)
        self.intake.consumer = self.consumer

    async def apply(self, opened: Opened, chunk: str, end: int) -> None:
        assert end == 99
        if self.error is not None:
            raise self.error
        self.applied.append(chunk)

    def take(self, *deliveries: Delivery) -> None:
        async def taking() -> None:
            for delivery in deliveries:
                await self.intake.take(SOURCE, delivery)

        asyncio.run(taking())


def delivery(number: int, *chunks: str, begun: int = 1) -> Delivery:
    return Delivery(tuple(map(Records, chunks)), begun, number)  # type: ignore[arg-type]


def test_deliveries_are_applied_chunk_by_chunk() -> None:
    desk = Desk()
    desk.take(delivery(0, "a", "b"), delivery(1, "c"))
    assert desk.applied == ["a", "b", "c"]
    assert desk.consumer.rewound == []


@pytest.mark.parametrize("missing", [(delivery(1, "late"),), (delivery(0, "a"), delivery(2, "late"))])
def test_after_a_hole_the_partition_is_read_again_from_its_store(missing) -> None:
    desk = Desk()
    desk.take(*missing)
    assert "late" not in desk.applied
    assert desk.consumer.rewound == [(SOURCE, 40)]
    desk.take(delivery(0, "again", begun=2))
    assert desk.applied[-1] == "again"


def test_what_was_fetched_for_another_position_is_dropped() -> None:
    desk = Desk()
    desk.take(delivery(0, "old", begun=0))
    assert desk.applied == []
    assert desk.consumer.rewound == []


def test_a_partition_that_is_not_open_takes_nothing() -> None:
    desk = Desk()
    desk.owned.opened = None
    desk.take(delivery(0, "a"))
    assert desk.applied == []


def test_a_step_that_was_given_up_for_closing_is_no_failure() -> None:
    desk = Desk(error=Closing())
    desk.take(delivery(0, "a"))
    assert desk.failures == []


def test_any_other_error_ends_the_worker_and_does_not_reach_faust() -> None:
    desk = Desk(error=ValueError("broken"))
    desk.take(delivery(0, "a"))
    assert [str(error) for error in desk.failures] == ["broken"]


def test_a_store_that_came_back_at_an_earlier_offset_is_opened_again() -> None:
    desk = Desk(error=StoreRolledBack("back at 6"))
    desk.take(delivery(0, "a"))
    assert desk.failures == []
    assert desk.owned.reopened == [SOURCE]


def test_a_source_that_begins_anew_is_opened_again_before_anything_of_it_is_applied() -> None:
    desk = Desk(Opened(next_offset=41))
    desk.take(delivery(0, "a"))
    assert desk.applied == []
    assert desk.owned.reopened == [SOURCE]
