"""Table and plot of a sweep, from hand-made metrics."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitprune import BadInput
from vitprune.pipeline.report.pareto_plot import DensePoint, Point, draw, front
from vitprune.pipeline.report.sweep_table import write_sweep


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(1, 80)], [0]),
        ([(1, 80), (2, 70), (1.5, 60)], [0, 1]),  # the last is slower and worse than the second
        ([(2, 70), (1, 80)], [1, 0]),  # in order of the first coordinate
        ([(1, 80), (1, 79)], [0]),
        ([(1, 80), (2, 80)], [1]),
        ([(1, 80), (1, 80), (2, 70)], [0, 1, 2]),  # of equal points, both are on the front
        ([(1, 70), (2, 80), (3, 90)], [2]),
    ],
)
def test_pareto_front_by_hand(points: list[tuple[float, float]], expected: list[int]) -> None:
    assert sorted(front(points)) == sorted(expected)
    assert [points[at][0] for at in front(points)] == sorted(points[at][0] for at in expected)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_has_no_dominated_point(seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(0, 8, size=(30, 2))  # small numbers, so that many are equal
    points = [(float(x), float(y)) for x, y in drawn]

    def beaten(x: float, y: float) -> bool:
        return any(a >= x and b >= y and (a > x or b > y) for a, b in points)

    assert sorted(front(points)) == [at for at, (x, y) in enumerate(points) if not beaten(x, y)]


def sweep(folder: Path, runs: dict[str, tuple[float, float, str]], against: str = "throughput") -> Path:
    """A sweep's folder: run -> top-1, images per second, status; dense has 80 % at 100 images per second."""
    (folder / "results").mkdir(parents=True)
    plan = {"title": "a sweep", "against": against, "runs": []}
    for name, (top1, throughput, status) in runs.items():
        method, _, target = name.partition(" ")
        plan["runs"].append({"name": name, "method": method, "target": target, "directory": f"runs/{name}"})
        if status == "waiting":
            continue
        result = {"name": name, "status": status, "seconds": 12.5, "error": "no luck" if status == "failed" else ""}
        (folder / "results" / f"{name}.json").write_text(json.dumps(result))
        metrics = folder / f"runs/{name}/metrics"
        metrics.mkdir(parents=True)
        counts = {
            "params": 4e6,
            "nonzero_params": 2e6,
            "macs": 1e9,
            "nonzero_macs": 5e8,
            "nominal_macs": 5e8,
            "top5": 95.0,
        }
        dense = {
            "params": 5e6,
            "nonzero_params": 5e6,
            "macs": 2e9,
            "nonzero_macs": 2e9,
            "nominal_macs": 2e9,
            "top5": 97.0,
        }
        evaluation = {"pruned": counts | {"top1": top1}, "dense": dense | {"top1": 80.0}}
        (metrics / "evaluate.json").write_text(json.dumps(evaluation))
        clock = {
            "pruned": {"latency_ms": {"median": 1000 / throughput}, "throughput": throughput},
            "dense": {"latency_ms": {"median": 10.0}, "throughput": 100.0},
        }
        (metrics / "latency.json").write_text(json.dumps(clock))
    (folder / "sweep.json").write_text(json.dumps(plan))
    return folder


RUNS = {
    "taylor macs 0.5": (70.0, 150.0, "finished"),
    "obs macs 0.5": (75.0, 160.0, "finished"),
    "obs macs 0.3": (60.0, 200.0, "finished"),
    "taylor macs 0.3": (1.0, 1.0, "failed"),
    "kl macs 0.3": (1.0, 1.0, "waiting"),
}


def test_a_sweep_gives_a_table_and_a_plot(tmp_path: Path) -> None:
    rows = write_sweep(sweep(tmp_path / "sweep", RUNS), tmp_path / "out")
    table = pq.read_table(tmp_path / "out/sweep.parquet").to_pylist()
    assert table == rows or [row["run"] for row in table] == list(RUNS)
    assert [row["front"] for row in table] == [False, True, True, False, False]
    assert [row["gain"] for row in table[:3]] == [1.5, 1.6, 2.0]
    assert (table[0]["top1"], table[0]["dense_top1"], table[0]["latency_ms"]) == (70.0, 80.0, 1000 / 150)
    assert (table[3]["status"], table[3]["error"], table[3]["top1"]) == ("failed", "no luck", None)
    page = (tmp_path / "out/sweep.md").read_text()
    assert "| dense |  | 80.00 | +0.00 | 5 | 5 | 2 | 2 | 10.00 | 100.0 |  |  |\n" in page
    assert "| obs | macs 0.5 | 75.00 | +5.00 | 4 | 2 | 1 | 0.5 | 6.25 | 160.0 | 1.60x | yes |\n" in page
    assert "- taylor macs 0.3: no luck\n" in page
    assert "| kl | macs 0.3 | waiting |" in page
    html = (tmp_path / "out/sweep.html").read_text()
    assert 'src="data:image/png;base64,' in html
    assert html.count('<tr class="front">') == 2
    with Image.open(tmp_path / "out/pareto.png") as picture:
        assert picture.size == (1680, 1080)
        shown = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= shown  # the first two methods; kl has no point
    assert (0x00, 0x9E, 0x73) not in shown


@pytest.mark.parametrize(("against", "gain"), [("throughput", 1.5), ("macs", 4.0), ("params", 2.5)])
def test_x_axis_of_the_plot(tmp_path: Path, against: str, gain: float) -> None:
    rows = write_sweep(sweep(tmp_path / "sweep", {"a macs 0.5": (70.0, 150.0, "finished")}, against), tmp_path / "out")
    assert rows[0]["gain"] == gain


def test_a_sweep_without_results_has_a_table_and_no_plot(tmp_path: Path) -> None:
    write_sweep(sweep(tmp_path / "sweep", {"a macs 0.5": (0.0, 1.0, "failed")}), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sweep.html", "sweep.md", "sweep.parquet"]


def test_files_that_are_no_sweep_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"sweep.json: no such file; give a folder written by vitprune sweep"):
        write_sweep(tmp_path, tmp_path / "out")
    folder = sweep(tmp_path / "sweep", {"a macs 0.5": (70.0, 150.0, "finished")})
    (folder / "runs/a macs 0.5/metrics/latency.json").unlink()
    with pytest.raises(BadInput, match="its evaluation metrics are missing"):
        write_sweep(folder, tmp_path / "out")


def test_the_plot_is_deterministic(tmp_path: Path) -> None:
    points = [Point(1.2, 75.0, "a", "macs 0.8"), Point(1.2, 75.0, "b", "ffn 0.5 attention 0.2")]
    for name in ("one", "two"):
        draw(points, DensePoint(80.0, 100.0), "throughput", "twice", tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
