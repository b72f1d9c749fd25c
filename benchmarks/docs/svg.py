"""Write small SVG drawings whose text is the same on every machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

INK, PALE = "#24292f", "#d0d7de"


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start", extra: str = "") -> str:
    """Return a line of text; `extra` holds further attributes."""
    attributes = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {attributes} fill="{INK}" {extra}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, color: str = PALE, extra: str = "") -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" {extra}/>'


def write(path: Path, width: int, height: int, title: str, parts: Sequence[str]) -> None:
    """Write a drawing on a white background."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{escape(title)}">'
    )
    background = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    path.write_text("\n".join([head, background, *parts, "</svg>"]) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Axis:
    """An axis: its label, the values at its ends, the marked values and their format."""

    label: str
    first: float
    last: float
    marks: Sequence[float]
    shown: str = "{:g}"

    def share(self, value: float) -> float:
        """Return where a value lies: 0 at the first end, 1 at the last."""
        return (value - self.first) / (self.last - self.first)


@dataclass(frozen=True)
class Curve:
    """Points of one thing; `values` prints the vertical value of each of them, above or below it."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    values: Literal["above", "below"] | None = None


def chart(path: Path, title: str, x_axis: Axis, y_axis: Axis, curves: Sequence[Curve], legend: int = 150) -> None:
    """Write a line chart; every curve has its name at its right end.

    Args:
        path: The file.
        title: Heading.
        x_axis: Horizontal axis.
        y_axis: Vertical axis.
        curves: Curves from left to right.
        legend: Width for the names.
    """
    left, top, right, bottom = 62, 40, 740 - legend, 310

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return left + x_axis.share(point[0]) * (right - left), bottom - y_axis.share(point[1]) * (bottom - top)

    parts = [text(left, 20, title, 13)]
    for mark in y_axis.marks:
        y = place((x_axis.first, mark))[1]
        parts += [line(left, y, right, y), text(left - 8, y + 4, y_axis.shown.format(mark), 12, "end")]
    for mark in x_axis.marks:
        x = place((mark, y_axis.first))[0]
        label = text(x, bottom + 18, x_axis.shown.format(mark), 12, "middle")
        parts += [line(x, bottom, x, bottom + 4), label]
    parts.append(text((left + right) / 2, bottom + 38, x_axis.label, 12, "middle"))
    names = [place(curve.points[-1])[1] for curve in curves]
    for curve, name_y in zip(curves, spread(names, 15), strict=True):
        pixels = [place(point) for point in curve.points]
        path_data = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        parts.append(f'<polyline points="{path_data}" fill="none" stroke="{curve.color}" stroke-width="2.5"/>')
        for (x, y), (at, value) in zip(pixels, curve.points, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{curve.color}"/>')
            if curve.values == "above":
                parts.append(text(x, y - 9, f"{value:.1f}", 11, "middle"))
            elif curve.values == "below" and at != x_axis.first:
                is_low = y > bottom - 24  # below is the label of the axis
                parts.append(
                    text(x - 8 * is_low, y + (2 if is_low else 18), f"{value:.1f}", 11, ("middle", "end")[is_low])
                )
        x, y = pixels[-1]
        parts.append(line(x + 5, y, x + 20, name_y, curve.color))
        parts.append(text(x + 24, name_y + 4, curve.name, 12, extra='font-weight="bold"'))
    write(path, 740, bottom + 52, title, parts)


def bars(path: Path, title: str, label: str, rows: Sequence[tuple[str, float, str]]) -> None:
    """Write horizontal bars.

    Args:
        path: The file.
        title: Heading.
        label: What a bar's length means.
        rows: Name, length and color of each bar.
    """
    left, top, height, right = 330, 34, 24, 660
    longest = max(length for _, length, _ in rows)
    parts = [text(20, 20, title, 13)]
    for number, (name, length, color) in enumerate(rows):
        y, width = top + number * height, length / longest * (right - left)
        parts.append(text(left - 8, y + 15, name, 12, "end"))
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{width:.1f}" height="{height - 8}" fill="{color}"/>')
        parts.append(text(left + width + 6, y + 15, f"{length:.0f}", 12))
    bottom = top + len(rows) * height
    parts.append(text(20, bottom + 20, label, 12))
    write(path, 740, bottom + 32, title, parts)


def spread(positions: Sequence[float], distance: float) -> list[float]:
    """Move positions apart until neighbors have a distance; return them in the given order."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + distance)
    excess = (sum(moved) - sum(positions)) / len(positions)
    return [position - excess for position in moved]
