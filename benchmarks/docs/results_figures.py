"""Draw the figures of docs/results/index.md from benchmarks/results: docs/images/results_*.svg.

Nothing is measured here. A figure whose results file does not exist yet is left out. `--check` writes nothing and exits
with 1 if a figure differs from the results.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.docs.readme_table import ROOT, results
from benchmarks.docs.svg import Axis, Curve, bars, chart

IMAGES = ROOT / "docs/images"
BLUE, DARK, GREEN, YELLOW, RED, GRAY = "#54aeff", "#0550ae", "#1a7f37", "#bf8700", "#cf222e", "#6e7781"
ACCURACY = Axis("", 0, 85, range(0, 81, 20), "{} %")
GOALS = ("0.85x MACs", "0.7x MACs", "0.5x MACs")
SPARSITIES = (30, 50, 60, 75)
FITTED = ", 200 images, seed 0"  # reconstructed without labels (label_free)
DEIT = "DeiT-Tiny on ImageNet images"


def accuracy_macs(path: Path) -> None:
    """Draw top-1 against MACs: pruned units, merged tokens, Torch-Pruning."""
    ours, theirs, merged, fitted = (results(name) for name in ("structured", "peers", "token_merging", "label_free"))
    macs = [float(goal.partition("x")[0]) for goal in GOALS]
    best = [max(value for row, value in theirs.items() if _is_evaluated(row, goal)) for goal in GOALS]
    few = [("0.7x MACs", "0.7x MACs, 8 merged"), ("0.5x MACs", "0.5x MACs, 16 merged")]
    dense = [(1.0, ours["dense"])]
    curves = [
        Curve("fewer units and tokens", DARK, dense + [(_share(goal), merged[row]) for goal, row in few], "above"),
        Curve(
            "fewer units, fitted",
            GREEN,
            [(_share(goal), fitted[f"{goal}, unit-obs{FITTED}"]) for goal in GOALS[1:]],
        ),
        Curve("fewer units", BLUE, dense + [(_share(goal), ours[f"best of ours, {goal}"]) for goal in GOALS]),
        Curve("Torch-Pruning, best", RED, dense + list(zip(macs, best, strict=True)), "below"),
    ]
    axis = Axis("MACs, as a fraction of the dense model", 1.0, 0.45, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5), "{:.1f}x")
    chart(path, f"{DEIT}: top-1 against MACs, without training", axis, ACCURACY, curves, 170)


def accuracy_sparsity(path: Path) -> None:
    """Draw top-1 against the fraction of zero weights."""
    ours, fitted = results("oneshot"), results("label_free")
    dense = [(0.0, ours["dense"])]
    better = [(s, fitted[f"weights {s} %, obc{FITTED}"]) for s in SPARSITIES if f"weights {s} %, obc{FITTED}" in fitted]
    curves = [Curve("obc, fitted", GREEN, better, "above")]
    named = {"obc": ("obc", DARK), "ovit": ("ovit (CAP)", BLUE), "fisher-diagonal": ("fisher-diagonal", YELLOW)}
    for method, (name, color) in (named | {"lamp": ("lamp", GRAY), "magnitude": ("magnitude", RED)}).items():
        points = dense + [(s, ours[f"{method}, {s} %"]) for s in SPARSITIES]
        curves.append(Curve(name, color, points, "below" if method == "magnitude" else None))
    axis = Axis("weights that are zero", 0, 78, (0, 30, 50, 60, 75), "{} %")
    chart(path, f"{DEIT}: top-1 against zero weights, without training", axis, ACCURACY, curves)


def seconds(path: Path) -> None:
    """Draw the seconds that a pruning of DeiT-Tiny takes, with and without reconstruction."""
    rows = []
    for row, value in sorted(results("label_free").items(), key=lambda item: item[1]):
        match = re.fullmatch(r"(.*), 200 images, seed (-?\d+), seconds", row)
        if match:
            fits = match[2] != "-1"
            rows.append((f"{match[1]}{', fitted' * fits}", value, GREEN if fits else BLUE))
    label = "seconds on 2 cores beside other work, 200 images; green: with reconstruction"
    bars(path, "DeiT-Tiny: time of pruning without labels or training", label, rows)


def latency(path: Path) -> None:
    """Draw the speed-up against MACs of the engines, batch 1, DeiT-Tiny."""
    rows, curves = results("engines"), []
    colors = {"onnxruntime": DARK, "OpenVINO": GREEN, "torch": YELLOW, "torch.compile": RED, "ExecuTorch": BLUE}
    for engine, color in colors.items():
        found = [
            re.fullmatch(rf"DeiT-Tiny, ([\d.]+)x MACs, batch 1, {re.escape(engine)}, speed-up", row) for row in rows
        ]
        points = [(1.0, 1.0), *((float(match[1]), rows[match[0]]) for match in found if match)]
        if len(points) > 1:
            curves.append(Curve(engine, color, sorted(points, reverse=True)))
    curves.append(Curve("MACs", GRAY, [(1 / speed, speed) for speed in (1.0, 1.4, 1.8, 2.2, 2.6, 1 / 0.35)]))
    top = max(3.0, *(speed for curve in curves for _, speed in curve.points))
    axis = Axis("MACs, as a fraction of the dense model", 1.0, 0.3, (1.0, 0.7, 0.5, 0.35), "{:g}x")
    chart(path, "DeiT-Tiny, batch 1: speed-up against MACs", axis, Axis("", 0, top, (1, 2, 3), "{}x"), curves)


FIGURES: dict[str, tuple[Callable[[Path], None], str]] = {  # by file: what draws it, and a results file that it needs
    "results_macs.svg": (accuracy_macs, "structured"),
    "results_sparsity.svg": (accuracy_sparsity, "oneshot"),
    "results_seconds.svg": (seconds, "label_free"),
    "results_latency.svg": (latency, "engines"),
}


def drawn() -> list[str]:
    """Return the figures whose results exist."""
    return [name for name, (_, needed) in FIGURES.items() if (ROOT / f"benchmarks/results/{needed}.json").exists()]


def _share(goal: str) -> float:
    return float(goal.partition("x")[0])


def _is_evaluated(row: str, goal: str) -> bool:
    """Tell whether a row is top-1 on the evaluation images for a goal."""
    return bool(re.fullmatch(f"{re.escape(goal)}: (?!.*calibration).*(?<!MACs)(?<!params)", row))


def main() -> None:
    """Write the figures, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", "--quick", action="store_true", help="write nothing, compare with committed files")
    is_check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        for name in drawn():
            path = (Path(scratch) if is_check else IMAGES) / name
            FIGURES[name][0](path)
            if is_check and path.read_text() != (IMAGES / name).read_text():
                sys.exit(f"{IMAGES / name}: differs from the results; run python -m benchmarks.docs.results_figures")


if __name__ == "__main__":
    main()
