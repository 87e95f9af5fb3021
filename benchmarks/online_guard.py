"""What the gate keeps off: a stream of users unlike the old ones, and labels that were tampered with.

*Forced drift.* MovieLens 1M's users arrive in order of their share of likes, the highest first: the first 70 % are
learned from, the others stream. *Poison.* The users arrive as they did; of the stream's, a tenth (by a hash of the id)
or a quarter (one partition of four) have every label the other way round.

Measured are users whom no version has learned from, as version 0 and the last version predict every event of theirs
while they adapt to it: those whom the settings hold out, on whom the gate decides, and the *witnesses*, a tenth of all
users, who are taken out of past and stream beforehand, so that the gate knows nothing of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.command import Options
from benchmarks.online_events import Chosen, arrivals_by_rate, flipped, histories_of, of_users, write_movielens
from benchmarks.online_run import (
    NATS,
    POINTS,
    VERSIONS,
    Goal,
    Measured,
    Probability,
    Run,
    World,
    figures,
    frozen,
    lift,
    of_protocol,
    stream,
    train,
    varied,
)
from benchmarks.report import Figure
from configs.settings import Settings
from learner.adaptation import Adaptation
from learner.baselines import build_problem, pooled
from learner.baselines.embedding import take_step
from learner.baselines.problem import Events, Problem, mean_log_loss
from learner.gate import Limits, bootstrap
from learner.interactions import Interactions
from learner.metrics import event_index, event_log_loss, paired_difference
from learner.rebasing import relearn
from learner.scan import scan_threads
from learner.serving import ServingModel
from learner.user_hash import drawn, held_out_users, user_crcs
from learner.user_state import RowLayout
from streams.kafka.partitioning import partition_of
from streams.results import POINTS as POINTS_IN_ONE
from streams.sources import open_source

DRIFT = "forced drift"
FALL, RISE = ("fall of AUC", POINTS), ("rise of log-loss", NATS)
AGAINST_CLEAN = ("  against the clean stream", POINTS)
DRIFT_GOALS: Mapping[tuple[str, str], Goal] = {RISE: Goal(0.003, at_most=True)}
POISON_GOALS: Mapping[tuple[str, str], Goal] = {FALL: Goal(0.1, at_most=True)}
WITNESSES, POISONED = 0x3C6EF372, 0x1B873593
"""Salts of the hashes that draw them"""
WITNESS_SHARE, POISONED_SHARE, PARTITIONS = 0.1, 0.1, 4
EARLY = 20
"""Events of a user after which most of what a start was worth is forgotten"""
POOLED = pooled.GRID[1]
"""One of the baseline's own settings; here only the rate of the fine-tuning is searched for"""
SAMPLES = 400


def _a_tenth(ids: Sequence[str]) -> NDArray[np.bool_]:
    return drawn(user_crcs([i.encode() for i in ids]), POISONED, POISONED_SHARE)


def _a_partition(ids: Sequence[str]) -> NDArray[np.bool_]:
    return np.fromiter((partition_of(i.encode(), PARTITIONS) == 0 for i in ids), np.bool_, len(ids))


POISONS: Mapping[str, Chosen] = {
    "poison, a tenth of the users": _a_tenth,
    "poison, one partition of four": _a_partition,
}


