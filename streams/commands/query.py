"""``coldstream query``: what the state knows of one user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from state.exceptions import QueryError
from state.query import StateReader
from state.reading.point import NOW, parse_point
from streams.commands.query_text import diff_text, user_text

EXIT_UNKNOWN = 1
"""The store has never learned from this user, and no items were asked for; 0 is found, 2 is no store."""


def query(
    user: Annotated[str, typer.Argument(help="The user's id.")],
    state: Annotated[Path, typer.Option(help="The state directory of a run.")],
    partition: Annotated[
        int | None, typer.Option(min=0, help="The topic partition that owns the user; all are looked through without.")
    ] = None,
    items: Annotated[
        list[str] | None,
        typer.Option(help="Ids of items to score, as in a line of CSV: a,b or '\"a,b\",c'; repeatable."),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Show so many of the catalogue's best items for the user.")] = 0,
    unseen: Annotated[bool, typer.Option("--unseen", help="Leave the user's latest items out of --top.")] = False,
    at: Annotated[
        str, typer.Option(help="The state at an offset (1200) or a time (2026-01-03T08:00:00, 1767427200000ms).")
    ] = NOW.asked,
    diff: Annotated[
        tuple[str, str] | None, typer.Option(metavar="A B", help="What changed from one such point to another, or now.")
    ] = None,
    snapshots: Annotated[
        Path | None, typer.Option(help="A directory of snapshots, or one: earlier rows to answer from.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show a user's adaptive state, what moved it, and scores of items; reading never creates a user."""
    _refuse_what_says_nothing(items, top, unseen, at, diff)
    with StateReader(state, partition=partition) as reader:
        if diff is not None:
            change = reader.diff(user, parse_point(diff[0]), parse_point(diff[1]), snapshots=snapshots)
            typer.echo(json.dumps(change.as_dict()) if as_json else diff_text(change))
            return
        report = reader.query(
            user, items=_listed(items), count=top, unseen=unseen, at=parse_point(at), snapshots=snapshots
        )
    typer.echo(json.dumps(report.as_dict()) if as_json else user_text(report))
    if not report.known and not items and not top:
        raise typer.Exit(EXIT_UNKNOWN)


def _refuse_what_says_nothing(
    items: list[str] | None, top: int, unseen: bool, at: str, diff: tuple[str, str] | None
) -> None:
    if unseen and not top:
        raise QueryError("--unseen leaves items out of --top: give --top N too")
    if diff is not None and (items or top or at != NOW.asked):
        raise QueryError("--diff compares two points by itself: leave out --items, --top and --at")


def _listed(items: list[str] | None) -> list[str]:
    """The ids in lines of CSV, each once."""
    if not items:
        return []
    import csv  # not above: few queries need it

    return list(dict.fromkeys(item for line in csv.reader(items) for item in line if item))
