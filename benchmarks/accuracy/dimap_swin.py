"""DIMAP on Swin-T, -S and -B at the paper's sparsities of 15, 35 and 55 %: parameters, FLOPs and sparsity per module.

Table 1: nonzero parameters, and FLOPs saved as in the paper (nominal: every prunable layer at the mean sparsity) and by
the masks (every layer at its own sparsity). Then the ablation of the paper's table 4: one pool of all modules (the LAMP
score over prunable layers) against one pool per module. Then the threshold of every module, and the remaining weights
of every stage. Last the time of scores and masks of Swin-B, compared with one torch.sort of the same weights. Weights
are timm's random initialization (truncated normal): nominal counts do not depend on them; mask-weighted FLOPs,
thresholds, remaining weights and the ablation do. Writes benchmarks/results/dimap.json and docs/results/dimap.md.
"""

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from benchmarks.lib.results import Row, Section, arguments, write_results, write_sections
from vitprune import Group, Masks, Scores, count, find_groups, score, zero
from vitprune.data import example_input
from vitprune.evaluation.cost import count_macs
from vitprune.pruning.select import select

ROOT = Path(__file__).parents[2]
POOLS = ("qkv", "proj", "mlp")
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SHARES = (0.15, 0.35, 0.55)
PAPER: dict[str, dict[float, tuple[float, float]]] = {  # table 1: millions of parameters left, FLOPs saved in %
    "swin_tiny_patch4_window7_224": {0.15: (24.4, 13.9), 0.35: (19.2, 32.4), 0.55: (14.0, 50.8)},
    "swin_small_patch4_window7_224": {0.15: (42.5, 14.3), 0.35: (33.1, 33.2), 0.55: (23.7, 52.3)},
    "swin_base_patch4_window7_224": {0.15: (75.2, 14.4), 0.35: (58.4, 33.5), 0.55: (41.7, 52.7)},
}
PRINTED = ("swin_small_patch4_window7_224", 0.45, "3.8e-07, 4.99e-07, 1.5e-06 in an order that its text permutes")
ABOUT = {
    "table": """The paper does not state how it counts FLOPs. Its percentages are the sparsity times the prunable
    fraction of the total of Swin's own counter (matrix products, convolutions, norms), as if every layer had the same
    sparsity. The masks save less: small early layers keep more of their weights and process more tokens. `count` gives
    both, for products and convolutions only. Parameters are within 0.1 M of the paper's and nominal FLOPs within 0.1
    points, or the last column gives the reason.""",
    "ablation": """Sparsity of each module, and FLOPs that the masks save, in %: one threshold per module (DIMAP), and
    one for all prunable layers (LAMP; in the paper's table 4, 0.1 to 0.3 points worse after fine-tuning). One pool
    prunes less of the small proj layers and more of mlp. With published weights, without training: rows lamp and dimap
    of oneshot.md, which differ by a few points on DeiT-Tiny.""",
    "thresholds": """Largest removed score, per module. The denominator of a score is the layer's energy, so for layers
    with the same distribution it is proportional to 1 / size: mlp, qkv and proj as 3/4 to 1 to 3.""",
    "remaining": """Remaining weights of every kind of layer in every stage, in %, at 55 % sparsity. Scores are
    fractions of the layer's energy, which are small in large layers, so the last stage is pruned most.""",
    "time": "Median seconds on one thread; the measurements alternate.",
}


@dataclass(frozen=True)
class Swin:
    """A Swin without zero weights, its prunable layers with their scores, and the MACs of one image.

    `official` is the total of Swin's own MACs counter.
    """

    name: str
    model: nn.Module
    groups: Sequence[Group]
    scores: Scores
    per_layer: Mapping[str, int]
    official: int

    @property
    def short(self) -> str:
        """Name in the paper."""
        return f"Swin-{self.name.split('_')[1][0].upper()}"

    @property
    def prunable(self) -> int:
        """MACs of the prunable layers."""
        return sum(self.per_layer[group.name.removesuffix(".weight")] for group in self.groups)

    def masks(self, share: float, scope: str) -> Masks:
        """Return the masks of a sparsity."""
        return select(self.scores, share, scope, self.groups)

    def pool(self, pool: str) -> list[str]:
        """Return the names of a module's layers."""
        return [group.name for group in self.groups if group.layer_type == pool]

    def saved(self, masks: Masks) -> float:
        """Return the FLOPs that masks save, layer by layer, in % of Swin's own counter."""
        saved = sum(self.per_layer[name.removesuffix(".weight")] * removed(masks, [name]) for name in masks)
        return saved / self.official


