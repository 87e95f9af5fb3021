"""Predictions on their way to a topic: columns in the outbox, one JSON record for each event on the topic.

A record's key is the user's id; its value says what was predicted for which event, before the event's label was used:

    {"user_id": "u1", "item_id": "i9", "label": 1, "probability": 0.61, "logit": 0.45, "event_time_ms": 1700000000000,
     "source_partition": 3, "source_offset": 1234, "meta_version": 0}
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from learner.adaptation import Adapted
from learner.interactions import Interactions

_FORM = 1
"""Version of the packed form; another one is refused"""


class Prediction(msgspec.Struct, frozen=True):
    """One record's value."""

    user_id: str
    item_id: str
    label: int
    probability: float
    logit: float
    event_time_ms: int
    source_partition: int
    source_offset: int
    meta_version: int


class _Columns(msgspec.Struct, array_like=True):
    form: int
    meta_version: int
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    user: bytes
    item: bytes
    label: bytes
    probability: bytes
    logit: bytes
    event_time_ms: bytes
    offset: bytes


_packer = msgspec.msgpack.Encoder()
_unpacker = msgspec.msgpack.Decoder(_Columns)
_json = msgspec.json.Encoder()


def pack(events: Interactions, adapted: Adapted, meta_version: int) -> bytes:
    """The predictions of one commit's applied events, as the outbox keeps them."""
    applied = np.flatnonzero(adapted.applied)
    kept = events.take(applied).pruned()
    columns = _Columns(
        _FORM, meta_version, kept.user_ids, kept.item_ids, kept.user.tobytes(), kept.item.tobytes(),
        kept.label.tobytes(), adapted.probability[applied].tobytes(), adapted.logit[applied].tobytes(),
        kept.event_time_ms.tobytes(), kept.offset.tobytes(),
    )  # fmt: skip
    return _packer.encode(columns)


def unpack(payload: bytes, partition: int) -> tuple[Sequence[bytes], Sequence[bytes]]:
    """(keys, values) of the records of one packed commit, in the order of the events. ValueError: another form."""
    c = _unpacker.decode(payload)
    if c.form != _FORM:
        raise ValueError(f"packed predictions are of form {c.form}, this program reads {_FORM}")
    users = [c.user_ids[k] for k in np.frombuffer(c.user, np.int32).tolist()]
    items = [c.item_ids[k] for k in np.frombuffer(c.item, np.int32).tolist()]
    columns = zip(
        users, items, np.frombuffer(c.label, np.int8).tolist(), _shortest(c.probability), _shortest(c.logit),
        np.frombuffer(c.event_time_ms, np.int64).tolist(), np.frombuffer(c.offset, np.int64).tolist(), strict=True,
    )  # fmt: skip
    values = [
        _json.encode(Prediction(user, item, label, p, z, time, partition, offset, c.meta_version))
        for user, item, label, p, z, time, offset in columns
    ]
    return [user.encode() for user in users], values


def _shortest(packed: bytes) -> list[float]:
    """32-bit floats as Python's, which hold them exactly: read back as float32, each is the same bit for bit."""
    exact: list[float] = np.frombuffer(packed, np.float32).astype(np.float64).tolist()
    return exact
