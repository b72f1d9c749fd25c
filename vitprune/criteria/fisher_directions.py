"""Sample logit directions whose outer products average to the Fisher matrix diag(p) - p p^T."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

ROUNDS = 6  # subspace iterations


def fisher_directions(
    probability: Tensor, head: Tensor | None, number: int, seed: int, positions: Sequence[int]
) -> Iterator[Tensor]:
    """Yield logit directions v_i with E[sum_i v_i v_i^T] = F = diag(p) - p p^T.

    With `number` >= classes, v_c = sqrt(p_c) (e_c - p) for every class, and the sum is exact. Otherwise one half are
    the leading directions of F as seen through the last layer `head`, and the other half are random-sign combinations
    of the orthogonal complement, which makes the estimate unbiased. If an image has several outputs (one per token),
    the directions of each output get random signs too.

    Args:
        probability: Softmax of the logits, (B, ..., classes).
        head: Weight of the last Linear layer, (classes, d); None ranks the directions by F alone.
        number: Number of directions.
        seed: Seed of the random signs.
        positions: Index of every image in the whole data set; signs depend on seed and index, not on the batch.

    Yields:
        Directions of the logits, (B, ..., classes).

    Source: Halko et al. 2011 (subspace iteration); Hutchinson 1990 (random signs).
    """
    classes = probability.shape[-1]
    signs = _signs(probability, seed, positions)
    per_token = probability.dim() > 2
    exact = number >= classes
    basis = torch.eye(classes).to(probability) if exact else _leading(probability, head, (number + 1) // 2)
    for index in range(basis.shape[-1]):
        vector = basis[..., index].expand_as(probability)
        yield _half(vector * next(signs)[..., :1] if per_token else vector, probability)
    num_random = 0 if exact else max(1, number - basis.shape[-1])
    for _ in range(num_random):
        drawn = next(signs)
        complement = drawn - (basis @ (basis.mT @ drawn[..., None])).squeeze(-1)
        yield _half(complement, probability) / num_random**0.5


def _half(vector: Tensor, probability: Tensor) -> Tensor:
    """Multiply a vector by the square root diag(sqrt p) - p sqrt(p)^T of the Fisher matrix."""
    weighted = probability.sqrt() * vector
    return weighted - probability * weighted.sum(dim=-1, keepdim=True)


def _leading(probability: Tensor, head: Tensor | None, number: int) -> Tensor:
    """Return an orthonormal basis of the dominant subspace at the input of the head; (..., classes, K)."""
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
