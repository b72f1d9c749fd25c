"""Removal of whole blocks and half-blocks; two remaining halves form a hybrid block."""

import copy
import types
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.support.model_zoo import VIT, ZOO, batches, images, predict, random_masks, redrawn, same_state, state, tiny
from tests.support.plans import plan_for
from tests.support.pruned_models import rebuild
from tests.support.reference_kl import kl
from vitprune import (
    METHODS,
    BadInput,
    PruneConfig,
    TrainConfig,
    data,
    find_groups,
    finetune,
    gradual_prune,
    load,
    prune,
    save,
    score,
    shrink,
    zero,
)
from vitprune.architectures import structure
from vitprune.architectures.causal_lm import Decoder
from vitprune.criteria.kl import leave_one_out as by_kl
from vitprune.evaluation.cost import count, group_costs
from vitprune.groups import mask_without
from vitprune.pruning.block_steps import dense_paths, next_block_removal, to_dense_names
from vitprune.pruning.cycle_masks import cycle_state, select_masks
from vitprune.pruning.methods import Method
from vitprune.pruning.prune_cycles import Cycle, prune_cycles
from vitprune.pruning.select import select_blocks
from vitprune.training.finetune import RecoverySegment
from vitprune.training.lr_schedule import learning_rate
from vitprune.training.optimizers import OptimizerState

CLOSE = {"rtol": 0, "atol": 1e-12}
VITS = [name for name, (architecture, _) in ZOO.items() if architecture.startswith(("vit", "deit"))]


def deep(depth: int = 6, seed: int = 0) -> nn.Module:
    return redrawn(timm.create_model("vit_tiny_patch16_224", **VIT | {"depth": depth}), seed).double()


def skipping(model: nn.Module, keep: Tensor) -> nn.Module:
    """Return a copy of the model without some sub-layers; keep: (2 * blocks,), attention and FFN alternately."""

    def forward(self: nn.Module, x: Tensor, is_causal: bool = False) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), is_causal=is_causal)) if self.with_attention else x
        return x + self.ls2(self.mlp(self.norm2(x))) if self.with_ffn else x

    model = copy.deepcopy(model)
    for block, pair in zip(model.blocks, keep.view(-1, 2).tolist(), strict=True):
        block.with_attention, block.with_ffn = pair
        block.forward = types.MethodType(forward, block)
    return model


def run(model: nn.Module, sparsity: object, noise: object, method: str = "upvits-blocks", **settings) -> list[Cycle]:
    return list(prune_cycles(model, plan_for(method, sparsity, **settings), noise))


@pytest.mark.parametrize("name", VITS)
def test_every_candidate_equals_the_model_without_it(name: str) -> None:
    model = tiny(name)
    (group,), x = find_groups(model, ["block"]), images(model)
    depth = len(model.blocks)
    assert (group.name, group.shape, group.num_candidates) == ("blocks", (2 * depth,), 2 * depth - 1)
    for unit in range(group.num_candidates):
        mask = mask_without(group, unit)
        smaller = shrink(copy.deepcopy(model), [group], {"blocks": mask})
        assert [type(block) for block in smaller.blocks] == [Block] * (depth - 1)
        assert [feature["module"] for feature in smaller.feature_info] == [f"blocks.{i}" for i in range(depth - 1)]
        torch.testing.assert_close(predict(smaller, x), predict(skipping(model, mask), x), **CLOSE)


def test_candidates_by_hand() -> None:
    """Three blocks have candidates 0 to 4: block 0, FFN 0 + attention 1, block 1, FFN 1 + attention 2, block 2."""
    (group,) = find_groups(deep(3), ["block"])
    bodies = [paths[0] for paths in group.sublayers]
    assert bodies == [f"blocks.{i}.{leaf}" for i in range(3) for leaf in ("attn", "mlp")]
    removed = [(~mask_without(group, unit)).nonzero().flatten().tolist() for unit in range(5)]
    assert removed == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]


