"""``coldstream dead-letters list | replay``: what was set aside and why, and sending it back once that is mended."""

from __future__ import annotations

import asyncio
import heapq
import json
import re
from collections import Counter
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from streams.commands.options import Config, Overrides, settings_from
from streams.kafka.connection import Connection
from streams.kafka.exceptions import LetterError
from streams.kafka.reaching import reach
from streams.live.letter import Letter
from streams.live.letter_topic import Choice, LetterTopic, Replayed
from streams.rejects import Reason

EXIT_LEFT = 1
"""Some of what was chosen could not be sent back; 0: all was; 2: the arguments or the brokers cannot be used."""
SHOWN_CHARACTERS = 200
"""Of a value or a key"""
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

app = typer.Typer(help="Show the records that were no events, or send them back.", no_args_is_help=True)

Reasons = Annotated[
    list[str] | None, typer.Option("--reason", help=f"Only this one; repeatable. One of: {', '.join(Reason)}.")
]
Since = Annotated[
    str | None, typer.Option(help="Only what failed since then: 30m, 6h, 2d, or 2026-01-31T12:00 (UTC without a zone).")
]
Partition = Annotated[int | None, typer.Option(min=0, help="Only records that came from this partition.")]
Offset = Annotated[int | None, typer.Option(min=0, help="Only the record that came from this offset of --partition.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON for machines.")]


