"""What each way of bringing a user's row onto a new version loses against deriving it anew from all events.

``history`` derives anew from the history where that is kept, and here all are: it is the standard. ``ring`` derives
anew from the latest 32 events, ``closed`` exchanges the prior. MovieLens 1M's users come once, with all their events,
so few of their rows ever move; in the generated stream users return often, and a row moves at nearly every event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.command import Options, Skipped
from benchmarks.online_events import batches_of, catalogues, events_of, of_new_users
from benchmarks.online_run import (
    NATS,
    POINTS,
    SECONDS,
    Measured,
    Run,
    World,
    figures,
    of_protocol,
    stream,
    train,
    varied,
)
from benchmarks.report import Figure
from configs.loading import load_settings
from configs.settings import Settings
from streams.generation.events import EventStream
from streams.generation.settings import GeneratorSettings
from streams.results import POINTS as POINTS_IN_ONE

EVENTS, USERS, ITEMS = 500_000, 5_000, 1_000
PAST = 0.1
WAYS = ("ring", "closed")


def movielens(options: Options, seed: int) -> tuple[Settings, World]:
    """With a tenth of the users offline, where versions differ most. Raises Skipped."""
    settings = options.settings(
        "ml-1m", "ml-1m", training__seed=seed, meta__moves="everything", protocol__offline_fraction=0.1,
        protocol__score_last=0.3,
    )  # fmt: skip
    return settings, of_protocol(settings)


def returning(options: Options, seed: int) -> tuple[Settings, World]:
    """Users who are there from their first event to the end of the stream, some 100 events each."""
    events = options.scaled(EVENTS)
    generated = EventStream(GeneratorSettings(options.scaled(USERS), ITEMS, events, zipf=0.5, lifetime=1.0, seed=seed))
    past = events_of(generated, 0, int(PAST * events))
    later = of_new_users(events_of(generated, int(PAST * events)), past)
    settings = load_settings("demo", environ={})
    changes = {
        "training.seed": seed, "training.epochs": options.scaled(settings.training.epochs), "meta.moves": "everything"
    }  # fmt: skip
    return varied(settings, changes), World(past, batches_of(later), *catalogues(generated))


SOURCES: Mapping[str, Callable[[Options, int], tuple[Settings, World]]] = {
    "rebase, ml-1m": movielens,
    "rebase, users who return": returning,
}


def run(options: Options) -> Iterator[Figure]:
    """Both streams; MovieLens 1M where it is there."""
    for case, source in SOURCES.items():
        if options.wants(case):
            try:
                runs = [measured(*source(options, seed)) for seed in options.seeds]
            except Skipped as reason:
                options.progress(f"{case}: skipped, {reason}")
                continue
            yield from figures(case, runs, {}, options)


def measured(settings: Settings, world: World) -> Measured:
    """AUC and log-loss of the standard, and what the other ways lose of them."""
    trained = train(world, settings)
    whole = stream(trained, varied(settings, {"meta.rebase": "history"}))
    found: Measured = {
        ("history: AUC", ""): whole.auc(),
        ("  log-loss", NATS): whole.log_loss(),
        ("  events", ""): float(len(whole.events)),
        ("  rows moved", ""): moved(whole),
        ("  stream", SECONDS): whole.seconds,
    }
    for way in WAYS:
        other = stream(trained, varied(settings, {"meta.rebase": way}))
        found |= {
            (f"{way}: AUC lost", POINTS): POINTS_IN_ONE * (whole.auc() - other.auc()),
            (f"  {way}: log-loss gained", NATS): other.log_loss() - whole.log_loss(),
            (f"  {way}: rows moved", ""): moved(other),
            (f"  {way}: stream", SECONDS): other.seconds,
        }
    return found


def moved(run: Run) -> float:
    """Rows that came onto another version."""
    return 0.0 if run.meta is None else float(sum(run.meta.moved.values()))