def build(name: str) -> Swin:
    """Create and score a Swin whose weights are nonzero, so that later zeros come from masks."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 1e-9
    groups = find_groups(model, ["weight"])
    total, per_layer = count_macs(model, example_input(model, 1))
    return Swin(
        name, model, groups, score(model, groups, "energy"), per_layer, total + norm_operations(copy.deepcopy(model))
    )


def norm_operations(model: nn.Module) -> int:
    """Count the operations that Swin's own counter adds for norms: one per normalized value."""
    total = 0

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        total += inputs[0].numel()

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(add)
    with torch.inference_mode():
        model(example_input(model, 1))
    return total


def removed(masks: Masks, names: Sequence[str]) -> float:
    """Return the sparsity of some layers together, in %."""
    return 100 * sum(int((~masks[name]).sum()) for name in names) / sum(masks[name].numel() for name in names)


def implied(swin: Swin) -> str:
    """Describe the total FLOPs that would give the paper's three percentages, each rounded to 0.1."""
    printed = [(share, saved) for share, (_, saved) in PAPER[swin.name].items()]
    low = max(swin.prunable * 100 * share / (saved + 0.05) for share, saved in printed) / 1e9
    high = min(swin.prunable * 100 * share / (saved - 0.05) for share, saved in printed) / 1e9
    counter = f"Swin's counter gives {swin.official / 1e9:.3f} G"
    if high - low < 1e-3:
        return f"no single total gives the paper's three values ({low:.3f} G is closest); {counter}"
    return f"the paper's three values imply a total of {low:.3f} to {high:.3f} G; {counter}"


def table_1(swin: Swin) -> tuple[list[Row], list[list[str]]]:
    """Compare parameters and FLOPs at the three sparsities with the paper; the model ends with 55 % zeros."""
    rows, lines = [], []
    for share, (paper_params, paper_saved) in PAPER[swin.name].items():
        masks = swin.masks(share, "module")  # masks of a larger sparsity contain those of a smaller one
        zero(swin.model, swin.groups, masks)
        cost = count(swin.model, example_input(swin.model, 1))
        params, saved = cost.nonzero_params / 1e6, cost.macs - cost.nominal_macs
        nominal, without_norms = 100 * saved / swin.official, 100 * saved / cost.macs
        weighted = 100 * (cost.macs - cost.nonzero_macs) / swin.official
        assert abs(weighted - swin.saved(masks)) < 1e-6
        off = abs(nominal - paper_saved)
        why = f"differs by {off:.2f}: {implied(swin)}" if off > 0.1 else ""
        what = f"{swin.short} at {share:.0%}"
        rows += [
            Row(f"{what}: parameters", params, "M", f"{paper_params} within 0.1", abs(params - paper_params) <= 0.1),
            Row(
                f"{what}: nominal FLOPs saved",
                nominal,
                "%",
                f"{paper_saved} within 0.1, or a reason",
                off <= 0.1 or bool(why),
            ),
            Row(f"{what}: mask-weighted FLOPs saved", weighted, "%"),
        ]
        figures = [
            f"{paper_params}",
            f"{params:.3f}",
            f"{paper_saved}",
            f"{nominal:.2f}",
            f"{without_norms:.2f}",
            f"{weighted:.1f}",
        ]
        lines.append([swin.short, f"{share:.0%}", *figures, why])
    return rows, lines


def ablation(swin: Swin) -> tuple[list[Row], list[list[str]]]:
    """Compare the sparsity of each module with one threshold per module and with one for all."""
    rows, lines = [], []
    for share in SHARES:
        line = [swin.short, f"{share:.0%}"]
        for scope, name in (("module", "per module"), ("global", "one pool")):
            masks = swin.masks(share, scope)
            shares = {pool: removed(masks, swin.pool(pool)) for pool in POOLS}
            rows += [Row(f"{swin.short} at {share:.0%}, {name}: {pool} removed", shares[pool], "%") for pool in POOLS]
            line += [" / ".join(f"{shares[pool]:.1f}" for pool in POOLS), f"{swin.saved(masks):.1f}"]
        lines.append(line)
    return rows, lines


