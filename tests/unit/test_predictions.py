"""Predictions lie in the outbox as columns, and go out as JSON that holds every bit of them."""

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.adaptation import Adapted
from learner.interactions import Interactions
from streams.live.predictions import pack, unpack

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
events = st.lists(st.tuples(ids, ids, st.integers(0, 1), floats, floats, st.booleans()), max_size=20)


def packed(rows: list[tuple[str, str, int, float, float, bool]]) -> bytes:
    users, items, labels, logits, probabilities, applied = ([row[k] for row in rows] for k in range(6))
    n = len(rows)
    stream = Interactions.from_columns(users, items, labels, 1000 + np.arange(n), offsets=10 + 3 * np.arange(n))
    said = Adapted(np.array(logits, np.float32), np.array(probabilities, np.float32), np.array(applied, np.bool_), 0)
    return pack(stream, said, 7)


@given(events)
def test_what_is_unpacked_is_what_was_said_of_the_applied_events_bit_for_bit(rows) -> None:
    keys, values = unpack(packed(rows), 3)
    told = [json.loads(value) for value in values]
    applied = [(k, row) for k, row in enumerate(rows) if row[5]]
    assert keys == [row[0].encode() for _, row in applied]
    assert [(t["user_id"], t["item_id"], t["label"]) for t in told] == [row[:3] for _, row in applied]
    assert [t["source_offset"] for t in told] == [10 + 3 * k for k, _ in applied]
    assert [t["event_time_ms"] for t in told] == [1000 + k for k, _ in applied]
    assert all(t["source_partition"] == 3 and t["meta_version"] == 7 for t in told)
    for name, place in (("logit", 3), ("probability", 4)):
        expected = np.array([row[place] for _, row in applied], np.float32)
        assert np.array([t[name] for t in told], np.float32).tobytes() == expected.tobytes()


def test_another_form_is_refused() -> None:
    columns = msgspec.msgpack.decode(packed([("u", "i", 1, 0.5, 0.6, True)]))
    columns[0] = 2
    with pytest.raises(ValueError, match="packed predictions are of form 2, this program reads 1"):
        unpack(msgspec.msgpack.encode(columns), 0)


def test_a_record_reads_as_documented() -> None:
    _, (value, _) = unpack(packed([("Zoë\n", "i9", 1, -2.25, 0.1, True), ("b", "i8", 0, 1.0, 0.5, True)]), 3)
    assert value == (
        b'{"user_id":"Zo\xc3\xab\\n","item_id":"i9","label":1,"probability":0.10000000149011612,"logit":-2.25,'
        b'"event_time_ms":1000,"source_partition":3,"source_offset":10,"meta_version":7}'
    )


def test_ids_that_no_applied_event_names_are_not_kept() -> None:
    payload = packed([("ann", "i1", 1, 0.0, 0.5, False), ("bob", "i2", 1, 0.0, 0.5, True)])
    assert [word in payload for word in (b"bob", b"i2", b"ann", b"i1")] == [True, True, False, False]


def test_bytes_that_are_no_predictions_are_refused() -> None:
    good = packed([("u", "i", 1, 0.5, 0.6, True)])
    columns = msgspec.msgpack.decode(good)
    longer = msgspec.msgpack.encode([*columns[:-1], 2 * columns[-1]])
    for broken in (b"", b"\xc1", good[:-1], longer):
        with pytest.raises(ValueError, match=r"."):
            unpack(broken, 0)
