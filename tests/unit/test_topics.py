"""What is wrong with topics, and what would be made: decided without a broker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from configs.settings import KafkaSettings, StreamSettings
from streams.kafka.connection import Connection
from streams.kafka.topics import FoundTopic, TopicSpec, missing, problems, specs_of, where_of

WHERE = "--bootstrap-server broker:9092"


def settings(*, keyed_by_user: bool = True, **topics: Any) -> StreamSettings:
    return StreamSettings.model_validate(
        {"topic": "events", "keyed_by_user": keyed_by_user, "topics": {"partitions": 6, **topics}}
    )


def found(name: str, partitions: int = 4, **different: Any) -> FoundTopic:
    topic = FoundTopic(
        name, partitions, replication=3, cleanup=frozenset({"delete"}), delete_retention_ms=86_400_000,
        max_message_bytes=1_048_588, min_insync=2,
    )  # fmt: skip
    return replace(topic, **different)


def changelog(name: str = "user-state", partitions: int = 4, **different: Any) -> FoundTopic:
    return found(name, partitions, **{"cleanup": frozenset({"compact"}), **different})


def wrong(specs: list[TopicSpec], *topics: FoundTopic) -> list[str]:
    return [str(problem) for problem in problems({topic.name: topic for topic in topics}, specs, WHERE)]


def test_topics_that_are_right_have_no_problem() -> None:
    specs = specs_of(settings(predictions="predictions"))
    there = (found("events"), changelog(), found("predictions", 8), found("dead-letters", 1))
    assert wrong(specs, *there) == []
    assert missing({topic.name: topic for topic in there}, specs, replication=None, brokers=3) == []


def test_what_does_not_exist_has_no_problem_yet() -> None:
    assert wrong(specs_of(settings())) == []


def test_a_changelog_with_fewer_partitions() -> None:
    assert wrong(specs_of(settings()), found("events", 4), changelog(partitions=3)) == [
        "user-state (stream.topics.changelog) has 3 partitions, but events has 4; mend it with: kafka-topics.sh "
        "--bootstrap-server broker:9092 --alter --topic user-state --partitions 4 (if events was given partitions "
        "since, users whose partition changed start anew)"
    ]


def test_a_changelog_with_more_partitions() -> None:
    assert wrong(specs_of(settings()), found("events", 4), changelog(partitions=5)) == [
        "user-state (stream.topics.changelog) has 5 partitions, but events has 4; a topic cannot shrink: set "
        "stream.topics.changelog to a new name, and its users start anew"
    ]


def test_the_changelog_follows_the_topic_that_is_consumed() -> None:
    specs = specs_of(settings(keyed_by_user=False))
    there = (found("events", 2), found("interactions-by-user", 6), changelog(partitions=6))
    assert wrong(specs, *there) == []
    assert "but interactions-by-user has 6" in wrong(specs, *there[:2], changelog(partitions=2))[0]


def test_predictions_may_have_more_partitions_and_not_fewer() -> None:
    specs = specs_of(settings(predictions="told"))
    assert wrong(specs, found("events", 4), found("told", 9)) == []
    assert wrong(specs, found("events", 4), found("told", 3)) == [
        "told (stream.topics.predictions) has 3 partitions, but events has 4; mend it with: kafka-topics.sh "
        "--bootstrap-server broker:9092 --alter --topic told --partitions 4"
    ]


@pytest.mark.parametrize("policy", ["delete", "compact,delete"])
def test_a_changelog_that_is_deleted_with_time(policy: str) -> None:
    assert wrong(specs_of(settings()), changelog(cleanup=frozenset(policy.split(",")))) == [
        f"user-state (stream.topics.changelog) has cleanup.policy={policy}: users' rows are deleted with time; mend it "
        "with: kafka-configs.sh --bootstrap-server broker:9092 --alter --entity-type topics --entity-name user-state "
        "--add-config cleanup.policy=compact"
    ]


@pytest.mark.parametrize("policy", ["compact", "compact,delete"])
@pytest.mark.parametrize("name", ["events", "dead-letters", "told", "interactions-by-user"])
def test_a_topic_of_events_that_is_compacted(policy: str, name: str) -> None:
    specs = specs_of(settings(keyed_by_user=False, predictions="told"))
    (problem,) = wrong(specs, found(name, cleanup=frozenset(policy.split(","))))
    assert f"has cleanup.policy={policy}: all but the latest record of a key are deleted" in problem
    assert problem.endswith(f"--entity-name {name} --add-config cleanup.policy=delete")


def test_a_source_that_keeps_everything_for_ever_is_fine() -> None:
    assert wrong(specs_of(settings()), found("events", cleanup=frozenset())) == []


def test_fewer_copies_than_must_be_in_sync() -> None:
    assert wrong(specs_of(settings()), changelog(replication=1, min_insync=2)) == [
        "user-state has 1 copies of a partition, but min.insync.replicas=2: no write can be acknowledged; add copies "
        "with kafka-reassign-partitions.sh, or: kafka-configs.sh --bootstrap-server broker:9092 --alter --entity-type "
        "topics --entity-name user-state --add-config min.insync.replicas=1"
    ]


def test_two_settings_with_one_topic() -> None:
    assert wrong(specs_of(settings(dead_letters="events"))) == [
        "events is both stream.topic and stream.topics.dead_letters; give them different names"
    ]


def test_every_problem_is_listed() -> None:
    there = (found("events", 4, cleanup=frozenset({"compact"})), found("user-state", 3, replication=1))
    assert len(wrong(specs_of(settings()), *there)) == 4


def test_all_that_is_missing_is_made() -> None:
    specs = specs_of(settings(keyed_by_user=False, predictions="told"))
    made = missing({}, specs, replication=None, brokers=5)
    assert [(plan.name, plan.partitions, plan.replication, dict(plan.settings)) for plan in made] == [
        ("events", 6, 3, {"cleanup.policy": "delete", "min.insync.replicas": "2"}),
        ("interactions-by-user", 6, 3, {"cleanup.policy": "delete", "min.insync.replicas": "2"}),
        ("user-state", 6, 3, {"cleanup.policy": "compact", "min.insync.replicas": "2"}),
        ("told", 6, 3, {"cleanup.policy": "delete", "min.insync.replicas": "2"}),
        ("dead-letters", 6, 3, {"cleanup.policy": "delete", "min.insync.replicas": "2"}),
    ]


def test_what_is_made_follows_the_source_that_is_there() -> None:
    source = found("events", 12, max_message_bytes=5_000_000)
    made = {plan.name: plan for plan in missing({"events": source}, specs_of(settings()), replication=None, brokers=1)}
    assert (made["user-state"].partitions, made["user-state"].replication) == (12, 1)
    assert made["user-state"].settings == {"cleanup.policy": "compact"}
    assert made["dead-letters"].partitions == 6
    assert made["dead-letters"].settings == {"cleanup.policy": "delete", "max.message.bytes": "5065536"}


@pytest.mark.parametrize(
    ("asked", "brokers", "copies"), [(None, 1, 1), (None, 2, 2), (None, 9, 3), (1, 3, 1), (5, 9, 5)]
)
def test_copies(asked: int | None, brokers: int, copies: int) -> None:
    (plan, *_) = missing({}, specs_of(settings()), replication=asked, brokers=brokers)
    assert plan.replication == copies


def test_the_command_that_makes_a_topic() -> None:
    plan = missing({}, specs_of(settings(changelog="state of 'users'")), replication=3, brokers=3)[1]
    assert plan.command(WHERE) == (
        "kafka-topics.sh --bootstrap-server broker:9092 --create --topic 'state of '\"'\"'users'\"'\"'' --partitions 6 "
        "--replication-factor 3 --config cleanup.policy=compact --config min.insync.replicas=2"
    )


def test_where_a_login_is_needed() -> None:
    secured = {"bootstrap": "a:1,b:2", "security": {"protocol": "ssl"}}
    assert where_of(Connection.of(KafkaSettings.model_validate(secured))) == (
        "--bootstrap-server a:1,b:2 --command-config client.properties"
    )
