"""Rotate the residual stream of a plain ViT: an orthogonal matrix is put into the weights that write and read it.

LayerNorm is RmsNorm of the centred stream, after its scale and shift are moved into the layers that read it. RmsNorm
gives the same result in every orthonormal basis, so the logits do not change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention, LayerScale, Mlp, PatchEmbed, RmsNorm
from timm.models._input import update_model_args
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitprune.architectures import find_groups
from vitprune.errors import BadInput
from vitprune.groups import CHANNEL_NORMS

TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")
HEADS = ("head", "head_dist")
POOLS = ("", "token", "avg")  # the same in every basis


@dataclass(frozen=True)
class StreamLayers:
    """Layers around the residual stream of a ViT.

    Attributes:
        readers: By path of a norm of the stream, the paths of the Linear layers that read its output.
        writers: By path of a layer that writes the stream, the path of the LayerScale that follows; empty for none.
        tokens: Names of the parameters that are added to the stream, (..., d).
    """

    readers: Mapping[str, tuple[str, ...]]
    writers: Mapping[str, str]
    tokens: tuple[str, ...]


def stream_layers(model: Any) -> StreamLayers:
    """Return the layers around the residual stream of a timm ViT, DeiT or another model of timm's plain blocks.

    Raises:
        BadInput: the model is no plain pre-norm ViT, so its stream cannot be rotated; the message names the module.
    """
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise _refused(type(model).__name__, "is no VisionTransformer or VisionTransformerDistilled of timm")
    if model.global_pool not in POOLS:
        raise _refused("global_pool", f"{model.global_pool} is not the same in every basis")
    if not isinstance(model.head, nn.Linear):
        raise _refused("head", f"is a {type(model.head).__name__}, so the stream is the output of the model")
    expected = {"patch_embed": PatchEmbed}
    for path in (f"blocks.{index}" for index in range(len(model.blocks))):
        expected |= {path: Block, f"{path}.attn": Attention, f"{path}.mlp": Mlp}
    for path, kind in expected.items():
        if type(module := model.get_submodule(path)) is not kind:
            raise _refused(path, f"is a {type(module).__name__}, not timm's {kind.__name__}")
    result = _plain_layers(model)
    _check_norms(model, result)
    _check_channels(model, result)
    return result


@torch.no_grad()
def rotate_stream(model: nn.Module, matrix: Tensor) -> nn.Module:
    """Rotate the residual stream of a ViT, in place; the logits do not change.

    LayerNorms are replaced by RmsNorms without learned scale, and `norm_layer` is recorded for `timm.create_model`. If
    their eps is not the default of RmsNorm, the stream is scaled to have the same effect. LayerScales become 1.

    Args:
        model: A plain ViT, see `stream_layers`.
        matrix: Orthogonal, (d, d); its columns are the new channels.

    Returns:
        The model.

    Raises:
        BadInput: as `stream_layers`.

    Source: SliceGPT (Ashkboos et al., ICLR 2024).
    """
    layers = stream_layers(model)
    norms = {path: model.get_submodule(path) for path in layers.readers}
    first, width = next(iter(norms.values())), len(matrix)
    basis = matrix.to(next(model.parameters()).device, torch.float64)
    to_stream = basis.T
    if isinstance(first, nn.LayerNorm):
        to_stream = (basis.T - basis.mean(dim=0)[:, None]) * (RmsNorm(width).eps / first.eps) ** 0.5
    for path, norm in norms.items():
        for reader in layers.readers[path]:
            _rotate_reader(model.get_submodule(reader), norm, basis)
        _reset_norm(model, path, norm, width)
    for path, scale in layers.writers.items():
        _rotate_writer(model.get_submodule(path), model.get_submodule(scale) if scale else None, to_stream)
    for name in layers.tokens:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.double() @ to_stream.T)
    if isinstance(first, nn.LayerNorm):
        qkv_bias = any(path.endswith("qkv") and model.get_submodule(path).bias is not None for path in _readers(layers))
        update_model_args(model, norm_layer="rmsnorm", qkv_bias=qkv_bias)
    return model


def _refused(what: str, why: str) -> BadInput:
    return BadInput(
        f"{what}: {why}; its stream can be neither rotated nor refitted: set prune.rotate_residual to false, and use "
        "upvits-fisher or channel-magnitude for residual channels"
    )


def _readers(layers: StreamLayers) -> list[str]:
    return [path for paths in layers.readers.values() for path in paths]


def _plain_layers(model: Any) -> StreamLayers:
    """Return the layers around the stream of a ViT of plain blocks."""
    readers: dict[str, tuple[str, ...]] = {}
    writers = {"patch_embed.proj": ""}
    for index, block in enumerate(model.blocks):
        path = f"blocks.{index}"
        readers |= {f"{path}.norm1": (f"{path}.attn.qkv",), f"{path}.norm2": (f"{path}.mlp.fc1",)}
        writers[f"{path}.attn.proj"] = f"{path}.ls1" if isinstance(block.ls1, LayerScale) else ""
        writers[f"{path}.mlp.fc2"] = f"{path}.ls2" if isinstance(block.ls2, LayerScale) else ""
    last = "fc_norm" if isinstance(model.norm, nn.Identity) else "norm"
    readers[last] = tuple(name for name in HEADS if isinstance(getattr(model, name, None), nn.Linear))
    parameters = dict(model.named_parameters(recurse=False))
    return StreamLayers(readers, writers, tuple(name for name in TOKENS if name in parameters))


def _check_norms(model: nn.Module, layers: StreamLayers) -> None:
    """Refuse norms that are not between the stream and Linear layers, and norms of different classes or eps."""
    norms = {path: module for path, module in model.named_modules() if isinstance(module, CHANNEL_NORMS)}
    for path, norm in norms.items():
        if path not in layers.readers:
            raise _refused(path, f"is a {type(norm).__name__} that is not between the stream and a Linear layer")
    kinds = set()
    for path in layers.readers:
        if not isinstance(norm := norms.get(path), nn.LayerNorm | RmsNorm):
            raise _refused(path, f"is a {type(model.get_submodule(path)).__name__}, not a LayerNorm or RmsNorm")
        kinds.add((isinstance(norm, nn.LayerNorm), norm.eps))
    if len(kinds) > 1:
        raise _refused(type(model).__name__, "its norms have different classes or eps")


def _check_channels(model: nn.Module, layers: StreamLayers) -> None:
    """Refuse a model in which another parameter has the channels of the stream.

    Raises:
        BadInput: also if the stream cannot be pruned, for example because it is the output of the model.
    """
    parameters = dict(model.named_parameters())
    known = {(f"{path}.weight", 1) for path in _readers(layers)}
    known |= {(f"{path}.{leaf}", 0) for path in (*layers.readers, *layers.writers) for leaf in ("weight", "bias")}
    known |= {(f"{path}.gamma", 0) for path in layers.writers.values() if path}
    known |= {(name, parameters[name].dim() - 1) for name in layers.tokens}
    known = {(name, axis) for name, axis in known if name in parameters}
    (group,) = find_groups(model, ["residual"])
    different = known ^ {(part.param, part.axis) for part in group.slices}
    if different:
        raise _refused(min(different)[0], "is not used as in a plain ViT")


def _rotate_reader(layer: Any, norm: Any, basis: Tensor) -> None:
    """Move the scale and shift of a norm into a layer that reads it, and rotate the layer's inputs."""
    weight = layer.weight.double()
    if getattr(norm, "bias", None) is not None:
        shift = weight @ norm.bias.double()
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]))
        layer.bias.copy_(layer.bias.double() + shift)
    layer.weight.copy_(weight * norm.weight.double() @ basis)


def _reset_norm(model: nn.Module, path: str, norm: Any, width: int) -> None:
    """Set the learned scale of an RmsNorm to 1; replace a LayerNorm by an RmsNorm."""
    if isinstance(norm, nn.LayerNorm):
        parameter = next(model.parameters())
        parent, _, leaf = path.rpartition(".")
        new = RmsNorm(width, device=parameter.device, dtype=parameter.dtype).train(norm.training)
        setattr(model.get_submodule(parent), leaf, new)
    else:
        norm.weight.fill_(1)


def _rotate_writer(layer: Any, scale: LayerScale | None, to_stream: Tensor) -> None:
    """Rotate the outputs of a layer that writes the stream; a LayerScale is moved into it."""
    matrix = to_stream if scale is None else to_stream * scale.gamma.double()
    layer.weight.copy_((matrix @ layer.weight.double().flatten(1)).view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(matrix @ layer.bias.double())
    if scale is not None:
        scale.gamma.fill_(1)
