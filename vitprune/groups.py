"""Groups of units that may go, and the two ways to let them go: zero and shrink."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.errors import BadInput

Scores = dict[str, Tensor]
Masks = dict[str, Tensor]
Resize = Callable[[nn.Module, tuple[int, ...]], None]
Drop = Callable[[nn.Module, Tensor], None]

KINDS = ("weight", "ffn", "attention", "head", "residual", "block")


@dataclass(frozen=True)
class ParamSlice:
    """Address of a group's units in one parameter: its axis read as (outer, units, inner).

    `axis=None` means that every element of the parameter is a unit of its own. Where the units of each head lie several
    times side by side, the axis is read as (outer, heads, runs, units / heads, inner).
    """

    param: str
    axis: int | None
    outer: int = 1
    inner: int = 1
    heads: int = 1
    runs: int = 1

    @property
    def length(self) -> int:
        """How often a unit lies along the axis."""
        return self.outer * self.runs * self.inner


@dataclass(frozen=True)
class Group:
    """Units of one kind that may go, and every slice that goes with each of them.

    `shape` is the shape of the group's scores and masks; attention channels are (heads, channels), and all heads
    keep the same number. `pool` names the DIMAP module of a weight. `owner` is the module whose own sizes `resize`
    sets to a new shape once the slices are cut. `buffers` are slices of buffers, as a BatchNorm's running mean: they
    are cut with their units and never zeroed, as the weight and bias beside them are, which makes the units zero.

    Blocks go in pairs of neighbours, so the units of their group are sub-layers, in the order of the model: attention,
    FFN, attention, and so on. Of blocks that go as a whole, both units are the block. `sublayers` holds the paths of
    the modules of each (its body first), and `drop` takes the others out of the model.
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

    @property
    def units(self) -> int:
        """Number of units."""
        return torch.Size(self.shape).numel()

    @property
    def whole_blocks(self) -> bool:
        """Whether the units of each block are the block itself, and go together."""
        return len(self.sublayers) > 1 and self.sublayers[0] == self.sublayers[1]

    @property
    def num_candidates(self) -> int:
        """Number of units that may go first; the last sub-layer of a model has no next one to go with."""
        return self.units - 1 if self.kind == "block" else self.units


def mask_without(group: Group, unit: int) -> Tensor:
    """Mask that removes one unit alone; of blocks, a sub-layer and the next one, so unit 2i is block i.

    Unit 2i + 1 is the FFN of block i and the attention of block i + 1: what is left of the two is a hybrid block.

    Source: UP-ViTs, block pruning.
    """
    mask = torch.ones(group.units, dtype=torch.bool)
    mask[unit : unit + (2 if group.kind == "block" else 1)] = False
    return mask.view(group.shape)


def removed_modules(groups: Iterable[Group], masks: Masks) -> tuple[str, ...]:
    """Paths of the modules that go as a whole, with the sub-layer that they belong to."""
    blocks = [group for group in groups if group.kind == "block"]
    pairs = [pair for group in blocks for pair in zip(group.sublayers, masks[group.name].tolist(), strict=True)]
    return tuple(path for paths, keep in pairs if not keep for path in paths)


def is_within(name: str, paths: Iterable[str]) -> bool:
    """Whether a module, parameter or group belongs to one of the modules at these paths."""
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


