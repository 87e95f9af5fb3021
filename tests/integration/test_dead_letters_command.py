"""``coldstream dead-letters`` on a real broker: shown, sent back once, and again when asked."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import ProducerFenced
from typer.testing import CliRunner

from configs.exceptions import ColdstreamError
from configs.settings import KafkaSettings
from streams.commands.dead_letters import app
from streams.decoding.decoded import Poison
from streams.kafka.chunk import Chunk
from streams.kafka.connection import Connection
from streams.kafka.exceptions import BrokerUnreachable, LetterError
from streams.live import letter_topic
from streams.live.dead_letters import DeadLetters
from streams.live.letter_topic import Choice, LetterTopic
from streams.rejects import Reason
from tests.kafka_broker import create_topic, delete_topics, free_topic

TIMEOUT_S = 60


@dataclass(frozen=True)
class Record:
    key: bytes | None
    value: bytes | None
    offset: int
    headers: Sequence[tuple[str, bytes | None]] = ()
    timestamp: int = 1_700_000_000_000


SOURCE = (
    Record(b"ada", b"{", 10, [("trace", b"\xff")]),
    Record(None, b'{"user_id": "b\x1b[31m"}', 11),
    Record(b"cy", None, 12),
    Record(b"dora", b"x" * 30_000, 13),
)
POISON = (
    Poison(0, "decode", Reason.MALFORMED_LINE, "DecodeError", "input data was truncated"),
    Poison(1, "schema", Reason.MISSING_FIELD, "MissingField", "no field item_id"),
    Poison(2, "decode", Reason.EMPTY_RECORD, "EmptyRecord", "there is no value"),
)


@dataclass(frozen=True)
class Place:
    """A source topic of four partitions and a topic of dead letters of two, on the broker of the tests."""

    bootstrap: str
    source: str
    dead: str

    @property
    def connection(self) -> Connection:
        return Connection.of(KafkaSettings(bootstrap=tuple(self.bootstrap.split(","))))

    def run(self, line: str) -> tuple[int, Any]:
        """Exit code, and what ``--json`` printed."""
        code, out = self.text(f"{line} --json")
        return code, json.loads(out)

    def text(self, line: str) -> tuple[int, str]:
        """Exit code and output. Raises ColdstreamError, which the program's entry point prints."""
        settings = (f"kafka.bootstrap={self.bootstrap}", f"stream.topics.dead_letters={self.dead}")
        options = [part for setting in settings for part in ("--set", setting)]
        result = CliRunner().invoke(app, [*line.split(), *options])
        if isinstance(result.exception, ColdstreamError):
            raise result.exception
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout

    def send(self, poison: Sequence[Poison] = POISON, *, partition: int = 3, largest: int = 1_000_000) -> None:
        """Sets records of the source aside, as a worker does."""

        async def sent() -> None:
            async with AIOKafkaProducer(**self.connection.aiokafka(), enable_idempotence=True) as producer:
                letters = DeadLetters(producer, self.dead, "w-1", largest=largest)
                await letters.send(Chunk.of_records(self.source, partition, SOURCE, next_offset=14), poison)

        asyncio.run(asyncio.wait_for(sent(), TIMEOUT_S))

    def records(self, topic: str, expected: int) -> list[Any]:
        """What ``topic`` holds once no transaction is open, which must be ``expected`` records; committed ones only."""

        async def read() -> list[Any]:
            options = {"auto_offset_reset": "earliest", "isolation_level": "read_committed"}
            async with AIOKafkaConsumer(topic, **self.connection.aiokafka(), **options) as consumer:
                ends = await self._settled(topic, consumer)
                found: list[Any] = []
                while any([await consumer.position(tp) < end for tp, end in ends.items()]):
                    for records in (await consumer.getmany(timeout_ms=200)).values():
                        found += records
                return found

        found = asyncio.run(asyncio.wait_for(read(), TIMEOUT_S))
        assert len(found) == expected
        return found

    async def _settled(self, topic: str, committed: AIOKafkaConsumer) -> dict[Any, int]:
        """The topic's ends, once no transaction is open: a commit is answered before its markers are written."""
        async with AIOKafkaConsumer(topic, **self.connection.aiokafka()) as everything:
            partitions = everything.assignment()
            while (ends := await committed.end_offsets(partitions)) != await everything.end_offsets(partitions):
                await asyncio.sleep(0.02)
            return ends

    def settle(self) -> None:
        """Waits until no transaction is open in the dead letters' topic."""

        async def settled() -> None:
            options = {"isolation_level": "read_committed"}
            async with AIOKafkaConsumer(self.dead, **self.connection.aiokafka(), **options) as consumer:
                await self._settled(self.dead, consumer)

        asyncio.run(asyncio.wait_for(settled(), TIMEOUT_S))


