"""What a backtest found: the scored stream, the metrics, and the files made of them.

Symbols: N scored events, U users and I items of the online stream, B baselines.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from configs.settings import Settings
from learner.metrics import Metrics
from streams.meta.result import MetaResult

PREDICTION_COLUMNS = ("user_id", "item_id", "event_time_ms", "offset", "label", "index", "probability")
"""Columns of the predictions file; one column per baseline follows, so no baseline may bear one of these names."""

POINTS = 100.0
"""AUC points in one unit of AUC: the field quotes differences in hundredths."""


@dataclass(frozen=True, slots=True)
class ScoredStream:
    """N online events in stream order, each predicted before its label was used.

    Raises ValueError when the columns differ in length or a baseline takes the name of a column.
    """

    user_ids: tuple[str, ...]
    """(U,)"""
    item_ids: tuple[str, ...]
    """(I,)"""
    user: NDArray[np.int32]
    """(N,) index into ``user_ids``"""
    item: NDArray[np.int32]
    """(N,) index into ``item_ids``"""
    event_time_ms: NDArray[np.int64]
    """(N,)"""
    offset: NDArray[np.int64]
    """(N,) position in the source"""
    label: NDArray[np.int8]
    """(N,) 0 or 1"""
    index: NDArray[np.int64]
    """(N,) 0-based index of the event in its user"""
    probability: NDArray[np.float32]
    """(N,) of label 1"""
    baselines: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """name -> (N,) probability of label 1"""

    def __post_init__(self) -> None:
        columns: dict[str, NDArray[Any]] = {
            "item": self.item, "event_time_ms": self.event_time_ms, "offset": self.offset, "label": self.label,
            "index": self.index, "probability": self.probability,
            **{f"baseline {name!r}": values for name, values in self.baselines.items()},
        }  # fmt: skip
        for name, column in columns.items():
            if len(column) != len(self.user):
                raise ValueError(
                    f"scored stream: column {name} has {len(column)} rows and column user has {len(self.user)}; "
                    "every column needs one row per scored event"
                )
        taken = sorted(set(self.baselines) & set(PREDICTION_COLUMNS))
        if taken:
            raise ValueError(
                f"scored stream: baseline {taken[0]!r} bears the name of a predictions column; rename the baseline"
            )

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the events were split (design: the evaluation protocol)."""

    offline_events: int
    offline_users: int
    online_events: int
    online_users: int
    cut_time_ms: int
    """T: the first event of the first online user"""


@dataclass(frozen=True, slots=True)
class Speed:
    """Wall-clock times on the machine of the run."""

    train_s: float
    online_events_per_s: float


