"""Find groups module by module: every known attention or MLP, in any model."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from timm.layers import AttentionPoolLatent
from torch import nn

from vitprune.architectures import attention, mlp, traced_groups
from vitprune.architectures.slices import not_prunable
from vitprune.architectures.tracing.cache import traced_channels, trial_run
from vitprune.errors import BadInput
from vitprune.groups import Group, is_within

KINDS = ("ffn", "head", "attention")
MODULE_NAMES = {"ffn": "MLP", "head": "attention", "attention": "attention"}
MLP_CLASSES = re.compile(r"mlp|ffn|feedforward|glu|bottleneck|mbconv|inverted|basicblock", re.IGNORECASE)
NOT_MLP_CLASSES = re.compile(r"head|norm", re.IGNORECASE)
ATTENTION_CLASSES = re.compile(r"(?i:attn|attention|mhsa|rel(ative)?pos)|MSA|Msa|MLA|XCA|GPSA")


def groups(model: nn.Module, kind: str) -> list[Group]:
    """Find all groups of one kind, in the order of the model's modules; attention pooling is not pruned.

    Args:
        model: any timm model.
        kind: ffn, head or attention.

    Raises:
        BadInput: the model has no such module, or one that cannot be pruned or is of an unknown class.
    """
    known = _is_known_mlp if kind == "ffn" else attention.is_known
    excluded = [path for path, module in model.named_modules() if isinstance(module, AttentionPoolLatent)]
    result: list[Group] = []
    traced: dict[str, list[Group]] = {}
    for path, module in model.named_modules():
        if is_within(path, excluded):
            continue
        if known(module):
            result += mlp.groups(path, module) if kind == "ffn" else attention.groups(kind, path, module)
        elif path and _looks_like(kind, module) and not _is_covered(model, path, module, known):
            if kind != "ffn":
                result += [one for one in traced_groups.groups_within(model, kind, path) if one not in result]
                continue
            traced[path] = _traced_mlp_groups(model, path)
            if not traced[path]:
                raise not_prunable(path, module, f"this {MODULE_NAMES[kind]} is not supported")
            result += traced[path]
    if traced:
        trial = [group for groups_of_module in traced.values() for group in groups_of_module]
        trial_run(model, trial, f"fewer hidden units in {', '.join(traced)}")
    if not result:
        name = type(model).__name__
        raise BadInput(f"{name}: there is no {MODULE_NAMES[kind]} in it, so it has no groups of kind {kind!r}")
    return result


def _traced_mlp_groups(model: nn.Module, path: str) -> list[Group]:
    """Hidden units of an MLP of an unknown class, by trace: channels that are written and read only inside it."""
    result = []
    for channels in traced_channels(model):
        inside = all(is_within(part.param, [path]) for part in channels.slices)
        is_read = any(part.axis == 1 for part in channels.slices)
        prunable = channels.kind == "ffn" and channels.units > 1 and not channels.why_not
        if prunable and channels.writers and inside and is_read:
            name = f"{channels.writers[0].rpartition('.')[0]}.units"
            units = (channels.units,)
            result.append(Group(name, "ffn", units, channels.slices, buffers=channels.buffers, is_traced=True))
    return result


def _is_known_mlp(module: nn.Module) -> bool:
    return type(module) in mlp.SPECS


def _looks_like(kind: str, module: nn.Module) -> bool:
    """Whether a module is an MLP or attention, by the name of its class or by its layers."""
    name = type(module).__name__
    if not any(True for _ in module.parameters()):
        return False
    if kind == "ffn":
        has_fc1_fc2 = {leaf for leaf, _ in module.named_children()} >= {"fc1", "fc2"}
        is_mlp = MLP_CLASSES.search(name) or (has_fc1_fc2 and not re.search(r"SE|Squeeze", name))
        return bool(is_mlp) and not NOT_MLP_CLASSES.search(name)
    return bool(ATTENTION_CLASSES.search(name)) or "num_heads" in vars(module)


def _is_covered(model: nn.Module, path: str, module: nn.Module, known: Callable[[nn.Module], bool]) -> bool:
    """Whether a module is inside a known one, or contains one."""
    return any(known(inner) for inner in module.modules()) or any(known(outer) for outer in _ancestors(model, path))


def _ancestors(model: Any, path: str) -> Iterator[nn.Module]:
    names = path.split(".")
    for length in range(1, len(names)):
        yield model.get_submodule(".".join(names[:length]))
