"""Groups of single weights (unstructured pruning) of all layers but stem, classifier and depth-wise convolutions."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vitprune.architectures.slices import not_prunable, weight_group
from vitprune.architectures.tracing.cache import end_layers
from vitprune.errors import BadInput
from vitprune.groups import Group, is_within
from vitprune.runtime.wrappers import layers_of_config

INNER_LAYERS = ("conv", "linear", "ln")  # names of a layer inside a module with its norm
LAYER_TYPES = {"q": "qkv", "k": "qkv", "v": "qkv", "kv": "qkv", "qk": "qkv", "fc1": "mlp", "fc2": "mlp"}
LAYER_TYPES |= {"fc1_g": "mlp", "fc1_x": "mlp"}


@dataclass(frozen=True)
class Recipe:
    """Layers of a model family that differ from those of other models, by patterns of paths as in `fnmatch`.

    Attributes:
        keep: Layers whose weights are kept, besides stem, classifier and depth-wise convolutions.
        types: All types of layers (DIMAP modules) of the family; a layer of another type is an error. Empty: any. With
            the type stem, the layers of the stem after the first one are pruned.
        others: Types of layers whose type is not told by their last name.
    """

    keep: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)


ANY_LAYERS = Recipe()


def _matrix_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Paths and modules of all layers whose weight has two axes or more; a layer that runs several times is one."""
    for path, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.dim() > 1:
            yield path, module


def single_weights(model: nn.Module, recipe: Recipe = ANY_LAYERS) -> list[Group]:
    """Return the groups of single weights of all Linear and Conv2d layers, one per layer, in the model's order.

    Stem, classifier and depth-wise convolutions are not pruned. The layer types are qkv, proj and mlp as in DIMAP, and
    the names of layers otherwise.

    Args:
        model: Any model.
        recipe: The exceptions of its family.

    Raises:
        BadInput: a layer does not use its weights unchanged or is unknown in its family, or there is no layer to prune.
    """
    layers = [(path, layer) for path, layer in _matrix_layers(model) if path and _is_prunable(layer, recipe)]
    kept = _stem_and_classifier(model, "stem" in recipe.types) if layers else set()
    layers = [(path, layer) for path, layer in layers if not is_within(path, kept) and not _matches(path, recipe.keep)]
    if not layers:
        raise BadInput(
            f"{type(model).__name__}: this model is not supported; it has no Linear or Conv2d layer to prune"
        )
    return [_weight_group(model, path, layer, recipe) for path, layer in layers]


def _weight_group(model: nn.Module, path: str, layer: nn.Module, recipe: Recipe) -> Group:
    _refuse_own_class(model, path)
    layer_type = _layer_type(path, recipe)
    if recipe.types and layer_type not in recipe.types:
        raise not_prunable(path, layer, "not in the table of prunable layers")
    return weight_group(path, layer, layer_type)


def dense_projections(model: nn.Module) -> dict[str, str]:
    """Return the fused projections of torch's attention, which are parameters without a layer, with the reason."""
    fused = [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return {f"{path}.in_proj_weight": f"{path}.in_proj_weight: is no layer; it is not pruned" for path in fused}


def _is_prunable(layer: nn.Module, recipe: Recipe) -> bool:
    if isinstance(layer, nn.Conv2d):
        return not 1 < layer.groups == layer.in_channels
    return isinstance(layer, nn.Linear) or bool(recipe.types)  # a layer of another class is an error there


def _matches(path: str, patterns: Iterable[str]) -> str:
    """Return the first pattern that a path matches; empty if there is none."""
    return next((pattern for pattern in patterns if fnmatchcase(path, pattern)), "")


def _refuse_own_class(model: nn.Module, path: str) -> None:
    """Refuse a layer inside a module that is neither timm's nor of the model's package: its weight may be added to."""
    known = {"timm", "torch", "torchvision", "vitprune", _package(model)}
    names = path.split(".")
    for length in range(1, len(names)):
        outer = ".".join(names[:length])
        module = model.get_submodule(outer)
        if _package(module) not in known:
            raise not_prunable(outer, module, "its class is not timm's, so the use of its weights is unknown")


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _stem_and_classifier(model: nn.Module, first_layer_only: bool) -> set[str]:
    """Paths of the stem and the classifiers: those of timm's config, else the first and the last layer that runs."""
    first, classifiers = layers_of_config(model, "first_conv"), layers_of_config(model, "classifier")
    modules = dict(model.named_modules())
    if first and all(path in modules for path in first):
        return {path if first_layer_only else _stem(path) for path in first} | set(classifiers)
    return set(end_layers(model))


def _stem(path: str) -> str:
    """Path of the stem of a first convolution: patch_embed for patch_embed.proj, stem.0 for stem.0.conv."""
    first, *others = path.split(".")
    return f"{first}.{others[0]}" if len(others) > 1 and others[0].isdecimal() else first


def _layer_type(path: str, recipe: Recipe) -> str:
    """DIMAP module by the last name in a path that is neither a number nor in INNER_LAYERS, else that name.

    Layers of an nn.Sequential without such a name have the empty one, so that they are ranked together.
    """
    if pattern := _matches(path, recipe.others):
        return recipe.others[pattern]
    names = [name for name in path.split(".") if not name.isdecimal()]
    name = next((name for name in reversed(names) if name not in INNER_LAYERS), names[-1] if names else "")
    return LAYER_TYPES.get(name, name)
