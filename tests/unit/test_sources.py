"""Events from files of every format."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.loading import load_settings
from configs.settings import DataSettings
from learner.interactions import Interactions
from streams import text_blocks
from streams.exceptions import EmptyFile, MissingFile, NoInput, SourceError, UnknownColumn, UnknownFormat, UnusableFile
from streams.sources import open_source

HEADER = "user_id,item_id,label,event_time_ms\n"


def data_settings(*paths: Path, **overrides: object) -> DataSettings:
    dotted = {f"data.{name.replace('__', '.')}": value for name, value in overrides.items()}
    return load_settings(None, {"data.paths": [str(p) for p in paths], **dotted}, {}).data


def written(directory: Path, name: str, content: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(batches: list[Interactions]) -> list[tuple[str, str, int, int]]:
    """(user, item, label, time) of each event."""
    return [
        (b.user_ids[b.user[k]], b.item_ids[b.item[k]], int(b.label[k]), int(b.event_time_ms[k]))
        for b in batches
        for k in range(len(b))
    ]


def read(*paths: Path, **overrides: object) -> list[tuple[str, str, int, int]]:
    return rows(list(open_source(data_settings(*paths, **overrides)).batches()))


def offsets(*paths: Path, **overrides: object) -> list[int]:
    return [int(o) for b in open_source(data_settings(*paths, **overrides)).batches() for o in b.offset]


TWO = [("u1", "i1", 1, 1000), ("u2", "i1", 0, 2000)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", HEADER + "u1,i1,1,1000\nu2,i1,0,2000\n"),
        ("crlf.csv", (HEADER + "u1,i1,1,1000\nu2,i1,0,2000\n").replace("\n", "\r\n")),
        ("bom.csv", b"\xef\xbb\xbf" + HEADER.encode() + b"u1,i1,1,1000\nu2,i1,0,2000\n"),
        ("no_end.csv", HEADER + "u1,i1,1,1000\nu2,i1,0,2000"),
        ("empty_lines.csv", "\n" + HEADER + "\nu1,i1,1,1000\n\n\nu2,i1,0,2000\n\n"),
        ("other_order.csv", "x,event_time_ms,label,item_id,user_id\n,1000,true,i1,u1\nz,2000,FALSE,i1,u2\n"),
        ("a.tsv", HEADER.replace(",", "\t") + "u1\ti1\t1\t1000\nu2\ti1\t0\t2000\n"),
        ("quoted.csv", HEADER + '"u1","i1",1,1000\nu2,"i1","0",2000\n'),
        ("a.jsonl", '{"user_id":"u1","item_id":"i1","label":1,"event_time_ms":1000}\n'
                    '{"label":false,"user_id":"u2","item_id":"i1","event_time_ms":2000.0,"x":{"y":[1]}}\n'),
        ("numbers_as_text.ndjson", '{"user_id":"u1","item_id":"i1","label":"1","event_time_ms":"1000"}\n'
                                   '{"user_id":"u2","item_id":"i1","label":0.0,"event_time_ms":2e3}'),
    ],
)  # fmt: skip
def test_every_layout_gives_the_same_events(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert read(written(tmp_path, name, content)) == TWO


@pytest.mark.parametrize("delimiter", ["::", "|", ";", " ", "§", "<=>", "\t"])
def test_any_delimiter(tmp_path: Path, delimiter: str) -> None:
    lines = [HEADER.strip().split(","), ["u1", "i1", "1", "1000"], ["u2", "i1", "0", "2000"]]
    path = written(tmp_path, "a.csv", "\n".join(delimiter.join(line) for line in lines))
    assert read(path, delimiter=delimiter) == TWO


def test_a_long_delimiter_survives_the_character_that_stands_for_it(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", HEADER.replace(",", "::") + "u\x1f1::i1::1::1000\n")
    assert read(path, delimiter="::") == [("u\x1f1", "i1", 1, 1000)]


def test_a_file_without_header_takes_its_names_from_the_settings(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "u1,i1,1,1000\nu2,i1,0,2000\n")
    assert read(path, columns="[user_id, item_id, label, event_time_ms]") == TWO


def test_names_in_the_settings_replace_a_header_that_is_there(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "a,b,c,d\nu1,i1,1,1000\nu2,i1,0,2000\n")
    assert read(path, columns="[user_id, item_id, label, event_time_ms]", header=True) == TWO


@pytest.mark.parametrize("user", ["u\r", "v\rw"])
def test_a_carriage_return_that_ends_no_line_is_text(tmp_path: Path, user: str) -> None:
    path = written(tmp_path, "a.csv", f"item_id,label,event_time_ms,user_id\ni,1,5,{user}\r\n")
    assert read(path) == [(user, "i", 1, 5)]


def test_quoted_fields_hold_delimiters_and_quotes(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", HEADER + '"a,b","say ""hi""",1,1000\n')
    assert read(path) == [("a,b", 'say "hi"', 1, 1000)]


