"""``coldstream train``: the offline meta-learning stage, from events to a model on disk."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from learner.artifact import read_artifact, write_artifact
from streams.commands.options import Config, Data, Device, OfflineFraction, Overrides, RejectsFile, Seed, settings_from
from streams.commands.outputs import require_directory, require_file
from streams.commands.progress import shown_progress
from streams.replay import prepared, train_offline


def train(
    out: Annotated[Path, typer.Option(help="Directory of the model; it is made where it is missing.")],
    config: Config = None,
    data: Data = None,
    overrides: Overrides = None,
    offline_fraction: OfflineFraction = None,
    device: Device = None,
    seed: Seed = None,
    rejects: RejectsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was learned as JSON.")] = False,
) -> None:
    """Learn the model from past users. Run the same command again to resume an interrupted run."""
    flags: dict[str, object] = {
        "protocol.offline_fraction": offline_fraction,
        "training.device": device,
        "training.seed": seed,
        "data.rejects.path": rejects,
    }
    settings = settings_from(config, data, overrides, flags)
    require_directory("--out", out)
    require_file("--rejects", settings.data.rejects.path)
    checkpoints = out / "checkpoints"
    with shown_progress() as progress:
        try:
            with prepared(settings, progress) as events:
                artifact = train_offline(events, settings, progress, checkpoints)
        except KeyboardInterrupt:
            resumable = (checkpoints / "checkpoint.safetensors").exists()
            print("interrupted" + ("; the same command resumes" if resumable else ""), file=sys.stderr)
            raise typer.Exit(1) from None
    fingerprint = write_artifact(out, artifact)
    shutil.rmtree(checkpoints, ignore_errors=True)
    artifact = read_artifact(out)
    if as_json:
        typer.echo(json.dumps({"model": str(out), "fingerprint": fingerprint, **artifact.metrics}))
        return
    learned = artifact.metrics
    typer.echo(
        f"learned from {learned['offline_events']:,} events of {learned['offline_users']:,} users in "
        f"{learned['train_s']:.1f} s; log-loss {learned['train_log_loss'][-1]:.4f} in the last epoch\n"
        f"model {fingerprint[:12]} in {out}\n"
        f"next: coldstream backtest --model {out} with the same --config and --data streams the users it has not seen"
    )
