"""Reference implementation of CAP: one image, one block and one weight at a time."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.model_zoo import batches
from tests.support.plans import context
from vitprune import find_groups
from vitprune.criteria import ScoringContext
from vitprune.criteria.obs.fisher_blocks import FisherBlocks

SMALL = context(fisher_block_size=24, damping=1e-7)


def image_gradients(model: nn.Module, param: str, data: list) -> Tensor:
    """Gradient of each image's loss w.r.t. one parameter; (images, weights)."""
    weight, result = model.get_parameter(param), []
    model.eval()
    for images, labels in data:
        for image, label in zip(images, labels, strict=True):
            loss = F.cross_entropy(model(image[None]), label[None])
            (grad,) = torch.autograd.grad(loss, [weight])
            result.append(grad.flatten() * (weight != 0).flatten())
    return torch.stack(result).detach()


def naive_fisher(gradients: Tensor, size: int, damp: float) -> Tensor:
    """damp I + the mean of g g^T, block by block; (blocks, B, B) float64."""
    blocks = []
    for at in range(0, gradients.shape[1], size):
        total = damp * torch.eye(size, dtype=torch.float64)
        for gradient in gradients[:, at : at + size].double():
            total += torch.outer(gradient, gradient) / len(gradients)
        blocks.append(total)
    return torch.stack(blocks)


def right_looking(fisher: Tensor, weights: Tensor, runs: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, list]:
    """Greedy elimination of one block as in the paper: the inverse is downdated after every weight.

    Returns the cumulative loss at each weight (infinite if kept), the weights after every step, and the order.
    `runs` (N, M): N of every M consecutive weights are kept.
    """
    inverse, w, size = torch.linalg.inv(fisher), weights.double().clone(), len(weights)
    order = [int(q) for q in (w == 0).nonzero().flatten()]
    loss, total = torch.full((size,), torch.inf, dtype=torch.float64), 0.0
    loss[order] = 0.0
    trace = [w.clone()]
    while True:
        free = [q for q in range(size) if q not in order and not _complete(q, order, runs)]
        if not free:
            return loss, torch.stack(trace), order
        p = min(free, key=lambda q: float(w[q] ** 2 / inverse[q, q]))
        total += float(w[p] ** 2 / inverse[p, p]) / 2
        w = w - inverse[:, p] * w[p] / inverse[p, p]
        inverse = inverse - torch.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        order.append(p)
        w[order] = 0.0
        loss[p] = total
        trace.append(w.clone())


def _complete(index: int, order: list[int], runs: tuple[int, int] | None) -> bool:
    return runs is not None and sum(q // runs[1] == index // runs[1] for q in order) >= runs[1] - runs[0]


def block_loss(fisher: Tensor, change: Tensor) -> float:
    """Second-order loss of a change of a block's weights."""
    return float(change @ fisher @ change) / 2


def closed_form(fisher: Tensor, weights: Tensor, keep: Tensor) -> tuple[Tensor, float]:
    """Optimal kept weights of a block and their loss, through the inverse restricted to the removed weights."""
    removed = ~keep
    inverse = torch.linalg.inv(fisher)
    solved = torch.linalg.solve(inverse[removed][:, removed], weights[removed].double())
    return (weights - inverse[:, removed] @ solved) * keep, float(weights[removed].double() @ solved) / 2


def sherman_morrison(gradients: Tensor, damp: float) -> Tensor:
    """Inverse of damp I + mean of g g^T by Sherman-Morrison, one gradient at a time, as in the released code."""
    inverse = torch.eye(gradients.shape[1], dtype=torch.float64) / damp
    for gradient in gradients.double():
        moved = inverse @ gradient
        inverse -= torch.outer(moved, moved) / (len(gradients) + gradient @ moved)
    return inverse


def fastcap_columns(fisher: Tensor, weights: Tensor, share: float, damp: float) -> Tensor:
    """FastCAP's algorithm as printed: score, threshold, and columns from left to right; (blocks, B)."""
    full = fisher + damp * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(full), upper=True)
    w = weights.double().clone()
    score = w.square() / upper.diagonal().square()
    keep = score > score.flatten().kthvalue(round(score.numel() * share)).values
    for column in range(w.shape[1]):
        kept = torch.where(keep[:, column], w[:, column], 0.0)
        lost = (w[:, column] - kept) / upper[column, column]
        for later in range(column + 1, w.shape[1]):
            w[:, later] -= lost * upper[column, later]
        w[:, column] = kept
    return w


def matrices(model: nn.Module, setting: ScoringContext = SMALL, data: list | None = None) -> dict[str, Tensor]:
    """Fisher blocks of a whole model, by parameter."""
    result: dict[str, list[Tensor]] = {}
    for part, fisher in FisherBlocks(model, find_groups(model, ["weight"]), data or batches(model), setting):
        result.setdefault(part.param, []).append(fisher)
    return {param: torch.cat(pieces) for param, pieces in result.items()}


def cost(fisher: Tensor, weights: Tensor, new: Tensor) -> float:
    return sum(block_loss(*pair) for pair in zip(fisher, new - weights, strict=True))