def test_other_encodings(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", (HEADER + "é,ü,1,1000\n").encode("latin-1"))
    assert read(path, encoding="latin-1") == [("é", "ü", 1, 1000)]


def test_several_files_share_one_count_of_offsets(tmp_path: Path) -> None:
    a = written(tmp_path, "a.csv", HEADER + "u1,i1,1,1000\n,i1,1,1000\n")
    b = written(tmp_path, "b.csv", HEADER + "\nu2,i1,0,2000\nu3,i1,0,2000\n")
    assert read(a, b, rejects__max_share=1) == [*TWO, ("u3", "i1", 0, 2000)]
    assert offsets(a, b, rejects__max_share=1) == [0, 2, 3]


def test_a_directory_gives_its_files_by_name(tmp_path: Path) -> None:
    written(tmp_path, "2.csv", HEADER + "u2,i1,0,2000\n")
    written(tmp_path, "1.csv", HEADER + "u1,i1,1,1000\n")
    written(tmp_path, "README", "not events")
    assert read(tmp_path) == TWO


def test_blocks_smaller_than_a_line_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "a.csv", HEADER + "u1,i1,1,1000\nu2,i1,0,2000\n")
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", 3)
    assert read(path) == TWO
    assert offsets(path) == [0, 1]


def test_batches_hold_at_most_65536_events_and_their_own_ids(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "u,i,y,t\n" + "".join(f"{k // 65536},i,1,{k}\n" for k in range(65_536 + 5)))
    fields = {"user_id": "u", "item_id": "i", "label": "y", "event_time": "t"}
    overrides = {f"events__{name}__field": column for name, column in fields.items()}
    batches = list(open_source(data_settings(path, **overrides)).batches())
    assert max(map(len, batches)) <= 65_536
    assert sum(map(len, batches)) == 65_541
    assert all(b.user_ids == tuple(dict.fromkeys(b.user_ids[c] for c in b.user)) for b in batches)


