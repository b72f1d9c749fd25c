"""Write small SVG drawings whose text is the same on every machine."""

from collections.abc import Sequence
from pathlib import Path
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
