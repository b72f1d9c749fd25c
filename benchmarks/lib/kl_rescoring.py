"""Fisher scoring and adaptive rescoring of DeiT-Tiny against literal removal: parts of speed/kl_scoring.py.

The time of literal removal is measured on a few units of every group and extrapolated to all units. Adaptive rescoring
runs on random samples of units of some blocks, whose exact scores are all measured beforehand, at 50 % sparsity. Its
time is the fraction of exact scores that it requests, times the time of the exact scorer for all units of the kind,
plus twice the time of Fisher scoring (for the scores, and as a control).
"""

import time
from collections.abc import Mapping
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks.lib.results import Row
from vitprune import find_groups
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.kl.exact import kl_divergences
from vitprune.criteria.kl.fisher import fisher_kl_per_image
from vitprune.groups import Group
from vitprune.pruning.rescoring import adaptive_rescoring
from vitprune.pruning.select import candidate_pools, select

KINDS = ("ffn", "attention", "residual")
SAMPLED = (*(f"blocks.{n}.mlp" for n in (2, 6, 10)), *(f"blocks.{n}.attn" for n in (1, 5, 9)), "residual")
CHUNK = 16


def rescoring_rows(
    model: nn.Module, images: Tensor, literal: Mapping[str, float], exact: Mapping[str, float], pool: int
) -> list[Row]:
    """Measure both scorers; `literal` and `exact` are milliseconds per unit and image, by kind."""
    groups = {group.name: group for kind in KINDS for group in find_groups(model, [kind])}
    start = time.perf_counter()
    control = fisher_images(model, list(groups.values()), images)
    fisher = 1e3 * (time.perf_counter() - start) / len(images)
    units = {kind: sum(group.units for group in groups.values() if group.kind == kind) for kind in KINDS}
    literal_total = sum(literal[kind] * number for kind, number in units.items())
    ratio = literal_total / fisher
    rows = [Row("Fisher, all units of an image", fisher, "ms", runs=1)]
    rows.append(Row("literal / Fisher, all units", ratio, "x", ">= 1000", ratio >= 1000))
    chosen = {
        name: torch.randperm(groups[name].units, generator=torch.Generator().manual_seed(0))[:pool].sort().values
        for name in SAMPLED
    }
    truth = kl_divergences(model, [groups[name] for name in SAMPLED], chosen, images, DEFAULT_CONTEXT)
    some = {name: control[name][chosen[name]] for name in SAMPLED}
    result, shares = rescored(groups, truth, some)
    cost = 2 * fisher + sum(shares[kind] * units[kind] * exact[kind] for kind in KINDS)
    rows.append(Row(f"literal / hybrid, all units, {len(images)} images", literal_total / cost, "x"))
    for kind in KINDS:
        names = [name for name in SAMPLED if groups[name].kind == kind]
        for what, scores in (("Fisher", {n: some[n].sum(1) for n in names}), ("hybrid", {n: result[n] for n in names})):
            right = mean(overlap(scores[n], truth[n].sum(1)) for n in names)
            promise = (">= 0.98", right >= 0.98) if what == "hybrid" else (None, None)
            rows.append(Row(f"{what}, exact half found, {kind}", right, "of the units", *promise))
            rows.append(Row(f"{what}, Spearman, {kind}", mean(spearman(scores[n], truth[n].sum(1)) for n in names), ""))
        rows.append(Row(f"hybrid, exact scores measured, {kind}", shares[kind], "of all"))
    return rows


def fisher_images(model: nn.Module, groups: list[Group], images: Tensor) -> dict[str, Tensor]:
    """Return the Fisher scores of every image, (units, images) per group."""
    starts = range(0, len(images), CHUNK)
    parts = [
        fisher_kl_per_image(model, groups, chunk, DEFAULT_CONTEXT, range(start, start + len(chunk)))
        for start, chunk in zip(starts, images.split(CHUNK), strict=True)
    ]
    return {group.name: torch.cat([part[group.name] for part in parts], dim=1) for group in groups}


def rescored(
    groups: Mapping[str, Group], truth: Mapping[str, Tensor], control: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the rescored importance of the pools, and the fraction of exact scores requested, by kind."""
    scores = {name: value.sum(1) for name, value in control.items()}
    requested = dict.fromkeys(truth, 0)

    def exact(requests: Mapping[str, Tensor], columns: Tensor) -> dict[str, Tensor]:
        for name, units in requests.items():
            requested[name] += len(units) * len(columns)
        return {name: truth[name][units][:, columns] for name, units in requests.items()}

    stacked = torch.cat(list(control.values()))
    order = torch.randperm(stacked.shape[1], generator=torch.Generator().manual_seed(0))
    kinds = {name: groups[name].kind for name in truth}
    pools = [pool for name in truth for pool in candidate_pools({name: scores[name]}, 0.5)]
    result = adaptive_rescoring(
        scores, kinds, pools, exact, lambda columns: stacked[:, columns], order, DEFAULT_CONTEXT
    )
    shares = {
        kind: mean(requested[name] / truth[name].numel() for name in truth if kinds[name] == kind) for kind in KINDS
    }
    return result.scores, shares


def overlap(scores: Tensor, reference: Tensor) -> float:
    """Return the fraction of the upper half by one score that is in the upper half by the other."""
    one, other = (select({"": values}, 0.5)[""] for values in (scores, reference))
    return float((one & other).sum() / other.sum())


def spearman(one: Tensor, other: Tensor) -> float:
    """Return Spearman's rank correlation."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])
