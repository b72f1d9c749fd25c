"""Rebase: a function-preserving change of basis of q/k and of v/proj, after which the last channels matter least."""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-10  # of the largest eigenvalue: what lies below is never seen by the data


@dataclass(frozen=True)
class Bases:
    """Bases of one attention's heads, all (heads, c, c): new q = q @ query, new k = k @ key, new v = v @ value.

    query[h] @ key[h].T is the identity, so logits stay; `back` undoes `value` in proj. `logits` and `output` (heads, c)
    are the energies that each new channel carries, falling.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    back: Tensor
    logits: Tensor
    output: Tensor


def bases(query: Tensor, key: Tensor, joined: Tensor, weight: Tensor) -> Bases:
    """Bases in which truncation is the best low-rank approximation of the logits, and of each head's output.

    query, key (heads, c, c) second moments, k centred over the tokens of a softmax; joined (heads*c + 1, heads*c + 1)
    second moment of proj's input with a 1 appended; weight (o, heads*c) of proj.

    Source: truncated SVD of G_Q^1/2 G_K^1/2 and of G_Z^1/2 W_o^T, G the second moments.
    """
    heads, width, _ = query.shape
    mean = joined[-1, :-1] / joined[-1, -1]
    spread = joined[:-1, :-1] - torch.outer(mean, mean) * joined[-1, -1]  # the mean goes into proj's bias
    found = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        found.append(
            (
                *_of_logits(query[head], key[head]),
                *_of_output(spread[own, own], weight[:, own].double(), float(joined[-1, -1])),
            )
        )
    parts = [torch.stack(part) for part in zip(*found, strict=True)]
    return Bases(parts[0], parts[1], parts[3], parts[4], parts[2], parts[5])


def _of_logits(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q @ A and k @ B with A B^T = 1, both carrying the square root of the singular values, and their energies."""
    left, left_back = _roots(query)
    u, s, _ = torch.linalg.svd(left @ _roots(key)[0])
    root = s.clamp_min(float(s[0]) * FLOOR**0.5 if float(s[0]) > 0 else 1.0).sqrt()
    ours = left_back @ u * root
    return ours, torch.linalg.inv(ours).T, s.square()


def _of_output(spread: Tensor, weight: Tensor, tokens: float) -> tuple[Tensor, Tensor, Tensor]:
    """v @ P, P^-1 for proj, and the energies of what the head adds to the output."""
    half, back = _roots(spread)
    u, s, _ = torch.linalg.svd(half @ weight.T, full_matrices=True)
    energies = torch.zeros(len(spread), dtype=torch.float64)
    energies[: len(s)] = s.square()
    value = back @ u * tokens**0.5  # a variance of 1
    return value, torch.linalg.inv(value), energies


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a second moment, and its inverse; floored, so that both exist."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(max(float(values[-1]) * FLOOR, torch.finfo(torch.float64).tiny))
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T
