"""A heat map as a hand-written SVG: small, readable in a diff, no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

CELL, GAP, LEFT, TOP, TITLE = 26, 40, 90, 20, 34
COLD, MIDDLE, HOT = (247, 251, 255), (107, 174, 214), (165, 15, 21)


@dataclass(frozen=True)
class Panel:
    """One grid: `values [rows, columns]`, drawn in columns' order, with a label for each row."""

    title: str
    rows: Sequence[str]
    values: NDArray[np.float64]


def render(panels: Sequence[Panel], peak: float) -> str:
    """Panels below each other. Colour and number show the value; `peak` and above is the hottest colour."""
    width = LEFT + CELL * max(panel.values.shape[1] for panel in panels) + TOP
    parts: list[str] = []
    top = TOP
    for panel in panels:
        parts.append(_text(TOP, top + 12, panel.title, size=13, weight="bold"))
        top += TITLE
        for column in range(panel.values.shape[1]):
            parts.append(_text(LEFT + CELL * column + CELL / 2, top - 5, str(column), anchor="middle"))
        for row, label in enumerate(panel.rows):
            y = top + CELL * row
            parts.append(_text(LEFT - 6, y + CELL * 0.65, label, anchor="end"))
            parts += [_cell(LEFT + CELL * c, y, float(v), peak) for c, v in enumerate(panel.values[row])]
        top += CELL * len(panel.rows) + GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" '
        f'viewBox="0 0 {width} {top}" font-family="sans-serif" font-size="9">'
    )
    background = f'<rect width="{width}" height="{top}" fill="white"/>'
    return "\n".join([head, background, *parts, "</svg>"]) + "\n"


def _cell(x: float, y: float, value: float, peak: float) -> str:
    ink = "white" if value > 0.75 * peak else "black"
    box = f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{_colour(value / peak)}"/>'
    return box + _text(x + CELL / 2, y + CELL * 0.65, f"{value:.1f}", anchor="middle", ink=ink)


def _colour(share: float) -> str:
    """From cold (0) over middle (0.5) to hot (1)."""
    share = min(max(share, 0.0), 1.0)
    low, high = (COLD, MIDDLE) if share < 0.5 else (MIDDLE, HOT)
    at = share * 2 if share < 0.5 else share * 2 - 1
    return "#" + "".join(f"{round(a + (b - a) * at):02x}" for a, b in zip(low, high, strict=True))


def _text(
    x: float, y: float, text: str, size: int = 9, anchor: str = "start", weight: str = "normal", ink: str = "black"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{ink}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'
