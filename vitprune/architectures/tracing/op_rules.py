"""Coupling rules: how each ATen operation maps channel labels and which channels it couples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.architectures.tracing.trace import ParameterView, Product, Trace
from vitprune.architectures.tracing.union_find import NO_CHANNEL, coalesce, compact, squeeze_broadcast

Rule = Callable[[Trace, Any, Sequence[Any], Mapping[str, Any], Any], None]


def apply_rule(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Apply the coupling rule of an operation that has run: label its result and unite the channels that it couples.

    Args:
        trace: The state of the trace.
        func: The ATen overload.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: Its result, a tensor or a sequence of tensors.
    """
    name = func.overloadpacket.__name__
    view = trace.parameter_of(args[0]) if args else None
    if view is not None and len(view.axes) < args[0].dim() and name not in VIEWS:
        view = None
    if name in PERMUTATIONS and view is not None:
        trace.set_labels(result, view.permute(PERMUTATIONS[name](args)))
    elif (
        name in ("expand", *VIEWS) and view is not None and view.is_matrix_of(result)
    ):  # repeated for a batched product
        trace.set_labels(result, view)
    elif name in CUTS and view is not None and (len(args) < 5 or args[4] == 1):
        axis = (args[1] if len(args) > 1 else 0) if name == "slice" else args[2] if len(args) > 2 else 0
        start = (args[2] if len(args) > 2 else 0) or 0 if name == "slice" else 0
        for part in [result] if isinstance(result, Tensor) else result:
            trace.set_labels(part, view.narrow(axis, start % max(1, args[0].shape[axis]), part.shape[axis]))
            start += part.shape[axis]
    elif "batch_norm" in name:
        _normalization(trace, args[0], args[1:5], result[0], 1)
    elif name in RULES:
        RULES[name](trace, func, args, kwargs, result)
    elif isinstance(result, Tensor):
        _elementwise(trace, func, args, kwargs, result)
    else:
        _unknown_op(trace, func, args)


def _transposed_axes(args: Sequence[Any]) -> Sequence[int]:
    axes = list(range(args[0].dim()))
    axes[args[1]], axes[args[2]] = axes[args[2]], axes[args[1]]
    return axes


PERMUTATIONS: dict[str, Callable[[Sequence[Any]], Sequence[int]]] = {
    "t": lambda args: range(args[0].dim())[::-1],
    "transpose": _transposed_axes,
    "permute": lambda args: [axis % args[0].dim() for axis in args[1]],
    "detach": lambda args: range(args[0].dim()),
    "alias": lambda args: range(args[0].dim()),
    "_to_copy": lambda args: range(args[0].dim()),
}
CUTS = ("slice", "split", "split_with_sizes")


