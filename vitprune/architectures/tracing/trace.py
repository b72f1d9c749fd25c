"""State of a channel trace: the labels of all tensors, and the relations between labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.architectures.tracing.union_find import NO_CHANNEL, UnionFind, compact, squeeze_broadcast

Site = tuple[str, int | None]  # a parameter and one of its axes; None for all its elements
NO_HEADS: Mapping[Site, Tensor] = {}


@dataclass(frozen=True)
class ParameterView:
    """A parameter or buffer, permuted or cut out: axis i of the view is axis `axes[i]` of the parameter.

    Attributes:
        name: Name of the parameter.
        axes: Axis of the parameter of every axis of the view.
        starts: First position in the parameter of every axis of the view.
        sizes: Length of every axis of the view.
    """

    name: str
    axes: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def permute(self, order: Sequence[int]) -> "ParameterView":
        """Return the view with its axes in another order."""
        return ParameterView(
            self.name, *(tuple(values[axis] for axis in order) for values in (self.axes, self.starts, self.sizes))
        )

    def is_matrix_of(self, value: Tensor) -> bool:
        """Return whether a tensor is this matrix, repeated along more axes."""
        return len(self.sizes) == 2 < value.dim() and value.shape[-2:] == self.sizes

    def narrow(self, axis: int, start: int, length: int) -> "ParameterView":
        """Return a part of the view along one axis."""
        starts, sizes = [*self.starts], [*self.sizes]
        starts[axis], sizes[axis] = starts[axis] + start, length
        return replace(self, starts=tuple(starts), sizes=tuple(sizes))


@dataclass(frozen=True)
class Product:
    """Batched product of two activations (b, n, k) @ (b, k, m) whose channels differ along b, the axis of heads.

    Attributes:
        module: Path of the module that computes it.
        left: Labels of the first operand; None if it has none.
        right: Labels of the second operand.
        over_channels: Whether the product sums over channels of both, as that of queries and keys does.
    """

    module: str
    left: Tensor | None
    right: Tensor | None
    over_channels: bool


class Trace:
    """Channel labels of tensors, of the axes of weight matrices and of the elements of other parameters.

    All tensors are those of one record, which keeps them during the trace.

    Attributes:
        sets: The union-find over all labels.
        heads: A second one over the same labels; labels of one head of a product are united.
        in_heads: All labels in `heads`.
        axes: Labels by parameter and axis, of parameters that are multiplied as matrices.
        elements: Labels by parameter, of all others; shape of the parameter.
        writers: Weights whose rows make new channels, in the order of the forward pass (a dict as an ordered set).
        residual_sums: Labels of sums of two activations.
        contractions: Labels over which two activations are contracted, as q and k are.
        products: Batched products of two activations whose channels differ along the batch axis, the axis of heads.
        shifts: Pairs of labels of a bias and of the rows that it is added to.
        deferred: Pairs of labels; the first is broadcast along an axis where the channels of the second differed.
        shared: Pairs of labels, coupled by a kernel that all heads share; united at the end, or never if `by_head`.
        grouped: Pairs of labels (groups, channels) of the inputs and outputs of grouped convolutions.
        normalized: Labels over which a norm runs that counts its channels, with a description of the module.
        running: Path and class of the modules that run now, innermost last.
    """

    def __init__(self, tensors: Mapping[str, Tensor], model_name: str, heads: Mapping[Site, Tensor] = NO_HEADS) -> None:
        """Start a trace.

        Args:
            tensors: Parameters and buffers by name.
            model_name: Name of the model for messages.
            heads: Number of the head of every position of a parameter, 0 for none, if the trace is one of whole heads:
                all channels of a head are then one set from the start, and the logits of the head belong to it.
        """
        self.sets = UnionFind()
        self.heads = UnionFind()
        self.in_heads: list[Tensor] = []
        self.by_head = bool(heads)
        self._heads = heads
        self.head_labels = self.sets.new_labels(1 + max((int(numbers.max()) for numbers in heads.values()), default=0))
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.elements: dict[str, Tensor] = {}
        self.writers: dict[str, None] = {}
        self.residual_sums: list[Tensor] = []
        self.contractions: list[Tensor] = []
        self.products: list[Product] = []
        self.shifts: list[tuple[Tensor, Tensor]] = []
        self.deferred: list[tuple[Tensor, Tensor]] = []
        self.shared: list[tuple[Tensor, Tensor]] = []
        self.grouped: list[tuple[Tensor, Tensor]] = []
        self.normalized: list[tuple[Tensor, str]] = []
        self.running = [("", model_name)]
        self._shapes = {name: value.shape for name, value in tensors.items()}
        self._learned = {name for name, value in tensors.items() if isinstance(value, nn.Parameter)}
        self._by_id: dict[int, Tensor | ParameterView] = {}  # labels of an activation, or view, by the id of a tensor
        for name, value in tensors.items():
            if value.is_floating_point():
                axes = tuple(range(value.dim()))
                self._by_id[id(value)] = ParameterView(name, axes, (0,) * len(axes), tuple(value.shape))

    def labels_of(self, value: Any) -> Tensor | None:
        """Return the labels of a tensor's elements, None if it has none; a parameter gets new labels."""
        entry = self._by_id.get(id(value))
        if not isinstance(entry, ParameterView):
            return entry if isinstance(entry, Tensor) else None
        if entry.name not in self.elements:
            self.elements[entry.name] = self._new_labels((entry.name, None), self._shapes[entry.name])
        labels = self.elements[entry.name].permute(entry.axes)
        for axis, (start, size) in enumerate(zip(entry.starts, entry.sizes, strict=True)):
            labels = labels.narrow(axis, start, size)
        return labels.expand(value.shape)

    def parameter_of(self, value: Any) -> ParameterView | None:
        """Return the parameter that a tensor is a view of, None for any other tensor."""
        entry = self._by_id.get(id(value))
        return entry if isinstance(entry, ParameterView) else None

    def is_labeled_activation(self, value: Tensor) -> bool:
        """Return whether a tensor has labels and is not a parameter."""
        return isinstance(self._by_id.get(id(value)), Tensor)

    def are_of_buffer(self, labels: Tensor) -> bool:
        """Return whether labels are those of a buffer's elements, of which the first one is looked at."""
        first = int(labels.flatten()[0])
        tables = [table for name, table in self.elements.items() if name not in self._learned and table.numel()]
        return any(int(table.flatten()[0]) <= first <= int(table.flatten()[-1]) for table in tables)

    def set_labels(self, value: Any, labels: Tensor | ParameterView | None) -> None:
        """Record the labels of the result of an operation, expanded to its shape."""
        if isinstance(value, Tensor) and labels is not None and value.is_floating_point():
            if isinstance(labels, Tensor):
                labels = squeeze_broadcast(labels).expand(value.shape)
            self._by_id[id(value)] = labels

    def forget_tensors(self) -> None:
        """Forget the labels of single tensors, at the end of the record that keeps them."""
        self._by_id.clear()

    def axis_labels(self, weight: ParameterView, axis: int) -> Tensor:
        """Return the labels along an axis of a weight matrix; `axis` counts the axes of the view."""
        key = (weight.name, weight.axes[axis])
        if key not in self.axes:
            self.axes[key] = self._new_labels(key, self._shapes[weight.name][key[1] : key[1] + 1])
        return self.axes[key].narrow(0, weight.starts[axis], weight.sizes[axis])

    def _new_labels(self, site: Site, shape: torch.Size) -> Tensor:
        labels = self.sets.new_labels(*shape)
        if site in self._heads:
            heads = self._heads[site]
            self.sets.union(labels, torch.where(heads > 0, self.head_labels[heads], NO_CHANNEL))
        return labels

    def unite_heads(self, labels: Tensor, heads: Tensor) -> None:
        """Record that labels belong to the same head as others, with broadcasting."""
        self.heads.grow(1 + int(max(labels.max(), heads.max())))
        self.heads.union(labels, heads)
        self.in_heads += [labels, heads]

    def is_one_head(self, labels: Tensor) -> bool:
        """Return whether all labels are of one head, in a trace of whole heads."""
        if not self.by_head:
            return False
        roots = self.sets.find(squeeze_broadcast(labels).flatten())
        return bool((roots == roots[0]).all()) and bool((self.sets.find(self.head_labels[1:]) == roots[0]).any())

    def mark_unprunable(self, labels: Tensor, why: str) -> None:
        """Record that these channels cannot be pruned, with the module that runs now."""
        self.sets.mark_unprunable(squeeze_broadcast(labels), f"{self.running_module()}: {why}")

    def running_module(self) -> str:
        """Return a description of the innermost module that runs now: path and class, or the class of the model."""
        path, name = self.running[-1]
        return f"{path} ({name})" if path else name

    def varies_along(self, labels: Tensor, axis: int) -> bool:
        """Return whether the channels differ along an axis."""
        small = squeeze_broadcast(labels)
        if small.shape[axis] == 1 or not small.numel():
            return False
        roots = self.sets.find(small.contiguous())
        return not bool((roots == roots.narrow(axis, 0, 1)).all())

    def compacted(self, labels: Tensor) -> Tensor:
        """Return the representatives of labels, expanded along every axis where these are equal."""
        return compact(self.sets.find(squeeze_broadcast(labels).contiguous())).expand(labels.shape)
