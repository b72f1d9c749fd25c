"""Labels of channels: which positions of which tensors stand and fall together, found by union as a model runs.

A tensor of labels has the shape of the tensor that it is about; along axes where channels repeat it is expanded, so
that it takes no memory there. Label 0 is no channel.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

NONE = 0


class Labels:
    """Disjoint sets of numbered channels, and why some of them cannot be cut."""

    def __init__(self) -> None:
        self._root: np.ndarray[Any, Any] = np.zeros(1, dtype=np.int64)
        self._next = 1
        self._stuck: dict[int, str] = {}

    def fresh(self, *shape: int) -> Tensor:
        """New labels, each a set of its own."""
        number = int(np.prod(shape))
        if self._next + number > len(self._root):
            grown = np.arange(max(2 * len(self._root), self._next + number), dtype=np.int64)
            grown[: self._next] = self._root[: self._next]
            self._root = grown
        self._next += number
        return torch.arange(self._next - number, self._next).view(shape)

    def find(self, labels: Tensor) -> Tensor:
        """The representatives of labels."""
        found = self._root[labels.numpy()]
        while True:
            above = self._root[found]
            if (above == found).all():
                return torch.from_numpy(np.asarray(found))
            found = above

    def roots(self, labels: list[Tensor]) -> set[int]:
        """The representatives of what is in any of some tensors of labels."""
        found = {int(root) for one in labels for root in np.unique(self.find(one.flatten()).numpy())}
        return found - {NONE}

    def join(self, one: Tensor, other: Tensor) -> None:
        """Unite labels place by place, broadcast; a channel does not unite with what is none."""
        one, other = aligned(one, other)
        shape = np.broadcast_shapes(one.shape, other.shape)
        a, b = one.expand(shape).flatten(), other.expand(shape).flatten()
        while True:
            a, b = self.find(a), self.find(b)
            apart = (a != b) & (a != NONE) & (b != NONE)
            if not bool(apart.any()):
                return
            a, b = a[apart], b[apart]
            np.minimum.at(self._root, torch.maximum(a, b).numpy(), torch.minimum(a, b).numpy())

    def mark_unprunable(self, labels: Tensor, why: str) -> None:
        """Note that what these labels mean cannot be cut, and why."""
        for root in self.roots([labels]):
            self._stuck.setdefault(root, why)

    def reasons(self) -> dict[int, str]:
        """Why sets cannot be cut, by their representatives as they are now."""
        labels = torch.tensor(list(self._stuck), dtype=torch.int64)
        found: dict[int, str] = {}
        for root, why in zip(self.find(labels).tolist(), self._stuck.values(), strict=True):
            found.setdefault(root, why)
        return found


def squeeze_broadcast(labels: Tensor) -> Tensor:
    """The same labels with one place along every axis where they are repeated."""
    for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """The same labels, expanded along every axis where they turn out to be repeated."""
    small = squeeze_broadcast(labels)
    for axis, size in enumerate(small.shape):
        first = small.narrow(axis, 0, 1)
        if size > 1 and torch.equal(first, small.narrow(axis, 1, 1)) and bool((small == first).all()):
            small = first
    return small.expand(labels.shape)


def aligned(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of labels that broadcast, with as many axes, each with one place where it is repeated."""
    dims = max(one.dim(), other.dim())
    a, b = (squeeze_broadcast(value[(None,) * (dims - value.dim())]) for value in (one, other))
    return a, b


def either(one: Tensor, other: Tensor, shape: torch.Size) -> Tensor:
    """The first labels, or the others where the first are none; expanded to a shape."""
    a, b = aligned(one, other)
    found = torch.where(a == NONE, b, a) if bool((a == NONE).any()) else a
    return found.expand(shape)
