"""The columnar readers agree with a plain reader of one line at a time, whatever the lines hold."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from configs.loading import load_settings
from configs.settings import DataSettings
from streams import text_blocks
from streams.event_schema import Event, decode_record
from streams.rejects import Problem, Reason
from streams.sources import open_source

FIELDS = ("user_id", "item_id", "label", "value", "event_time_ms")
Outcome = tuple[object, ...]

IDS = st.sampled_from(
    ["u1", "u2", "12", "é", "", " ", "\t", "a b", '"q"', '"', 'x"y', "\x1f", "\ufeff", "\x85", "a\rb"]
)
NUMBERS = [
    "0",
    "1",
    "1.0",
    " 1",
    "-1",
    "",
    "4.5",
    "nan",
    "inf",
    "1e400",
    "1e39",
    "٣",
    "1_0",
    "0x1",
    "true",
    "FALSE",
    "+1",
]
TIMES = ["1000", "956712388", "7258118400000", "1e3", "5.5", "-5", "-0", "007", "9" * 19, "", "x", "1 ", "１", "nan"]
RULES: list[dict[str, object]] = [{}, {"at_least": 1}, {"at_most": 0.5}, {"equals": "1"}]


def settings(path: Path, unit: str, rule: dict[str, object], **more: object) -> DataSettings:
    overrides = {f"data.events.label.{name}": value for name, value in rule.items()}
    overrides |= {"data.paths": str(path), "data.events.value": {"field": "value"}, "data.rejects.max_share": 1}
    overrides |= {"data.events.event_time.unit": unit, **{f"data.{name}": value for name, value in more.items()}}
    return load_settings(None, overrides, {}).data


def read(data: DataSettings, block_bytes: int) -> tuple[list[Outcome], list[Outcome]]:
    """Events as (offset, user, item, label, value, time), rejections as (line, reason, detail)."""
    source = open_source(data)
    events: list[Outcome] = []
    with patch.object(text_blocks, "BLOCK_BYTES", block_bytes):
        for b in source.batches():
            columns = zip(b.offset, b.user, b.item, b.label, b.value, b.event_time_ms, strict=True)
            events += [(int(o), b.user_ids[u], b.item_ids[i], int(y), shown(v), int(t)) for o, u, i, y, v, t in columns]
    assert data.rejects.path is not None
    lines = data.rejects.path.read_text().splitlines() if data.rejects.path.exists() else []
    rejections = [json.loads(line) for line in lines]
    return events, [(r["line"], r["reason"], r["detail"]) for r in rejections]


def shown(value: float) -> str:
    return repr(np.float32(value))


def lines_of(content: bytes) -> list[bytes]:
    """The last line may lack its end, or half of it."""
    return (content + b"\n").replace(b"\r\n", b"\n").split(b"\n")


def reference(
    content: bytes, data: DataSettings, parse: Callable[[str], dict[str, object] | Problem], header: bool
) -> tuple[list[Outcome], list[Outcome]]:
    """One line after the other, with no columns anywhere."""
    events: list[Outcome] = []
    rejections: list[Outcome] = []
    offset = -1
    lines = lines_of(content.removeprefix(b"\xef\xbb\xbf"))
    for number, line in enumerate(lines, 1):
        if not line or (header and number == 1):
            continue
        offset += 1
        outcome: Event | Problem
        try:
            record = parse(line.decode())
            outcome = record if isinstance(record, Problem) else decode_record(record, data.events)
        except UnicodeDecodeError:
            outcome = Problem(Reason.INVALID_TEXT, "not utf-8 text; set data.encoding")
        if isinstance(outcome, Problem):
            rejections.append((number, str(outcome.reason), outcome.detail))
        else:
            e = outcome
            events.append((offset, e.user_id, e.item_id, e.label, shown(e.value), e.event_time_ms))
    return events, rejections


def delimited_parser(delimiter: str) -> Callable[[str], dict[str, object] | Problem]:
    def parse(text: str) -> dict[str, object] | Problem:
        fields = text.split(delimiter)
        if len(delimiter) == 1 and '"' in text:
            try:
                (fields,) = csv.reader([text], delimiter=delimiter, strict=True)
            except csv.Error as error:
                detail = f"quoting: {error} (a quoted field ends on its line)"
                return Problem(Reason.MALFORMED_LINE, detail)
        if len(fields) != len(FIELDS):
            detail = f"{len(fields)} fields in place of {len(FIELDS)} fields ({', '.join(FIELDS)})"
            return Problem(Reason.MALFORMED_LINE, detail)
        return dict(zip(FIELDS, fields, strict=True))

    return parse


@st.composite
def delimited_lines(draw: st.DrawFn) -> tuple[str, bytes]:
    delimiter = draw(st.sampled_from([",", "\t", "::", "§", " "]))
    number, time = st.sampled_from(NUMBERS), st.sampled_from(TIMES)
    plain = st.tuples(st.sampled_from(["u1", "u2"]), st.just("i"), st.just("1"), st.just("2.5"), st.just("1000"))
    fuzzed = st.tuples(IDS, IDS, number, number, time)
    odd = st.lists(st.sampled_from(["u", "1", "", '"', "é"]), max_size=7)
    one = st.tuples(plain, fuzzed, st.integers(0, 4)).map(lambda t: (*t[0][: t[2]], t[1][t[2]], *t[0][t[2] + 1 :]))
    line = st.one_of(plain, one, one, fuzzed, odd).map(lambda fields: delimiter.join(fields).encode())
    raw = st.one_of(st.binary(max_size=12), st.text(st.sampled_from('u1,:"\t \r\x0b\0é'), max_size=16).map(str.encode))
    lines = draw(st.lists(st.one_of(line, line, line, raw), min_size=1, max_size=25))
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    return delimiter, end.join(lines) + draw(st.sampled_from([b"", end]))


@given(delimited_lines(), st.sampled_from(["s", "ms", "us", "ns", "iso"]), st.sampled_from(RULES), st.integers(1, 200))
@example((",", b"\xef\xbb\xbfu,i,1,1,1"), "ms", {}, 3)
@example((",", b"u,i,1,1,1\n\r"), "ms", {}, 3)
@example((",", b'"u\n","i,1,1,1\nu,i,1,1,5'), "ms", {}, 200)
@example(("::", b"u\x1fi::1::1::1\nu::i::1::1::1"), "ms", {}, 200)
@example((",", b"u,i,1,1,5.5\nu,i,1,1,-5\nu,i,1,1,7258118400000"), "ms", {}, 200)
@example(("::", b":u::i::1::1::1\nu:::i::1::1::1"), "ms", {}, 200)
def test_delimited_text(drawn: tuple[str, bytes], unit: str, rule: dict[str, object], block_bytes: int) -> None:
    delimiter, body = drawn
    content = delimiter.join(FIELDS).encode() + b"\n" + body
    with TemporaryDirectory() as directory:
        path = Path(directory) / "events.csv"
        path.write_bytes(content)
        rejects = str(Path(directory) / "rejects.jsonl")
        data = settings(path, unit, rule, delimiter=delimiter, **{"rejects.path": rejects})
        if not any(lines_of(body)):
            return
        assert read(data, block_bytes) == reference(content, data, delimited_parser(delimiter), header=True)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, 1, 1.0, 1000, 956712388000, "u", "", " ", "1", "1.5", "nan", [1], {"a": 1}, [], "\ud800"]),
)


@st.composite
def json_lines(draw: st.DrawFn) -> bytes:
    plain = st.fixed_dictionaries(
        {"user_id": st.sampled_from(["u", "v"]), "item_id": st.integers(1, 3), "label": st.integers(0, 1),
         "value": st.floats(0, 5), "event_time_ms": st.integers(0, 10**12)}
    )  # fmt: skip
    fuzzed = st.fixed_dictionaries({}, optional=dict.fromkeys((*FIELDS, "other"), SCALARS))
    one = st.tuples(plain, st.sampled_from(FIELDS), SCALARS).map(lambda t: {**t[0], t[1]: t[2]})
    record = st.one_of(plain, one, one, st.tuples(plain, fuzzed).map(lambda two: {**two[0], **two[1]}), fuzzed)
    line = record.map(lambda r: json.dumps(r).encode())
    raw = st.one_of(st.binary(max_size=12), st.sampled_from([b"{", b"{}", b"[]", b"null", b"1 {}", b"{} {}", b"{}x"]))
    return b"\n".join(draw(st.lists(st.one_of(line, line, line, raw), min_size=1, max_size=25)))


def parse_json(text: str) -> dict[str, object] | Problem:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Problem(Reason.MALFORMED_LINE, str(error))
    return record if isinstance(record, dict) else Problem(Reason.MALFORMED_LINE, "not a JSON object")


def without_detail_of_json(outcomes: tuple[list[Outcome], list[Outcome]]) -> tuple[list[Outcome], list[Outcome]]:
    """Two parsers word a syntax error differently."""
    events, rejections = outcomes
    return events, [r[:2] if r[1] == Reason.MALFORMED_LINE else r for r in rejections]


RECORD = b'{"user_id":"u","item_id":1,"label":1,"value":1,"event_time_ms":1}'


@given(json_lines(), st.sampled_from(["s", "ms", "us", "ns"]), st.sampled_from(RULES), st.integers(1, 500))
@example(b'{"user_id":"u","user_id":"v","item_id":1,"label":1,"value":1,"event_time_ms":1}', "ms", {}, 500)
@example(RECORD + RECORD + b'\n{"user_id":\n' + RECORD + b"}\n", "ms", {}, 500)
@example(RECORD.replace(b'ms":1', b'ms":7258118400000.0'), "ms", {}, 500)
@example(b'{"x":' * 50_000 + b"1" + b"}" * 50_000, "ms", {}, 500)
def test_json_lines(content: bytes, unit: str, rule: dict[str, object], block_bytes: int) -> None:
    known = json.dumps(dict.fromkeys(FIELDS)).encode() + b"\n"  # so that no field is unknown to the file
    content = known + content
    with TemporaryDirectory() as directory:
        path = Path(directory) / "events.jsonl"
        path.write_bytes(content)
        data = settings(path, unit, rule, **{"rejects.path": str(Path(directory) / "rejects.jsonl")})
        expected = reference(content, data, parse_json, header=False)
        assert without_detail_of_json(read(data, block_bytes)) == without_detail_of_json(expected)


def test_the_reference_itself_reads_a_plain_record() -> None:
    data = settings(Path("x.csv"), "s", {"at_least": 4})
    record = {"user_id": "u", "item_id": 7, "label": 4, "value": None, "event_time_ms": 1.5}
    event = decode_record(record, data.events)
    assert isinstance(event, Event)
    assert (event.user_id, event.item_id, event.label, event.event_time_ms) == ("u", "7", 1, 1500)
    assert math.isnan(event.value)
