"""Token merging: literal oracle, exactness for equal tokens, structure, groups, refusals."""

from pathlib import Path

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.model_zoo import VIT, batches, images, predict, same_state, state, tiny
from vitprune import BadInput, count, export_onnx, find_groups, load, merge_tokens, prune, save, shrink
from vitprune.architectures import structure
from vitprune.architectures.token_merging import MergingBlocks, without_merging


def merged_one_by_one(model: nn.Module, x: Tensor, sizes: list[int], block: nn.Module, number: int):
    """Merge the tokens (N, C) of one image, pair by pair; return tokens and sizes."""
    prefix, heads = model.num_prefix_tokens, block.attn.num_heads
    _, key, _ = block.attn.qkv(block.norm1(x[None]))[0].view(len(x), 3, heads, -1).unbind(1)
    keys = F.normalize(key.mean(dim=1), dim=-1)
    first = list(range(prefix, len(x), 2))
    others = list(range(prefix + 1, len(x), 2))
    best = {a: max(others, key=lambda b: float(keys[a] @ keys[b])) for a in first}
    chosen = sorted(first, key=lambda a: -float(keys[a] @ keys[best[a]]))[:number]
    total = {i: x[i] * sizes[i] for i in range(len(x))}
    grown = list(sizes)
    for a in chosen:
        total[best[a]] = total[best[a]] + total[a]
        grown[best[a]] += sizes[a]
    order = [*range(prefix), *(a for a in first if a not in chosen), *others]
    return torch.stack([total[i] / grown[i] for i in order]), [grown[i] for i in order]


