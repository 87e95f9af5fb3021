"""Letters as headers and back, what is cut, what sending does when the broker refuses, and who is slowed down."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import pytest
from aiokafka.errors import KafkaTimeoutError, MessageSizeTooLargeError
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from streams.decoding.decoded import Poison
from streams.kafka.chunk import Chunk
from streams.kafka.exceptions import LetterError
from streams.live.dead_letters import LONGEST_DELAY_S, DeadLetters, PoisonWatch
from streams.live.letter import (
    LONGEST_TEXT,
    Cause,
    Headers,
    Letter,
    Outgoing,
    outgoing,
    read_letter,
    read_receipt,
    receipt,
)
from streams.rejects import Reason

CAUSE = Cause(
    topic="events", partition=3, offset=41, timestamp_ms=1_700_000_000_000, stage="schema", reason="missing field",
    error="MissingField", message="no field item_id", version="1.2", worker="w-1",
)  # fmt: skip
LARGEST = 1_000_000


@dataclass
class Record:
    """A record of the dead letters' topic, or of a source."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()
    partition: int = 1
    offset: int = 7
    timestamp: int = 1_700_000_005_000


def posted(key: bytes | None, value: bytes | None, headers: Headers | None = None, **different: Any) -> Letter:
    """The letter as it is read after it was sent."""
    options = {"cause": CAUSE, "largest": LARGEST, **different}
    letter = read_letter(Record(*outgoing(key, value, headers or [], **options)))
    assert letter is not None
    return letter


@pytest.mark.parametrize("key", [None, b"", b"ada", b"\xff\x00"])
@pytest.mark.parametrize("value", [None, b"", b"{", b"\xff" * 1000])
def test_a_letter_is_read_as_it_was_sent(key: bytes | None, value: bytes | None) -> None:
    headers: Headers = [("trace", b"\x00\xff"), ("trace", None), ("", b"")]
    letter = posted(key, value, headers)
    assert letter == Letter(
        partition=1, offset=7, failed_ms=1_700_000_005_000, cause=CAUSE, key=key, value=value, headers=headers,
        value_bytes=None if value is None else len(value), whole=True, replays=0,
    )  # fmt: skip


def test_what_it_looks_like() -> None:
    sent = outgoing(b"k", b"v", [("own", b"1")], CAUSE, LARGEST)
    assert sent == Outgoing(b"k", b"v", [
        ("own", b"1"),
        ("coldstream.error.format", b"1"),
        ("coldstream.error.topic", b"events"),
        ("coldstream.error.partition", b"3"),
        ("coldstream.error.offset", b"41"),
        ("coldstream.error.timestamp", b"1700000000000"),
        ("coldstream.error.stage", b"schema"),
        ("coldstream.error.reason", b"missing field"),
        ("coldstream.error.class", b"MissingField"),
        ("coldstream.error.message", b"no field item_id"),
        ("coldstream.error.version", b"1.2"),
        ("coldstream.error.worker", b"w-1"),
    ])  # fmt: skip


def test_a_record_goes_back_as_it_came_and_counts_up() -> None:
    own: Headers = [("a", b"1"), ("a", b"2")]
    back = posted(b"k", b"v", own).replayed()
    assert back == Outgoing(b"k", b"v", [*own, ("coldstream.replays", b"1")])
    again = posted(*back).replayed()
    assert again == Outgoing(b"k", b"v", [*own, ("coldstream.replays", b"2")])


def test_a_record_without_key_and_value_goes_back_empty() -> None:
    assert posted(None, None).replayed() == Outgoing(None, b"", [("coldstream.replays", b"1")])
    assert posted(b"k", None).replayed().value is None


@pytest.mark.parametrize(
    ("key", "value", "headers", "cut"),
    [
        (b"k", b"v" * 2_000_000, [], {"truncated": b"2000000"}),
        (b"k" * 2_000_000, b"v", [], {"key.truncated": b"2000000"}),
        (b"k", b"v", [("h", b"x" * 2_000_000), ("i", b"")], {"headers.dropped": b"2"}),
        (b"k", b"v", [("small", b""), ("h", b"x" * 2_000_000)], {"headers.dropped": b"1"}),
        (b"k", b"v", [(f"h{n}", b"") for n in range(100_000)], None),
        (b"k" * 900_000, b"v" * 900_000, [("h", b"x" * 200_000)], {"truncated": b"900000", "key.truncated": b"900000"}),
    ],
)
def test_what_does_not_fit_is_cut_and_said(
    key: bytes, value: bytes, headers: Headers, cut: dict[str, bytes] | None
) -> None:
    sent = outgoing(key, value, headers, CAUSE, LARGEST)
    assert _batch_bytes(sent) <= LARGEST
    letter = read_letter(Record(*sent))
    assert letter is not None
    assert not letter.whole
    assert letter.value_bytes == len(value)
    assert key.startswith(letter.key or b"")
    assert value.startswith(letter.value or b"")
    assert headers[: len(letter.headers)] == letter.headers
    if cut is not None:
        own = {name: text for name, text in sent.headers if "truncated" in name or "dropped" in name}
        assert own == {f"coldstream.error.{name}": text for name, text in cut.items()}


