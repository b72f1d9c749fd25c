"""Groups of models of any library, found by tracing: proven by removal, or refused by name."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers.lambda_layer import LambdaLayer
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.model_zoo import SMALL, tiny
from tests.support.other_models import MODELS, make_model
from tests.support.pruned_models import rebuild
from vitprune import BadInput, find_groups, permute, shrink, zero
from vitprune.architectures import structure, traced_groups
from vitprune.evaluation.check_model import random_odd_masks
from vitprune.runtime.input_size import input_size
from vitprune.runtime.outputs import main_tensor
from vitprune.runtime.random_parameters import randomize_parameters

SIZES = {"torchvision maxvit": (64, 64)}
REFUSED = {
    ("dinov3", "attention"): r"^model.layer.0.attention \(DINOv3ViTAttention\): its forward pass needs the old sizes; ",
    ("sam", "attention"): r"^vision_encoder.layers.0.attn \(\w+\): heads share its channels; this module cannot",
}


def images_for(name: str, model: nn.Module) -> Tensor:
    size = SIZES.get(name, input_size(model)[1:])
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def assert_zero_equals_shrink(dense: nn.Module, kind: str, images: Tensor, ratio: float = 0.5) -> None:
    groups = find_groups(dense, [kind], images)
    masks = random_odd_masks(groups, ratio)
    zeroed, cut = zero(copy.deepcopy(dense), groups, masks), shrink(copy.deepcopy(dense), groups, masks)
    expected, output = (main_tensor(model(images)) for model in (zeroed, cut))
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in dense.parameters())
    kept = {
        group.name: masks[group.name].view(group.shape).flatten(1) if group.shape[1:] else masks[group.name][None]
        for group in groups
    }
    again = {group.name: group.shape[-1] for group in find_groups(cut, [kind])}
    assert again == {name: int(mask[0].sum()) for name, mask in kept.items()}


@pytest.mark.parametrize("kind", ["ffn", "head", "attention"])
@pytest.mark.parametrize("name", list(MODELS))
def test_models_of_other_libraries_are_proven(name: str, kind: str) -> None:
    dense = randomize_parameters(make_model(name))
    if (name, kind) in REFUSED:
        with pytest.raises(BadInput, match=REFUSED[name, kind]):
            find_groups(dense, [kind])
    else:
        assert_zero_equals_shrink(dense, kind, images_for(name, dense))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "levit_128s", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("kind", ["head", "ffn"])
def test_permuting_traced_units_does_not_change_the_function(name: str, kind: str) -> None:
    dense = randomize_parameters(timm.create_model(name, num_classes=7, **SMALL[name]))
    groups = traced_groups.groups(dense, kind)
    generator = torch.Generator().manual_seed(0)
    orders = {group.name: torch.randperm(group.units, generator=generator) for group in groups}
    images = torch.randn(1, *input_size(dense), dtype=torch.float64)
    with torch.no_grad():
        expected = dense(images)
        torch.testing.assert_close(permute(dense, groups, orders)(images), expected, rtol=1e-9, atol=1e-9)


class Attention(nn.Module):
    """Attention with unusual attribute names: n heads of size c from three layers, a gate and a bias per head."""

    def __init__(self, width: int, heads: int, shared: int = 1):
        super().__init__()
        self.n, self.c, self.all, self.share = heads, width // heads, width, shared
        self.asks, self.has = nn.Linear(width, width), nn.Linear(width, width // shared)
        self.gives, self.out = nn.Linear(width, width // shared), nn.Linear(width, width)
        self.gate, self.near = nn.Parameter(torch.ones(heads, 1, 1)), nn.Parameter(torch.zeros(heads, 1, 17))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.asks(x).view(batch, tokens, self.n, self.c).transpose(1, 2)
        k, v = (
            layer(x).view(batch, tokens, -1, self.c).transpose(1, 2).repeat_interleave(self.share, 1)
            for layer in (self.has, self.gives)
        )
        shares = (q @ k.mT * self.c**-0.5 + self.near[..., :tokens]).softmax(-1) * self.gate
        return self.out((shares @ v).transpose(1, 2).reshape(batch, tokens, self.all))


class FixedAttention(Attention):
    """Attention whose forward pass contains its number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for layer in (self.asks, self.has, self.gives))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Coupled(Attention):
    """Attention with a norm over the channels of all heads."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.sub = nn.LayerNorm(width)
        self.out = nn.Sequential(self.sub, self.out)


class Encoder(nn.Module):
    """Patches, one block and a classifier."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.image_size = 16
        self.patch, self.norm1, self.norm2 = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention, self.up, self.down = attention, nn.Linear(32, 2 * 40), nn.Linear(40, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm1(x))
        a, b = self.up(self.norm2(x)).chunk(2, -1)
        return self.head((x + self.down(a * b.sigmoid())).mean(1))


