"""A backtest's files: the JSON's shape, the predictions, the terminal's table."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from configs.settings import Settings
from learner.metrics import Metrics
from streams.results import (
    BacktestResult,
    Protocol,
    ScoredStream,
    Speed,
    StateSize,
    best_baseline,
    results_table,
    write_atomically,
)

SLICES = ("1", "2-5", "6-10", "11-20", "21-50", "51+")


def metrics(auc: float) -> Metrics:
    by_index = dict.fromkeys(SLICES, None) | {"1": auc - 0.05, "2-5": auc}
    interval = {"auc": (auc - 0.01, auc + 0.01), "gauc": (0.5, 0.6), "log_loss": (0.4, 0.5)}
    return Metrics(auc, 0.55, 0.45, 0.02, by_index, interval)


def scored(**changes: object) -> ScoredStream:
    stream = ScoredStream(
        user_ids=("ann", "bob"),
        item_ids=("i1", "i2", "i3"),
        user=np.array([1, 0, 1], np.int32),
        item=np.array([0, 2, 1], np.int32),
        event_time_ms=np.array([10, 20, 20], np.int64),
        offset=np.array([7, 9, 8], np.int64),
        label=np.array([1, 0, 0], np.int8),
        index=np.array([0, 0, 1], np.int64),
        probability=np.array([0.75, 0.5, 0.25], np.float32),
        baselines={"item mean": np.array([0.5, 0.5, 0.125], np.float32), "pooled": np.array([1, 0, 0.5], np.float32)},
    )
    return dataclasses.replace(stream, **changes)  # type: ignore[arg-type]


def backtest(**changes: object) -> BacktestResult:
    result = BacktestResult(
        protocol=Protocol(100, 10, 3, 2, 1_000),
        metrics=metrics(0.8),
        baselines={"item mean": metrics(0.7), "pooled": metrics(0.75)},
        speed=Speed(1.5, 2_000_000.0),
        state=StateSize(2, 928, {"header": 64}),
        versions={"coldstream": "0.1.0", "artifact": "abc"},
        settings=Settings(),
        scored=scored(),
        rejects={"missing label": 2},
        notes=("three rows are missing",),
    )
    return dataclasses.replace(result, **changes)  # type: ignore[arg-type]


def expected_metrics(auc: float) -> dict[str, object]:
    return {
        "auc": auc,
        "gauc": 0.55,
        "log_loss": 0.45,
        "calibration_error": 0.02,
        "by_index": {"1": auc - 0.05, "2-5": auc, "6-10": None, "11-20": None, "21-50": None, "51+": None},
        "ci95": {"auc": [auc - 0.01, auc + 0.01], "gauc": [0.5, 0.6], "log_loss": [0.4, 0.5]},
    }


def test_the_json_has_exactly_the_agreed_keys_and_values(tmp_path: Path) -> None:
    backtest().write_json(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {
        "protocol": {
            "offline_events": 100,
            "offline_users": 10,
            "online_events": 3,
            "online_users": 2,
            "cut_time_ms": 1_000,
        },
        "metrics": expected_metrics(0.8),
        "baselines": {"item mean": expected_metrics(0.7), "pooled": expected_metrics(0.75)},
        "speed": {"train_s": 1.5, "online_events_per_s": 2_000_000.0},
        "state": {"users": 2, "bytes_per_user": 928},
        "versions": {"coldstream": "0.1.0", "artifact": "abc"},
        "rejects": {"missing label": 2},
        "notes": ["three rows are missing"],
        "meta": None,
    }


def test_an_undefined_metric_is_null_in_the_json(tmp_path: Path) -> None:
    undefined = dataclasses.replace(metrics(0.8), gauc=math.nan, ci95={"auc": (math.nan, math.nan)})
    backtest(metrics=undefined).write_json(tmp_path / "result.json")
    document = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert document["metrics"]["gauc"] is None
    assert document["metrics"]["ci95"] == {"auc": [None, None]}


def test_predictions_come_back_from_parquet_in_stream_order(tmp_path: Path) -> None:
    backtest().write_predictions(tmp_path / "predictions.parquet")
    assert pq.read_table(tmp_path / "predictions.parquet").to_pydict() == {
        "user_id": ["bob", "ann", "bob"],
        "item_id": ["i1", "i3", "i2"],
        "event_time_ms": [10, 20, 20],
        "offset": [7, 9, 8],
        "label": [1, 0, 0],
        "index": [0, 0, 1],
        "probability": [0.75, 0.5, 0.25],
        "item mean": [0.5, 0.5, 0.125],
        "pooled": [1.0, 0.0, 0.5],
    }


def test_the_same_predictions_are_the_same_bytes(tmp_path: Path) -> None:
    backtest().write_predictions(tmp_path / "a.parquet")
    backtest().write_predictions(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="column label has 2 rows and column user has 3"):
        scored(label=np.array([1, 0], np.int8))


def test_a_baseline_named_like_a_column_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline 'label' bears the name of a predictions column"):
        scored(baselines={"label": np.zeros(3, np.float32)})


def test_metrics_without_predictions_of_the_same_baseline_are_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics are for baselines \['pooled'\]"):
        backtest(baselines={"pooled": metrics(0.75)})


def test_the_best_baseline_is_that_of_the_highest_auc() -> None:
    assert best_baseline(backtest()) == "pooled"


def test_without_baselines_there_is_no_best() -> None:
    assert best_baseline(backtest(baselines={}, scored=scored(baselines={}))) is None


def test_the_table_shows_intervals_lifts_and_slices() -> None:
    table = results_table(backtest())
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    assert columns == {
        "": ["coldstream", "item mean", "pooled"],
        "AUC ±95%": [".8000 ±.0100", ".7000 ±.0100", ".7500 ±.0100"],
        "lift": ["", "+10.00", "+5.00"],
        "GAUC": [".5500"] * 3,
        "log-loss": [".4500"] * 3,
        "cal. error": [".0200"] * 3,
        "AUC 1": [".7500", ".6500", ".7000"],
        "AUC 2-5": [".8000", ".7000", ".7500"],
        "AUC 6-10": ["–"] * 3,
        "AUC 11-20": ["–"] * 3,
        "AUC 21-50": ["–"] * 3,
        "AUC 51+": ["–"] * 3,
    }


def test_a_name_with_markup_is_printed_as_it_is() -> None:
    hostile = "[bold]x[/nope]"
    console = Console(width=200, record=True, file=None, quiet=False)
    result = backtest(baselines={hostile: metrics(0.7)}, scored=scored(baselines={hostile: np.zeros(3, np.float32)}))
    with console.capture() as capture:
        console.print(results_table(result))
    assert hostile in capture.get()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old", encoding="utf-8")

    def fail(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(target, fail)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"result.json": "old"}
