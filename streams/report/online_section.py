"""The words and figures of the page's section on the online stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from learner.drift import DriftAlarm
from learner.forgetting import MEASURES, ForgettingMatrix
from streams.meta.result import FROZEN, MetaResult
from streams.report import online_figures
from streams.report.analysis import Lift
from streams.report.axes import Series
from streams.report.decisions import Run, decision_runs
from streams.report.heat_map import draw_heat_map
from streams.report.online_numbers import (
    ADAPTED,
    MOST_COLUMNS,
    MOST_ROWS,
    MOST_SMALL_ROWS,
    ZERO_SHOT,
    HeatMap,
    first_and_last,
    heat_map,
    over_arrivals,
    over_events,
)
from streams.report.text import Figure, decimal, signed
from streams.results import POINTS, BacktestResult

MOST_ALARMS = 50
"""Drift alarms in the table; the result's JSON has all"""

_MOVES = {
    "initialization": "the initialization",
    "biases": "the initialization and the items' biases",
    "everything": "all shared parameters",
}
_WAYS = {
    "history": "re-derived from the user's whole history",
    "ring": "from the latest events",
    "closed": "by exchanging the prior",
}


@dataclass(frozen=True, slots=True)
class MeasureRow:
    """One measure of forgetting, as text."""

    name: str
    meaning: str
    auc: str
    log_loss: str
    auc_of: str = ""
    """The cohort it is of, where it is of one"""
    log_loss_of: str = ""


@dataclass(frozen=True, slots=True)
class CohortRow:
    """One cohort from its first evaluation to its last, as text."""

    name: str
    versions: str
    log_loss: tuple[str, str, str]
    """First, last, change"""
    auc: tuple[str, str, str]
    """First, last, change in points"""
    forgetting: str
    gap: str


@dataclass(frozen=True, slots=True)
class OnlineSection:
    """All that the template shows."""

    worth: str
    account: tuple[str, ...]
    notes: tuple[str, ...]
    curves: tuple[Figure, ...]
    maps: tuple[Figure, ...]
    measures: tuple[MeasureRow, ...]
    cohorts: tuple[CohortRow, ...]
    alarms: tuple[DriftAlarm, ...]
    alarms_left_out: int
    runs: tuple[Run, ...]


def online_section(
    result: BacktestResult, meta: MetaResult, styles: Mapping[str, Series], lifts: Mapping[str, Lift]
) -> OnlineSection:
    """Of a result that has an online stage."""
    return OnlineSection(
        worth_of_it(result, lifts.get(FROZEN)),
        account(result, meta),
        meta.notes,
        _curves(result, meta, styles),
        _maps(meta.matrix),
        measure_rows(meta.matrix),
        cohort_rows(meta.matrix),
        meta.drift[:MOST_ALARMS],
        max(0, len(meta.drift) - MOST_ALARMS),
        decision_runs(meta.versions),
    )


def worth_of_it(result: BacktestResult, lift: Lift | None) -> str:
    """What the online stage brought, in one sentence."""
    metrics, frozen = result.metrics, result.baselines.get(FROZEN)
    if lift is None or frozen is None:
        return (
            f"With the online stage the AUC is {decimal(metrics.auc, 4)}; the run did not keep the same model frozen."
        )
    interval = f" (95% interval {signed(lift.low)} to {signed(lift.high)})" if lift.known else ""
    return (
        f"AUC {decimal(metrics.auc, 4)} with the online stage, {decimal(frozen.auc, 4)} with the same model frozen: "
        f"{signed(lift.points)} points{interval}. Log-loss {decimal(metrics.log_loss, 4)} against "
        f"{decimal(frozen.log_loss, 4)}."
    )


def account(result: BacktestResult, meta: MetaResult) -> tuple[str, ...]:
    """What the online stage did, one sentence each."""
    settings = result.settings.meta
    made = len(meta.versions) - 1
    promoted, rejected = meta.decided("promoted"), meta.decided("rejected")
    undecided = sum(version.open for version in meta.versions)
    lines = [
        f"A round of meta-updates every {settings.every_events:,} events moved "
        f"{_MOVES.get(settings.moves, settings.moves)}: {_count(meta.rounds, 'round')} made {_count(made, 'version')}.",
        f"{promoted:,} promoted, {rejected:,} rejected, {undecided:,} still to be decided on when the stream ended; "
        f"{_count(len(meta.drift), 'drift alarm')}.",
        f"Meta-updates took {meta.seconds:,.1f} s in all.",
        f"{_count(sum(meta.moved.values()), 'time')} a user's row came onto another version"
        + _listed(meta.moved, _WAYS),
    ]
    if meta.refused:
        lines.append(f"{_count(sum(meta.refused.values()), 'gradient')} could not be used" + _listed(meta.refused, {}))
    return tuple(lines)


