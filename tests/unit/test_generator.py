"""The generated stream: the same bytes for the same settings, and a truth that holds."""

from __future__ import annotations

import csv
import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from numpy.typing import NDArray
from typer.testing import CliRunner

from configs.loading import load_settings
from streams.commands.generate import generate
from streams.generation.best_auc import AucHistogram
from streams.generation.events import BLOCK, GRADE_CUTS, SPAN_MS, START_MS, EventBatch, EventStream
from streams.generation.files import ROW_GROUP, Columns, EventTable, write_events
from streams.generation.settings import FileFormat, GeneratorError, GeneratorSettings
from streams.generator import write_dataset

SMALL = GeneratorSettings(users=100, items=50, events=2_000)
COLUMNS = ("user", "item", "label", "value", "event_time_ms", "probability")


def events_of(settings: GeneratorSettings) -> EventBatch:
    return joined(list(EventStream(settings).batches()))


def joined(batches: list[EventBatch]) -> EventBatch:
    return EventBatch(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in COLUMNS))


def exact_auc(label: NDArray[np.int8], score: NDArray[np.float64]) -> float:
    """Mann-Whitney's statistic from ranks; the ranks of equal scores are averaged."""
    _, code, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[code]
    positives = int(label.sum())
    return float((rank[label == 1].sum() - positives * (positives + 1) / 2) / positives / (len(label) - positives))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The same bytes


@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet"])
def test_the_same_settings_give_the_same_bytes_and_another_seed_gives_others(
    tmp_path: Path, file_format: FileFormat
) -> None:
    for name, seed in (("first", 7), ("second", 7), ("third", 8)):
        settings = GeneratorSettings(users=100, items=50, events=2_000, seed=seed)
        write_dataset(tmp_path / name, settings, file_format=file_format)
    for file in (f"events.{file_format}", "users.csv", "items.csv", "truth.json"):
        first, second, third = (digest(tmp_path / name / file) for name in ("first", "second", "third"))
        assert first == second, file
        assert first != third, file


def test_the_stream_of_known_settings_has_its_known_bytes(tmp_path: Path) -> None:
    """Figures in the documentation stand on these bytes: a change here is a change of every generated data set."""
    write_dataset(tmp_path, SMALL)
    assert (tmp_path / "events.csv").read_text().splitlines()[:3] == GOLDEN_LINES
    assert digest(tmp_path / "events.csv") == GOLDEN_EVENTS
    assert digest(tmp_path / "users.csv") == GOLDEN_USERS
    assert digest(tmp_path / "items.csv") == GOLDEN_ITEMS


GOLDEN_LINES = ["user_id,item_id,label,event_time_ms", "u20,i4,0,1704068233989", "u11,i4,0,1704071895053"]
GOLDEN_EVENTS = "ba54bca74bdaf8536f3e10be0c5e626fb8d5cdc991cc8b261957b183c3a17e5d"
GOLDEN_USERS = "520fe035f606b44ccc7fd4a7a68583c73b1831952cedfe2a81da4a8e9721a167"
GOLDEN_ITEMS = "0f2cf6a298a575ef6ab0704eaec2bf2b9f00b40f516ae534d2379501b49e05d2"


@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet"])
def test_how_the_stream_is_cut_leaves_no_trace_in_the_file(tmp_path: Path, file_format: FileFormat) -> None:
    stream = EventStream(GeneratorSettings(events=ROW_GROUP + BLOCK + 1_000))
    table = EventTable(stream)

    def write(name: str, cuts: list[int]) -> str:
        def columns() -> list[Columns]:
            return [table.columns(batch) for start, stop in pairwise(cuts) for batch in stream.batches(start, stop)]

        write_events(tmp_path / name, file_format, columns())
        return digest(tmp_path / name)

    whole = write("whole", [0, len(stream)])
    assert write("cut", [0, 1, 777, BLOCK, BLOCK + 5, ROW_GROUP - 1, len(stream)]) == whole


def test_any_slice_equals_the_same_rows_of_the_whole() -> None:
    stream = EventStream(GeneratorSettings(events=2 * BLOCK + 100))
    whole = joined(list(stream.batches()))
    part = joined(list(stream.batches(BLOCK - 3, BLOCK + 40)))
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[BLOCK - 3 : BLOCK + 40], err_msg=name)


# The planted truth


