"""Groups of heads, channels of heads and hidden units of any model, found by tracing and proven on random weights."""

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.architectures.size_attributes import Call, Sizes, keeps_function_in_other_basis, sized
from vitprune.architectures.tracing.attention_heads import TracedUnits
from vitprune.architectures.tracing.cache import traced_attention, traced_channels
from vitprune.architectures.tracing.dependency_graph import ChannelGroup
from vitprune.architectures.tracing.example_run import with_example
from vitprune.architectures.tracing.fingerprint import StructureCache, fingerprint
from vitprune.errors import BadInput
from vitprune.groups import Group, Projections, Resize, is_within
from vitprune.runtime.eval_mode import eval_mode


@dataclass(frozen=True)
class _Found:
    """Groups of one kind by the path of their owner, and the refusals."""

    groups: dict[str, Group] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


KINDS = ("ffn", "head", "attention")
_CACHE: StructureCache[dict[str, _Found]] = StructureCache()


def groups(model: nn.Module, kind: str) -> list[Group]:
    """Find all groups of one kind in any model, in the order of its forward pass.

    Args:
        model: any model.
        kind: ffn, head or attention.

    Returns:
        The groups. Modules whose units cannot be pruned are left out, see `left_out`.

    Raises:
        BadInput: the model has no such module, or none that can be pruned; the message names one.
    """
    found = _found(model, kind)
    if not found.groups:
        nothing = f"{type(model).__name__}: its trace has no units of kind {kind!r}"
        raise BadInput(next(iter(found.refused.values()), nothing))
    return list(found.groups.values())


def left_out(model: nn.Module, kind: str) -> dict[str, str]:
    """Return the reasons why modules with units of one kind are not pruned, by group name; none for other kinds."""
    return dict(_found(model, kind).refused) if kind in KINDS else {}


def groups_within(model: nn.Module, kind: str, path: str) -> list[Group]:
    """Return the groups of one kind of a module, such as an attention of an unknown class.

    Raises:
        BadInput: its units cannot be pruned.
    """
    found = _found(model, kind)
    for name, reason in found.refused.items():
        if is_within(name, [path]):
            raise BadInput(reason)
    inside = [group for group in found.groups.values() if any(is_within(part.param, [path]) for part in group.slices)]
    if not inside and any(is_within(module, [path]) for module in traced_attention(model).modules):
        raise BadInput(_refusal(path, model.get_submodule(path), "its trace has no heads that can be cut"))
    return inside


def size_attributes_of(groups: Sequence[Group]) -> tuple[str, ...]:
    """Return the names of all attributes that traced groups change with their shape."""
    sizes = [getattr(group.resize, "__self__", None) for group in groups]
    found = [one for one in sizes if isinstance(one, Sizes)]
    names = [str(attribute) for one in found for attribute in one.attributes]
    names += [f"the forward pass of {path or 'the module'}" for one in found for path, _ in one.classes]
    return tuple(dict.fromkeys(names))


def _found(model: nn.Module, kind: str) -> _Found:
    kinds = _CACHE.value_for(model, lambda model: {})
    if kind not in kinds:
        kinds[kind] = _hidden_units(model) if kind == "ffn" else _heads(model, kind)
    return kinds[kind]


def _heads(model: nn.Module, kind: str) -> _Found:
    traced = traced_attention(model)
    return _proven(model, kind, traced.heads if kind == "head" else traced.channels)


def _hidden_units(model: nn.Module) -> _Found:
    """Channels that are written and read inside one module, and are neither heads nor a residual stream."""
    traced = traced_attention(model)
    of_heads = {(part.param, part.axis) for group in traced.heads for part in group.channels.slices}
    hidden = []
    for channels in traced_channels(model):
        sites = {(part.param, part.axis) for part in channels.slices}
        is_read = any(axis == 1 for _, axis in sites)
        if channels.kind == "ffn" and channels.writers and is_read and not sites & of_heads:
            why = channels.why_not or (
                channels.normalized and f"{channels.normalized}: a norm couples its hidden units"
            )
            if _owner(channels, ()):
                hidden.append(TracedUnits(channels, channels.units, (), why))
    return _proven(model, "ffn", hidden, {_owner(group.channels, group.modules) for group in traced.heads})


