"""What is seen of a model while it runs: the labels of its tensors, and which labels have met how."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vitprune.architectures.tracing.union_find import Labels, squeeze_broadcast


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer as it is, or with its axes in another order; `order` are its own axes."""

    name: str
    order: tuple[int, ...]


class Trace:
    """What has been seen of a model: labels of tensors, of axes of matrices, and of elements of other parameters."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.labels = Labels()
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.elements: dict[str, Tensor] = {}
        self.writes: dict[str, None] = {}  # weights whose rows make new channels, in the order of the model
        self.added: list[Tensor] = []  # labels of sums of two computed tensors
        self.attended: list[Tensor] = []  # labels of what two computed tensors are contracted over
        self.later: list[tuple[Tensor, Tensor]] = []  # labels of what is broadcast along an axis where others differ
        self.paths = [name]  # of the modules that run now
        self._shapes = {name: value.shape for name, value in tensors.items()}
        self._known: Any = WeakIdKeyDictionary()
        for name, value in tensors.items():
            if value.is_floating_point():
                self._known[value] = Weight(name, tuple(range(value.dim())))

    def of(self, value: Any) -> Tensor | None:
        """Labels of a tensor's elements; those of a parameter are its own."""
        found = self._known.get(value) if isinstance(value, Tensor) else None
        if not isinstance(found, Weight):
            return found if isinstance(found, Tensor) else None
        if found.name not in self.elements:
            self.elements[found.name] = self.labels.fresh(*self._shapes[found.name])
        return self.elements[found.name].permute(found.order)

    def weight(self, value: Any) -> Weight | None:
        """The parameter that a tensor is, in whatever order of its axes."""
        found = self._known.get(value) if isinstance(value, Tensor) else None
        return found if isinstance(found, Weight) else None

    def computed(self, value: Tensor) -> bool:
        """Whether a tensor has labels and is no parameter."""
        return isinstance(self._known.get(value), Tensor)

    def put(self, value: Any, labels: Tensor | Weight | None) -> None:
        """Give a result its labels, which are repeated to its shape."""
        if isinstance(value, Tensor) and labels is not None and value.is_floating_point():
            self._known[value] = labels if isinstance(labels, Weight) else squeeze_broadcast(labels).expand(value.shape)

    def axis(self, weight: Weight, place: int) -> Tensor:
        """Labels along an axis of a parameter that is multiplied with; `place` is counted as its axes are now."""
        key = (weight.name, weight.order[place])
        if key not in self.axes:
            self.axes[key] = self.labels.fresh(self._shapes[weight.name][key[1]])
        return self.axes[key]

    def mark_unprunable(self, labels: Tensor, why: str) -> None:
        """Note that these channels cannot be cut, and in which module that is seen."""
        self.labels.mark_unprunable(squeeze_broadcast(labels), f"{self.paths[-1]}: {why}")

    def varies(self, labels: Tensor, axis: int) -> bool:
        """Whether labels differ along an axis."""
        small = squeeze_broadcast(labels)
        if small.shape[axis] == 1:
            return False
        found = self.labels.find(small.contiguous())
        return not bool((found == found.narrow(axis, 0, 1)).all())
