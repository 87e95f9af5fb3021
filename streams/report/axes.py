"""What figures share: how each predictor looks, the axes, lines with names beside their ends, and short numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from streams.report.analysis import MODEL
from streams.report.svg import MUTED, SERIES, WIDTH_IN

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


def new_axes(figure: Figure, place: tuple[float, float, float, float], above: str, below: str) -> Axes:
    """Axes at ``place`` (left, bottom, width, height as shares), with what they show above and below them."""
    axes = figure.add_axes(place)
    axes.grid(True, axis="y")
    axes.tick_params(length=0, pad=5)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(below, labelpad=6)
    height_pt = place[3] * figure.get_figheight() * 72
    axes.text(-place[0] / place[2], 1 + 9 / height_pt, above, transform=axes.transAxes,
              color=MUTED, va="bottom", ha="left")  # fmt: skip
    return axes


def plot_lines(
    axes: Axes, x: NDArray[np.generic], lines: Mapping[str, Float], styles: Mapping[str, Series], *, markers: bool
) -> None:
    """One line for each name, the first on top, and the names at the right."""
    for name in reversed(list(lines)):
        style = styles[name]
        axes.plot(x, lines[name], color=style.colour, linewidth=style.width, linestyle=style.dash,
                  marker=style.marker if markers else "", markersize=5,
                  solid_capstyle="round", clip_on=False)  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.08)
    finite = {n: values[np.isfinite(values)] for n, values in lines.items()}
    label_ends(axes, {n: float(values[-1]) for n, values in finite.items() if len(values)}, styles)


def label_ends(axes: Axes, ends: Mapping[str, float], styles: Mapping[str, Series]) -> None:
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


def shortened(name: str, letters: int = LABEL_LETTERS) -> str:
    """At most so many letters."""
    return name if len(name) <= letters else name[: letters - 1].rstrip() + "…"


def short_number(value: float) -> str:
    """12,000 as 12k: at most three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
