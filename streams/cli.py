"""The command ``coldstream``.

Exit codes: 0 done; 1 the work was done and found a difference (``verify``) or was interrupted; 2 the input, the
settings or the arguments cannot be used: one line on stderr says what, where and what to do.
"""

from __future__ import annotations

import sys

import typer

from configs.exceptions import ColdstreamError, InvalidSettings
from streams.commands import backtest, config, generate, query, train

EXIT_INTERRUPTED = 1
EXIT_UNUSABLE = 2

app = typer.Typer(
    name="coldstream",
    help="Learns every new user's taste from their first clicks, on the stream, and never forgets the others.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("train")(train.train)
app.command("backtest")(backtest.backtest)
app.command("query")(query.query)
app.command("generate")(generate.generate)
app.add_typer(config.app, name="config")


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
