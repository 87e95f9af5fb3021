"""The figures of the online stage: learning curves with and without it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from streams.meta.result import FROZEN
from streams.report.analysis import MODEL, Float
from streams.report.axes import Series, new_axes, plot_lines, short_number
from streams.report.online_numbers import Marks, StageCurve
from streams.report.svg import INK, MUTED, SERIES, WIDTH_IN, draw
from streams.results import POINTS

_LINES = (0.115, 0.545, 0.57, 0.39)
_GAIN = (0.115, 0.29, 0.57, 0.165)
_STRIP = (0.115, 0.115, 0.57, 0.12)
_ALARM = SERIES[5]


def stage_curve(name: str, curve: StageCurve, measure: str, styles: Mapping[str, Series], below: str) -> Markup | None:
    """One measure with and without the online stage, the gain below it, and what was decided when."""
    lines, gain = curve.of(measure), curve.gain(measure)
    known = np.isfinite(lines[MODEL])
    if not known.any():
        return None
    title = "AUC" if measure == "auc" else "log-loss in nats"
    shown = POINTS * gain if gain is not None and measure == "auc" else gain

    def paint(figure: Figure) -> None:
        axes = new_axes(figure, _LINES, title, "")
        plot_lines(axes, curve.middle, lines, styles, markers=len(curve.middle) < 3)
        axes.tick_params(labelbottom=False)
        _shared_x(axes, curve)
        if shown is not None:
            _gain_bars(figure, curve, shown, "gain in AUC points" if measure == "auc" else "gain in nats")
        _strip(figure, curve, below)

    ends = lines[MODEL][known]
    summary = f"{MODEL} goes from {ends[0]:.3f} to {ends[-1]:.3f}"
    if shown is not None and np.isfinite(shown).any():
        digits = 2 if measure == "auc" else 4
        summary += (
            f"; the gain over {FROZEN} is {np.nanmin(shown):+.{digits}f} to {np.nanmax(shown):+.{digits}f} "
            f"{'points' if measure == 'auc' else 'nats'}"
        )
    marks = curve.marks
    counted = f"{len(marks.promoted)} promotions, {len(marks.rejected)} rejections, {len(marks.drift)} drift alarms"
    return draw(name, f"Line chart of {title} by {below}. {summary}. Marked are {counted}.", 4.6, paint)


def _shared_x(axes: Axes, curve: StageCurve) -> None:
    axes.set_xlim(0, max(int(curve.edge[-1]), 1))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _gain_bars(figure: Figure, curve: StageCurve, gain: Float, above: str) -> None:
    axes = new_axes(figure, _GAIN, above, "")
    width = np.diff(curve.edge)
    values = np.nan_to_num(gain)
    axes.bar(curve.middle, values, width=0.84 * width, color=[SERIES[0] if v >= 0 else _ALARM for v in values])
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_ylim(min(0.0, 1.15 * float(values.min())), max(1e-6, 1.15 * float(values.max())))
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axes.tick_params(labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    _shared_x(axes, curve)


def _strip(figure: Figure, curve: StageCurve, below: str) -> None:
    """Three lanes: promotions as light ticks, rejections as crosses, drift alarms as diamonds."""
    axes = new_axes(figure, _STRIP, "", below)
    axes.grid(False)
    axes.set_yticks([])
    _shared_x(axes, curve)
    axes.set_ylim(-0.6, 2.6)
    marks: Marks = curve.marks
    axes.vlines(marks.promoted, 1.65, 2.35, color=MUTED, linewidth=0.7, alpha=0.75)
    axes.plot(marks.rejected, np.full(len(marks.rejected), 1.0), "x", color=_ALARM, markersize=5,
              markeredgewidth=1.4, clip_on=False)  # fmt: skip
    axes.plot(marks.drift, np.zeros(len(marks.drift)), "D", color=SERIES[3], markersize=4.5, clip_on=False)
    lanes = ((2, "promoted", marks.promoted, MUTED), (1, "rejected", marks.rejected, _ALARM),
             (0, "drift alarms", marks.drift, SERIES[3]))  # fmt: skip
    for y, text, places, colour in lanes:
        axes.text(1 + 8 / (_STRIP[2] * WIDTH_IN * 72), (y + 0.6) / 3.2, f"{text}: {len(places):,}",
                  transform=axes.transAxes, va="center", fontsize=10.5, color=colour)  # fmt: skip
