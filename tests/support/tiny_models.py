"""Small timm models in double precision, with weights large enough that every unit matters."""

import copy
import functools

import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vitprune import count
from vitprune.data import example_input

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
ODD = {"img_size": 24, "patch_size": 8, "embed_dim": 45, "depth": 3, "num_heads": 5, "mlp_ratio": 2.2, "num_classes": 5}
EXTRA = {"init_values": 0.1, "reg_tokens": 2, "qkv_bias": False, "no_embed_class": True, "global_pool": "avg"}
SWIN = {
    "img_size": 32,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (3, 6),
    "window_size": 4,
    "num_classes": 7,
}
PVT = {
    "depths": (2, 1, 1),
    "embed_dims": (16, 24, 40),
    "num_heads": (2, 3, 4),
    "mlp_ratios": (2.0, 1.5, 2.0),
    "sr_ratios": (4, 2, 1),
    "num_classes": 7,
}
ZOO = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "thin": ("vit_tiny_patch16_224", VIT | {"mlp_ratio": 0.5}),
    "deit": ("deit_tiny_patch16_224", VIT | {"mlp_ratio": 3.0}),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "odd": ("vit_tiny_patch16_224", ODD),
    "extra": ("vit_tiny_patch16_224", VIT | EXTRA),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "pvt": ("pvt_v2_b0", PVT),
    "pvt-linear": ("pvt_v2_b2_li", PVT),
}


def tiny(name: str, seed: int = 0) -> nn.Module:
    """A model of the zoo, in eval mode, its weights drawn with std 0.1 (norm scales around 1)."""
    return copy.deepcopy(_made(name, seed))


@functools.cache
def _made(name: str, seed: int) -> nn.Module:
    architecture, args = ZOO[name]
    return redrawn(timm.create_model(architecture, **args), seed).double()


@torch.no_grad()
def redrawn(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = "norm" in name.split(".")[-2:][0] and name.endswith("weight")
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + float(scale))
    return model.eval()


def images(model: nn.Module, number: int = 3, seed: int = 1) -> Tensor:
    """Noise of the model's input size, in the type of its weights."""
    generator = torch.Generator().manual_seed(seed)
    patches = model.patch_embed
    size = (patches.proj.in_channels, *(patches.img_size if isinstance(patches, PatchEmbed) else (32, 32)))
    return torch.randn((number, *size), generator=generator, dtype=next(model.parameters()).dtype)


def batches(model: nn.Module, number: int = 2, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Noise with labels."""
    return [(images(model, size, 10 + n), (torch.arange(size) + n) % model.num_classes) for n in range(number)]


def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs)


def noisy(seed: int = 0) -> nn.Module:
    """A model whose training draws random numbers."""
    model = tiny("vit", seed)
    for block in model.blocks:
        block.mlp.drop1.p = 0.2
    return model


def cost(model: nn.Module, what: str) -> int:
    """Parameters or MACs of one image."""
    found = count(model, example_input(model, 1))
    return found.params if what == "params" else found.macs


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def random_masks(groups: list, removed: int | float, seed: int = 0) -> dict[str, Tensor]:
    """Masks that remove that many (or that share) of each group's units, the same number of each head."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in groups:
        row = group.shape[-1] if len(group.shape) > 1 else group.units
        count = round(removed * row) if isinstance(removed, float) else removed
        order = torch.rand((group.units // row, row), generator=generator).argsort(1)
        masks[group.name] = (order >= count).view(group.shape)
    return masks