def _owner(channels: ChannelGroup, modules: Iterable[str]) -> str:
    """Path of the innermost module that contains all slices and the given modules; empty for the model."""
    paths = [part.param.rpartition(".")[0].split(".") for part in channels.slices + channels.buffers]
    paths += [path.split(".") for path in modules]
    common = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _proven(model: nn.Module, kind: str, traced: Sequence[TracedUnits], named: Collection[str] = ()) -> _Found:
    """Give every group sizes that are proven on its owner; equal modules are proven once.

    Groups are named after their owner, or after their first writer if there are several, or if the name is given away.
    """
    traced = [group for group in traced if group.heads > 1 or any(part.axis == 1 for part in group.channels.slices)]
    owners = [_owner(group.channels, group.modules) for group in traced]
    calls, found = _calls(model, set(owners)), _Found()
    known: dict[Hashable, _Proof | BadInput] = {}
    for group, owner in zip(traced, owners, strict=True):
        name = _name(kind, owner, group, owners.count(owner) + (owner in named))
        module, call = model.get_submodule(owner), calls.get(owner)
        if group.why_not or call is None:
            found.refused[name] = _refusal(owner, module, group.why_not or "it does not run as a module of its own")
            continue
        relative, sizes = _below(owner, kind, name, group)
        structure = fingerprint(module)
        key = (structure or owner, relative.slices, relative.shape, repr(call))
        if key not in known:
            known[key] = _prove(relative, module, call, sizes)
        proof = known[key]
        if isinstance(proof, BadInput):
            found.refused[name] = _refusal(owner, module, str(proof))
        else:
            layers = group.projections if proof.any_basis else ()
            found.groups[name] = replace(
                relative,
                slices=group.channels.slices,
                buffers=group.channels.buffers,
                owner=owner,
                resize=proof.resize,
                projections=Projections(layers, group.heads) if layers else None,
            )
    return found


@dataclass(frozen=True)
class _Proof:
    """How a group records its sizes, and whether its channels may be in any basis."""

    resize: Resize | None
    any_basis: bool


def _prove(group: Group, module: nn.Module, call: Call, sizes: Sizes) -> _Proof | BadInput:
    if group.shape[-1] == 1:  # nothing can be cut
        return _Proof(None, False)
    try:
        resize = sized(group, module, call, sizes).resize
    except BadInput as error:
        return error
    readers = [part.param.removesuffix(".weight") for part in group.slices if part.axis == 1]
    if group.projections is None or len(readers) != 1:
        return _Proof(resize, False)
    return _Proof(resize, keeps_function_in_other_basis(module, call, group.projections, readers[0]))


def _below(owner: str, kind: str, name: str, group: TracedUnits) -> tuple[Group, Sizes]:
    """Return the group with names relative to its owner, and its sizes before the cut."""
    channels, prefix = group.channels, f"{owner}." if owner else ""
    shape = (group.heads, group.width) if kind == "attention" else (channels.units,)
    slices, buffers = (
        tuple(replace(part, param=part.param.removeprefix(prefix)) for part in parts)
        for parts in (channels.slices, channels.buffers)
    )
    parts = {part.param: part for part in slices if part.axis == 0}
    queries = [(param.removeprefix(prefix), repetition) for param, repetition in group.queries]
    layers = tuple(path.removeprefix(prefix) for path in group.projections)
    projections = Projections(layers, group.heads) if layers and kind == "attention" else None
    sizes = Sizes(
        (group.heads, group.width), (), tuple((parts[name], number) for name, number in queries if name in parts)
    )
    return Group(name, kind, shape, slices, buffers=buffers, projections=projections, is_traced=True), sizes


def _name(kind: str, owner: str, group: TracedUnits, number: int) -> str:
    if number > 1 and group.channels.writers:
        owner = group.channels.writers[0].removesuffix(".weight")
    return f"{owner}.heads" if kind == "head" else owner


def _refusal(owner: str, module: nn.Module, why: str) -> str:
    name = f"{owner or 'model'} ({type(module).__name__}): "
    return f"{name}{why.removeprefix(name)}; this module cannot be pruned"


def _calls(model: nn.Module, paths: set[str]) -> dict[str, Call]:
    """Arguments of the first call of modules, tensors on the meta device."""

    def run(copy: nn.Module, inputs: Tensor) -> dict[str, Call]:
        calls: dict[str, Call] = {}
        for path in paths:
            hook = partial(_record_call, calls, path)
            copy.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad(), eval_mode(copy):
            copy(inputs)
        return calls

    return with_example(model, run)


def _record_call(
    calls: dict[str, Call], path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    calls.setdefault(path, (_on_meta(args), _on_meta(kwargs)))


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    return type(value)(_on_meta(item) for item in value) if type(value) in (tuple, list) else value
