"""The topics beside the source: whether they are what the stream needs, and making those that are missing.

``problems`` and ``wanted`` decide, from what was found; ``ensure_topics`` asks the brokers, makes, and asks again.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from configs.settings import StreamSettings
from streams.kafka.connection import Connection
from streams.kafka.exceptions import BrokerUnreachable, TopicError

USUAL_REPLICATION = 3
"""Two brokers may then be lost without losing what was acknowledged; made so where there are as many brokers."""
ROOM_FOR_HEADERS = 65_536
"""Bytes by which a dead letter may be larger than the record that it holds"""
READY_S = 30.0
"""How long a new topic may take until each partition has a leader"""
ASK_AGAIN_S = 0.1
READ_SETTINGS = ("cleanup.policy", "delete.retention.ms", "max.message.bytes", "min.insync.replicas")


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """What a topic must be like."""

    name: str
    setting: str
    """The setting that names it, for messages"""
    compacted: bool = False
    """True: only the latest record of a key is kept, for ever. False: every record is kept until it is old."""
    as_many_as: str | None = None
    """The topic whose number of partitions it must have"""
    or_more: bool = False
    """More than ``as_many_as`` are fine too"""
    partitions: int = 1
    """How many it is made with, where no other topic decides it"""
    larger_than: str | None = None
    """It is made so that the largest records of that topic fit, with error headers"""


@dataclass(frozen=True, slots=True)
class FoundTopic:
    """What a topic is like."""

    name: str
    partitions: int
    replication: int
    """Of the partition that has the fewest copies"""
    cleanup: frozenset[str]
    delete_retention_ms: int
    """How long a tombstone can be read after it was written: a restore from an older position must begin anew"""
    max_message_bytes: int
    min_insync: int


@dataclass(frozen=True, slots=True)
class NewTopicPlan:
    """A topic to be made."""

    name: str
    partitions: int
    replication: int
    settings: Mapping[str, str] = field(default_factory=dict)

    def command(self, where: str) -> str:
        """The command that makes it; ``where`` as ``where_of`` gives it."""
        text = (
            f"kafka-topics.sh {where} --create --topic {shlex.quote(self.name)} --partitions {self.partitions} "
            f"--replication-factor {self.replication}"
        )
        return text + "".join(f" --config {name}={value}" for name, value in self.settings.items())


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that must be mended before the stream may run."""

    topic: str
    what: str
    fix: str
    """A command, or what to do where no command can mend it"""

    def __str__(self) -> str:
        return f"{self.topic} {self.what}; {self.fix}"


def specs_of(settings: StreamSettings) -> list[TopicSpec]:
    """The source, and every topic that is made of it. Each stands behind those that decide its partitions."""
    topics = settings.topics
    consumed = settings.topic if settings.keyed_by_user else topics.events_by_user
    made = topics.partitions
    specs = [TopicSpec(settings.topic, "stream.topic", partitions=made)]
    if not settings.keyed_by_user:
        specs.append(TopicSpec(consumed, "stream.topics.events_by_user", partitions=made, larger_than=settings.topic))
    specs.append(TopicSpec(topics.changelog, "stream.topics.changelog", compacted=True, as_many_as=consumed))
    if topics.predictions is not None:
        specs.append(TopicSpec(topics.predictions, "stream.topics.predictions", as_many_as=consumed, or_more=True))
    specs.append(
        TopicSpec(topics.dead_letters, "stream.topics.dead_letters", partitions=made, larger_than=settings.topic)
    )
    return specs


def where_of(connection: Connection) -> str:
    """The options by which Kafka's own commands find the same brokers."""
    login = "" if connection.protocol == "PLAINTEXT" else " --command-config client.properties"
    return f"--bootstrap-server {','.join(connection.bootstrap)}{login}"


def missing(
    found: Mapping[str, FoundTopic], specs: Sequence[TopicSpec], *, replication: int | None, brokers: int
) -> list[NewTopicPlan]:
    """The topics that are not there, as they should be made."""
    copies = replication or min(USUAL_REPLICATION, brokers)
    plans: dict[str, NewTopicPlan] = {}
    for spec in specs:
        if spec.name in found:
            continue
        like = found.get(spec.as_many_as or "") or plans.get(spec.as_many_as or "")
        settings = {"cleanup.policy": "compact" if spec.compacted else "delete"}
        if copies >= USUAL_REPLICATION:
            settings["min.insync.replicas"] = "2"  # what is acknowledged then is on two brokers at least
        if larger := found.get(spec.larger_than or ""):
            settings["max.message.bytes"] = str(larger.max_message_bytes + ROOM_FOR_HEADERS)
        plans[spec.name] = NewTopicPlan(spec.name, like.partitions if like else spec.partitions, copies, settings)
    return list(plans.values())


