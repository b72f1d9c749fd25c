"""Draw top-1 against MACs for vitprune, Torch-Pruning and CORP on DeiT-Tiny: docs/images/accuracy_macs.svg.

One-shot structured pruning without training. Every point is a row of benchmarks/results/structured.json or peers.json;
nothing is measured here. `--check` writes nothing and exits with 1 if the figure differs from the results.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from benchmarks.docs import svg
from benchmarks.docs.readme_table import ROOT, results

FIGURE = ROOT / "docs/images/accuracy_macs.svg"
GOALS = ("0.85x MACs", "0.7x MACs", "0.5x MACs")
FFN = ("25 % of FFN", "50 % of FFN", "70 % of FFN")
LEFT, TOP, RIGHT, BOTTOM = 62, 34, 610, 300
COLORS = {"vitprune": "#0969da", "CORP": "#bf8700", "Torch-Pruning": "#cf222e"}

Curve = list[tuple[float, float]]


def curves() -> dict[str, Curve]:
    """Return (share of the dense MACs, top-1 in %) of each tool, from the dense model down."""
    ours, theirs = results("structured"), results("peers")
    dense = [(1.0, ours["dense"])]
    macs = [_share(goal) for goal in GOALS]
    best = [max(value for row, value in theirs.items() if _is_evaluated(row, goal)) for goal in GOALS]
    return {
        "vitprune": dense + [(x, ours[f"best of ours, {goal}"]) for x, goal in zip(macs, GOALS, strict=True)],
        "CORP": dense + [(ours[f"corp, {goal}, remaining MACs"], ours[f"corp, {goal}"]) for goal in FFN],
        "Torch-Pruning": dense + list(zip(macs, best, strict=True)),
    }


def _share(goal: str) -> float:
    return float(goal.partition("x")[0])


def _is_evaluated(row: str, goal: str) -> bool:
    """Tell whether a row is top-1 on the evaluation images for a goal."""
    return bool(re.fullmatch(f"{re.escape(goal)}: (?!.*calibration).*(?<!MACs)(?<!params)", row))


def draw(path: Path) -> None:
    """Write the figure."""

    def to_pixels(macs: float, top1: float) -> tuple[float, float]:
        return LEFT + (1 - macs) / 0.55 * (RIGHT - LEFT), BOTTOM - top1 / 90 * (BOTTOM - TOP)

    parts = [svg.text(LEFT, 20, "DeiT-Tiny on ImageNet images, one-shot structured pruning, no training", 13)]
    for top1 in range(0, 81, 20):
        y = to_pixels(1, top1)[1]
        parts += [svg.line(LEFT, y, RIGHT, y), svg.text(LEFT - 8, y + 4, f"{top1} %", 12, "end")]
    for percent in range(100, 49, -10):
        x = to_pixels(percent / 100, 0)[0]
        parts += [svg.line(x, BOTTOM, x, BOTTOM + 4), svg.text(x, BOTTOM + 18, f"{percent / 100:.1f}x", 12, "middle")]
    parts.append(svg.text((LEFT + RIGHT) / 2, BOTTOM + 36, "MACs, as a fraction of the dense model", 12, "middle"))
    for name, curve in curves().items():
        points = [to_pixels(*point) for point in curve]
        path_data = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path_data}" fill="none" stroke="{COLORS[name]}" stroke-width="2.5"/>')
        for (x, y), (_, top1) in zip(points[1:], curve[1:], strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLORS[name]}"/>')
            right, above = name != "Torch-Pruning" or y > BOTTOM - 20, name != "Torch-Pruning" or y > BOTTOM - 20
            anchor = "start" if right else "end"
            parts.append(svg.text(x + (6 if right else -7), y + (-7 if above else 15), f"{top1:.1f}", 11, anchor))
        x, y = points[-1]
        parts.append(svg.text(RIGHT + 14 if x > RIGHT - 60 else x + 34, y + 4, name, 13, extra='font-weight="bold"'))
    svg.write(path, 740, 350, "Top-1 accuracy against MACs of vitprune, CORP and Torch-Pruning", parts)


def main() -> None:
    """Write the figure, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", "--quick", action="store_true", help="write nothing, compare with the committed file"
    )
    if not parser.parse_args().check:
        draw(FIGURE)
        return
    with tempfile.TemporaryDirectory() as scratch:
        draw(Path(scratch) / "figure.svg")
        if (Path(scratch) / "figure.svg").read_text() != FIGURE.read_text():
            sys.exit(f"{FIGURE}: differs from the results; run python -m benchmarks.docs.accuracy_figure")


if __name__ == "__main__":
    main()
