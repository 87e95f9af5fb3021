"""A matplotlib figure as inline SVG: deterministic, themed by CSS variables, with a text alternative.

Figures are drawn in stand-in colours, which become CSS variables here, so that one drawing serves the light and
the dark theme of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#0200{k:02x}" for k in range(8))
"""Stand-ins; the page's style sheet gives ``--s0`` to ``--s7`` their colours. The model is always the first."""

WIDTH_IN = 6.0
"""Width of every figure. At 432 points, text of 10.5 stays legible on a phone 400 pixels wide."""

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface"} | {
    colour: f"--s{k}" for k, colour in enumerate(SERIES)
}
_NAMESPACE = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
}

ElementTree.register_namespace("", _NAMESPACE)
ElementTree.register_namespace("xlink", _XLINK)


def draw(name: str, alternative: str, height_in: float, paint: Callable[[Figure], None]) -> Markup:
    """An ``<svg role=img>`` element. ``name`` keeps its ids apart from those of other figures of the page."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH_IN, height_in))
        FigureCanvasSVG(figure)
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(_themed(buffer.getvalue(), name, alternative))


def _themed(text: str, name: str, alternative: str) -> str:
    root = ElementTree.fromstring(text)
    for metadata in root.findall(f"{{{_NAMESPACE}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        _rewrite(element, name)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    root.set("data-figure", name)
    title = ElementTree.Element(f"{{{_NAMESPACE}}}title", {"id": f"{name}-title"})
    title.text = alternative
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite(element: ElementTree.Element, name: str) -> None:
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == f"{{{_XLINK}}}href":
            element.set(key, value.replace("#", f"#{name}-", 1))
        elif key == "clip-path":
            element.set(key, value.replace("url(#", f"url(#{name}-"))
        elif key in ("style", "fill", "stroke"):
            element.set(key, re.sub(r"#[0-9a-f]{6}", _variable, value))


def _variable(match: re.Match[str]) -> str:
    variable = _VARIABLES.get(match.group())
    return f"var({variable})" if variable else match.group()