def positions(part: ParamSlice, chosen: Tensor) -> Tensor:
    """Indices along the slice's axis that belong to the chosen units; `chosen` is a bool vector over all units."""
    units = chosen.numel()
    grid = torch.arange(part.length * units).view(part.outer, part.heads, part.runs, units // part.heads, part.inner)
    picked = chosen.cpu().view(1, part.heads, 1, -1, 1).expand_as(grid)
    return grid[picked]


def unit_sums(group: Group, values: Mapping[str, Tensor]) -> Tensor:
    """Sum per unit of one value per weight, over all slices of the group, in float64; shape of the group."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for part in group.slices:
        value = values[part.param].detach().to("cpu", torch.float64)
        if part.axis is None:
            total += value.flatten()
        else:
            rows = value.movedim(part.axis, 0).reshape(part.outer, part.heads, part.runs, group.units // part.heads, -1)
            total += rows.sum(dim=(0, 2, 4)).flatten()
    return total.view(group.shape)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with its shapes alone: on the meta device, where nothing is stored."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


@torch.no_grad()
def zero(model: nn.Module, groups: Sequence[Group], masks: Masks) -> nn.Module:
    """Set every slice of the removed units to zero, in place.

    Raises:
        BadInput: a residual channel is to be zeroed (LayerNorm statistics would still run over it), or a mask does
            not fit its group, or a group no longer fits its parameters. The model is untouched then.
    """
    fitting = [(group, _fitting(group, masks)) for group in groups]
    for group, keep in fitting:
        _refuse_stale(model, group)
        why = {"residual": "residual channels cannot be zeroed, LayerNorm would still count them; shrink them"}
        why |= {"block": "blocks cannot be zeroed, they are taken out of the model; shrink them"}
        if group.kind in why and not bool(keep.all()):
            raise BadInput(f"{group.name}: {why[group.kind]}")
    for group, keep in fitting:
        for part in group.slices:
            parameter = model.get_parameter(part.param)
            if part.axis is None:
                parameter.masked_fill_(~keep.view_as(parameter).to(parameter.device), 0)
            else:
                parameter.index_fill_(part.axis, positions(part, ~keep).to(parameter.device), 0)
    return model


@torch.no_grad()
def shrink(model: nn.Module, groups: Sequence[Group], masks: Masks) -> nn.Module:
    """Cut the removed units out of every slice, in place, so that the tensors become smaller.

    Whole sub-layers go last, as those behind them get other names; what belongs to one of them needs no mask.

    Raises:
        BadInput: the group has no smaller form (single weights), nothing would be left, heads would keep different
            numbers of channels, sub-layers would not form blocks, two groups share an axis of one parameter, or a
            group no longer fits its parameters. The model is untouched then.
    """
    _refuse_shared_axes(groups)
    for group in groups:
        _refuse_stale(model, group)
    blocks = [(group, _fitting(group, masks)) for group in groups if group.kind == "block"]
    doomed = removed_modules([group for group, _ in blocks], masks)
    others = [(g, _fitting(g, masks)) for g in groups if g.kind != "block" and not is_within(g.name, doomed)]
    for group, keep, shape in [(group, keep, _kept_shape(group, keep)) for group, keep in others + blocks]:
        _cut(model, group, keep, shape)
    return model


@torch.no_grad()
def resize_group(model: nn.Module, group: Group, shape: tuple[int, ...]) -> None:
    """Give a group a smaller shape, keeping its first units: the frame that a saved model's weights fill.

    Raises:
        BadInput: the shape is larger than the group, or has nothing in it.
    """
    size = torch.Size(shape).numel()
    if not 0 < size <= group.units or len(shape) != len(group.shape):
        raise BadInput(
            f"{group.name}: shape {list(shape)} does not fit into {list(group.shape)}; is this the right model?"
        )
    keep = torch.arange(group.units) < size
    _cut(model, group, keep, _kept_shape(group, keep) if group.kind == "block" else shape)


def _fitting(group: Group, masks: Masks) -> Tensor:
    if group.name not in masks:
        raise BadInput(f"{group.name}: no mask for this group; give one bool tensor of shape {list(group.shape)}")
    mask = masks[group.name]
    if mask.dtype != torch.bool or mask.numel() != group.units:
        raise BadInput(
            f"{group.name}: mask is {mask.dtype} {list(mask.shape)}, needed is torch.bool {list(group.shape)}"
        )
    return mask.flatten()


def _kept_shape(group: Group, mask: Tensor) -> tuple[int, ...]:
    if group.kind == "weight":
        raise BadInput(f"{group.name}: single weights cannot be cut out of a tensor; use zero")
    left = mask.flatten().nonzero().flatten()
    if group.kind == "block" and (len(left) % 2 or bool((left % 2 != torch.arange(len(left)) % 2).any())):
        raise BadInput(f"{group.name}: what is left would not alternate attention and FFN; remove pairs of neighbours")
    if group.whole_blocks and not torch.equal(mask.flatten()[::2], mask.flatten()[1::2]):
        raise BadInput(f"{group.name}: half of a block would go; remove both units of every block that goes")
    rows = mask.view(group.shape).flatten(1) if len(group.shape) > 1 else mask.view(1, -1)
    counts = [int(count) for count in rows.sum(dim=1)]
    if len(set(counts)) > 1:
        raise BadInput(f"{group.name}: heads would keep {counts} channels; all must keep the same number")
    if counts[0] == 0:
        raise BadInput(f"{group.name}: all {group.units} units would go; keep at least one")
    return (group.shape[0], counts[0]) if len(group.shape) > 1 else (counts[0],)


def _refuse_shared_axes(groups: Sequence[Group]) -> None:
    taken: dict[tuple[str, int | None], str] = {}
    for group in groups:
        for part in group.slices:
            other = taken.setdefault((part.param, part.axis), group.name)
            if other != group.name:
                raise BadInput(
                    f"{part.param}: groups {other} and {group.name} cut the same axis; "
                    "shrink one, find the groups again, then shrink the other"
                )


def _refuse_stale(model: nn.Module, group: Group) -> None:
    modules = dict(model.named_modules()) if group.sublayers else {}
    for body, *_ in group.sublayers:
        if body not in modules:
            raise BadInput(f"{group.name}: the model has no {body}, the group is out of date; find it again")
    for part in group.slices + group.buffers:
        tensor = _tensor(model, part.param)
        length = tensor.numel() if part.axis is None else tensor.shape[part.axis]
        if group.units * part.length != length:
            axis = "it" if part.axis is None else f"axis {part.axis}"
            raise BadInput(f"{part.param}: {axis} is {length} long, the group is out of date; find it again")


def _cut(model: nn.Module, group: Group, keep: Tensor, shape: tuple[int, ...]) -> None:
    for part in () if shape == group.shape else group.slices + group.buffers:
        assert part.axis is not None
        path, _, leaf = part.param.rpartition(".")
        owner = model.get_submodule(path)
        old = _tensor(model, part.param)
        new = old.index_select(part.axis, positions(part, keep).to(old.device)).contiguous()
        learned = isinstance(old, nn.Parameter)
        setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if learned else new)
        _match_weight(owner)
    if group.resize is not None:  # also where nothing goes: heads may merge without losing a channel
        group.resize(model.get_submodule(group.owner), shape)
    if group.drop is not None:
        group.drop(model.get_submodule(group.owner), keep)


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by name."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _match_weight(module: nn.Module) -> None:
    """Set a plain layer's recorded sizes to those of its weight; in a depth-wise convolution groups are channels."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
        each, module.out_channels = module.out_channels // module.groups, module.weight.shape[0]
        module.groups = module.in_channels = module.out_channels // each
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.num_features = module.weight.shape[0]
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(module.weight.shape)
