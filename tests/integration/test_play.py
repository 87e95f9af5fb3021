"""Playing: a worker with the same settings reads the very events of the source, per user in order, at the set rate."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaConsumer, TopicPartition

from configs.settings import EventSchema, Settings
from learner.interactions import Interactions
from streams.event_schema import LAST_TIME_MS, Event, decode_record, read_feature
from streams.kafka.exceptions import KafkaProblem
from streams.kafka.partitioning import partition_of
from streams.live.play import EventWriter, PlayError, due_events, events_to_play, play
from tests.kafka_broker import create_topic, delete_topics, free_topic

DAY_MS = 86_400_000
FIRST_MS = 1_700_000_000_000


def schema(**changes: object) -> EventSchema:
    return EventSchema.model_validate(changes)


SCHEMAS = (
    schema(),
    schema(user_id={"field": "who", "prefix": "shop:"}, item_id={"field": "what", "prefix": "i-"}),
    schema(
        label={"field": "rating", "at_least": 4}, value={"field": "rating"}, event_time={"field": "at", "unit": "s"}
    ),
    schema(label={"field": "rating", "at_least": 4.5}, event_time={"field": "at", "unit": "iso"}),
    schema(label={"field": "rank", "at_most": -2}, event_time={"field": "at", "unit": "us"}),
    schema(label={"field": "rank", "at_most": 1e300}, event_time={"field": "at", "unit": "ns"}),
    schema(label={"field": "action", "equals": "buy"}, value={"field": "price"}),
    schema(label={"field": "action", "equals": "5"}),
)

IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: not text.isspace())
EVENTS = st.lists(
    st.tuples(
        IDS,
        IDS,
        st.integers(0, 1),
        st.one_of(st.just(float("nan")), st.floats(width=32, allow_nan=False, allow_infinity=False)),
        st.integers(0, LAST_TIME_MS - 1),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
@given(rows=EVENTS)
def test_what_is_written_is_read_as_the_same_event(schema: EventSchema, rows: list[tuple]) -> None:
    users, items, labels, values, times = map(list, zip(*rows, strict=True))
    users = [schema.user_id.prefix + user for user in users]
    items = [schema.item_id.prefix + item for item in items]
    values = np.array(values, np.float32) + np.float32(0)  # which makes -0.0 plain
    if schema.value is None:
        values[:] = np.nan
    elif schema.value.field == schema.label.field:
        values = np.where(np.isnan(values), np.float32(3), values)
        labels = [int(value >= schema.label.at_least) for value in values]
    events = Interactions.from_columns(users, items, labels, times, values=values)

    read = [(user, decode_record(json.loads(line), schema)) for user, line in EventWriter(schema).records(events)]
    assert [user for user, _ in read] == users
    for (_, event), *expected in zip(read, users, items, labels, values, times, strict=True):
        assert isinstance(event, Event), event
        got = [event.user_id, event.item_id, event.label, np.float32(event.value), event.event_time_ms]
        assert list(map(str, got)) == list(map(str, expected))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_is_written_and_read(sign: int) -> None:
    mapped = schema(label={"field": "action", "equals": "buy"}, value={"field": "price"})
    largest = sign * np.finfo(np.float32).max
    events = Interactions.from_columns(["ann"], ["i1"], [1], [0], values=np.array([largest], np.float32))
    ((_, line),) = EventWriter(mapped).records(events)
    event = decode_record(json.loads(line), mapped)
    assert isinstance(event, Event)
    assert np.float32(event.value) == largest


def test_features_and_event_ids_are_written_in_their_own_fields() -> None:
    mapped = schema(
        event_id={"field": "id"},
        user_features={"age": {"kind": "numeric", "field": "user_age"}, "city": {}},
        item_features={"genres": {"kind": "multi"}},
    )
    events = Interactions(
        ("a", "b"), ("x",), np.array([0, 1], np.int32), np.zeros(2, np.int32), np.array([1, 0], np.int8),
        np.full(2, np.nan, np.float32), np.array([5, 6]), np.array([70, 71]),
        {"age": ("31", None), "city": ("Köln", "Rome")}, {"genres": ("Drama|War",)},
    )  # fmt: skip
    assert [msgspec.json.decode(line) for _, line in EventWriter(mapped).records(events)] == [
        {"user_age": "31", "city": "Köln", "user_id": "a", "genres": "Drama|War", "item_id": "x", "label": 1,
         "event_time_ms": 5, "id": "70"},
        {"city": "Rome", "user_id": "b", "genres": "Drama|War", "item_id": "x", "label": 0,
         "event_time_ms": 6, "id": "71"},
    ]  # fmt: skip
    assert read_feature("Drama|War") == "Drama|War"


@pytest.mark.parametrize(
    ("elapsed_s", "rate", "sent", "due"),
    [(0.0, 100, 0, 1), (0.0, 100, 1, 0), (0.009, 100, 1, 0), (0.01, 100, 1, 1), (1.0, 100, 41, 60), (9, 0, 7, 2_000)],
)
def test_events_are_due_by_the_clock(elapsed_s: float, rate: float, sent: int, due: int) -> None:
    assert due_events(elapsed_s, rate, sent) == due


# --- against the broker


@pytest.fixture
def topic(kafka_bootstrap: str):
    name = create_topic(kafka_bootstrap, free_topic("play"), partitions=3)
    yield name
    delete_topics(kafka_bootstrap, name)


def source(directory: Path, users: int = 20, events_each: int = 30) -> tuple[Path, list[tuple[str, str, int, int]]]:
    """A file in time order in which user k begins at day k, and its rows."""
    rng = np.random.default_rng(5)
    rows = sorted(
        (f"u{user}", f"i{rng.integers(9)}", int(rng.integers(2)), FIRST_MS + user * DAY_MS + k * 60_000)
        for user in range(users)
        for k in range(events_each)
    )
    rows.sort(key=lambda row: row[3])
    path = directory / "events.csv"
    path.write_text("user_id,item_id,label,event_time_ms\n" + "".join(f"{u},{i},{y},{t}\n" for u, i, y, t in rows))
    return path, rows


def settings_for(bootstrap: str, topic: str, path: Path, **stream: object) -> Settings:
    return Settings.model_validate(
        {"kafka": {"bootstrap": bootstrap}, "stream": {"topic": topic, **stream}, "data": {"paths": [str(path)]}}
    )


def contents(bootstrap: str, topic: str, partitions: int = 3) -> dict[int, list[tuple[bytes, bytes, int]]]:
    """Key, value and offset of everything in the topic, by partition."""
    with closing(KafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")) as consumer:
        places = [TopicPartition(topic, k) for k in range(partitions)]
        consumer.assign(places)
        ends = consumer.end_offsets(places)
        found: dict[int, list[tuple[bytes, bytes, int]]] = {k: [] for k in range(partitions)}
        while any(consumer.position(place) < ends[place] for place in places):
            for place, records in consumer.poll(timeout_ms=10_000).items():
                found[place.partition] += [(r.key, r.value, r.offset) for r in records]
        return found


def test_the_topic_holds_the_online_users_events_keyed_and_in_order(
    kafka_bootstrap: str, topic: str, tmp_path: Path
) -> None:
    path, rows = source(tmp_path)
    settings = settings_for(kafka_bootstrap, topic, path)
    with events_to_play(settings, everything=False) as events:
        played = asyncio.run(play(settings, events))

    online = [row for row in rows if int(row[0][1:]) >= 14]  # the last 30 % of 20 users
    found = contents(kafka_bootstrap, topic)
    assert (played.events, played.users) == (len(online), 6) == (180, 6)
    assert played.offsets == {p: (0, len(records)) for p, records in found.items() if records}
    for partition, records in found.items():
        assert [offset for *_, offset in records] == list(range(len(records)))
        decoded = [decode_record(json.loads(value), settings.data.events) for _, value, _ in records]
        assert [(e.user_id, e.item_id, e.label, e.event_time_ms) for e in decoded] == [
            row for row in online if partition_of(row[0].encode(), 3) == partition
        ]
        assert [key.decode() for key, *_ in records] == [event.user_id for event in decoded]


def test_a_rate_and_a_limit_are_kept(kafka_bootstrap: str, topic: str, tmp_path: Path) -> None:
    path, rows = source(tmp_path)
    settings = settings_for(kafka_bootstrap, topic, path)
    seen: list[int] = []
    with events_to_play(settings, everything=True) as events:
        played = asyncio.run(play(settings, events, rate=200, limit=101, on_progress=seen.append))
    assert played.events == 101 == seen[-1]
    assert played.seconds >= 0.5  # the last of them is due then
    assert len(seen) > 10  # and they came one after another, not in one heap
    sent = [value for records in contents(kafka_bootstrap, topic).values() for _, value, _ in records]
    assert sorted(json.loads(value)["event_time_ms"] for value in sent) == [row[3] for row in rows[:101]]


def test_many_events_in_many_batches_all_arrive(kafka_bootstrap: str, topic: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    n = 60_000
    events = Interactions.from_columns(
        [f"u{k}" for k in rng.integers(0, 500, n)], [f"i{k}" for k in rng.integers(0, 50, n)],
        rng.integers(0, 2, n), np.arange(n) + FIRST_MS,
    )  # fmt: skip
    settings = settings_for(kafka_bootstrap, topic, tmp_path)
    played = asyncio.run(play(settings, [events]))
    assert (played.events, sum(end - first for first, end in played.offsets.values())) == (n, n)
    times = [
        [json.loads(value)["event_time_ms"] for _, value, _ in records]
        for records in contents(kafka_bootstrap, topic).values()
    ]
    assert all(part == sorted(part) for part in times)
    assert sorted(time for part in times for time in part) == events.event_time_ms.tolist()


def test_a_missing_topic_is_made_or_named_with_the_command(kafka_bootstrap: str, tmp_path: Path) -> None:
    path, _ = source(tmp_path, users=4)
    name = free_topic("play-new")
    forbidden = settings_for(kafka_bootstrap, name, path, topics={"create": False})
    with (
        events_to_play(forbidden, everything=True) as events,
        pytest.raises(KafkaProblem, match=f"{name}.*kafka-topics.sh.*--create"),
    ):
        asyncio.run(play(forbidden, events))
    allowed = settings_for(kafka_bootstrap, name, path, topics={"partitions": 2})
    with events_to_play(allowed, everything=True) as events:
        assert asyncio.run(play(allowed, events)).events == 120
    assert sum(map(len, contents(kafka_bootstrap, name, 2).values())) == 120
    delete_topics(kafka_bootstrap, name)


def test_what_cannot_be_played_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    path, _ = source(tmp_path, users=4)
    nobody = settings_for("127.0.0.1:9", "x", path)
    with events_to_play(nobody, everything=True) as events, pytest.raises(KafkaProblem, match=r"127\.0\.0\.1:9"):
        asyncio.run(play(nobody, events))
    avro = settings_for("127.0.0.1:9", "x", path, format="avro")
    with pytest.raises(PlayError, match=r"stream\.format is avro: events are played as JSON only"):
        asyncio.run(play(avro, []))


def test_the_command_says_what_it_sent(kafka_bootstrap: str, topic: str, tmp_path: Path, coldstream) -> None:
    path, _ = source(tmp_path)
    there = f"--data {path} --set kafka.bootstrap={kafka_bootstrap} --set stream.topic={topic}"
    first = coldstream(f"play {there} --limit 50 --json")
    assert (first.code, first.err) == (0, "")
    told = json.loads(first.out)
    assert (told["topic"], told["events"], told["users"]) == (topic, 50, 2)
    assert sum(part["next"] - part["first"] for part in told["partitions"].values()) == 50

    second = coldstream(f"play {there} --all --rate 100000")
    assert second.out.startswith(f"600 events of 20 users in {topic}, 3 partitions, in ")
    assert sum(map(len, contents(kafka_bootstrap, topic).values())) == 650

    refused = coldstream(f"play {there} --set kafka.bootstrap=127.0.0.1:9")
    assert refused.code == 2
    assert refused.err.startswith("error: no broker answers: 127.0.0.1:9")
    assert refused.err.count("\n") == 1
