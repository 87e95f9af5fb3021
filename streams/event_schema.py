"""What one raw field means: the reference by which every source is read.

A raw field is what a parser gives: text, a whole number, a float, a truth value, None, or something nested. Each
``read_*`` function returns the meaning or a ``Problem``. The columnar path (``streams.columns``) calls the same
functions on distinct values, so that a record means the same however it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from configs.settings import EventSchema, IdRule, LabelRule, TimeRule
from streams.rejects import Problem, Reason

LAST_TIME_MS = 7_258_118_400_000
"""2200-01-01T00:00:00Z. A time at or after it is a mistake, mostly of the unit."""
LARGEST_VALUE = 3.4028235677973362e38
"""The largest number that is rounded to a finite 32-bit float: 3.4028235e38, as the largest one is written, is below.
A graded value beyond it would become infinite."""
UNITS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
PLAUSIBLE_FROM_MS, PLAUSIBLE_TO_MS = 631_152_000_000, 2_208_988_800_000
"""1990 and 2040: where a time falls that was read in the right unit."""
WHOLE_NUMBER_DIGITS = 18
"""Digits that 64 bits always hold; a longer text is read as a float, and no time that long is plausible."""
SHOWN_CHARACTERS = 60
"""How much of a wrong value a message shows."""


@dataclass(frozen=True, slots=True)
class Event:
    """One interaction read from one record."""

    user_id: str
    item_id: str
    label: int
    value: float
    """NaN where there is none."""
    event_time_ms: int


def decode_record(record: Mapping[str, object], schema: EventSchema) -> Event | Problem:
    """Reads one record (raw fields by name); the first problem in the order of ``EventSchema`` wins."""
    user_id = read_id(record.get(schema.user_id.field), schema.user_id)
    if isinstance(user_id, Problem):
        return user_id
    item_id = read_id(record.get(schema.item_id.field), schema.item_id)
    if isinstance(item_id, Problem):
        return item_id
    label = read_label(record.get(schema.label.field), schema.label)
    if isinstance(label, Problem):
        return label
    value = read_value(record.get(schema.value.field), schema.value.field) if schema.value else math.nan
    if isinstance(value, Problem):
        return value
    event_time_ms = read_time_ms(record.get(schema.event_time.field), schema.event_time)
    if isinstance(event_time_ms, Problem):
        return event_time_ms
    return Event(user_id, item_id, label, value, event_time_ms)


def read_id(raw: object, rule: IdRule) -> str | Problem:
    """An id as text with the rule's prefix. 12 and 12.0 (a whole column with gaps, as pandas writes it) are "12"."""
    if raw is None or (isinstance(raw, float) and math.isnan(raw)):
        return _missing(rule.field)
    if isinstance(raw, float) and raw.is_integer():
        raw = int(raw)
    if isinstance(raw, int) and not isinstance(raw, bool):
        return f"{rule.prefix}{raw}"
    if not isinstance(raw, str):
        return Problem(Reason.WRONG_TYPE, f"{rule.field} must be text or a whole number, not {_shown(raw)}")
    if not raw or raw.isspace():
        return Problem(Reason.EMPTY_ID, f"{rule.field} is empty")
    if not raw.isascii() and not _is_encodable(raw):
        return Problem(Reason.INVALID_TEXT, f"{rule.field} holds half of a surrogate pair")
    return rule.prefix + raw


def read_label(raw: object, rule: LabelRule) -> int | Problem:
    """0 or 1 by the rule."""
    if raw is None or (isinstance(raw, str) and not raw.strip()):
        return _missing(rule.field)
    if rule.equals is not None:
        return _label_by_equality(raw, rule)
    truth = {"true": 1.0, "false": 0.0}.get(raw.strip().lower()) if isinstance(raw, str) else None
    number = float(raw) if isinstance(raw, bool) else truth if truth is not None else _number(raw, rule.field)
    if isinstance(number, Problem):
        return number
    if rule.at_least is not None:
        return int(number >= rule.at_least)
    if rule.at_most is not None:
        return int(number <= rule.at_most)
    if number in (0.0, 1.0):
        return int(number)
    hint = f"set data.events.label: {{field: {rule.field}, at_least: …}}"
    return Problem(Reason.LABEL_OUTSIDE_RULE, f"{rule.field} must be 0, 1, true or false, not {_shown(raw)}; or {hint}")


def read_value(raw: object, field: str) -> float | Problem:
    """A graded value; nothing, or empty text, is no value (NaN)."""
    if raw is None or (isinstance(raw, str) and not raw.strip()):
        return math.nan
    number = _number(raw, field)
    if not isinstance(number, Problem) and abs(number) > LARGEST_VALUE:
        return Problem(Reason.NOT_FINITE, f"{field} is too large: {_shown(raw)}")
    return number


