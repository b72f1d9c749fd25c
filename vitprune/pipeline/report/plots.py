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

# Matplotlib paints in these; the page then replaces each by a CSS variable, so that one drawing serves light and dark.
COLOURS = {"dense": "#010203", "pruned": "#010204", "ink": "#010205", "muted": "#010206", "rule": "#010207"}

_WIDTH = 5.6  # inches; 403 units of the view box, about what a phone shows at its natural text size
_TINY = 64  # pixels; below this an image is kept as it is and shown with crisp pixels
_THUMBNAIL = 160


@dataclass(frozen=True)
class Line:
    """One curve: x and y of equal length, the colour's name, and how it is drawn."""

    x: Sequence[float]
    y: Sequence[float]
    label: str
    colour: str = "pruned"
    style: str = "-"
    marker: str = ""


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows, and optionally its limits and where it is marked."""

    label: str
    limits: tuple[float, float] | None = None
    ticks: Sequence[float] | None = None
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Plot:
    """A drawing and the caption under it."""

    svg: Markup
    title: str
    caption: str = ""
    removed: Quantity | None = None


def curves(name: str, description: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[float] = ()) -> Markup:
    """Curves over one axis; `marks` are faint vertical rules. More than one curve gets a legend."""

    def paint(axes: Any) -> None:
        for position in marks:
            axes.axvline(position, color=COLOURS["rule"], linewidth=0.8)
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                line.style,
                color=COLOURS[line.colour],
                marker=line.marker,
                markersize=3.5,
                linewidth=1.6 if line.colour == "pruned" else 1.4,
                label=line.label,
            )
        _scale(axes.xaxis, axes.set_xlim, x)
        _scale(axes.yaxis, axes.set_ylim, y)
        axes.grid(axis="y")
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=COLOURS["ink"], borderaxespad=0.2, handlelength=2.4)

    return _draw(name, description, 2.9, paint)


def bars(name: str, description: str, labels: Sequence[str], percents: Sequence[float]) -> Markup:
    """Horizontal bars of 0 to 100 %, the first on top, each with its figure at the end."""

    def paint(axes: Any) -> None:
        places = range(len(labels))
        axes.barh(places, [100.0] * len(labels), height=0.62, color=COLOURS["rule"])
        axes.barh(places, percents, height=0.62, color=COLOURS["pruned"])
        for place, percent in zip(places, percents, strict=True):
            axes.text(102, place, f"{percent:.0f}", va="center", color=COLOURS["ink"])
        axes.set_yticks(places, labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 110)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("removed, %")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    return _draw(name, description, 0.55 + 0.2 * len(labels), paint)


def thumbnail(encoded: bytes) -> tuple[str, bool]:
    """An encoded image as a data URI, and whether it is so small that its pixels should stay crisp.

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
        "svg.fonttype": "none",  # text stays text: it takes the page's font, and can be read and selected
        "svg.hashsalt": "vitprune",  # else every run draws other ids
        "text.parse_math": False,  # a "$" in a group's name is a dollar sign
        "font.size": 10,
        "text.color": COLOURS["ink"],
        "axes.labelcolor": COLOURS["muted"],
        "axes.edgecolor": COLOURS["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "grid.color": COLOURS["rule"],
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "xtick.labelcolor": COLOURS["muted"],
        "ytick.labelcolor": COLOURS["muted"],
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
    # A page holds many drawings, so ids must not collide; and it, not the drawing, decides colours and size.
    svg = document[document.index("<svg") :]
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r' id="', f' id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, painted in COLOURS.items():
        svg = svg.replace(painted, f"var(--{colour})")
    title = html.escape(description, quote=True)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))