@pytest.fixture
def place(kafka_bootstrap: str) -> Iterator[Place]:
    made = Place(kafka_bootstrap, free_topic("letters-source"), free_topic("letters-dead"))
    create_topic(kafka_bootstrap, made.source, partitions=4)
    create_topic(kafka_bootstrap, made.dead, partitions=2)
    yield made
    delete_topics(kafka_bootstrap, made.source, made.dead)


def test_an_empty_topic(place: Place) -> None:
    assert place.text("list") == (0, "no dead letters\n")
    assert place.text("replay --all") == (0, "nothing sent\n")


def test_letters_are_shown_and_counted(place: Place) -> None:
    place.send()
    code, shown = place.run("list")
    assert code == 0
    assert shown["topic"] == place.dead
    assert shown["by_reason"] == {"malformed line": 1, "missing field": 1, "empty record": 1}
    first = min(shown["letters"], key=lambda letter: letter["offset"])
    assert first.pop("version")
    assert first.pop("letter").keys() == {"partition", "offset", "failed_ms"}
    assert first == {
        "topic": place.source, "partition": 3, "offset": 10, "timestamp_ms": 1_700_000_000_000, "stage": "decode",
        "reason": "malformed line", "class": "DecodeError", "message": "input data was truncated", "worker": "w-1",
        "key": "ada", "value": "{", "value_bytes": 1, "whole": True, "replays": 0,
    }  # fmt: skip


def test_letters_are_shown_as_text_that_does_nothing_to_a_terminal(place: Place) -> None:
    place.send(POISON[1:2])
    code, out = place.text("list")
    assert code == 0
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].endswith(f"{place.source}/3 offset 11: missing field (schema, MissingField): no field item_id")
    assert lines[1] == '    key None, 21 bytes: {"user_id": "b\\x1b[31m"}'
    assert lines[2] == "1 dead letters: 1 missing field"


def test_the_latest_are_shown_and_all_are_counted(place: Place) -> None:
    for _ in range(3):
        place.send()
    code, shown = place.run("list --limit 4")
    assert (code, len(shown["letters"]), sum(shown["by_reason"].values())) == (0, 4, 9)
    times = [letter["letter"]["failed_ms"] for letter in shown["letters"]]
    assert times == sorted(times)
    assert place.text("list --limit 0")[1].startswith("9 dead letters (the latest 0 are shown): ")


@pytest.mark.parametrize(
    ("chosen", "offsets"),
    [
        (["--reason", "missing field"], [11]),
        (["--reason", "missing field", "--reason", "empty record"], [11, 12]),
        (["--partition", "3"], [10, 11, 12]),
        (["--partition", "2"], []),
        (["--partition", "3", "--offset", "12"], [12]),
        (["--since", "1h"], [10, 11, 12]),
        (["--since", "2200-01-01"], []),
    ],
)
def test_letters_are_chosen(place: Place, chosen: list[str], offsets: list[int]) -> None:
    place.send()
    options = ["list", "--json", *chosen, "-s", f"kafka.bootstrap={place.bootstrap}"]
    result = CliRunner().invoke(app, [*options, "-s", f"stream.topics.dead_letters={place.dead}"])
    assert result.exit_code == 0, result.output
    assert sorted(letter["offset"] for letter in json.loads(result.stdout)["letters"]) == offsets


def test_records_go_back_as_they_came(place: Place) -> None:
    place.send()
    assert place.run("replay --all") == (
        0, {"dry_run": False, "sent": {place.source: 3}, "replayed_before": 0, "not_whole": 0}
    )  # fmt: skip
    back = {record.key: record for record in place.records(place.source, 3)}
    assert (back[b"ada"].value, back[b"ada"].headers) == (b"{", (("trace", b"\xff"), ("coldstream.replays", b"1")))
    assert (back[None].value, back[None].headers) == (SOURCE[1].value, (("coldstream.replays", b"1"),))
    assert (back[b"cy"].value, back[b"cy"].headers) == (None, (("coldstream.replays", b"1"),))


