"""A backtest's result as a page: what it says in words and numbers, and the template filled in."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from configs.settings import Settings
from learner.metrics import SLICES, Metrics
from streams.meta.result import FROZEN
from streams.report import figures
from streams.report.analysis import (
    MODEL,
    WINDOW_EVENTS,
    Lift,
    learning_curve,
    paired_lifts,
    predictors,
    reliability,
    user_gain,
)
from streams.report.axes import Series, series_of
from streams.report.figures import byte_size
from streams.report.online_section import online_section
from streams.report.text import Figure, decimal, signed
from streams.results import BacktestResult, ScoredStream, best_baseline

EXTREME_USERS = 3
"""Users listed at either end of the gain."""

HIDDEN = "given, not shown"
_WEBHOOK = "meta.alarms.webhook"


@dataclass(frozen=True, slots=True)
class Row:
    """A predictor's line in the tables, as text."""

    series: Series
    auc: str
    interval: str
    lift: str
    lift_interval: str
    gauc: str
    log_loss: str
    calibration_error: str
    by_index: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting by its dotted name, as text."""

    name: str
    value: str
    default: str

    @property
    def changed(self) -> bool:
        """Whether it differs from the default."""
        return self.value != self.default


@dataclass(frozen=True, slots=True)
class UserGain:
    """One user of the list of extremes."""

    user_id: str
    events: int
    gain: str


def render(result: BacktestResult) -> str:
    """The whole page. Deterministic; text from outside is escaped."""
    environment = Environment(
        loader=PackageLoader("streams", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(_context(result))


def headline(result: BacktestResult, lifts: Mapping[str, Lift]) -> str:
    """The finding in one sentence: the lift over the best baseline with its interval, or the AUC alone."""
    best = best_baseline(result)
    auc = decimal(result.metrics.auc, 4)
    if best is None:
        interval = _interval(result.metrics)
        return f"Coldstream reaches an AUC of {auc}" + (f" (95% interval {interval})." if interval else ".")
    lift = lifts[best]
    if best == FROZEN:
        rank = "the best baseline: the same model, not improved by the stream"
        if len(result.baselines) == 1:
            rank = "the same model, not improved by the stream"
    else:
        rank = "the best baseline" if len(result.baselines) > 1 else "the only baseline"
    where = "above" if lift.points >= 0 else "below"
    sentence = (
        f"Coldstream reaches an AUC of {auc}, {abs(lift.points):.2f} points {where} {best} "
        f"({decimal(result.baselines[best].auc, 4)}), {rank}"
    )
    if not lift.known:
        return f"{sentence}."
    spans_zero = lift.low <= 0 <= lift.high
    doubt = "; the interval holds zero, so this stream does not settle which is better" if spans_zero else ""
    return f"{sentence} (95% interval of the lift {signed(lift.low)} to {signed(lift.high)}{doubt})."


def settings_list(settings: Settings) -> tuple[Setting, ...]:
    """Every setting by its dotted name, beside its default. A webhook's address is a secret, and hidden."""
    values, defaults = _flat(settings.model_dump(mode="json")), _flat(Settings().model_dump(mode="json"))
    if settings.meta.alarms.webhook is not None:
        values[_WEBHOOK] = HIDDEN
    names = dict.fromkeys((*values, *defaults))
    return tuple(Setting(name, values.get(name, "–"), defaults.get(name, "–")) for name in names)


