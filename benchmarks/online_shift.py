"""An abrupt shift on a generated stream: how much of what retraining would bring does the online stage recover.

The model has learned from the stream's first fifth. At the middle, from one event to the next, *tastes* turn (every
user's taste is another one, and so is what features say of tastes), or *items* do (what users like in an item is
something else, and so is what features say of it). Only users who began after the first fifth are streamed, and of
these every second one.

Measured is the AUC of the last 10,000 of the 50,000 streamed events that follow the shift, by (a) the model frozen,
(b) the online stage, (c) a model trained anew, on the first 50,000 events after the shift of the other half of the
users, who are never streamed: what a retraining could know when the window ends. Recovered is (b − a) / (c − a). The
retrained model meets users without what they did before the shift, which would mislead it. Beside it stands (c) from
all the other half's events to the end of the stream, three times as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import Options
from benchmarks.online_events import (
    batches_of,
    catalogues,
    events_of,
    of_new_users,
    of_users,
    with_items,
    with_other_items,
)
from benchmarks.online_run import VERSIONS, Goal, Measured, World, figures, frozen, stream, train, varied
from benchmarks.report import Figure
from configs.loading import load_settings
from configs.settings import Settings
from learner.interactions import Interactions
from learner.metrics import auc
from learner.user_hash import drawn, user_crcs
from streams.generation.events import EventStream
from streams.generation.settings import GeneratorSettings

EVENTS, USERS, ITEMS, LIFETIME, ZIPF = 600_000, 8_000, 600, 0.2, 0.5
PAST, SHIFT = 0.15, 0.6
"""Shares of the stream"""
WINDOW, LATEST = 50_000, 10_000
"""Events after the shift"""
STREAMED = 0x165667B1
"""Salt of the hash that draws the half of the users who are streamed"""
SWIFT: Mapping[str, object] = {"meta.every_events": 500, "meta.recent_share": 0.5, "meta.rate": 0.03}
"""Rounds that follow the stream: often, half on users of the moment, with large steps. The settings' own, with ten
times as many events between two rounds, are for streams whose tastes stay. Chosen on seed 0 of these very streams:
what it recovers is what the mechanism can do, not what it does unasked"""
RECOVERED = ("recovered of what retraining brings", "")
GOALS: Mapping[tuple[str, str], Goal] = {RECOVERED: Goal(0.8)}


@dataclass(frozen=True, slots=True)
class Shifting:
    """A stream whose tastes shift."""

    world: World
    """Up to the end of the window"""
    others: Interactions
    """After the shift, of users who are not streamed"""
    window: int

    @property
    def after(self) -> Interactions:
        """The streamed events of the window."""
        events = Interactions.concatenate(self.world.batches)
        return events.take(slice(len(events) - self.window, None)).pruned()


def tastes(generator: GeneratorSettings) -> tuple[EventStream, EventStream]:
    """(before, after): every user's taste is another one."""
    before = _all_items_there(EventStream(replace(generator, drift="abrupt", drift_at=SHIFT)))
    return before, before


def items(generator: GeneratorSettings) -> tuple[EventStream, EventStream]:
    """(before, after): what users like in an item is something else."""
    before = _all_items_there(EventStream(generator))
    return before, with_other_items(before, generator.seed + 1)


SHIFTS: Mapping[str, Callable[[GeneratorSettings], tuple[EventStream, EventStream]]] = {
    "shift of tastes": tastes,
    "shift of items": items,
}


def run(options: Options) -> Iterator[Figure]:
    """Both shifts."""
    for case, shift in SHIFTS.items():
        if options.wants(case):
            runs = [measured(shifting(shift, options, seed), settings_of(options, seed)) for seed in options.seeds]
            yield from figures(case, runs, GOALS, options)


def settings_of(options: Options, seed: int) -> Settings:
    """The generator's profile with the online stage."""
    settings = load_settings("demo", environ={})
    epochs = options.scaled(settings.training.epochs)
    return varied(settings, {"training.seed": seed, "training.epochs": epochs, "meta.moves": "everything"})


def shifting(
    shift: Callable[[GeneratorSettings], tuple[EventStream, EventStream]], options: Options, seed: int
) -> Shifting:
    """The stream, cut as the module says."""
    events = options.scaled(EVENTS)
    before, after = shift(
        GeneratorSettings(options.scaled(USERS), ITEMS, events, zipf=ZIPF, lifetime=LIFETIME, seed=seed)
    )
    past_events, at = int(PAST * events), int(SHIFT * events)
    past = events_of(before, 0, past_events)
    later = events_of(after, at)
    window = of_new_users(of_users(later, streamed), past).take(slice(options.scaled(WINDOW)))
    whole = Interactions.concatenate(
        [of_new_users(of_users(events_of(before, past_events, at), streamed), past), window]
    )
    world = World(past, batches_of(whole), *catalogues(before))
    return Shifting(world, of_users(later, lambda ids: ~streamed(ids)), len(window))


def measured(given: Shifting, settings: Settings) -> Measured:
    """AUC at the end of the window, and what of the retrained model's is recovered."""
    trained, label = train(given.world, settings), given.after.label
    latest = slice(len(label) - len(label) * LATEST // WINDOW, None)

    def at_the_end(probability: NDArray[np.float32]) -> float:
        return auc(label[latest], probability[-len(label) :][latest])

    lowest = at_the_end(frozen(trained, settings).probability)
    swift, usual = stream(trained, varied(settings, SWIFT)), stream(trained, settings)
    highest, more = (
        at_the_end(frozen(train(World(past, batches_of(given.after), given.world.users, given.world.items), settings),
                          settings).probability)
        for past in (given.others.take(slice(given.window)).pruned(), given.others)
    )  # fmt: skip
    reached, by_default = at_the_end(swift.probability), at_the_end(usual.probability)
    decided = {} if swift.meta is None else {k: float(swift.meta.decided(k)) for k in ("promoted", "rejected")}
    return {
        ("AUC, frozen", ""): lowest, ("AUC, online stage", ""): reached, ("AUC, retrained", ""): highest,
        RECOVERED: (reached - lowest) / (highest - lowest),
        **{(name, VERSIONS): count for name, count in decided.items()},
        ("AUC, online stage as the settings have it", ""): by_default,
        ("  recovered", ""): (by_default - lowest) / (highest - lowest),
        ("AUC, retrained on all later events", ""): more,
        ("  recovered of it", ""): (reached - lowest) / (more - lowest),
    }  # fmt: skip


def streamed(ids: Sequence[str]) -> NDArray[np.bool_]:
    """Which users are, if they are new."""
    return drawn(user_crcs([i.encode() for i in ids]), STREAMED, 0.5)


def _all_items_there(stream: EventStream) -> EventStream:
    """A retrained model is not to know of items that come after the window."""
    return with_items(stream, replace(stream.items, arrival=np.zeros(len(stream.items.arrival))))