def test_blocks_of_a_language_model() -> None:
    model = redrawn(Decoder(11, 8, 12, 3, 2), 0).double()
    (group,), tokens = find_groups(model, ["block"]), torch.arange(8).view(1, 8)
    for unit in range(group.num_candidates):
        mask = mask_without(group, unit)
        smaller = shrink(copy.deepcopy(model), [group], {"blocks": mask})
        torch.testing.assert_close(predict(smaller, tokens), predict(skipping(model, mask), tokens), **CLOSE)


def test_a_hybrid_block_consists_of_two_halves() -> None:
    model = redrawn(
        timm.create_model("vit_tiny_patch16_224", **VIT | {"init_values": 0.1, "drop_path_rate": 0.2, "depth": 3}), 0
    )
    dense, (group,) = copy.deepcopy(model), find_groups(model, ["block"])
    shrink(model, [group], {"blocks": mask_without(group, 1)})
    first, second = model.blocks[0].state_dict(), dense.blocks[1].state_dict()
    ahead = ("norm1.", "attn.", "ls1.")
    for name, tensor in first.items():
        assert torch.equal(tensor, (dense.blocks[0].state_dict() if name.startswith(ahead) else second)[name])
    rates = [getattr(half, "drop_prob", 0.0) for b in model.blocks for half in (b.drop_path1, b.drop_path2)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.2])
    assert same_state(model.blocks[1], state(dense.blocks[2]))
    _, features = model.forward_intermediates(images(model))
    assert len(features) == 2


def test_scores_equal_the_kl_of_the_model_without_the_unit() -> None:
    model = deep(3)
    (group,), noise = find_groups(model, ["block"]), batches(model)
    result = score(model, [group], "kl-literal", noise)["blocks"]
    torch.testing.assert_close(score(model, [group], "kl-exact", noise)["blocks"], result, rtol=1e-9, atol=0)
    for unit in range(group.num_candidates):
        other = skipping(model, mask_without(group, unit))
        expected = sum(kl(predict(model, x), predict(other, x)) for x, _ in noise)
        assert float(result[unit]) == pytest.approx(expected, rel=1e-9)
    assert result[-1] == float("inf")
    for criterion in ("magnitude", "taylor"):
        with pytest.raises(BadInput, match=r"^blocks: magnitude and taylor cannot score blocks"):
            score(model, [group], criterion, noise)


def progressive(model: nn.Module, noise: list, remove: int) -> Tensor:
    """Return the remaining sub-layers after greedy removals, each with the smallest KL to the previous model."""
    remaining = torch.ones(2 * len(model.blocks), dtype=torch.bool)
    for _ in range(remove):
        positions = remaining.nonzero().flatten().tolist()
        tried = []
        for pair in pairwise(positions):
            mask = remaining.clone()
            mask[list(pair)] = False
            tried.append(
                (
                    sum(
                        kl(predict(skipping(model, remaining), x), predict(skipping(model, mask), x)) for x, _ in noise
                    ),
                    mask,
                )
            )
        remaining = min(tried, key=lambda pair: pair[0])[1]
    return remaining