@pytest.mark.parametrize("name", ["vit", "distilled", "extra", "odd"])
@torch.no_grad()
def test_tokens_are_merged_as_by_a_loop(name: str) -> None:
    model = tiny(name)
    inputs, number = images(model), 2
    merging = merge_tokens(tiny(name), number)
    expected = []
    for image in inputs:
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
        sizes = [1] * len(x)
        for index, block in enumerate(model.blocks):
            if index:
                x, sizes = merged_one_by_one(model, x, sizes, block, number)
            x = block(x[None], attn_mask=torch.tensor(sizes, dtype=x.dtype).log()[None, None, None])[0]
        expected.append(model.forward_head(model.norm(x[None])))
    expected = torch.cat(expected)
    torch.testing.assert_close(predict(merging, inputs), expected.detach(), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(predict(model, inputs), expected, rtol=1e-6, atol=1e-6)


def test_merging_equal_tokens_is_exact() -> None:
    model = tiny("vit")
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0.5
    constant = torch.full_like(images(model), 0.7)
    merging = merge_tokens(tiny("vit"), 5)
    merging.load_state_dict(model.state_dict())
    torch.testing.assert_close(predict(merging, constant), predict(model, constant), rtol=0, atol=1e-12)


def test_at_most_half_of_the_patches_are_merged_and_the_cost_counts_them() -> None:
    model, many = tiny("odd"), merge_tokens(tiny("odd"), 1000)
    lengths = []
    many.blocks[2].register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    predict(many, images(model))
    assert lengths == [1 + 3]  # of 9 patches: 9, 5, 3
    some = merge_tokens(tiny("odd"), 1)
    macs = [count(one, images(model)).macs for one in (model, some, many)]
    assert macs == sorted(macs, reverse=True)
    assert len({count(one, images(model)).params for one in (model, some, many)}) == 1


def test_groups_are_those_of_the_model_without_merging() -> None:
    model, merging = tiny("extra"), merge_tokens(tiny("extra"), 3)
    kinds = ["ffn", "attention", "residual", "weight"]
    found = [[(group.name, group.shape, group.slices) for group in find_groups(m, kinds)] for m in (merging, model)]
    assert found[0] == found[1]
    assert structure(merging) == structure(model) | {"blocks.1.merged": (3,)}
    plain = without_merging(merging)
    assert type(merging.blocks) is MergingBlocks
    assert type(plain.blocks) is nn.Sequential
    assert plain.blocks[1] is merging.blocks[1]
    torch.testing.assert_close(predict(plain, images(model)), predict(model, images(model)), rtol=0, atol=0)
    assert without_merging(model) is model


def test_a_model_is_saved_loaded_and_exported_with_its_merging(tmp_path: Path) -> None:
    model = merge_tokens(tiny("vit", dtype=torch.float32), 3)
    small = prune(model, "channel-magnitude", sparsity={"ffn": 0.5, "residual": 0.25}).model
    save(small, tmp_path / "saved")
    loaded, inputs = load(tmp_path / "saved"), images(model)
    assert loaded.blocks.merged == small.blocks.merged == (0, 3)
    torch.testing.assert_close(predict(loaded, inputs), predict(small, inputs), rtol=0, atol=0)
    assert export_onnx(loaded, tmp_path / "model.onnx", inputs)["max_abs_diff"] < 1e-4


def test_plain_timm_loads_the_weights_without_the_merging(tmp_path: Path) -> None:
    model = tiny("vit", dtype=torch.float32)
    save(merge_tokens(tiny("vit", dtype=torch.float32), 3), tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert same_state(plain, state(model))
    torch.testing.assert_close(predict(plain, images(model)), predict(model, images(model)), rtol=0, atol=0)


def test_a_saved_number_for_a_block_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    save(merge_tokens(tiny("vit", dtype=torch.float32), 3), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("blocks.1.merged", "blocks.7.merged"))
    with pytest.raises(BadInput, match=r"config.json: .*blocks.7.merged"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["vit", "extra"])
def test_lower_precision_and_gradients(name: str) -> None:
    model = merge_tokens(tiny(name, dtype=torch.float32), 3)
    with torch.autocast("cpu", torch.bfloat16):
        lower = model(images(model))
    torch.testing.assert_close(lower.float(), predict(model, images(model)), rtol=0.1, atol=0.1)
    assert model.bfloat16()(images(model).bfloat16()).dtype is torch.bfloat16
    model.float()(images(model)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


@pytest.mark.parametrize("method", ["ovit", "obc", "upvits-fisher", "upvits-refit", "corp"])
def test_methods_score_and_update_a_merging_model(method: str) -> None:
    model = tiny("vit", dtype=torch.float32)
    result = prune(model, method, sparsity=0.25, calibration=batches(model), merge_tokens=3)
    assert result.model.blocks.merged == (0, 3)
    assert predict(result.model, images(model)).isfinite().all()


def test_blocks_of_a_merging_model_are_removed() -> None:
    model = merge_tokens(timm.create_model("vit_tiny_patch16_224", **VIT | {"depth": 4}), 2)
    (group,) = find_groups(model, ["block"])
    result = shrink(model, [group], {group.name: torch.tensor([True] * 2 + [False] * 4 + [True] * 2)})
    assert result.blocks.merged == (0, 2)
    assert predict(result, images(model)).isfinite().all()
    del result.blocks[1]
    assert result.blocks.merged == (0,)
    assert predict(result, images(model)).isfinite().all()


@pytest.mark.parametrize("method", ["upvits", "upvits-exact", "upvits-blocks"])
def test_exact_scores_of_a_merging_model_are_refused(method: str) -> None:
    model = tiny("vit")
    given = {"sparsity": 0.5, "calibration": batches(model)}
    with pytest.raises(BadInput, match=rf"^prune.merge_tokens: the exact scores of method {method} do not follow"):
        prune(model, method, merge_tokens=3, **given)
    with pytest.raises(BadInput, match=r"^exact scoring: does not follow merged tokens; use upvits-fisher or unit-obs"):
        prune(merge_tokens(model, 3), method, **given)


def test_gradient_checkpointing_is_refused() -> None:
    message = r"^gradient checkpointing: runs the blocks without merging of tokens; switch one of them off"
    model = merge_tokens(tiny("vit"), 3)
    with pytest.raises(BadInput, match=message):
        model.set_grad_checkpointing(True)
    model.set_grad_checkpointing(False)
    other = tiny("vit")
    other.set_grad_checkpointing(True)
    with pytest.raises(BadInput, match=message):
        merge_tokens(other, 3)


def test_other_models_and_numbers_are_refused() -> None:
    for number in (0, True, 2_000_000):
        with pytest.raises(BadInput, match=rf"^merge_tokens: {number!r} tokens; give a whole number from 1 to 1048576"):
            merge_tokens(tiny("vit"), number)
    for other in (2.5, "2"):
        with pytest.raises(BadInput, match=rf"^number: is a {type(other).__name__}; give an integer$"):
            merge_tokens(tiny("vit"), other)
    with pytest.raises(BadInput, match=r"^VisionTransformer: has 1 block, tokens are merged before the second; leave"):
        merge_tokens(timm.create_model("vit_tiny_patch16_224", **VIT | {"depth": 1}), 2)
    gated = timm.create_model("vit_tiny_patch16_224", **VIT, mlp_layer=SwiGLU)
    with pytest.raises(BadInput, match=r"^blocks.0.mlp: is a SwiGLU, not timm's Mlp"):
        merge_tokens(gated, 2)
    with pytest.raises(BadInput, match=r"^SwinTransformer: only VisionTransformer .*; leave merge_tokens out"):
        merge_tokens(tiny("swin"), 2)
    model = timm.create_model("vit_tiny_patch16_224", **VIT, block_fn=ParallelScalingBlock)
    with pytest.raises(BadInput, match=r"^blocks.0: is a ParallelScalingBlock, not timm's Block; its tokens"):
        merge_tokens(model, 2)
