"""Cost targets and reached costs: channel-magnitude on four untrained timm models, FFN units and attention together.

XCiT has attention over channels, so its FFN units and residual channels are pruned instead. Targets: MACs at 0.3, 0.5
and 0.8 of the dense model, parameters at 0.5, absolute MACs, parameters and milliseconds, and MACs with multiples of 8
and with rules. A cost is within 2 % of its target, or the note gives the reason. Latency is measured on this machine
with batch 1, alternately with the dense model; for Swin only as a fraction. For a refused target the note is the error
message. Weights are random, which does not affect the cost. Writes benchmarks/results/targets.json and
docs/results/targets.md.
"""

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.lib.results import Row, arguments, write_results, write_table
from vitprune import BadInput, PruneConfig, count, plan_for
from vitprune.config.quantity import format_cost
from vitprune.data import example_input
from vitprune.evaluation.latency import latency
from vitprune.pruning.prune_cycles import prune_cycles

ROOT = Path(__file__).parents[2]
MODELS = ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "xcit_nano_12_p16_224")
SPARSITY = {"xcit_nano_12_p16_224": {"ffn": 1.0, "residual": 1.0}}  # attention over channels: not pruned
ABSOLUTE = {  # MACs and parameters
    "deit_tiny_patch16_224": ("700M", "3M"),
    "swin_tiny_patch4_window7_224": ("2.5G", "15M"),
    "pvt_v2_b0": ("300M", "2M"),
    "xcit_nano_12_p16_224": ("350M", "2M"),
}
RULES = [{"match": r".*blocks\.0\..*", "ignore": True}, {"match": r".*\.mlp", "max_sparsity": 0.75}]


@dataclass(frozen=True)
class Case:
    """A cost target with further settings of PruneConfig."""

    target: Mapping[str, float | str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        """Return the label."""
        ((cost, amount),) = self.target.items()
        number = amount if isinstance(amount, str) else f"{amount:.4g}"
        return f"{cost} {number}" + (f", {self.note}" if self.note else "")


def cases(name: str, dense: nn.Module, quick: bool) -> Iterator[Case]:
    """Yield the targets of a model, milliseconds last; quick: fewer fractions."""
    macs, params = ABSOLUTE[name]
    result = [Case({"macs": share}) for share in ((0.5,) if quick else (0.3, 0.5, 0.8))]
    result += [Case({"params": 0.5}), Case({"macs": macs}), Case({"params": params})]
    result += [Case({"macs": 0.5}, {"round_to": 8}, "multiples of 8")]
    result += [Case({"macs": 0.5}, {"scope": "macs", "round_to": 8}, "multiples of 8, scope macs")]
    result += [Case({"macs": 0.8}, {"rules": RULES}, "first blocks not pruned, at most 75 % of each FFN")]
    yield from [*result, Case({"latency": 0.7})]
    if name != MODELS[1]:  # the slowest model: only the fraction
        yield Case({"latency_ms": round(0.7 * latency([dense], example_input(dense, 1), 45)[0]["median"], 2)})


def measured(name: str, dense: nn.Module, case: Case) -> tuple[list[Row], list[str]]:
    """Prune for one target; return the result rows and the row of the table."""
    model, start = copy.deepcopy(dense), time.perf_counter()
    try:
        plan = plan_for(
            PruneConfig(method="channel-magnitude", sparsity=SPARSITY.get(name), target=case.target, **case.settings)
        )
        (cycle,) = prune_cycles(model, plan, ())
    except BadInput as refused:  # latency can drift after the dense model was measured
        return [], [name, str(case), "", "refused", "", "", str(refused)]
    seconds = time.perf_counter() - start
    ((cost, record),) = cycle.cost.items()
    target, reached, why = float(record["target"]), float(record["reached"]), str(record.get("why", ""))
    if not cost.startswith("latency"):  # verified on the pruned model
        counted = getattr(count(model, example_input(model, 1)), cost)
        dense_cost = record.get("dense") or getattr(count(dense, example_input(dense, 1)), cost)
        assert counted == round(reached if "dense" in record else reached * float(dense_cost))
    off, absolute = reached / target - 1, "dense" in record
    unit = {"latency_ms": "ms"}.get(cost, cost) if absolute else "of dense"
    rows = [
        Row(f"{name}, {case}", reached, unit, f"{target:.6g} within 2 %, or a reason", abs(off) <= 0.02 or bool(why)),
        Row(f"{name}, {case}: duration", seconds, "s"),
    ]
    note = f"p10 {record['p10']:.3g}, p90 {record['p90']:.3g} ms. " if "p10" in record else ""
    shown = [format_cost(number) if absolute else f"{number:.4f}" for number in (target, reached)]
    return rows, [name, str(case), *shown, f"{off:+.2%}", f"{seconds:.1f}", note + why]


def main() -> None:
    """Prune every model for every target and write the tables."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, lines = [], []
    for name in MODELS[:1] if quick else MODELS:
        dense = timm.create_model(name).eval()
        for case in cases(name, dense, quick):
            results, line = measured(name, dense, case)
            rows += results
            lines.append(line)
            print(" | ".join(line), flush=True)
    if not quick:
        header = ["model", "setting", "target", "reached", "difference", "s", "note"]
        title = "Cost targets and reached costs"
        write_table(ROOT / "docs/results/targets.md", title, __doc__ or "", header, lines)
    write_results("targets", rows, quick)


if __name__ == "__main__":
    main()
