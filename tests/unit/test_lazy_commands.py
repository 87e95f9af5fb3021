"""Commands are imported when they are asked for, all are listed, and a quick one converts as typer does."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from streams.cli import Commands, app
from streams.quick_command import QuickCommand

RUNNER = CliRunner()


def test_every_command_is_listed_with_its_own_help():
    group = typer.main.get_command(app)
    shown = " ".join(RUNNER.invoke(app, ["--help"], terminal_width=200).output.split())
    for name, place in Commands.places.items():
        module, _, attribute = place.partition(":")
        found = getattr(import_module(module), attribute)
        first_line = (found.info.help if isinstance(found, typer.Typer) else found.__doc__).strip().splitlines()[0]
        assert group.commands[name].name == name
        assert group.commands[name].help.startswith(first_line)
        assert name in shown
    assert list(group.commands) == list(Commands.places)
    assert "nothing" not in group.commands


def test_a_subgroup_keeps_its_commands():
    group = typer.main.get_command(app)
    assert sorted(group.commands["config"].commands) == ["check", "show"]


def test_a_near_miss_is_named():
    result = RUNNER.invoke(app, ["qury"])
    assert result.exit_code == 2
    assert "Did you mean 'query'?" in result.output


def test_the_command_line_itself_loads_next_to_nothing():
    program = (
        "import sys, streams.cli; "
        "print({'numpy', 'torch', 'numba', 'pydantic', 'rich', 'yaml', 'rocksdict'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


def both(*arguments):
    """What a quick command and a plain one make of the same arguments: (exit code, output) each."""
    outcomes = []
    for kind in (QuickCommand, typer.core.TyperCommand):
        small = typer.Typer(add_completion=False)

        @small.command(cls=kind)
        def show(
            name: str,
            path: Annotated[Path, typer.Option()],
            count: Annotated[int, typer.Option(min=0)] = 3,
            maybe: int | None = None,
            many: list[str] | None = None,
            pair: tuple[str, str] | None = None,
            flag: Annotated[bool, typer.Option("--flag")] = False,
            share: float = 0.5,
        ) -> None:
            print([name, path, count, maybe, many, pair, flag, share])

        result = RUNNER.invoke(small, arguments)
        outcomes.append((result.exit_code, result.output))
    return outcomes


@pytest.mark.parametrize(
    "line",
    [
        "ann --path a/b",
        "ann --path a --count 0 --maybe -7 --many x --many y --pair p q --flag --share 0.25",
        "--help",
        "ann",
        "--path a",
        "ann --path a --pair p",
        "ann --path a --nothing",
    ],
)
def test_a_quick_command_does_with_arguments_what_a_plain_one_does(line):
    quick, plain = both(*line.split())
    assert quick == plain


@pytest.mark.parametrize("value", ["-1", "1.5", "x", ""])
def test_a_quick_command_refuses_numbers_that_a_plain_one_refuses(value):
    quick, plain = both("ann", "--path", "a", "--count", value)
    assert (quick[0], plain[0]) == (2, 2)
    assert "Invalid value for '--count'" in quick[1]
