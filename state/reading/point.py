"""A point of the stream as a query names it: ``now``, an offset, or a time."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from state.exceptions import QueryError

PointKind = Literal["now", "offset", "time"]


class Point(NamedTuple):
    """Where in the stream: after the event at this offset, or after the last event at this time or before."""

    kind: PointKind
    value: int
    """The offset, or milliseconds since the epoch; 0 for now"""
    asked: str
    """As it was written"""


NOW = Point("now", 0, "now")


def parse_point(text: str) -> Point:
    """``now``; ``1200``, an offset; ``1767225600000ms``, a time since the epoch; or a time in ISO 8601.

    A time that names no zone is UTC. Raises QueryError.
    """
    asked = text.strip()
    if asked == "now":
        return NOW
    if re.fullmatch(r"-?[0-9]{1,18}", asked):
        return Point("offset", int(asked), asked)
    if re.fullmatch(r"-?[0-9]{1,18}ms", asked):
        return Point("time", int(asked[:-2]), asked)
    try:
        time = datetime.fromisoformat(asked)
    except ValueError as error:
        raise QueryError(
            f"{text!a} is no point of a stream: give `now`, an offset (1200), a time in ISO 8601 "
            "(2026-01-03T08:00:00) or in milliseconds since the epoch (1767427200000ms)"
        ) from error
    aware = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    since = aware - datetime(1970, 1, 1, tzinfo=UTC)
    return Point("time", (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000, asked)


def time_text(time_ms: int) -> str:
    """UTC, to the second; the number where no calendar has it."""
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{time_ms} ms"