@dataclass(frozen=True, slots=True)
class Judges:
    """N events, user by user, of users whom nothing is learned from."""

    events: Interactions
    unseen: NDArray[np.bool_]
    """(N,) those of witnesses"""

    @staticmethod
    def of(events: Interactions) -> Judges:
        """Of these users."""
        ordered = events.take(np.argsort(events.user, kind="stable"))
        return Judges(ordered, witnesses(events.user_ids)[ordered.user])

    def predicted(self, model: ServingModel, ring: int) -> Probability:
        """(N,) each event from its user's state under the version after all earlier ones."""
        model.item_rows(self.events.item_ids, self.events.item_features)  # it meets items as a stream would
        histories = histories_of(self.events, model)
        adaptation = Adaptation(RowLayout.of(model.first, model.second, ring), model.first, model.second)
        logit = relearn(adaptation, model, histories, model.means_of(histories.features)).logit
        return (1 / (1 + np.exp(-logit))).astype(np.float32)

    def measured(self, before: Probability, after: Probability) -> Measured:
        """What the second of two predictions has lost, paired."""
        label, user = self.events.label, self.events.user
        rise = event_log_loss(label, after) - event_log_loss(label, before)
        total, weight = np.bincount(user, rise).astype(np.float64), np.bincount(user).astype(np.float64)
        bounds = bootstrap(total[:, None], weight[:, None], Limits(bootstrap_samples=SAMPLES), seed=0)
        paired = paired_difference(label, before, after, user, bootstrap_samples=SAMPLES)
        return {
            RISE: float(bounds.rise[0]),
            ("  upper 95 %", NATS): float(bounds.upper[0]),
            ("  of witnesses alone", NATS): float(rise[self.unseen].mean()),
            ("  of the first 20 events", NATS): float(rise[event_index(user) < EARLY].mean()),
            FALL: -POINTS_IN_ONE * paired.auc_difference,
            ("  upper 97.5 %", POINTS): -POINTS_IN_ONE * paired.ci95[0],
        }


def run(options: Options) -> Iterator[Figure]:
    """The drift, then both poisons. Raises Skipped without MovieLens 1M."""
    if options.wants(DRIFT):
        yield from _figures(DRIFT, [drift(drifting(options, seed)) for seed in options.seeds], DRIFT_GOALS, options)
    wanted = [case for case in POISONS if options.wants(case)]
    if wanted:
        runs = [poison(settings_of(options, seed), wanted) for seed in options.seeds]
        for case in runs[0]:
            goals = POISON_GOALS if case in POISONS else {}
            yield from _figures(case, [found[case] for found in runs], goals, options)


def settings_of(options: Options, seed: int) -> Settings:
    """MovieLens 1M with the online stage."""
    return options.settings("ml-1m", "ml-1m", training__seed=seed, meta__moves="everything")


def drifting(options: Options, seed: int) -> tuple[Settings, World]:
    """Users arrive in order of their share of likes."""
    settings = settings_of(options, seed)
    events = Interactions.concatenate(open_source(settings.data).batches())
    with tempfile.TemporaryDirectory(prefix="coldstream-bench-") as folder:
        write_movielens(Path(folder), options.dataset("ml-1m"), events, arrivals_by_rate(events))
        return settings, of_protocol(varied(settings, {"data.paths": (Path(folder),)}))


def drift(given: tuple[Settings, World]) -> dict[str, Measured]:
    """What old users lose by the stream: with the gate, without, and beside them the network tuned on it."""
    settings, world = given
    held_out = held_out_by(settings)
    judges = Judges.of(of_users(world.past, lambda ids: witnesses(ids) | held_out(ids)))
    world = without_witnesses(world)
    found = guarded(settings, world, judges)
    found["the pooled network, tuned on the stream"] = fine_tuned(world, held_out, judges, settings.training.seed)
    return found


def poison(settings: Settings, cases: list[str]) -> dict[str, dict[str, Measured]]:
    """What clean users lose by the flipped labels of others, by case; and what the clean stream does."""
    world, held_out = of_protocol(settings), held_out_by(settings)
    old = of_users(world.past, lambda ids: witnesses(ids) | held_out(ids))
    new = of_users(Interactions.concatenate(world.batches), witnesses)
    judges, world = Judges.of(Interactions.concatenate([old, new])), without_witnesses(world)
    clean = guarded(settings, world, judges)
    found = {}
    for case in cases:
        found[case] = guarded(settings, replace(world, batches=tuple(flipped(world.batches, POISONS[case]))), judges)
        for name, measures in found[case].items():
            measures[AGAINST_CLEAN] = measures[FALL] - clean[name][FALL]
    return {**found, "no poison": clean}