def _context(result: BacktestResult) -> dict[str, Any]:
    scored = result.scored
    styles = series_of(tuple(predictors(scored)))
    lifts = paired_lifts(scored, result.settings.protocol.bootstrap_samples)
    settings = settings_list(result.settings)
    gain = user_gain(scored, best_baseline(result))
    return {
        "headline": headline(result, lifts),
        "protocol": result.protocol,
        "cut": datetime.fromtimestamp(result.protocol.cut_time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "tiles": _tiles(result),
        "rows": _rows(result, styles, lifts),
        "slices": _slices(scored),
        "figures": _figures(result, styles, gain),
        "online": None if result.meta is None else online_section(result, result.meta, styles, lifts),
        "gaining": _extremes(scored, gain, 1),
        "losing": _extremes(scored, gain, -1),
        "reference": _reference(result),
        "state": result.state,
        "settings": settings,
        "changed": [setting for setting in settings if setting.changed],
        "command": shlex.join(_without_secrets(result)),
        "versions": result.versions,
        "machine": result.machine,
        "paths": [str(path) for path in result.settings.data.paths],
        "rejects": result.rejects,
        "notes": result.notes,
        "samples": result.settings.protocol.bootstrap_samples,
    }


def _without_secrets(result: BacktestResult) -> list[str]:
    webhook = result.settings.meta.alarms.webhook
    return [arg.replace(webhook, f"({HIDDEN})") if webhook else arg for arg in result.command]


def _tiles(result: BacktestResult) -> list[tuple[str, str]]:
    metrics = result.metrics
    return [
        ("AUC", decimal(metrics.auc, 4)),
        ("GAUC", decimal(metrics.gauc, 4)),
        ("log-loss", decimal(metrics.log_loss, 4)),
        ("calibration error", decimal(metrics.calibration_error, 4)),
        ("online events/s", f"{result.speed.online_events_per_s:,.0f}"),
        ("training", f"{result.speed.train_s:,.1f} s"),
        ("state per user", byte_size(result.state.bytes_per_user, 0 if result.state.bytes_per_user < 1000 else 2)),
    ]


def _rows(result: BacktestResult, styles: Mapping[str, Series], lifts: Mapping[str, Lift]) -> list[Row]:
    def row(name: str, metrics: Metrics) -> Row:
        lift = lifts.get(name)
        return Row(
            styles[name],
            decimal(metrics.auc, 4),
            _interval(metrics),
            "" if lift is None else signed(lift.points),
            f"{signed(lift.low)} to {signed(lift.high)}" if lift is not None and lift.known else "",
            decimal(metrics.gauc, 4),
            decimal(metrics.log_loss, 4),
            decimal(metrics.calibration_error, 4),
            tuple(decimal(metrics.by_index.get(name), 4) for name, _, _ in SLICES),
        )

    return [row(MODEL, result.metrics), *(row(name, metrics) for name, metrics in result.baselines.items())]


def _figures(result: BacktestResult, styles: Mapping[str, Series], gain: np.ndarray[Any, Any]) -> dict[str, Figure]:
    scored = result.scored
    named = {MODEL: result.metrics, **result.baselines}
    best = best_baseline(result)
    curve = learning_curve(scored)
    calibrated = {
        name: reliability(scored.label, probability)
        for name, probability in predictors(scored).items()
        if name in (MODEL, best)
    }
    windows = len(curve.window_end)
    return {
        "by_index": Figure(
            "AUC by the event's index in its user",
            "How good predictions are after how few events of a user: index 1 is a user's first event.",
            figures.auc_by_index({name: metrics.by_index for name, metrics in named.items()}, styles),
        ),
        "windowed": Figure(
            "AUC in windows of the stream",
            f"{windows} windows of equal length, each scored alone. The mix of new and known users changes along the "
            "stream, and with it how hard the events are."
            if windows > 1
            else f"The stream is too short for two windows of {WINDOW_EVENTS} events.",
            figures.learning_curve(curve, styles, cumulative=False),
        ),
        "cumulative": Figure(
            "AUC of all events so far",
            "All events up to each point of the stream, scored together.",
            figures.learning_curve(curve, styles, cumulative=True),
        ),
        "reliability": Figure(
            "Reliability",
            "Observed share of label 1 against the predicted probability, in ten bins of equal width; the dotted "
            "diagonal is perfect. Whiskers are 95% Wilson intervals, the bars below count the model's events.",
            figures.reliability_diagram(calibrated, styles),
        ),
        "classes": Figure(
            "Predictions by label",
            "Label 1 upwards, label 0 downwards. The less they overlap, the better the ranking.",
            figures.class_histogram(scored.label, scored.probability),
        ),
        "users": Figure(
            "Who gains",
            f"Mean log-loss of {_reference(result)} less the model's, for each user, in nats an event. "
            "The outermost bars hold the users beyond the 1st and 99th percentile.",
            figures.user_histogram(gain, middle=0.0, x_label="log-loss gain per user", sides=("lose", "gain")),
        ),
        "parts": Figure(
            "What a user's row holds", "Bytes per user by part of the row.", figures.row_parts(result.state.parts)
        ),
        "growth": Figure(
            "Size against users",
            "This run's bytes per user, carried to more users. Both axes are logarithmic.",
            figures.state_growth(result.state.users, result.state.bytes_per_user),
        ),
        "training": Figure(
            "Offline stage", "Training loss of every epoch.", figures.training_loss(result.training_loss)
        ),
    }  # fmt: skip


def _reference(result: BacktestResult) -> str:
    return best_baseline(result) or "always predicting the stream's share of label 1"


def _slices(scored: ScoredStream) -> list[tuple[str, int]]:
    """Name and events of each slice."""
    counts = []
    for name, first, past in SLICES:
        inside = (scored.index >= first) & (scored.index < (np.inf if past is None else past))
        counts.append((name, int(inside.sum())))
    return counts


def _extremes(scored: ScoredStream, gain: np.ndarray[Any, Any], sign: int) -> list[UserGain]:
    """The users who gain most (sign 1) or lose most (−1), the furthest first."""
    events = np.bincount(scored.user, minlength=len(scored.user_ids))
    order = np.argsort(-sign * gain, kind="stable")
    chosen = [int(u) for u in order if events[u] and sign * gain[u] > 0][:EXTREME_USERS]
    return [UserGain(scored.user_ids[u], int(events[u]), f"{gain[u]:+.3f}".replace("-", "−")) for u in chosen]


def _interval(metrics: Metrics) -> str:
    low, high = metrics.ci95.get("auc", (math.nan, math.nan))
    return f"{low:.4f} to {high:.4f}" if math.isfinite(low) and math.isfinite(high) else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            flat[f"{prefix}{key}"] = _setting_text(value)
    return flat


def _setting_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
