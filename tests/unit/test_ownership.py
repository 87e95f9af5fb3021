"""Partitions are opened when the group gives them, closed when it takes them, and opened again after a fence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError, ProducerFenced
from faust.types import TP

from configs.settings import WorkerSettings
from streams.live import ownership
from streams.live.health import Health
from streams.live.metrics import WorkerMetrics
from streams.live.ownership import Ownership
from streams.live.watch import Watch

PLACE = TP("source", 1)
REOPEN_S = 0.05
DEADLINE_S = 5.0


class Opened:
    def __init__(self) -> None:
        self.next_offset = 12
        self.closing = asyncio.Event()
        self.fenced = asyncio.Event()
        self.ended: list[str] = []

    async def run(self) -> None:
        await self.fenced.wait()
        raise ProducerFenced

    def committable(self) -> int | None:
        return 9

    async def flush(self, flush_s: float) -> None:
        self.ended.append(f"flushed within {flush_s:g}")

    async def close(self) -> None:
        self.ended.append("closed")


class Consumer:
    def __init__(self) -> None:
        self.started: list[tuple[TP, int]] = []

    async def start_at(self, tp: TP, offset: int) -> None:
        self.started.append((tp, offset))

    def highwater(self, tp: TP) -> int:
        return 20


class Group:
    """An ownership, and what it asks of everything around it."""

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self.opened: list[Opened] = []
        self.refusals: list[Exception] = []
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.now = 0.0
        settings = WorkerSettings(stall_s=60)
        self.health = Health(settings, lambda: self.now)
        watch = Watch(WorkerMetrics("1", "m"), self.health, 60.0, lambda: self.now)
        self.owned = Ownership(
            {"source": self.open, "routed": self.open}, {}, watch, self.failures.append, reopen_s=REOPEN_S
        )
        self.consumer = self.owned.consumer = Consumer()  # type: ignore[assignment]

    async def open(self, partition: int) -> Any:
        await self.may_open.wait()
        if self.refusals:
            raise self.refusals.pop()
        self.opened.append(Opened())
        return self.opened[-1]

    async def gives(self, *tps: TP) -> None:
        await self.owned.on_assigned(None, set(tps))
        for tp in tps:
            self.owned.begin(tp)

    async def takes(self, *tps: TP) -> None:
        await self.owned.on_revoked(None, set(tps))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def played(scenario: Callable[[Group], Awaitable[None]]) -> Group:
    async def playing() -> Group:
        group = Group()
        await scenario(group)
        await group.owned.close(1.0)
        return group

    return asyncio.run(playing())


def test_an_assigned_partition_is_opened_and_read_from_its_store() -> None:
    async def scenario(group: Group) -> None:
        await group.gives(PLACE)
        await until(lambda: group.consumer.started)
        assert group.consumer.started == [(PLACE, 12)]
        assert group.owned.committable(PLACE) == 9
        async with group.owned.step(PLACE) as opened:
            assert opened is group.opened[0]

    assert played(scenario).opened[0].ended == ["flushed within 1", "closed"]


def test_a_revoked_partition_is_told_closed_and_takes_no_more_steps() -> None:
    async def scenario(group: Group) -> None:
        await group.gives(PLACE)
        await until(lambda: group.opened)
        await group.takes(PLACE)
        assert group.opened[0].closing.is_set()
        assert group.opened[0].ended == [f"flushed within {ownership.FLUSH_S:g}", "closed"]
        async with group.owned.step(PLACE) as opened:
            assert opened is None
        assert not group.owned.holds(PLACE.partition)

    played(scenario)


def test_a_revocation_calls_an_opening_off() -> None:
    async def scenario(group: Group) -> None:
        group.may_open.clear()
        await group.gives(PLACE)
        await asyncio.sleep(0)
        await group.takes(PLACE)
        group.may_open.set()
        await asyncio.sleep(0.02)
        assert group.opened == []

    played(scenario)


def test_a_revocation_waits_for_the_step_under_way() -> None:
    async def scenario(group: Group) -> None:
        await group.gives(PLACE)
        await until(lambda: group.opened)
        async with group.owned.step(PLACE):
            taking = asyncio.create_task(group.takes(PLACE))
            await until(group.opened[0].closing.is_set)
            assert group.opened[0].ended == []
        await taking
        assert group.opened[0].ended[-1] == "closed"

    played(scenario)


def test_brokers_that_do_not_answer_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "RETRY_S", 0.01)

    async def scenario(group: Group) -> None:
        group.refusals = [KafkaConnectionError("away"), TimeoutError("slow")]
        await group.gives(PLACE)
        await until(lambda: group.consumer.started)

    assert played(scenario).failures == []


def test_any_other_error_ends_the_worker() -> None:
    async def scenario(group: Group) -> None:
        group.refusals = [ValueError("broken")]
        await group.gives(PLACE)
        await until(lambda: group.failures)

    assert [str(error) for error in played(scenario).failures] == ["broken"]


def test_a_fenced_partition_is_opened_again_where_the_group_still_says_that_it_is_ours() -> None:
    async def scenario(group: Group) -> None:
        await group.gives(PLACE)
        await until(lambda: group.opened)
        group.opened[0].fenced.set()
        await until(lambda: len(group.opened) == 2)
        assert group.opened[0].ended == ["flushed within 0", "closed"]

    assert played(scenario).failures == []


def test_a_fenced_partition_that_the_group_has_given_away_is_not_opened_again() -> None:
    async def scenario(group: Group) -> None:
        await group.gives(PLACE)
        await until(lambda: group.opened)
        group.opened[0].fenced.set()
        await until(lambda: "closed" in group.opened[0].ended)
        await group.owned.on_assigned(None, set())
        await asyncio.sleep(3 * REOPEN_S)
        assert len(group.opened) == 1

    played(scenario)


def test_a_partition_that_comes_back_while_it_is_closed_is_opened_after_that() -> None:
    async def scenario(group: Group) -> None:
        await group.gives(PLACE)
        await until(lambda: group.opened)
        async with group.owned.step(PLACE):
            taking = asyncio.create_task(group.takes(PLACE))
            await until(group.opened[0].closing.is_set)
            await group.owned.on_assigned(None, {PLACE})
            group.owned.begin(PLACE)
            await asyncio.sleep(0.02)
            assert len(group.opened) == 1
        await taking
        await until(lambda: len(group.opened) == 2)
        assert group.opened[0].ended[-1] == "closed"

    played(scenario)


def test_a_router_that_stands_still_with_events_before_it_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LAG_S", 0.005)

    async def scenario(group: Group) -> None:
        await group.gives(TP("routed", 0))
        await until(lambda: group.opened)
        telling = asyncio.create_task(group.owned.tell_lag())
        await asyncio.sleep(0.02)
        assert group.health.live() == ()
        group.now = 61.0
        group.health.beat()
        await until(group.health.live)
        assert group.health.live() == (
            "agent router of routed/0 has died: 8 events wait, and nothing has moved for 61 s",
        )
        group.opened[0].next_offset = 20
        await until(lambda: not group.health.live())
        telling.cancel()

    played(scenario)
