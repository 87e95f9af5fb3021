"""Records that cannot be used: reasons, the rejects file, and when the run stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.settings import IdRule, LabelRule, TimeRule
from streams.event_schema import read_id, read_label, read_time_ms, read_value
from streams.exceptions import TooManyRejects
from streams.rejects import Problem, Reason
from streams.sources import open_source
from tests.unit.test_sources import HEADER, data_settings, read, written

BAD_LINES = [
    (b"u1,i1,1", "malformed line", "3 fields in place of 4 fields (user_id, item_id, label, event_time_ms)"),
    (b"u1,i1,1,5,6", "malformed line", "5 fields in place of 4 fields (user_id, item_id, label, event_time_ms)"),
    (b'"u1,i1,1,5', "malformed line", "quoting: unexpected end of data (a quoted field ends on its line)"),
    (b"\xff,i1,1,5", "invalid text", "not utf-8 text; set data.encoding"),
    (b",i1,1,5", "empty id", "user_id is empty"),
    (b"u1,  ,1,5", "empty id", "item_id is empty"),
    (b"u1,i1,,5", "missing field", "label is missing"),
    (b"u1,i1,x,5", "wrong type", "label is not a number: 'x'"),
    (b"u1,i1,NaN,5", "not finite", "label is not finite: 'NaN'"),
    (b"u1,i1,-inf,5", "not finite", "label is not finite: '-inf'"),
    (b"u1,i1,1,", "missing field", "event_time_ms is missing"),
    (b"u1,i1,1,soon", "wrong type", "event_time_ms is not a number: 'soon'"),
    (b"u1,i1,1,0x10", "wrong type", "event_time_ms is not a number: '0x10'"),
    (b"u1,i1,1,1_0", "wrong type", "event_time_ms is not a number: '1_0'"),
    (b"u1,i1,1,-1", "time out of range", "event_time_ms '-1' in ms is before 1970"),
    (b"u1,i1,1,7258118400000", "time out of range", "event_time_ms '7258118400000' in ms is after the year 2199"),
    (
        b"u1,i1,1,1700000000000000",
        "time out of range",
        "event_time_ms '1700000000000000' in ms is after the year 2199; in us it is the year 2023: "
        "set data.events.event_time.unit to us?",
    ),
]


def test_each_bad_line_is_written_with_line_and_cause_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [HEADER.strip().encode()]
    for line, _, _ in BAD_LINES:
        lines += [line, b"good,i,1,5"]
    path = written(tmp_path, "a.csv", b"\n".join(lines))
    rejects = tmp_path / "deep" / "rejects.jsonl"
    source = open_source(data_settings(path, rejects__path=str(rejects), rejects__max_share=1))
    assert sum(map(len, source.batches())) == len(BAD_LINES)
    assert [json.loads(text) for text in rejects.read_text().splitlines()] == [
        {"file": str(path), "line": 2 * k + 2, "reason": reason, "detail": detail,
         "raw": line.decode("utf-8", "backslashreplace")}
        for k, (line, reason, detail) in enumerate(BAD_LINES)
    ]  # fmt: skip
    assert (source.rejects.records, source.rejects.count) == (2 * len(BAD_LINES), len(BAD_LINES))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "malformed line"),
        ("[1]", "malformed line"),
        ('{"user_id":"u"} {}', "malformed line"),
        ('{"user_id":"u","item_id":"i","event_time_ms":5}', "missing field"),
        ('{"user_id":null,"item_id":"i","label":1,"event_time_ms":5}', "missing field"),
        ('{"user_id":{"id":1},"item_id":"i","label":1,"event_time_ms":5}', "wrong type"),
        ('{"user_id":true,"item_id":"i","label":1,"event_time_ms":5}', "wrong type"),
        ('{"user_id":1.5,"item_id":"i","label":1,"event_time_ms":5}', "wrong type"),
        ('{"user_id":"\\ud800","item_id":"i","label":1,"event_time_ms":5}', "invalid text"),
        ('{"user_id":"u","item_id":"i","label":NaN,"event_time_ms":5}', "not finite"),
        ('{"user_id":"u","item_id":"i","label":2,"event_time_ms":5}', "label outside the rule"),
        ('{"user_id":"u","item_id":"i","label":[1],"event_time_ms":5}', "wrong type"),
        ('{"user_id":"u","item_id":"i","label":1,"event_time_ms":true}', "wrong type"),
        ('{"user_id":"u","item_id":"i","label":1,"event_time_ms":Infinity}', "not finite"),
        ('{"user_id":"u","item_id":"i","label":1,"event_time_ms":1e300}', "time out of range"),
        ('{"user_id":"u","item_id":"i","label":1,"event_time_ms":123456789012345678901234567890}', "time out of range"),
    ],
)
def test_bad_json_records_beside_a_good_one(tmp_path: Path, record: str, reason: str) -> None:
    good = '{"user_id":"u","item_id":"i","label":1,"event_time_ms":5}'
    path = written(tmp_path, "a.jsonl", f"{good}\n{record}\n{good}\n")
    source = open_source(data_settings(path, rejects__max_share=1))
    assert sum(map(len, source.batches())) == 2
    assert source.rejects.summary()["by_reason"] == {reason: 1}
    assert source.rejects.first is not None
    assert (source.rejects.first.line, source.rejects.first.raw) == (2, record)


def test_a_record_over_two_lines_is_two_bad_lines(tmp_path: Path) -> None:
    good = '{"user_id":"u","item_id":"i","label":1,"event_time_ms":5}'
    path = written(tmp_path, "a.jsonl", f'{good} {good}\n{good}\n{{"user_id":"u","x":\n{{}}}}\n')
    source = open_source(data_settings(path, rejects__max_share=1))
    assert sum(map(len, source.batches())) == 1
    assert source.rejects.summary()["by_reason"] == {"malformed line": 3}


def test_a_share_above_the_bound_stops_the_run_at_the_end_with_counts_and_example(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", HEADER + "u,i,3,5\n" + "u,i,1,5\n" * 49 + ",i,1,5\n")
    with pytest.raises(TooManyRejects) as caught:
        read(path)
    assert str(caught.value) == (
        "2 of 51 records cannot be used (3.9%, data.rejects.max_share is 1.0%): 1 label outside the rule, 1 empty id; "
        f"first: {path} line 2: label outside the rule: label must be 0, 1, true or false, not '3'; or set "
        "data.events.label: {field: label, at_least: …}: 'u,i,3,5'; set data.rejects.path to have them written; "
        "check the mapping under data.events, or raise data.rejects.max_share"
    )


def test_a_long_run_stops_as_soon_as_the_share_is_clear(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", HEADER + "u,i,3,5\n" * 1_000_000)
    source = open_source(data_settings(path))
    with pytest.raises(TooManyRejects):
        list(source.batches())
    assert 1_000 <= source.rejects.records < 1_000_000


def test_a_share_at_the_bound_goes_on(tmp_path: Path) -> None:
    assert len(read(written(tmp_path, "a.csv", HEADER + "u,i,3,5\n" + "u,i,1,5\n" * 99))) == 99


def test_raw_text_is_capped(tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.jsonl"
    path = written(tmp_path, "a.csv", HEADER + "x" * 9_999 + "\n")
    source = open_source(data_settings(path, rejects__path=str(rejects), rejects__max_share=1))
    assert list(source.batches()) == [] or sum(map(len, source.batches())) == 0
    assert json.loads(rejects.read_text())["raw"] == "x" * 500


def test_a_pass_without_rejects_leaves_no_file_of_an_earlier_one(tmp_path: Path) -> None:
    rejects = written(tmp_path, "rejects.jsonl", "old\n")
    read(written(tmp_path, "a.csv", HEADER + "u,i,1,5\n"), rejects__path=str(rejects))
    assert not rejects.exists()


def test_scalars() -> None:
    assert read_id(12.0, IdRule(field="u", prefix="p-")) == "p-12"
    assert read_id(2**70, IdRule(field="u")) == str(2**70)
    assert read_label(True, LabelRule(field="y")) == 1
    assert read_label("TRUE", LabelRule(field="y", equals="TRUE")) == 1
    assert read_label(True, LabelRule(field="y", equals="true")) == 1
    assert read_value("1e39", "v") == Problem(Reason.NOT_FINITE, "v is too large: '1e39'")
    assert read_time_ms("9" * 5000, TimeRule(field="t", unit="ns")) == Problem(
        Reason.NOT_FINITE, "t is not finite: '" + "9" * 58 + "…"
    )
