"""What each operation of a model does to the labels of channels: who stands and falls with whom afterwards."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprune.architectures.tracing.trace import Trace, Weight
from vitprune.architectures.tracing.union_find import compact, either, squeeze_broadcast

Rule = Callable[[Trace, Any, Sequence[Any], Mapping[str, Any], Any], None]


def follow(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Give the result of an operation its labels, and unite what it brings together."""
    name = func.overloadpacket.__name__
    if name in REORDERS and (weight := trace.weight(args[0])) is not None:
        trace.put(result, Weight(weight.name, tuple(weight.order[place] for place in REORDERS[name](args))))
    elif "batch_norm" in name:
        _normed(trace, args[0], args[1:5], result[0], 1)
    elif name in RULES:
        RULES[name](trace, func, args, kwargs, result)
    elif isinstance(result, Tensor):
        _together(trace, func, args, kwargs, result)
    else:
        _unknown(trace, func, args)


def _swapped(args: Sequence[Any]) -> Sequence[int]:
    order = list(range(args[0].dim()))
    order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
    return order


REORDERS: dict[str, Callable[[Sequence[Any]], Sequence[int]]] = {
    "t": lambda args: range(args[0].dim())[::-1],
    "transpose": _swapped,
    "permute": lambda args: [place % args[0].dim() for place in args[1]],
    "detach": lambda args: range(args[0].dim()),
    "alias": lambda args: range(args[0].dim()),
}


