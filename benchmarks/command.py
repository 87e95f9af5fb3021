"""What every benchmark's command line shares: ``--data``, ``--scale``, ``--case``, ``--seeds``, ``--json``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.report import Figure, as_dict, table
from configs.loading import load_settings
from configs.settings import Settings
from streams.provenance import describe_machine

DATA_VARIABLE = "COLDSTREAM_DATA"


class Skipped(Exception):
    """A benchmark cannot run here: the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a benchmark is asked for."""

    data: Path | None = None
    """The directory that holds ``ml-1m`` and ``ml-100k``"""
    scale: float = 1.0
    """Share of the work (events or epochs); below 1 it is a trial, and no target applies"""
    seeds: tuple[int, ...] = (0,)
    """Of training; one run for each"""
    case: str = ""
    """Only cases whose name contains this"""
    progress: Callable[[str], None] = lambda _: None

    def wants(self, case: str) -> bool:
        """Whether a case is asked for; ``progress`` is told of those that are."""
        wanted = self.case.lower() in case.lower()
        if wanted:
            self.progress(case)
        return wanted

    def scaled(self, amount: int) -> int:
        """The share of an amount of work, at least 1."""
        return max(1, round(amount * self.scale))

    def target(self, value: float | None) -> float | None:
        """The target, unless this is a trial."""
        return value if self.scale >= 1 else None

    def dataset(self, name: str) -> Path:
        """The directory of a data set. Raises Skipped when it is not there."""
        if self.data is None:
            raise Skipped(f"needs {name}: give --data DIRECTORY, or set {DATA_VARIABLE}, to what holds {name}/")
        if not (self.data / name).is_dir():
            raise Skipped(f"needs {name}: {self.data / name} is not a directory")
        return self.data / name

    def settings(self, profile: str, dataset: str, **overrides: object) -> Settings:
        """A profile's settings on a data set, whatever the environment says; ``__`` in a name stands for a dot."""
        epochs = load_settings(profile, environ={}).training.epochs
        keys = {name.replace("__", "."): value for name, value in overrides.items()}
        paths = [str(self.dataset(dataset))]
        flags = {"data.paths": paths, "training.epochs": self.scaled(epochs), **keys}
        return load_settings(profile, flags, environ={})


Benchmark = Callable[[Options], Iterable[Figure]]
"""Measures, figure by figure. Raises Skipped when nothing can be measured here."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks take."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "--data", type=Path, default=os.environ.get(DATA_VARIABLE),
        help=f"directory that holds ml-1m and ml-100k (default: {DATA_VARIABLE})",
    )  # fmt: skip
    result.add_argument("--scale", type=_scale, default=1.0, help="share of the work; below 1 is a trial, no targets")
    result.add_argument("--seeds", type=_seeds, default=(0,), help="of training, such as 0,1,2 (quality)")
    result.add_argument("--case", default="", help="only cases whose name contains this text")
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def options_of(arguments: argparse.Namespace, progress: Callable[[str], None]) -> Options:
    """The parsed command line."""
    data = None if arguments.data is None else Path(arguments.data)
    return Options(data, arguments.scale, arguments.seeds, arguments.case, progress)


def say(text: str) -> None:
    """A line for whoever waits; results alone go to standard output."""
    print(text, file=sys.stderr, flush=True)


def standalone(name: str, benchmark: Benchmark, description: str | None, argv: Sequence[str] | None = None) -> None:
    """Runs one benchmark as a command."""
    arguments = parser((description or name).splitlines()[0]).parse_args(argv)
    options = options_of(arguments, say)
    try:
        figures = list(benchmark(options))
    except Skipped as reason:
        raise SystemExit(f"{name}: skipped, {reason}") from None
    if arguments.json:
        print(json.dumps(as_dict({name: figures}, options.scale)))
    else:
        console = Console()
        console.print(table(name, figures))
        console.print(describe_machine(), soft_wrap=True)


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("a share above 0, at most 1")
    return value


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
