"""``coldstream erase``: a user's row, events and traces out of the state for good, with a receipt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from configs.exceptions import ColdstreamError
from state.erasure import erase_from_directory
from state.receipt import Receipt, Removal, write_receipt
from state.snapshots.snapshot import read_snapshot
from streams.commands.outputs import require_file


class ReceiptExists(ColdstreamError):
    """A receipt is never overwritten."""


def erase(
    user: Annotated[str, typer.Argument(help="The user's id.")],
    state: Annotated[Path, typer.Option(help="The state directory of a run that is not running.")],
    snapshot: Annotated[
        list[str] | None, typer.Option(help="Erase from this snapshot too: a directory or a URL; repeatable.")
    ] = None,
    receipt: Annotated[Path | None, typer.Option(help="Write the receipt to this new file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Remove a user from all partitions of the state; a user who is not there is no error.

    A receipt holds a salted hash of the id, never the id: `coldstream verify --receipt FILE` tells whether it holds.
    """
    require_file("--receipt", receipt)
    if receipt is not None and receipt.exists():
        raise ReceiptExists(f"--receipt {receipt}: exists already, and a receipt is evidence; name another file")
    for url in snapshot or []:
        read_snapshot(url)  # one that cannot be used is told before anything is erased
    erased = erase_from_directory(state, user.encode(errors="surrogateescape"), snapshot or [])
    if receipt is not None:
        write_receipt(receipt, erased)
    typer.echo(json.dumps(erased.as_dict()) if as_json else _text(erased, state, receipt))


def _text(erased: Receipt, state: Path, path: Path | None) -> str:
    lines = [f"{_removed(removal)} from partition {removal.partition} of {state}" for removal in erased.partitions]
    for taken in erased.snapshots:
        lines += [
            f"{_removed(part)} from partition {part.partition} of snapshot {taken.url}" for part in taken.partitions
        ]
    lines.append("no changelog was told: there is no topic of it yet")
    lines += [f"outside its reach: {matter}" for matter in erased.beyond_reach]
    if path is None:
        lines.append("no receipt was kept: --receipt FILE writes one")
    else:
        lines.append(f"receipt: {path}\nnext: coldstream verify --state {state} --receipt {path}")
    return "\n".join(lines)


def _removed(removal: Removal) -> str:
    if not removal.found:
        return "nothing was found, and nothing removed,"
    events = "a damaged row" if removal.events < 0 else f"a row of {removal.events:,} events"
    return f"{events} ({removal.bytes:,} bytes) removed"
