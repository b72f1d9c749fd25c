"""Exact counts for any scores, stable order, and candidate pools of every scope."""

import pytest
import torch

from tests.support.model_zoo import tiny
from tests.support.reference_kl import naive_masks
from vitprune import BadInput, find_groups
from vitprune.pruning.schedule import sparsities
from vitprune.pruning.select import select, sparsity_of

BARE = {"a": (4, 6), "b": (10,), "c": (3, 8)}  # 24 + 10 + 24 = 58 units


def draw(shapes: dict[str, tuple[int, ...]], seed: int, levels: int = 0) -> dict[str, torch.Tensor]:
    """Return random scores; with `levels`, so few distinct values that most are ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return {n: torch.randint(levels, s, generator=generator).double() for n, s in shapes.items()}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def removed(masks: dict[str, torch.Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_global_and_layer_equal_a_naive_sort(levels: int) -> None:
    for seed in range(40):
        scores = draw(BARE, seed, levels)
        share = seed / 40
        assert same(select(scores, share), naive_masks(scores, int(58 * share + 0.5)))
        alone = [naive_masks({n: s}, int(s.numel() * share + 0.5)) for n, s in scores.items()]
        assert same(select(scores, share, "layer"), alone[0] | alone[1] | alone[2])


def test_ties_are_broken_by_position() -> None:
    masks = select({"a": torch.ones(2, 2), "b": torch.ones(3)}, 0.7)  # round(0.7 * 7) = 5 of 7 are removed
    assert masks["a"].tolist() == [[False, False], [False, False]]
    assert masks["b"].tolist() == [False, True, True]


def test_the_lowest_score_is_removed_by_hand() -> None:
    masks = select({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.5])}, 0.5)
    assert masks["a"].tolist() == [True, False]
    assert masks["b"].tolist() == [True, False]
    masks = select({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([0.6, 0.5])}, 0.5)
    assert masks["a"].tolist() == [True, True]
    assert masks["b"].tolist() == [False, False]


@pytest.mark.parametrize(
    ("units", "share", "count"), [(100, 0.29, 29), (7, 0.5, 4), (3, 0.1, 0), (10, 0.15, 2), (1000, 0.999, 999)]
)
def test_counts_round_half_up(units: int, share: float, count: int) -> None:
    assert removed(select({"a": torch.zeros(units)}, share)) == count


@pytest.mark.parametrize("scope", ["global", "layer", "module", "isomorphic", "head", "2:4"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_counts_are_exact_when_all_scores_are_equal(name: str, scope: str) -> None:
    kind = "attention" if scope == "head" else "weight"
    groups = find_groups(tiny(name), [kind])
    masks = select({g.name: torch.ones(g.shape) for g in groups}, 0.5, scope, groups)
    assert removed(masks) * 2 == sum(g.units for g in groups)
    if scope == "head":
        assert all(mask.sum(1).tolist() == [mask.shape[1] // 2] * len(mask) for mask in masks.values())


def test_scopes_select_different_masks() -> None:
    groups = find_groups(tiny("swin"), ["weight"])
    scale = {"attn.qkv.weight": 1.0, "attn.proj.weight": 3.0, "mlp.fc1.weight": 5.0, "mlp.fc2.weight": 7.0}
    scores = draw({g.name: g.shape for g in groups}, 0)
    for group in groups:
        part = group.name.split(".", 4)[-1]
        scores[group.name] = scores[group.name].abs() * scale[part] * (1 + int(group.name.split(".")[1]))
    result = {scope: select(scores, 0.3, scope, groups) for scope in ("global", "layer", "module", "isomorphic")}
    removed = {scope: {n: 1 - float(m.double().mean()) for n, m in masks.items()} for scope, masks in result.items()}
    assert all(share == pytest.approx(0.3, abs=1e-3) for share in removed["layer"].values())
    for members, scope in (
        (lambda g: g.layer_type, "module"),
        (lambda g: (g.layer_type, g.name.split(".")[-2]), "isomorphic"),
    ):
        for pool in {members(g) for g in groups}:
            selected = [g for g in groups if members(g) == pool]
            units = sum(g.units for g in selected)
            assert sum(int((~result[scope][g.name]).sum()) for g in selected) == int(0.3 * units + 0.5)
    assert max(removed["global"].values()) > 0.6
    flat = [torch.cat([m.flatten() for m in masks.values()]) for masks in result.values()]
    assert all(not torch.equal(flat[i], flat[j]) for i in range(4) for j in range(i))


def test_isomorphic_pools_contain_the_same_layer_of_every_block() -> None:
    groups = find_groups(tiny("vit"), ["weight", "ffn"])
    low = {g.name: torch.full(g.shape, 1.0 if "blocks.0" in g.name else 2.0) for g in groups}
    masks = select(low, 0.5, "isomorphic", groups)
    assert all(bool(mask.any()) == ("blocks.1" in name) for name, mask in masks.items())
    assert all(bool(mask.all()) == ("blocks.1" in name) for name, mask in masks.items())


@pytest.mark.parametrize("scope", ["global", "layer", "module", "isomorphic"])
def test_removed_units_remain_removed_and_are_counted(scope: str) -> None:
    groups = find_groups(tiny("vit"), ["weight"])
    previous = None
    for step, share in enumerate(sparsities(0.8, 4)):
        scores = draw(
            {g.name: g.shape for g in groups}, step
        )  # with new scores alone, removed units would be kept again
        masks = select(scores, share, scope, groups, previous)
        pools = {"global": [groups], "layer": [[g] for g in groups]}.get(scope)
        for pool in pools or [[g for g in groups if g.layer_type == p] for p in ("qkv", "proj", "mlp")]:
            if scope != "isomorphic":
                units = sum(g.units for g in pool)
                assert sum(int((~masks[g.name]).sum()) for g in pool) == int(share * units + 0.5)
        if previous is not None:
            assert all(not bool((masks[n] & ~previous[n]).any()) for n in masks)
        previous = masks


def test_a_lower_sparsity_later_restores_nothing() -> None:
    first = select(draw(BARE, 0), 0.5)
    assert same(select(draw(BARE, 1), 0.2, previous=first), first)


def test_keep_at_least_protects_the_best_of_every_group() -> None:
    scores = {"low": torch.tensor([1.0, 3.0, 2.0]), "high": torch.tensor([9.0, 8.0, 7.0])}
    masks = select(scores, 0.5, keep_at_least=1)
    assert masks["low"].tolist() == [False, True, False]
    assert masks["high"].tolist() == [True, True, False]
    assert removed(masks) == 3


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_keep_at_least_has_priority_over_the_count(scope: str) -> None:
    masks = select({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([5.0, 4.0])}, 0.9, scope, keep_at_least=1)
    assert masks["a"].tolist() == [False, True]
    assert masks["b"].tolist() == [True, False]


def test_keep_at_least_applies_to_every_head() -> None:
    scores = torch.tensor([[1.0, 2.0], [4.0, 3.0], [5.0, 6.0]])
    assert select({"a": scores}, 0.9, "head", keep_at_least=1)["a"].tolist() == [
        [False, True],
        [True, False],
        [False, True],
    ]


def test_scope_head_ranks_every_row_separately() -> None:
    masks = select({"a": torch.tensor([[1.0, 2.0, 3.0, 4.0], [40.0, 30.0, 20.0, 10.0]])}, 0.5, "head")
    assert masks["a"].tolist() == [[False, False, True, True], [True, True, False, False]]
    with pytest.raises(BadInput, match=r"^b: scope 'head' needs scores of shape \(heads, channels\)"):
        select({"b": torch.ones(4)}, 0.5, "head")


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_n_of_m_is_valid_and_keeps_the_best(n: int, m: int) -> None:
    scores = draw({"w": (6, 16), "t": (8, 24)}, 0) | {"ties": torch.ones(4, 8)}
    masks = select(scores, 1 - n / m, f"{n}:{m}")
    for name, mask in masks.items():
        runs, values = mask.reshape(-1, m), scores[name].reshape(-1, m)
        assert runs.sum(1).tolist() == [n] * len(runs)
        for run, value in zip(runs, values, strict=True):
            assert sorted(value[run].tolist()) == sorted(value.tolist())[m - n :]
    assert masks["ties"].reshape(-1, m)[0].tolist() == [False] * (m - n) + [True] * n


def test_n_of_m_by_hand() -> None:
    scores = {"w": torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.1, 0.2, 0.4, 0.3]])}
    assert select(scores, 0.5, "2:4")["w"].tolist() == [[True, False, True, False, False, False, True, True]]
    assert select(scores, 0.75, "1:4")["w"].tolist() == [[True, False, False, False, False, False, True, False]]


@pytest.mark.parametrize(
    ("scope", "sparsity", "why"),
    [
        ("4:4", 0.0, "N must be between 1 and M - 1"),
        ("0:4", 0.5, "N must be between 1 and M - 1"),
        ("1:0", 0.5, "N must be between 1 and M - 1"),
        ("2:4", 0.3, "removes 0.5, but sparsity is 0.3; set it to 0.5"),
        ("2:3", 1 / 3, "w: rows of 10 weights cannot be divided into runs of 3"),
    ],
)
def test_invalid_n_of_m_is_refused(scope: str, sparsity: float, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        select({"w": torch.ones(2, 10)}, sparsity, scope)


def test_sparsity_of_a_scope() -> None:
    assert [sparsity_of(scope) for scope in ("2:4", "1:4", "4:8", "global", "2:4 ")] == [0.5, 0.75, 0.5, None, None]
    with pytest.raises(BadInput, match="N must be between 1 and M - 1"):
        sparsity_of("1:0")


def test_nan_is_named_and_infinity_is_not_an_error() -> None:
    scores = {"a": torch.ones(3), "blocks.0.mlp": torch.tensor([1.0, float("nan"), float("nan")])}
    with pytest.raises(BadInput, match=r"^blocks.0.mlp: 2 scores are NaN"):
        select(scores, 0.5)
    assert select({"a": torch.tensor([float("inf"), 0.0, -1.0, 5.0])}, 0.5)["a"].tolist() == [True, False, False, True]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_0_to_1_is_refused(sparsity: float) -> None:
    with pytest.raises(BadInput, match="must be at least 0 and below 1"):
        select({"a": torch.ones(4)}, sparsity)


def test_unknown_scopes_and_missing_groups_are_refused() -> None:
    with pytest.raises(BadInput, match=r"^scope 'everything': unknown; use one of layer, global"):
        select({"a": torch.ones(4)}, 0.5, "everything")
    with pytest.raises(BadInput, match=r"^scope 'module': needs groups=, which lacks a$"):
        select({"a": torch.ones(4)}, 0.5, "module")


def test_n_of_m_needs_scores_of_rows() -> None:
    with pytest.raises(
        BadInput, match=r"^a: scope '2:4' needs scores of weights .*, these are \[8\]; exclude it by a rule"
    ):
        select({"a": torch.rand(8)}, 0.5, "2:4")


@pytest.mark.parametrize("scope", ["layer", "head", "2:4"])
@pytest.mark.parametrize(
    ("previous", "found"),
    [
        ({}, "has no mask"),
        ({"a": torch.ones(2, 8)}, r"its mask is torch.float32 \[2, 8\]"),
        ({"a": torch.ones(2, 7, dtype=torch.bool)}, r"its mask is torch.bool \[2, 7\]"),
    ],
)
def test_previous_masks_that_do_not_fit_are_refused(scope: str, previous: dict, found: str) -> None:
    with pytest.raises(BadInput, match=rf"^previous: a: {found}; give torch.bool \[2, 8\]$"):
        select({"a": torch.rand(2, 8)}, 0.5, scope, previous=previous)


def test_scores_are_not_changed() -> None:
    scores = draw(BARE, 0)
    before = {name: score.clone() for name, score in scores.items()}
    select(scores, 0.5, previous=select(scores, 0.3), keep_at_least=2)
    assert all(torch.equal(scores[name], before[name]) for name in scores)


def test_integer_and_half_precision_scores_are_ranked_exactly() -> None:
    for dtype in (torch.int64, torch.float16, torch.bfloat16):
        assert select({"a": torch.tensor([3, 1, 2, 0]).to(dtype)}, 0.5)["a"].tolist() == [True, False, True, False]


def test_schedules_by_hand() -> None:
    assert sparsities(0.8, 4, "linear") == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert sparsities(0.8, 4, "cubic") == pytest.approx([0.4625, 0.7, 0.7875, 0.8])  # 0.8 * (1 - (3/4)^3) = 0.4625
    assert sparsities(0.8, 1) == [0.8]
    assert sparsities(0.55, 7)[-1] == 0.55
    with pytest.raises(BadInput, match=r"^schedule 'sudden': unknown; use one of linear, cubic$"):
        sparsities(0.5, 3, "sudden")
    with pytest.raises(BadInput, match=r"^cycles 0"):
        sparsities(0.5, 0)
