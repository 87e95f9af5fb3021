"""``coldstream meta list | show | diff | promote | rollback``: the versions of what all users share, by hand.

Exit codes: 0 done; 1 the version shown does not verify; 2 it cannot be done: one line says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from state.lineage import Lineage, LineageDamaged, LineageError, Version
from state.lineage.difference import difference
from state.lineage.record import plain
from streams.commands.meta_text import diff_text, list_text, show_text, worst_rise
from streams.commands.options import Config, Overrides, settings_from
from streams.kafka.secrets import read_secret

EXIT_UNVERIFIED = 1
"""The version's tensors are not what was written; 2: the lineage cannot be used at all"""
LOCK_WAIT_S = 5.0
"""For a run that writes a version at this moment"""
HMAC_SETTING = "meta.hmac"

app = typer.Typer(
    help="Show, compare, promote and take back the versions of what all users share.", no_args_is_help=True
)

Directory = Annotated[
    Path | None, typer.Option("--meta", help="The directory of the lineage. Else meta.directory of the settings.")
]
Number = Annotated[int, typer.Argument(min=0, help="A version's number, see `meta list`.")]
Reason = Annotated[str, typer.Option(help="Why; it stays in the record.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON for machines.")]


@app.command("list")
def list_versions(
    meta: Directory = None, config: Config = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Show all versions: where each came from, and what was decided last."""
    lineage = _lineage(meta, config, overrides)
    current, versions = lineage.current, lineage.records()
    if as_json:
        document = {
            "directory": str(lineage.directory), "current": current, "signed": lineage.signed, "torn": lineage.torn,
            "versions": [_line(version, current) for version in versions],
        }  # fmt: skip
        _write(document)
    else:
        typer.echo(list_text(versions, current, torn=lineage.torn))


@app.command()
def show(
    version: Number, meta: Directory = None, config: Config = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Show all of a version's record, its evidence and its row of the forgetting matrix; exit code 1: it is damaged."""
    lineage = _lineage(meta, config, overrides)
    held, current = lineage.version(version), lineage.current
    damage = _damage(lineage, held)
    if as_json:
        record: dict[str, Any] = msgspec.to_builtins(held)
        _write({**_line(held, current), **record, "tensors": _tensors_word(held, damage), "damage": damage})
    else:
        typer.echo(show_text(held, current, tensors=damage or _tensors_word(held, damage)))
    if damage is not None:
        raise typer.Exit(EXIT_UNVERIFIED)


@app.command()
def diff(
    before: Number,
    after: Number,
    meta: Directory = None,
    config: Config = None,
    overrides: Overrides = None,
    items: Annotated[int, typer.Option(min=0, help="Show so many of the items that moved most.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show how far apart two versions are: every tensor, and the items whose embedding moved most."""
    lineage = _lineage(meta, config, overrides)
    found = difference(lineage.tensors(before), lineage.tensors(after), items)
    equal = lineage.version(before).record.serving_sha256 == lineage.version(after).record.serving_sha256
    if as_json:
        _write({"before": before, "after": after, "equal": equal, **plain(msgspec.to_builtins(found))})
    else:
        typer.echo(diff_text(before, after, found, equal=equal))


@app.command()
def promote(
    version: Number,
    meta: Directory = None,
    config: Config = None,
    overrides: Overrides = None,
    reason: Reason = "asked for",
    as_json: AsJson = False,
) -> None:
    """Make a version serve that is still to be decided on, or was rejected; its tensors must verify."""
    lineage = _lineage(meta, config, overrides)
    before, stage = lineage.current, lineage.version(version).stage
    promoted = lineage.promote(version, reason)
    if as_json:
        _write(_line(promoted, lineage.current))
    else:
        typer.echo(f"version {version} serves now; it was {stage}, and version {before} served before")


@app.command()
def rollback(
    version: Number,
    meta: Directory = None,
    config: Config = None,
    overrides: Overrides = None,
    reason: Reason = "asked for",
    as_json: AsJson = False,
) -> None:
    """Make a version serve again that served before, as a new version with the same tensors."""
    lineage = _lineage(meta, config, overrides)
    restored = lineage.rollback(version, reason)
    if as_json:
        _write({**_line(restored, lineage.current), "undone": restored.record.undone})
    else:
        typer.echo(
            f"version {restored.number} serves now: {restored.record.decision.reason}\n"
            f"its serving hash is that of version {version}: {restored.record.serving_sha256}"
        )


def _lineage(meta: Path | None, config: str | None, overrides: list[str] | None) -> Lineage:
    """Raises LineageError where there is none, LineageDamaged where it does not verify."""
    settings = settings_from(config, None, overrides, {}).meta
    directory = meta or settings.directory
    if directory is None:
        raise LineageError("say where the lineage is: --meta DIRECTORY, or meta.directory in the settings")
    key = read_secret(settings.hmac, HMAC_SETTING).reveal().encode() if settings.hmac.given else None
    lineage = Lineage(directory, key, wait_s=LOCK_WAIT_S)
    if not lineage.next_version:
        raise LineageError(f"{directory} holds no lineage: name the directory that a run with --meta was given")
    return lineage


def _damage(lineage: Lineage, version: Version) -> str | None:
    """What does not verify of its tensors; None: they do, or were pruned."""
    if version.pruned:
        return None
    try:
        lineage.tensors(version.number)
    except LineageDamaged as error:
        return str(error)
    return None


def _tensors_word(version: Version, damage: str | None) -> str:
    return "pruned" if version.pruned else "verified" if damage is None else "damaged"


def _line(version: Version, current: int | None) -> dict[str, Any]:
    """A version in short."""
    worst = worst_rise(version)
    record, last = version.record, version.decisions[-1]
    return {
        "version": version.number,
        "parent": record.parent,
        "stage": version.stage,
        "current": version.number == current,
        "round": record.round,
        "made_at_ms": record.made_at_ms,
        "worst_cohort": None if worst is None else worst[0],
        "worst_rise": None if worst is None else worst[1],
        "reason": last.reason,
        "decided_at_ms": last.at_ms,
        "undone_by": version.undone_by,
        "pruned": version.pruned,
        "serving_sha256": record.serving_sha256,
    }


def _write(document: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(plain(document), allow_nan=False))
