"""``coldstream snapshot``: a copy of a run's state at one point in time, beside a running writer or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from state.snapshots.manifest import Snapshot
from state.snapshots.snapshot import snapshot


def take_snapshot(
    state: Annotated[Path, typer.Option(help="The state directory of a run.")],
    to: Annotated[str, typer.Option(help="A new directory for the snapshot, or a URL that fsspec knows.")],
    partition: Annotated[
        list[int] | None, typer.Option(help="Only this topic partition; repeatable. All of them if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the snapshot holds as JSON.")] = False,
) -> None:
    """Copy the state to a snapshot that restore can check; a run may go on writing meanwhile."""
    taken = snapshot(state, to, partitions=partition or None)
    next_step = f"next: coldstream restore {to} --state DIR puts it into a new state directory"
    typer.echo(json.dumps(taken.as_dict()) if as_json else f"{described(taken)}\n{next_step}")


def described(held: Snapshot) -> str:
    """A line for each partition."""
    lines = [f"snapshot {held.url}: {sum(file.bytes for _, file in held.paths()):,} bytes"]
    for part in held.partitions:
        at = part.progress
        lines.append(
            f"partition {part.partition}: "
            + ("no events yet" if at is None else f"{_counts(at.users, at.events)} up to offset {at.offset:,}")
        )
    return "\n".join(lines)


def _counts(users: int, events: int) -> str:
    return "users" if users < 0 or events < 0 else f"{users:,} users, {events:,} events,"
