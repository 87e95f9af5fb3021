"""A dead letter: the record as it was received, and headers that say where it came from and why it is no event.

Layout of a record of the dead letters' topic, format 1::

    key, value         those of the record, byte for byte; cut where they would not fit
    its own headers    in their order; the last ones are left out where they would not fit
    coldstream.error.format     1
    coldstream.error.topic      where it was read from
    coldstream.error.partition  decimal
    coldstream.error.offset     decimal
    coldstream.error.timestamp  the record's own, in milliseconds; the letter's own says when it failed
    coldstream.error.stage      how far it came: decode, registry, schema, …
    coldstream.error.reason     one of streams.rejects.Reason
    coldstream.error.class      of the exception
    coldstream.error.message    one line
    coldstream.error.version    of coldstream
    coldstream.error.worker     who gave it up
    coldstream.error.null         only if there was no value, which is written as an empty one
    coldstream.error.truncated    only if the value was cut: its size in bytes
    coldstream.error.key.truncated      only if the key was cut: its size
    coldstream.error.headers.dropped    only if headers were left out: how many

A receipt says of letters that they were replayed, so that they are not replayed again. It lies in the same topic, in
the transaction that sent the records back: header ``coldstream.receipt`` (``1``), value a JSON list of
``[partition, offset]`` of the letters.

A replayed record has the letter's key and value, the headers that were its own, and ``coldstream.replays``: how often
it was sent back.

Header values are UTF-8. What is said of the record begins at the last ``coldstream.error.format``: a record whose own
headers look like these deceives nobody. They are not sent back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

FORMAT = "1"
ERROR = "coldstream.error."
REPLAYS = "coldstream.replays"
RECEIPT = "coldstream.receipt"
LONGEST_TEXT = 2_000
"""Bytes of one error header's value, so that a hostile record cannot fill headers with its message"""
OVERHEAD = 512
"""Bytes of a record batch around key, value and headers, and of the headers that are there only at times: at most"""
HEADER_OVERHEAD = 10
"""Bytes of a header around its name and value: two lengths, at most five bytes each"""
SHARE_OF_KEY = SHARE_OF_HEADERS = 4
"""Key and own headers may each take this part of the room, the value has the rest"""

Headers = list[tuple[str, bytes | None]]


class Outgoing(NamedTuple):
    """What is sent."""

    key: bytes | None
    value: bytes | None
    headers: Headers


class Received(Protocol):
    """A record of the dead letters' topic, as clients give it."""

    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


@dataclass(frozen=True, slots=True)
class Cause:
    """Where a record came from and why it is no event."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    stage: str
    reason: str
    error: str
    """Class of the exception"""
    message: str
    version: str
    worker: str

    def headers(self) -> Headers:
        """As the module says."""
        return [(ERROR + name, _capped(text)) for name, text in (
            ("format", FORMAT),
            ("topic", self.topic),
            ("partition", str(self.partition)),
            ("offset", str(self.offset)),
            ("timestamp", str(self.timestamp_ms)),
            ("stage", self.stage),
            ("reason", self.reason),
            ("class", self.error),
            ("message", self.message),
            ("version", self.version),
            ("worker", self.worker),
        )]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter as it was read."""

    partition: int
    offset: int
    failed_ms: int
    cause: Cause
    key: bytes | None
    value: bytes | None
    headers: Headers
    """The record's own"""
    value_bytes: int | None
    """The value's size before it was cut; None: there was no value"""
    whole: bool
    """Nothing was cut or left out: it can be replayed"""
    replays: int
    """How often the record had been sent back before it failed this time"""

    def excerpt(self, size: int) -> Letter:
        """The letter with no more than the first bytes of key and value, and no headers, to be shown."""
        key, value = (None if content is None else content[:size] for content in (self.key, self.value))
        return replace(self, key=key, value=value, headers=[])

    def replayed(self) -> Outgoing:
        """The record that is sent back. The letter must be whole.

        A record without both key and value, which clients do not send, is sent back with an empty value.
        """
        value = b"" if self.key is None and self.value is None else self.value
        return Outgoing(self.key, value, [*self.headers, (REPLAYS, str(self.replays + 1).encode())])