@dataclass(frozen=True, slots=True)
class StateSize:
    """What the users' rows take."""

    users: int
    bytes_per_user: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Part of a row (header, adaptive part, ring …) -> bytes of it per user; empty where it is not known"""


@dataclass(frozen=True, slots=True)
class BacktestResult:
    """One backtest: what was measured, on what, and how to measure it again."""

    protocol: Protocol
    metrics: Metrics
    baselines: Mapping[str, Metrics]
    """name -> metrics; the names are those of ``scored.baselines``"""
    speed: Speed
    state: StateSize
    versions: Mapping[str, str]
    """library or artifact -> version or fingerprint"""
    settings: Settings
    scored: ScoredStream
    command: tuple[str, ...] = ()
    """The arguments of the process, the program first"""
    rejects: Mapping[str, int] = field(default_factory=dict)
    """reason -> lines that could not be used"""
    notes: tuple[str, ...] = ()
    """Facts about the data or the run that a reader must know"""
    training_loss: tuple[float, ...] = ()
    """Loss of every epoch of the offline stage"""
    meta: MetaResult | None = None
    """Of the online stage, where there was one"""
    machine: str = ""
    """The machine in words, as ``streams.provenance.describe_machine`` gives it"""

    def __post_init__(self) -> None:
        if set(self.baselines) != set(self.scored.baselines):
            raise ValueError(
                f"backtest result: metrics are for baselines {sorted(self.baselines)} and predictions for "
                f"{sorted(self.scored.baselines)}; give both for every baseline"
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; an undefined metric is None."""
        return {
            "protocol": asdict(self.protocol),
            "metrics": self.metrics.as_dict(),
            "baselines": {name: metrics.as_dict() for name, metrics in self.baselines.items()},
            "speed": asdict(self.speed),
            "state": {"users": self.state.users, "bytes_per_user": self.state.bytes_per_user},
            "versions": dict(self.versions),
            "rejects": dict(self.rejects),
            "notes": list(self.notes),
            "meta": None if self.meta is None else self.meta.as_dict(),
        }

    def write_json(self, path: Path) -> None:
        """Writes ``as_dict`` as UTF-8 JSON, whole or not at all."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def write_predictions(self, path: Path) -> None:
        """Writes the scored stream as Parquet in stream order, whole or not at all."""
        table = predictions_table(self.scored)
        write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def predictions_table(scored: ScoredStream) -> pa.Table:
    """N rows: ``PREDICTION_COLUMNS``, then one float32 column per baseline."""
    columns: dict[str, pa.Array] = {
        "user_id": _text_column(scored.user, scored.user_ids),
        "item_id": _text_column(scored.item, scored.item_ids),
        "event_time_ms": pa.array(scored.event_time_ms, pa.int64()),
        "offset": pa.array(scored.offset, pa.int64()),
        "label": pa.array(scored.label, pa.int8()),
        "index": pa.array(np.asarray(scored.index, np.int64), pa.int64()),
        "probability": pa.array(np.asarray(scored.probability, np.float32), pa.float32()),
    }
    for name, probability in scored.baselines.items():
        columns[name] = pa.array(np.asarray(probability, np.float32), pa.float32())
    return pa.table(columns)


def best_baseline(result: BacktestResult) -> str | None:
    """The baseline of the highest AUC (ties: the first), or None where none has one."""
    scored = {name: metrics.auc for name, metrics in result.baselines.items() if math.isfinite(metrics.auc)}
    return max(scored, key=scored.__getitem__) if scored else None


def results_table(result: BacktestResult) -> Table:
    """The terminal's view: the model and every baseline, with the model's lift over each in AUC points."""
    slices = tuple(result.metrics.by_index)
    table = Table(title="AUC on the online stream, every event predicted before its label was used")
    table.add_column("", no_wrap=True)
    for name in ("AUC ±95%", "lift", "GAUC", "log-loss", "cal. error", *(f"AUC {s}" for s in slices)):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [("coldstream", result.metrics), *result.baselines.items()]
    for position, (name, metrics) in enumerate(rows):
        lift = "" if position == 0 else _signed_points(result.metrics.auc - metrics.auc)
        table.add_row(
            Text(name),
            _with_interval(metrics),
            lift,
            _number(metrics.gauc),
            _number(metrics.log_loss),
            _number(metrics.calibration_error),
            *(_number(metrics.by_index.get(s)) for s in slices),
            style="bold" if position == 0 else None,
        )
    return table


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary file beside ``path`` and renames it; on an error ``path`` is untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _text_column(codes: NDArray[np.int32], ids: tuple[str, ...]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(ids, pa.string()))


def _with_interval(metrics: Metrics) -> str:
    interval = metrics.ci95.get("auc")
    if interval is None or not all(map(math.isfinite, interval)):
        return _number(metrics.auc)
    return f"{_number(metrics.auc)} ±{_number((interval[1] - interval[0]) / 2)}"


def _signed_points(difference: float) -> str:
    return f"{POINTS * difference:+.2f}" if math.isfinite(difference) else "–"


def _number(value: float | None) -> str:
    """Four digits without the leading zero of a share, or a dash where there is no value."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4f}".replace("0.", ".", 1) if 0 <= value < 1 else f"{value:.4f}"
