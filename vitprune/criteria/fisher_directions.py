"""Directions in which to take gradients of an answer, so that few of them make up its Fisher matrix."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

ROUNDS = 6  # of subspace iteration


def fisher_directions(
    probability: Tensor, head: Tensor | None, number: int, seed: int, positions: Sequence[int]
) -> Iterator[Tensor]:
    """Directions of the logits, (B, ..., classes) each, whose outer products sum to diag(p) - p p^T on average.

    Where `number` is at least that of the classes, those are sqrt(p_c) (e_c - p) of every class, and the sum is exact.
    Otherwise one half are the leading directions of an answer's Fisher matrix as the `head` (classes, d) passes it on
    (of classes alone where it is None), and the other half are what is left of all classes at once, with random signs:
    a mean of zero between them, so no bias. Where an image has several answers (one per token), the directions of each
    answer have a random sign too. `positions` of the images and the seed decide the signs, whatever the batch.

    Source: Halko et al. 2011 (subspace iteration); Hutchinson 1990 (random signs).
    """
    classes = probability.shape[-1]
    signs = _signs(probability, seed, positions)
    several = probability.dim() > 2
    own = number >= classes
    basis = torch.eye(classes).to(probability) if own else _leading(probability, head, (number + 1) // 2)
    for place in range(basis.shape[-1]):
        taken = basis[..., place].expand_as(probability)
        yield _half(taken * next(signs)[..., :1] if several else taken, probability)
    bundles = 0 if own else max(1, number - basis.shape[-1])
    for _ in range(bundles):
        drawn = next(signs)
        left = drawn - (basis @ (basis.mT @ drawn[..., None])).squeeze(-1)
        yield _half(left, probability) / bundles**0.5


def _half(taken: Tensor, probability: Tensor) -> Tensor:
    """A root of the Fisher matrix, diag(sqrt p) - p sqrt(p)^T, times a vector."""
    weighted = probability.sqrt() * taken
    return weighted - probability * weighted.sum(dim=-1, keepdim=True)


def _leading(probability: Tensor, head: Tensor | None, number: int) -> Tensor:
    """Orthonormal vectors of the root's domain that carry most of what reaches the head's input; (..., classes, K)."""
    classes = probability.shape[-1]
    weight = None if head is None else head.to(probability)  # (classes, d)
    p = probability[..., None]
    width = classes if weight is None else weight.shape[1]
    start = torch.randn((width, number), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = start.to(p).expand(*probability.shape[:-1], width, number)
    for _ in range(ROUNDS):
        moved = q if weight is None else weight @ q
        back = p * (moved - (p * moved).sum(dim=-2, keepdim=True))
        q = torch.linalg.qr(back if weight is None else weight.mT @ back)[0]
    moved = q if weight is None else weight @ q
    basis: Tensor = torch.linalg.qr(p.sqrt() * (moved - (p * moved).sum(dim=-2, keepdim=True)))[0]
    return basis


def _signs(probability: Tensor, seed: int, positions: Sequence[int]) -> Iterator[Tensor]:
    sources = [np.random.default_rng([seed, position]) for position in positions]
    while True:
        drawn = [source.integers(2, size=probability.shape[1:], dtype=np.int8) for source in sources]
        yield torch.from_numpy(np.stack(drawn)).to(probability) * 2 - 1
