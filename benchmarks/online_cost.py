"""What the online stage costs the stream: events per second with it on, against off, in one process.

A generated stream of 137,000 users whose activity follows Zipf's law (1.1), in memory, so that reading costs nothing.
A worker's rounds are to come every few seconds; at the speed of this stream that is every 500,000 events. In one
process a round stops the stream, where a worker's runs beside it. On and off take turns; the best of each counts, for
whatever else the machine does only adds to it. The histories of all users fit their bound; beside it stands a bound of
a sixteenth of the events, as of a stream that has run for long: most users' histories are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.clock import clocked
from benchmarks.command import Options
from benchmarks.online_events import batches_of, catalogues, events_of, of_new_users
from benchmarks.online_run import Goal, Measured, Run, Trained, World, figures, frozen, stream, train, varied
from benchmarks.report import Figure
from configs.settings import Settings
from learner.drift import DriftWatch
from state.histories import HistoryBook
from state.store import RocksUserStore
from streams.generation.events import EventStream
from streams.generation.settings import GeneratorSettings
from streams.meta.contributor import Contributor
from streams.versions import Mover

CASE = "cost, Zipf 1.1 over 137,000 users"
EVENTS, PAST, USERS, ITEMS, ZIPF = 4_000_000, 20_000, 137_000, 4_000, 1.1
EVERY_EVENTS, FULL = 500_000, 250_000
TURNS = 2
RATIO = ("speed, on against off", "")
STAGES: Mapping[tuple[type, str], str] = {
    (HistoryBook, "before"): "histories, before the walk",
    (HistoryBook, "after"): "histories, after it",
    (Contributor, "observe"): "what the span has seen",
    (DriftWatch, "add"): "drift detectors",
    (Mover, "move"): "rows onto a new version",
    (RocksUserStore, "write_batch"): "write rows and histories",
}
"""Public calls whose time is taken; writing is there without the online stage too"""


def run(options: Options) -> Iterator[Figure]:
    """Both speeds, and what takes the time."""
    if options.wants(CASE):
        trained, settings = prepare(options)
        full = varied(settings, {"meta.histories.events": options.scaled(FULL)})
        yield from figures(CASE, [measured(trained, settings, full)], {RATIO: Goal(0.9)}, options)


def prepare(options: Options) -> tuple[Trained, Settings]:
    """A model of the first events; speed does not depend on what it knows."""
    generated = EventStream(
        GeneratorSettings(options.scaled(USERS), ITEMS, options.scaled(EVENTS), zipf=ZIPF, lifetime=1.0)
    )
    past = events_of(generated, 0, options.scaled(PAST))
    later = of_new_users(events_of(generated, options.scaled(PAST)), past)
    changes = {
        "training.epochs": 1, "training.users_per_batch": 1024, "meta.moves": "everything",
        "meta.every_events": options.scaled(EVERY_EVENTS),
    }  # fmt: skip
    settings = varied(Settings(), changes)
    return train(World(past, batches_of(later), *catalogues(generated)), settings), settings


def measured(trained: Trained, settings: Settings, full: Settings) -> Measured:
    """The best of some turns; then one with the clocks on."""
    turns: list[tuple[Run, Run]] = [(frozen(trained, settings), stream(trained, settings)) for _ in range(TURNS)]
    off, on = (min((turn[k] for turn in turns), key=lambda each: each.seconds) for k in (0, 1))
    seconds = dict.fromkeys(STAGES.values(), 0.0)
    with clocked(STAGES, seconds):
        stream(trained, settings)
    events, sampled = len(on.events), stream(trained, full)
    found: Measured = {
        RATIO: off.seconds / on.seconds,
        ("off", "events/s"): events / off.seconds,
        ("on", "events/s"): events / on.seconds,
        ("ratio where most histories are not kept", ""): off.seconds / sampled.seconds,
    }
    if on.meta is not None:
        rounds = max(on.meta.rounds, 1)
        found |= {
            ("rounds", ""): float(on.meta.rounds),
            ("a round", "ms"): 1000 * on.meta.seconds / rounds,
            ("between two rounds", "s"): on.seconds / rounds,
            ("ratio without the rounds themselves", ""): off.seconds / (on.seconds - on.meta.seconds),
        }
    return found | {(f"  {stage}", "µs/event"): 1e6 * spent / events for stage, spent in seconds.items()}
