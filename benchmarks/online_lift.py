"""What the online stage is worth over the same model frozen, on MovieLens 1M, and what a round costs.

With a tenth of the users offline the stream is nine times what the model has learned from; with seven tenths it adds
little. A lift is that of the AUC in points, with a bootstrap over users that draws both predictions alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.command import Options
from benchmarks.online_run import (
    POINTS,
    SECONDS,
    VERSIONS,
    Goal,
    Measured,
    Run,
    Trained,
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
from streams.results import POINTS as POINTS_IN_ONE

AUC, LIFT, ROUNDS = ("AUC", ""), ("lift over the model frozen", POINTS), ("all rounds", SECONDS)


@dataclass(frozen=True, slots=True)
class Case:
    """One way in which the online stage runs, and what it should reach."""

    name: str
    moves: str
    goals: Mapping[tuple[str, str], Goal]


@dataclass(frozen=True, slots=True)
class Part:
    """Cases that share a split, and so a trained model."""

    name: str
    protocol: Mapping[str, object]
    cases: tuple[Case, ...]


PARTS = (
    Part(
        "a tenth offline", {"protocol__offline_fraction": 0.1, "protocol__score_last": 0.3},
        (
            Case("everything moves", "everything",
                 {AUC: Goal(0.8190), LIFT: Goal(2.0), ROUNDS: Goal(30.0, at_most=True)}),
            Case("the initialization and the items' biases", "biases", {LIFT: Goal(0.8)}),
            Case("the initialization alone", "initialization", {}),
        ),
    ),
    Part("seven tenths offline", {}, (Case("everything moves", "everything", {LIFT: Goal(0.03)}),)),
)  # fmt: skip


def run(options: Options) -> Iterator[Figure]:
    """Every case. Raises Skipped without MovieLens 1M."""
    for part in PARTS:
        cases = [case for case in part.cases if options.wants(f"lift, {part.name}: {case.name}")]
        if not cases:
            continue
        found = [measured(settings_of(options, part, seed), cases) for seed in options.seeds]
        for case in cases:
            name = f"lift, {part.name}: {case.name}"
            yield from figures(name, [runs[case.name] for runs in found], case.goals, options)


def settings_of(options: Options, part: Part, seed: int) -> Settings:
    """The profile ml-1m with the part's split."""
    return options.settings("ml-1m", "ml-1m", training__seed=seed, meta__moves="everything", **part.protocol)


def measured(settings: Settings, cases: list[Case]) -> dict[str, Measured]:
    """By case; one training serves all."""
    trained: Trained = train(of_protocol(settings), settings)
    beside = frozen(trained, settings)
    return {case.name: of_run(beside, stream(trained, varied(settings, {"meta.moves": case.moves}))) for case in cases}


def of_run(beside: Run, said: Run) -> Measured:
    """What the online stage did, beside the model frozen."""
    found = lift(beside, said)
    measures: Measured = {
        AUC: said.auc(), LIFT: POINTS_IN_ONE * found.auc_difference,
        ("  lower 97.5 %", POINTS): POINTS_IN_ONE * found.ci95[0],
        ("  upper 97.5 %", POINTS): POINTS_IN_ONE * found.ci95[1],
        ("AUC of the model frozen", ""): beside.auc(), ("log-loss", "nats"): said.log_loss(),
    }  # fmt: skip
    if said.meta is not None:
        measures |= {
            ROUNDS: said.meta.seconds, ("a round", "ms"): 1000 * said.meta.seconds / max(said.meta.rounds, 1),
            **{(kind, VERSIONS): float(said.meta.decided(kind)) for kind in ("promoted", "rejected")},
        }  # fmt: skip
    return measures
