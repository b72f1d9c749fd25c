"""Other libraries that remove single weights, on the same model, images and layers, without training.

DeiT-Tiny; the weights of all attention and FFN layers, not of the classifier; calibration on rows 600..799 of
imagenet-val-800, evaluation on rows 0..599, standard error about 1.6 points. Every library runs in an environment of
its own (benchmarks/peers), which the first run installs into .venv-peers; it receives the dense weights and the images
as files and returns the pruned weights, and the same code evaluates them. SparseGPT and Wanda rank within layers or
rows, as published; `obc` ranks all layers together. What fails is a row with its error. The notes also have the seconds
of every job. Results are recorded in benchmarks/results/sparsifiers-notes.jsonl, so that an interrupted benchmark
continues; delete the file to start over. Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/sparsifiers.json and
docs/results/sparsifiers.md.
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.lib.deit_tiny import Batches, load_dense, load_images, split
from benchmarks.lib.peer_environments import run_job, write_case
from benchmarks.lib.results import Recorded, Row, arguments, real_data, write_results, write_table
from vitprune.evaluation.accuracy import accuracy

ROOT = Path(__file__).parents[2]
GOALS: dict[str, dict[str, float | str]] = {
    **{f"{share} %": {"sparsity": share / 100} for share in (30, 50, 60, 75)},
    "2:4": {"pattern": "2:4"},
}
WEIGHTS, N_M = ("30 %", "50 %", "60 %", "75 %"), ("2:4",)
SECONDS = 1800.0


@dataclass(frozen=True)
class Peer:
    """A method of a library: environment (empty: that of the benchmark), script, name of the method, its goals."""

    library: str
    environment: str
    runner: str
    method: str
    goals: Sequence[str]

    @property
    def label(self) -> str:
        """Return the label."""
        return f"{self.library}, {self.method}"


PEERS = [
    Peer("torch.nn.utils.prune", "", "torch_prune", "magnitude, layer", WEIGHTS),
    Peer("torch.nn.utils.prune", "", "torch_prune", "magnitude, global", WEIGHTS),
    Peer("NNCF", "nncf", "nncf_magnitude", "magnitude, layer", WEIGHTS),
    Peer("NNCF", "nncf", "nncf_magnitude", "magnitude, global", WEIGHTS),
    Peer("torchao", "nncf", "torchao_wanda", "Wanda", (*WEIGHTS, *N_M)),
    Peer("llm-compressor", "llm_compressor", "llm_compressor", "Wanda", (*WEIGHTS, *N_M)),
    Peer("llm-compressor", "llm_compressor", "llm_compressor", "SparseGPT", (*WEIGHTS, *N_M)),
    Peer("ModelOpt", "modelopt", "modelopt_sparsity", "magnitude", N_M),
    Peer("ModelOpt", "modelopt", "modelopt_sparsity", "SparseGPT", N_M),
    Peer("vitprune", "", "vitprune_obc", "obc", ("50 %", *N_M, "60 %", "75 %", "30 %")),
]


@dataclass(frozen=True)
class Measured:
    """Top-1 in % of one pruned model; `error` is the last line of what failed, empty otherwise."""

    label: str
    goal: str
    top1: float = 0.0
    seconds: float = 0.0
    versions: str = ""
    zeros: float = 0.0
    error: str = ""


def main() -> None:
    """Measure every method for every goal and write the table."""
    options = arguments(__doc__, {"libraries": ("", "names of libraries, separated by commas; all if empty")})
    folder = real_data()
    dense = load_dense(folder)
    calibration, held_out = split(*load_images(folder / "imagenet-val-800.parquet", dense))
    if options.quick:
        calibration, held_out = [calibration[0]], [held_out[0]]
    peers = [peer for peer in PEERS if not options.libraries or peer.library in options.libraries.split(",")]
    if options.quick:
        peers = [peer for peer in peers if not peer.environment]
    done = Recorded("sparsifiers", Measured, options.quick)
    known = {(row.label, row.goal) for row in done}
    with tempfile.TemporaryDirectory() as name:
        write_case(Path(name), dense.state_dict(), calibration)
        for peer in peers:
            for goal in peer.goals[:1] if options.quick else peer.goals:
                if (peer.label, goal) not in known:
                    done.record(measure(peer, goal, Path(name), dense, held_out))
    top1 = accuracy(dense, held_out)[0]["top1"]
    if not options.quick:
        header = ["library and method", *GOALS, "versions"]
        about = f"Dense: {top1:.1f} %. {__doc__}"
        write_table(ROOT / "docs/results/sparsifiers.md", "Other libraries: single weights", about, header, table(done))
    rows = [Row("dense", top1, "top-1 %")]
    rows += [Row(f"{row.label}, {row.goal}", row.top1, "top-1 %") for row in done if not row.error]
    write_results("sparsifiers", rows, options.quick)


def measure(peer: Peer, goal: str, folder: Path, dense: nn.Module, held_out: Batches) -> Measured:
    """Run one job and evaluate its weights."""
    spec = {"method": peer.method, "threads": 2, **GOALS[goal]}
    result = run_job(folder, peer.environment, peer.runner, spec, SECONDS)
    if isinstance(result, str):
        return Measured(peer.label, goal, error=result)
    weights, facts = result
    model = copy.deepcopy(dense)
    model.load_state_dict(weights)
    zeros = [layer.weight == 0 for layer in model.get_submodule("blocks").modules() if isinstance(layer, nn.Linear)]
    return Measured(
        peer.label,
        goal,
        accuracy(model, held_out)[0]["top1"],
        facts["seconds"],
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        sum(int(part.sum()) for part in zeros) / sum(part.numel() for part in zeros),
    )


def table(done: Sequence[Measured]) -> list[list[str]]:
    """Return one row per method: top-1 for each goal, and versions or errors."""
    rows = []
    for label in dict.fromkeys(row.label for row in done):
        by_goal = {row.goal: row for row in done if row.label == label}
        cells = [f"{by_goal[goal].top1:.1f}" if goal in by_goal and not by_goal[goal].error else "" for goal in GOALS]
        notes = dict.fromkeys(row.error or row.versions for row in by_goal.values())
        rows.append([label, *cells, "; ".join(notes)])
    return rows


if __name__ == "__main__":
    main()
