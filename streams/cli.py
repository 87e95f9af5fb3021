"""The command ``coldstream``.

Exit codes: 0 done; 1 the work was done and found a difference (``verify``) or was interrupted; 2 the input, the
settings or the arguments cannot be used: one line on stderr says what, where and what to do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import ClassVar

import typer

from configs.exceptions import ColdstreamError, InvalidSettings
from streams.lazy_group import LazyGroup

EXIT_INTERRUPTED = 1
EXIT_UNUSABLE = 2


class Commands(LazyGroup):
    """Every subcommand; its module is imported when it is asked for."""

    places: ClassVar[Mapping[str, str]] = {
        "train": "streams.commands.train:train",
        "backtest": "streams.commands.backtest:backtest",
        "worker": "streams.commands.worker:worker",
        "play": "streams.commands.play:play",
        "dead-letters": "streams.commands.dead_letters:app",
        "query": "streams.commands.query:query",
        "snapshot": "streams.commands.snapshot:take_snapshot",
        "restore": "streams.commands.restore:restore_snapshot",
        "verify": "streams.commands.verify:verify",
        "erase": "streams.commands.erase:erase",
        "meta": "streams.commands.meta:app",
        "generate": "streams.commands.generate:generate",
        "config": "streams.commands.config:app",
    }
    quick: ClassVar[frozenset[str]] = frozenset({"query"})


app = typer.Typer(
    name="coldstream", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)


@app.callback()
def _coldstream() -> None:
    """Learns every new user's taste from their first clicks, on the stream, and never forgets the others."""


def main() -> None:
    """Runs the command; what a user can mend is one line, not a traceback.

    An OSError that reaches this place is the machine's word on a path or a disk, which the user can mend too.
    """
    try:
        app()
    except ColdstreamError as error:
        problems = error.problems if isinstance(error, InvalidSettings) else (error,)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(EXIT_UNUSABLE)
    except OSError as error:
        where = error.filename if error.filename is not None else "a file"
        reason = error.strerror or type(error).__name__
        print(f"error: {where}: {reason}; check the path, its rights and the space on its disk", file=sys.stderr)
        sys.exit(EXIT_UNUSABLE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