def _rearrangement(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Views, copies and concatenations: the same operation is applied to the labels."""
    several = isinstance(args[0], list | tuple)
    values = args[0] if several else args[:1]
    known = [trace.labels_of(value) for value in values]
    if all(labels is None for labels in known):
        return
    no_channel = torch.zeros((), dtype=torch.int64)
    inputs = [no_channel.expand(v.shape) if labels is None else labels for v, labels in zip(values, known, strict=True)]
    name = func.overloadpacket.__name__
    if name in VIEWS:
        moved: Any = inputs[0].reshape(result.shape)
        moved = moved if moved.data_ptr() == inputs[0].data_ptr() else compact(moved)
    elif name in IDENTITIES:
        moved = inputs[0]
    elif name in FLOAT_ONLY:  # not implemented for integers; float64 represents the labels exactly
        moved = func(inputs[0].double(), *args[1:], **kwargs).long()
    elif name == "constant_pad_nd":
        moved = _padded(inputs[0], args[1])
    else:
        moved = func(inputs if several else inputs[0], *args[1:], **kwargs)
    for value, labels in zip(*((result, moved) if isinstance(result, list | tuple) else ([result], [moved]))):  # noqa: B905
        trace.set_labels(value, compact(labels) if name in COPIES else labels)


def _padded(labels: Tensor, widths: Sequence[int]) -> Tensor:
    """Return labels padded where they differ along an axis; along others, the padding is of the same channels."""
    small = squeeze_broadcast(compact(labels))
    kept = [0 if small.shape[-1 - index // 2] == 1 else width for index, width in enumerate(widths)]
    return torch.constant_pad_nd(small, kept, NO_CHANNEL)


def _elementwise(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
    """Elementwise operations: channels at the same position of the operands are coupled."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    operands = [
        (value, _repeated(value, labels)) for value in tensors if (labels := trace.labels_of(value)) is not None
    ]
    if not operands:
        return
    try:
        shape: tuple[int, ...] = np.broadcast_shapes(*(value.shape for value in tensors))
    except ValueError:
        shape = ()
    if shape != tuple(result.shape):
        _unknown_op(trace, func, args)
        return
    full = _operands_of_all_channels(trace, operands)
    if not full:  # such as frequencies for all positions of a grid, which is a buffer
        learned = [(value, labels) for value, labels in operands if not trace.are_of_buffer(labels)]
        full = _operands_of_all_channels(trace, learned)
    if func.overloadpacket.__name__ in ADDITIONS and sum(trace.is_labeled_activation(v) for v, _ in operands) > 1:
        trace.residual_sums.append(squeeze_broadcast(operands[0][1]))
    elif func.overloadpacket.__name__ in ADDITIONS and len(operands) == 2:
        pairs = zip(operands, operands[::-1], strict=True)
        trace.shifts += [(bias, rows) for (value, bias), (_, rows) in pairs if trace.parameter_of(value) is not None]
    if not full:
        for _, labels in operands:
            trace.mark_unprunable(labels, "every channel is combined with every other one")
        return
    full.sort(key=lambda entry: entry[:2])  # activations first, then those that differ along the fewest axes
    labels = full[0][-1]
    for *_, other in full[1:]:
        trace.sets.union(labels, other)
        labels = coalesce(labels, other, result.shape)
    is_large = len(full) > 1 and squeeze_broadcast(labels).numel() > MAX_OF_HEADS
    trace.set_labels(result, (trace.compacted(labels) if is_large else labels).expand(result.shape))


def _operands_of_all_channels(
    trace: Trace, operands: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[bool, int, Tensor]]:
    """Return the labels of operands that are not broadcast over channels of others, with what they are sorted by."""
    full = []
    for value, labels in operands:
        others = [other for _, other in operands if _broadcasts_over_channels(trace, labels.shape, other)]
        trace.deferred += [(labels, other) for other in others]
        full += [] if others else [(not trace.is_labeled_activation(value), squeeze_broadcast(labels).numel(), labels)]
    return full


def _repeated(value: Tensor, labels: Tensor) -> Tensor:
    """Return labels with size 1 along the axes along which the tensor itself is expanded, as by a broadcast."""
    for axis, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def propagate_to_fixpoint(trace: Trace) -> None:
    """Unite shared pairs, and deferred pairs once the channels along the broadcast axis have been united."""
    for pair in () if trace.by_head else trace.shared:
        trace.sets.union(*pair)
    changed = True
    while changed:
        remaining = [
            (labels, other) for labels, other in trace.deferred if _broadcasts_over_channels(trace, labels.shape, other)
        ]
        changed = len(remaining) < len(trace.deferred)
        for labels, other in trace.deferred if changed else ():
            if not _broadcasts_over_channels(trace, labels.shape, other):
                trace.sets.union(labels, other)
        trace.deferred = remaining


def _broadcasts_over_channels(trace: Trace, shape: Sequence[int], labels: Tensor) -> bool:
    """Whether a tensor of this shape is broadcast along an axis along which the channels of the labels differ."""
    dims = max(len(shape), labels.dim())
    padded = labels[(None,) * (dims - labels.dim())]
    sizes = (1,) * (dims - len(shape)) + tuple(shape)
    return any(size == 1 and trace.varies_along(padded, axis) for axis, size in enumerate(sizes))


