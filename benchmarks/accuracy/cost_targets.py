"""Targets asked for and reached: four untrained timm models by channel-magnitude, FFN units and attention together.

Of XCiT, whose attention is among channels, FFN units and the residual stream.

MACs at 0.3, 0.5 and 0.8 of the dense model's, parameters at 0.5, MACs, parameters and milliseconds as absolute
numbers, and MACs in multiples of 8 and under rules. Reached within 2 %, or the note says why not. Latencies are
measured here, one image at a time, beside the dense model; of Swin only a fraction. A refusal shows its line. Weights
are random: where they are does not matter to what a model costs. Writes benchmarks/results/targets.json and
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
from vitprune.pruning.prune import prune_cycles

ROOT = Path(__file__).parents[2]
MODELS = ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "xcit_nano_12_p16_224")
SHARES = {"xcit_nano_12_p16_224": {"ffn": 1.0, "residual": 1.0}}  # its attention is among channels, which stay
ABSOLUTE = {  # MACs and parameters that are no round fraction of the dense model's
    "deit_tiny_patch16_224": ("700M", "3M"),
    "swin_tiny_patch4_window7_224": ("2.5G", "15M"),
    "pvt_v2_b0": ("300M", "2M"),
    "xcit_nano_12_p16_224": ("350M", "2M"),
}
RULES = [{"match": r".*blocks\.0\..*", "ignore": True}, {"match": r".*\.mlp", "max_sparsity": 0.75}]


@dataclass(frozen=True)
class Case:
    """A target, and how it is to be reached."""

    target: Mapping[str, float | str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    how: str = ""

    def __str__(self) -> str:
        """In words."""
        ((cost, asked),) = self.target.items()
        number = asked if isinstance(asked, str) else f"{asked:.4g}"
        return f"{cost} {number}" + (f", {self.how}" if self.how else "")


def cases(name: str, dense: nn.Module, quick: bool) -> Iterator[Case]:
    """What is asked of a model, milliseconds as late as possible; quick: fewer shares."""
    macs, params = ABSOLUTE[name]
    found = [Case({"macs": share}) for share in ((0.5,) if quick else (0.3, 0.5, 0.8))]
    found += [Case({"params": 0.5}), Case({"macs": macs}), Case({"params": params})]
    found += [Case({"macs": 0.5}, {"round_to": 8}, "multiples of 8")]
    found += [Case({"macs": 0.5}, {"scope": "macs", "round_to": 8}, "multiples of 8, all compete")]
    found += [Case({"macs": 0.8}, {"rules": RULES}, "the first blocks whole, 25 % of each FFN at least")]
    yield from [*found, Case({"latency": 0.7})]
    if name != MODELS[1]:  # the slowest of them, for which a fraction must do
        yield Case({"latency_ms": round(0.7 * latency([dense], example_input(dense, 1), 45)[0]["median"], 2)})


def measured(name: str, dense: nn.Module, case: Case) -> tuple[list[Row], list[str]]:
    """What a case reaches, as rows and as a line of the table."""
    model, start = copy.deepcopy(dense), time.perf_counter()
    try:
        plan = plan_for(
            PruneConfig(method="channel-magnitude", sparsity=SHARES.get(name), target=case.target, **case.settings)
        )
        (cycle,) = prune_cycles(model, plan, ())
    except BadInput as refused:  # where the clock has drifted since the dense model was timed
        return [], [name, str(case), "", "refused", "", "", str(refused)]
    seconds = time.perf_counter() - start
    ((cost, record),) = cycle.cost.items()
    asked, reached, why = float(record["target"]), float(record["reached"]), str(record.get("why", ""))
    if not cost.startswith("latency"):  # counted anew on the model itself
        counted = getattr(count(model, example_input(model, 1)), cost)
        whole = record.get("dense") or getattr(count(dense, example_input(dense, 1)), cost)
        assert counted == round(reached if "dense" in record else reached * float(whole))
    off, absolute = reached / asked - 1, "dense" in record
    unit = {"latency_ms": "ms"}.get(cost, cost) if absolute else "of dense"
    rows = [
        Row(f"{name}, {case}", reached, unit, f"{asked:.6g} within 2 %, or why not", abs(off) <= 0.02 or bool(why)),
        Row(f"{name}, {case}: found in", seconds, "s"),
    ]
    note = f"p10 {record['p10']:.3g}, p90 {record['p90']:.3g} ms. " if "p10" in record else ""
    shown = [format_cost(number) if absolute else f"{number:.4f}" for number in (asked, reached)]
    return rows, [name, str(case), *shown, f"{off:+.2%}", f"{seconds:.1f}", note + why]


def main() -> None:
    """Try every case on every model and write the tables."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, lines = [], []
    for name in MODELS[:1] if quick else MODELS:
        dense = timm.create_model(name).eval()
        for case in cases(name, dense, quick):
            found, line = measured(name, dense, case)
            rows += found
            lines.append(line)
            print(" | ".join(line), flush=True)
    if not quick:
        header = ["model", "asked", "target", "reached", "off", "s", "note"]
        title = "Targets: asked for and reached"
        write_table(ROOT / "docs/results/targets.md", title, __doc__ or "", header, lines)
    write_results("targets", rows, quick)


if __name__ == "__main__":
    main()