@pytest.mark.parametrize("cycles", [1, 2])
def test_half_of_the_blocks_are_removed_one_by_one(cycles: int) -> None:
    model = deep(6)
    dense, noise, x = copy.deepcopy(model), batches(model, 1), images(model)
    expected = progressive(dense, noise, 3)
    result = run(model, 0.5, noise, cycles=cycles, schedule="linear")
    assert torch.equal(result[-1].masks["blocks"], expected)
    assert [int(cycle.masks["blocks"].sum()) // 2 for cycle in result] == {1: [3], 2: [4, 3]}[cycles]
    torch.testing.assert_close(predict(model, x), predict(skipping(dense, expected), x), **CLOSE)


def test_the_mask_stage_has_only_the_first_removal() -> None:
    model = deep(6)
    noise, plan, other = batches(model, 1), plan_for("upvits-blocks", 0.5), copy.deepcopy(model)
    groups = find_groups(model, ["block"])
    step = next_block_removal(groups, plan.targets()[0])
    assert step == {"block": 1 / 6}
    first = select_masks(score(model, groups, "kl-literal", noise), plan, step, cycle_state(model, plan))
    assert int(first["blocks"].sum()) == 10
    (cycle,) = prune_cycles(model, plan, noise, first)
    assert torch.equal(cycle.masks["blocks"], run(other, 0.5, noise)[0].masks["blocks"])
    assert same_state(model, state(other))


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> str:
    scopes = {"block": "layer", "ffn": "global", "attention": "head", "residual": "layer"}
    monkeypatch.setitem(METHODS, "mixed", Method(by_kl.leave_one_out_kl, scopes, tuple(scopes), False, "for this test"))
    return "mixed"


@pytest.mark.parametrize("cycles", [1, 2])
def test_blocks_are_removed_together_with_units_of_other_blocks(mixed: str, cycles: int) -> None:
    args = VIT | {"depth": 4, "embed_dim": 12, "mlp_ratio": 1.0}
    model = redrawn(timm.create_model("vit_tiny_patch16_224", **args), 0).double()
    once, noise, x = copy.deepcopy(model), batches(model, 1, 2), images(model)
    share = {"ffn": 0.5, "block": 0.5, "attention": 0.25, "residual": 0.25}
    result = run(model, share, noise, mixed, cycles=cycles)
    masks = result[-1].masks
    groups = find_groups(once, list(share))
    removed = [body for (body, *_), keep in zip(groups[4].sublayers, masks["blocks"], strict=True) if not keep]
    assert len(removed) == 4
    assert {name for name, mask in masks.items() if not mask.any()} == set(removed)
    hidden = [block.mlp.fc1.out_features for block in model.blocks]
    assert (len(hidden), sum(hidden), model.embed_dim) == (2, 12, 9)  # half of the sub-layers of two blocks
    assert [block.attn.head_dim for block in model.blocks] == [3, 3]
    shrink(once, groups, masks)
    torch.testing.assert_close(predict(model, x), predict(once, x), **CLOSE)
    for before, after in pairwise(result):
        assert all(not bool((after.masks[name] & ~before.masks[name]).any()) for name in masks)


def test_groups_keep_their_dense_names() -> None:
    model = deep(12)
    (group,), kinds = find_groups(model, ["block"]), ["block", "attention", "head", "ffn", "weight", "residual"]
    mask = mask_without(group, 3) & mask_without(group, 20)  # FFN 1 and attention 2, block 10
    shrink(model, [group], {"blocks": mask})
    names = to_dense_names([group], find_groups(model, kinds), {"blocks": mask})
    assert names["residual"] == "residual"
    assert (names["blocks.1.attn"], names["blocks.1.mlp"]) == ("blocks.1.attn", "blocks.2.mlp")
    assert (names["blocks.9.attn.heads"], names["blocks.9.mlp.fc1.weight"]) == (
        "blocks.11.attn.heads",
        "blocks.11.mlp.fc1.weight",
    )


def test_remaining_blocks_keep_their_optimizer_state_when_earlier_ones_are_removed() -> None:
    model, first, later = deep(4), images(deep(1), 3, 1), images(deep(1), 3, 2)
    (group,), memory, labels = find_groups(model, ["block"]), OptimizerState(), torch.arange(3)
    recipe = TrainConfig(epochs=1, lr=0.01, optimizer="momentum", weight_decay=0.0, clip=None)
    finetune(model, [(first, labels)], recipe, segment=RecoverySegment(1, [1, 1], memory))
    before = {name: value["momentum_buffer"].clone() for name, value in memory.items()}
    mask = mask_without(group, 0) & mask_without(group, 5)  # block 0, FFN 2 and attention 3
    shrink(model, [group], {"blocks": mask})
    grads = torch.autograd.grad(cross_entropy(model(later), labels), list(model.parameters()))
    paths = dense_paths([group], {"blocks": mask})
    finetune(model, [(later, labels)], recipe, segment=RecoverySegment(2, [1, 1], memory, paths))
    blocks = {"blocks.0.": "blocks.1.", "blocks.1.": "blocks.2."}
    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        old = blocks.get(name[:9], name[:9]) + name[9:]
        old = old.replace("2.mlp", "3.mlp").replace("2.norm2", "3.norm2")
        torch.testing.assert_close(memory[old]["momentum_buffer"], 0.9 * before[old] + grad, **CLOSE)
    assert len(memory) == len(grads)


def test_whole_blocks_of_a_traced_model_keep_their_paths() -> None:
    model = tiny("swin")
    (group,) = find_groups(model, ["block"])
    assert group.whole_blocks
    assert dense_paths([group], {"blocks": mask_without(group, 0)}) == {}


def test_gradual_pruning_of_blocks_carries_the_state_of_every_block() -> None:
    model, config = deep(4), {"method": "upvits-blocks", "sparsity": 0.5, "cycles": 2, "schedule": "linear"}
    given = batches(model)
    recipe = TrainConfig(epochs=1, lr=0.01, optimizer="momentum", weight_decay=0.0, optimizer_state="keep")
    result = gradual_prune(model, PruneConfig(**config, finetune=recipe), given, calibration=given)
    by_hand, optimizer = copy.deepcopy(model), None
    for _ in prune_cycles(by_hand, plan_for("upvits-blocks", 0.5, cycles=2, schedule="linear"), given):
        optimizer = optimizer or torch.optim.SGD(by_hand.parameters(), momentum=0.9)  # holds the same parameters
        for step, (x, labels) in enumerate(given):
            optimizer.param_groups[0]["lr"] = learning_rate(step, len(given), 0.01, 0.0)
            optimizer.zero_grad()
            cross_entropy(by_hand(x), labels).backward()
            nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
            optimizer.step()
    assert len(result.model.blocks) == 2
    torch.testing.assert_close(state(result.model), state(by_hand), **CLOSE)


def test_select_blocks_by_hand() -> None:
    scores = {"blocks": torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 9.0, 7.0, float("inf")])}
    kept = {
        share: select_blocks(scores, share)["blocks"].nonzero().flatten().tolist()
        for share in (0.0, 0.25, 0.5, 0.75, 0.99)
    }
    # pair 1 is removed; 0 then has a new neighbor, so pairs 4 and 6 follow, and one block remains
    assert kept == {0.0: list(range(8)), 0.25: [0, 3, 4, 5, 6, 7], 0.5: [0, 3, 6, 7], 0.75: [0, 3], 0.99: [0, 3]}
    assert select_blocks({"blocks": torch.zeros(6)}, 0.34)["blocks"].tolist() == [False, False, True, True, True, True]
    before = {"blocks": torch.tensor([True, False, False, True, True, True, True, True])}
    again = select_blocks({"blocks": torch.tensor([0.5, 0, 0, 8, 9, 9, 9, 9])}, 0.5, before)
    assert again["blocks"].tolist() == [False, False, False, False, True, True, True, True]
    with pytest.raises(BadInput, match=r"^blocks: 1 scores are NaN"):
        select_blocks({"blocks": torch.tensor([float("nan"), 1.0])}, 0.5)
    with pytest.raises(BadInput, match="at least 0 and below 1"):
        select_blocks(scores, 1.0)


