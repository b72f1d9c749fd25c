"""Groups of heads, channels of heads and hidden units of any model, found by tracing and proven on random weights."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from vitprune.architectures.size_attributes import Sizes, keeps_function_in_other_basis, sized, without_values
from vitprune.architectures.tracing.attention_heads import AttentionTrace, TracedUnits
from vitprune.architectures.tracing.cache import traced_attention, traced_channels
from vitprune.architectures.tracing.dependency_graph import IS_OUTPUT, ChannelGraph, ChannelGroup, run_trace
from vitprune.architectures.tracing.fingerprint import StructureCache, fingerprint
from vitprune.architectures.tracing.recorded_run import Call, record_run, recorded
from vitprune.config.prune_config import APART, HEAD_CHANNELS
from vitprune.errors import BadInput
from vitprune.groups import SUFFIXES, Group, ParamSlice, Projections, Resize, is_within, share_positions
from vitprune.runtime.wrappers import layers_of_config

KINDS = ("ffn", "head", *HEAD_CHANNELS)
MAX_PROOFS = 1024  # that are kept
NOTHING = dict.fromkeys(KINDS, "no attention with heads") | {"ffn": "no MLP or bottleneck"}


@dataclass(frozen=True)
class _Proven:
    """Groups of one kind by name, and the reasons why others are refused."""

    groups: dict[str, Group] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Units:
    """Traced units by kind, each with the path of its owner, the calls of all owners, and the groups by kind.

    `apart` are owners whose inputs do not depend on the images, such as MLPs over positions.
    """

    traced: dict[str, list[tuple[TracedUnits, str]]]
    calls: dict[str, Call]
    apart: set[str]
    proven: dict[str, _Proven] = field(default_factory=dict)


_CACHE: StructureCache[_Units] = StructureCache()
_APART: StructureCache[_Units] = StructureCache()  # of kinds qk and vo


def groups(model: nn.Module, kind: str) -> list[Group]:
    """Find all groups of one kind in any model, in the order of its forward pass.

    Args:
        model: Any model.
        kind: ffn, head or attention.

    Returns:
        The groups. Modules whose units cannot be pruned are left out, see `left_out`.

    Raises:
        BadInput: the model has no such module, or none that can be pruned; the message names one.

    Source: UP-ViTs, components 2 and 3.
    """
    proven = _proven_of(model, kind)
    if not proven.groups:
        nothing = f"{type(model).__name__}: there is {NOTHING[kind]} in it, so it has no groups of kind {kind!r}"
        nothing = _shared_weight(model) or nothing
        raise BadInput(next(iter(proven.refused.values()), nothing))
    return list(proven.groups.values())


def _shared_weight(model: nn.Module) -> str:
    """Return why the units of layers with one common weight are no groups; empty if there are no such layers."""
    names: dict[Tensor, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and (first := names.setdefault(module.weight, path)) != path:
            return same_parameter(f"{path}.weight", f"{first}.weight")
    return ""


def same_parameter(name: str, first: str) -> str:
    """Return the error message for two layers with one common parameter, given by its two names."""
    return f"{name}: is the same parameter as {first}; give each layer its own (copy.deepcopy)"


def left_out(model: nn.Module, kind: str) -> dict[str, str]:
    """Return why modules with units of one kind are not pruned.

    Args:
        model: Any model.
        kind: Kind of units; other kinds than ffn, head and attention have no such modules.

    Returns:
        The reasons by name of the group that the units would have.

    Raises:
        BadInput: the model does not run.
    """
    return dict(_proven_of(model, kind).refused) if kind in KINDS else {}


def merge_heads(model: nn.Module, group: Group, number: int) -> Group:
    """Return the group of channels with its heads merged: consecutive heads become one.

    Args:
        model: The model.
        group: A group of kind attention; groups of other kinds are returned unchanged.
        number: Number of heads after merging.

    Returns:
        The group of shape (number, channels of a merged head).

    Raises:
        BadInput: the number does not divide the number of heads, or each head has its own parameters.

    Source: UP-ViTs, merging h_b heads into h_t.
    """
    if group.kind != "attention" or group.shape[0] == number:
        return group
    if group.shape[0] % number:
        raise BadInput(f"{group.name}: {group.shape[0]} heads cannot merge into {number}; give a divisor")
    heads = _proven_of(model, "head").groups.get(group.name + SUFFIXES["head"])
    sizes, of_heads = (getattr(one and one.resize, "__self__", None) for one in (group, heads))
    if heads is None or not isinstance(sizes, Sizes) or not isinstance(of_heads, Sizes):
        raise BadInput(_refusal(group.owner, model.get_submodule(group.owner), "its heads cannot be cut or merged"))
    sites = {(part.param, part.axis) for part in group.slices}
    names = [part.param for part in heads.slices if (part.param, part.axis) not in sites]
    if names or any(part.runs > 1 for part in group.slices):
        what = "rows" if not names else "position table" if "position" in names[0] else names[0].rpartition(".")[2]
        why = f"each head has its own {what}, so heads cannot merge"
        raise BadInput(_refusal(group.owner, model.get_submodule(group.owner), why))
    return replace(group, shape=(number, group.units // number), resize=sizes.with_heads(of_heads).record)


def size_attributes_of(groups: Sequence[Group]) -> tuple[str, ...]:
    """Return the names of all attributes that traced groups change with their shape.

    Args:
        groups: Groups of any kind.

    Returns:
        The names, and the modules that get another forward pass, each once.
    """
    recorded = [getattr(group.resize, "__self__", None) for group in groups]
    sizes = [one for one in recorded if isinstance(one, Sizes)]
    names = [str(attribute) for one in sizes for attribute in one.attributes]
    names += [f"the forward pass of {path or 'the module'}" for one in sizes for path, _ in one.classes]
    return tuple(dict.fromkeys(names))


def _proven_of(model: nn.Module, kind: str) -> _Proven:
    units = _APART.value_for(model, _trace_apart) if kind in APART else _CACHE.value_for(model, _trace)
    if kind not in units.proven:
        units.proven[kind] = _prove_all(model, kind, units)
    return units.proven[kind]


def _trace(model: nn.Module) -> _Units:
    channels, attention = traced_channels(model), traced_attention(model)
    hidden = _hidden_units(model, channels, attention)
    traced = {
        kind: [(group, _owner(group.channels, group.modules)) for group in of_kind if _is_cuttable(group)]
        for kind, of_kind in (("ffn", hidden), ("head", attention.heads), *attention.channels.items())
    }
    mixers = _modules_without_labels(model, channels)
    run, paths = recorded(model), {owner for of_kind in traced.values() for _, owner in of_kind} | set(mixers)
    calls, apart = run.calls(paths), run.apart(paths)
    if mixers:
        order = {path: number for number, (path, _) in enumerate(model.named_modules())}
        more = [(group, _owner(group.channels, ())) for path in mixers for group in _alone(model, path, calls)]
        traced["ffn"] = sorted(traced["ffn"] + more, key=lambda entry: order[entry[1]])
    return _Units(traced, calls, apart)


def _trace_apart(model: nn.Module) -> _Units:
    units = traced_attention(model, apart=True).channels
    traced = {kind: [(group, _owner(group.channels, group.modules)) for group in units.get(kind, ())] for kind in APART}
    run, paths = recorded(model), {owner for of_kind in traced.values() for _, owner in of_kind}
    return _Units(traced, run.calls(paths), set())


def _is_in_part(group: TracedUnits) -> bool:
    """Whether a layer reads or writes other channels too; such hidden units are named by the layer that writes them."""
    return any(part.start is not None for part in group.channels.slices)


def _is_cuttable(group: TracedUnits) -> bool:
    return group.heads > 1 or any(part.axis == 1 for part in group.channels.slices) or bool(group.why_not)


def _hidden_units(
    model: nn.Module, all_channels: Sequence[ChannelGroup], attention: AttentionTrace
) -> list[TracedUnits]:
    """Channels that are written and read inside one module, and are neither heads, nor a stem, nor a stream."""
    of_heads: dict[tuple[str, int | None], list[tuple[ParamSlice, int]]] = defaultdict(list)
    for part, units in ((part, one.channels.units) for one in attention.heads for part in one.channels.slices):
        of_heads[part.param, part.axis].append((part, units))
    stem = set(_stem(all_channels))
    first = next((name for one in all_channels for name in one.writers), "")
    hidden = []
    for channels in all_channels:
        sites = {(part.param, part.axis) for part in channels.slices}
        is_read = any(axis == 1 for _, axis in sites)
        is_inner = channels.kind == "ffn" or (channels.kind == "residual" and len(channels.writers) == 1)
        heads = [(part, other) for part in channels.slices for other in of_heads[part.param, part.axis]]
        if not is_inner or not channels.writers:
            continue
        if any(share_positions((part, channels.units), other) for part, other in heads):
            continue
        owner, is_lost = _owner(channels, ()), channels.why_not and not channels.why_not.endswith(IS_OUTPUT)
        if not is_read and is_lost:  # its labels end within the module
            owner = channels.writers[0].rpartition(".")[0].rpartition(".")[0]
        if channels.roots in stem and is_within(first, [owner]):
            continue
        why = channels.why_not or (channels.normalized and f"{channels.normalized}: a norm couples its hidden units")
        group = TracedUnits(channels, channels.units, (owner,), why)
        beside = owner not in attention.modules or _is_in_part(group)
        if owner and (is_read or is_lost) and beside and not _is_outer(model, owner):
            hidden.append(group)
    return hidden


def _stem(all_channels: Sequence[ChannelGroup]) -> Iterator[tuple[int, ...]]:
    """Yield the roots of the channels before the first residual stream, through which all of the image passes."""
    source = {part.param: one.roots for one in all_channels for part in one.slices if part.axis == 1}
    stem: set[tuple[int, ...]] = set()
    for number, channels in enumerate(all_channels):
        read = {source.get(name) for name in channels.writers}
        if channels.kind == "ffn" and read and (number == 0 or read <= stem):
            stem.add(channels.roots)
            yield channels.roots


def _is_outer(model: Any, owner: str) -> bool:
    """Whether a module is a list of blocks, or contains the classifier."""
    module = model.get_submodule(owner)
    is_list = isinstance(module, nn.Sequential | nn.ModuleList)
    layers = [sum(parameter.dim() > 1 for parameter in child.parameters()) for child in module.children()]
    classifiers = layers_of_config(model, "classifier")
    return (is_list and max(layers, default=0) > 1) or any(is_within(name, [owner]) for name in classifiers)


def _modules_without_labels(model: nn.Module, all_channels: Sequence[ChannelGroup]) -> list[str]:
    """Return modules whose layers mix tokens: their channels are a second axis of channels, which one trace lacks."""
    traced = {part.param for channels in all_channels for part in channels.slices if part.param.endswith(".weight")}
    missing = [
        path.rpartition(".")[0]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{path}.weight" not in traced
    ]
    return [path for path in dict.fromkeys(missing) if path and missing.count(path) > 1]


def _alone(model: nn.Module, path: str, calls: dict[str, Call]) -> list[TracedUnits]:
    """Return the hidden units of a module in a trace of its own."""
    args, kwargs = calls.get(path, ((), {}))
    if kwargs or len(args) != 1:
        return []
    copied, result = without_values(model.get_submodule(path)), []
    try:
        trace = run_trace(record_run(copied, args[0]))
    except Exception:  # a forward pass may raise anything
        return []
    for channels in ChannelGraph(trace, copied).groups():
        if channels.kind == "ffn" and channels.writers and any(part.axis == 1 for part in channels.slices):
            slices, buffers = (
                tuple(replace(part, param=f"{path}.{part.param}") for part in parts)
                for parts in (channels.slices, channels.buffers)
            )
            writers = tuple(f"{path}.{name}" for name in channels.writers)
            named = replace(channels, slices=slices, buffers=buffers, writers=writers)
            result.append(TracedUnits(named, channels.units, (), channels.why_not))
    return result


def _owner(channels: ChannelGroup, modules: Iterable[str]) -> str:
    """Path of the innermost module that contains all slices and the given modules; empty for the model."""
    params = [part.param for part in channels.slices + channels.buffers]
    paths = [param.rpartition(".")[0].split(".") for param in params or channels.writers]
    paths += [path.split(".") for path in modules]
    common = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


_PROOFS: "dict[Hashable, _Proof | BadInput]" = {}


def _prove_all(model: nn.Module, kind: str, units: _Units) -> _Proven:
    """Find and prove on its module which size attributes change with every group; equal modules are proven once."""
    of_ffn, result = kind == "ffn", _Proven()
    owners = [owner for group, owner in units.traced.get(kind, ()) if not (of_ffn and _is_in_part(group))]
    taken = {owner for _, owner in units.traced.get("attention", []) + units.traced["head"]} if of_ffn else set()
    for group, owner in units.traced.get(kind, ()):
        is_alone = owners.count(owner) == 1 and owner not in taken and not (of_ffn and _is_in_part(group))
        name = _name(kind, owner, group, is_alone)
        module, call = model.get_submodule(owner), units.calls.get(owner)
        why = group.why_not or ("its inputs are not those of images" if of_ffn and owner in units.apart else "")
        if why or call is None:
            result.refused[name] = _refusal(owner, module, why or "it does not run as a module of its own")
            continue
        relative, sizes = _below(owner, kind, name, group)
        proof = _proof_of(relative, module, call, sizes)
        if isinstance(proof, BadInput):
            result.refused[name] = _refusal(owner, module, str(proof))
        else:
            layers = group.projections if proof.any_basis else ()
            projections = Projections(layers, group.heads) if layers else None
            result.groups[name] = replace(
                relative,
                slices=group.channels.slices,
                buffers=group.channels.buffers,
                owner=owner,
                resize=proof.resize,
                projections=_tied_projections(model, group) if kind in APART else projections,
            )
    return result


def _tied_projections(model: nn.Module, group: TracedUnits) -> Projections | None:
    """Return the projections of the attention that channels of q and k, or of v and output, belong to."""
    params = {part.param for part in group.channels.slices}
    for attention in _proven_of(model, "attention").groups.values():
        layers = attention.projections.layers if attention.projections else ()
        if not params.isdisjoint(f"{path}.weight" for path in layers):
            return attention.projections
    return None


@dataclass(frozen=True)
class _Proof:
    """How a group records its sizes, and whether its channels may be in any basis."""

    resize: Resize | None
    any_basis: bool


def _proof_of(group: Group, module: nn.Module, call: Call, sizes: Sizes) -> _Proof | BadInput:
    """Return the proof of a group on its owner, the one of an equal module if there is one."""
    structure = fingerprint(module)
    if structure is None:
        return _prove(group, module, call, sizes)
    key = (structure, group.kind, group.slices, group.buffers, group.shape, group.projections, sizes, repr(call))
    if key not in _PROOFS:
        if len(_PROOFS) >= MAX_PROOFS:
            _PROOFS.clear()
        _PROOFS[key] = _prove(group, module, call, sizes)
    return _PROOFS[key]


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
    shape = (group.heads, group.width) if kind in HEAD_CHANNELS else (channels.units,)
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


def _name(kind: str, owner: str, group: TracedUnits, is_alone: bool) -> str:
    if not (is_alone and owner) and group.channels.writers:
        owner = group.channels.writers[0].removesuffix(".weight")
    return f"{owner}{SUFFIXES.get(kind, '')}"


def _refusal(owner: str, module: nn.Module, why: str) -> str:
    name = f"{owner or 'model'} ({type(module).__name__}): "
    return f"{name}{why.removeprefix(name)}; this module cannot be pruned"
