"""State of a channel trace: the labels of all tensors, and the relations between labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vitprune.architectures.tracing.union_find import UnionFind, compact, squeeze_broadcast


@dataclass(frozen=True)
class ParameterView:
    """A parameter or buffer whose axes may be permuted: axis i of the view is axis `axes[i]` of the parameter."""

    name: str
    axes: tuple[int, ...]


class Trace:
    """Channel labels of tensors, of the axes of weight matrices and of the elements of other parameters.

    Attributes:
        sets: the union-find over all labels.
        axes: labels by parameter and axis, of parameters that are multiplied as matrices.
        elements: labels by parameter, of all others; shape of the parameter.
        writers: weights whose rows make new channels, in the order of the forward pass (a dict as an ordered set).
        residual_sums: labels of sums of two activations.
        contractions: labels over which two activations are contracted, as q and k are.
        deferred: pairs of labels; the first is broadcast along an axis where the channels of the second differed.
        module_stack: description of the modules that run now, innermost last.
        paused: whether operations are ignored, because a module that has one rule as a whole runs.
    """

    def __init__(self, tensors: Mapping[str, Tensor], model_name: str) -> None:
        self.sets = UnionFind()
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.elements: dict[str, Tensor] = {}
        self.writers: dict[str, None] = {}
        self.residual_sums: list[Tensor] = []
        self.contractions: list[Tensor] = []
        self.deferred: list[tuple[Tensor, Tensor]] = []
        self.module_stack = [model_name]
        self.paused = False
        self._shapes = {name: value.shape for name, value in tensors.items()}
        self._by_tensor: Any = WeakIdKeyDictionary()  # labels of an activation, or ParameterView
        for name, value in tensors.items():
            if value.is_floating_point():
                self._by_tensor[value] = ParameterView(name, tuple(range(value.dim())))

    def labels_of(self, value: Any) -> Tensor | None:
        """Return the labels of a tensor's elements, None if it has none; a parameter gets new labels."""
        entry = self._by_tensor.get(value) if isinstance(value, Tensor) else None
        if not isinstance(entry, ParameterView):
            return entry if isinstance(entry, Tensor) else None
        if entry.name not in self.elements:
            self.elements[entry.name] = self.sets.new_labels(*self._shapes[entry.name])
        return self.elements[entry.name].permute(entry.axes)

    def parameter_of(self, value: Any) -> ParameterView | None:
        """Return the parameter that a tensor is a view of, None for any other tensor."""
        entry = self._by_tensor.get(value) if isinstance(value, Tensor) else None
        return entry if isinstance(entry, ParameterView) else None

    def is_labelled_activation(self, value: Tensor) -> bool:
        """Return whether a tensor has labels and is not a parameter."""
        return isinstance(self._by_tensor.get(value), Tensor)

    def set_labels(self, value: Any, labels: Tensor | ParameterView | None) -> None:
        """Record the labels of the result of an operation, expanded to its shape."""
        if isinstance(value, Tensor) and labels is not None and value.is_floating_point():
            if isinstance(labels, Tensor):
                labels = squeeze_broadcast(labels).expand(value.shape)
            self._by_tensor[value] = labels

    def axis_labels(self, weight: ParameterView, axis: int) -> Tensor:
        """Return the labels along an axis of a weight matrix; `axis` counts the axes of the view."""
        key = (weight.name, weight.axes[axis])
        if key not in self.axes:
            self.axes[key] = self.sets.new_labels(self._shapes[weight.name][key[1]])
        return self.axes[key]

    def mark_unprunable(self, labels: Tensor, why: str) -> None:
        """Record that these channels cannot be pruned, with the module that runs now."""
        self.sets.mark_unprunable(squeeze_broadcast(labels), f"{self.module_stack[-1]}: {why}")

    def varies_along(self, labels: Tensor, axis: int) -> bool:
        """Return whether the channels differ along an axis."""
        small = squeeze_broadcast(labels)
        if small.shape[axis] == 1:
            return False
        roots = self.sets.find(small.contiguous())
        return not bool((roots == roots.narrow(axis, 0, 1)).all())

    def compacted(self, labels: Tensor) -> Tensor:
        """Return the representatives of labels, expanded along every axis where these are equal."""
        return compact(self.sets.find(squeeze_broadcast(labels).contiguous())).expand(labels.shape)