def _moved(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Elements go elsewhere: so do their labels, by the same operation."""
    joined = isinstance(args[0], list | tuple)
    found = [trace.of(value) for value in (args[0] if joined else args[:1])]
    if all(labels is None for labels in found):
        return
    nothing = torch.zeros((), dtype=torch.int64)
    values = args[0] if joined else args[:1]
    given = [nothing.expand(v.shape) if own is None else own for v, own in zip(values, found, strict=True)]
    name = func.overloadpacket.__name__
    if name in ("view", "_unsafe_view", "_reshape_alias"):
        moved: Any = given[0].reshape(result.shape)
        moved = moved if moved.data_ptr() == given[0].data_ptr() else compact(moved)
    elif name in SAME:
        moved = given[0]
    elif name in DRAWN:  # these have no form for whole numbers; a double holds them exactly
        moved = func(given[0].double(), *args[1:], **kwargs).long()
    else:
        moved = func(given if joined else given[0], *args[1:], **kwargs)
    for value, labels in zip(*((result, moved) if isinstance(result, list | tuple) else ([result], [moved]))):  # noqa: B905
        trace.put(value, compact(labels) if name in COPIES else labels)


def _together(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
    """Element by element: what meets stands and falls together."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    found = [(value, labels) for value in tensors if (labels := trace.of(value)) is not None]
    if not found:
        return
    try:
        shape: tuple[int, ...] = np.broadcast_shapes(*(value.shape for value in tensors))
    except ValueError:
        shape = ()
    if shape != tuple(result.shape):
        _unknown(trace, func, args)
        return
    whole = []
    for value, labels in found:
        others = [other for _, other in found if _shared(trace, value.shape, other)]
        trace.later += [(labels, other) for other in others]
        whole += [] if others else [labels]
    if func.overloadpacket.__name__ in ("add", "add_") and sum(trace.computed(value) for value, _ in found) > 1:
        trace.added.append(squeeze_broadcast(found[0][1]))
    kept = whole[0]
    for other in whole[1:]:
        trace.labels.join(kept, other)
        kept = either(kept, other, result.shape)
    trace.put(result, kept.expand(result.shape))


def propagate_to_fixpoint(trace: Trace) -> None:
    """Unite what was broadcast along channels that differed when they met, and do not any more."""
    met = True
    while met:
        alone = [(own, other) for own, other in trace.later if _shared(trace, own.shape, other)]
        met = len(alone) < len(trace.later)
        for own, other in trace.later if met else ():
            if not _shared(trace, own.shape, other):
                trace.labels.join(own, other)
        trace.later = alone


def _shared(trace: Trace, shape: Sequence[int], labels: Tensor) -> bool:
    """Whether something of a shape is broadcast along an axis along which labels differ: none of them is its own."""
    dims = max(len(shape), labels.dim())
    padded = labels[(None,) * (dims - labels.dim())]
    sizes = (1,) * (dims - len(shape)) + tuple(shape)
    return any(size == 1 and trace.varies(padded, axis) for axis, size in enumerate(sizes))


def _product(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
    """(..., n, k) @ (..., k, m), perhaps added to something: both sides' k stand together; n or m go on."""
    left, right = args[-2:]
    if trace.weight(right) is not None and right.dim() == 2:
        _by_weight(trace, trace.of(left) if trace.weight(left) is None else None, right, result)
    elif trace.weight(left) is not None and left.dim() == 2:
        own = trace.of(right)
        _by_weight(trace, None if own is None else own.mT, left.mT, result.mT)
    else:
        _contracted(trace, trace.of(left), trace.of(right), result)
    bias, labels = trace.of(args[0]) if len(args) > 2 else None, trace.of(result)
    if bias is not None and labels is not None and _shared(trace, bias.shape, labels):
        trace.later.append((bias, labels))
    elif bias is not None and labels is not None:
        trace.labels.join(bias, labels)


def _by_weight(trace: Trace, own: Tensor | None, matrix: Tensor, result: Tensor) -> None:
    weight = trace.weight(matrix)
    assert weight is not None
    if own is not None and trace.varies(own, -2) and not trace.varies(own, -1):
        trace.put(result, own[..., :1].expand(result.shape))  # it mixes places; the channels in its rows go on
        return
    if own is not None:
        trace.labels.join(squeeze_broadcast(own), trace.axis(weight, 0))
    trace.writes[weight.name] = None
    trace.put(result, trace.axis(weight, 1).expand(result.shape))


def _contracted(trace: Trace, one: Tensor | None, other: Tensor | None, result: Tensor) -> None:
    inner = [labels is not None and trace.varies(labels, axis) for labels, axis in ((one, -1), (other, -2))]
    if one is not None and other is not None and all(inner):
        trace.labels.join(squeeze_broadcast(one.mT), squeeze_broadcast(other))
        trace.attended.append(squeeze_broadcast(other))
    for labels, summed in ((one, inner[0]), (other, inner[1])):
        if labels is not None and summed and not all(inner):
            trace.mark_unprunable(labels, "it is summed over")
    if one is not None and not inner[0] and trace.varies(one, -2):
        trace.put(result, one[..., :1].expand(result.shape))
    elif other is not None and not inner[1]:
        trace.put(result, other[..., :1, :].expand(result.shape))


def _convolved(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
    value, kernel, bias, groups = args[0], args[1], args[2], args[8]
    weight, own = trace.weight(kernel), trace.of(value)
    if weight is None:
        _unknown(trace, func, args)
        return
    if own is not None and any(trace.varies(own, axis) for axis in range(2, value.dim())):
        _over_places(trace, own, kernel, result)
        return
    across = (1, -1) + (1,) * (result.dim() - 2)
    rows = trace.axis(weight, 0).view(across)
    if groups == 1:
        if own is not None:
            trace.labels.join(own, trace.axis(weight, 1).view(across))
        trace.writes[weight.name] = None
    elif groups == value.shape[1]:  # a channel makes one or several, and no other has a part in them
        if own is not None:
            trace.labels.join(squeeze_broadcast(own).repeat_interleave(result.shape[1] // groups, 1), rows)
    else:
        for labels in (own, rows):
            if labels is not None:
                trace.mark_unprunable(labels, f"it runs through a convolution of {groups} groups")
    trace.put(result, rows.expand(result.shape))
    shift = trace.of(bias)
    if shift is not None:
        trace.labels.join(shift, rows.flatten())


def _over_places(trace: Trace, own: Tensor, kernel: Tensor, result: Tensor) -> None:
    """Channels lie where a convolution has its places: one of width 1 passes them on, if all that it mixes agree."""
    if trace.varies(own, 1) or kernel[0, 0].numel() > 1:
        trace.mark_unprunable(own, "it is convolved over")
    else:
        trace.put(result, own.narrow(1, 0, 1).expand(result.shape))


def _layer_normed(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    _normed(trace, args[0], args[2:4], result[0], -1)


def _group_normed(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    labels = trace.of(args[0])
    if labels is not None and args[6] > 1:
        trace.mark_unprunable(labels, f"a GroupNorm of {args[6]} groups counts its channels")
    _normed(trace, args[0], args[1:3], result[0], 1)


def _normed(trace: Trace, value: Tensor, parameters: Sequence[Any], result: Tensor, axis: int) -> None:
    labels = trace.of(value)
    if labels is None:
        return
    for parameter in parameters:
        own = trace.of(parameter)
        if own is not None:
            trace.labels.join(squeeze_broadcast(labels).movedim(axis, -1), own)
    trace.put(result, labels)


def _pooled(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Something happens along the last two axes, channel by channel."""
    labels, first = trace.of(args[0]), result[0] if isinstance(result, tuple) else result
    if labels is None:
        return
    if trace.varies(labels, -1) or trace.varies(labels, -2):
        trace.mark_unprunable(labels, "it is pooled over")
        return
    trace.put(first, labels.narrow(-1, 0, 1).narrow(-2, 0, 1).expand(first.shape))


def _summed(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """A sum, mean, norm or softmax over some axes: harmless where channels do not follow them."""
    labels, name = trace.of(args[0]), func.overloadpacket.__name__
    if labels is None:
        return
    given = kwargs.get("dim", args[2] if name == "linalg_vector_norm" and len(args) > 2 else (*args[1:2], None)[0])
    dims = [given] if isinstance(given, int) else given or range(labels.dim())
    dims = [dim % labels.dim() for dim in dims]
    if any(trace.varies(labels, dim) for dim in dims):
        trace.mark_unprunable(labels, f"{name.strip('_')} runs over it")
        return
    if name not in KEEPING:
        for dim in dims:
            labels = labels.narrow(dim, 0, 1)
    first = result[0] if isinstance(result, tuple) else result
    small = (
        labels
        if first.dim() == labels.dim()
        else labels.reshape([size for dim, size in enumerate(labels.shape) if dim not in dims])
    )
    trace.put(first, small.expand(first.shape))


def _indexed(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
    """Elements are picked by number: along these axes, whatever is picked stands and falls together."""
    labels = trace.of(args[0])
    if labels is None:
        return
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
        _unknown(trace, func, args)
        return
    for axis, index in enumerate(args[1]):
        if index is not None:
            trace.labels.join(squeeze_broadcast(labels), squeeze_broadcast(labels.narrow(axis, 0, 1)))
            labels = labels.narrow(axis, 0, 1)
    first = [None if index is None else torch.zeros(index.shape, dtype=torch.int64) for index in args[1]]
    trace.put(result, func(labels.contiguous(), first))


def _unknown(trace: Trace, func: Any, args: Sequence[Any]) -> None:
    for value in args:
        for tensor in value if isinstance(value, list | tuple) else [value]:
            labels = trace.of(tensor)
            if labels is not None:
                trace.mark_unprunable(labels, f"operation {func.overloadpacket.__name__} is not understood")


SAME = ("clone", "contiguous", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy")
COPIES = ("roll", "flip", "repeat", "cat", "stack", "constant_pad_nd")
DRAWN = ("reflection_pad2d", "replication_pad2d", "im2col")
KEEPING = ("_softmax", "_log_softmax", "_safe_softmax", "cumsum")
MOVES = (
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "unsqueeze"),
    *("squeeze", "select", "slice", "split", "split_with_sizes", "unbind", "roll", "flip", "repeat", "unfold"),
    *("diagonal", "narrow", "pixel_shuffle", "cat", "stack", "constant_pad_nd", *SAME, *DRAWN),
)
FOLDS = ("mean", "sum", "amax", "amin", "var", "var_mean", "std", "linalg_vector_norm", "norm", "prod", *KEEPING)
POOLS = (
    *("avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(FOLDS, _summed),
    **dict.fromkeys(POOLS, _pooled),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _product),
    "convolution": _convolved,
    "native_layer_norm": _layer_normed,
    "native_group_norm": _group_normed,
    "index": _indexed,
}