class OnMap(nn.Module):
    """A module on maps (B, C, H, W) that takes tokens (B, H * W, C), and a projection."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.out = inner, nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        pixels = x.transpose(1, 2).unflatten(2, (side, side))
        return self.out(self.inner(pixels)[..., :side, :side]).flatten(2).transpose(1, 2)


class Enlarged(nn.Module):
    """Attention on a smaller map, and a transposed convolution, depth-wise or of the heads' channels."""

    def __init__(self, depthwise: bool):
        super().__init__()
        self.width, self.heads, self.qkv = 32, 4, nn.Conv2d(32, 96, 2, 2)
        self.larger = nn.ConvTranspose2d(32, 32, 4, 2, 1, groups=32 if depthwise else 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).mT.unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).mT.reshape(len(x), self.width, *(n // 2 for n in x.shape[2:]))
        return self.larger(mixed)


@pytest.mark.parametrize(
    ("attention", "units"),
    [
        (lambda: Attention(32, 4, shared=4), 4),  # all heads share one key and one value
        (lambda: OnMap(LambdaLayer(32, num_heads=4, r=3)), 4),  # one layer writes q, and a shared k and v
        (lambda: OnMap(Enlarged(depthwise=True)), 4),
        (lambda: OnMap(Enlarged(depthwise=False)), 4),
    ],
)
def test_heads_beside_other_channels_are_proven(attention: Callable[[], nn.Module], units: int) -> None:
    dense = randomize_parameters(Encoder(attention()))
    assert_zero_equals_shrink(dense, "head", torch.randn(2, 3, 16, 16, dtype=torch.float64), 0.25)
    assert [group.units for group in find_groups(dense, ["head"])] == [units]


@torch.no_grad()
def test_units_of_one_layer_are_cut_together() -> None:
    name = "vit_pwee_patch16_reg1_gap_256"
    dense = randomize_parameters(timm.create_model(name, num_classes=7, **SMALL[name]))
    groups = find_groups(dense, ["ffn", "head"])
    masks = random_odd_masks(groups, 0.5)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    zeroed, cut = zero(copy.deepcopy(dense), groups, masks), shrink(copy.deepcopy(dense), groups, masks)
    expected = zeroed(images)
    torch.testing.assert_close(cut(images), expected, rtol=1e-9, atol=1e-9)
    loaded = rebuild(copy.deepcopy(dense), structure(cut))
    loaded.load_state_dict(cut.state_dict())
    torch.testing.assert_close(loaded(images), expected, rtol=1e-9, atol=1e-9)
    orders = {group.name: torch.arange(group.units).flip(0) for group in groups}
    torch.testing.assert_close(permute(copy.deepcopy(dense), groups, orders)(images), dense(images))


@pytest.mark.parametrize("kind", ["head", "attention"])
@pytest.mark.parametrize("shared", [1, 2])
def test_a_user_defined_class_is_proven(kind: str, shared: int) -> None:
    dense = randomize_parameters(Encoder(Attention(32, 8, shared)))
    assert_zero_equals_shrink(dense, kind, torch.randn(2, 3, 16, 16, dtype=torch.float64), 0.25)
    (group,) = find_groups(dense, [kind])
    assert group.units == {"head": 8, "attention": 32}[kind] // shared
    assert {part.param for part in group.slices} >= {"attention.asks.weight", "attention.gives.bias"}
    assert ("attention.near" in {part.param for part in group.slices}) == (kind == "head")


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (lambda: FixedAttention(32, 4), r"^attention \(FixedAttention\): its forward pass needs the old sizes; "
            r"tried to change n, all \(.*\); this module cannot be pruned$"),
        (lambda: Coupled(32, 4), r"^attention \(Coupled\): attention.out.0 \(LayerNorm\): a norm over all heads "),
    ],
)  # fmt: skip
def test_attentions_that_cannot_be_pruned_are_refused_by_name(attention: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        find_groups(Encoder(attention()), ["head"])


def test_a_model_that_does_not_run_at_its_size_requires_an_example() -> None:
    model = Encoder(Attention(32, 4))
    model.head = nn.Linear(31, 5)
    with pytest.raises(BadInput, match=r"^Encoder: it does not run on images of 3 x 16 x 16 \(.*\); give example"):
        find_groups(model, ["head"])


def test_hidden_units_without_a_separate_module_are_not_found() -> None:
    with pytest.raises(BadInput, match=r"^Encoder: there is no MLP or bottleneck in it"):
        find_groups(Encoder(Attention(32, 4)), ["ffn"])


def test_models_of_one_structure_and_several_types_have_the_same_groups() -> None:
    model = Encoder(Attention(32, 4))
    first, *others = (find_groups(model.to(dtype), ["attention"])[0] for dtype in (torch.float32, torch.float64))
    assert [(group.name, group.shape) for group in others] == [(first.name, first.shape)]


def test_hidden_units_of_layers_with_one_common_weight_are_refused_by_name() -> None:
    model = tiny("vit")
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    with pytest.raises(
        BadInput, match=r"^blocks.1.mlp.fc1.weight: is the same parameter as blocks.0.mlp.fc1.weight; g"
    ):
        find_groups(model, ["ffn"])
