"""Union-find over channel labels, and operations on tensors of labels.

A tensor of labels has the shape of the tensor that it describes. Along axes where labels repeat it is expanded (stride
0), so that it needs no memory there. Label 0 means "no channel".
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_CHANNEL = 0
Array = np.ndarray[Any, Any]


class UnionFind:
    """Disjoint sets of channel labels, and the reasons why some sets cannot be pruned."""

    def __init__(self) -> None:
        self._parent: Array = np.zeros(1, dtype=np.int64)
        self._next = 1
        self._why = [""]  # reasons, in the order in which they were recorded
        self._reason: Array = np.zeros(1, dtype=np.int32)  # number of the reason by label

    def new_labels(self, *shape: int) -> Tensor:
        """Return a tensor of new labels, each in a separate set."""
        number = int(np.prod(shape))
        self.grow(self._next + number)
        return torch.arange(self._next - number, self._next).view(shape)

    def grow(self, number: int) -> None:
        """Make sure that there are labels up to a number, exclusive; new ones are in separate sets."""
        if number > len(self._parent):
            grown = np.arange(max(2 * len(self._parent), number), dtype=np.int64)
            grown[: self._next] = self._parent[: self._next]
            self._parent = grown
            self._reason = np.concatenate([self._reason, np.zeros(len(grown) - len(self._reason), dtype=np.int32)])
        self._next = max(self._next, number)

    def find(self, labels: Tensor) -> Tensor:
        """Return the representative of every label, in the shape of `labels`."""
        return torch.from_numpy(np.asarray(self._roots(labels.numpy())))

    def _roots(self, labels: Array) -> Array:
        roots: Array = self._parent[labels]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                return roots
            roots = above

    def are_alone(self) -> Tensor:
        """Return by label whether it is the only one in its set."""
        roots = self.find(torch.arange(self._next)).numpy()
        return torch.from_numpy(np.bincount(roots, minlength=self._next)[roots] == 1)

    def find_unique(self, tensors: list[Tensor]) -> set[int]:
        """Return the representatives of all labels in some tensors, without `NO_CHANNEL`."""
        roots: set[int] = set()
        for labels in tensors:
            roots.update(np.unique(self.find(squeeze_broadcast(labels).flatten()).numpy()).tolist())
        return roots - {NO_CHANNEL}

    def union(self, first: Tensor, second: Tensor) -> None:
        """Unite the labels of two tensors element by element, with broadcasting; `NO_CHANNEL` is never united."""
        first, second = broadcast_aligned(first, second)
        shape = np.broadcast_shapes(first.shape, second.shape)
        a, b = first.expand(shape).flatten().numpy(), second.expand(shape).flatten().numpy()
        while True:
            a, b = self._roots(a), self._roots(b)
            differ = (a != b) & (a != NO_CHANNEL) & (b != NO_CHANNEL)
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def mark_unprunable(self, labels: Tensor, why: str) -> None:
        """Record that the channels of these labels cannot be pruned; the first reason for a label is kept."""
        roots = self.find(squeeze_broadcast(labels).flatten()).numpy()
        new = roots[(self._reason[roots] == 0) & (roots != NO_CHANNEL)]
        if len(new):
            self._reason[new] = len(self._why)
            self._why.append(why)

    def reasons(self) -> Callable[[Array], str]:
        """Return a function from current representatives to the first reason of the first one that has one, or ""."""
        marked = np.flatnonzero(self._reason[: self._next])
        why = tuple(self._why)
        first = np.full(self._next, len(why), dtype=np.int32)
        np.minimum.at(first, self.find(torch.from_numpy(marked)).numpy(), self._reason[marked])

        def reason(roots: Array) -> str:
            numbers = first[roots]
            return why[next(iter(numbers[numbers < len(why)].tolist()), 0)]

        return reason


def squeeze_broadcast(labels: Tensor) -> Tensor:
    """Return the labels with size 1 along every expanded axis."""
    if 0 not in labels.stride():
        return labels
    for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """Return the same labels, expanded along every axis where they are equal."""
    small = squeeze_broadcast(labels)
    for axis, size in enumerate(small.shape):
        first = small.narrow(axis, 0, 1)
        if size > 1 and torch.equal(first, small.narrow(axis, 1, 1)) and bool((small == first).all()):
            small = first
    return small.expand(labels.shape)


def broadcast_aligned(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of labels with equal numbers of axes, and size 1 along every expanded axis."""
    dims = max(first.dim(), second.dim())
    a, b = (squeeze_broadcast(value[(None,) * (dims - value.dim())]) for value in (first, second))
    return a, b


def coalesce(first: Tensor, second: Tensor, shape: torch.Size) -> Tensor:
    """Return the first labels, replaced by the second where they are `NO_CHANNEL`.

    Args:
        first: labels.
        second: Labels that broadcast with the first.
        shape: Shape of the result.
    """
    a, b = broadcast_aligned(first, second)
    labels = torch.where(a == NO_CHANNEL, b, a) if bool((a == NO_CHANNEL).any()) else a
    return labels.expand(shape)
