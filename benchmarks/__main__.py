"""Runs the benchmarks, prints a table for each, and writes build/benchmarks.json.

    python -m benchmarks [--data DIRECTORY] [--only kernel,stream_run] [--scale 0.1]

``DIRECTORY`` holds ``ml-1m`` and ``ml-100k`` as GroupLens publishes them; what needs them is skipped without it. At
``--scale 1`` and with the data it takes some forty minutes; each benchmark also runs alone: ``python -m
benchmarks.kernel``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from benchmarks import (
    decoding,
    kernel,
    live,
    online_meta,
    quality,
    query,
    restore,
    rows,
    sources,
    stream_run,
    training,
    wire,
)
from benchmarks.command import Benchmark, Options, Skipped, options_of, parser, say
from benchmarks.report import Figure, as_dict, table, write_json
from streams.provenance import describe_machine

BENCHMARKS: Mapping[str, Benchmark] = {
    "kernel": kernel.run,
    "stream_run": stream_run.run,
    "rows": rows.run,
    "restore": restore.run,
    "query": query.run,
    "sources": sources.run,
    "wire": wire.run,
    "decoding": decoding.run,
    "live": live.run,
    "training": training.run,
    "quality": quality.run,
    "online_meta": online_meta.run,
}
OUTPUT = Path("build/benchmarks.json")


def main() -> None:
    """The command."""
    options_parser = parser("Coldstream's benchmarks")
    options_parser.add_argument("--only", default="", help=f"some of {','.join(BENCHMARKS)}")
    options_parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file that is written")
    arguments = options_parser.parse_args()
    names = [name for name in arguments.only.split(",") if name] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        options_parser.error(f"no benchmark is named {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    options = options_of(arguments, lambda text: say(f"  {text}"))
    results = run_all(names, options, Console(stderr=arguments.json))
    write_json(arguments.output, results, options.scale)
    if arguments.json:
        print(json.dumps(as_dict(results, options.scale)))


def run_all(names: list[str], options: Options, console: Console) -> dict[str, list[Figure]]:
    """Runs some benchmarks in turn and shows each as soon as it is done; what cannot run says so in a line."""
    console.print(describe_machine(), soft_wrap=True)
    results: dict[str, list[Figure]] = {}
    for name in names:
        say(name)
        try:
            results[name] = list(BENCHMARKS[name](options))
        except Skipped as reason:
            console.print(f"{name}: skipped, {reason}", soft_wrap=True)
            continue
        if results[name]:
            console.print(table(name, results[name]))
    return results


if __name__ == "__main__":
    main()