def outgoing(key: bytes | None, value: bytes | None, headers: Headers, cause: Cause, largest: int) -> Outgoing:
    """The letter of a record, of at most ``largest`` bytes as a record batch of its own."""
    why = cause.headers()
    room = max(0, largest - OVERHEAD - _size(why))
    kept_key, key_cut = _cut(key, room // SHARE_OF_KEY)
    kept = _fitting(headers, room // SHARE_OF_HEADERS)
    kept_value, value_cut = _cut(value, room - len(kept_key or b"") - _size(kept))
    if key_cut:
        why.append((ERROR + "key.truncated", _number(len(key or b""))))
    if value_cut:
        why.append((ERROR + "truncated", _number(len(value or b""))))
    if value is None:
        why.append((ERROR + "null", b"1"))
    if len(kept) < len(headers):
        why.append((ERROR + "headers.dropped", _number(len(headers) - len(kept))))
    return Outgoing(kept_key, b"" if kept_value is None else kept_value, [*kept, *why])


def read_letter(record: Received) -> Letter | None:
    """The letter that the record is; None: it is none."""
    begin = max((k for k, (name, _) in enumerate(record.headers) if name == ERROR + "format"), default=None)
    if begin is None:
        return None
    own, said = record.headers[:begin], record.headers[begin:]
    text = {name.removeprefix(ERROR): (value or b"").decode(errors="replace") for name, value in said}
    try:
        cause = Cause(
            topic=text["topic"],
            partition=int(text["partition"]),
            offset=int(text["offset"]),
            timestamp_ms=int(text["timestamp"]),
            stage=text["stage"],
            reason=text["reason"],
            error=text["class"],
            message=text["message"],
            version=text["version"],
            worker=text["worker"],
        )
        cut = int(text["truncated"]) if "truncated" in text else None
    except (KeyError, ValueError):
        return None
    value = None if "null" in text else record.value
    return Letter(
        record.partition, record.offset, record.timestamp, cause, record.key, value,
        headers=[(name, value) for name, value in own if not name.startswith(ERROR) and name != REPLAYS],
        value_bytes=cut if cut is not None else None if value is None else len(value),
        whole=cut is None and "key.truncated" not in text and "headers.dropped" not in text,
        replays=_replays(own),
    )  # fmt: skip


def receipt(letters: Iterable[Letter]) -> Outgoing:
    """Says that these letters were replayed."""
    places = [[letter.partition, letter.offset] for letter in letters]
    return Outgoing(None, json.dumps(places, separators=(",", ":")).encode(), [(RECEIPT, FORMAT.encode())])


def read_receipt(record: Received) -> list[tuple[int, int]]:
    """(partition, offset) of the letters that the record is a receipt of; none if it is no receipt."""
    names = [name for name, _ in record.headers]
    if names != [RECEIPT] or record.value is None:
        return []
    try:
        return [(int(partition), int(offset)) for partition, offset in json.loads(record.value)]
    except (ValueError, TypeError):
        return []


def _replays(headers: Iterable[tuple[str, bytes | None]]) -> int:
    counts = [value for name, value in headers if name == REPLAYS and value is not None]
    return int(counts[-1]) if counts and counts[-1].isdigit() and len(counts[-1]) < 10 else 0


def _capped(text: str) -> bytes:
    """UTF-8 of at most LONGEST_TEXT bytes that ends with a whole character."""
    return text.encode("utf-8", "backslashreplace")[:LONGEST_TEXT].decode("utf-8", "ignore").encode()


def _number(number: int) -> bytes:
    return str(number).encode()


def _size(headers: Iterable[tuple[str, bytes | None]]) -> int:
    return sum(len(name.encode()) + len(value or b"") + HEADER_OVERHEAD for name, value in headers)


def _fitting(headers: Headers, room: int) -> Headers:
    kept: Headers = []
    for header in headers:
        room -= _size([header])
        if room < 0:
            break
        kept.append(header)
    return kept


def _cut(content: bytes | None, room: int) -> tuple[bytes | None, bool]:
    if content is None or len(content) <= room:
        return content, False
    return content[: max(0, room)], True