def read_time_ms(raw: object, rule: TimeRule) -> int | Problem:
    """Milliseconds since the epoch, between 1970 and 2200; a whole number of a finer unit is cut off."""
    if raw is None or (isinstance(raw, str) and not raw.strip()):
        return _missing(rule.field)
    if rule.unit == "iso":
        return _checked_time(_iso_ms(raw, rule.field), raw, rule)
    whole = int(raw) if isinstance(raw, str) and is_whole_number(raw) else raw
    if isinstance(whole, int) and not isinstance(whole, bool):
        return _checked_time(whole * 1000 // UNITS_PER_SECOND[rule.unit], raw, rule)
    number = _number(whole, rule.field)
    if isinstance(number, Problem):
        return number
    return _checked_time(milliseconds(number, rule.unit), raw, rule)


def milliseconds(number: float, unit: str) -> int:
    """A fractional time, rounded to the nearest millisecond (1.001 s is stored as a little less)."""
    scaled = number * (1000.0 / UNITS_PER_SECOND[unit])
    return round(scaled) if math.isfinite(scaled) else math.floor(math.copysign(LAST_TIME_MS, scaled))


def read_feature(raw: object, separator: str = "|") -> str | None:
    """A feature's raw text, a list joined by the separator; None where there is nothing, NaN or an object."""
    if isinstance(raw, list):
        return separator.join(text for text in map(read_feature, raw) if text) or None
    if raw is None or (isinstance(raw, float) and not math.isfinite(raw)):
        return None
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, float) and raw.is_integer():
        return str(int(raw))
    if isinstance(raw, (int, float)):
        return str(raw)
    return raw if isinstance(raw, str) and raw and _is_encodable(raw) else None


def is_whole_number(text: str) -> bool:
    """Whether a text is 1 to 18 ASCII digits, which 64 bits always hold."""
    return len(text) <= WHOLE_NUMBER_DIGITS and text.isascii() and text.isdigit()


def unit_hint(event_time_ms: int, unit: str) -> str:
    """Which unit would put a time between 1990 and 2040, as the end of a sentence; empty if none would."""
    if unit not in UNITS_PER_SECOND:
        return ""
    for other, per_second in UNITS_PER_SECOND.items():
        if other != unit:
            as_other = event_time_ms * UNITS_PER_SECOND[unit] // per_second
            if PLAUSIBLE_FROM_MS <= as_other < PLAUSIBLE_TO_MS:
                year = datetime.fromtimestamp(as_other / 1000, UTC).year
                return f"; in {other} it is the year {year}: set data.events.event_time.unit to {other}?"
    return ""


def _checked_time(event_time_ms: int | Problem, raw: object, rule: TimeRule) -> int | Problem:
    if isinstance(event_time_ms, Problem) or 0 <= event_time_ms < LAST_TIME_MS:
        return event_time_ms
    side = "before 1970" if event_time_ms < 0 else "after the year 2199"
    detail = f"{rule.field} {_shown(raw)} in {rule.unit} is {side}{unit_hint(event_time_ms, rule.unit)}"
    return Problem(Reason.TIME_OUT_OF_RANGE, detail)


def _iso_ms(raw: object, field: str) -> int | Problem:
    if not isinstance(raw, str):
        return Problem(Reason.WRONG_TYPE, f"{field} must be ISO 8601 text, not {_shown(raw)}")
    try:
        moment = datetime.fromisoformat(raw.strip())
    except ValueError:
        return Problem(Reason.WRONG_TYPE, f"{field} is not an ISO 8601 time: {_shown(raw)}")
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000


def _label_by_equality(raw: object, rule: LabelRule) -> int | Problem:
    text = read_feature(raw)
    if text is None:
        return Problem(Reason.WRONG_TYPE, f"{rule.field} must be text, a number or a truth value, not {_shown(raw)}")
    assert rule.equals is not None
    if text == rule.equals:
        return 1
    mine, wanted = _number(text, rule.field), _number(rule.equals, rule.field)
    return int(isinstance(mine, float) and isinstance(wanted, float) and mine == wanted)


def _number(raw: object, field: str) -> float | Problem:
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        return Problem(Reason.WRONG_TYPE, f"{field} must be a number, not {_shown(raw)}")
    try:
        if isinstance(raw, str) and ("_" in raw or not raw.isascii()):
            raise ValueError
        number = float(raw)
    except ValueError:
        return Problem(Reason.WRONG_TYPE, f"{field} is not a number: {_shown(raw)}")
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else Problem(Reason.NOT_FINITE, f"{field} is not finite: {_shown(raw)}")


def _missing(field: str) -> Problem:
    return Problem(Reason.MISSING_FIELD, f"{field} is missing")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(raw: object) -> str:
    if isinstance(raw, (dict, list)):
        return "a nested value"
    text = repr(raw)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
