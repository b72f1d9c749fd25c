"""Pareto plot of a sweep: top-1 against speed-up or compression, with the Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from vitprune.runtime.files import atomic_write

INK, MUTED, RULE, PAPER = "#1d2126", "#5d6670", "#e2dfd7", "#fcfbf8"  # of the report in its light theme
# Okabe and Ito's colors for color-blind readers, without the pale yellow, and two others; markers differ, too
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f3c8d", "#4d4d4d")
SHAPES = ("o", "s", "D", "^", "v", "P", "X", "h")
AXES = {
    "throughput": ("Throughput relative to the dense model", "images per second"),
    "macs": ("Reduction factor of non-zero MACs relative to the dense model", "G MACs"),
    "params": ("Reduction factor of non-zero parameters relative to the dense model", "M parameters"),
}
# candidate offsets of a label from its point, in half widths and half heights, the best first
AROUND = (
    *((1, 0.6), (0, 1), (1, 0), (0, -1), (1, -0.6), (-1, 0.6)),
    *((-1, 0), (-1, -0.6), (0, 2), (0, -2), (1, 1.8), (1, -1.8)),
)
SCALE = {"throughput": 1.0, "macs": 1e-9, "params": 1e-6}


@dataclass(frozen=True)
class Point:
    """A run: speed-up or compression relative to dense, top-1 in %, method, and target as text."""

    gain: float
    top1: float
    method: str
    target: str


@dataclass(frozen=True)
class DensePoint:
    """The dense model: top-1 in %, and cost in the unit of the axis."""

    top1: float
    cost: float


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points on the Pareto front, in order of the first coordinate; larger is better.

    A point is not on the front if another one is at least as good in both coordinates and better in one. Of equal
    points, all are on the front.
    """
    order = sorted(range(len(points)), key=lambda at: (-points[at][0], -points[at][1]))
    result: list[int] = []
    best = float("-inf")  # of the points with larger gain
    for at in order:
        gain, top1 = points[at]
        if top1 > best or (result and points[result[-1]] == (gain, top1)):
            result.append(at)
        best = max(best, top1)
    return result[::-1]


def draw(points: Sequence[Point], dense: DensePoint, against: str, title: str, out: Path) -> None:
    """Write the plot as PNG or SVG, according to the suffix of `out`.

    Args:
        points: The runs of the sweep.
        dense: The dense model.
        against: Quantity of the horizontal axis, a key of AXES.
        title: Title of the plot.
        out: The file.
    """
    style = {
        "svg.hashsalt": "vitprune",
        "text.parse_math": False,
        "font.size": 10.5,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.8,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": RULE,
        "grid.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
    kind = out.suffix.removeprefix(".")
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 5.4), layout="constrained", facecolor=PAPER)
        _paint(figure, points, dense, against, title)
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        with atomic_write(out) as partial:
            figure.savefig(partial, format=kind, dpi=200, metadata=metadata)


