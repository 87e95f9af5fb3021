"""The figures of a report. Every one returns inline SVG, or None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from streams.report.analysis import MODEL, LearningCurve, Reliability, wilson_interval
from streams.report.svg import INK, MUTED, SERIES, SURFACE, WIDTH_IN, draw

LABEL_LETTERS = 20
"""Letters of a direct label: what fits the right margin of a figure. The page's key gives the name in full."""

LABEL_STEP_PT = 12.5
"""Least distance of two direct labels, a line of text."""

WITH_LABELS = (0.115, 0.165, 0.57, 0.72)
"""Left, bottom, width and height of the axes beside direct labels, as shares of the figure."""

ALONE = (0.115, 0.165, 0.855, 0.72)
"""The same without labels at the right."""

_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_MARKERS = "osD^vPX"

_BACKDROP = {"facecolor": SURFACE, "edgecolor": "none", "pad": 2.0}

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Series:
    """How one predictor looks, the same in every figure."""

    name: str
    colour: str
    dash: object
    marker: str
    width: float

    @property
    def variable(self) -> str:
        """The CSS variable of the colour."""
        return f"--s{SERIES.index(self.colour)}"


def series_of(names: Sequence[str]) -> dict[str, Series]:
    """The model thick, solid and in the first colour; each of 21 baselines has its own mix of colour and dash."""
    others = len(SERIES) - 1
    styles = {}
    for k, name in enumerate(names):
        if name == MODEL:
            styles[name] = Series(name, SERIES[0], "-", "o", 2.8)
        else:
            styles[name] = Series(
                name, SERIES[1 + (k - 1) % others], _DASHES[k % len(_DASHES)], _MARKERS[k % len(_MARKERS)], 1.6
            )
    return styles


def auc_by_index(slices: Mapping[str, Mapping[str, float | None]], styles: Mapping[str, Series]) -> Markup | None:
    """``slices``: name -> slice -> AUC, None where a slice lacks a class or events."""
    if not any(_present(value) for values in slices.values() for value in values.values()):
        return None
    names = list(slices[MODEL])

    def paint(figure: Figure) -> None:
        axes = _axes(figure, WITH_LABELS, "AUC", "event's index in its user")
        lines = {n: _array(values.get(s) for s in names) for n, values in slices.items()}
        _lines(axes, np.arange(len(names)), lines, styles, markers=True)
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
        axes = _axes(figure, WITH_LABELS, "AUC", "events streamed")
        _lines(axes, x, lines, styles, markers=len(x) < 3)
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
        axes = _axes(figure, (0.115, 0.39, 0.57, 0.54), "share of label 1", "")
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
        _label_ends(axes, ends, styles)
        counts = _axes(figure, (0.115, 0.125, 0.57, 0.15), "events", "predicted probability")
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
        axes = _axes(figure, ALONE, "users", x_label)
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
        axes = _axes(figure, ALONE, "share of the class", "predicted probability")
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
        axes = _axes(figure, (0.27, 0.21, 0.60, 0.75), "", "bytes per user")
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
        axes = _axes(figure, (0.15, 0.165, 0.82, 0.72), "bytes of state", "users")
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
        axes = _axes(figure, ALONE, "loss", "epoch of the offline stage")
        axes.plot(range(1, len(losses) + 1), losses, color=SERIES[0], linewidth=2.2, marker="o", markersize=4)
        axes.set_xlim(0.5, len(losses) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))

    alternative = f"Line chart of the training loss, from {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} epochs."
    return draw("training", alternative, 3.0, paint)


def shortened(name: str) -> str:
    """At most ``LABEL_LETTERS`` letters."""
    return name if len(name) <= LABEL_LETTERS else name[: LABEL_LETTERS - 1].rstrip() + "…"


def short_number(value: float) -> str:
    """12,000 as 12k: at most three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def byte_size(size: float, digits: int = 1) -> str:
    """In decimal units (1 kB is 1,000 bytes)."""
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.{digits}f} {unit}"
    return f"{size:.0f} B"


def _axes(figure: Figure, place: tuple[float, float, float, float], above: str, below: str) -> Axes:
    axes = figure.add_axes(place)
    axes.grid(True, axis="y")
    axes.tick_params(length=0, pad=5)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(below, labelpad=6)
    height_pt = place[3] * figure.get_figheight() * 72
    axes.text(-place[0] / place[2], 1 + 9 / height_pt, above, transform=axes.transAxes,
              color=MUTED, va="bottom", ha="left")  # fmt: skip
    return axes


def _lines(
    axes: Axes, x: NDArray[np.generic], lines: Mapping[str, Float], styles: Mapping[str, Series], *, markers: bool
) -> None:
    for name in reversed(list(lines)):
        style = styles[name]
        axes.plot(x, lines[name], color=style.colour, linewidth=style.width, linestyle=style.dash,
                  marker=style.marker if markers else "", markersize=5,
                  solid_capstyle="round", clip_on=False)  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.08)
    finite = {n: values[np.isfinite(values)] for n, values in lines.items()}
    _label_ends(axes, {n: float(values[-1]) for n, values in finite.items() if len(values)}, styles)


def _label_ends(axes: Axes, ends: Mapping[str, float], styles: Mapping[str, Series]) -> None:
    """Names at the right of the axes, beside the ends of their lines and one text line apart."""
    height_pt = axes.get_position().height * axes.figure.get_figheight() * 72  # type: ignore[union-attr]
    low, high = axes.get_ylim()
    wanted = {name: (y - low) / (high - low) * height_pt for name, y in ends.items()}
    for name, y in spread(wanted, LABEL_STEP_PT, height_pt).items():
        axes.text(1 + 8 / (axes.get_position().width * WIDTH_IN * 72), y / height_pt, shortened(name),
                  transform=axes.transAxes, va="center", fontsize=10.5, color=styles[name].colour,
                  fontweight="bold" if name == MODEL else "normal")  # fmt: skip


def spread(wanted: Mapping[str, float], step: float, room: float) -> dict[str, float]:
    """Positions ``step`` apart or more, in the order wanted and as near to it as one pass up and one down can be.

    With more labels than ``room`` holds, the lowest lie below 0.
    """
    names = sorted(wanted, key=lambda name: wanted[name])
    placed: dict[str, float] = {}
    floor = -math.inf
    for name in names:
        placed[name] = floor = max(wanted[name], floor + step)
    ceiling = max(room, 0.0) + step
    for name in reversed(names):
        placed[name] = ceiling = min(placed[name], ceiling - step)
    return placed


def _present(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _array(values: Iterable[float | None]) -> Float:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