def problems(found: Mapping[str, FoundTopic], specs: Sequence[TopicSpec], where: str) -> list[Problem]:
    """What is wrong with the topics that are there, each with what mends it; nothing about those that are not."""
    wrong = [Problem(name, what, fix) for name, what, fix in _named_twice(specs)]
    for spec in specs:
        if topic := found.get(spec.name):
            wrong += _partition_problems(topic, spec, found.get(spec.as_many_as or ""), where)
            wrong += _cleanup_problems(topic, spec, where)
            wrong += _replication_problems(topic, where)
    return wrong


def _named_twice(specs: Sequence[TopicSpec]) -> list[tuple[str, str, str]]:
    first: dict[str, str] = {}
    twice = []
    for spec in specs:
        if spec.name in first:
            twice.append((spec.name, f"is both {first[spec.name]} and {spec.setting}", "give them different names"))
        first.setdefault(spec.name, spec.setting)
    return twice


def _partition_problems(topic: FoundTopic, spec: TopicSpec, like: FoundTopic | None, where: str) -> list[Problem]:
    if like is None or topic.partitions == like.partitions or (spec.or_more and topic.partitions > like.partitions):
        return []
    what = f"({spec.setting}) has {topic.partitions} partitions, but {like.name} has {like.partitions}"
    if topic.partitions > like.partitions:
        fix = f"a topic cannot shrink: set {spec.setting} to a new name, and its users start anew"
    else:
        name = shlex.quote(topic.name)
        fix = f"mend it with: kafka-topics.sh {where} --alter --topic {name} --partitions {like.partitions}"
        if spec.compacted:
            fix += f" (if {like.name} was given partitions since, users whose partition changed start anew)"
    return [Problem(topic.name, what, fix)]


def _cleanup_problems(topic: FoundTopic, spec: TopicSpec, where: str) -> list[Problem]:
    wanted = "compact" if spec.compacted else "delete"
    if topic.cleanup == {wanted} or (not spec.compacted and "compact" not in topic.cleanup):
        return []
    loss = "users' rows are deleted with time" if spec.compacted else "all but the latest record of a key are deleted"
    what = f"({spec.setting}) has cleanup.policy={','.join(sorted(topic.cleanup))}: {loss}"
    return [Problem(topic.name, what, f"mend it with: {_alter(topic.name, 'cleanup.policy', wanted, where)}")]


def _replication_problems(topic: FoundTopic, where: str) -> list[Problem]:
    if topic.replication >= topic.min_insync:
        return []
    what = (
        f"has {topic.replication} copies of a partition, but min.insync.replicas={topic.min_insync}: no write can be "
        "acknowledged"
    )
    fix = _alter(topic.name, "min.insync.replicas", str(topic.replication), where)
    return [Problem(topic.name, what, f"add copies with kafka-reassign-partitions.sh, or: {fix}")]


def _alter(topic: str, name: str, value: str, where: str) -> str:
    return (
        f"kafka-configs.sh {where} --alter --entity-type topics --entity-name {shlex.quote(topic)} "
        f"--add-config {name}={value}"
    )


async def ensure_topics(
    connection: Connection, specs: Sequence[TopicSpec], *, create: bool, replication: int | None
) -> dict[str, FoundTopic]:
    """Every topic of ``specs`` as it is at the end; missing ones are made if ``create``. Others may do so too.

    Args:
        connection: how to reach the brokers.
        specs: what is needed; a topic stands behind the one that it is ``as_many_as``.
        create: make missing topics; else they are an error.
        replication: copies of what is made; None: three, or as many as there are brokers.

    Raises:
        TopicError: with every problem, and for each the command that mends it.
        BrokerUnreachable: the brokers did not answer in between.
    """
    where = where_of(connection)
    async with _administration(connection) as admin:
        found = await _found(admin, [spec.name for spec in specs], connection)
        brokers = len((await admin.describe_cluster())["brokers"])
        plans = missing(found, specs, replication=replication, brokers=brokers)
        wrong = problems(found, specs, where)
        if not create:
            unseen = f", or user {connection.username} may not see it" if connection.username else ""
            what = f"does not exist{unseen}"
            wrong += [Problem(plan.name, what, f"make it with: {plan.command(where)}") for plan in plans]
        _raise(wrong)
        if plans:
            await _make(admin, plans, connection, where)
            found = await _until_found(admin, [spec.name for spec in specs], connection)
            _raise(problems(found, specs, where))
        return found


