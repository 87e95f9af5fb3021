"""How well new users are predicted from their first events on: AUC, GAUC and log-loss of backtests on MovieLens.

    python -m benchmarks.quality --data DIRECTORY [--seeds 0,1,2] [--case ml-100k] [--json]

Every online event is predicted before its label is used; the protocol is that of ``streams.protocol``. The lifts
are over baselines that were tuned inside the offline users, in AUC points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.command import Options, Skipped, standalone
from benchmarks.report import Figure
from configs.settings import Settings
from streams.replay import Backtest, RunProgress
from streams.results import POINTS, BacktestResult


@dataclass(frozen=True, slots=True)
class Row:
    """One backtest and what it should reach."""

    case: str
    profile: str
    dataset: str
    targets: Mapping[str, float]
    """By name of the figure"""
    overrides: Mapping[str, object] = field(default_factory=dict)
    baselines: bool = False


ROWS = (
    Row(
        "ml-1m", "ml-1m", "ml-1m",
        {"AUC": 0.8215, "GAUC": 0.769, "log-loss": 0.507, "lift over pooled": 8.0, "lift over non_meta_same_head": 1.0},
        baselines=True,
    ),
    Row("ml-1m-graded", "ml-1m-graded", "ml-1m", {"AUC": 0.8245}),
    Row("ml-100k", "ml-100k", "ml-100k", {"AUC": 0.7825}),
    Row("ml-100k-graded", "ml-100k-graded", "ml-100k", {"AUC": 0.787}),
    Row(
        "ml-1m, a tenth of the users offline", "ml-1m", "ml-1m", {"AUC": 0.797},
        {"protocol__offline_fraction": 0.1, "protocol__score_last": 0.3},
    ),
)  # fmt: skip


def run(options: Options) -> Iterator[Figure]:
    """Every row whose data is there, with one backtest for each seed. Raises Skipped when none is."""
    missing: dict[str, Skipped] = {}
    measured_any = False
    for row in (row for row in ROWS if options.wants(row.case)):
        try:
            settings = [settings_of(options, row, seed) for seed in options.seeds]
        except Skipped as reason:
            missing.setdefault(row.dataset, reason)
            continue
        results = [backtest(each, row.baselines) for each in settings]
        measured_any = True
        yield from figures(row, results, held_to_targets=options.target(1.0) is not None)
    for lacking in missing.values():
        if not measured_any:
            raise lacking
        options.progress(f"skipped, {lacking}")


def backtest(settings: Settings, baselines: bool) -> BacktestResult:
    """One run of the protocol."""
    return Backtest(settings, baselines=baselines, progress=RunProgress()).run()


def figures(row: Row, results: list[BacktestResult], *, held_to_targets: bool = True) -> Iterator[Figure]:
    """The row's figures, each with its value in every run."""
    for name in measured(results[0]):
        runs = tuple(measured(result)[name] for result in results)
        target = row.targets.get(name) if held_to_targets else None
        unit = "points" if name.startswith("lift") else ""
        yield Figure(row.case, name, runs, unit, target, at_most=name == "log-loss")


def measured(result: BacktestResult) -> dict[str, float]:
    """The figures of one run by name."""
    metrics = result.metrics
    lifts = {f"lift over {name}": POINTS * (metrics.auc - other.auc) for name, other in result.baselines.items()}
    return {
        "AUC": metrics.auc, "GAUC": metrics.gauc, "log-loss": metrics.log_loss,
        "calibration error": metrics.calibration_error, **lifts,
    }  # fmt: skip


def settings_of(options: Options, row: Row, seed: int) -> Settings:
    """The row's profile, data and overrides, at one seed of training."""
    return options.settings(
        row.profile, row.dataset, training__seed=seed, protocol__bootstrap_samples=0, **row.overrides
    )


if __name__ == "__main__":
    standalone("quality", run, __doc__)
