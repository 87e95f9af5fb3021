"""``coldstream play``: the events of files as a live stream."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from streams.commands.options import Config, Data, OfflineFraction, Overrides, RejectsFile, settings_from


def play(
    config: Config = None,
    data: Data = None,
    overrides: Overrides = None,
    rate: Annotated[float, typer.Option(min=0, help="Events a second; 0 is as fast as the brokers take them.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many events.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every user's events, not only those of users the model has not seen.")
    ] = False,
    offline_fraction: OfflineFraction = None,
    rejects: RejectsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was sent as JSON.")] = False,
) -> None:
    """Play events to the source topic, keyed by user, for workers with the same settings."""
    flags: dict[str, object] = {"protocol.offline_fraction": offline_fraction, "data.rejects.path": rejects}
    settings = settings_from(config, data, overrides, flags)
    import uvloop  # not above: the other commands do not wait for the brokers' clients

    from streams.live import play as live

    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,} events"), TimeElapsedColumn())
    console = Console(stderr=True)
    with (
        live.events_to_play(settings, everything=everything) as events,
        Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bars,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        task = bars.add_task(f"playing to {settings.stream.topic}", total=None)
        played = runner.run(
            live.play(settings, events, rate=rate, limit=limit, on_progress=lambda n: bars.update(task, completed=n))
        )
    speed = played.events / played.seconds if played.seconds else 0.0
    if as_json:
        offsets = {str(p): {"first": first, "next": end} for p, (first, end) in sorted(played.offsets.items())}
        told = {"topic": played.topic, "events": played.events, "users": played.users, "seconds": played.seconds}
        typer.echo(json.dumps({**told, "events_per_second": speed, "partitions": offsets}))
        return
    typer.echo(
        f"{played.events:,} events of {played.users:,} users in {played.topic}, {len(played.offsets)} partitions, "
        f"in {played.seconds:.1f} s ({speed:,.0f} a second)"
    )
