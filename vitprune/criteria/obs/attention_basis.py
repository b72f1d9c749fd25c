"""Function-preserving change of basis of q/k and v/proj that sorts channels by energy."""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-10  # relative to the largest eigenvalue; smaller ones are noise


@dataclass(frozen=True)
class LogitsBasis:
    """Bases of q and k of the heads of one attention, (heads, c, c) each: q' = q @ query, k' = k @ key.

    query[h] @ key[h].T = I, so the logits do not change. `energies` (heads, c) are those of the new channels in the
    logits, in descending order.
    """

    query: Tensor
    key: Tensor
    energies: Tensor


@dataclass(frozen=True)
class OutputBasis:
    """Bases of v of the heads of one attention, (heads, c, c): v' = v @ value; `back` is the inverse, for proj.

    The new channels have unit variance and are in descending order of their energy in the head's output.
    """

    value: Tensor
    back: Tensor


def logits_basis(query: Tensor, key: Tensor) -> LogitsBasis:
    """Return the bases in which truncation is the best low-rank approximation of the logits.

    Args:
        query: Second moment of q, (heads, c, c).
        key: Second moment of k, centered over the tokens of a softmax, (heads, c, c).

    Source: truncated SVD of G_Q^1/2 G_K^1/2, G the second moments.
    """
    parts = zip(*(_of_logits(*of_head) for of_head in zip(query, key, strict=True)), strict=True)
    return LogitsBasis(*(torch.stack(part) for part in parts))


def output_basis(joined: Tensor, weight: Tensor, heads: int) -> OutputBasis:
    """Return the bases in which truncation is the best low-rank approximation of each head's output.

    Args:
        joined: Second moment of proj's input with a 1 appended, (heads * c + 1, heads * c + 1).
        weight: Weight of proj, (o, heads * c).
        heads: Number of heads.

    Source: truncated SVD of G_Z^1/2 W_o^T, G the second moment of the input of proj.
    """
    tokens = joined[-1, -1]
    mean = joined[-1, :-1] / tokens
    covariance = joined[:-1, :-1] - torch.outer(mean, mean) * tokens  # the mean is absorbed by the bias of proj
    width, value, back = len(covariance) // heads, [], []
    for channels in (slice(head * width, (head + 1) * width) for head in range(heads)):
        basis = _of_output(covariance[channels, channels], weight[:, channels].double(), float(tokens))
        value.append(basis)
        back.append(torch.linalg.inv(basis))
    return OutputBasis(torch.stack(value), torch.stack(back))


def _of_logits(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B with A B^T = I that share the singular values of the logits equally, and their energies."""
    query_root, query_root_inverse = _roots(query)
    u, s, _ = torch.linalg.svd(query_root @ _roots(key)[0])
    root = s.clamp_min(float(s[0]) * FLOOR**0.5 if float(s[0]) > 0 else 1.0).sqrt()
    basis = query_root_inverse @ u * root
    return basis, torch.linalg.inv(basis).T, s.square()


def _of_output(covariance: Tensor, weight: Tensor, tokens: float) -> Tensor:
    """Return the basis P of v."""
    root, inverse_root = _roots(covariance)
    u, _, _ = torch.linalg.svd(root @ weight.T, full_matrices=True)
    basis: Tensor = inverse_root @ u * tokens**0.5  # unit variance
    return basis


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a second moment and its inverse, with eigenvalues clamped from below."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(max(float(values[-1]) * FLOOR, torch.finfo(torch.float64).tiny))
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T
