"""The report of a backtest: one HTML file that opens offline."""

from __future__ import annotations

from pathlib import Path

from streams.report.page import render
from streams.results import BacktestResult, write_atomically

__all__ = ["render", "write_report"]


def write_report(path: Path, result: BacktestResult) -> None:
    """Writes the page, whole or not at all: the same result gives the same bytes."""
    text = render(result)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
