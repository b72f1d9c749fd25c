"""The pruning loop: gradual runs, masks in dense coordinates, updates, and prune()."""

import copy
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import batches, images, predict, same_state, state, tiny
from tests.support.plans import plan_for
from tests.support.reference_kl import literal_vit
from vitprune import METHODS, BadInput, find_groups, prune, score, shrink, zero
from vitprune.config.train_config import TrainConfig
from vitprune.criteria import Importance, ScoringContext
from vitprune.criteria import magnitude as by_weights
from vitprune.evaluation.cost import count
from vitprune.pruning.cycle_masks import groups_for
from vitprune.pruning.methods import Method
from vitprune.pruning.prune_cycles import Cycle, prune_cycles
from vitprune.pruning.select import select
from vitprune.training.distillation import classification
from vitprune.training.loop import FrozenZeros, train

CLOSE = {"rtol": 0, "atol": 1e-11}
SINGLE = ["random", "magnitude", "uniform", "lamp", "dimap", "taylor"]


def run(model: nn.Module, method: str, sparsity: object, data: object = (), **settings: object) -> list[Cycle]:
    return list(prune_cycles(model, plan_for(method, sparsity, **settings), data))


def removed(masks: dict[str, torch.Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def grow(cycles: list[Cycle]) -> bool:
    pairs = pairwise(cycles)
    return all(not bool((b.masks[n] & ~a.masks[n]).any()) for a, b in pairs for n in b.masks)


@pytest.mark.parametrize("method", SINGLE)
def test_gradual_weights_reach_the_exact_count_and_remain_zero_in_training(vit: nn.Module, method: str) -> None:
    data, counts, cycles = batches(vit, 3, 8), [], []
    recipe = TrainConfig(epochs=1, lr=0.01, weight_decay=0.1)
    for cycle in prune_cycles(vit, plan_for(method, 0.6, cycles=3), data):
        task = classification(vit)
        train(task, lambda epoch: data, len(data), recipe, 0, lambda row: None, FrozenZeros(cycle.zeroed, cycle.masks))
        cycles.append(cycle)
        counts.append(removed(cycle.masks))
        for group in cycle.groups:
            assert torch.equal(vit.get_parameter(group.name) != 0, cycle.masks[group.name])
    units = sum(group.units for group in cycles[0].groups)
    pools = {"uniform": [g.units for g in cycles[0].groups], "dimap": [13824, 4608, 36864]}.get(method, [units])
    assert sum(pools) == units == 55296
    shares = [0.6 * (1 - (1 - k / 3) ** 3) for k in (1, 2, 3)]
    assert counts == [sum(int(share * pool + 0.5) for pool in pools) for share in shares]
    assert grow(cycles)
    assert [cycle.number for cycle in cycles] == [1, 2, 3]


@pytest.mark.parametrize(
    "sparsity",
    [
        {"ffn": 0.6},
        {"attention": 0.5},
        {"residual": 0.4},
        {"head": 0.34},
        {"ffn": 0.6, "attention": 0.5, "residual": 0.3},
    ],
)
def test_shrinking_in_steps_equals_shrinking_once_by_the_last_masks(vit: nn.Module, sparsity: dict[str, float]) -> None:
    once = tiny("vit")
    cycles = run(vit, "channel-taylor", sparsity, batches(vit), cycles=3)
    groups = find_groups(once, list(sparsity))
    masks = cycles[-1].masks
    assert {n: m.shape for n, m in masks.items()} == {g.name: torch.Size(g.shape) for g in groups}
    shrink(once, groups, masks)
    now, expected = vit.state_dict(), once.state_dict()
    assert now.keys() == expected.keys()
    for name in now:
        torch.testing.assert_close(now[name], expected[name], **CLOSE)
    x = images(vit)
    torch.testing.assert_close(predict(vit, x), predict(once, x), **CLOSE)
    if "head" not in sparsity:
        torch.testing.assert_close(predict(vit, x), literal_vit(tiny("vit"), x, masks), **CLOSE)
    assert grow(cycles)


def test_shrinking_merged_heads_in_steps() -> None:
    model = tiny("vit")
    x = images(model)
    cycles = run(model, "channel-taylor", {"attention": 0.7}, batches(model), cycles=3, merge_heads_to=1)
    masks = cycles[-1].masks
    assert {n: tuple(m.shape) for n, m in masks.items()} == {"blocks.0.attn": (1, 48), "blocks.1.attn": (1, 48)}
    assert [(b.attn.num_heads, b.attn.head_dim) for b in model.blocks] == [(1, 14), (1, 14)]
    torch.testing.assert_close(predict(model, x), literal_vit(tiny("vit"), x, masks), **CLOSE)


def test_shrinking_swin_in_steps(swin: nn.Module) -> None:
    once = tiny("swin")
    cycles = run(swin, "channel-taylor", {"attention": 0.5, "ffn": 0.5}, batches(swin), cycles=3, scope="global")
    shrink(once, find_groups(once, ["attention", "ffn"]), cycles[-1].masks)
    x = images(swin)
    torch.testing.assert_close(predict(swin, x), predict(once, x), **CLOSE)


@pytest.mark.parametrize("kind", ["ffn", "head"])
def test_gradual_equals_one_shot_if_scores_do_not_change(kind: str) -> None:
    gradual, at_once = tiny("vit"), tiny("vit")
    last = run(gradual, "channel-magnitude", {kind: 0.6}, cycles=3, schedule="linear")[-1]
    first = run(at_once, "channel-magnitude", {kind: 0.6})[0]
    assert all(torch.equal(last.masks[name], first.masks[name]) for name in first.masks)
    assert same_state(gradual, state(at_once))


@pytest.mark.parametrize("method", ["magnitude", "lamp", "uniform", "dimap"])
def test_gradual_weights_without_training_equal_one_shot(method: str) -> None:
    # the removed units are the smallest of their layer, so the scores of the others do not change
    gradual, at_once = tiny("vit"), tiny("vit")
    last, first = run(gradual, method, 0.6, cycles=3)[-1], run(at_once, method, 0.6)[0]
    assert all(torch.equal(last.masks[name], first.masks[name]) for name in first.masks)


def test_scores_and_groups_are_in_the_coordinates_of_the_dense_model(vit: nn.Module) -> None:
    dense = tiny("vit")
    expected = score(dense, find_groups(dense, ["ffn"]), "magnitude")
    for cycle in run(vit, "channel-magnitude", {"ffn": 0.6}, cycles=3):
        assert [g.shape for g in cycle.groups] == [(192,), (192,)]
        for name, result in cycle.scores.items():
            scored = result != 0
            torch.testing.assert_close(result[scored], expected[name][scored])
            assert not bool((cycle.masks[name] & ~scored).any())
    assert int((~scored).sum()) == 111  # what the first two of three cubic cycles removed: 0.6 * (1 - 1/27) of 192
    assert cycle.zeroed == []


def test_given_masks_are_used_in_the_first_cycle(vit: nn.Module) -> None:
    plan = plan_for("magnitude", 0.5, cycles=2)
    groups = groups_for(vit, plan)
    first = select(score(vit, groups, "random"), plan.targets()[0]["weight"])
    cycles = list(prune_cycles(vit, plan, (), first))
    assert cycles[0].scores == {}
    assert all(torch.equal(cycles[0].masks[name], first[name]) for name in first)
    assert grow(cycles)
    assert removed(cycles[1].masks) == 55296 // 2
    assert [group.name for group in cycles[1].zeroed] == [group.name for group in groups]


def test_an_update_is_applied_before_shrinking(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update doubles the output of the remaining units and sets the bias to their number."""
    seen = []

    def doubling(model: nn.Module, groups, data, setting: ScoringContext) -> Importance:
        def update(masks):
            seen.append({name: tuple(mask.shape) for name, mask in masks.items()})
            doubled = {f"{name}.fc2.weight": 2 * model.get_parameter(f"{name}.fc2.weight") for name in masks}
            remaining = {
                n: torch.full_like(model.get_parameter(f"{n}.fc2.bias"), float(m.sum())) for n, m in masks.items()
            }
            return doubled | {f"{name}.fc2.bias": value for name, value in remaining.items()}

        return Importance(by_weights.magnitude(model, groups, data, setting).scores, update)

    monkeypatch.setitem(METHODS, "doubling", Method(doubling, {"ffn": "layer"}, ("ffn",), False, "for this test"))
    dense = tiny("vit")
    cycles = run(vit, "doubling", 0.75, cycles=2, schedule="linear")
    assert seen == [{"blocks.0.mlp": (192,), "blocks.1.mlp": (192,)}, {"blocks.0.mlp": (120,), "blocks.1.mlp": (120,)}]
    for number, block in enumerate(vit.blocks):
        kept = cycles[-1].masks[f"blocks.{number}.mlp"]
        assert torch.equal(block.mlp.fc2.weight, 4 * dense.blocks[number].mlp.fc2.weight[:, kept])
        assert torch.equal(block.mlp.fc2.bias, torch.full_like(block.mlp.fc2.bias, 48.0))
        assert torch.equal(block.mlp.fc1.weight, dense.blocks[number].mlp.fc1.weight[kept])


def test_zeros_are_applied_after_an_update_of_weights(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(model: nn.Module, groups, data, setting: ScoringContext) -> Importance:
        scores = by_weights.magnitude(model, groups, data, setting).scores
        return Importance(scores, lambda masks: {name: torch.ones(mask.shape) for name, mask in masks.items()})

    monkeypatch.setitem(METHODS, "ones", Method(ones, {"weight": "global"}, ("weight",), False, "for this test"))
    cycle = run(vit, "ones", 0.5)[0]
    for name, mask in cycle.masks.items():
        assert torch.equal(vit.get_parameter(name), mask.double())


def test_a_method_in_place_of_a_criterion_is_refused(vit: nn.Module) -> None:
    with pytest.raises(
        BadInput, match=r"^criterion 'channel-taylor': is a method, not a criterion; use one of random, "
    ):
        score(vit, find_groups(vit, ["ffn"]), "channel-taylor", batches(vit))


def test_units_that_no_linear_layer_reads_are_refused_with_a_remedy() -> None:
    model = timm.create_model("resnet10t", num_classes=7).eval()
    with pytest.raises(BadInput, match=r"^layer1.0: 0 Linear layers read its units, the method needs one; choose anot"):
        prune(model, "unit-obs", kinds=["ffn"], sparsity=0.5, calibration=[torch.randn(2, 3, 64, 64)])


def test_every_method_prunes_a_copy_of_a_vit() -> None:
    model = tiny("thin")
    before, data, x = state(model), batches(model), images(model)
    for method, row in METHODS.items():
        pruned = prune(
            model, method, sparsity=None if method == "n:m" else 0.5, calibration=data, example_input=x
        ).model
        assert same_state(model, before)
        if row.kinds == ("block",):
            assert len(pruned.blocks) == 1
            continue
        if row.kinds == ("weight",):
            weights = [pruned.get_parameter(g.name) for g in find_groups(pruned, ["weight"])]
            assert sum(int((w == 0).sum()) for w in weights) * 2 == sum(w.numel() for w in weights)
        elif {row.scopes[kind] for kind in row.kinds} == {"macs"}:
            rest = 16 * 3 * 8 * 8 * 48 + 48 * 7  # MACs of the patch embedding and the head, which are not pruned
            assert 0.5 < (count(pruned, x).macs - rest) / (count(model, x).macs - rest) < 0.53
        else:
            width = 8 if "attention" in row.kinds else 16
            assert [(b.attn.head_dim, b.mlp.fc1.out_features) for b in pruned.blocks] == [(width, 12)] * 2
        assert predict(pruned, x).shape == (3, 7)


def test_prune_takes_a_sparsity_per_kind(vit: nn.Module) -> None:
    pruned = prune(
        vit, "channel-magnitude", sparsity={"ffn": 0.25, "head": 0.34, "residual": 0.5}, example_input=images(vit)
    ).model
    assert [(b.attn.num_heads, b.attn.head_dim, b.mlp.fc1.out_features) for b in pruned.blocks] == [(2, 16, 144)] * 2
    assert pruned.embed_dim == 24
    nothing = prune(vit, "magnitude", sparsity=0.0).model
    assert same_state(nothing, state(vit))


def test_prune_keeps_training_mode_and_is_deterministic(vit: nn.Module) -> None:
    first = prune(vit.train(), "random", sparsity=0.5, example_input=images(vit), seed=3).model
    assert first.training
    assert vit.training
    assert same_state(prune(vit, "random", sparsity=0.5, seed=3).model, state(first))
    assert not same_state(prune(vit, "random", sparsity=0.5, seed=4).model, state(first))


def test_prune_checks_its_result(vit: nn.Module) -> None:
    with torch.no_grad():
        vit.head.weight.fill_(1e308)
    with pytest.raises(BadInput, match=r"^VisionTransformer: the pruned model's output is not finite"):
        prune(vit, "magnitude", sparsity=0.5, example_input=images(vit))
    assert prune(vit, "magnitude", sparsity=0.5).model is not vit


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(vit: nn.Module, value: float) -> None:
    with torch.no_grad():
        vit.blocks[1].attn.proj.weight[0, 0] = value
    for method in ("magnitude", "lamp", "taylor"):
        with pytest.raises(BadInput, match=r"^blocks.1.attn.proj.weight: has values that are not finite"):
            prune(vit, method, sparsity=0.5, calibration=batches(vit))


def test_high_sparsity_keeps_one_unit_of_every_group(vit: nn.Module) -> None:
    pruned = prune(vit, "channel-magnitude", sparsity=0.999, example_input=images(vit), scope="global").model
    assert all(block.mlp.fc1.out_features >= 1 for block in pruned.blocks)
    assert sum(block.mlp.fc1.out_features for block in pruned.blocks) == 2
    assert [block.attn.head_dim for block in pruned.blocks] == [1, 1]


@pytest.mark.parametrize(
    ("method", "sparsity", "settings", "why"),
    [
        ("best", 0.5, {}, r"^prune.method 'best': unknown; use one of random, magnitude"),
        ("magnitude", None, {}, r"^prune.sparsity: method magnitude needs one"),
        ("magnitude", 1.0, {}, r"^prune.sparsity: Input should be less than 1, got 1.0"),
        ("magnitude", -0.1, {}, r"^prune.sparsity: Input should be greater than or equal to 0, got -0.1"),
        ("magnitude", float("nan"), {}, r"^prune.sparsity: Input should be a finite number, got nan"),
        ("magnitude", {"ffn": 0.5}, {}, r"^prune.sparsity.ffn: method magnitude prunes only weight$"),
        ("channel-magnitude", {"block": 0.5}, {}, r"^prune.sparsity.block: method channel-magnitude prunes only"),
        (
            "channel-magnitude",
            {"head": 0.5, "attention": 0.5},
            {},
            r"^prune.sparsity: head and attention prune the same axis",
        ),
        ("magnitude", {}, {}, r"^prune.sparsity: "),
        ("lamp", 0.5, {"scope": "layer"}, r"^prune.scope 'layer': the scope of method lamp is fixed; set it to null"),
        ("random", 0.5, {"scope": "all"}, r"^prune.scope 'all': unknown"),
        ("channel-magnitude", 0.5, {"scope": "2:4"}, r"^prune.scope '2:4': "),
        ("channel-magnitude", 0.5, {"scope": "head"}, r"^prune.scope 'head': |scope 'head' needs"),
        ("n:m", 0.3, {}, r"^prune: an N:M scope removes 0.5 in one cycle"),
        ("n:m", None, {"cycles": 2}, r"^prune: an N:M scope removes 0.5 in one cycle"),
        ("n:m", None, {"scope": "1:0"}, r"N must be between 1 and M - 1"),
        (
            "magnitude",
            0.5,
            {"schedule": "sudden"},
            r"^prune.schedule: Input should be 'linear' or 'cubic', got 'sudden'",
        ),
        ("magnitude", 0.5, {"cycles": 0}, r"^prune.cycles: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_invalid_plans_are_refused(vit: nn.Module, method, sparsity, settings, why) -> None:
    with pytest.raises(BadInput, match=why) as refused:
        run(vit, method, sparsity, **settings)
    assert "\n" not in str(refused.value)


def test_an_unsupported_model_is_refused_before_scoring() -> None:
    with pytest.raises(BadInput, match=r"^Linear: this model is not supported;"):
        prune(nn.Linear(3, 3), "magnitude", sparsity=0.5)


@pytest.mark.parametrize(("scope", "share"), [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5)])
def test_n_of_m_by_name(vit: nn.Module, scope: str, share: float) -> None:
    pruned = prune(vit, "n:m", scope=scope).model
    n, m = map(int, scope.split(":"))
    for group in find_groups(pruned, ["weight"]):
        runs = pruned.get_parameter(group.name).reshape(-1, m)
        assert ((runs != 0).sum(1) == n).all()
    assert plan_for("n:m", None, scope).sparsity == {"weight": share}


def test_prune_equals_score_select_and_apply(vit: nn.Module) -> None:
    groups = find_groups(vit, ["ffn"])
    data = batches(vit)
    masks = select(score(vit, groups, "taylor", data), 0.5, "isomorphic", groups, keep_at_least=1)
    by_hand = shrink(copy.deepcopy(vit), groups, masks)
    assert same_state(
        prune(vit, "channel-taylor", sparsity={"ffn": 0.5}, calibration=data, scope="isomorphic").model, state(by_hand)
    )
    weights = find_groups(vit, ["weight"])
    masks = select(score(vit, weights, "energy"), 0.3, "module", weights)
    assert same_state(prune(vit, "dimap", sparsity=0.3).model, state(zero(copy.deepcopy(vit), weights, masks)))
