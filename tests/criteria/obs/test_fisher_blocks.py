"""Fisher blocks: per-image and per-batch gradients, block ranges, memory chunks, augmentation."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.model_zoo import batches, images, tiny
from tests.support.plans import changed, context, plan_for
from tests.support.reference_obs import image_gradients, naive_fisher
from vitprune import BadInput, find_groups
from vitprune.criteria import Batches, ScoringContext
from vitprune.criteria.obs import cap
from vitprune.criteria.obs.fisher_blocks import FisherBlocks
from vitprune.criteria.obs.gradients import augmented_images, random_crops, weight_gradients
from vitprune.criteria.obs.weight_blocks import BlockRange, block_size, chunk_by_memory, split_into_blocks
from vitprune.groups import Group, ParamSlice
from vitprune.pruning.prune_cycles import prune_cycles

SMALL = context(fisher_block_size=24, damping=1e-8)


def group_of(model: nn.Module, param: str) -> Group:
    return Group(param, "weight", tuple(model.get_parameter(param).shape), (ParamSlice(param, None),))


def collected(model: nn.Module, groups: list[Group], data: Batches, setting: ScoringContext) -> dict[str, Tensor]:
    result: dict[str, list[Tensor]] = {}
    for part, fisher in FisherBlocks(model, groups, data, setting):
        result.setdefault(part.param, []).append(fisher)
    return {param: torch.cat(pieces) for param, pieces in result.items()}


@pytest.mark.parametrize(
    ("units", "expected", "multiple", "size"),
    [
        (147456, 192, 1, 192),
        (147456, 200, 1, 256),
        (36864, 192, 4, 192),
        (10, 3, 1, 5),
        (7, 3, 1, 7),
        (6, 192, 1, 6),
        (60, 7, 4, 12),
        (60, 1, 1, 1),
        (60, 1, 4, 4),
    ],
)
def test_block_size_is_the_next_divisor(units: int, expected: int, multiple: int, size: int) -> None:
    assert block_size(units, expected, multiple) == size


def test_chunks_cover_all_blocks_and_fit_into_memory() -> None:
    parts = [BlockRange("a", 4, 0, 40), BlockRange("b", 8, 0, 16), BlockRange("c", 4, 0, 400)]
    for memory in (1, 128, 500, 4000, 10**6):
        result = chunk_by_memory(parts, memory)
        assert all(
            sum(p.blocks * p.size**2 * 8 for p in portion) <= memory or portion[0].blocks == 1 for portion in result
        )
        for full in parts:
            positions = [
                n for portion in result for p in portion if p.param == full.param for n in range(p.start, p.stop)
            ]
            assert positions == list(range(full.start, full.stop))
    assert len(chunk_by_memory(parts, 10**6)) == 1
    assert [len(portion) for portion in chunk_by_memory(parts, 1)] == [1] * 112


@pytest.mark.parametrize("name", ["vit", "extra", "distilled", "swin", "pvt"])
def test_fisher_equals_that_of_per_image_gradients(name: str) -> None:
    """Linear layers and convolutions use products of inputs and gradients, other layers one pass per image."""
    model = tiny(name)
    data = batches(model)
    params = [p for p in model.state_dict() if p.endswith("weight") and model.get_parameter(p).dim() in (2, 4)]
    some = [params[0], params[-1], *params[1:-1:5]]
    some += ["norm.weight"] if name == "vit" else []
    some = [param for param in dict.fromkeys(some) if "relative" not in param]
    with torch.no_grad():
        model.get_parameter(some[1]).view(-1)[::3] = 0
    groups = [group_of(model, param) for param in some]
    result = collected(model, groups, data, SMALL)
    for param in some:
        grads = image_gradients(model, param, data)
        size = block_size(grads.shape[1], 24)
        expected = naive_fisher(grads, size, SMALL.config.damping * 128)
        torch.testing.assert_close(result[param], expected, rtol=1e-8, atol=1e-12)


def test_batches_of_gradients_are_means(vit: nn.Module) -> None:
    """Five gradients of four images each from twelve images: the second pass uses random crops."""
    param = "blocks.0.mlp.fc2.weight"
    data, setting = batches(vit, 4), changed(SMALL, per_sample=False, gradient_batch=4, num_gradients=None)
    weight = vit.get_parameter(param)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    grads = [torch.autograd.grad(F.cross_entropy(vit(x[n : n + 4]), y[n : n + 4]), [weight])[0] for n in (0, 4, 8)]
    expected = naive_fisher(torch.stack([grad.flatten() for grad in grads]), 24, setting.config.damping)
    result = collected(vit, [group_of(vit, param)], data, setting)[param]
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-12)
    more = changed(setting, num_gradients=5)
    part = BlockRange(param, 24, 0, weight.numel())
    chunks = torch.cat([values for _, values in weight_gradients(vit, [part], data, more)])
    assert chunks.shape == (5, weight.numel())
    torch.testing.assert_close(chunks[:3], torch.stack([grad.flatten() for grad in grads]), rtol=1e-8, atol=1e-12)
    stream = list(augmented_images(data, 20, more.seed))
    x, y = torch.cat([images for images, _ in stream]), torch.cat([labels for _, labels in stream])
    last = torch.autograd.grad(F.cross_entropy(vit(x[16:]), y[16:]), [weight])[0].flatten()
    torch.testing.assert_close(chunks[4], last, rtol=1e-8, atol=1e-12)


def test_the_mean_of_per_sample_gradients_is_that_of_the_batch(vit: nn.Module) -> None:
    parts = split_into_blocks(vit, find_groups(vit, ["weight"]), 24)
    data = batches(vit, 2)
    alone = dict(weight_gradients(vit, parts, data[:1], SMALL))
    full = changed(SMALL, per_sample=False, gradient_batch=3)
    for part, mean in weight_gradients(vit, parts, data[:1], full):
        torch.testing.assert_close(alone[part].mean(dim=0), mean[0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("per_sample", [True, False])
def test_memory_changes_only_the_number_of_passes(vit: nn.Module, per_sample: bool) -> None:
    groups, data = find_groups(vit, ["weight"])[:3], batches(vit)
    setting = changed(SMALL, per_sample=per_sample, gradient_batch=2, num_gradients=4 if per_sample else 3)
    full, tight = (
        collected(vit, groups, data, setting),
        collected(vit, groups, data, changed(setting, memory=1_000_000)),
    )
    assert len(FisherBlocks(vit, groups, data, setting).chunks) == 1
    assert len(FisherBlocks(vit, groups, data, changed(setting, memory=1_000_000)).chunks) > 3
    for param, fisher in full.items():
        torch.testing.assert_close(tight[param], fisher, rtol=1e-10, atol=1e-16)
    importance = cap.ovit(vit, groups, data, changed(setting, memory=1_000_000))
    again = cap.joint_update(vit, groups, data, changed(setting, memory=1_500_000))
    masks = {name: score > score.median() for name, score in importance.scores.items()}
    for param, value in importance.update(masks).items():
        torch.testing.assert_close(again(masks)[param], value, rtol=1e-6, atol=1e-9)


def test_collection_does_not_change_the_model(vit: nn.Module) -> None:
    vit.train().requires_grad_(False)
    vit.blocks[0].mlp.fc1.weight.requires_grad_()
    for per_sample in (True, False):
        collected(
            vit, find_groups(vit, ["weight"]), batches(vit), changed(SMALL, per_sample=per_sample, gradient_batch=2)
        )
    assert vit.training
    assert [name for name, p in vit.named_parameters() if p.requires_grad] == ["blocks.0.mlp.fc1.weight"]
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert not any(module._forward_hooks for module in vit.modules())


def test_given_masks_are_updated_without_scoring(vit: nn.Module) -> None:
    """As in the prune stage: masks are read from files, and gradients are computed again for the update."""
    data, plan = batches(vit), plan_for("ovit", 0.5, score=SMALL.config)
    (cycle,) = prune_cycles(one := tiny("vit"), plan, data)
    (other,) = prune_cycles(two := tiny("vit"), plan, data, cycle.masks)
    assert other.scores == {}
    for name, mask in cycle.masks.items():
        assert torch.equal(one.get_parameter(name), two.get_parameter(name))
        assert not torch.equal(one.get_parameter(name)[mask], vit.get_parameter(name)[mask])


def test_augmented_samples_are_random_crops_and_flips(vit: nn.Module) -> None:
    x = images(vit, 64).float()
    generator = torch.Generator().manual_seed(0)
    result = random_crops(x, generator)
    assert result.shape == x.shape
    assert not torch.equal(result, random_crops(x, generator))
    assert torch.equal(result, random_crops(x, torch.Generator().manual_seed(0)))
    flat = random_crops(torch.full((2, 3, 32, 32), 5.0), generator)
    torch.testing.assert_close(flat, torch.full((2, 3, 32, 32), 5.0))
    ramp = torch.linspace(0, 1, 32).expand(200, 1, 32, 32)
    grads = random_crops(ramp, generator).diff(dim=3).mean(dim=(1, 2, 3)) * 31
    assert 0.3 < float((grads < 0).float().mean()) < 0.7
    assert 0.2 < float(grads.abs().min()) < 0.45  # the smallest crops: sqrt(0.08 * 3/4) of the width and more
    assert 0.9 < float(grads.abs().max()) <= 1.001
    with pytest.raises(BadInput, match=r"^score.num_gradients: inputs of shape \[16\] cannot be cropped; lower it$"):
        list(augmented_images([(torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))], 3, 0))


def test_an_unused_weight_is_refused_by_name(vit: nn.Module) -> None:
    vit.add_module("spare", nn.Linear(4, 4).double())
    for per_sample in (True, False):
        setting = changed(SMALL, per_sample=per_sample, gradient_batch=2)
        with pytest.raises(
            BadInput, match=r"^spare.weight: is not used in the forward pass and has no gradient; exclude"
        ):
            collected(vit, [group_of(vit, "spare.weight")], batches(vit), setting)