def _matmul(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
    """(..., n, k) @ (..., k, m), with or without bias: both k axes are coupled; the result has the labels of n or m."""
    left, right = args[-2:]
    weights = [view if view and len(view.axes) == 2 else None for view in map(trace.parameter_of, (left, right))]
    if weights[1] is not None:
        labels = trace.labels_of(left) if trace.parameter_of(left) is None else None
        trace.set_labels(result, _times_weight(trace, labels, weights[1]).expand(result.shape))
    elif weights[0] is not None:
        labels = trace.labels_of(right)
        rows = _times_weight(trace, None if labels is None else labels.mT, weights[0].permute((1, 0)))
        trace.set_labels(result, rows.expand(result.mT.shape).mT)
    else:
        _contraction(trace, trace.labels_of(left), trace.labels_of(right), result)
    bias, labels = trace.labels_of(args[0]) if len(args) > 2 else None, trace.labels_of(result)
    if bias is not None and labels is not None and _broadcasts_over_channels(trace, bias.shape, labels):
        trace.deferred.append((bias, labels))
    elif bias is not None and labels is not None:
        trace.shifts.append((bias, labels))
        trace.sets.union(bias, labels)


def _times_weight(trace: Trace, labels: Tensor | None, weight: ParameterView) -> Tensor:
    """Return the labels of activation (..., n, k) times weight (k, m)."""
    others = () if labels is None else range(labels.dim() - 1) if trace.by_head else (-2,)  # one matrix for all heads
    is_mixed = any(trace.varies_along(labels, axis) for axis in others) if labels is not None else False
    if labels is not None and is_mixed and not trace.varies_along(labels, -1):
        return labels[..., :1]  # mixes tokens; the channels are the rows
    if labels is not None:
        trace.sets.union(squeeze_broadcast(labels), trace.axis_labels(weight, 0))
    trace.writers[weight.name] = None
    return trace.axis_labels(weight, 1)


def _contraction(trace: Trace, first: Tensor | None, second: Tensor | None, result: Tensor) -> None:
    """Product of two activations (..., n, k) @ (..., k, m)."""
    over_channels = [
        labels is not None and trace.varies_along(labels, axis) for labels, axis in ((first, -1), (second, -2))
    ]
    heads = _heads_of_product(trace, first, second, all(over_channels))
    if heads is not None:
        trace.set_labels(result, heads.expand(result.shape))
        return
    if first is not None and second is not None and all(over_channels):
        pair = [squeeze_broadcast(labels) for labels in (first.mT, second)]
        for channels in pair:
            trace.sets.union(channels, channels[..., :1])
        trace.sets.union(*(channels[..., :1] for channels in pair))
        trace.contractions.append(pair[1])
    for labels, summed in ((first, over_channels[0]), (second, over_channels[1])):
        if labels is not None and summed and not all(over_channels):
            trace.mark_unprunable(labels, "it is summed over")
    if first is not None and not over_channels[0] and trace.varies_along(first, -2):
        trace.set_labels(result, first[..., :1].expand(result.shape))
    elif second is not None and not over_channels[1]:
        trace.set_labels(result, second[..., :1, :].expand(result.shape))


def _heads_of_product(trace: Trace, first: Tensor | None, second: Tensor | None, over_channels: bool) -> Tensor | None:
    """Record a product of several heads; return the labels of its result (b, 1, 1) in a trace of whole heads."""
    operands = [squeeze_broadcast(compact(labels)) for labels in (first, second) if labels is not None]
    if any(labels.dim() != 3 for labels in operands):
        return None
    varied = [labels for labels in operands if bool((labels != labels[:1]).any())]
    widths = [labels.shape[axis] for labels, axis in ((first, -1), (second, -2)) if labels is not None]
    by_channel = all(len(np.unique(labels[0])) <= width for labels, width in zip(operands, widths, strict=True))
    if trace.by_head:
        by_channel = not any(trace.varies_along(labels, axis) for labels in operands for axis in (1, 2))
    if not varied and by_channel and (over_channels or any(trace.is_one_head(labels) for labels in operands)):
        varied = operands  # a single head
    elif not varied and second is not None and trace.varies_along(second, -1):
        of_logits = first is None or not any(trace.varies_along(first, axis) for axis in (-1, -2))
        varied = [squeeze_broadcast(second)] if of_logits else []
    if not varied:
        return None
    trace.products.append(Product(trace.running[-1][0], first, second, over_channels))
    if not trace.by_head:
        for labels in varied:
            trace.unite_heads(labels, varied[0][:, :1, :1])
        return None
    if any(trace.varies_along(labels, axis) for labels in varied for axis in (1, 2)):
        return None
    for labels in varied[1:]:
        trace.sets.union(varied[0][:, :1, :1], labels[:, :1, :1])
    return varied[0][:, :1, :1]


def _convolution(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
    """Dense: input channels are coupled with the kernel's columns; depth-wise: with its rows; grouped: not prunable."""
    value, kernel, bias, groups = args[0], args[1], args[2], args[8]
    weight, input_labels = trace.parameter_of(kernel), trace.labels_of(value)
    if weight is None:
        _unknown_op(trace, func, args)
        return
    is_transposed = bool(args[6])  # its kernel is (input channels, output channels of a group, ...)
    if is_transposed and groups == 1:
        weight = weight.permute((1, 0, *range(2, kernel.dim())))
    elif is_transposed and kernel.shape[1] > 1:
        if input_labels is not None:
            trace.mark_unprunable(input_labels, f"it runs through a transposed convolution of {groups} groups")
        return
    if input_labels is not None and any(trace.varies_along(input_labels, axis) for axis in range(2, value.dim())):
        _convolution_along_channels(trace, input_labels, kernel, result)
        return
    across = (1, -1) + (1,) * (result.dim() - 2)
    rows = trace.axis_labels(weight, 0).view(across)
    if input_labels is not None and trace.varies_along(input_labels, 0):  # every head runs through the same kernel
        _convolution_of_heads(trace, input_labels, weight, groups, result)
        return
    if groups == 1:
        if input_labels is not None:
            trace.sets.union(input_labels, trace.axis_labels(weight, 1).view(across))
        if not is_transposed:
            trace.writers[weight.name] = None
    elif groups == value.shape[1]:  # every output channel reads one input channel
        if input_labels is not None:
            trace.sets.union(squeeze_broadcast(input_labels).repeat_interleave(result.shape[1] // groups, 1), rows)
    elif input_labels is not None:
        _grouped_convolution(trace, compact(input_labels.flatten(2)[0, :, 0]), rows.flatten(), groups)
    else:
        trace.mark_unprunable(rows, f"it runs through a convolution of {groups} groups")
    trace.set_labels(result, rows.expand(result.shape))
    shift = trace.labels_of(bias)
    if shift is not None:
        trace.shifts.append((shift, rows.flatten()))
        trace.sets.union(shift, rows.flatten())


def _grouped_convolution(trace: Trace, channels: Tensor, rows: Tensor, groups: int) -> None:
    """Channels of one group are mixed: only heads of whole groups can be cut."""
    inputs, outputs = channels.reshape(groups, -1), rows.view(groups, -1)
    trace.grouped.append((inputs, outputs))
    if trace.by_head and not trace.varies_along(inputs, 1):
        trace.sets.union(inputs[:, :1], outputs)
        return
    for labels in (inputs, outputs):
        trace.mark_unprunable(labels, f"it runs through a convolution of {groups} groups")


def _convolution_of_heads(trace: Trace, labels: Tensor, weight: ParameterView, groups: int, result: Tensor) -> None:
    """Heads along the batch axis of a convolution: dense or depth-wise, with one kernel for all heads."""
    channels = labels.flatten(2)[:, :, 0]  # (heads, channels)
    if not trace.varies_along(labels, 1):
        channels = channels[:, :1]
    elif groups == 1 or groups == labels.shape[1] == result.shape[1]:
        channels = _one_kernel_per_head(trace, channels, weight, groups == 1)
    else:
        trace.mark_unprunable(labels, f"it runs through a convolution of {groups} groups")
        return
    trace.set_labels(result, channels.view(*channels.shape, *(1,) * (result.dim() - 2)).expand(result.shape))


def _one_kernel_per_head(trace: Trace, channels: Tensor, weight: ParameterView, dense: bool) -> Tensor:
    """Return new labels (heads, rows) as if every head had a kernel of its own; they are united at the end."""
    rows = trace.axis_labels(weight, 0)
    numbers = torch.from_numpy(np.unique(channels[:, 0].numpy(), return_inverse=True)[1])
    fresh = trace.sets.new_labels(int(numbers.max()) + 1, len(rows))[numbers]
    trace.shared += [(channels, trace.axis_labels(weight, 1) if dense else rows), (fresh, rows)]
    trace.unite_heads(channels, fresh[:, :1])
    trace.unite_heads(fresh, fresh[:, :1])
    return fresh


def _convolution_along_channels(trace: Trace, input_labels: Tensor, kernel: Tensor, result: Tensor) -> None:
    """Channels along a spatial axis: a 1x1 kernel keeps them if all maps that it mixes have the same channels."""
    if trace.varies_along(input_labels, 1) or kernel[0, 0].numel() > 1:
        trace.mark_unprunable(input_labels, "it is convolved over")
    else:
        trace.set_labels(result, input_labels.narrow(1, 0, 1).expand(result.shape))


def _embedding(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
    """Lookup of rows of a table by index: the channels are the table's columns."""
    weight = trace.parameter_of(args[0])
    if weight is not None:
        trace.set_labels(result, trace.axis_labels(weight, 1).expand(result.shape))


def apply_rms_norm_rule(trace: Trace, module: nn.Module, value: Tensor, result: Tensor) -> None:
    """Apply the rule of an RMSNorm module; the rule for its single operations would refuse the mean over channels.

    Args:
        trace: The state of the trace.
        module: The norm.
        value: Its input.
        result: Its output.
    """
    _counting_norm(trace, value, list(module.parameters()), result, -1)


def _layer_norm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    _counting_norm(trace, args[0], args[2:4], result[0], -1)


def _group_norm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    labels = trace.labels_of(args[0])
    if labels is not None and args[6] > 1:
        trace.mark_unprunable(labels, f"a GroupNorm of {args[6]} groups counts its channels")
    _counting_norm(trace, args[0], args[1:3], result[0], 1)


def _counting_norm(trace: Trace, value: Tensor, parameters: Sequence[Any], result: Tensor, axis: int) -> None:
    """A norm whose statistics count the channels, so that a channel of zeros is not a removed channel."""
    labels = trace.labels_of(value)
    if labels is not None and trace.varies_along(labels, axis):
        trace.normalized.append((squeeze_broadcast(labels), trace.running_module()))
    _normalization(trace, value, parameters, result, axis)


def _normalization(trace: Trace, value: Tensor, parameters: Sequence[Any], result: Tensor, axis: int) -> None:
    """Couple the channels along an axis with the elements of scale, shift and running statistics."""
    labels = trace.labels_of(value)
    if labels is None:
        return
    if trace.by_head and not trace.varies_along(labels, axis):  # every head runs through the same norm
        parameters = ()
    for parameter in parameters:
        elements = trace.labels_of(parameter)
        if elements is not None:
            trace.sets.union(squeeze_broadcast(labels).movedim(axis, -1), elements)
    trace.set_labels(result, labels)


def _pooling(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Pooling and resizing along the last two axes, separately for every channel."""
    labels, first = trace.labels_of(args[0]), result[0] if isinstance(result, tuple) else result
    if labels is None:
        return
    if trace.varies_along(labels, -1) or trace.varies_along(labels, -2):
        if labels.shape[-3] > 1 and not trace.varies_along(labels, -3):
            trace.mark_unprunable(labels, "it is pooled over")
            return
        trace.sets.union(labels, labels.narrow(-1, 0, 1).narrow(-2, 0, 1))  # positions of one map, as of a table
    trace.set_labels(first, labels.narrow(-1, 0, 1).narrow(-2, 0, 1).expand(first.shape))


def _reduction(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Sum, mean, norm or softmax over some axes: channels along these axes cannot be pruned."""
    labels, name = trace.labels_of(args[0]), func.overloadpacket.__name__
    if labels is None:
        return
    given = kwargs.get("dim", args[2] if name == "linalg_vector_norm" and len(args) > 2 else (*args[1:2], None)[0])
    dims = [given] if isinstance(given, int) else given or range(labels.dim())
    dims = [dim % labels.dim() for dim in dims]
    if any(trace.varies_along(labels, dim) for dim in dims):
        if name in VECTOR_NORMS:  # channels of zeros do not change it
            return
        trace.mark_unprunable(labels, f"{name.strip('_')} runs over it")
        return
    if name not in SAME_SHAPE:
        for dim in dims:
            labels = labels.narrow(dim, 0, 1)
    first = result[0] if isinstance(result, tuple) else result
    if first.dim() != labels.dim():
        labels = labels.reshape([size for dim, size in enumerate(labels.shape) if dim not in dims])
    trace.set_labels(first, labels.expand(first.shape))


def _indexing(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
    """Indexing with tensors: all channels along an indexed axis are coupled."""
    labels = trace.labels_of(args[0])
    if labels is None:
        return
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
        _unknown_op(trace, func, args)
        return
    for axis, index in enumerate(args[1]):
        if index is not None:
            trace.sets.union(squeeze_broadcast(labels), squeeze_broadcast(labels.narrow(axis, 0, 1)))
            labels = labels.narrow(axis, 0, 1)
    first = [None if index is None else torch.zeros(index.shape, dtype=torch.int64) for index in args[1]]
    trace.set_labels(result, func(labels.contiguous(), first))


def _unknown_op(trace: Trace, func: Any, args: Sequence[Any]) -> None:
    for value in args:
        for tensor in value if isinstance(value, list | tuple) else [value]:
            labels = trace.labels_of(tensor)
            if labels is not None:
                trace.mark_unprunable(labels, f"operation {func.overloadpacket.__name__} is not supported")


MAX_OF_HEADS = 1 << 15  # labels whose sets are not looked up after a sum; that would lose which heads they are from
ADDITIONS = ("add", "add_")
VIEWS = ("view", "_unsafe_view", "_reshape_alias")
IDENTITIES = ("clone", "contiguous", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy")
COPIES = ("roll", "flip", "repeat", "cat", "stack", "constant_pad_nd")
FLOAT_ONLY = ("reflection_pad2d", "replication_pad2d", "im2col")
VECTOR_NORMS = ("linalg_vector_norm", "norm")
SAME_SHAPE = ("_softmax", "_log_softmax", "_safe_softmax", "cumsum")
REARRANGEMENTS = (
    *("reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "select", "slice", "split"),
    *("split_with_sizes", "unbind", "unfold", "diagonal", "narrow", "pixel_shuffle"),
    *(*VIEWS, *COPIES, *IDENTITIES, *FLOAT_ONLY),
)
REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "prod"),
    *VECTOR_NORMS,
    *SAME_SHAPE,
)
POOLINGS = (
    *("avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(REARRANGEMENTS, _rearrangement),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(POOLINGS, _pooling),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _matmul),
    "convolution": _convolution,
    "embedding": _embedding,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "index": _indexing,
}
