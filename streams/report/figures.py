"""The figures of a report. Every one returns inline SVG, or None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from streams.report.analysis import MODEL, LearningCurve, Reliability, wilson_interval
from streams.report.axes import (
    ALONE,
    WITH_LABELS,
    Series,
    label_ends,
    new_axes,
    plot_lines,
    short_number,
    shortened,
)
from streams.report.svg import INK, MUTED, SERIES, SURFACE, draw

_BACKDROP = {"facecolor": SURFACE, "edgecolor": "none", "pad": 2.0}

Float = NDArray[np.float64]


def auc_by_index(slices: Mapping[str, Mapping[str, float | None]], styles: Mapping[str, Series]) -> Markup | None:
    """``slices``: name -> slice -> AUC, None where a slice lacks a class or events."""
    if not any(_present(value) for values in slices.values() for value in values.values()):
        return None
    names = list(slices[MODEL])

    def paint(figure: Figure) -> None:
        axes = new_axes(figure, WITH_LABELS, "AUC", "event's index in its user")
        lines = {n: _array(values.get(s) for s in names) for n, values in slices.items()}
        plot_lines(axes, np.arange(len(names)), lines, styles, markers=True)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.3, len(names) - 0.7)

    model = ", ".join(f"{s}: {v:.3f}" for s, v in slices[MODEL].items() if v is not None and math.isfinite(v))
    return draw("by-index", f"Line chart of AUC by the event's index in its user. {MODEL}: {model}.", 3.3, paint)


def learning_curve(curve: LearningCurve, styles: Mapping[str, Series], cumulative: bool) -> Markup | None:
    """AUC over the position in the stream."""
    lines = curve.cumulative if cumulative else curve.windowed
    if not len(curve.window_end) or not np.isfinite(lines[MODEL]).any():
        return None
    width = np.diff(curve.window_end, prepend=0)
    x = curve.window_end if cumulative else curve.window_end - width / 2

    def paint(figure: Figure) -> None:
        axes = new_axes(figure, WITH_LABELS, "AUC", "events streamed")
        plot_lines(axes, x, lines, styles, markers=len(x) < 3)
        axes.set_xlim(0, curve.window_end[-1])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))

    kind = "all events so far" if cumulative else f"windows of about {int(width.mean()):,} events"
    name = "learning-cumulative" if cumulative else "learning-windows"
    finite = lines[MODEL][np.isfinite(lines[MODEL])]
    summary = f"{MODEL} goes from {finite[0]:.3f} to {finite[-1]:.3f}."
    return draw(name, f"Line chart of AUC over the stream, {kind}. {summary}", 3.3, paint)


def reliability_diagram(curves: Mapping[str, Reliability], styles: Mapping[str, Series]) -> Markup | None:
    """Observed against predicted, with the model's counts below."""
    model = curves[MODEL]
    if not model.count.sum():
        return None

    def paint(figure: Figure) -> None:
        axes = new_axes(figure, (0.115, 0.39, 0.57, 0.54), "share of label 1", "")
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        low, high = wilson_interval(model.observed, model.count)
        seen = model.count > 0
        axes.vlines(model.predicted[seen], low[seen], high[seen], color=SERIES[0], linewidth=1.2)
        ends = {}
        for name, curve in reversed(list(curves.items())):
            style, kept = styles[name], curve.count > 0
            axes.plot(curve.predicted[kept], curve.observed[kept], color=style.colour, linewidth=style.width,
                      linestyle=style.dash, marker=style.marker, markersize=4.5, clip_on=False)  # fmt: skip
            ends[name] = float(curve.observed[kept][-1])
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=np.arange(0, 1.1, 0.2), yticks=np.arange(0, 1.1, 0.2))
        axes.tick_params(labelbottom=False)
        label_ends(axes, ends, styles)
        counts = new_axes(figure, (0.115, 0.125, 0.57, 0.15), "events", "predicted probability")
        bins = len(model.count)
        counts.bar((np.arange(bins) + 0.5) / bins, model.count, width=0.86 / bins, color=SERIES[0])
        counts.set(xlim=(0, 1), xticks=np.arange(0, 1.1, 0.2))
        counts.yaxis.set_major_locator(MaxNLocator(2))
        counts.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))

    points = ", ".join(
        f"{p:.2f} → {o:.2f}" for p, o, c in zip(model.predicted, model.observed, model.count, strict=True) if c
    )
    return draw("reliability", f"Reliability diagram. {MODEL}, predicted → observed: {points}.", 4.3, paint)


