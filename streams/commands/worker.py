"""``coldstream worker``: take part in the stream."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from streams.commands.options import Config, Overrides, settings_from

SWITCH_S = 0.0005
"""How long a thread may keep the interpreter's lock while another waits for it. An event passes through three threads,
and Python's 5 ms would be added at each"""


def worker(
    model: Annotated[Path, typer.Option(help="The trained model: a directory that `coldstream train` has written.")],
    config: Config = None,
    overrides: Overrides = None,
    state: Annotated[Path | None, typer.Option(help="Where this worker keeps its users' rows; its own.")] = None,
    instance: Annotated[
        str | None, typer.Option(help="A name that outlives restarts and no other worker has: a restart moves nothing.")
    ] = None,
) -> None:
    """Adapt users to the events of a topic, exactly once each, until SIGTERM."""
    settings = settings_from(config, None, overrides, {"state.directory": state, "worker.instance": instance})
    import uvloop  # not above: the other commands do not wait for the brokers' clients

    from streams.live.assembly import worker_name
    from streams.live.logs import Secrets, configure_logs
    from streams.live.worker import Worker

    secrets = Secrets()
    configure_logs(sys.stderr, secrets, worker=worker_name(settings))
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Worker(settings, model, secrets).run())
