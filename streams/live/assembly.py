"""Puts a worker's parts together: one role for each topic it consumes, and what they share."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

from aiokafka import AIOKafkaProducer

from configs.settings import Settings, StreamSettings
from learner.serving import ServingModel
from learner.user_state import RowLayout
from state.outbox import CommitLog
from state.reading.model_view import write_model_view
from state.store import UserStore
from streams.decoding.decoded import Decoder
from streams.decoding.decoder import decoder_of
from streams.kafka.connection import Connection
from streams.kafka.record_batch import warm_up
from streams.kafka.topics import FoundTopic
from streams.live.adaptation import AdaptationAgent
from streams.live.dead_letters import DeadLetters
from streams.live.exceptions import WorkerError
from streams.live.intake import Apply
from streams.live.opening import Opener
from streams.live.ownership import Open, Ownership
from streams.live.recovery import Recovery
from streams.live.router import GroupOffset, Router, RouterOpener
from streams.live.standby import Standby
from streams.live.topic_reader import TopicReader
from streams.live.watch import Watch
from streams.processor import Processor

TRANSACTION_TIMEOUT_MS = 600_000
"""Then the brokers abort an open transaction. Long, since the next owner aborts it at once anyway, and an outage of the
brokers would else look like another owner"""


class Role(NamedTuple):
    """What is done with a topic's partitions."""

    open: Open
    apply: Apply


@dataclass(frozen=True, slots=True)
class Threads:
    """Where the work is done that would hold up the loop."""

    adapting: Executor
    """One thread: decoding, and the processor's"""
    restoring: Executor


def adapted_topic(stream: StreamSettings) -> str:
    """The topic whose events are applied: the source itself, where it is keyed by user."""
    return stream.topic if stream.keyed_by_user else stream.topics.events_by_user


def worker_name(settings: Settings) -> str:
    """Which worker this is, for people."""
    return settings.worker.instance or f"{socket.gethostname()}:{os.getpid()}"


class Assembly:
    """The parts, in the order in which they can be made: ``warm_up``, ``roles``, ``standby``."""

    def __init__(
        self, settings: Settings, connection: Connection, model: ServingModel, watch: Watch, threads: Threads
    ) -> None:
        if settings.state.directory is None:
            raise WorkerError("state.directory is not set: name where this worker keeps its users' rows (--state)")
        self._directory = settings.state.directory
        self._settings = settings
        self._stream = settings.stream
        self._connection = connection
        self._model = model
        self._watch = watch
        self._threads = threads
        self._opener: Opener
        self._recovery: Recovery

    def warm_up(self) -> None:
        """Compiles all that events need, or loads it from the cache on disk. For the adapting thread."""
        state = self._settings.state
        self._processor = Processor(self._model, _no_store, state, log=self._outbox_of)
        self._decoder = self._new_decoder()
        warm_up()
        write_model_view(self._directory, self._model, self._processor.layout, state.expire_after_days)

    def roles(
        self, topics: Mapping[str, FoundTopic], letters: DeadLetters, group_offset: GroupOffset
    ) -> dict[str, Role]:
        """By topic; the one whose events are adapted is the first."""
        stream, threads = self._stream, self._threads
        adapted, changelog = topics[adapted_topic(stream)], topics[stream.topics.changelog]
        self._recovery = Recovery(
            self._directory, self._settings.state, self._processor.layout, self._reader(changelog.name),
            changelog.delete_retention_ms, asyncio.get_running_loop(),
        )  # fmt: skip
        events_have_ids = self._settings.data.events.event_id is not None
        self._opener = Opener(
            stream, self._recovery, self._reader(adapted.name), self._new_decoder if events_have_ids else None,
            self._processor, self._new_producer, self._watch, threads.adapting, threads.restoring,
            poison_share=self._settings.worker.poison_share,
        )  # fmt: skip
        agent = AdaptationAgent(
            self._processor, self._decoder.decode, letters, self._watch, threads.adapting,
            tell_predictions=stream.topics.predictions is not None,
        )  # fmt: skip
        roles = {adapted.name: Role(self._opener.open, agent.apply)}
        if not stream.keyed_by_user:
            router = Router(
                adapted.name, adapted.partitions, stream.group, self._decoder.decode, letters, self._watch,
                threads.adapting,
            )  # fmt: skip
            opener = RouterOpener(
                stream, self._new_producer, self._reader(stream.topic), group_offset, self._settings.worker.poison_share
            )
            roles[stream.topic] = Role(opener.open, router.apply)
        return roles

    def standby(self, changelog: FoundTopic, owned: Ownership) -> Standby:
        """Keeps copies of what this worker does not own."""
        copies = Standby(
            self._recovery, self._reader(changelog.name), changelog.partitions, owned.holds, self._watch,
            self._threads.restoring,
        )  # fmt: skip
        self._opener.release_copy = copies.release
        return copies

    def _reader(self, topic: str) -> TopicReader:
        return TopicReader(topic, self._connection.aiokafka())

    def _outbox_of(self, partition: int, store: UserStore) -> CommitLog:
        return self._opener.outbox_of(partition, store)

    def _new_decoder(self) -> Decoder:
        return decoder_of(self._settings.data.events, self._stream)

    def _new_producer(self, transactional_id: str) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            **self._connection.aiokafka(), transactional_id=transactional_id, acks="all",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        )  # fmt: skip


def _no_store(partition: int, layout: RowLayout) -> UserStore:
    raise RuntimeError(f"partition {partition} is not open: an opener hands stores in")
