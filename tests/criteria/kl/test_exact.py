"""Exact KL from cached activations against removing one unit at a time."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.support.model_zoo import SWIN, VIT, batches, images, predict, random_masks, redrawn, same_state, state, tiny
from tests.support.plans import context
from tests.support.reference_kl import kl
from vitprune import BadInput, data, find_groups, score
from vitprune.architectures import merge_heads
from vitprune.architectures.chain_builders import build_chain
from vitprune.criteria import DEFAULT_CONTEXT, ScoringContext
from vitprune.criteria.kl import fast_matmul
from vitprune.criteria.kl.exact import kl_divergences
from vitprune.groups import Group, shrink, zero

MODELS = ["vit", "thin", "distilled", "odd", "extra", "swin", "pvt", "pvt-linear"]
KINDS = ["ffn", "attention", "head", "residual"]
PAIRS = [(name, kind) for name in MODELS for kind in KINDS]
VARIANTS = {
    "pre-norm": ({"pre_norm": True, "fc_norm": True}, KINDS),
    "no class token": ({"class_token": False, "global_pool": "avg"}, KINDS),
    "root mean square norm": ({"norm_layer": nn.RMSNorm}, KINDS),
    "norm of q and k": ({"qk_norm": True}, ["head", "ffn"]),
    "norm of patches": ({"embed_norm_layer": nn.LayerNorm}, ["ffn", "residual"]),
    "tokens pooled by a maximum": ({"global_pool": "max", "reg_tokens": 1}, KINDS),
}


def one_by_one(model: nn.Module, group: Group, units: Tensor, inputs: Tensor) -> Tensor:
    """KL of every image for every unit: copy the model, remove the unit, run both."""
    result = torch.empty(len(units), len(inputs), dtype=torch.float64)
    for row, unit in enumerate(units):
        mask = (torch.arange(group.units) != unit).view(group.shape)
        remove = shrink if group.kind == "residual" else zero
        pruned = predict(remove(copy.deepcopy(model), [group], {group.name: mask}), inputs)
        both = zip(predict(model, inputs).double(), pruned.double(), strict=True)
        result[row] = torch.tensor([kl(*pair) for pair in both])
    return result


def some(group: Group, number: int = 4) -> Tensor:
    return torch.randperm(group.units, generator=torch.Generator().manual_seed(3))[:number]


def holds(model: nn.Module, groups: list[Group], setting: ScoringContext | None = None) -> None:
    """Assert that exact divergences of some units equal those of removed units."""
    inputs = images(model)
    chosen = {group.name: some(group) for group in groups}
    result = kl_divergences(model, groups, chosen, inputs, setting or DEFAULT_CONTEXT)
    assert list(result) == [group.name for group in groups]
    for group in groups:
        expected = one_by_one(model, group, chosen[group.name], inputs)
        assert result[group.name].dtype == torch.float64
        assert bool((expected > 1e-11).all())
        torch.testing.assert_close(result[group.name], expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("name", [*MODELS, "deit"])
def test_a_chain_computes_its_model_step_by_step(name: str) -> None:
    model = tiny(name)
    inputs, steps = images(model), build_chain(model)
    with torch.no_grad():
        torch.testing.assert_close(steps(inputs), predict(model, inputs), rtol=1e-12, atol=1e-12)
        stream = steps.embed(inputs)
        for step in steps.steps:
            stream = step(stream)
        logits = steps.run_head(stream[:, : steps.num_tokens_read])
        torch.testing.assert_close(logits, predict(model, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_divergences_equal_those_of_removed_units(name: str, kind: str) -> None:
    model = tiny(name)
    holds(model, find_groups(model, [kind]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_divergences_of_model_variants(variant: str) -> None:
    args, kinds = VARIANTS[variant]
    model = redrawn(timm.create_model("vit_tiny_patch16_224", **VIT | args), 0).double()
    with torch.no_grad():
        torch.testing.assert_close(
            build_chain(model)(images(model)), predict(model, images(model)), rtol=1e-12, atol=1e-12
        )
    holds(model, find_groups(model, kinds))


def test_divergences_with_padded_windows() -> None:
    args = SWIN | {"img_size": 40, "depths": (2, 1), "always_partition": True}
    model = redrawn(timm.create_model("swin_tiny_patch4_window7_224", **args), 0).double()
    holds(model, find_groups(model, ["ffn", "attention"]))


def test_divergences_of_channels_in_merged_heads() -> None:
    model = tiny("odd")
    groups = merge_heads(model, find_groups(model, ["attention"]), 1)
    assert groups[0].shape == (1, 45)
    holds(model, groups)


def test_a_pruned_model_can_be_scored_again() -> None:
    model = tiny("odd")
    for kind in ("attention", "ffn", "residual"):
        groups = find_groups(model, [kind])
        shrink(model, groups, random_masks(groups, 2))
    holds(model, find_groups(model, KINDS))


@pytest.mark.parametrize("memory", [1, 200_000, 1 << 30])
def test_memory_does_not_change_the_divergences(memory: int) -> None:
    model = tiny("thin")
    holds(model, find_groups(model, KINDS), context(memory=memory))


def test_scores_equal_leave_one_out_with_uneven_batches() -> None:
    model = tiny("thin").requires_grad_(False)
    groups = find_groups(model, KINDS)
    uneven = [(images(model, size, size), torch.zeros(size).long()) for size in (3, 1, 2)]
    result, expected = (score(model, groups, name, uneven) for name in ("kl-exact", "kl-literal"))
    for group in groups:
        assert result[group.name].shape == group.shape
        torch.testing.assert_close(result[group.name], expected[group.name], rtol=1e-6, atol=1e-15)


def test_only_chosen_units_are_scored_and_the_model_is_unchanged() -> None:
    model = tiny("vit").train()
    before, groups = state(model), find_groups(model, ["ffn", "head"])
    chosen = {"blocks.1.mlp": torch.tensor([7, 3, 7]), "blocks.0.attn.heads": torch.tensor([], dtype=torch.int64)}
    result = kl_divergences(model, groups, chosen, images(model), DEFAULT_CONTEXT)
    assert {name: tuple(each.shape) for name, each in result.items()} == {
        "blocks.1.mlp": (3, 3),
        "blocks.0.attn.heads": (0, 3),
    }
    assert torch.equal(result["blocks.1.mlp"][0], result["blocks.1.mlp"][2])
    assert same_state(model, before)
    assert all(module.training for module in model.modules())


def test_tiny_divergences_keep_their_precision() -> None:
    model = tiny("thin")
    group, inputs, unit = find_groups(model, ["ffn"])[1], images(model), torch.tensor([5])
    column = model.blocks[1].mlp.fc2.weight[:, 5].detach().clone()
    result = {}
    for small in (1e-3, 1e-6):
        with torch.no_grad():
            model.blocks[1].mlp.fc2.weight[:, 5] = column * small
        result[small] = kl_divergences(model, [group], {group.name: unit}, inputs, DEFAULT_CONTEXT)[group.name]
    torch.testing.assert_close(
        result[1e-6] * 1e6, result[1e-3], rtol=0.02, atol=0
    )  # the divergence is quadratic in the scale
    assert bool((result[1e-6] < 1e-12).all())


def test_divergences_beyond_the_exponential_range_are_finite() -> None:
    model = tiny("thin")
    with torch.no_grad():
        model.head.weight *= 1e5
    group = find_groups(model, ["head"])[1]
    result = kl_divergences(model, [group], {group.name: torch.arange(3)}, images(model), DEFAULT_CONTEXT)[group.name]
    assert bool(result.isfinite().all())
    assert float(result.max()) > 500
    torch.testing.assert_close(result, logarithms(model, group), rtol=1e-9, atol=1e-9)


def logarithms(model: nn.Module, group: Group) -> Tensor:
    """Return the literal divergences, computed with logarithms that do not underflow."""
    rows = []
    for unit in range(group.units):
        masks = {group.name: torch.arange(group.units) != unit}
        pruned = zero(copy.deepcopy(model), [group], masks)
        full, other = (predict(each, images(model)).log_softmax(-1) for each in (model, pruned))
        rows.append((full.exp() * (full - other)).sum(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["vit", "odd", "distilled"])
def test_float32_scores_equal_float64_up_to_rounding(name: str) -> None:
    model = tiny(name)
    groups, inputs = find_groups(model, KINDS), images(model)
    chosen = {group.name: some(group) for group in groups}
    expected = kl_divergences(model, groups, chosen, inputs, DEFAULT_CONTEXT)
    result = kl_divergences(model.float(), groups, chosen, inputs.float(), DEFAULT_CONTEXT)
    for group, each in result.items():
        torch.testing.assert_close(each, expected[group], rtol=2e-3, atol=1e-9)


def test_autocast_and_tf32_are_disabled() -> None:
    model = tiny("vit").float()
    groups, inputs = find_groups(model, ["ffn"]), images(model)
    chosen = {group.name: some(group) for group in groups}
    expected = kl_divergences(model, groups, chosen, inputs, DEFAULT_CONTEXT)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            result = kl_divergences(model, groups, chosen, inputs, DEFAULT_CONTEXT)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_fast_products_equal_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(20, 33)
    x = torch.randn(2, 7, 20, generator=generator)
    q, k, v = (torch.randn(2, 7, 3, 5, generator=generator).transpose(1, 2) for _ in range(3))
    close = {"rtol": 1e-5, "atol": 1e-6}
    with torch.no_grad():
        torch.testing.assert_close(fast_matmul.linear(x[:, :3], layer), layer(x[:, :3]), **close)
        for act in (nn.GELU(), nn.GELU("tanh"), nn.ReLU()):
            torch.testing.assert_close(fast_matmul.linear_activation(x, layer, act), act(layer(x)), **close)
        expected = nn.functional.scaled_dot_product_attention(q[:, :, :4], k, v, scale=0.3).transpose(1, 2).flatten(2)
        torch.testing.assert_close(fast_matmul.attention(q[:, :, :4], k, v, 0.3), expected, **close)


def test_unsupported_input_is_refused_by_name() -> None:
    model = tiny("thin")
    group, inputs = find_groups(model, ["ffn"])[0], images(model)
    with pytest.raises(BadInput, match=r"^kl: needs images; give calibration batches$"):
        score(model, [group], "kl-exact")
    weight = find_groups(model, ["weight"])[0]
    with pytest.raises(BadInput, match=r"^blocks.0.attn.qkv.weight: exact scoring removes .*, not kind 'weight'$"):
        score(model, [weight], "kl-exact", batches(model))
    with pytest.raises(BadInput, match=r"^blocks.0.mlp: unit 24 is out of range 0 to 23$"):
        kl_divergences(model, [group], {group.name: torch.tensor([24])}, inputs, DEFAULT_CONTEXT)
    with pytest.raises(
        BadInput, match=r"^ResNet: exact KL scores are computed of VisionTransformer, .* only; use method upvits-fisher"
    ):
        build_chain(timm.create_model("resnet18", num_classes=3))
    model.blocks = model.blocks[1:]
    with pytest.raises(BadInput, match=r"^blocks.1.mlp: the model has no branch of that name"):
        kl_divergences(
            model, find_groups(tiny("thin"), ["ffn"])[1:], {"blocks.1.mlp": some(group)}, inputs, DEFAULT_CONTEXT
        )


@pytest.mark.real
def test_divergences_on_deit_tiny(real_deit, real_data) -> None:
    source = data.open_source(f"parquet:{real_data / 'imagenet-val-800.parquet'}")
    transform = data.transform(data.data_config(real_deit))
    files = (source.read(name) for name in source.ids[600:602])
    inputs = torch.stack([transform.image(data.decode(file, transform.mode)) for file in files])
    blocks = [find_groups(real_deit, [kind])[number] for kind in KINDS[:3] for number in (2, 11)]
    groups = [*blocks, *find_groups(real_deit, ["residual"])]
    chosen = {group.name: some(group, 2) for group in groups}
    result = kl_divergences(real_deit, groups, chosen, inputs, DEFAULT_CONTEXT)
    for group in groups:
        expected = one_by_one(real_deit, group, chosen[group.name], inputs)
        torch.testing.assert_close(result[group.name], expected, rtol=1e-2, atol=1e-8)


def test_onednn_products_equal_torch() -> None:
    x, layer = torch.randn(2, 5, 8), nn.Linear(8, 6)
    try:
        result = fast_matmul._onednn(x, layer.weight, layer.bias, "gelu")
        batched = fast_matmul._batched(torch.ones(3, 5, 8), x[:1].transpose(1, 2).expand(3, 8, 5).contiguous())
    except (AttributeError, RuntimeError):
        pytest.skip("this build of torch does not have oneDNN's operators")
    torch.testing.assert_close(result, nn.functional.gelu(layer(x)))
    torch.testing.assert_close(batched, (torch.ones(5, 8) @ x[0].T).expand(3, 5, 5))