@pytest.mark.parametrize("zipf", [0.0, 0.8, 1.1])
def test_activity_falls_with_rank_by_the_zipf_exponent(zipf: float) -> None:
    stream = EventStream(GeneratorSettings(users=200, events=2_000_000, zipf=zipf, lifetime=1.0))
    batch = joined(list(stream.batches(1_000_000, 1_200_000)))
    counts = np.bincount(batch.user, minlength=200)
    rank = 1 + np.argsort(np.argsort(-stream.users.activity, kind="stable"))
    # Those who are there from the first of these events to the last, half to six tenths through, share them by rate.
    throughout = (stream.users.arrival < 0.5) & (stream.users.arrival + 1 > 0.6)
    assert throughout.sum() == 90
    slope = np.polyfit(np.log(rank[throughout]), np.log(counts[throughout]), 1)[0]
    assert slope == pytest.approx(-zipf, abs=0.02)


def test_users_arrive_evenly_over_the_whole_span_and_leave_after_their_lifetime() -> None:
    settings = GeneratorSettings(users=1_000, events=200_000, zipf=0.0, lifetime=0.25)
    batch = events_of(settings)
    position = (batch.event_time_ms - START_MS) / SPAN_MS
    users, first = np.unique(batch.user, return_index=True)
    # 1,000 users over 1.25 spans: 200 are there at the start, then 80 come in each tenth of the span.
    arrived = np.searchsorted(np.sort(position[first]), np.arange(1, 10) / 10)
    np.testing.assert_allclose(arrived, 200 + 80 * np.arange(1, 10), atol=5)
    last = np.zeros(settings.users)
    np.maximum.at(last, batch.user, position)
    assert (last[users] - position[first]).max() <= 0.25 + 1e-9


def test_times_do_not_fall_and_fill_the_span() -> None:
    times = events_of(SMALL).event_time_ms
    assert (np.diff(times) >= 0).all()
    assert START_MS <= times[0] < START_MS + SPAN_MS // 1_000
    assert START_MS + SPAN_MS - SPAN_MS // 1_000 <= times[-1] < START_MS + SPAN_MS


def test_an_item_is_seen_only_once_it_has_arrived() -> None:
    stream = EventStream(GeneratorSettings(events=50_000))
    batch = joined(list(stream.batches()))
    position = (batch.event_time_ms + 1 - START_MS) / SPAN_MS
    assert (stream.items.arrival[batch.item] <= position).all()
    assert (stream.items.arrival > 0).sum() == 600


def test_abrupt_drift_changes_the_tastes_from_the_stated_time_on_and_nothing_before() -> None:
    still = events_of(GeneratorSettings(events=100_000))
    drifting = events_of(GeneratorSettings(events=100_000, drift="abrupt", drift_at=0.6))
    before = still.event_time_ms < START_MS + int(0.6 * SPAN_MS)
    np.testing.assert_array_equal(drifting.user, still.user)
    np.testing.assert_array_equal(drifting.item, still.item)
    np.testing.assert_array_equal(drifting.probability[before], still.probability[before])
    assert (drifting.probability[~before] != still.probability[~before]).all()


def test_gradual_drift_begins_at_the_stated_time_and_ends_at_the_new_tastes() -> None:
    still, gradual, abrupt = (
        events_of(GeneratorSettings(events=100_000, drift=drift, drift_at=at))
        for drift, at in (("none", None), ("gradual", 0.5), ("abrupt", 0.5))
    )

    def distance(other: EventBatch, rows: slice) -> float:
        return float(np.abs(gradual.probability[rows] - other.probability[rows]).mean())

    assert distance(still, slice(0, 50_000)) == 0
    assert distance(still, slice(50_000, 50_100)) < 0.002
    assert distance(abrupt, slice(99_900, 100_000)) < 0.002
    assert distance(still, slice(60_000, 70_000)) < distance(still, slice(80_000, 90_000))


def test_labels_come_up_as_often_as_their_probabilities_say() -> None:
    batch = events_of(GeneratorSettings(events=500_000, label_noise=0.1))
    decile = (batch.probability * 10).astype(int)
    for tenth in range(1, 9):
        rows = decile == tenth
        assert batch.label[rows].mean() == pytest.approx(batch.probability[rows].mean(), abs=0.01)
    assert decile.min() == 1
    assert decile.max() == 8


def test_the_label_is_one_exactly_from_value_four_on() -> None:
    batch = events_of(GeneratorSettings(events=50_000, label_noise=0.2))
    np.testing.assert_array_equal(batch.label, batch.value >= 4)
    assert sorted(set(batch.value.tolist())) == [1, 2, 3, 4, 5]
    assert len(GRADE_CUTS) == 4


