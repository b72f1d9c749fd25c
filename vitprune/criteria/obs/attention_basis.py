"""Function-preserving change of basis of q/k and v/proj that sorts channels by energy."""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-10  # relative to the largest eigenvalue; smaller ones are noise


@dataclass(frozen=True)
class AttentionBasis:
    """Bases of the heads of one attention, (heads, c, c) each: q' = q @ query, k' = k @ key, v' = v @ value.

    query[h] @ key[h].T = I, so the logits do not change; `back` is the inverse of `value`, for proj. `logits` and
    `output` (heads, c) are the energies of the new channels, in descending order.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    back: Tensor
    logits: Tensor
    output: Tensor


def attention_basis(query: Tensor, key: Tensor, joined: Tensor, weight: Tensor) -> AttentionBasis:
    """Return the bases in which truncation is the best low-rank approximation of the logits and of each head's output.

    Args:
        query: Second moment of q, (heads, c, c).
        key: Second moment of k, centered over the tokens of a softmax, (heads, c, c).
        joined: Second moment of proj's input with a 1 appended, (heads * c + 1, heads * c + 1).
        weight: Weight of proj, (o, heads * c).

    Source: truncated SVD of G_Q^1/2 G_K^1/2 and of G_Z^1/2 W_o^T, G the second moments.
    """
    heads, width, _ = query.shape
    mean = joined[-1, :-1] / joined[-1, -1]
    covariance = joined[:-1, :-1] - torch.outer(mean, mean) * joined[-1, -1]  # the mean is absorbed by the bias of proj
    per_head = []
    for head in range(heads):
        channels = slice(head * width, (head + 1) * width)
        per_head.append(
            (
                *_of_logits(query[head], key[head]),
                *_of_output(covariance[channels, channels], weight[:, channels].double(), float(joined[-1, -1])),
            )
        )
    parts = [torch.stack(part) for part in zip(*per_head, strict=True)]
    return AttentionBasis(parts[0], parts[1], parts[3], parts[4], parts[2], parts[5])


def _of_logits(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B with A B^T = I that share the singular values of the logits equally, and their energies."""
    query_root, query_root_inverse = _roots(query)
    u, s, _ = torch.linalg.svd(query_root @ _roots(key)[0])
    root = s.clamp_min(float(s[0]) * FLOOR**0.5 if float(s[0]) > 0 else 1.0).sqrt()
    basis = query_root_inverse @ u * root
    return basis, torch.linalg.inv(basis).T, s.square()


def _of_output(covariance: Tensor, weight: Tensor, tokens: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the basis P of v, P^-1 for proj, and the energies of the head's output."""
    root, inverse_root = _roots(covariance)
    u, s, _ = torch.linalg.svd(root @ weight.T, full_matrices=True)
    energies = torch.zeros(len(covariance), dtype=torch.float64)
    energies[: len(s)] = s.square()
    value = inverse_root @ u * tokens**0.5  # unit variance
    return value, torch.linalg.inv(value), energies


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a second moment and its inverse, with eigenvalues clamped from below."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(max(float(values[-1]) * FLOOR, torch.finfo(torch.float64).tiny))
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T
