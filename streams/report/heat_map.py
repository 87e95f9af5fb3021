"""The heat map of forgetting as inline SVG, themed by the page's style sheet.

Written by hand rather than by matplotlib: a thousand cells that each have a title, in a tenth of the bytes.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from streams.report.analysis import Float
from streams.report.online_numbers import HeatMap

LEVELS = 4
"""Colours on either side of none: the most that can be told apart beside a legend"""


def draw_heat_map(name: str, heat: HeatMap, what: str) -> Markup | None:
    """Cells coloured by change; each tells its numbers where a pointer rests on it. None without cells."""
    step = level_step(heat.change)
    if step is None:
        return None
    return _HeatDrawing(name, heat, what, step).markup()


def level_step(change: Float) -> float | None:
    """Nats from one colour to the next: the smallest round number whose ``LEVELS`` reach 98 % of the changes.

    None where there is no change to show, so no cell at all.
    """
    sizes = np.abs(change[np.isfinite(change)])
    if not len(sizes):
        return None
    wanted = max(float(np.percentile(sizes, 98)) / LEVELS, 1e-4)
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= wanted * (1 - 1e-9))


def levels_of(change: Float, step: float) -> NDArray[np.int64]:
    """0 (fell most) to 2·``LEVELS`` (rose most); NaN has no meaning here."""
    rounded = np.rint(np.nan_to_num(change) / step)
    return (np.clip(rounded, -LEVELS, LEVELS) + LEVELS).astype(np.int64)


class _HeatDrawing:
    """Where everything lies, and the pieces."""

    WIDTH = 432.0
    """As wide as the other figures, in points"""
    LEFT, RIGHT = 40.0, 4.0
    CELL_HEIGHT, WIDEST_CELL, SLICE_GAP = 9.0, 34.0, 2.5
    NARROWEST_NAMED = 9.5
    """Width of a column that can bear a name, written upwards"""
    NAME_LETTERS = 9

    def __init__(self, name: str, heat: HeatMap, what: str, step: float) -> None:
        self.name, self.heat, self.what, self.step = name, heat, what, step
        columns = heat.columns
        breaks = sum(a.slice != b.slice for a, b in pairwise(columns))
        gap = min(self.SLICE_GAP, 100.0 / max(breaks, 1))
        room = self.WIDTH - self.LEFT - self.RIGHT - gap * breaks
        self.cell = min(self.WIDEST_CELL, room / len(columns))
        self.left = [self.LEFT]
        for one, other in pairwise(columns):
            self.left.append(self.left[-1] + self.cell + (gap if one.slice != other.slice else 0.0))
        self.named = self.cell >= self.NARROWEST_NAMED
        self.top = 28.0 + (6.2 * min(max(len(c.kind) for c in columns), self.NAME_LETTERS) + 6 if self.named else 4)
        self.bottom = self.top + self.CELL_HEIGHT * len(heat.versions)

    def markup(self) -> Markup:
        heat = self.heat
        known = np.isfinite(heat.change)
        worse, better = int((heat.change[known] > 0).sum()), int((heat.change[known] < 0).sum())
        alternative = (
            f"Heat map of {self.what}, {len(heat.versions)} evaluations by {len(heat.columns)} cohorts: {better} cells "
            f"fell below the cohort's first evaluation, {worse} rose above it; the largest fall is "
            f"{max(0.0, -float(heat.change[known].min())):.4f}, the largest rise "
            f"{max(0.0, float(heat.change[known].max())):.4f} nats."
        )
        parts = [self._head(), *self._rows(), self._legend()]
        return Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 432 {}" role="img" aria-labelledby="{}-title" '
            'data-figure="{}" class="heat"><title id="{}-title">{}</title>{}</svg>'
        ).format(_short(self.bottom + 52), self.name, self.name, self.name, alternative, Markup("\n").join(parts))

    def _head(self) -> Markup:
        """Slices above their columns, kinds above each; version at the left."""
        columns, parts = self.heat.columns, [_text(0, self.top - 4, "version", "heat-quiet")]
        parts.append(_text(self.LEFT, 12, "cohorts by time slice", "heat-quiet"))
        last = -100.0
        for k, column in enumerate(columns):
            begins = k == 0 or columns[k - 1].slice != column.slice
            if begins and self.left[k] - last >= 14:
                parts.append(_text(self.left[k], 26, f"{column.slice}", "heat-name"))
                last = self.left[k]
            if self.named:
                kind = (
                    column.kind if len(column.kind) <= self.NAME_LETTERS else column.kind[: self.NAME_LETTERS - 1] + "…"
                )
                x = self.left[k] + self.cell / 2 + 3.5
                parts.append(
                    Markup('<text class="heat-quiet" transform="translate({} {}) rotate(-90)">{}</text>').format(
                        _short(x), _short(self.top - 4), kind
                    )
                )
        return Markup("").join(parts)

    def _rows(self) -> list[Markup]:
        heat, levels = self.heat, levels_of(self.heat.change, self.step)
        every = max(1, math.ceil(14 / self.CELL_HEIGHT))
        rows = []
        for r, version in enumerate(heat.versions):
            y = self.top + r * self.CELL_HEIGHT
            parts = []
            if r % every == 0:
                parts.append(
                    Markup('<text class="heat-quiet" text-anchor="end" x="{}" y="{}">{}</text>').format(
                        _short(self.LEFT - 6), _short(y + self.CELL_HEIGHT - 0.8), version
                    )
                )
            for k in np.flatnonzero(np.isfinite(heat.change[r])).tolist():
                parts.append(self._cell_of(r, k, y, int(levels[r, k])))
            rows.append(Markup("").join(parts))
        return rows

    def _cell_of(self, r: int, k: int, y: float, level: int) -> Markup:
        heat = self.heat
        told = (
            f"version {heat.versions[r]}, {heat.columns[k].name}: {heat.value[r, k]:.4f}, "
            f"{heat.change[r, k]:+.4f} since version {heat.since[k]}"
        ).replace("-0.", "−0.")
        return Markup('<rect class="h{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            level, _short(self.left[k]), _short(y), _short(self.cell - 0.5), _short(self.CELL_HEIGHT - 0.5), told
        )

    def _legend(self) -> Markup:
        """One swatch for each colour with the change in its middle; the outermost hold all beyond them."""
        count, width = 2 * LEVELS + 1, 42.5
        y, parts = self.bottom + 12, []
        for level in range(count):
            x = self.LEFT + level * width
            value = (level - LEVELS) * self.step
            text = "0" if level == LEVELS else f"{value:+.3g}".replace("-", "−")
            if level in (0, count - 1):
                text = ("≤" if level == 0 else "≥") + text.removeprefix("+")
            parts.append(
                Markup('<rect class="h{}" x="{}" y="{}" width="{}" height="9"/>').format(
                    level, _short(x), _short(y), _short(width - 1)
                )
            )
            parts.append(
                Markup('<text class="heat-quiet" text-anchor="middle" x="{}" y="{}">{}</text>').format(
                    _short(x + width / 2), _short(y + 20), text
                )
            )
        parts.append(_text(self.LEFT, y + 34, "better: log-loss fell", "heat-better"))
        parts.append(
            Markup('<text class="heat-worse" text-anchor="end" x="{}" y="{}">worse: it rose, in nats</text>').format(
                _short(self.LEFT + count * width), _short(y + 34)
            )
        )
        return Markup("").join(parts)


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, _short(x), _short(y), text)


def _short(value: float) -> str:
    """Two decimals at most: a hundredth of a point cannot be seen."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
