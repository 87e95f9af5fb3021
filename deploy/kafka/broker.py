#!/usr/bin/env python3
"""A real Kafka for development and tests: start it, stop it, say where it is. Needs Python 3.11 and nothing else of it.

Where KAFKA_BOOTSTRAP is set nothing is started: that cluster is used. Else Docker runs the brokers if its daemon
answers, else Java 17 with Kafka's own jars, which Maven fetches. Everything listens on 127.0.0.1 only.

Exit codes: 0 done; 1 `where`: none runs; 2 it cannot be done: one line on stderr says why and what to do.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from deploy.kafka.answering import answers  # noqa: E402
from deploy.kafka.cluster import HEAP_MB, PLAIN, Cluster, remove_cluster  # noqa: E402
from deploy.kafka.launchers import BrokerError, available_launcher, last_words  # noqa: E402

EXTERNAL = "KAFKA_BOOTSTRAP"
DIRECTORY = ROOT / "build" / "kafka" / "cluster"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except BrokerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 2


def external() -> str | None:
    """The cluster that KAFKA_BOOTSTRAP names.

    Raises:
        BrokerError: none of its brokers answers.
    """
    named = os.environ.get(EXTERNAL)
    if named and not any(answers(address) for address in named.split(",")):
        raise BrokerError(f"{EXTERNAL}={named}: no broker answers there; start it, or unset {EXTERNAL}")
    return named or None


def check(options: argparse.Namespace) -> int:
    """Says whether brokers can be run here, and how; fetches what is missing."""
    there = external()
    print(f"{EXTERNAL}={there}" if there else f"brokers run by {available_launcher().name}")
    return 0


def start(options: argparse.Namespace) -> int:
    """Starts a cluster, or finds it running."""
    if there := external():
        print(there)
        return 0
    directory: Path = options.dir
    if options.fresh:
        remove_cluster(directory)
    cluster = Cluster(
        directory,
        brokers=options.brokers,
        heap_mb=options.heap,
        properties=dict(options.property),
        listeners=dict(options.listener),
    )
    cluster.start()
    print(cluster.bootstrap)
    return 0


def stop(options: argparse.Namespace) -> int:
    """Stops what `start` started; a cluster of somebody else is left alone."""
    if cluster := Cluster.at(options.dir):
        cluster.stop()
    return 0


def kill(options: argparse.Namespace) -> int:
    """Ends one broker."""
    _own(options.dir).kill(options.broker, options.signal)
    return 0


def restart(options: argparse.Namespace) -> int:
    """Starts one broker again."""
    _own(options.dir).restart(options.broker)
    return 0


def where(options: argparse.Namespace) -> int:
    """Prints the addresses for clients."""
    there = external() if options.listener == PLAIN else None
    cluster = Cluster.at(options.dir)
    if there is None and (cluster is None or not cluster.running()):
        return 1
    if cluster is not None and there is None:
        there = cluster.bootstrap_of(options.listener)
    print(there)
    return 0


def logs(options: argparse.Namespace) -> int:
    """Prints the paths of the logs, and the latest trouble in each."""
    cluster = _own(options.dir)
    for node in cluster.nodes:
        print(cluster.log(node))
        print(f"  {last_words(cluster.log(node))}")
    return 0


def _own(directory: Path) -> Cluster:
    cluster = Cluster.at(directory)
    if cluster is None:
        beside = f" ({EXTERNAL} names a cluster that is not ours)" if os.environ.get(EXTERNAL) else ""
        raise BrokerError(f"{directory} holds no cluster{beside}; `start` makes one")
    return cluster


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="broker.py", description=__doc__.split("\n\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run in (check, start, stop, kill, restart, where, logs):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--dir", type=Path, default=DIRECTORY, help="where data, logs and notes are kept")
        if run is start:
            _add_start_options(command)
        elif run is where:
            command.add_argument("--listener", default=PLAIN, help="whose addresses; %(default)s if left out")
        if run in (kill, restart):
            command.add_argument("--broker", type=int, default=1, metavar="K", help="which one, from 1")
        if run is kill:
            command.add_argument("--signal", choices=("TERM", "KILL"), default="KILL", help="how; %(default)s")
    return parser


def _add_start_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--brokers", type=int, default=1, metavar="N", help="how many; each is controller as well")
    command.add_argument("--heap", type=int, default=HEAP_MB, metavar="MB", help="of each broker; %(default)s")
    command.add_argument("--fresh", action="store_true", help="drop the data of an earlier, stopped cluster there")
    for name, meaning in (
        ("--property", "a broker's property, over the script's own; repeatable"),
        ("--listener", "one more listener, e.g. SECURE=SASL_SSL; repeatable"),
    ):
        command.add_argument(name, action="append", default=[], type=_pair, metavar="NAME=VALUE", help=meaning)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
