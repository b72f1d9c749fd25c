"""Latency targets by a table of group times: unit-obs on DeiT-Tiny against the ranking per MAC at the same latency.

The table is recorded in onnxruntime (vitprune latency-table), one thread, batch 1. Each pruned model is exported and
measured there alternately with the dense one; `measured` is the median ratio. Ranking `table`: a latency target with
the table, by dynamic programming over the times of all widths. Ranking `macs`: units ranked per MAC, at the sparsity
for which the table gives the same latency. Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800;
all values on the same images. `+ correction`: norms and biases are corrected afterwards (prune.correct_norms). Needs
VITPRUNE_REAL_DATA. Writes benchmarks/results/latency_table.json, the table beside it, and
docs/results/latency_table.md.
"""

import copy
import statistics
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from benchmarks.lib.deit_tiny import Setup, corrected, setup
from benchmarks.lib.results import Row, arguments, write_results, write_table
from vitprune import PruneConfig, count, data, plan_for
from vitprune.criteria import Importance
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.engines import forward_call
from vitprune.evaluation.latency import alternating_times
from vitprune.evaluation.latency_table import write_latency_table
from vitprune.evaluation.record_latency_table import record_latency_table
from vitprune.groups import Masks
from vitprune.pruning.cost_target import least_scalar
from vitprune.pruning.cycle_masks import cycle_state, groups_for, select_cycle_masks, select_masks
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.runtime.eval_mode import scoring_mode

ROOT = Path(__file__).parents[2]
ENGINE, METHOD = "ort", "unit-obs"
TARGETS = (0.7, 0.5)


def main() -> None:
    """Record the table, prune for every target by both rankings, and write the tables."""
    options = arguments(__doc__, {"table": ("", "a recorded table; empty: record one")})
    runs = 10 if options.quick else 100
    case, lines = setup(), list[list[str]]()
    rows = [Row("dense", case.top1, "top-1 %")]
    path = Path(options.table or ROOT / "benchmarks/results/latency_table.csv")
    if not options.table:
        write_latency_table(record_latency_table(case.dense, ENGINE, runs=runs), path)
    importance = scores_of(case.dense, case)
    for target in TARGETS[-1:] if options.quick else TARGETS:
        plan = plan_for(PruneConfig(method=METHOD, target={"latency": target, "table": path}))
        chosen = {
            "table": dict(select_cycle_masks(case.dense, importance.scores, plan, cycle_state(case.dense, plan)).masks)
        }
        chosen["macs"] = by_macs(case.dense, importance, plan, target)
        results = {name: measured(case, plan, importance, masks, runs) for name, masks in chosen.items()}
        for name, result in results.items():
            cells = [f"{result[key]:.4f}" for key in ("latency", "macs")]
            lines.append([f"{target:g}", name, *cells, f"{result['top1']:.1f}", f"{result['corrected']:.1f}"])
            bound = ("within 3 %", abs(result["latency"] / target - 1) <= 0.03) if name == "table" else (None, None)
            rows.append(Row(f"{target:g}, {name}: latency in onnxruntime", result["latency"], "of dense", *bound, runs))
            rows.append(Row(f"{target:g}, {name}: MACs", result["macs"], "of dense"))
            rows.append(Row(f"{target:g}, {name}", result["top1"], "top-1 %"))
            rows.append(Row(f"{target:g}, {name} + correction", result["corrected"], "top-1 %"))
            print(lines[-1], flush=True)
    if not options.quick:
        header = ["target", "ranking", "measured", "MACs", "top-1", "+ correction"]
        about = f"Dense: {rows[0].value:.1f} %. {__doc__}"
        write_table(ROOT / "docs/results/latency_table.md", "Latency targets by a table", about, header, lines)
    write_results("latency_table", rows, options.quick)


def scores_of(dense: nn.Module, case: Setup) -> Importance:
    """Return the scores and statistics of the calibration images."""
    plan, model = plan_for(PruneConfig(method=METHOD, sparsity=0.5)), copy.deepcopy(dense)
    with scoring_mode(model):
        return plan.method.criterion(model, groups_for(model, plan), case.calibration, plan.context(1))


def by_macs(dense: nn.Module, importance: Importance, plan: Plan, limit: float) -> Masks:
    """Return the masks of the ranking per MAC that the table of a plan gives the latency of a limit."""
    ranking = plan_for(PruneConfig(method=METHOD, target={"macs": limit}))
    state = cycle_state(dense, ranking)
    cost = cycle_state(dense, plan).costs.model
    assert cost is not None

    def masks_at(scalar: float) -> Masks:
        return select_masks(importance.scores, ranking, ranking.shares(scalar), state)

    return masks_at(least_scalar(masks_at, cost, limit)[1])


def measured(case: Setup, plan: Plan, importance: Importance, masks: Masks, runs: int) -> Mapping[str, float]:
    """Prune with masks; return the latency and MACs relative to dense, and top-1 without and with correction."""
    model = copy.deepcopy(case.dense)
    for _ in prune_cycles(model, plan, case.calibration, masks, dict(importance.statistics)):
        pass
    image = data.example_input(model, 1)
    calls = [forward_call(network, ENGINE, image) for network in (model, case.dense)]
    pruned, dense = alternating_times(calls, 2 * runs)
    result = {"latency": statistics.median([ours / base for ours, base in zip(pruned, dense, strict=True)])}
    result |= {"macs": count(model, image).macs / count(case.dense, image).macs}
    result |= {"top1": accuracy(model, case.held_out)[0]["top1"]}
    return result | {"corrected": accuracy(corrected(case, model), case.held_out)[0]["top1"]}


if __name__ == "__main__":
    main()
