"""Multiples and bounds of single groups: counts by hand, slow reference versions, and invariants in every scope."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.support.model_zoo import tiny
from vitprune import BadInput, find_groups
from vitprune.groups import Group, all_units
from vitprune.pruning.constraints import UNCONSTRAINED, Constraint, nearest, removal_steps, select_in_steps
from vitprune.pruning.cost_target import make_cost_model
from vitprune.pruning.macs_scope import macs_per_unit, select_by_macs
from vitprune.pruning.select import candidate_pools, select

EIGHT = Constraint(multiple=8)


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def kept_counts(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.mark.parametrize(
    ("units", "sparsity", "stay"),
    [
        (64, 0.5, 32),
        (64, 0.3, 48),  # 45 asked for: 48 is nearer than 40
        (64, 0.35, 40),  # 42 asked for
        (24, 0.5, 16),  # 12 asked for, 8 and 16 equally near: the larger
        (64, 0.99, 8),  # one multiple remains
        (99, 0.01, 96),
        (99, 0.0, 99),  # nothing is removed
        (7, 0.9, 7),  # fewer units than the multiple: unchanged
        (8, 0.9, 8),
    ],
)
def test_a_single_group_keeps_the_nearest_multiple(units: int, sparsity: float, stay: int) -> None:
    scores = drawn({"a": (units,)}, 0)
    mask = select(scores, sparsity, "layer", keep_at_least=1, bounds={"a": EIGHT})["a"]
    assert int(mask.sum()) == stay
    assert set(mask.nonzero().flatten().tolist()) == set(scores["a"].argsort(descending=True)[:stay].tolist())


def test_removal_steps_of_a_pool_by_hand() -> None:
    worths = [[1.0, 2.0, 3.0, 4.0], [1.5, 1.6, 9.0, 9.5]]  # two sets of two units each: ranks 1 and 3, 1.5 and 9
    kept = [range(2, 5, 2)] * 2
    stay = {remove: select_in_steps(worths, kept, remove) for remove in range(5)}
    assert stay == {0: [4, 4], 1: [4, 4], 2: [2, 4], 3: [2, 4], 4: [2, 2]}
    assert removal_steps(7, range(2, 5, 2)) == [(0, 3), (3, 5)]
    assert [nearest(range(8, 33, 8), expected) for expected in (0, 11, 12, 13, 40)] == [8, 8, 16, 16, 32]


def slowly(scores: dict[str, Tensor], sparsity: float, multiple: int) -> dict[str, int]:
    """Reference: move the threshold along the ranking, round the counts above it, keep the nearest total."""
    order = sorted((float(value), name) for name, score in scores.items() for value in score)
    requested = len(order) - int(sparsity * len(order) + 0.5)
    counts, result = {name: len(score) for name, score in scores.items()}, []
    for step in range(len(order) + 1):
        if step:
            counts[order[step - 1][1]] -= 1
        rounded = {}
        for name, count in counts.items():
            units = len(scores[name])
            most = units // multiple * multiple
            near = multiple * int(-(-(count / multiple - 0.5) // 1))  # the nearest, of two the smaller
            rounded[name] = units if units < multiple else min(max(near, multiple), most)
        result.append(rounded)
    return min(result, key=lambda one: (abs(sum(one.values()) - requested), -sum(one.values())))


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_a_pool_is_rounded_to_multiples(multiple: int) -> None:
    bounds = dict.fromkeys("abcd", Constraint(multiple=multiple))
    for seed in range(20):
        scores = drawn({"a": (16,), "b": (24,), "c": (32,), "d": (3,)}, seed)
        sparsity = 0.05 + seed / 22
        masks = select(scores, sparsity, keep_at_least=1, bounds=bounds)
        assert kept_counts(masks) == slowly(scores, sparsity, multiple)


def groups_of(name: str, kind: str) -> list[Group]:
    return find_groups(tiny(name), [kind])


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("ffn", "layer"), ("ffn", "global"), ("ffn", "isomorphic"), ("attention", "head"), ("residual", "layer")],
)
@pytest.mark.parametrize("name", ["vit", "odd", "swin", "pvt"])
def test_multiples_are_kept_in_every_scope_and_masks_are_nested(name: str, kind: str, scope: str) -> None:
    groups = groups_of(name, kind)
    scores, bounds = drawn({g.name: g.shape for g in groups}, 0), {g.name: Constraint(multiple=4) for g in groups}
    before: dict[str, Tensor] | None = None
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        masks = select(scores, share, scope, groups, keep_at_least=1, bounds=bounds)
        for group in groups:
            rows = masks[group.name].view(-1, group.shape[-1]).sum(1).tolist()
            assert len(set(rows)) == 1
            assert rows[0] % 4 == 0 or rows[0] == group.shape[-1] < 4
            assert rows[0] >= min(4, group.shape[-1])
            if scope in ("layer", "head"):
                assert abs(rows[0] - (1 - share) * group.shape[-1]) <= 2.5 or rows[0] in (4, group.shape[-1] // 4 * 4)
        if before is not None:
            assert all(not bool((masks[n] & ~before[n]).any()) for n in masks)
            fresh = drawn({g.name: g.shape for g in groups}, int(share * 10))
            later = select(fresh, share, scope, groups, before, 1, bounds)
            assert all(not bool((later[n] & ~before[n]).any()) for n in later)
            assert kept_counts(later).keys() == kept_counts(masks).keys()
            if scope != "global" and scope != "isomorphic":
                assert kept_counts(later) == kept_counts(masks)
        before = masks


@pytest.mark.parametrize("kinds", [["ffn"], ["ffn", "attention"], ["head"]])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_scope_macs_removes_whole_multiples(name: str, kinds: list[str]) -> None:
    model = tiny(name)
    groups = find_groups(model, kinds)
    multiple = 2 if kinds == ["head"] else 4
    scores, costs = (
        drawn({g.name: g.shape for g in groups}, 0),
        macs_per_unit(groups, make_cost_model(model, groups, "macs")),
    )
    bounds = {g.name: Constraint(multiple=multiple) for g in groups}
    total = sum(costs[g.name] * g.shape[-1] for g in groups)
    largest, before = multiple * max(costs.values()), None
    for share in (0.0, 0.1, 0.3, 0.5, 0.7):
        masks = select_by_macs(scores, share, groups, costs, all_units(groups), bounds)
        spent = 0.0
        for group in groups:
            rows = masks[group.name].view(-1, group.shape[-1]).sum(1).tolist()
            assert len(set(rows)) == 1
            assert rows[0] % multiple == 0 or share == 0 or rows[0] == group.shape[-1] < multiple
            spent += costs[group.name] * (group.shape[-1] - rows[0])
        assert kinds == ["head"] or abs(spent - share * total) <= largest
        assert before is None or all(not bool((masks[n] & ~before[n]).any()) for n in masks)
        before = masks


def test_masks_under_group_bounds_are_optimal() -> None:
    bounds = {"a": Constraint(0.4, 0.6), "b": Constraint(0.0, 0.4)}
    for seed in range(30):
        scores = drawn({"a": (5,), "b": (5,), "c": (4,)}, seed)
        for requested in range(1, 13):
            counts = kept_counts(select(scores, requested / 14, bounds=bounds))
            ranges = [range(2, 4), range(3), range(5)]
            sorted_ = [score.sort().values.tolist() for score in scores.values()]
            able = list(itertools.product(*ranges))
            total = min({sum(removed) for removed in able}, key=lambda n: abs(n - requested))
            losses = {
                removed: sum(sum(values[:n]) for values, n in zip(sorted_, removed, strict=True))
                for removed in able
                if sum(removed) == total
            }
            best = min(losses, key=losses.__getitem__)
            assert [5 - counts["a"], 5 - counts["b"], 4 - counts["c"]] == list(best)


def test_infinite_scores_do_not_override_bounds() -> None:
    scores = {"a": torch.tensor([-torch.inf] * 4), "b": torch.tensor([torch.inf] * 4)}
    counts = kept_counts(select(scores, 0.5, bounds={"a": Constraint(0.0, 0.25), "b": Constraint(0.5, 1.0)}))
    assert counts == {"a": 3, "b": 1}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_fixed_sparsity_does_not_change_other_groups(scope: str) -> None:
    scores = drawn({"a": (20,), "b": (20,), "c": (20,)}, 0)
    counts = kept_counts(select(scores, 0.5, scope, bounds={"a": Constraint(0.1, 0.1), "b": Constraint(0.0, 0.0)}))
    assert counts == {"a": 18, "b": 20, "c": 10}
    (only,) = kept_counts(select({"a": scores["a"]}, 0.5, scope, bounds={"a": Constraint(0.0, 0.0)})).values()
    assert only == 20


@pytest.mark.parametrize(
    ("sparsity", "constraint", "kept"),
    [
        (0.5, Constraint(0.25, 0.25), [144, 96]),
        (0.5, Constraint(0.0, 0.0), [192, 96]),
        (0.5, Constraint(0.0, 0.125), [168, 24]),
        (0.0, Constraint(0.25, 1.0), [144, 192]),
    ],
)
def test_a_fixed_sparsity_is_not_part_of_the_macs_budget(
    sparsity: float, constraint: Constraint, kept: list[int]
) -> None:
    groups = groups_of("vit", "ffn")  # two of 192
    scores, costs = drawn({g.name: g.shape for g in groups}, 0), {g.name: 1.0 for g in groups}
    first, second = (group.name for group in groups)
    masks = select_by_macs(scores, sparsity, groups, costs, all_units(groups), {first: constraint})
    assert kept_counts(masks) == dict(zip((first, second), kept, strict=True))


def test_counts_of_a_pool_are_known_before_selection(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["attention"])  # (3, 16)
    shapes = {g.name: torch.zeros(g.shape) for g in groups}
    bounds = {groups[0].name: EIGHT, groups[1].name: Constraint(0.0, 0.0)}
    fields = candidate_pools(shapes, 0.3, "head", groups, None, 1, bounds)  # 11 of 16 asked for
    assert [contest.remove for contest in fields] == [8, 8, 8, 0, 0, 0]


def test_n_of_m_rules_can_only_ignore_layers() -> None:
    scores = drawn({"a": (4, 8), "b": (4, 8)}, 0)
    counts = kept_counts(select(scores, 0.5, "2:4", bounds={"a": Constraint(0.0, 0.0)}))
    assert counts == {"a": 32, "b": 16}
    with pytest.raises(BadInput, match=r"^a: scope '2:4' removes 0.5 of every layer; a rule can only ignore one$"):
        select(scores, 0.5, "2:4", bounds={"a": Constraint(0.1, 0.9)})


def test_unbounded_constraints_change_nothing() -> None:
    scores = drawn({"a": (16,), "b": (24,)}, 1)
    for scope in ("layer", "global"):
        free = select(scores, 0.37, scope, keep_at_least=1, bounds=dict.fromkeys("ab", UNCONSTRAINED))
        assert all(torch.equal(free[n], mask) for n, mask in select(scores, 0.37, scope, keep_at_least=1).items())