def guarded(settings: Settings, world: World, judges: Judges) -> dict[str, Measured]:
    """With the gate and without: the judges' loss, and the lift on the stream."""
    trained, ring = train(world, settings), settings.state.ring
    before, beside = judges.predicted(trained.serving(), ring), frozen(trained, settings)
    found = {}
    for name, enabled in (("the gate on", True), ("the gate off", False)):
        said = stream(trained, varied(settings, {"meta.gate.enabled": enabled}))
        found[name] = {**judges.measured(before, judges.predicted(said.model, ring)), **_of_stream(beside, said)}
    return found


def fine_tuned(world: World, held_out: Chosen, judges: Judges, seed: int) -> Measured:
    """The baseline: one network for all, which takes a step on every micro-batch of the stream."""
    learned = of_users(world.past, lambda ids: ~held_out(ids))
    problem = build_problem(
        Interactions.concatenate([learned, judges.events]), Interactions.concatenate(world.batches), world.users,
        world.items,
    )  # fmt: skip
    asked = problem.offline.take(slice(len(learned), None))
    problem = replace(problem, offline=problem.offline.take(slice(len(learned))))
    with torch.random.fork_rng(devices=[]), scan_threads(None):
        network, rate = pooled.train(problem, POOLED, seed), best_rate(problem.holdout(), seed)
        before = pooled.predict(network, asked)
        return judges.measured(before, pooled.predict(tuned(network, problem.online, rate), asked))


def best_rate(trial: Problem, seed: int) -> float:
    """Of fine-tuning, chosen inside the past."""
    network = pooled.train(trial, POOLED, seed)
    losses = [
        mean_log_loss(trial.online, pooled.fine_tune(network, trial.online, rate)) for rate in pooled.FINE_TUNE_RATES
    ]
    return pooled.FINE_TUNE_RATES[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))]


def tuned(network: pooled.PooledNetwork, events: Events, rate: float) -> pooled.PooledNetwork:
    """What ``pooled.fine_tune`` makes of the network on the way; the given one stays as it is."""
    live = deepcopy(network)
    live.user_dropout.p = 0.0
    optimizer = torch.optim.SGD(live.parameters(), lr=rate)
    for start in range(0, len(events), pooled.FINE_TUNE_BATCH):
        take_step(optimizer, live.loss(events.take(slice(start, start + pooled.FINE_TUNE_BATCH))), pooled.CLIP_NORM)
    return live


def witnesses(ids: Sequence[str]) -> NDArray[np.bool_]:
    """Which users nobody but the benchmark knows of."""
    return drawn(user_crcs([i.encode() for i in ids]), WITNESSES, WITNESS_SHARE)


def without_witnesses(world: World) -> World:
    """Past and stream of the others."""
    batches = (of_users(batch, lambda ids: ~witnesses(ids)) for batch in world.batches)
    return replace(
        world, past=of_users(world.past, lambda ids: ~witnesses(ids)), batches=tuple(b for b in batches if len(b))
    )


def held_out_by(settings: Settings) -> Chosen:
    """Which users the settings hold out."""
    share = settings.meta.anchors.held_out
    return lambda ids: held_out_users([i.encode() for i in ids], share)


def _of_stream(beside: Run, said: Run) -> Measured:
    meta = said.meta
    decided = {} if meta is None else {(kind, VERSIONS): float(meta.decided(kind)) for kind in ("promoted", "rejected")}
    return {("lift on the stream", POINTS): lift(beside, said).auc_difference * POINTS_IN_ONE, **decided}


def _figures(
    case: str, runs: list[dict[str, Measured]], goals: Mapping[tuple[str, str], Goal], options: Options
) -> Iterator[Figure]:
    """Only what was done with the gate on is held to the goals."""
    for name in runs[0]:
        held = goals if name == "the gate on" else {}
        yield from figures(f"{case}: {name}", [found[name] for found in runs], held, options)
