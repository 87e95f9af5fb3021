"""The Faust application of a worker: its settings from ours, one agent for each batched topic."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import faust
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from faust.types import TP

from configs.settings import Settings
from streams.kafka.connection import Connection
from streams.transport import SCHEME, BatchConsumer, Delivery, RawBatch, Source, register

Take = Callable[[TP, Delivery], Awaitable[None]]
"""Takes what came of a partition. It catches what it can mend; anything else ends the worker."""

BUFFERED_DELIVERIES = 64
"""More than ever wait (``transport.WAITING`` and one poll), or Faust would hold partitions back"""
REBALANCE_S = 30.0
"""How long the group waits for members that let their partitions go"""
HEARTBEATS = 3
"""In a session"""
POLL_INTERVAL_S = 1800.0
"""A worker that takes nothing for so long leaves the group. Its own health says so much earlier"""
FETCH_WAIT_MS = 500
"""How long the brokers hold an empty answer back"""
CHUNKS_A_POLL = 4
"""Of all partitions together: the others' turn is the next poll"""


class WorkerApp(faust.App):
    """Faust's application, and who owns the offsets of its batched topics."""

    source: Source

    @property
    def batches(self) -> BatchConsumer:
        """Its consumer."""
        return cast(BatchConsumer, self.consumer)


def build_app(
    settings: Settings, connection: Connection, source: Source, agents: Mapping[str, Take], scratch: Path
) -> WorkerApp:
    """An application that hands each batched topic's deliveries to its agent. ``scratch``: where Faust keeps files."""
    register()
    stream = settings.stream
    app = WorkerApp(
        stream.group,
        broker=[f"{SCHEME}://{address}" for address in connection.bootstrap],
        broker_credentials=connection.faust_credentials(),
        broker_client_id=connection.client_id,
        broker_session_timeout=settings.kafka.session_timeout_ms / 1000,
        broker_heartbeat_interval=settings.kafka.session_timeout_ms / 1000 / HEARTBEATS,
        broker_request_timeout=max(settings.kafka.request_timeout_ms, settings.kafka.session_timeout_ms) / 1000,
        broker_commit_interval=settings.worker.commit_ms / 1000,
        store="memory://",
        datadir=str(scratch),
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        stream_wait_empty=False,
        stream_buffer_maxsize=BUFFERED_DELIVERIES,
        autodiscover=False,
    )
    app.source = source
    for name, take in agents.items():
        _add_agent(app, name, take)
    return app


def consumer_options(settings: Settings, connection: Connection) -> dict[str, Any]:
    """What the group's consumer is made with: committed records only, and the store has the offsets."""
    session_ms = settings.kafka.session_timeout_ms
    fetch = settings.worker.fetch_kb << 10
    return {
        **connection.aiokafka(),
        "group_id": settings.stream.group,
        "group_instance_id": settings.worker.instance,
        "partition_assignment_strategy": [StickyPartitionAssignor],
        "enable_auto_commit": False,
        "auto_offset_reset": "earliest",
        "isolation_level": "read_committed",
        "session_timeout_ms": session_ms,
        "heartbeat_interval_ms": session_ms // HEARTBEATS,
        "rebalance_timeout_ms": int(REBALANCE_S * 1000),
        "max_poll_interval_ms": int(POLL_INTERVAL_S * 1000),
        "max_poll_records": CHUNKS_A_POLL,
        "max_partition_fetch_bytes": fetch,
        "fetch_max_wait_ms": FETCH_WAIT_MS,
    }


def _add_agent(app: WorkerApp, topic: str, take: Take) -> None:
    async def agent(stream: Any) -> None:
        async for event in stream.events():
            await take(event.message.tp, event.value)

    app.agent(app.topic(topic, schema=RawBatch()), name=f"coldstream-{topic}")(agent)
