"""DIMAP on Swin-T, -S and -B at its paper's sparsities of 15, 35 and 55 %: what is left, what it costs, who loses what.

Table 1: parameters that are not zero, and FLOPs saved as the paper prints them (nominal: every prunable layer at the
mean sparsity) beside those of the masks (every layer at its own). Then the ablation of the paper's table 4, one pool of
all modules (the LAMP score among prunable layers) against one per module: the share that each module loses. Then the
threshold of every module, and what survives in every stage. Last the time that scores and masks of Swin-B take, beside
one torch.sort of the same weights. Weights are timm's random ones (truncated normal): nominal counts do not depend on
them; mask-weighted FLOPs, thresholds, survival and the ablation do, and are those of layers that are drawn alike.
Writes benchmarks/results/dimap.json and docs/results/dimap.md.
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
    "table": """The paper does not say how it counts FLOPs. Its percentages are the sparsity times the prunable share of
    what Swin's own counter says (products, convolutions, norms), as if every layer lost the same. The masks
    save less: small early layers keep more of their weights, and run over more tokens. `count` gives both, of
    products and convolutions alone. Parameters are within 0.1 M of the paper's, nominal FLOPs within 0.1 points
    or the last column says why not.""",
    "ablation": """Share of each module's weights that goes, and FLOPs that the masks save, in %: one threshold per
    module (DIMAP), and one for all prunable layers (LAMP's rule; the paper's table 4 has it 0.1 to 0.3 points worse
    after fine-tuning). One pool spares the small layers of proj and pays with those of mlp. With published
    weights, without training: rows lamp and dimap of oneshot.md, where the two are within a few points of each
    other on DeiT-Tiny.""",
    "thresholds": """The largest score that goes, per module. A score has its layer's energy below the line, so that of
    layers drawn alike it goes as one over their size: mlp, qkv and proj as 3/4 to 1 to 3.""",
    "survival": """What is left of every kind of layer in every stage, in %, at 55 %. Weights of a layer compete by
    their share of its energy, which is small where the layer is large: the last stage pays.""",
    "time": "Seconds on one thread, in turns within one run, the median of each.",
}


@dataclass(frozen=True)
class Swin:
    """A Swin that is nowhere zero, its prunable layers with their scores, and the MACs of one image.

    `official` is what Swin's own counter says of the MACs.
    """

    name: str
    model: nn.Module
    groups: Sequence[Group]
    scores: Scores
    per_layer: Mapping[str, int]
    official: int

    @property
    def short(self) -> str:
        """Its name in the paper."""
        return f"Swin-{self.name.split('_')[1][0].upper()}"

    @property
    def prunable(self) -> int:
        """MACs of the prunable layers."""
        return sum(self.per_layer[group.name.removesuffix(".weight")] for group in self.groups)

    def masks(self, share: float, scope: str) -> Masks:
        """Who stays at a sparsity."""
        return select(self.scores, share, scope, self.groups)

    def pool(self, pool: str) -> list[str]:
        """The names of a module's layers."""
        return [group.name for group in self.groups if group.layer_type == pool]

    def saved(self, masks: Masks) -> float:
        """FLOPs that masks save, layer by layer, in % of what Swin's own counter says."""
        gone = sum(self.per_layer[name.removesuffix(".weight")] * lost(masks, [name]) for name in masks)
        return gone / self.official


