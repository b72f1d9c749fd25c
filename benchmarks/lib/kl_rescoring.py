"""Fisher and hybrid scoring of DeiT-Tiny against literal removal: parts of kl_scoring.py.

Literal takes the time of a few candidates of every group, extrapolated to all units. The pools of the hybrid are random
samples of units of some blocks, whose exact scores are all measured. The race to half of each pool takes its values
from them; its time is the share that it asks for, times that of the exact scorer for all units of the component, plus
that of Fisher twice (for the scores, and as a control).
"""

import time
from collections.abc import Mapping
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks.lib.results import Row
from vitprune import find_groups
from vitprune.criteria import ScoreConfig
from vitprune.criteria.kl.exact import kl_divergences
from vitprune.criteria.kl.fisher import fisher_kl_per_image
from vitprune.groups import Group
from vitprune.pruning.rescoring import adaptive_rescoring
from vitprune.pruning.select import candidate_pools, select

KINDS = ("ffn", "attention", "residual")
SAMPLED = (
    "blocks.2.mlp",
    "blocks.6.mlp",
    "blocks.10.mlp",
    "blocks.1.attn",
    "blocks.5.attn",
    "blocks.9.attn",
    "residual",
)
CHUNK = 16


def race_rows(
    model: nn.Module, images: Tensor, literal: Mapping[str, float], exact: Mapping[str, float], pool: int
) -> list[Row]:
    """Rows of Fisher and of the hybrid; `literal` and `exact` are milliseconds per candidate and image, by kind."""
    groups = {group.name: group for kind in KINDS for group in find_groups(model, [kind])}
    start = time.perf_counter()
    control = fisher_images(model, list(groups.values()), images)
    fisher = 1e3 * (time.perf_counter() - start) / len(images)
    units = {kind: sum(group.units for group in groups.values() if group.kind == kind) for kind in KINDS}
    whole = sum(literal[kind] * number for kind, number in units.items())
    rows = [Row("Fisher, all units of an image", fisher, "ms", runs=1)]
    rows.append(Row("literal / Fisher, all units", whole / fisher, "x", ">= 1000", whole / fisher >= 1000))
    chosen = {
        name: torch.randperm(groups[name].units, generator=torch.Generator().manual_seed(0))[:pool].sort().values
        for name in SAMPLED
    }
    truth = kl_divergences(model, [groups[name] for name in SAMPLED], chosen, images, ScoreConfig())
    some = {name: control[name][chosen[name]] for name in SAMPLED}
    settled, shares = raced(groups, truth, some)
    cost = 2 * fisher + sum(shares[kind] * units[kind] * exact[kind] for kind in KINDS)
    rows.append(Row(f"literal / hybrid, all units, {len(images)} images", whole / cost, "x"))
    for kind in KINDS:
        own = [name for name in SAMPLED if groups[name].kind == kind]
        for what, scores in (("Fisher", {n: some[n].sum(1) for n in own}), ("hybrid", {n: settled[n] for n in own})):
            right = mean(overlap(scores[n], truth[n].sum(1)) for n in own)
            promise = (">= 0.98", right >= 0.98) if what == "hybrid" else (None, None)
            rows.append(Row(f"{what}, exact half found, {kind}", right, "of the units", *promise))
            rows.append(Row(f"{what}, Spearman, {kind}", mean(spearman(scores[n], truth[n].sum(1)) for n in own), ""))
        rows.append(Row(f"hybrid, exact scores measured, {kind}", shares[kind], "of all"))
    return rows


def fisher_images(model: nn.Module, groups: list[Group], images: Tensor) -> dict[str, Tensor]:
    """Fisher scores image by image, (units, images)."""
    starts = range(0, len(images), CHUNK)
    found = [
        fisher_kl_per_image(
            model, groups, images[n : n + CHUNK], ScoreConfig(), range(n, n + len(images[n : n + CHUNK]))
        )
        for n in starts
    ]
    return {group.name: torch.cat([part[group.name] for part in found], dim=1) for group in groups}


def raced(
    groups: Mapping[str, Group], truth: Mapping[str, Tensor], control: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Settled scores of the pools, and the share of its exact scores that the race asked for, by kind."""
    scores = {name: value.sum(1) for name, value in control.items()}
    asked = dict.fromkeys(truth, 0)

    def exact(wanted: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
        for name, units in wanted.items():
            asked[name] += len(units) * len(places)
        return {name: truth[name][units][:, places] for name, units in wanted.items()}

    stacked = torch.cat(list(control.values()))
    order = torch.randperm(stacked.shape[1], generator=torch.Generator().manual_seed(0))
    kinds = {name: groups[name].kind for name in truth}
    fields = [contest for name in truth for contest in candidate_pools({name: scores[name]}, 0.5)]
    settled = adaptive_rescoring(scores, kinds, fields, exact, lambda places: stacked[:, places], order, ScoreConfig())
    shares = {kind: mean(asked[name] / truth[name].numel() for name in truth if kinds[name] == kind) for kind in KINDS}
    return settled.scores, shares


def overlap(found: Tensor, right: Tensor) -> float:
    """Share of the better half by the one that is in the better half by the other."""
    one, other = (select({"": scores}, 0.5)[""] for scores in (found, right))
    return float((one & other).sum() / other.sum())


def spearman(one: Tensor, other: Tensor) -> float:
    """Correlation of ranks."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])
