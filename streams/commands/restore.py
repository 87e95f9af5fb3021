"""``coldstream restore``: a snapshot's partitions into a state directory, every byte and row checked first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from learner.artifact import read_artifact
from learner.user_state import RowLayout
from state.exceptions import SnapshotError
from state.snapshots.manifest import Snapshot
from state.snapshots.snapshot import read_snapshot, restore
from streams.commands.snapshot import described


def restore_snapshot(
    url: Annotated[str, typer.Argument(help="The snapshot: a directory, or a URL that fsspec knows.")],
    state: Annotated[Path, typer.Option(help="The state directory; it is made where it is missing.")],
    partition: Annotated[
        list[int] | None, typer.Option(help="Only this topic partition; repeatable. All of them if left out.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A model's directory: rows that it cannot go on with are refused.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was restored as JSON.")] = False,
) -> None:
    """Put a snapshot into a state directory that does not hold its partitions yet."""
    if model is not None:
        held = read_snapshot(url)
        _refuse_foreign(held.of(partition) if partition else held, model)
    restored = restore(url, state, partitions=partition or None)
    typer.echo(json.dumps(restored.as_dict()) if as_json else f"{described(restored)}\nrestored into {state}")


def _refuse_foreign(held: Snapshot, model: Path) -> None:
    """Raises SnapshotError for rows of other filters than the model has; the length of their rings is a setting."""
    artifact = read_artifact(model)
    for part in held.partitions:
        layout = part.row_layout
        wanted = RowLayout.of(artifact.first, artifact.second, layout.ring)
        if layout != wanted:
            raise SnapshotError(
                f"partition {part.partition} of {held.url} holds rows of {layout.fingerprint}, the model in {model} "
                f"needs {wanted.fingerprint}: name the model that it was made with"
            )