@app.command("list")
def list_letters(
    config: Config = None,
    overrides: Overrides = None,
    reason: Reasons = None,
    since: Since = None,
    partition: Partition = None,
    offset: Offset = None,
    limit: Annotated[int, typer.Option(min=0, help="Show so many, the latest ones. All are counted.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show dead letters and count them by reason; changes nothing."""
    choice = _choice(reason, since, partition, offset)
    connection, topic = _connection(config, overrides)
    latest, counts = asyncio.run(_latest(connection, topic, choice, limit))
    if as_json:
        document = {"topic": topic, "letters": [_as_dict(letter) for letter in latest], "by_reason": dict(counts)}
        typer.echo(json.dumps(document))
    else:
        typer.echo("\n".join([*(_text(letter) for letter in latest), _totals(counts, len(latest))]))


@app.command()
def replay(
    config: Config = None,
    overrides: Overrides = None,
    reason: Reasons = None,
    since: Since = None,
    partition: Partition = None,
    offset: Offset = None,
    everything: Annotated[bool, typer.Option("--all", help="Every letter. Else name what to replay.")] = False,
    to: Annotated[str | None, typer.Option(help="Send to this topic, not to the one that a record came from.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also what was replayed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send records back as they were received, each once; exit code 1 if some that were chosen could not be.

    Key, value and headers are the record's own, and the header coldstream.replays counts up. The key decides the
    partition. A record that fails again becomes a new dead letter.
    """
    chosen = bool(reason) or since is not None or partition is not None or offset is not None
    if chosen == everything:
        raise LetterError("say what to replay: either --all, or --reason, --since, --partition, --offset")
    choice = _choice(reason, since, partition, offset)
    connection, topic = _connection(config, overrides)
    done = asyncio.run(_replayed(connection, topic, choice, to, again, dry_run))
    unfound = offset is not None and not (done.sent or done.not_whole or done.done_before)
    typer.echo(_replay_json(done, dry_run) if as_json else _replay_text(done, dry_run))
    if done.not_whole or unfound:
        raise typer.Exit(EXIT_LEFT)


def _connection(config: str | None, overrides: list[str] | None) -> tuple[Connection, str]:
    """How to reach the brokers, and the name of the dead letters' topic."""
    settings = settings_from(config, None, overrides, {})
    return Connection.of(settings.kafka), settings.stream.topics.dead_letters


def _choice(reasons: list[str] | None, since: str | None, partition: int | None, offset: int | None) -> Choice:
    if offset is not None and partition is None:
        raise LetterError("--offset needs --partition: every partition counts its offsets from 0")
    known = [str(reason) for reason in Reason]
    for reason in reasons or []:
        if reason not in known:
            raise LetterError(f"--reason {reason}: no such reason; there are: {', '.join(known)}")
    return Choice(frozenset(reasons or ()), None if since is None else _milliseconds(since), partition, offset)


def _milliseconds(since: str) -> int:
    """Since 1970, of a time or of how long ago it was."""
    if ago := re.fullmatch(r"(\d{1,6})([smhd])", since):
        at = datetime.now(UTC) - timedelta(**{UNITS[ago[2]]: int(ago[1])})
    else:
        try:
            at = datetime.fromisoformat(since)
        except ValueError:
            raise LetterError(f"--since {since}: write 30m, 6h, 2d, or a time such as 2026-01-31T12:00") from None
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0, round(at.timestamp() * 1000))


async def _latest(connection: Connection, topic: str, choice: Choice, limit: int) -> tuple[list[Letter], Counter[str]]:
    """The ``limit`` latest letters, oldest first, and how many there are by reason. Holds no more than it returns."""
    kept: list[tuple[int, int, int, Letter]] = []
    counts: Counter[str] = Counter()
    await reach(connection)
    async with aclosing(LetterTopic(connection, topic).letters(choice)) as letters:
        async for letter in letters:
            counts[letter.cause.reason] += 1
            entry = (letter.failed_ms, letter.partition, letter.offset, letter.excerpt(SHOWN_CHARACTERS * 4))
            if len(kept) < limit:
                heapq.heappush(kept, entry)
            elif limit:
                heapq.heappushpop(kept, entry)
    return [letter for *_, letter in sorted(kept, key=lambda entry: entry[:3])], counts


async def _replayed(
    connection: Connection, topic: str, choice: Choice, to: str | None, again: bool, dry: bool
) -> Replayed:
    await reach(connection)
    return await LetterTopic(connection, topic).replay(choice, to=to, again=again, dry=dry)


def _as_dict(letter: Letter) -> dict[str, object]:
    cause = letter.cause
    return {
        "letter": {"partition": letter.partition, "offset": letter.offset, "failed_ms": letter.failed_ms},
        "topic": cause.topic,
        "partition": cause.partition,
        "offset": cause.offset,
        "timestamp_ms": cause.timestamp_ms,
        "stage": cause.stage,
        "reason": cause.reason,
        "class": cause.error,
        "message": cause.message,
        "version": cause.version,
        "worker": cause.worker,
        "key": _shown(letter.key),
        "value": _shown(letter.value),
        "value_bytes": letter.value_bytes,
        "whole": letter.whole,
        "replays": letter.replays,
    }


def _text(letter: Letter) -> str:
    cause = letter.cause
    at = datetime.fromtimestamp(letter.failed_ms / 1000, UTC).isoformat(timespec="seconds")
    size = "no value" if letter.value_bytes is None else f"{letter.value_bytes:,} bytes"
    notes = ("" if letter.whole else ", cut") + (f", replayed {letter.replays} times" if letter.replays else "")
    return (
        f"{at} {_visible(cause.topic)}/{cause.partition} offset {cause.offset}: {_visible(cause.reason)} "
        f"({_visible(cause.stage)}, {_visible(cause.error)}): {_visible(cause.message)}\n"
        f"    key {_shown(letter.key)}, {size}{notes}: {_shown(letter.value)}"
    )


def _shown(content: bytes | None) -> str | None:
    """Text of at most SHOWN_CHARACTERS characters."""
    if content is None:
        return None
    text = _visible(content[: SHOWN_CHARACTERS * 4].decode(errors="backslashreplace"))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _visible(text: str) -> str:
    """The text with an escape for each character that could do something to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _totals(counts: Counter[str], shown: int) -> str:
    if not counts:
        return "no dead letters"
    parts = ", ".join(f"{count:,} {_visible(reason)}" for reason, count in counts.most_common())
    left = "" if shown == counts.total() else f" (the latest {shown:,} are shown)"
    return f"{counts.total():,} dead letters{left}: {parts}"


def _replay_json(done: Replayed, dry_run: bool) -> str:
    return json.dumps({
        "dry_run": dry_run, "sent": dict(done.sent), "replayed_before": done.done_before, "not_whole": done.not_whole,
    })  # fmt: skip


def _replay_text(done: Replayed, dry_run: bool) -> str:
    verb = "would be sent" if dry_run else "sent"
    lines = [f"{count:,} {verb} to {topic}" for topic, count in done.sent.items()] or [f"nothing {verb}"]
    if done.done_before:
        lines.append(f"{done.done_before:,} passed over: they were replayed before (--again sends them once more)")
    if done.not_whole:
        lines.append(f"{done.not_whole:,} passed over: they were too large to be kept whole; produce them anew")
    return "\n".join(lines)