def _raise(wrong: Sequence[Problem]) -> None:
    if wrong:
        raise TopicError("\n".join(f"topic {problem}" for problem in wrong))


@asynccontextmanager
async def _administration(connection: Connection) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**connection.aiokafka())
    try:
        await admin.start()
        yield admin
    except (errors.KafkaConnectionError, errors.NodeNotReadyError, errors.RequestTimedOutError, TimeoutError) as error:
        raise BrokerUnreachable(
            f"{', '.join(connection.bootstrap)} does not answer any more ({error}); try again"
        ) from error
    finally:
        await admin.close()


async def _found(admin: AIOKafkaAdminClient, names: Sequence[str], connection: Connection) -> dict[str, FoundTopic]:
    """Those of ``names`` that exist. Asks about all topics: asking for one that does not exist may make it."""
    described = {topic["topic"]: topic for topic in await admin.describe_topics() if topic["topic"] in names}
    for name, topic in described.items():
        if topic["error_code"] == errors.TopicAuthorizationFailedError.errno:
            raise TopicError(_without_right(name, "Describe", connection))
    there = {name: topic for name, topic in described.items() if not topic["error_code"] and topic["partitions"]}
    if not there:
        return {}
    answers = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in there])
    found = {}
    for code, message, _, name, entries in (resource for answer in answers for resource in answer.resources):
        if code == errors.UnknownTopicOrPartitionError.errno:
            continue  # deleted in between
        if code == errors.TopicAuthorizationFailedError.errno:
            raise TopicError(_without_right(name, "DescribeConfigs", connection))
        if code:
            raise TopicError(f"topic {name}: its settings cannot be read: {message or errors.for_code(code).__name__}")
        found[name] = _as_found(name, there[name], {entry[0]: entry[1] for entry in entries})
    return found


def _as_found(name: str, topic: Mapping[str, Any], settings: Mapping[str, str]) -> FoundTopic:
    return FoundTopic(
        name=name,
        partitions=len(topic["partitions"]),
        replication=min(len(partition["replicas"]) for partition in topic["partitions"]),
        cleanup=frozenset(part.strip() for part in settings["cleanup.policy"].split(",") if part.strip()),
        delete_retention_ms=int(settings["delete.retention.ms"]),
        max_message_bytes=int(settings["max.message.bytes"]),
        min_insync=int(settings["min.insync.replicas"]),
    )


async def _make(admin: AIOKafkaAdminClient, plans: Sequence[NewTopicPlan], connection: Connection, where: str) -> None:
    new = [NewTopic(plan.name, plan.partitions, plan.replication, topic_configs=dict(plan.settings)) for plan in plans]
    answer = await admin.create_topics(new)
    commands = {plan.name: plan for plan in plans}
    wrong = []
    for name, code, *rest in answer.topic_errors:
        if code in (0, errors.TopicAlreadyExistsError.errno):
            continue  # another worker made it: it is looked at as all others are
        if code in (errors.TopicAuthorizationFailedError.errno, errors.ClusterAuthorizationFailedError.errno):
            wrong.append(_without_right(name, "Create", connection))
            continue
        reason = (rest[0] if rest else None) or errors.for_code(code).__name__
        wrong.append(f"topic {name} cannot be made: {reason}; the command was: {commands[name].command(where)}")
    if wrong:
        raise TopicError("\n".join(wrong))


async def _until_found(
    admin: AIOKafkaAdminClient, names: Sequence[str], connection: Connection
) -> dict[str, FoundTopic]:
    """All of ``names``, each partition with a leader: a new topic is not known to all brokers at once."""
    deadline = time.monotonic() + READY_S
    while True:
        found = await _found(admin, names, connection)
        led = {t["topic"] for t in await admin.describe_topics() if all(p["leader"] >= 0 for p in t["partitions"])}
        if late := [name for name in names if name not in found or name not in led]:
            if time.monotonic() > deadline:
                raise TopicError(
                    f"topics {', '.join(late)} exist, but have no leader after {READY_S:g} s, or may not be seen; see "
                    "the brokers' logs, and grant Describe on them with kafka-acls.sh"
                )
            await asyncio.sleep(ASK_AGAIN_S)
            continue
        return found


def _without_right(topic: str, operation: str, connection: Connection) -> str:
    user = connection.username or "NAME"
    return (
        f"topic {topic}: no right to {operation}; grant it with: kafka-acls.sh {where_of(connection)} --add "
        f"--allow-principal User:{shlex.quote(user)} --operation {operation} --topic {shlex.quote(topic)}"
    )