def _batch_bytes(sent: Outgoing) -> int:
    """What the broker weighs against max.message.bytes."""
    builder = DefaultRecordBatchBuilder(2, 0, True, 1, 1, 1, 1 << 30)
    builder.append(0, 1_700_000_005_000, sent.key, sent.value, sent.headers)
    return len(builder.build())


@pytest.mark.parametrize("largest", [0, 100, 1_000, 10_000, 100_000])
def test_however_small_the_topics_limit(largest: int) -> None:
    sent = outgoing(b"k" * 5_000, b"v" * 50_000, [("h", b"x" * 100)] * 100, CAUSE, largest)
    assert _batch_bytes(sent) <= max(largest, 1_000)  # why it failed is said in any case
    assert read_letter(Record(*sent)) is not None


def test_what_just_fits_is_whole() -> None:
    for size in range(998_000, 1_000_000, 10):
        letter = posted(None, b"v" * size)
        if not letter.whole:
            break
        assert len(letter.value or b"") == size
    else:
        pytest.fail("nothing was cut")
    assert size > 998_800  # the room that headers may need costs little


def test_texts_are_capped_at_a_whole_character() -> None:
    letter = posted(b"k", b"v", cause=replace(CAUSE, message="é" * 5_000, error="x" * 5_000, worker="\ud800"))
    assert letter.cause.message == "é" * (LONGEST_TEXT // 2)
    assert letter.cause.error == "x" * LONGEST_TEXT
    assert letter.cause.worker == "\\ud800"


def test_forged_headers_deceive_nobody() -> None:
    forged: Headers = [
        ("coldstream.error.topic", b"elsewhere"),
        ("coldstream.error.truncated", b"5"),
        ("coldstream.error.null", b"1"),
        ("coldstream.receipt", b"1"),
        ("coldstream.replays", b"many"),
        ("mine", b"1"),
    ]
    sent = outgoing(b"k", b"[[0, 0]]", forged, CAUSE, LARGEST)
    letter = read_letter(Record(*sent))
    assert letter is not None
    assert letter.cause == CAUSE
    assert letter.replays == 0
    assert read_receipt(Record(*sent)) == []
    assert ("coldstream.error.topic", b"elsewhere") not in letter.replayed().headers
    assert letter.whole
    assert letter.value_bytes == 8


@pytest.mark.parametrize(
    "headers",
    [[], [("coldstream.error.topic", b"t")], [*CAUSE.headers(), ("coldstream.error.offset", b"x")]],
)
def test_what_is_no_letter_is_none(headers: Headers) -> None:
    assert read_letter(Record(b"k", b"v", headers)) is None


def test_a_receipt_is_read_as_it_was_sent() -> None:
    letters = [replace(posted(b"k", b"v"), partition=p, offset=o) for p, o in ((0, 5), (3, 1 << 40))]
    sent = receipt(letters)
    assert read_receipt(Record(*sent)) == [(0, 5), (3, 1 << 40)]
    assert read_letter(Record(*sent)) is None


@pytest.mark.parametrize("value", [None, b"", b"[1]", b"{}", b"[[1]]", b'[["a", 1]]', b"\xff"])
def test_what_is_no_receipt_is_none(value: bytes | None) -> None:
    assert read_receipt(Record(None, value, [("coldstream.receipt", b"1")])) == []


# --- sending


@dataclass
class Producer:
    """Stands for aiokafka's producer: keeps what it is given, acknowledges it when told to, and fails as told to."""

    failures: dict[int, Exception] = field(default_factory=dict)
    """By the number of the record: its future fails with it"""
    sent: list[tuple[str, Outgoing]] = field(default_factory=list)
    futures: list[asyncio.Future[None]] = field(default_factory=list)
    hold: bool = False

    async def send(self, topic: str, value: Any, key: Any, headers: Any) -> asyncio.Future[None]:
        assert key is not None or value is not None  # as aiokafka does
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if error := self.failures.get(len(self.sent)):
            future.set_exception(error)
        elif not self.hold:
            future.set_result(None)
        self.sent.append((topic, Outgoing(key, value, headers)))
        self.futures.append(future)
        return future


def chunk(*records: Record) -> Chunk:
    return Chunk.of_records("events", 3, records, next_offset=1 << 40)


def poison(index: int, reason: Reason = Reason.MISSING_FIELD) -> Poison:
    return Poison(index, "schema", reason, "MissingField", "no field item_id")


SOURCE = chunk(
    Record(b"k0", b"v0", offset=40),
    Record(b"k1", b"v1", [("own", b"1")], offset=41, timestamp=1_700_000_000_000),
    Record(None, None, offset=45),
)


def test_each_poison_becomes_a_letter_with_its_own_record() -> None:
    producer = Producer()
    letters = DeadLetters(producer, "dead", "w-1")
    asyncio.run(letters.send(SOURCE, [poison(1), poison(2, Reason.EMPTY_RECORD)]))
    cause = replace(CAUSE, version=metadata.version("coldstream"))
    last = replace(cause, offset=45, timestamp_ms=1_700_000_005_000, reason="empty record")
    assert producer.sent == [
        ("dead", outgoing(b"k1", b"v1", [("own", b"1")], cause, LARGEST)),
        ("dead", outgoing(None, None, [], last, LARGEST)),
    ]
    assert letters.by_reason == Counter({Reason.MISSING_FIELD: 1, Reason.EMPTY_RECORD: 1})


def test_nothing_is_sent_for_no_poison() -> None:
    producer = Producer()
    asyncio.run(DeadLetters(producer, "dead", "w-1").send(SOURCE, []))
    assert producer.sent == []


def test_it_returns_when_all_are_acknowledged() -> None:
    producer = Producer(hold=True)

    async def watched() -> list[bool]:
        sending = asyncio.ensure_future(DeadLetters(producer, "dead", "w-1").send(SOURCE, [poison(0), poison(1)]))
        done = []
        while len(producer.futures) < 2:
            await asyncio.sleep(0)
        for future in producer.futures:
            future.set_result(None)
            for _ in range(5):
                await asyncio.sleep(0)
            done.append(sending.done())
        await sending
        return done

    assert asyncio.run(watched()) == [False, True]


def test_one_that_is_not_acknowledged_is_an_error_and_none_is_counted() -> None:
    letters = DeadLetters(Producer({1: KafkaTimeoutError()}), "dead", "w-1")
    with pytest.raises(KafkaTimeoutError):
        asyncio.run(letters.send(SOURCE, [poison(0), poison(1), poison(2)]))
    assert letters.by_reason.total() == 0


def test_a_topic_that_takes_less_than_it_said() -> None:
    letters = DeadLetters(Producer({0: MessageSizeTooLargeError()}), "dead", "w-1", largest=5_000)
    with pytest.raises(
        LetterError, match=r"topic dead refuses a letter of up to 5,000 bytes; .* max.message.bytes=5000"
    ):
        asyncio.run(letters.send(SOURCE, [poison(0)]))


def test_a_letter_is_cut_to_what_the_topic_takes() -> None:
    producer = Producer()
    asyncio.run(
        DeadLetters(producer, "dead", "w-1", largest=5_000).send(chunk(Record(b"k", b"v" * 9_000)), [poison(0)])
    )
    ((_, sent),) = producer.sent
    assert _batch_bytes(sent) <= 5_000
    assert ("coldstream.error.truncated", b"9000") in sent.headers


# --- slowing down


def test_a_few_good_records_are_enough() -> None:
    watch = PoisonWatch(0.9)
    for _ in range(100):
        watch.seen(100, 90)
        assert (watch.red, watch.delay_s()) == (False, 0.0)


def test_nothing_but_poison_is_waited_for_longer_and_longer() -> None:
    watch = PoisonWatch(0.9)
    delays = []
    for _ in range(9):
        watch.seen(500, 500)
        delays.append(watch.delay_s())
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, LONGEST_DELAY_S, LONGEST_DELAY_S, LONGEST_DELAY_S]
    assert watch.red


