"""Options that several commands share, and what they mean for the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.loading import load_settings
from configs.settings import Settings
from streams.commands.config import parse_overrides

Config = Annotated[str | None, typer.Option("--config", "-c", help="A profile's name or the path of a YAML file.")]
Data = Annotated[
    list[Path] | None, typer.Option("--data", "-d", help="A file or a MovieLens directory of events; repeatable.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="KEY=VALUE with a dotted key, see `config show`; repeatable.")
]
OfflineFraction = Annotated[
    float | None, typer.Option(help="Share of the users, by arrival, to learn from; the others are streamed.")
]
Device = Annotated[str | None, typer.Option(help="Where torch computes, for example cpu or cuda.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same bits on one machine.")]
RejectsFile = Annotated[Path | None, typer.Option("--rejects", help="Write lines that cannot be used there.")]


def settings_from(
    config: str | None, data: list[Path] | None, overrides: list[str] | None, flags: dict[str, object]
) -> Settings:
    """Settings with ``--set`` and the flags on top; a flag that was not given (None) leaves ``--set`` as it is."""
    named: dict[str, object] = {"data.paths": [str(path) for path in data] if data else None, **flags}
    given = {key: value for key, value in named.items() if value is not None}
    return load_settings(config, {**parse_overrides(overrides), **given})