def test_batches_can_be_read_again(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", HEADER + "u1,i1,1,1000\n,i,1,5\n")
    source = open_source(data_settings(path, rejects__max_share=1))
    first, again = rows(list(source.batches())), rows(list(source.batches()))
    assert first == again == [("u1", "i1", 1, 1000)]
    assert source.rejects.summary() == {"records": 2, "rejected": 1, "by_reason": {"empty id": 1}}


def test_stopping_early_ends_the_reading_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", 64)
    source = open_source(data_settings(written(tmp_path, "a.csv", HEADER + "u1,i1,1,1000\n" * 1000)))
    batches = source.batches()
    next(batches)
    batches.close()  # type: ignore[attr-defined]  # a generator
    assert [t.name for t in threading.enumerate() if t.name == "prefetch"] == []


@pytest.mark.parametrize(
    ("unit", "text", "expected_ms"),
    [
        ("s", "956712388", 956_712_388_000),
        ("s", "1.001", 1001),
        ("s", " 7 ", 7000),
        ("ms", "1000", 1000),
        ("us", "1999", 1),
        ("ns", "1700000000000000000", 1_700_000_000_000),
        ("iso", "2020-01-01T00:00:00Z", 1_577_836_800_000),
        ("iso", "2020-01-01 01:00:00+01:00", 1_577_836_800_000),
        ("iso", "2020-01-01T00:00:00.0019", 1_577_836_800_001),
        ("iso", "2020-01-01", 1_577_836_800_000),
    ],
)
def test_units_of_time(tmp_path: Path, unit: str, text: str, expected_ms: int) -> None:
    path = written(tmp_path, "a.csv", HEADER + f"u,i,1,{text}\n")
    assert read(path, events__event_time__unit=unit) == [("u", "i", 1, expected_ms)]


@pytest.mark.parametrize(
    ("rule", "texts", "labels"),
    [
        ({"at_least": 4}, ["3.9", "4", "5"], [0, 1, 1]),
        ({"at_most": 2}, ["2", "2.5", "-1"], [1, 0, 1]),
        ({"equals": "like"}, ["like", "skip", "Like"], [1, 0, 0]),
        ({"equals": 5}, ["5", "5.0", "50"], [1, 1, 0]),
        ({}, ["1", "0", "1.0"], [1, 0, 1]),
    ],
)
def test_label_rules(tmp_path: Path, rule: dict[str, object], texts: list[str], labels: list[int]) -> None:
    path = written(tmp_path, "a.csv", HEADER + "".join(f"u,i,{text},5\n" for text in texts))
    overrides = {f"events__label__{name}": value for name, value in rule.items()}
    assert [label for _, _, label, _ in read(path, **overrides)] == labels


def test_values_prefixes_and_features_inside_events(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "a.jsonl",
        '{"user_id":1,"item_id":7,"label":1,"event_time_ms":1,"stars":4.5,"age":30,"tags":["x","y"]}\n'
        '{"user_id":1,"item_id":8,"label":0,"event_time_ms":2,"stars":null,"age":31}\n'
        '{"user_id":2,"item_id":7,"label":0,"event_time_ms":3,"tags":["z"],"age":null}\n',
    )
    data = data_settings(
        path,
        events__user_id__prefix="u:",
        events__value__field="stars",
        events__user_features={"years": {"kind": "numeric", "field": "age"}},
        events__item_features={"tags": {"kind": "multi"}},
    )
    (batch,) = open_source(data).batches()
    assert batch.user_ids == ("u:1", "u:2")
    assert batch.item_ids == ("7", "8")
    np.testing.assert_array_equal(batch.value, np.array([4.5, np.nan, np.nan], np.float32))
    assert batch.user_features == {"years": ("30", None)}
    assert batch.item_features == {"tags": ("x|y", None)}


def test_parquet_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": pa.array([1, 2], pa.int64()),
            "item_id": pa.array(["i1", "i1"]).dictionary_encode(),
            "label": pa.array([True, False]),
            "event_time_ms": pa.array([datetime(2020, 1, 1, tzinfo=UTC)] * 2, pa.timestamp("us", "Europe/Paris")),
            "value": pa.array([0.5, None], pa.float32()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (batch,) = open_source(data_settings(tmp_path / "a.parquet", events__value__field="value")).batches()
    assert rows([batch]) == [("1", "i1", 1, 1_577_836_800_000), ("2", "i1", 0, 1_577_836_800_000)]
    np.testing.assert_array_equal(batch.value, np.array([0.5, np.nan], np.float32))


def test_whole_parquet_ids_that_gaps_turned_into_floats(tmp_path: Path) -> None:
    table = pa.table({"user_id": [1.0, None], "item_id": ["a", "b"], "label": [1, 1], "event_time_ms": [1.0, 2.0]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(data_settings(tmp_path / "a.parquet", rejects__max_share=1))
    assert rows(list(source.batches())) == [("1", "a", 1, 1)]
    assert source.rejects.summary()["by_reason"] == {"missing field": 1}


def test_of_a_json_key_given_twice_the_last_counts(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"user_id":"a","item_id":"i","label":1,"event_time_ms":1,"user_id":"b"}\n')
    assert read(path) == [("b", "i", 1, 1)]


def test_an_optional_value_may_be_missing_from_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", HEADER + "u1,i1,1,1000\n")
    assert read(path, events__value={"field": "value", "optional": True}) == TWO[:1]
    with pytest.raises(UnknownColumn, match=r"no column 'value' for data.events.value.field"):
        read(path, events__value={"field": "value"})


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_an_unknown_column_is_named_with_the_nearest(tmp_path: Path, name: str) -> None:
    record = {"userid": "u", "item_id": "i", "label": 1, "event_time_ms": 1}
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps(record) + "\n" if name == "a.jsonl" else ",".join(record) + "\nu,i,1,1\n")
    with pytest.raises(UnknownColumn) as caught:
        open_source(data_settings(path))
    hint = "; or data.delimiter, or data.header: false with data.columns if the first line is an event"
    assert str(caught.value) == (
        f"{path}: no column 'user_id' for data.events.user_id.field, nearest: 'userid'; the file has: userid, "
        f"item_id, label, event_time_ms; set data.events.user_id.field{hint if name == 'a.csv' else ''}"
    )


def test_errors_about_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NoInput, match=r"data.paths is empty"):
        open_source(data_settings())
    with pytest.raises(MissingFile, match=r"no such file; data.paths is relative to"):
        open_source(data_settings(tmp_path / "nowhere.csv"))
    with pytest.raises(MissingFile, match="the directory holds none of"):
        open_source(data_settings(tmp_path))
    with pytest.raises(EmptyFile, match="the file is empty"):
        open_source(data_settings(written(tmp_path, "a.csv", "")))
    with pytest.raises(EmptyFile, match="no events; write some"):
        read(written(tmp_path, "b.csv", HEADER))
    with pytest.raises(UnknownFormat, match=r"set data.format to delimited, jsonl or parquet"):
        open_source(data_settings(written(tmp_path, "events.dat", "x")))
    with pytest.raises(UnknownFormat, match="not MovieLens as published"):
        open_source(data_settings(tmp_path / "a.csv", format="movielens"))
    with pytest.raises(UnusableFile, match="not a Parquet file"):
        open_source(data_settings(written(tmp_path, "a.parquet", "text")))
    with pytest.raises(UnusableFile, match=r"name them in order under data.columns"):
        open_source(data_settings(written(tmp_path, "c.csv", "u,i,1,5\n"), header=False))
    with pytest.raises(UnusableFile, match="names a, b twice"):
        open_source(data_settings(written(tmp_path, "d.csv", "a,b,a,b\n")))
    path = written(tmp_path, "e.csv", HEADER)
    with pytest.raises(SourceError, match="would be overwritten"):
        open_source(data_settings(path, rejects__path=str(path)))
    nested = pa.table({"user_id": [{"a": 1}], "item_id": [1], "label": [1], "event_time_ms": [1]})
    pq.write_table(nested, tmp_path / "n.pq")
    with pytest.raises(UnusableFile, match="column 'user_id' is nested"):
        read(tmp_path / "n.pq")


def test_times_in_1970_warn_of_a_wrong_unit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "a.csv", HEADER + "u,i,1,956712388\n")
    read(path)
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: the first events lie in 1970; in s it is the year 2000: set data.events.event_time.unit to s?"
    ]
