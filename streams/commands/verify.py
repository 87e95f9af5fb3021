"""``coldstream verify``: is the state what the stream must have left, and is an erased user still gone?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from configs.settings import Settings
from state.audit import Audit, shown
from state.expiry import Expiry
from state.receipt import Receipt, read_receipt
from state.snapshots.content import held_partitions
from state.snapshots.manifest import partition_name
from streams.commands.options import Config, Data, OfflineFraction, Overrides, settings_from
from streams.processor import DAY_MS
from streams.protocol import online_batches
from streams.verification import Batches, VerificationError, verify_receipt_in_snapshots, verify_store

EXIT_DIFFERENT = 1
"""A difference or damage was found; 0 is sound, 2 cannot be checked."""
BACKTESTS = 0
"""The partition that a backtest streams everything through"""
SHOWN_FINDINGS = 10
"""Of each partition; ``--json`` has up to 1,000"""


def verify(
    state: Annotated[Path, typer.Option(help="The state directory of a run.")],
    config: Config = None,
    data: Data = None,
    overrides: Overrides = None,
    offline_fraction: OfflineFraction = None,
    partition: Annotated[int | None, typer.Option(help="Only this topic partition. All of them if left out.")] = None,
    receipt: Annotated[
        list[Path] | None, typer.Option(help="A receipt of `erase`: its user must be gone; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
) -> None:
    """Audit the state, alone or against the events it was streamed from; writes nothing, beside a running writer too.

    With the --config, --data, --set and --offline-fraction of the backtest that made it, the events of every user are
    counted again. Exit code 1: a difference was found.
    """
    receipts = {str(path): read_receipt(path) for path in receipt or []}
    partitions = _chosen(state, partition)
    wants_source = any(given is not None for given in (config, data, overrides, offline_fraction))
    if wants_source and BACKTESTS not in partitions:
        raise VerificationError(
            f"a backtest streams its events to partition {BACKTESTS}, not to {partition}: leave --partition out, or "
            "leave out --config, --data, --set and --offline-fraction"
        )
    flags: dict[str, object] = {"protocol.offline_fraction": offline_fraction}
    with _source(settings_from(config, data, overrides, flags) if wants_source else None) as (batches, expiry):
        audits = {
            held: verify_store(
                state / partition_name(held), batches if held == BACKTESTS else None,
                expiry=expiry if held == BACKTESTS else None, receipts=receipts,
            )
            for held in partitions
        }  # fmt: skip
    searched = [verify_receipt_in_snapshots(name, held) for name, held in receipts.items() if held.snapshots]
    sound = all(audit.sound for audit in (*audits.values(), *searched))
    typer.echo(_json(audits, searched, receipts, sound) if as_json else _text(audits, searched, receipts))
    if not sound:
        raise typer.Exit(EXIT_DIFFERENT)


def _chosen(state: Path, partition: int | None) -> list[int]:
    held = held_partitions(state) if partition is None else [partition]
    if not held:
        raise VerificationError(f"{state} holds no partition: name the state directory of a run")
    return held


@contextmanager
def _source(settings: Settings | None) -> Iterator[tuple[Batches | None, Expiry | None]]:
    """The online events of a backtest with these settings, and its expiry; None twice without settings."""
    if settings is None:
        yield None, None
        return
    # Not above: they load torch, and an audit without a source starts at once without it.
    from streams.commands.progress import shown_progress
    from streams.replay import prepared

    days = settings.state.expire_after_days
    with shown_progress() as progress, prepared(settings, progress) as events:
        progress.stage("auditing")
        expiry = None if days is None else Expiry(round(days * DAY_MS))
        yield partial(online_batches, events.ordered, events.split), expiry


def _json(audits: dict[int, Audit], searched: list[Audit], receipts: dict[str, Receipt], sound: bool) -> str:
    return json.dumps(
        {
            "sound": sound,
            "partitions": [{"partition": number, **_as_dict(audit)} for number, audit in audits.items()],
            "snapshots": [_as_dict(audit) for audit in searched],
            "receipts": {name: receipt.as_dict() for name, receipt in receipts.items()},
        }
    )


def _as_dict(audit: Audit) -> dict[str, object]:
    progress, first = audit.progress, audit.first
    return {
        "sound": audit.sound,
        "users": audit.users,
        "events": audit.events,
        "offset": None if progress is None else progress.offset,
        "damaged": audit.damaged,
        "source_events": audit.source_events,
        "found": audit.found,
        "first": None if first is None else first.as_dict(),
        "findings": [finding.as_dict() for finding in audit.findings],
        "notes": audit.notes,
    }


def _text(audits: dict[int, Audit], searched: list[Audit], receipts: dict[str, Receipt]) -> str:
    lines = [line for number, audit in audits.items() for line in _partition_lines(number, audit)]
    for audit in searched:
        lines += _finding_lines(audit)
        lines += [f"note: {note}" for note in audit.notes]
    for name, receipt in receipts.items():
        lines += [f"receipt {name} cannot show: {matter}" for matter in receipt.beyond_reach]
    return "\n".join(lines)


def _partition_lines(number: int, audit: Audit) -> list[str]:
    progress = audit.progress
    up_to = "nothing applied yet" if progress is None else f"up to offset {progress.offset:,}"
    state = "sound" if audit.sound else "NOT SOUND"
    lines = [f"partition {number}: {state}, {audit.users:,} users, {audit.events:,} events, {up_to}"]
    if audit.source_events is None:
        lines.append("rows were checked by themselves: checksums, owners, offsets, versions and totals")
    else:
        lines.append(
            f"every count and ledger was compared with {audit.source_events:,} events of the source up to that offset"
        )
    return lines + _finding_lines(audit) + [f"note: {note}" for note in audit.notes]


def _finding_lines(audit: Audit) -> list[str]:
    if not audit.found:
        return []
    lines = [f"{finding.kind}: {finding.text}" for finding in audit.findings[:SHOWN_FINDINGS]]
    if audit.found > SHOWN_FINDINGS:
        lines.append(f"… {audit.found - SHOWN_FINDINGS:,} more, see --json")
    first = audit.first
    if first is not None and first.user is not None:
        lines.append(
            f"first to differ: user {shown(first.user)}, {'' if first.exact else 'at or before '}offset {first.offset}"
        )
    return lines