# The truth file


@pytest.mark.parametrize("drift", ["none", "abrupt"])
def test_best_scores_equal_a_recomputation_from_the_whole_stream(tmp_path: Path, drift: str) -> None:
    settings = GeneratorSettings(events=150_000, drift="abrupt" if drift == "abrupt" else "none", label_noise=0.05)
    truth = json.loads(json.dumps(write_dataset(tmp_path, settings)))
    batch = events_of(settings)
    first_ms = np.full(settings.users, np.iinfo(np.int64).max)
    np.minimum.at(first_ms, batch.user, batch.event_time_ms)
    seen = np.sort(first_ms[first_ms < np.iinfo(np.int64).max])
    online_from_ms = seen[len(seen) * 7 // 10]
    online = first_ms[batch.user] >= online_from_ms

    assert truth["all"]["best_auc"] == pytest.approx(exact_auc(batch.label, batch.probability), abs=1e-6)
    assert truth["online"]["best_auc"] == pytest.approx(
        exact_auc(batch.label[online], batch.probability[online]), abs=1e-6
    )
    assert truth["online"]["from_ms"] == online_from_ms
    assert truth["online"]["events"] == online.sum()
    assert truth["online"]["users"] == (seen >= online_from_ms).sum()
    assert truth["clicks"] == batch.label.sum()
    assert truth["users"] == len(seen)
    own = np.where(batch.label == 1, batch.probability, 1 - batch.probability)
    assert truth["all"]["best_log_loss"] == pytest.approx(-np.log(own).mean(), abs=1e-6)
    assert truth == json.loads((tmp_path / "truth.json").read_text())


def test_the_best_auc_of_the_standard_stream_leaves_room_to_learn(tmp_path: Path) -> None:
    truth = write_dataset(tmp_path, GeneratorSettings())
    assert truth["all"] == {"events": 200_000, "best_auc": 0.824246, "best_log_loss": 0.511251}
    assert truth["online"] == {
        "offline_fraction": 0.7, "from_ms": 1_708_717_643_346, "users": 595,
        "events": 44_280, "best_auc": 0.831685, "best_log_loss": 0.502184,
    }  # fmt: skip


def test_ties_count_half_and_one_label_alone_has_no_auc() -> None:
    histogram = AucHistogram()
    histogram.add(np.array([1, 1], np.int8), np.array([0.5, 1.0]))
    assert histogram.auc() is None
    histogram.add(np.array([0, 0], np.int8), np.array([0.5, 0.0]))
    # Pairs (positive, negative): .5/.5 ties, .5/0, 1/.5 and 1/0 are won.
    assert histogram.auc() == 3.5 / 4
    assert histogram.events == 4


# The files


def test_all_formats_hold_the_same_events(tmp_path: Path) -> None:
    settings = GeneratorSettings(users=100, items=50, events=500, graded=True)
    for file_format in ("csv", "jsonl", "parquet"):
        write_dataset(tmp_path / file_format, settings, file_format=file_format)
    with (tmp_path / "csv" / "events.csv").open() as file:
        from_csv = [
            {name: text if name.endswith("_id") else int(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]
    lines = (tmp_path / "jsonl" / "events.jsonl").read_text().splitlines()
    assert from_csv == [json.loads(line) for line in lines]
    assert from_csv == pq.read_table(tmp_path / "parquet" / "events.parquet").to_pylist()
    batch = events_of(settings)
    assert [row["user_id"] for row in from_csv] == [f"u{number + 1}" for number in batch.user]
    assert [row["item_id"] for row in from_csv] == [f"i{number + 1}" for number in batch.item]
    assert [row["value"] for row in from_csv] == batch.value.tolist()


def test_events_without_grades_have_no_value_column(tmp_path: Path) -> None:
    write_dataset(tmp_path, SMALL)
    assert (tmp_path / "events.csv").read_text().splitlines()[0] == "user_id,item_id,label,event_time_ms"
    assert "value" not in yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["events"]


def test_catalogues_list_everybody_once_in_order_of_arrival(tmp_path: Path) -> None:
    write_dataset(tmp_path, SMALL)
    with (tmp_path / "users.csv").open() as file:
        assert [row["user_id"] for row in csv.DictReader(file)] == [f"u{n}" for n in range(1, 101)]
    with (tmp_path / "items.csv").open() as file:
        items = list(csv.DictReader(file))
    assert [row["item_id"] for row in items] == [f"i{n}" for n in range(1, 51)]
    assert {len(row["tags"].split("|")) for row in items} == {1, 2, 3}


@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet"])
def test_the_config_beside_the_events_is_valid_and_names_the_files(tmp_path: Path, file_format: FileFormat) -> None:
    write_dataset(tmp_path, GeneratorSettings(users=100, events=500, graded=True), file_format=file_format)
    data = load_settings(str(tmp_path / "config.yaml"), environ={}).data
    assert data.paths == (tmp_path / f"events.{file_format}",)
    assert data.users.path == tmp_path / "users.csv"
    assert data.items.path == tmp_path / "items.csv"
    assert data.events.value is not None
    assert [(name, rule.kind) for name, rule in data.items.features.items()] == [
        ("category", "categorical"),
        ("tags", "multi"),
        ("quality", "numeric"),
    ]


def test_a_failed_write_leaves_no_half_file(tmp_path: Path) -> None:
    def broken() -> list[Columns]:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_events(tmp_path / "events.csv", "csv", (columns for columns in broken()))
    assert list(tmp_path.iterdir()) == []


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"events": 0}, "--events is 0: it has to be at least 1"),
        ({"items": 0}, "--items is 0: it has to be at least 1"),
        ({"users": 10}, "--users is 10: it has to be at least 19 for a lifetime of 0.35"),
        ({"zipf": -1.0}, "--zipf is -1.0: it has to be from 0 (uniform) to 4"),
        ({"zipf": float("nan")}, "--zipf is nan: it has to be from 0 (uniform) to 4"),
        ({"lifetime": 0.0}, "--lifetime is 0.0: it has to be a share of the span, above 0 and at most 1"),
        ({"label_noise": 0.6}, "--label-noise is 0.6: it has to be from 0 to 0.5 (labels by the coin)"),
        ({"drift": "abrupt", "drift_at": 1.5}, "--drift-at is 1.5: it has to be a share of the span, from 0 to 1"),
        ({"drift_at": 0.5}, "--drift-at is 0.5: it has to be left out unless --drift is given"),
        ({"seed": -1}, "--seed is -1: it has to be 0 or more"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(GeneratorError) as caught:
        GeneratorSettings(**arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message


# The command


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(generate)
    return app


def test_the_command_writes_what_its_options_ask_and_prints_the_truth(tmp_path: Path, command: typer.Typer) -> None:
    out = tmp_path / "stream"
    arguments = "--users 100 --items 50 --events 500 --zipf 1.1 --lifetime 0.5 --drift gradual --drift-at 0.4"
    arguments += f" --label-noise 0.1 --graded --seed 3 --format jsonl --json --out {out}"
    result = CliRunner().invoke(command, arguments.split())
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((out / "truth.json").read_text())
    assert json.loads(result.stdout)["settings"] == {
        "users": 100, "items": 50, "events": 500, "zipf": 1.1, "lifetime": 0.5, "drift": "gradual",
        "drift_at": 0.4, "label_noise": 0.1, "graded": True, "seed": 3,
    }  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml", "events.jsonl", "items.csv", "truth.json", "users.csv",
    ]  # fmt: skip
    assert len((out / "events.jsonl").read_text().splitlines()) == 500


def test_the_command_refuses_to_overwrite_unless_told_to(tmp_path: Path, command: typer.Typer) -> None:
    (tmp_path / "config.yaml").write_text("mine: true\n")
    arguments = ["--out", str(tmp_path), "--users", "100", "--events", "500"]
    refused = CliRunner().invoke(command, arguments)
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"error: {tmp_path} already holds config.yaml: name another directory, or overwrite them (--overwrite)\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert CliRunner().invoke(command, [*arguments, "--overwrite"]).exit_code == 0
    assert "data" in yaml.safe_load((tmp_path / "config.yaml").read_text())


def test_the_command_reports_a_bad_argument_in_one_line(tmp_path: Path, command: typer.Typer) -> None:
    result = CliRunner().invoke(command, ["--out", str(tmp_path), "--label-noise", "0.9"])
    assert result.exit_code == 2
    assert result.stderr == "error: --label-noise is 0.9: it has to be from 0 to 0.5 (labels by the coin)\n"


def test_the_command_says_where_it_cannot_write(tmp_path: Path, command: typer.Typer) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(command, ["--out", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert result.stderr == f"error: cannot write to {tmp_path / 'file'}: File exists\n"