def test_a_key_goes_to_its_own_partition(place: Place) -> None:
    place.send(POISON[:1])

    async def by_key() -> int:
        async with AIOKafkaProducer(**place.connection.aiokafka()) as producer:
            return int((await producer.send_and_wait(place.source, b"good", b"ada")).partition)

    partition = asyncio.run(by_key())
    place.run("replay --all")
    assert [record.partition for record in place.records(place.source, 2)] == [partition] * 2


def test_a_letter_is_replayed_once_unless_again_is_asked_for(place: Place) -> None:
    place.send()
    assert place.run("replay --all")[1]["sent"] == {place.source: 3}
    assert place.run("replay --all") == (
        0, {"dry_run": False, "sent": {}, "replayed_before": 3, "not_whole": 0}
    )  # fmt: skip
    place.send(POISON[:1])
    assert place.run("replay --all")[1] == {
        "dry_run": False, "sent": {place.source: 1}, "replayed_before": 3, "not_whole": 0,
    }  # fmt: skip
    assert place.run("replay --partition 3 --offset 11 --again")[1]["sent"] == {place.source: 1}
    place.records(place.source, 5)
    place.settle()
    assert sum(place.run("list")[1]["by_reason"].values()) == 4  # receipts are no letters


def test_a_dry_run_sends_nothing(place: Place) -> None:
    place.send()
    assert place.text("replay --partition 3 --offset 11 --dry-run") == (0, f"1 would be sent to {place.source}\n")
    place.records(place.source, 0)
    assert place.run("replay --all")[1]["replayed_before"] == 0


def test_records_go_to_another_topic(place: Place) -> None:
    place.send()
    other = create_topic(place.bootstrap, free_topic("letters-other"))
    try:
        assert place.run(f"replay --all --to {other}")[1]["sent"] == {other: 3}
        place.records(other, 3)
        place.records(place.source, 0)
    finally:
        delete_topics(place.bootstrap, other)


def test_a_record_that_fails_again_says_how_often_it_was_replayed(place: Place) -> None:
    place.send(POISON[:1])
    place.run("replay --all")
    (back,) = place.records(place.source, 1)

    async def fail_again() -> None:
        async with AIOKafkaProducer(**place.connection.aiokafka()) as producer:
            chunk = Chunk.of_records(place.source, back.partition, [back], next_offset=back.offset + 1)
            await DeadLetters(producer, place.dead, "w-2").send(chunk, POISON[:1])

    asyncio.run(fail_again())
    place.settle()
    assert sorted(letter["replays"] for letter in place.run("list")[1]["letters"]) == [0, 1]
    assert place.run("replay --all")[1] == {
        "dry_run": False, "sent": {place.source: 1}, "replayed_before": 1, "not_whole": 0,
    }  # fmt: skip
    assert place.records(place.source, 2)[-1].headers[-1] in {
        ("coldstream.replays", b"2"),
        ("coldstream.replays", b"1"),
    }


def test_what_was_cut_is_not_sent_back_and_says_so(place: Place) -> None:
    place.send([Poison(3, "decode", Reason.MALFORMED_LINE, "DecodeError", "no JSON")], largest=10_000)
    (letter,) = place.run("list")[1]["letters"]
    assert (letter["value_bytes"], letter["whole"], len(letter["value"])) == (30_000, False, 200)
    assert place.text("replay --all") == (
        1, "nothing sent\n1 passed over: they were too large to be kept whole; produce them anew\n"
    )  # fmt: skip
    place.records(place.source, 0)


def test_what_is_cut_fills_the_topics_limit_and_is_taken(place: Place) -> None:
    """As a worker sends it: the producer's limit and the letters' are the topic's own."""
    largest = 1_048_588  # Kafka's default
    chunk = Chunk.of_records(place.source, 3, [Record(b"k", b"v" * 3_000_000, 0)], next_offset=1)

    async def sent() -> None:
        options = {**place.connection.aiokafka(), "enable_idempotence": True, "max_request_size": largest}
        async with AIOKafkaProducer(**options) as producer:
            await DeadLetters(producer, place.dead, "w-1", largest=largest).send(chunk, POISON[:1])

    asyncio.run(asyncio.wait_for(sent(), TIMEOUT_S))
    (record,) = place.records(place.dead, 1)
    assert largest - 1_000 < len(record.value) < largest


