"""Plots of the report as inline SVG in the colors of the page, and thumbnails as data URIs."""

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from vitprune.pipeline.report.numbers import Quantity

# Placeholders that are replaced by CSS variables, so that a plot follows the page's light or dark theme.
COLORS = {"dense": "#010203", "pruned": "#010204", "ink": "#010205", "muted": "#010206", "rule": "#010207"}

_WIDTH = 5.6  # inches; 403 units of the view box, about the width of a phone at normal text size
_TINY = 64  # pixels; images up to this size are not resized, and are shown with sharp pixels
_THUMBNAIL = 160


@dataclass(frozen=True)
class Line:
    """A curve: x and y of equal length, label, name of the color, line style and marker."""

    x: Sequence[float]
    y: Sequence[float]
    label: str
    color: str = "pruned"
    style: str = "-"
    marker: str = ""


@dataclass(frozen=True)
class Axis:
    """An axis: label, and optional limits, ticks and names of the ticks."""

    label: str
    limits: tuple[float, float] | None = None
    ticks: Sequence[float] | None = None
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Plot:
    """A plot, its title and its caption."""

    svg: Markup
    title: str
    caption: str = ""
    removed: Quantity | None = None


def curves(name: str, description: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[float] = ()) -> Markup:
    """Draw curves; `marks` are positions of thin vertical lines. Several curves get a legend."""

    def paint(axes: Any) -> None:
        for position in marks:
            axes.axvline(position, color=COLORS["rule"], linewidth=0.8)
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                line.style,
                color=COLORS[line.color],
                marker=line.marker,
                markersize=3.5,
                linewidth=1.6 if line.color == "pruned" else 1.4,
                label=line.label,
            )
        _scale(axes.xaxis, axes.set_xlim, x)
        _scale(axes.yaxis, axes.set_ylim, y)
        axes.grid(axis="y")
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=COLORS["ink"], borderaxespad=0.2, handlelength=2.4)

    return _draw(name, description, 2.9, paint)


def bars(name: str, description: str, labels: Sequence[str], percents: Sequence[float]) -> Markup:
    """Draw horizontal bars of 0 to 100 % from top to bottom, each with its number at the end."""

    def paint(axes: Any) -> None:
        rows = range(len(labels))
        axes.barh(rows, [100.0] * len(labels), height=0.62, color=COLORS["rule"])
        axes.barh(rows, percents, height=0.62, color=COLORS["pruned"])
        for row, percent in zip(rows, percents, strict=True):
            axes.text(102, row, f"{percent:.0f}", va="center", color=COLORS["ink"])
        axes.set_yticks(rows, labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 110)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("removed, %")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    return _draw(name, description, 0.55 + 0.2 * len(labels), paint)


def thumbnail(encoded: bytes) -> tuple[str, bool]:
    """Return an encoded image as a data URI, and whether it is so small that it is shown with sharp pixels.

    Raises:
        OSError: the bytes are not an image that can be decoded.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        upright = ImageOps.exif_transpose(image)
        picture = upright if upright.mode == "L" else upright.convert("RGB")
    tiny = max(picture.size) <= _TINY
    buffer = io.BytesIO()
    if tiny:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        picture.save(buffer, format="JPEG", quality=82, optimize=True)
    kind = "png" if tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", tiny


def _scale(ruler: Any, set_limits: Callable[[tuple[float, float]], object], axis: Axis) -> None:
    ruler.set_label_text(axis.label)
    if axis.ticks is not None:
        ruler.set_ticks(axis.ticks, axis.names)
    if axis.limits is not None:
        set_limits(axis.limits)


def _draw(name: str, description: str, height: float, paint: Callable[[Any], None]) -> Markup:
    style = {
        "svg.fonttype": "none",  # text elements: they use the page's font and can be selected
        "svg.hashsalt": "vitprune",  # the same ids in every run
        "text.parse_math": False,  # do not interpret "$" in names
        "font.size": 10,
        "text.color": COLORS["ink"],
        "axes.labelcolor": COLORS["muted"],
        "axes.edgecolor": COLORS["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "grid.color": COLORS["rule"],
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "xtick.color": COLORS["muted"],
        "ytick.color": COLORS["muted"],
        "xtick.labelcolor": COLORS["muted"],
        "ytick.labelcolor": COLORS["muted"],
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(buffer.getvalue(), name, description)


def _inline(document: str, name: str, description: str) -> Markup:
    # Ids must be unique among all plots of the page; the page sets colors and size.
    svg = document[document.index("<svg") :]
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r' id="', f' id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, painted in COLORS.items():
        svg = svg.replace(painted, f"var(--{color})")
    title = html.escape(description, quote=True)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))
