"""A record that stands for a batch which could not be opened is poison, and its neighbours are not touched."""

import json
from dataclasses import replace

from configs.settings import EventSchema, StreamSettings
from streams.decoding.decoder import decoder_of
from streams.kafka.chunk import Chunk, Unreadable
from streams.rejects import Reason
from tests.decoding import chunk_of


def chunk() -> Chunk:
    return chunk_of([event(k) for k in range(4)])


def event(k: int) -> bytes:
    return json.dumps({"user_id": f"u{k}", "item_id": "i", "label": 1, "event_time_ms": 1_700_000_000_000 + k}).encode()


def test_an_unreadable_batch_is_poison_even_where_its_bytes_would_decode() -> None:
    bombed = replace(chunk(), unreadable=(Unreadable(2, "opens to more than 33,554,432 bytes"),))
    decoded = decoder_of(EventSchema(), StreamSettings()).decode(bombed)
    assert [decoded.events.user_ids[u] for u in decoded.events.user] == ["u0", "u1", "u3"]
    assert decoded.events.offset.tolist() == [bombed.offset[k] for k in (0, 1, 3)]
    (poison,) = decoded.poison
    assert (poison.index, poison.stage, poison.reason) == (2, "decode", Reason.UNREADABLE_BATCH)
    assert poison.message == "opens to more than 33,554,432 bytes"


def test_without_one_nothing_is_changed() -> None:
    assert decoder_of(EventSchema(), StreamSettings()).decode(chunk()).poison == ()