def thresholds(swin: Swin) -> tuple[list[Row], list[list[str]]]:
    """Return the largest removed score per module; also at 45 %, for which the paper prints them."""
    rows, lines = [], []
    for share in sorted({*SHARES, *([PRINTED[1]] if swin.name == PRINTED[0] else [])}):
        masks, line = swin.masks(share, "module"), [swin.short, f"{share:.0%}"]
        for pool in POOLS:
            highest = max(float(swin.scores[n][~masks[n]].max()) for n in swin.pool(pool) if not bool(masks[n].all()))
            rows.append(Row(f"{swin.short} at {share:.0%}: threshold of {pool}", highest, "of the energy"))
            line.append(f"{highest:.3g}")
        lines.append([*line, PRINTED[2] if share == PRINTED[1] else ""])
    return rows, lines


def remaining(swin: Swin) -> tuple[list[Row], list[list[str]]]:
    """Return the remaining weights of every stage per kind of layer, at the largest sparsity."""
    rows, lines, masks = [], [], swin.masks(SHARES[-1], "module")
    for stage in range(4):
        line = [swin.short, f"{stage + 1}"]
        for layer in (*LAYERS, ""):
            names = [n for n in masks if n.startswith(f"layers.{stage}.") and f".{layer}" in n]
            share = 100 - removed(masks, names)
            rows.append(Row(f"{swin.short}, stage {stage + 1}: {layer or 'all'} remaining", share, "%"))
            line.append(f"{share:.1f}")
        lines.append(line)
    return rows, lines


def measure_time(name: str, runs: int) -> tuple[list[Row], list[list[str]]]:
    """Time scores and masks of a Swin and one sort of the same weights, alternating."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    groups = find_groups(model, ["weight"])
    flat = torch.cat([model.get_parameter(group.name).detach().flatten() for group in groups])
    times: dict[str, list[float]] = {"scores": [], "masks": [], "torch.sort": []}
    for _ in range(runs):
        start = time.perf_counter()
        scores = score(model, groups, "energy")
        scored = time.perf_counter()
        select(scores, SHARES[-1], "module", groups)
        selected = time.perf_counter()
        del scores  # frees memory for the sort
        sort_start = time.perf_counter()
        flat.sort()
        for what, span in zip(
            times, (scored - start, selected - scored, time.perf_counter() - sort_start), strict=True
        ):
            times[what].append(span)
    medians = {what: statistics.median(seconds) for what, seconds in times.items()}
    both = statistics.median(map(sum, zip(times["scores"], times["masks"], strict=True)))
    ratio = both / medians["torch.sort"]
    what = f"{len(flat) / 1e6:.1f} M weights of {name.split('_patch')[0]}"
    rows = [Row(f"{part}, {what}", seconds, "s", runs=runs) for part, seconds in medians.items()]
    rows.append(Row(f"scores and masks by one torch.sort, {what}", ratio, "x", "3 or less", ratio <= 3, runs))
    return rows, [[what, *(f"{seconds:.2f}" for seconds in medians.values()), f"{ratio:.2f}"]]


def main() -> None:
    """Run all measurements and write the tables."""
    quick = arguments(__doc__).quick
    names = list(PAPER)[:1] if quick else list(PAPER)
    torch.set_num_threads(1)
    rows, lines = measure_time(names[-1], 3)
    tables: dict[str, list[list[str]]] = {"table": [], "ablation": [], "thresholds": [], "remaining": [], "time": lines}
    for name in names:
        swin = build(name)
        for part, measure in (
            ("ablation", ablation),
            ("thresholds", thresholds),
            ("remaining", remaining),
            ("table", table_1),
        ):
            results, lines = measure(swin)
            rows += results
            tables[part] += lines
        del swin  # frees memory for the next, larger model
    if not quick:
        write_page(tables)
    write_results("dimap", rows, quick)


def write_page(tables: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Write docs/results/dimap.md."""
    three = " / ".join(POOLS)
    headers = {
        "table": (
            "Table 1",
            [
                "model",
                "sparsity",
                "remaining M: paper",
                "ours",
                "% FLOPs saved: paper",
                "nominal",
                "no norms",
                "by masks",
                "",
            ],
        ),
        "ablation": (
            "One threshold per module against one for all",
            ["model", "sparsity", f"per module: {three}", "FLOPs", f"one pool: {three}", "FLOPs"],
        ),
        "thresholds": ("Thresholds", ["model", "sparsity", *POOLS, "printed in the paper"]),
        "remaining": ("Remaining weights by stage", ["model", "stage", *LAYERS, "all"]),
        "time": ("Time", ["", "scores", "masks", "torch.sort", "scores and masks / sort"]),
    }
    sections = [Section(heading, ABOUT[part], header, tables[part]) for part, (heading, header) in headers.items()]
    write_sections(ROOT / "docs/results/dimap.md", "DIMAP on Swin", __doc__ or "", sections)


if __name__ == "__main__":
    main()