def user_histogram(values: Float, *, middle: float, x_label: str, sides: tuple[str, str]) -> Markup | None:
    """Users left and right of ``middle``; the outermost bins hold all that lies beyond the 1st and 99th percentile."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    reach = max(float(np.abs(np.percentile(values, [1, 99]) - middle).max()), 1e-3)
    edges = middle + np.linspace(-reach, reach, 1 + 2 * max(4, min(20, int(math.sqrt(len(values))))))
    count, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    above, below = float((values > middle).mean()), float((values < middle).mean())

    def paint(figure: Figure) -> None:
        axes = new_axes(figure, ALONE, "users", x_label)
        centre, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
        colours = [SERIES[0] if c > middle else MUTED for c in centre]
        axes.bar(centre, count, width=0.9 * width, color=colours)
        axes.axvline(middle, color=INK, linewidth=1)
        axes.set_ylim(0, 1.22 * count.max())
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.text(0.01, 0.99, f"{below:.0%} {sides[0]}", transform=axes.transAxes, va="top", ha="left", color=MUTED,
                  bbox=_BACKDROP)  # fmt: skip
        axes.text(0.99, 0.99, f"{above:.0%} {sides[1]}", transform=axes.transAxes, va="top", ha="right",
                  color=SERIES[0], fontweight="bold", bbox=_BACKDROP)  # fmt: skip

    summary = f"{above:.0%} {sides[1]}, {below:.0%} {sides[0]}; the median is {np.median(values):.3f}"
    return draw("users", f"Histogram over {len(values):,} users of {x_label}: {summary}.", 3.0, paint)


def class_histogram(label: NDArray[np.int8], probability: NDArray[np.float32]) -> Markup | None:
    """Predictions of label 1 upwards and of label 0 downwards, each as shares of its class."""
    positives, negatives = probability[label == 1], probability[label != 1]
    if not len(probability):
        return None
    edges = np.linspace(0, 1, 26)
    up, down = (np.histogram(p, edges)[0] / max(len(p), 1) for p in (positives, negatives))
    top = 1.3 * max(up.max(), down.max())

    def paint(figure: Figure) -> None:
        axes = new_axes(figure, ALONE, "share of the class", "predicted probability")
        middle = (edges[:-1] + edges[1:]) / 2
        axes.bar(middle, up, width=0.035, color=SERIES[0])
        axes.bar(middle, -down, width=0.035, color=MUTED)
        axes.axhline(0, color=INK, linewidth=1)
        axes.set(xlim=(0, 1), ylim=(-top, top), xticks=np.arange(0, 1.1, 0.2))
        axes.yaxis.set_major_locator(MaxNLocator(4, symmetric=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0%}"))
        axes.text(0.01, 0.98, f"label 1 ({len(positives):,} events)", transform=axes.transAxes, va="top",
                  color=SERIES[0], fontweight="bold")  # fmt: skip
        axes.text(0.01, 0.02, f"label 0 ({len(negatives):,} events)", transform=axes.transAxes, va="bottom",
                  color=MUTED, fontweight="bold")  # fmt: skip

    means = [f"{float(p.mean()):.3f}" if len(p) else "none" for p in (positives, negatives)]
    alternative = f"Histogram of predictions by label. Mean prediction: {means[0]} for label 1, {means[1]} for label 0."
    return draw("classes", alternative, 3.3, paint)


def row_parts(parts: Mapping[str, float]) -> Markup | None:
    """One bar for each part of a user's row."""
    if not parts:
        return None
    names, sizes = list(parts), np.array(list(parts.values()), dtype=np.float64)

    def paint(figure: Figure) -> None:
        axes = new_axes(figure, (0.27, 0.21, 0.60, 0.75), "", "bytes per user")
        axes.barh(range(len(names)), sizes, height=0.62, color=SERIES[0])
        axes.set_yticks(range(len(names)), [shortened(n) for n in names])
        axes.tick_params(axis="y", colors=INK, length=0)
        axes.invert_yaxis()
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        for k, size in enumerate(sizes):
            axes.annotate(f"{size:,.0f}", (size, k), (5, 0), textcoords="offset points", va="center", color=INK)

    listing = ", ".join(f"{name} {size:,.0f}" for name, size in parts.items())
    return draw("row-parts", f"Bar chart of the bytes of a user's row: {listing}.", 1.25 + 0.38 * len(names), paint)


def state_growth(users: int, bytes_per_user: float) -> Markup | None:
    """Total size against the number of users, on logarithmic axes, with this run marked."""
    if users < 1 or bytes_per_user <= 0:
        return None
    low = 10.0 ** min(3, math.floor(math.log10(users)))
    high = 10.0 ** max(8, math.ceil(math.log10(users)) + 1)

    def paint(figure: Figure) -> None:
        axes = new_axes(figure, (0.15, 0.165, 0.82, 0.72), "bytes of state", "users")
        span = np.array([low, high])
        axes.loglog(span, span * bytes_per_user, color=SERIES[0], linewidth=2.2)
        axes.plot([users], [users * bytes_per_user], "o", color=SERIES[0], markeredgecolor=SURFACE, markersize=9)
        axes.annotate(
            f"this run: {users:,} users, {byte_size(users * bytes_per_user)}", (users, users * bytes_per_user),
            (9, -5) if users < math.sqrt(low * high) else (-9, 6), textcoords="offset points", color=INK,
            va="top" if users < math.sqrt(low * high) else "bottom",
            ha="left" if users < math.sqrt(low * high) else "right",
        )  # fmt: skip
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_size(value, digits=0)))
        axes.set_ylim(low * bytes_per_user / 20, high * bytes_per_user * 3)
        axes.minorticks_off()

    alternative = (
        f"Line chart of state size against users: {byte_size(users * bytes_per_user)} for {users:,} users, "
        f"{byte_size(1e6 * bytes_per_user)} for a million."
    )
    return draw("state-growth", alternative, 3.0, paint)


def training_loss(losses: Sequence[float]) -> Markup | None:
    """Loss of every epoch of the offline stage."""
    if not losses:
        return None

    def paint(figure: Figure) -> None:
        axes = new_axes(figure, ALONE, "loss", "epoch of the offline stage")
        axes.plot(range(1, len(losses) + 1), losses, color=SERIES[0], linewidth=2.2, marker="o", markersize=4)
        axes.set_xlim(0.5, len(losses) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))

    alternative = f"Line chart of the training loss, from {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} epochs."
    return draw("training", alternative, 3.0, paint)


def byte_size(size: float, digits: int = 1) -> str:
    """In decimal units (1 kB is 1,000 bytes)."""
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.{digits}f} {unit}"
    return f"{size:.0f} B"


def _present(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _array(values: Iterable[float | None]) -> Float:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