def built(name: str) -> Swin:
    """Make a Swin and score it; what is zero in it later was made so by a mask."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 1e-9
    groups = find_groups(model, ["weight"])
    total, per_layer = count_macs(model, example_input(model, 1))
    return Swin(name, model, groups, score(model, groups, "energy"), per_layer, total + normed(copy.deepcopy(model)))


def normed(model: nn.Module) -> int:
    """What Swin's own counter adds to products and convolutions: one operation for every value that is normalised."""
    found = 0

    def seen(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal found
        found += inputs[0].numel()

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(seen)
    with torch.inference_mode():
        model(example_input(model, 1))
    return found


def lost(masks: Masks, names: Sequence[str]) -> float:
    """The share of some layers' weights that goes, in %."""
    return 100 * sum(int((~masks[name]).sum()) for name in names) / sum(masks[name].numel() for name in names)


def implied(swin: Swin) -> str:
    """Which totals would turn the sparsities into the paper's three percentages, each rounded to 0.1, in words."""
    printed = [(share, saved) for share, (_, saved) in PAPER[swin.name].items()]
    low = max(swin.prunable * 100 * share / (saved + 0.05) for share, saved in printed) / 1e9
    high = min(swin.prunable * 100 * share / (saved - 0.05) for share, saved in printed) / 1e9
    said = f"Swin's counter says {swin.official / 1e9:.3f} G"
    if high - low < 1e-3:
        return f"no one total gives the paper's three figures, though {low:.3f} G is next to it; {said}"
    return f"the paper's three figures ask for a total of {low:.3f} to {high:.3f} G, and {said}"


def table_1(swin: Swin) -> tuple[list[Row], list[list[str]]]:
    """Parameters and FLOPs at the three sparsities, beside the paper's; the model ends with 55 % zeros."""
    rows, lines = [], []
    for share, (paper_params, paper_saved) in PAPER[swin.name].items():
        masks = swin.masks(share, "module")  # what goes at a sparsity goes at every larger one, too
        zero(swin.model, swin.groups, masks)
        found = count(swin.model, example_input(swin.model, 1))
        params, saved = found.nonzero_params / 1e6, found.macs - found.nominal_macs
        nominal, own = 100 * saved / swin.official, 100 * saved / found.macs
        weighted = 100 * (found.macs - found.nonzero_macs) / swin.official
        assert abs(weighted - swin.saved(masks)) < 1e-6
        off = abs(nominal - paper_saved)
        why = f"{off:.2f} off: {implied(swin)}" if off > 0.1 else ""
        what = f"{swin.short} at {share:.0%}"
        rows += [
            Row(f"{what}: parameters", params, "M", f"{paper_params} within 0.1", abs(params - paper_params) <= 0.1),
            Row(
                f"{what}: nominal FLOPs saved",
                nominal,
                "%",
                f"{paper_saved} within 0.1, or why",
                off <= 0.1 or bool(why),
            ),
            Row(f"{what}: mask-weighted FLOPs saved", weighted, "%"),
        ]
        figures = [
            f"{paper_params}",
            f"{params:.3f}",
            f"{paper_saved}",
            f"{nominal:.2f}",
            f"{own:.2f}",
            f"{weighted:.1f}",
        ]
        lines.append([swin.short, f"{share:.0%}", *figures, why])
    return rows, lines


def ablation(swin: Swin) -> tuple[list[Row], list[list[str]]]:
    """What each module loses, with a threshold of its own and with one for all."""
    rows, lines = [], []
    for share in SHARES:
        line = [swin.short, f"{share:.0%}"]
        for scope, name in (("module", "per module"), ("global", "one pool")):
            masks = swin.masks(share, scope)
            gone = {pool: lost(masks, swin.pool(pool)) for pool in POOLS}
            rows += [Row(f"{swin.short} at {share:.0%}, {name}: {pool} lost", gone[pool], "%") for pool in POOLS]
            line += [" / ".join(f"{gone[pool]:.1f}" for pool in POOLS), f"{swin.saved(masks):.1f}"]
        lines.append(line)
    return rows, lines


def thresholds(swin: Swin) -> tuple[list[Row], list[list[str]]]:
    """The largest score that goes, per module; at 45 % where the paper prints them."""
    rows, lines = [], []
    for share in sorted({*SHARES, *([PRINTED[1]] if swin.name == PRINTED[0] else [])}):
        masks, line = swin.masks(share, "module"), [swin.short, f"{share:.0%}"]
        for pool in POOLS:
            highest = max(float(swin.scores[n][~masks[n]].max()) for n in swin.pool(pool) if not bool(masks[n].all()))
            rows.append(Row(f"{swin.short} at {share:.0%}: threshold of {pool}", highest, "of the energy"))
            line.append(f"{highest:.3g}")
        lines.append([*line, PRINTED[2] if share == PRINTED[1] else ""])
    return rows, lines


def survival(swin: Swin) -> tuple[list[Row], list[list[str]]]:
    """What is left in every stage, per kind of layer, at the largest sparsity."""
    rows, lines, masks = [], [], swin.masks(SHARES[-1], "module")
    for stage in range(4):
        line = [swin.short, f"{stage + 1}"]
        for layer in (*LAYERS, ""):
            own = [n for n in masks if n.startswith(f"layers.{stage}.") and f".{layer}" in n]
            left = 100 - lost(masks, own)
            rows.append(Row(f"{swin.short}, stage {stage + 1}: {layer or 'all'} left", left, "%"))
            line.append(f"{left:.1f}")
        lines.append(line)
    return rows, lines


def timed(name: str, runs: int) -> tuple[list[Row], list[list[str]]]:
    """Scores and masks of a Swin beside one sort of the same weights, in turns."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    groups = find_groups(model, ["weight"])
    flat = torch.cat([model.get_parameter(group.name).detach().flatten() for group in groups])
    times: dict[str, list[float]] = {"scores": [], "masks": [], "torch.sort": []}
    for _ in range(runs):
        begun = time.perf_counter()
        scores = score(model, groups, "energy")
        scored = time.perf_counter()
        select(scores, SHARES[-1], "module", groups)
        chosen = time.perf_counter()
        del scores  # memory for the sort
        again = time.perf_counter()
        flat.sort()
        for what, span in zip(times, (scored - begun, chosen - scored, time.perf_counter() - again), strict=True):
            times[what].append(span)
    found = {what: statistics.median(seconds) for what, seconds in times.items()}
    both = statistics.median(map(sum, zip(times["scores"], times["masks"], strict=True)))
    ratio = both / found["torch.sort"]
    what = f"{len(flat) / 1e6:.1f} M weights of {name.split('_patch')[0]}"
    rows = [Row(f"{part}, {what}", seconds, "s", runs=runs) for part, seconds in found.items()]
    rows.append(Row(f"scores and masks by one torch.sort, {what}", ratio, "x", "3 or less", ratio <= 3, runs))
    return rows, [[what, *(f"{seconds:.2f}" for seconds in found.values()), f"{ratio:.2f}"]]


def main() -> None:
    """Measure everything, and write the tables."""
    quick = arguments(__doc__).quick
    names = list(PAPER)[:1] if quick else list(PAPER)
    torch.set_num_threads(1)
    rows, lines = timed(names[-1], 3)
    tables: dict[str, list[list[str]]] = {"table": [], "ablation": [], "thresholds": [], "survival": [], "time": lines}
    for name in names:
        swin = built(name)
        for part, measure in (
            ("ablation", ablation),
            ("thresholds", thresholds),
            ("survival", survival),
            ("table", table_1),
        ):
            found, lines = measure(swin)
            rows += found
            tables[part] += lines
        del swin  # before the next one, which is larger
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
                "M left: paper",
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
        "survival": ("What survives, by stage", ["model", "stage", *LAYERS, "all"]),
        "time": ("Time", ["", "scores", "masks", "torch.sort", "scores and masks by sort"]),
    }
    sections = [Section(heading, ABOUT[part], header, tables[part]) for part, (heading, header) in headers.items()]
    write_sections(ROOT / "docs/results/dimap.md", "DIMAP on Swin", __doc__ or "", sections)


if __name__ == "__main__":
    main()
