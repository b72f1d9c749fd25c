"""Prunable groups of units: `zero` sets removed units to zero, `shrink` cuts them out, `permute` re-orders units."""

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from timm.layers import RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.eval_mode import drop_cached
from vitprune.runtime.wrappers import plain_model

CHANNEL_NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d)  # with a normalized_shape
REMOVED = ("branch", "block")  # kinds whose units are modules; blocks are removed last, since they are renumbered
RECORDED_SHAPES = "vitprune_shapes"  # attribute of a model
SUFFIXES = {"head": ".heads", "qk": ".qk", "vo": ".vo"}  # of the names of groups by kind; others have none
EMPTY = (dict, OrderedDict, set, list)  # types of attributes that `meta_copy` copies itself if they are empty
Scores = dict[str, Tensor]
"""Importance of the units by group name, each tensor of the group's shape; larger = more important."""
Masks = dict[str, Tensor]
"""Boolean tensor by group name, of the group's shape: True for units that remain, False for removed units."""
Resize = Callable[[nn.Module, tuple[int, ...]], None]
Drop = Callable[[nn.Module, Tensor], None]


@dataclass(frozen=True)
class ParamSlice:
    """Positions of a group's units in one parameter or buffer.

    The axis is read as (outer, units, inner): all units are repeated `outer` times, and every unit has `inner`
    consecutive positions. With `heads`, it is read as (outer, heads, runs, units / heads, inner): the units of one head
    are repeated `runs` times before those of the next head. With `segments`, the repetitions differ in width, as those
    of queries, keys and values of one layer may. With `start`, the axis has other positions before and after these.

    Attributes:
        param: Name of the parameter or buffer.
        axis: Axis of the units; None if every element of the parameter is a unit.
        outer: Number of repetitions of all units.
        inner: Number of consecutive positions of one unit.
        heads: Number of heads that the units are divided into.
        runs: Number of repetitions of the units of one head.
        segments: Numbers of consecutive positions of one unit in each repetition, if they differ; empty otherwise.
        start: First position of the units, if the axis has other positions too, as that of a layer which writes hidden
            units and queries; None if all positions of the axis are those of units.
    """

    param: str
    axis: int | None
    outer: int = 1
    inner: int = 1
    heads: int = 1
    runs: int = 1
    segments: tuple[int, ...] = ()
    start: int | None = None

    @property
    def length(self) -> int:
        """Number of positions of one unit along the axis."""
        return sum(self.segments) or self.outer * self.runs * self.inner

    def end(self, units: int) -> int:
        """Return the position after the last unit, if the group has this number of units."""
        return (self.start or 0) + units * self.length

    def with_equal_repetitions(self, units: int) -> "list[tuple[int, ParamSlice]]":
        """Return parts of equal repetitions, each with its first position, if the group has this number of units."""
        starts = itertools.accumulate((units * width for width in self.segments), initial=self.start or 0)
        parts = [replace(self, segments=(), inner=width) for width in self.segments] or [self]
        return list(zip(starts, parts, strict=False))