def _paint(figure: Figure, points: Sequence[Point], dense: DensePoint, against: str, title: str) -> None:
    axes = figure.add_subplot(facecolor=PAPER)
    axes.grid(True)
    axes.set_title(title, loc="left", fontsize=12.5, weight="bold", color=INK, pad=10)
    _axes(axes, points, dense, against)
    best = front([(1.0, dense.top1), *((point.gain, point.top1) for point in points)])
    _stairs(axes, [(1.0, dense.top1) if at == 0 else (points[at - 1].gain, points[at - 1].top1) for at in best])
    for number, method in enumerate(dict.fromkeys(point.method for point in points)):
        color, shape = COLORS[number % len(COLORS)], SHAPES[(number + number // len(COLORS)) % len(SHAPES)]
        runs = sorted((point for point in points if point.method == method), key=lambda point: point.gain)
        axes.plot([p.gain for p in runs], [p.top1 for p in runs], color=color, linewidth=1.3, alpha=0.6, zorder=3)
        for point in runs:
            wins = points.index(point) + 1 in best
            edge = {"markeredgecolor": INK, "markeredgewidth": 1.3} if wins else {"markeredgecolor": PAPER}
            axes.plot(point.gain, point.top1, shape, color=color, markersize=9 if wins else 7, zorder=4, **edge)
        axes.plot([], [], shape, color=color, markersize=7, label=method)
    axes.plot(1.0, dense.top1, "*", color=INK, markersize=16, markeredgecolor=PAPER, zorder=5, label="dense")
    _legend(axes, points)
    _labels(figure, axes, points, dense)


def _axes(axes: Any, points: Sequence[Point], dense: DensePoint, against: str) -> None:
    """Set the scales: gain relative to the dense model on the lower axis, cost on the upper axis."""
    name, unit = AXES[against]
    gains, tops = [1.0, *(point.gain for point in points)], [dense.top1, *(point.top1 for point in points)]
    wide, high = max(max(gains) - min(gains), 0.1), max(max(tops) - min(tops), 1.0)
    axes.set_xlim(min(gains) - 0.08 * wide, max(gains) + 0.1 * wide)
    axes.set_ylim(min(tops) - 0.1 * high, max(tops) + 0.12 * high)
    axes.set_xlabel(name)
    axes.set_ylabel("Top-1, %")
    axes.xaxis.set_major_formatter(lambda gain, _: f"{gain:g}\u00d7")
    above = axes.twiny()
    above.set_xlim(axes.get_xlim())
    above.spines[["right", "bottom", "left"]].set_visible(False)
    above.spines["top"].set_color(RULE)
    above.xaxis.set_major_formatter(lambda gain, _: _cost(gain, dense, against))
    above.tick_params(length=0, labelsize=9)
    above.set_xlabel(unit, fontsize=9)


def _cost(gain: float, dense: DensePoint, against: str) -> str:
    if gain <= 0:
        return ""
    cost = dense.cost * gain if against == "throughput" else dense.cost / gain
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"


def _stairs(axes: Any, best: Sequence[tuple[float, float]]) -> None:
    """Draw the Pareto front in steps: for every point to the left of it and below it, a run is better."""
    (left, _), (low, _) = axes.get_xlim(), axes.get_ylim()
    gains = [left, *(gain for gain, _ in best), best[-1][0]]
    tops = [best[0][1], *(top1 for _, top1 in best), low]
    axes.fill_between(gains, tops, low, step="pre", color=MUTED, alpha=0.07, linewidth=0, zorder=1)
    axes.step(
        gains, tops, where="pre", color=MUTED, linewidth=1.1, linestyle=(0, (4, 2.5)), zorder=2, label="Pareto front"
    )


def _legend(axes: Any, points: Sequence[Point]) -> None:
    """Draw the legend at the lower left: few runs have a low accuracy at a low gain."""
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda at: (names[at] != "dense", names[at] == "Pareto front"))
    word = _common_word(points)
    axes.legend(
        [handles[at] for at in order], [names[at] for at in order], loc="lower left", frameon=True, framealpha=0.85,
        facecolor=PAPER, edgecolor="none", labelcolor=INK, fontsize=9.5, handlelength=1.8, borderaxespad=0.6,
        title=f"labels: {word}" if word else None, title_fontproperties={"size": 8.5}, alignment="left",
    ).set_zorder(6)  # fmt: skip


def _common_word(points: Sequence[Point]) -> str:
    """Return the first word of the targets, if all are this word and a number; else an empty string."""
    words = {tuple(point.target.split(" ")[:1]) if point.target.count(" ") == 1 else () for point in points}
    return next(iter(words))[0] if len(words) == 1 and () not in words else ""


def _labels(figure: Figure, axes: Any, points: Sequence[Point], dense: DensePoint) -> None:
    """Label each point with its target, without overlap with points and other labels if possible."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    word, to_points, area = _common_word(points), 72 / figure.dpi, axes.get_window_extent()
    wanted = [(f"dense, {dense.top1:.1f} %", (1.0, dense.top1), 10.0)]
    wanted += [(point.target.removeprefix(f"{word} "), (point.gain, point.top1), 8.5) for point in points]
    spots = [axes.transData.transform(at) for _, at, _ in wanted]
    taken = [axes.get_legend().get_window_extent(), *(_box(x, y, 5 / to_points, 5 / to_points) for x, y in spots)]
    for (text, at, size), (x, y) in zip(wanted, spots, strict=True):
        wide, high = 0.3 * size * len(text) / to_points, 0.6 * size / to_points  # half of each, of an average letter
        offsets = [(dx * (wide + 7 / to_points), dy * (high + 6 / to_points)) for dx, dy in AROUND]
        boxes = {(dx, dy): _box(x + dx, y + dy, wide, high) for dx, dy in offsets}
        inside = [offset for offset, box in boxes.items() if area.contains(*box.min) and area.contains(*box.max)]
        fit = inside or offsets
        free = [offset for offset in fit if not any(map(boxes[offset].fully_overlaps, taken))]
        dx, dy = (free or fit)[0]
        taken.append(boxes[dx, dy])
        axes.annotate(
            text, at, (dx * to_points, dy * to_points), textcoords="offset points", ha="center", va="center",
            fontsize=size, weight="bold" if at == wanted[0][1] else "normal", color=INK, zorder=6,
            path_effects=[withStroke(linewidth=2.2, foreground=PAPER, alpha=0.8)],
        )  # fmt: skip


def _box(x: float, y: float, wide: float, high: float) -> Bbox:
    return Bbox.from_extents(x - wide, y - high, x + wide, y + high)