def test_removing_all_blocks_is_refused(vit: nn.Module) -> None:
    before, groups = state(vit), find_groups(vit, ["block", "ffn"])
    full = random_masks(groups, 0)
    for mask in ([True, False, True, True], [False, True, True, False], [True, True, False, True]):
        with pytest.raises(BadInput, match=r"^blocks: kept sub-layers would not alternate attention and FFN"):
            shrink(vit, groups, full | {"blocks": torch.tensor(mask)})
    with pytest.raises(BadInput, match=r"^blocks: all 4 units would be removed"):
        shrink(vit, groups, full | {"blocks": torch.zeros(4, dtype=torch.bool)})
    with pytest.raises(
        BadInput, match=r"^blocks: blocks cannot be zeroed, they are removed from the model; shrink them"
    ):
        zero(vit, groups, full | {"blocks": mask_without(groups[0], 1)})
    assert same_state(vit, before)
    shrink(vit, groups, full | {"blocks": mask_without(groups[0], 1)})
    with pytest.raises(BadInput, match=r"^blocks: the model has no blocks.1.attn, the group is out of date"):
        shrink(vit, groups[:1], full)


@pytest.mark.parametrize("name", ["odd", "extra", "distilled"])
def test_removed_blocks_and_units_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = tiny(name).float()
    (group,) = find_groups(model, ["block"])
    shrink(model, [group], {"blocks": mask_without(group, 1)})
    groups = find_groups(model, ["residual", "attention", "ffn"])
    shrink(model, groups, {n: m for at, g in enumerate(groups) for n, m in random_masks([g], 1 + at).items()})
    x = images(model)
    save(model, tmp_path)
    again = load(tmp_path)
    assert same_state(again, state(model))
    assert torch.equal(predict(again, x), predict(model, x))
    assert structure(again) == structure(model)
    assert structure(rebuild(tiny(name), structure(model)))["blocks"] == (2 * len(model.blocks),)