def measure_rows(matrix: ForgettingMatrix) -> tuple[MeasureRow, ...]:
    """The measures of ``learner.forgetting`` at the latest evaluation; none before the first."""
    if not len(matrix.versions):
        return ()
    found = {name: matrix.measures(name).summary() for name in MEASURES}

    def row(name: str, meaning: str, key: str, *, level: bool = False, of: str = "") -> MeasureRow:
        auc, loss = found["auc"][key], found["log_loss"][key]
        return MeasureRow(
            name, meaning,
            decimal(auc, 4) if level else signed(None if auc is None else POINTS * auc),
            decimal(loss, 4) if level else signed(loss, 4),
            (found["auc"][of] or "") if of else "", (found["log_loss"][of] or "") if of else "",
        )  # fmt: skip

    return (
        row("Average", "over cohorts, at the end", "average", level=True),
        row("Worst cohort", "at the end", "worst", level=True, of="worst_cohort"),
        row("Backward transfer", "better at the end than at first: above 0 is good", "backward_transfer"),
        row("Forward transfer", "zero-shot at first, better than the trained model: above 0 is good",
            "forward_transfer"),
        row("Forgetting", "worse at the end than at the best before: above 0 is bad", "forgetting"),
        row("Largest forgetting", "of one cohort", "largest_forgetting", of="most_forgotten"),
        row("Average minimum", "of each cohort the worst after its first evaluation", "average_minimum", level=True),
        row("Stability gap", "deepest fall of any cohort below its best so far, at any time", "stability_gap"),
    )  # fmt: skip


def cohort_rows(matrix: ForgettingMatrix) -> tuple[CohortRow, ...]:
    """By slice, those of the heat map."""
    heat = heat_map(matrix, ADAPTED, MOST_ROWS)
    places = [matrix.columns.index(column) for column in heat.columns]
    first, last = first_and_last(matrix.values[:, :, MEASURES.index("log_loss"), ADAPTED])
    measures = matrix.measures("log_loss")
    rows = []
    for k, column in zip(places, heat.columns, strict=True):
        begin, end = matrix.values[first[k], k, :, ADAPTED], matrix.values[last[k], k, :, ADAPTED]
        auc, loss = MEASURES.index("auc"), MEASURES.index("log_loss")
        retired = "" if last[k] == len(matrix.versions) - 1 else ", then retired"
        rows.append(
            CohortRow(
                column.name,
                f"{matrix.versions[first[k]]} to {matrix.versions[last[k]]}{retired}",
                (decimal(begin[loss], 4), decimal(end[loss], 4), signed(end[loss] - begin[loss], 4)),
                (decimal(begin[auc], 4), decimal(end[auc], 4), signed(POINTS * (end[auc] - begin[auc]))),
                signed(measures.forgetting[k], 4),
                signed(measures.stability_gap[k], 4),
            )
        )
    return tuple(rows)


def _curves(result: BacktestResult, meta: MetaResult, styles: Mapping[str, Series]) -> tuple[Figure, ...]:
    scored, every = result.scored, result.settings.meta.every_events
    events, arrivals = over_events(scored, meta, every), over_arrivals(scored, meta, every)
    before = int((events.marks.promoted == 0).sum() + (events.marks.rejected == 0).sum())
    earlier = f" {_count(before, 'decision')} came before the first scored event and stand at 0." if before else ""
    windows = len(events.edge) - 1, len(arrivals.edge) - 1
    stream = (
        f"{_count(windows[0], 'window')} of equally many events, in the order of the stream; bars: what the online "
        f"stage gains. A tick is a version that began to serve, a cross one that was rejected.{earlier}"
    )
    people = (
        f"{_count(windows[1], 'window')} of equally many users, in the order of their first events, each scored by all "
        "of its users' events. Later users start from versions that have learned from more of the stream."
    )
    drawn = []
    for title, caption, curve, axis, below in (
        ("over the stream", stream, events, "events", "events streamed" if not before else "scored events"),
        ("by the users' arrival", people, arrivals, "users", "users by arrival"),
    ):
        for measure, name in (("auc", "AUC"), ("log_loss", "Log-loss")):
            figure = online_figures.stage_curve(f"stage-{measure}-{axis}", curve, measure, styles, below)
            drawn.append(Figure(f"{name} {title}", caption, figure))
    return tuple(drawn)


def _maps(matrix: ForgettingMatrix) -> tuple[Figure, ...]:
    adapted, zero_shot = heat_map(matrix, ADAPTED, MOST_ROWS), heat_map(matrix, ZERO_SHOT, MOST_SMALL_ROWS)
    return (
        Figure(
            "Log-loss after adaptation",
            f"Each cohort after its users' first events were learned. {_shown(adapted, matrix)}",
            draw_heat_map("forgetting", adapted, "the change of log-loss after adaptation"),
        ),
        Figure(
            "Log-loss zero-shot",
            "What the start alone is worth to the same users, before any of their events: meta-updates act here first. "
            f"The colours have a scale of their own. {_shown(zero_shot, matrix)}",
            draw_heat_map("forgetting-zero-shot", zero_shot, "the change of zero-shot log-loss"),
        ),
    )


def _shown(heat: HeatMap, matrix: ForgettingMatrix) -> str:
    evaluations, cohorts = len(matrix.versions), len(matrix.columns)
    text = ""
    if len(heat.versions) < evaluations:
        text = f"Of {evaluations:,} evaluations {len(heat.versions)} are shown, taken evenly."
    if cohorts > MOST_COLUMNS:
        text += f" Of {cohorts:,} cohorts {len(heat.columns)} are shown, by whole slices."
    return text


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _listed(counts: Mapping[str, int], words: Mapping[str, str]) -> str:
    known = [f"{count:,} {words.get(name, name)}" for name, count in counts.items() if count]
    return f": {', '.join(known)}." if known else "."
