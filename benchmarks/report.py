"""Measured figures beside their targets, as a table for the terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from learner.artifact import library_versions
from streams.provenance import describe_machine


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number of one case, and what it should be."""

    case: str
    name: str
    runs: tuple[float, ...]
    """One value per run; the figure is their mean"""
    unit: str = ""
    target: float | None = None
    at_most: bool = False
    """Whether the target is an upper bound, as of seconds, bytes and losses"""

    @property
    def value(self) -> float:
        """The mean over the runs."""
        return fmean(self.runs)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "case": self.case, "name": self.name, "value": self.value, "runs": list(self.runs), "unit": self.unit,
            "target": self.target, "at_most": self.at_most, "met": self.met,
        }  # fmt: skip


def as_dict(results: Mapping[str, Iterable[Figure]], scale: float) -> dict[str, Any]:
    """All benchmarks' figures by name, with what they ran on."""
    return {
        "machine": describe_machine(),
        "versions": library_versions(),
        "scale": scale,
        "benchmarks": {name: [figure.as_dict() for figure in figures] for name, figures in results.items()},
    }


def write_json(path: Path, results: Mapping[str, Iterable[Figure]], scale: float) -> None:
    """Writes ``as_dict`` as UTF-8 JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_dict(results, scale), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(title: str, figures: Iterable[Figure]) -> Table:
    """One row per figure; a case is named once."""
    result = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name in ("case", "figure", "measured", "target", ""):
        result.add_column(name, justify="right" if name in ("measured", "target") else "left")
    case = ""
    for figure in figures:
        target = "" if figure.target is None else f"{'≤' if figure.at_most else '≥'} {number(figure.target)}"
        verdict = {None: "", True: "met", False: "MISSED"}[figure.met]
        unit = f" {figure.unit}" if figure.unit else ""
        shown = "" if figure.case == case else figure.case
        result.add_row(shown, figure.name, number(figure.value) + unit, target, verdict)
        case = figure.case
    return result


def number(value: float) -> str:
    """Four digits of a share, whole numbers from a hundred on, two places in between."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.2f}" if size >= 1 else f"{value:.4f}"