def test_an_offset_that_was_not_set_aside(place: Place) -> None:
    place.send()
    assert place.text("replay --partition 3 --offset 99") == (1, "nothing sent\n")


def test_more_letters_than_one_transaction_holds(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letter_topic, "LETTERS_AT_ONCE", 2)
    for _ in range(2):
        place.send()
    assert place.run("replay --all")[1]["sent"] == {place.source: 6}
    place.records(place.source, 6)
    assert place.run("replay --all")[1]["replayed_before"] == 6


def test_a_letter_of_a_transaction_that_was_aborted_does_not_exist(place: Place) -> None:
    async def aborted() -> None:
        producer = AIOKafkaProducer(**place.connection.aiokafka(), transactional_id=f"letters-{uuid.uuid4().hex}")
        async with producer:
            letters = DeadLetters(producer, place.dead, "w-1")
            chunk = Chunk.of_records(place.source, 3, SOURCE, next_offset=14)
            await producer.begin_transaction()
            await letters.send(chunk, POISON)
            await producer.abort_transaction()
            async with producer.transaction():
                await letters.send(chunk, POISON[:1])

    asyncio.run(asyncio.wait_for(aborted(), TIMEOUT_S))
    place.settle()
    assert place.run("list")[1]["by_reason"] == {"malformed line": 1}


def test_a_replay_that_is_killed_sent_nothing_and_the_next_one_all(place: Place) -> None:
    """The first one's transaction is open, as a kill leaves it; the second one ends it, and does not wait for it."""
    place.send()

    async def killed_then_again() -> dict[str, int]:
        options = place.connection.aiokafka()
        first = AIOKafkaProducer(**options, transactional_id=f"{place.dead}-replay")
        await first.start()
        try:
            await first.begin_transaction()
            await first.send_and_wait(place.source, b"sent and not committed", b"ada")
            second = await LetterTopic(place.connection, place.dead).replay(Choice())
            with pytest.raises(ProducerFenced):
                await first.commit_transaction()
            return dict(second.sent)
        finally:
            await first.stop()

    assert asyncio.run(asyncio.wait_for(killed_then_again(), TIMEOUT_S)) == {place.source: 3}
    assert b"sent and not committed" not in {record.value for record in place.records(place.source, 3)}


def test_a_topic_that_refuses_a_record_is_named_and_nothing_is_half_done(place: Place) -> None:
    place.send([*POISON, Poison(3, "decode", Reason.MALFORMED_LINE, "DecodeError", "no JSON")])
    other = create_topic(place.bootstrap, free_topic("letters-other"), max_message_bytes=5_000)
    try:
        with pytest.raises(LetterError, match=f"topic {other} refuses a record of its size"):
            place.run(f"replay --all --to {other}")
        place.records(other, 0)
        assert place.run("replay --all")[1] == {
            "dry_run": False, "sent": {place.source: 4}, "replayed_before": 0, "not_whole": 0,
        }  # fmt: skip
    finally:
        delete_topics(place.bootstrap, other)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("replay", "say what to replay: either --all, or --reason"),
        ("replay --all --partition 1", "say what to replay: either --all, or --reason"),
        ("replay --offset 5", "--offset needs --partition"),
        ("list --reason nonsense", "--reason nonsense: no such reason; there are: "),
        ("list --since yesterday", "--since yesterday: write 30m, 6h, 2d, or a time such as"),
        (
            "replay --all --to letters-nowhere",
            "topic letters-nowhere does not exist; name the topic to send to with --to",
        ),
    ],
)
def test_what_cannot_be_done_is_said(place: Place, line: str, message: str) -> None:
    place.send(POISON[:1])
    with pytest.raises(LetterError) as caught:
        place.text(line)
    assert message in str(caught.value)


def test_a_topic_of_letters_that_is_not_there_is_named_and_not_made(place: Place) -> None:
    nowhere = Place(place.bootstrap, place.source, free_topic("letters-nowhere"))
    for _ in range(2):
        with pytest.raises(LetterError, match=f"topic {nowhere.dead} does not exist; nothing was set aside yet"):
            nowhere.text("list")
    with pytest.raises(LetterError, match="does not exist"):
        nowhere.text("replay --all")


def test_no_broker_is_one_line() -> None:
    with pytest.raises(BrokerUnreachable, match=r"no broker answers: 127\.0\.0\.1:1: nothing listens there"):
        Place("127.0.0.1:1", "source", "dead").text("list")
