"""``coldstream backtest``: learn from past users, stream the new ones, and say what that was worth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.exceptions import SettingsError
from configs.settings import Settings
from streams.commands.options import Config, Data, Device, OfflineFraction, Overrides, RejectsFile, Seed, settings_from
from streams.commands.outputs import require_directory, require_file
from streams.commands.progress import shown_progress
from streams.live.logs import Secrets, configure_logs
from streams.meta.embedded import alarms_of
from streams.replay import Backtest
from streams.report import write_report
from streams.results import BacktestResult, results_table

TABLE_WIDTH = 150
"""Columns of the table where the output is no terminal: it fits unfolded."""


def backtest(
    config: Config = None,
    data: Data = None,
    overrides: Overrides = None,
    offline_fraction: OfflineFraction = None,
    score_last: Annotated[
        float | None, typer.Option(help="Score only users of this last share, to compare settings on the same users.")
    ] = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Run the baselines on the same events.")] = False,
    meta: Annotated[
        str | None,
        typer.Option(help="Let the stream improve what users share: initialization, biases or everything."),
    ] = None,
    meta_dir: Annotated[
        Path | None, typer.Option(help="Keep the versions that come about in this new directory.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Stream with this trained model in place of training.")] = None,
    save_model: Annotated[Path | None, typer.Option(help="Keep the trained model in this directory.")] = None,
    state: Annotated[Path | None, typer.Option(help="Keep the users' rows in this new directory.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write every prediction, as Parquet.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report: one HTML file that opens offline.")] = None,
    rejects: RejectsFile = None,
    device: Device = None,
    seed: Seed = None,
) -> None:
    """Learn from past users, stream the new ones event by event, and score every prediction."""
    flags: dict[str, object] = {
        "protocol.offline_fraction": offline_fraction,
        "protocol.score_last": score_last,
        "state.directory": state,
        "meta.moves": meta,
        "meta.directory": meta_dir,
        "data.rejects.path": rejects,
        "training.device": device,
        "training.seed": seed,
    }
    settings = settings_from(config, data, overrides, flags)
    _require_usable_meta(settings, meta_dir)
    require_file("--json", json_file)
    require_file("--predictions", predictions)
    require_file("--report", report)
    require_file("--rejects", settings.data.rejects.path)
    require_directory("--state", settings.state.directory)
    require_directory("--save-model", save_model)
    require_directory("--meta-dir", settings.meta.directory)
    with shown_progress() as progress:
        configure_logs(sys.stderr, Secrets())  # in here: above the bars, where there are any
        run = Backtest(
            settings, baselines=baselines, model=model, save_model=save_model, progress=progress,
            command=("coldstream", *sys.argv[1:]),
        )  # fmt: skip
        result = run.run()
        progress.stage("writing results")
        if json_file is not None:
            result.write_json(json_file)
        if predictions is not None:
            result.write_predictions(predictions)
        if report is not None:
            write_report(report, result)
    _print(result, {"JSON": json_file, "predictions": predictions, "report": report, "model": save_model})


def _require_usable_meta(settings: Settings, directory: Path | None) -> None:
    """Raises SettingsError for what the online stage could not use: now, not after an hour of training."""
    meta = settings.meta
    if meta.moves == "off":
        if directory is not None:
            raise SettingsError(
                f"--meta-dir {directory}: nothing would be written there without an online stage; add --meta everything"
            )
        return
    alarms_of(meta.alarms).close(0)


def _print(result: BacktestResult, written: dict[str, Path | None]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)
    console.print(results_table(result))
    for note in (*result.notes, *(() if result.meta is None else result.meta.notes)):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    for name, path in written.items():
        if path is not None:
            console.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)