def test_a_model_with_fewer_blocks_loads_in_plain_timm(tmp_path: Path) -> None:
    model = deep(4).float()
    pruned = prune(
        model, "upvits-blocks", sparsity=0.25, calibration=batches(model, 1), example_input=images(model)
    ).model
    assert (len(model.blocks), len(pruned.blocks)) == (4, 3)
    save(pruned, tmp_path)
    x = images(model)
    for again in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True), load(tmp_path)):
        assert same_state(again, state(pruned))
        assert torch.equal(predict(again, x), predict(pruned, x))


def test_the_structure_without_removed_blocks_equals_the_dense_one(vit: nn.Module) -> None:
    older = {name: shape for name, shape in structure(vit).items() if name != "blocks"}
    assert structure(rebuild(tiny("vit"), older)) == structure(vit)
    with pytest.raises(BadInput, match=r"^blocks: kept sub-layers would not alternate"):
        rebuild(tiny("vit"), {"blocks": [3]})


def test_cost_of_blocks(vit: nn.Module) -> None:
    weights, macs = group_costs(vit, find_groups(vit, ["block"]), images(vit))["blocks"]
    assert weights == sum(p.numel() for block in vit.blocks for p in block.parameters())
    assert 0 < macs < count(vit, images(vit)).macs


@pytest.mark.real
def test_the_progressive_order_loses_less_than_random_pairs(real_data: Path, real_deit: nn.Module) -> None:
    source = data.open_source(f"parquet:{real_data / 'imagenet-val-800.parquet'}")
    transform = data.transform(data.data_config(real_deit))
    pixels = [transform.image(data.decode(source.read(name), transform.mode)) for name in source.ids[:8]]
    calibration, x = [(torch.stack(pixels[:4]), torch.zeros(4))], torch.stack(pixels[4:])
    (group,) = find_groups(real_deit, ["block"])
    scores = score(real_deit, [group], "kl-literal", calibration)["blocks"]
    assert scores.shape == (24,)
    assert (
        0 < scores[2:-1].min() < 10 * scores[2:-1].max() < scores[:2].min()
    )  # block 0 and its FFN have the highest scores
    pruned = copy.deepcopy(real_deit)
    plan, first = plan_for("upvits-blocks", 2 / 12), select_blocks({"blocks": scores}, 1 / 12)
    list(prune_cycles(pruned, plan, calibration, first))
    assert len(pruned.blocks) == 10
    dense, generator = predict(real_deit, x), torch.Generator().manual_seed(0)
    random = []
    for _ in range(5):
        masks = select_blocks({"blocks": torch.rand(24, generator=generator)}, 2 / 12)
        random.append(kl(dense, predict(shrink(copy.deepcopy(real_deit), [group], masks), x)))
    assert kl(dense, predict(pruned, x)) < sum(random) / len(random)