@dataclass(frozen=True)
class Projections:
    """Linear layers that write the queries, keys and values of an attention.

    Attributes:
        layers: Their paths, three times the same if they are fused in this order.
        heads: Number of heads.
    """

    layers: tuple[str, ...]
    heads: int

    @property
    def path(self) -> str:
        """Path of the layer of queries, under which statistics are stored."""
        return self.layers[0]

    def select(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Return q, k and v (..., heads, c) of values (..., rows) by path of the layer."""
        is_fused = len(set(self.layers)) == 1
        parts = values[self.path].chunk(3, dim=-1) if is_fused else [values[path] for path in self.layers]
        return [part.reshape(*part.shape[:-1], self.heads, -1) for part in parts]


@dataclass(frozen=True)
class Group:
    """Units of one kind that can be removed, with every slice that belongs to them.

    Attributes:
        name: Unique name; masks and scores are stored by it.
        kind: weight, ffn, attention, qk, vo, head, residual, block or branch.
        shape: Shape of scores and masks. For attention channels it is (heads, head_dim), and all heads must keep the
            same number of channels.
        slices: Slices of parameters that are set to zero or removed with the units.
        layer_type: DIMAP module of single weights, such as qkv, proj or mlp; layers of one type are ranked together in
            scope `module`.
        owner: Path of the module that `resize` and `drop` change; empty for the model.
        resize: Function that records a new shape in the owner, after the units are removed from the slices.
        sublayers: For blocks, the module paths of every unit, the attention or MLP first. The units are the sub-layers
            in the order of the model: attention, FFN, attention, and so on. If only whole blocks can be removed, both
            units of a block are the block. For a branch: its main module, and the modules that have no effect without
            it.
        drop: For blocks and branches, function that removes the sub-layers which a mask does not keep from the owner.
        is_traced: Whether the group was found by tracing; the model then records its shape, because a trace of the
            pruned model may find other groups.
        projections: For attention channels, the layers of q, k and v; None if they are no plain Linear layers, or if a
            change of basis of q and k, or of v and the output, would change the function.
        buffers: Slices of buffers, such as the running mean of a BatchNorm. They are cut out and never zeroed, because
            zero weight and bias make the units zero.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: tuple[ParamSlice, ...]
    layer_type: str = ""
    owner: str = ""
    resize: Resize | None = None
    sublayers: tuple[tuple[str, ...], ...] = ()
    drop: Drop | None = None
    buffers: tuple[ParamSlice, ...] = ()
    projections: Projections | None = None
    is_traced: bool = False

    @property
    def units(self) -> int:
        """Number of units."""
        return torch.Size(self.shape).numel()

    @property
    def whole_blocks(self) -> bool:
        """Whether each of the two units of a block covers the whole block, so that both are removed together."""
        return len(self.sublayers) > 1 and self.sublayers[0] == self.sublayers[1]

    @property
    def num_candidates(self) -> int:
        """Number of units at which a removal can start; a sub-layer is removed together with the next one."""
        return self.units - 1 if self.kind == "block" else self.units


def all_units(groups: Iterable[Group]) -> Masks:
    """Return the masks that keep all units of groups."""
    return {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}


def mask_without(group: Group, unit: int) -> Tensor:
    """Return the mask that removes one unit, or for blocks one sub-layer and the next.

    Removing unit 2i removes block i. Removing unit 2i + 1 removes the FFN of block i and the attention of block i + 1;
    the attention of block i and the FFN of block i + 1 then form a hybrid block.

    Args:
        group: Any group.
        unit: Index of the unit, less than `group.num_candidates`.

    Returns:
        A mask of the shape of the group, False for the removed units.

    Source: UP-ViTs, block pruning.
    """
    mask = torch.ones(group.units, dtype=torch.bool)
    mask[unit : unit + (2 if group.kind == "block" else 1)] = False
    return mask.view(group.shape)


def removed_modules(groups: Iterable[Group], masks: Masks) -> tuple[str, ...]:
    """Return the paths of all modules of the sub-layers that the masks of block and branch groups remove."""
    blocks = [group for group in groups if group.sublayers]
    pairs = [pair for group in blocks for pair in zip(group.sublayers, masks[group.name].tolist(), strict=True)]
    return tuple(path for paths, keep in pairs if not keep for path in paths)


def is_within(name: str, paths: Iterable[str]) -> bool:
    """Return whether a module, parameter or group is one of the modules at these paths, or inside one."""
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


def dense_name(name: str, paths: Mapping[str, str]) -> str:
    """Return the name of a group or parameter in the dense model.

    Args:
        name: Its name in the model.
        paths: Path in the dense model of every module that has another one there, see `block_steps.dense_paths`.
    """
    path = next((path for path in paths if is_within(name, [path])), "")
    return paths.get(path, "") + name.removeprefix(path)


def index_grid(part: ParamSlice, units: int) -> Tensor:
    """Return the indices along the slice's axis, (outer, heads, runs, units / heads, inner), for a number of units."""
    return torch.arange(part.length * units).view(part.outer, part.heads, part.runs, units // part.heads, part.inner)


def positions(part: ParamSlice, chosen: Tensor) -> Tensor:
    """Return the indices along the slice's axis that belong to the chosen units; `chosen` (units,) is boolean."""
    indices = []
    for start, equal in part.with_equal_repetitions(chosen.numel()):
        grid = start + index_grid(equal, chosen.numel())
        indices.append(grid[chosen.cpu().view(1, equal.heads, 1, -1, 1).expand_as(grid)])
    return torch.cat(indices)


def reordered_positions(part: ParamSlice, order: Tensor, length: int) -> Tensor:
    """Return the old index of every position along the slice's axis.

    Args:
        part: The slice. With `heads`, units may only change their position within their head.
        order: Old index of every unit, (units,).
        length: Length of the axis.
    """
    reordered = []
    for start, equal in part.with_equal_repetitions(order.numel()):
        units = order.numel() // equal.heads
        grid = start + index_grid(equal, order.numel())
        within = order.view(equal.heads, units) - units * torch.arange(equal.heads)[:, None]
        reordered.append(grid.gather(3, within.view(1, equal.heads, 1, units, 1).expand_as(grid)).flatten())
    result, of_units, first = torch.arange(length), torch.cat(reordered), part.start or 0
    result[first : first + len(of_units)] = of_units
    return result


def unit_sums(group: Group, values: Mapping[str, Tensor]) -> Tensor:
    """Sum one value per weight over all slices of each unit.

    Args:
        group: Any group.
        values: Tensor by name of parameter, in the shape of the parameter.

    Returns:
        The sums in float64, in the shape of the group.
    """
    total = torch.zeros(group.units, dtype=torch.float64)
    for part in group.slices:
        value = values[part.param].detach().to("cpu", torch.float64)
        if part.axis is None:
            total += value.flatten()
        else:
            value = value.movedim(part.axis, 0)
            for start, equal in part.with_equal_repetitions(group.units):
                rows = value.narrow(0, start, group.units * equal.length)
                per_head = group.units // equal.heads
                total += rows.reshape(equal.outer, equal.heads, equal.runs, per_head, -1).sum(dim=(0, 2, 4)).flatten()
    return total.view(group.shape)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device: it has shapes and no values."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for module in model.modules():  # most of its dictionaries are empty, those of hooks; deepcopy is slow with them
        memo |= {id(value): type(value)() for value in vars(module).values() if type(value) in EMPTY and not value}
    return copy.deepcopy(model, memo)


@check_arguments()
@torch.no_grad()
def zero(model: nn.Module, groups: Sequence[Group], masks: Masks) -> nn.Module:
    """Set every slice of the removed units to zero, in place.

    Args:
        model: The model.
        groups: Its groups.
        masks: Boolean tensor by name of group, False for removed units.

    Returns:
        The model.

    Raises:
        BadInput: a mask removes residual channels (LayerNorm would still count them) or blocks, a mask does not fit
            its group, or a group no longer fits its parameters. The model is unchanged then.
    """
    result, model = model, plain_model(model)
    fitting = [(group, _fitting(group, masks)) for group in groups]
    for group, keep in fitting:
        _check_group(model, group)
        why = {"residual": "residual channels cannot be zeroed, LayerNorm would still count them; shrink them"}
        why |= dict.fromkeys(REMOVED, f"{group.name} cannot be zeroed, they are removed from the model; shrink them")
        if group.kind in why and not bool(keep.all()):
            raise BadInput(f"{group.name}: {why[group.kind]}")
    for group, keep in fitting:
        for part in group.slices:
            parameter = model.get_parameter(part.param)
            if part.axis is None:
                parameter.masked_fill_(~keep.view_as(parameter).to(parameter.device), 0)
            else:
                parameter.index_fill_(part.axis, positions(part, ~keep).to(parameter.device), 0)
    return result


@check_arguments()
@torch.no_grad()
def shrink(model: nn.Module, groups: Sequence[Group], masks: Masks) -> nn.Module:
    """Cut the removed units out of every slice, in place, so that the tensors become smaller.

    Blocks are removed last, because the modules after a removed block get other names. Groups inside a removed
    sub-layer need no mask.

    Args:
        model: The model.
        groups: Its groups.
        masks: Boolean tensor by name of group, False for removed units.

    Returns:
        The model.

    Raises:
        BadInput: a group has no smaller form (single weights), nothing would remain, heads would keep different
            numbers of channels, the kept sub-layers would not form blocks, two groups share an axis of one parameter,
            or a group no longer fits its parameters. The model is unchanged then.
    """
    result, model = model, plain_model(model)
    _refuse_shared_axes(groups)
    check_groups(model, groups)
    blocks = [(group, _fitting(group, masks)) for group in groups if group.kind in REMOVED]
    blocks.sort(key=lambda pair: REMOVED.index(pair[0].kind))
    removed = removed_modules([group for group, _ in blocks], masks)
    others = [(g, _fitting(g, masks)) for g in groups if g.kind not in REMOVED and not is_within(g.name, removed)]
    _cut(model, [(group, keep, _kept_shape(group, keep)) for group, keep in others + blocks])
    return result


@check_arguments()
@torch.no_grad()
def permute(model: nn.Module, groups: Sequence[Group], orders: Mapping[str, Tensor]) -> nn.Module:
    """Re-order the units of groups in every slice, in place; the model computes the same function.

    Args:
        model: The model.
        groups: Groups of kind ffn, head, attention, qk, vo or residual.
        orders: By name of group, the old index of every unit in its new position, (units,). Attention channels may
            only change their position within their head. Groups without an order are not changed.

    Returns:
        The model.

    Raises:
        BadInput: an order is not a permutation of the group's units, its group is of another kind, or a group no longer
            fits its parameters. The model is unchanged then.
    """
    result, model = model, plain_model(model)
    chosen = [(group, orders[group.name].flatten().cpu()) for group in groups if group.name in orders]
    for group, order in chosen:
        _check_group(model, group)
        if group.kind in ("weight", *REMOVED):
            raise BadInput(f"{group.name}: units of kind {group.kind} have no other order; leave its order out")
        rows = (group.shape[0], -1) if len(group.shape) > 1 else (1, -1)
        fits = len(order) == group.units and torch.can_cast(order.dtype, torch.int64)
        if not fits or not torch.equal(order.long().view(rows).sort().values.flatten(), torch.arange(group.units)):
            why = f"is not a permutation of {group.units} units within their heads"
            raise BadInput(f"{group.name}: its order {why}; give the integers 0 to {group.units - 1}")
    for group, order in chosen:
        for part in group.slices + group.buffers:
            assert part.axis is not None
            tensor = _tensor(model, part.param)
            index = reordered_positions(part, order.long(), tensor.shape[part.axis]).to(tensor.device)
            tensor.copy_(tensor.index_select(part.axis, index))
    drop_cached(model)
    return result


@torch.no_grad()
def resize_group(model: nn.Module, group: Group, shape: tuple[int, ...]) -> None:
    """Cut a group to a smaller shape, in place, keeping its first units; a saved model's weights fit in afterwards.

    Args:
        model: The model.
        group: One of its groups.
        shape: The new shape, with as many axes as the group's.

    Raises:
        BadInput: the shape is larger than the group, or is empty.
    """
    size = torch.Size(shape).numel()
    if not 0 < size <= group.units or len(shape) != len(group.shape):
        why = f"shape {list(shape)} does not fit into {list(group.shape)}"
        raise BadInput(f"{group.name}: {why}; is this the right model?")
    keep = torch.arange(group.units) < size
    _cut(model, [(group, keep, _kept_shape(group, keep) if group.kind == "block" else shape)])


def _fitting(group: Group, masks: Masks) -> Tensor:
    if group.name not in masks:
        raise BadInput(f"{group.name}: no mask for this group; give one bool tensor of shape {list(group.shape)}")
    mask = masks[group.name]
    if mask.dtype != torch.bool or mask.numel() != group.units:
        needed = f"torch.bool {list(group.shape)}"
        raise BadInput(f"{group.name}: mask is {mask.dtype} {list(mask.shape)}, needed is {needed}")
    return mask.flatten()


def _kept_shape(group: Group, mask: Tensor) -> tuple[int, ...]:
    if group.kind == "weight":
        raise BadInput(f"{group.name}: single weights cannot be cut out of a tensor; use zero")
    kept = mask.flatten().nonzero().flatten()
    if group.kind == "block" and (len(kept) % 2 or bool((kept % 2 != torch.arange(len(kept)) % 2).any())):
        why = "kept sub-layers would not alternate attention and FFN"
        raise BadInput(f"{group.name}: {why}; remove pairs of neighbors")
    if group.whole_blocks and not torch.equal(mask.flatten()[::2], mask.flatten()[1::2]):
        raise BadInput(f"{group.name}: half of a block would be removed; remove both units of a block")
    rows = mask.view(group.shape).flatten(1) if len(group.shape) > 1 else mask.view(1, -1)
    counts = [int(count) for count in rows.sum(dim=1)]
    if len(set(counts)) > 1:
        raise BadInput(f"{group.name}: heads would keep {counts} channels; all must keep the same number")
    if counts[0] == 0:
        raise BadInput(f"{group.name}: all {group.units} units would be removed; keep at least one")
    return (group.shape[0], counts[0]) if len(group.shape) > 1 else (counts[0],)


def _refuse_shared_axes(groups: Sequence[Group]) -> None:
    cut_by: dict[tuple[str, int | None], list[tuple[Group, ParamSlice]]] = {}
    for group in groups:
        for part in group.slices:
            others = cut_by.setdefault((part.param, part.axis), [])
            for other, its in others:
                if other.name != group.name and share_positions((part, group.units), (its, other.units)):
                    raise BadInput(
                        f"{part.param}: groups {other.name} and {group.name} cut the same axis; "
                        "shrink one, find the groups again, then shrink the other"
                    )
            others.append((group, part))


def share_positions(first: tuple[ParamSlice, int], second: tuple[ParamSlice, int]) -> bool:
    """Return whether two slices, each with its number of units, have positions in common."""
    (part, units), (other, number) = first, second
    starts, ends = (part.start or 0, other.start or 0), (part.end(units), other.end(number))
    return (part.param, part.axis) == (other.param, other.axis) and starts[0] < ends[1] and starts[1] < ends[0]


def check_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Check that groups are those of a model.

    Raises:
        BadInput: they are groups of another model or of another shape of it.
    """
    for group in groups:
        _check_group(model, group)


def _check_group(model: nn.Module, group: Group) -> None:
    modules = dict(model.named_modules()) if group.sublayers else {}
    for body, *_ in group.sublayers:
        if body not in modules:
            raise BadInput(f"{group.name}: the model has no {body}, the group is out of date; call find_groups again")
    for part in group.slices + group.buffers:
        try:
            tensor = _tensor(model, part.param)
        except AttributeError:
            why = f"the model has no {part.param}, it is another model's group"
            raise BadInput(f"{group.name}: {why}; call find_groups") from None
        if part.axis is not None and part.axis >= tensor.dim():
            why = f"{part.param} has {tensor.dim()} axes, it is another model's group"
            raise BadInput(f"{group.name}: {why}; call find_groups")
        length = tensor.numel() if part.axis is None else tensor.shape[part.axis]
        end = part.end(group.units)
        if end > length or (part.start is None and end != length):
            axis = "it" if part.axis is None else f"axis {part.axis}"
            raise BadInput(f"{part.param}: {axis} is {length} long, the group is out of date; call find_groups again")


def _cut(model: nn.Module, cuts: Sequence[tuple[Group, Tensor, tuple[int, ...]]]) -> None:
    """Cut groups to the units that are kept, each given with its new shape; every axis of a tensor is cut once."""
    removed: dict[tuple[str, int], list[Tensor]] = {}
    for group, keep, shape in cuts:
        for part in () if shape == group.shape else group.slices + group.buffers:
            assert part.axis is not None
            removed.setdefault((part.param, part.axis), []).append(positions(part, ~keep))
    for (name, axis), indices in removed.items():
        path, _, leaf = name.rpartition(".")
        owner, old = model.get_submodule(path), _tensor(model, name)
        kept = torch.ones(old.shape[axis], dtype=torch.bool)
        kept[torch.cat(indices)] = False
        new = old.index_select(axis, kept.nonzero().flatten().to(old.device)).contiguous()
        learned = isinstance(old, nn.Parameter)
        setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if learned else new)
        _match_weight(owner)
    for group, keep, shape in cuts:
        if group.is_traced:
            _record_shape(model, group, shape)
        if group.resize is not None:  # also if nothing is cut: heads may be merged without losing a channel
            group.resize(model.get_submodule(group.owner), shape)
        if group.drop is not None:
            group.drop(model.get_submodule(group.owner), keep)


def recorded_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the traced groups that were cut, by name of the group in the dense model."""
    return dict(vars(model).get(RECORDED_SHAPES, {}))


def _record_shape(model: nn.Module, group: Group, shape: tuple[int, ...]) -> None:
    shapes = recorded_shapes(model) | {group.name: shape}
    channels = group.name.removesuffix(SUFFIXES["head"])
    for name in (channels, channels + SUFFIXES["qk"], channels + SUFFIXES["vo"]) if group.kind == "head" else ():
        if name in shapes:
            shapes[name] = (shape[0], *shapes[name][1:])
    setattr(model, RECORDED_SHAPES, shapes)


def _tensor(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by name; AttributeError if there is none."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"{name} is no tensor")
    return tensor


def _match_weight(module: nn.Module) -> None:
    """Set the recorded sizes of a layer to those of its weight; a group of a convolution is removed as a whole."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        per_group, module.out_channels = module.out_channels // module.groups, module.weight.shape[0]
        module.groups = module.out_channels // per_group if module.groups > 1 else 1
        module.in_channels = module.groups * module.weight.shape[1]
    elif isinstance(module, nn.ConvTranspose2d):  # depth-wise, or of one group
        module.in_channels, module.groups = len(module.weight), len(module.weight) if module.groups > 1 else 1
        module.out_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.num_features = module.weight.shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, CHANNEL_NORMS):
        module.normalized_shape = tuple(module.weight.shape)
