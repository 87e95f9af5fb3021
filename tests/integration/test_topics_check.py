"""Topics on a real broker: made, checked, and every problem named."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from configs.settings import KafkaSettings, StreamSettings
from streams.kafka.connection import Connection
from streams.kafka.exceptions import TopicError
from streams.kafka.topics import FoundTopic, ensure_topics, specs_of
from tests.kafka_broker import create_topic, delete_topics, free_topic

Ensure = Callable[..., dict[str, FoundTopic]]


@pytest.fixture
def stream(kafka_bootstrap: str) -> Iterator[StreamSettings]:
    """Names of topics that do not exist; they are removed at the end if they do."""
    name = free_topic("topics")
    names = {kind: f"{name}-{kind}" for kind in ("changelog", "predictions", "dead_letters", "events_by_user")}
    yield StreamSettings.model_validate({"topic": name, "topics": {**names, "partitions": 3}})
    delete_topics(kafka_bootstrap, name, *names.values())


@pytest.fixture
def ensure(kafka_bootstrap: str) -> Ensure:
    connection = Connection.of(KafkaSettings(bootstrap=tuple(kafka_bootstrap.split(","))))

    def ensured(stream: StreamSettings, **options: Any) -> dict[str, FoundTopic]:
        chosen = {"create": True, "replication": 1, **options}
        return asyncio.run(asyncio.wait_for(ensure_topics(connection, specs_of(stream), **chosen), 60))

    return ensured


def test_missing_topics_are_made_and_found(stream: StreamSettings, ensure: Ensure) -> None:
    made = ensure(stream)
    topics = stream.topics
    assert {name: topic.partitions for name, topic in made.items()} == dict.fromkeys(
        (stream.topic, topics.changelog, topics.predictions, topics.dead_letters), 3
    )
    assert made[topics.changelog].cleanup == {"compact"}
    assert made[topics.changelog].delete_retention_ms == 86_400_000
    assert made[topics.dead_letters].max_message_bytes == 1_048_588
    assert made[stream.topic].cleanup == {"delete"}
    assert ensure(stream, create=False) == made


def test_the_changelog_is_made_like_the_source(stream: StreamSettings, ensure: Ensure, kafka_bootstrap: str) -> None:
    create_topic(kafka_bootstrap, stream.topic, partitions=5, max_message_bytes=2_000_000)
    made = ensure(stream)
    assert made[stream.topics.changelog].partitions == 5
    assert made[stream.topics.dead_letters].max_message_bytes == 2_065_536


def test_workers_that_make_them_at_once(stream: StreamSettings, kafka_bootstrap: str) -> None:
    connection = Connection.of(KafkaSettings(bootstrap=tuple(kafka_bootstrap.split(","))))

    async def workers() -> list[dict[str, FoundTopic]]:
        asked = (ensure_topics(connection, specs_of(stream), create=True, replication=1) for _ in range(4))
        return await asyncio.gather(*asked)

    first, *others = asyncio.run(asyncio.wait_for(workers(), 60))
    assert len(first) == 4
    assert others == [first] * 3


def test_missing_topics_are_an_error_that_prints_the_commands(
    stream: StreamSettings, ensure: Ensure, kafka_bootstrap: str
) -> None:
    with pytest.raises(TopicError) as caught:
        ensure(stream, create=False)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[1] == (
        f"topic {stream.topics.changelog} does not exist; make it with: kafka-topics.sh --bootstrap-server "
        f"{kafka_bootstrap} --create --topic {stream.topics.changelog} --partitions 3 --replication-factor 1 "
        "--config cleanup.policy=compact"
    )
    with pytest.raises(TopicError):  # asking did not make them
        ensure(stream, create=False)


def test_every_problem_is_named_and_nothing_is_made(
    stream: StreamSettings, ensure: Ensure, kafka_bootstrap: str
) -> None:
    create_topic(kafka_bootstrap, stream.topic, partitions=2, cleanup_policy="compact")
    create_topic(kafka_bootstrap, stream.topics.changelog, partitions=3, min_insync_replicas=2)
    with pytest.raises(TopicError) as caught:
        ensure(stream)
    lines = str(caught.value).splitlines()
    assert [line.split(";")[0] for line in lines] == [
        f"topic {stream.topic} (stream.topic) has cleanup.policy=compact: all but the latest record of a key are "
        "deleted",
        f"topic {stream.topics.changelog} (stream.topics.changelog) has 3 partitions, but {stream.topic} has 2",
        f"topic {stream.topics.changelog} (stream.topics.changelog) has cleanup.policy=delete: users' rows are deleted "
        "with time",
        f"topic {stream.topics.changelog} has 1 copies of a partition, but min.insync.replicas=2: no write can be "
        "acknowledged",
    ]
    with pytest.raises(TopicError, match=f"{stream.topics.dead_letters} does not exist"):
        ensure(StreamSettings.model_validate({**stream.model_dump(), "topic": f"{stream.topic}-other"}), create=False)


def test_what_the_broker_refuses_is_said_with_the_command(stream: StreamSettings, ensure: Ensure) -> None:
    with pytest.raises(TopicError) as caught:
        ensure(stream, replication=30)
    first = str(caught.value).splitlines()[0]
    assert "cannot be made: " in first
    assert "the command was: kafka-topics.sh" in first
    assert "--replication-factor 30" in first


def test_a_name_that_no_topic_can_have(stream: StreamSettings, ensure: Ensure) -> None:
    with pytest.raises(TopicError, match="topic no name cannot be made: "):
        ensure(StreamSettings.model_validate({**stream.model_dump(), "topic": "no name"}))
