"""Rotation of the residual stream: equal logits in float64, plain timm models, and refusals by name."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm, LayerScale, RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from tests.support.model_zoo import VIT, images, predict, redrawn, tiny
from vitprune import BadInput, find_groups, shrink
from vitprune.architectures.stream_rotation import rotate_stream


def orthogonal(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn((size, size), generator=torch.Generator().manual_seed(seed)).double()).Q


def made(**changes: Any) -> Any:
    return redrawn(timm.create_model("vit_tiny_patch16_224", **VIT | changes).double(), 0)


def assert_rotates(model: Any) -> nn.Module:
    inputs = images(model)
    before = predict(model, inputs)
    result = rotate_stream(model, orthogonal(model.embed_dim))
    torch.testing.assert_close(predict(result, inputs), before, rtol=0, atol=1e-12)
    return result


@pytest.mark.parametrize("name", ["vit", "deit", "distilled", "odd", "extra"])
def test_logits_do_not_change(name: str) -> None:
    rotated = assert_rotates(tiny(name))
    assert not any(isinstance(module, nn.LayerNorm) for module in rotated.modules())
    norms = [module for module in rotated.modules() if isinstance(module, RmsNorm)]
    assert len(norms) == 2 * len(rotated.blocks) + 1
    assert all(bool((norm.weight == 1).all()) for norm in norms)
    assert all(bool((scale.gamma == 1).all()) for scale in rotated.modules() if isinstance(scale, LayerScale))


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_layer": partial(LayerNorm, eps=1e-2)},
        {"norm_layer": partial(RmsNorm, eps=1e-2)},
        {"proj_bias": False},
        {"pos_embed": "none", "class_token": False, "global_pool": "avg", "fc_norm": False},
        {"dynamic_img_size": True},
    ],
    ids=["eps", "rms", "no bias", "no tokens", "dynamic size"],
)
def test_variants_are_rotated(changes: dict[str, Any]) -> None:
    assert_rotates(made(**changes))


def test_a_rotated_model_is_rotated_back_to_its_weights() -> None:
    once = rotate_stream(tiny("vit"), orthogonal(48))
    before = {name: value.clone() for name, value in once.state_dict().items()}
    rotate_stream(rotate_stream(once, orthogonal(48, 1)), orthogonal(48, 1).T)
    torch.testing.assert_close(once.state_dict(), before, rtol=0, atol=1e-12)


def test_plain_timm_builds_the_rotated_model() -> None:
    rotated = rotate_stream(tiny("extra"), orthogonal(48))
    arguments = VIT | {"init_values": 0.1, "reg_tokens": 2, "no_embed_class": True, "global_pool": "avg"}
    plain = timm.create_model("vit_tiny_patch16_224", **arguments, norm_layer="rmsnorm", qkv_bias=True).double()
    plain.load_state_dict(rotated.state_dict())
    torch.testing.assert_close(predict(plain, images(plain)), predict(rotated, images(plain)), rtol=0, atol=0)


def test_removing_channels_equals_removing_the_directions_from_every_layer() -> None:
    cut, whole = (rotate_stream(tiny("extra"), orthogonal(48)) for _ in range(2))
    groups = find_groups(cut, ["residual"])
    keep = torch.arange(48) < 40
    shrink(cut, groups, {"residual": keep})
    projection = torch.diag(keep.double())
    rotate = {
        name: value @ projection for name, value in whole.state_dict().items() if name.endswith(("_token", "_embed"))
    }
    for path in ("patch_embed.proj", *(f"blocks.{i}.{leaf}" for i in range(2) for leaf in ("attn.proj", "mlp.fc2"))):
        for leaf in ("weight", "bias"):
            value = whole.get_parameter(f"{path}.{leaf}")
            rotate[f"{path}.{leaf}"] = (
                projection @ value.flatten(1) if value.dim() > 1 else projection @ value
            ).view_as(value)
    whole.load_state_dict(rotate, strict=False)
    for norm in (module for module in whole.modules() if isinstance(module, RmsNorm)):  # as if over 40 channels
        norm.eps *= 40 / 48
        nn.init.constant_(norm.weight, (40 / 48) ** 0.5)
    inputs = images(whole)
    torch.testing.assert_close(predict(cut, inputs), predict(whole, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"pre_norm": True}, "norm_pre"),
        ({"qk_norm": True}, "blocks.0.attn.q_norm"),
        ({"scale_mlp_norm": True}, "blocks.0.mlp.norm"),
        ({"final_norm": False}, "fc_norm"),
        ({"embed_norm_layer": LayerNorm}, "patch_embed.norm"),
        ({"block_fn": ParallelScalingBlock}, "blocks.0: is a ParallelScalingBlock"),
        ({"global_pool": "max"}, "global_pool: max"),
        ({"global_pool": "map"}, "global_pool: map"),
        ({"num_classes": 0}, "head: is a Identity, so the stream is the output"),
    ],
)
def test_other_models_are_refused_by_name(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(BadInput, match=name) as refused:
        rotate_stream(timm.create_model("vit_tiny_patch16_224", **VIT | changes), torch.eye(48))
    assert "\n" not in str(refused.value)


def test_norms_of_different_eps_and_other_families_are_refused() -> None:
    model = tiny("vit")
    model.norm.eps = 1e-3
    with pytest.raises(BadInput, match="different classes or eps"):
        rotate_stream(model, torch.eye(48))
    with pytest.raises(BadInput, match="SwinTransformer: is no VisionTransformer"):
        rotate_stream(tiny("swin"), torch.eye(24))
