"""``coldstream config check | show``: are the settings right, and where does each value come from?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, NoReturn

import typer
import yaml

from configs.exceptions import InvalidSettings, SettingsError
from configs.loading import DEFAULT_PROFILE, ResolvedSettings, resolve_settings

EXIT_INVALID = 2
"""The settings cannot be used; 0 is success."""

app = typer.Typer(help="Check settings, or show them resolved.", no_args_is_help=True)

Config = Annotated[str | None, typer.Option("--config", "-c", help="A profile's name or the path of a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", "-s", help="KEY=VALUE with a dotted key; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON for machines.")]


@app.command()
def check(config: Config = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print OK, or every error; exit code 2 if there are any."""
    try:
        resolve_settings(config, parse_overrides(overrides))
    except SettingsError as error:
        _fail(error, as_json)
    typer.echo(json.dumps({"ok": True, "errors": []}) if as_json else f"OK: {config or DEFAULT_PROFILE}")


@app.command()
def show(config: Config = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved settings, and where each value that is not the default came from."""
    try:
        resolved = resolve_settings(config, parse_overrides(overrides))
    except SettingsError as error:
        _fail(error, as_json)
    if as_json:
        typer.echo(json.dumps({"settings": _plain(resolved), "origins": resolved.changed()}, indent=2))
    else:
        typer.echo("\n".join(_yaml_lines(_plain(resolved), resolved.changed())))


def parse_overrides(pairs: list[str] | None) -> dict[str, object]:
    """``["learner.dim=8"]`` as ``{"learner.dim": "8"}``.

    Raises:
        SettingsError: a pair without ``=``.
    """
    parsed: dict[str, object] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SettingsError(f"--set {pair}: write it as KEY=VALUE, for example --set learner.dim=8")
        parsed[key.strip()] = value
    return parsed


def _fail(error: SettingsError, as_json: bool) -> NoReturn:
    messages = [str(p) for p in error.problems] if isinstance(error, InvalidSettings) else [str(error)]
    if as_json:
        typer.echo(json.dumps({"ok": False, "errors": messages}))
    else:
        for message in messages:
            typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_INVALID)


def _plain(resolved: ResolvedSettings) -> dict[str, object]:
    return resolved.settings.model_dump(mode="json")


def _yaml_lines(tree: Mapping[str, object], origins: Mapping[str, str], path: tuple[str, ...] = ()) -> list[str]:
    lines: list[str] = []
    for key, value in tree.items():
        indent, name = "  " * len(path), _scalar(key)
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{name}:")
            lines.extend(_yaml_lines(value, origins, (*path, key)))
        else:
            origin = origins.get(".".join((*path, key)))
            lines.append(f"{indent}{name}: {_scalar(value)}" + (f"  # {origin}" if origin else ""))
    return lines


def _scalar(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()