def test_a_good_chunk_ends_the_waiting_at_once_and_the_alarm_when_they_are_enough() -> None:
    watch = PoisonWatch(0.9)
    for _ in range(10):
        watch.seen(500, 500)
    watch.seen(20, 0)
    assert (watch.red, watch.delay_s()) == (True, 0.0)
    watch.seen(100, 0)
    assert (watch.red, watch.delay_s()) == (False, 0.0)
    watch.seen(2_000, 2_000)
    assert (watch.red, watch.delay_s()) == (True, 0.1)


def test_the_first_records_judge_nobody() -> None:
    watch = PoisonWatch(0.5)
    for _ in range(99):
        watch.seen(1, 1)
        assert not watch.red
    watch.seen(1, 1)
    assert watch.red


def test_only_the_latest_records_count_and_only_they_are_held() -> None:
    watch = PoisonWatch(0.9)
    for _ in range(10_000):
        watch.seen(1, 1)
    for _ in range(100):
        watch.seen(1, 0)
    assert watch.share == 0.9
    assert not watch.red
    assert len(watch._latest) == 1_000
    watch.seen(1_000_000, 0)
    assert watch.share == 0.0
    assert len(watch._latest) == 1


def test_an_empty_chunk_says_nothing() -> None:
    watch = PoisonWatch(0.9)
    watch.seen(200, 200)
    watch.seen(0, 0)
    assert (watch.red, watch.delay_s(), watch.share) == (True, 0.1, 1.0)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_share_itself_is_not_above_it(share: float) -> None:
    watch = PoisonWatch(share)
    watch.seen(1_000, int(1_000 * share))
    assert not watch.red
