"""Numbers as the page writes them, and a drawing with its words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with its words."""

    title: str
    caption: str
    drawing: Markup | None


def decimal(value: float | None, digits: int) -> str:
    """Fixed digits, or a dash where there is no value."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """With a sign, a true minus for the page."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.{digits}f}".replace("-", "−")
