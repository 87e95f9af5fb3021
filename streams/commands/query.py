"""``coldstream query``: what the state knows of one user."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from state.query import UserReport, query_user

EXIT_UNKNOWN = 1
"""The store has never learned from this user; 0 is found, 2 is no store."""


def query(
    user: Annotated[str, typer.Argument(help="The user's id.")],
    state: Annotated[Path, typer.Option(help="The state directory of a run.")],
    partition: Annotated[int, typer.Option(help="The topic partition that owns the user.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the row as JSON.")] = False,
) -> None:
    """Show a user's adaptive state; reading never creates a user."""
    report = query_user(state / f"partition-{partition}", user)
    if report is None:
        typer.echo(f"unknown user {user!r}: no event was learned, a prediction starts from the shared initialization")
        raise typer.Exit(EXIT_UNKNOWN)
    typer.echo(json.dumps(report.as_dict()) if as_json else _text(report))


def _text(report: UserReport) -> str:
    first, last = (
        datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        for ms in (report.first_event_ms, report.last_event_ms)
    )
    return "\n".join(
        [
            f"user {report.user_id}: {report.events:,} events from {first} to {last}",
            f"last offset {report.last_offset}, ledger {report.ledger}, meta version {report.meta_version}",
            "adaptive part " + " ".join(f"{m:+.3f}" for m in report.mean),
            "variance      " + " ".join(f"{v:.4f}" for v in report.variance),
            "latest labels " + "".join(map(str, report.recent_labels)),
        ]
    )
