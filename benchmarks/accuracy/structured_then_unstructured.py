"""Structured, then unstructured pruning: DeiT-Tiny at 0.7x MACs with half of the remaining weights zero, no training.

First units (`unit-obs` or `upvits-refit`, with correction), then single weights of the smaller model by one of the
second-order methods; update and correction use the dense logits and the inputs of the smaller model; score.damping is
4e-6 (oneshot.md). Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800. MB: size of the
checkpoint, and compressed by zlib, which shows what zeros save on disk.
Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/stacked.json and docs/results/stacked.md.
"""

import copy
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.lib.deit_tiny import Setup, corrected, damped, setup
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune import PruneConfig, models, plan_for
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.cost import count
from vitprune.pruning.prune_cycles import prune_cycles

ROOT = Path(__file__).parents[2]
MACS, SPARSITY = 0.7, 0.5


@dataclass(frozen=True)
class Case:
    """A method for units and one for single weights; None: not pruned."""

    units: str | None
    weights: str | None

    @property
    def label(self) -> str:
        """Return the label."""
        steps = [f"{self.units} to {MACS}x MACs"] if self.units else []
        return ", then ".join(steps + ([f"{self.weights} {SPARSITY:.0%}"] if self.weights else [])) or "dense"


CASES = [
    *(Case(units, weights) for units in (None, "unit-obs") for weights in (None, "magnitude", "ovit", "obc")),
    Case("upvits-refit", None),
    Case("upvits-refit", "ovit"),
]


def main() -> None:
    """Prune, count and evaluate every case, and write the tables."""
    quick = arguments(__doc__).quick
    real_data()
    case, rows, table = setup(), [], []
    dense_cost = count(case.dense, case.held_out[0][0][:1])
    for combination in [Case(None, "magnitude")] if quick else CASES:
        model = prune(case, combination)
        cost, top1 = count(model, case.held_out[0][0][:1]), accuracy(model, case.held_out)[0]["top1"]
        plain, compressed = sizes(model)
        rows.append(Row(combination.label, top1, "top-1 %"))
        rows.append(Row(f"{combination.label}: non-zero MACs", cost.nonzero_macs / dense_cost.macs, "of dense"))
        rows.append(Row(f"{combination.label}: compressed", compressed, "MB"))
        shares = [cost.params / dense_cost.params, cost.nonzero_params / dense_cost.params]
        shares += [cost.macs / dense_cost.macs, cost.nonzero_macs / dense_cost.macs]
        table.append(
            [combination.label, f"{top1:.1f}", *(f"{s:.2f}x" for s in shares), f"{plain:.1f}", f"{compressed:.1f}"]
        )
        print(table[-1], flush=True)
    if not quick:
        header = ["pruned by", "top-1 %", "params", "non-zero params", "MACs", "non-zero MACs", "MB", "compressed"]
        title = "Units, then weights of DeiT-Tiny, no training"
        write_table(ROOT / "docs/results/stacked.md", title, __doc__ or "", header, table)
    write_results("stacked", rows, quick)


def prune(case: Setup, combination: Case) -> nn.Module:
    """Prune units, then weights, with a correction of norms after each."""
    model = copy.deepcopy(case.dense)
    plans = [plan_for(PruneConfig(method=combination.units, target={"macs": MACS}))] if combination.units else []
    plans += [damped(PruneConfig(method=combination.weights, sparsity=SPARSITY))] if combination.weights else []
    for plan in plans:
        for _ in prune_cycles(model, plan, case.calibration):
            corrected(case, model)
    return model


def sizes(model: nn.Module) -> tuple[float, float]:
    """Return the megabytes of the checkpoint, and of the same compressed by zlib."""
    with tempfile.TemporaryDirectory() as folder:
        models.save(model, Path(folder))
        stored = (Path(folder) / "model.safetensors").read_bytes()
    return len(stored) / 1e6, len(zlib.compress(stored, 1)) / 1e6


if __name__ == "__main__":
    main()
