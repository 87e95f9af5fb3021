"""``coldstream generate``: a stream with a planted truth."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.progress import Progress

from streams.generation.settings import Drift, FileFormat, GeneratorError, GeneratorSettings
from streams.generator import CONFIG_FILE, write_dataset

EXIT_INVALID = 2
"""The arguments cannot be used, files are in the way, or the directory cannot be written."""

DEFAULTS = GeneratorSettings()


def generate(
    out: Annotated[Path, typer.Option(help="Directory to write to; it is made where it is missing.")],
    users: Annotated[int, typer.Option(help="How many users.")] = DEFAULTS.users,
    items: Annotated[int, typer.Option(help="How many items.")] = DEFAULTS.items,
    events: Annotated[int, typer.Option(help="How many events.")] = DEFAULTS.events,
    zipf: Annotated[float, typer.Option(help="Exponent of the users' activity; 0 is uniform.")] = DEFAULTS.zipf,
    lifetime: Annotated[float, typer.Option(help="How long a user stays, as a share of the span.")] = DEFAULTS.lifetime,
    drift: Annotated[Drift, typer.Option(help="How tastes change over time.")] = DEFAULTS.drift,
    drift_at: Annotated[
        float | None,
        typer.Option(help="When drift happens (abrupt) or begins (gradual), as a share of the span; 0.7 if left out."),
    ] = DEFAULTS.drift_at,
    label_noise: Annotated[float, typer.Option(help="Share of labels that are flipped.")] = DEFAULTS.label_noise,
    graded: Annotated[
        bool, typer.Option("--graded", help="Give events a value from 1 to 5 beside the label, which is 1 from 4 on.")
    ] = DEFAULTS.graded,
    seed: Annotated[int, typer.Option(help="The same seed and options give the same bytes.")] = DEFAULTS.seed,
    file_format: Annotated[FileFormat, typer.Option("--format", help="How the events are written.")] = "csv",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what truth.json holds.")] = False,
) -> None:
    """Write a stream of clicks with a planted truth, ready for a backtest, with the best AUC anything can reach."""
    try:
        settings = GeneratorSettings(
            users=users, items=items, events=events, zipf=zipf, lifetime=lifetime, drift=drift, drift_at=drift_at,
            label_noise=label_noise, graded=graded, seed=seed,
        )  # fmt: skip
        truth = _with_progress(out, settings, file_format, overwrite)
    except (GeneratorError, OSError) as error:
        reason = f"cannot write to {out}: {error.strerror}" if isinstance(error, OSError) else str(error)
        typer.echo(f"error: {reason}", err=True)
        raise typer.Exit(EXIT_INVALID) from error
    typer.echo(json.dumps(truth) if as_json else _summary(out, settings, file_format, truth))


def _with_progress(
    out: Path, settings: GeneratorSettings, file_format: FileFormat, overwrite: bool
) -> dict[str, object]:
    """Shows a bar on a terminal and nothing elsewhere."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("events", total=settings.events)
        return write_dataset(
            out,
            settings,
            file_format=file_format,
            overwrite=overwrite,
            on_progress=lambda events: progress.advance(task, events),
        )


def _summary(out: Path, settings: GeneratorSettings, file_format: FileFormat, truth: dict[str, object]) -> str:
    every, online = (cast(dict[str, object], truth[part]) for part in ("all", "online"))
    return (
        f"{settings.events:,} events of {truth['users']:,} users and {truth['items']:,} items"
        f" in {out / f'events.{file_format}'}\n"
        f"best AUC that anything can reach: {_score(every)} on all events,"
        f" {_score(online)} on the {online['events']:,} events of {online['users']:,} new users\n"
        f"next: coldstream backtest --config {out / CONFIG_FILE}"
    )


def _score(part: dict[str, object]) -> str:
    auc = part["best_auc"]
    return f"{auc:.4f}" if isinstance(auc, float) else "none (one label only)"
