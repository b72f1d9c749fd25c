"""Weighted k-nearest-neighbor classification of feature vectors."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune.errors import BadInput

NEIGHBORS, TEMPERATURE, CHUNK = 20, 0.07, 1024


def nearest_neighbors(
    features: Tensor,
    labels: Tensor,
    reference: tuple[Tensor, Tensor] | None = None,
    neighbors: int = NEIGHBORS,
    temperature: float = TEMPERATURE,
) -> dict[str, float]:
    """Classify images by the labels of the most similar ones, each weighted by exp(cosine similarity / temperature).

    Args:
        features: Features of the images, (N, C).
        labels: Their labels, (N,).
        reference: Features (M, C) and labels (M,) of the images to compare with; None: the other images of `features`
            (leave-one-out).
        neighbors: Number of most similar images.
        temperature: Divisor of the similarity.

    Returns:
        `knn_top1` and `knn_top5` in percent. A class without a vote is not among the top 5.

    Raises:
        BadInput: a label is no class index, there is nothing to compare with, or the features differ in width.

    Source: Wu et al. 2018 (instance discrimination), as DINO evaluates features: 20 neighbors, temperature 0.07.
    """
    others, answers = (features, labels) if reference is None else reference
    number = len(others) - (reference is None)
    for name, given in ("batches", labels), ("reference", answers):
        if given.is_floating_point() or given.dim() != 1:
            shape = tuple(given.shape)
            raise BadInput(f"knn: {name} have labels {given.dtype} of shape {shape}; give class indices (B,)")
        if int(given.min()) < 0:
            raise BadInput(f"knn: every image needs a label; give pairs (images, labels) as {name}")
    if number < 1 or others.shape[1] != features.shape[1]:
        raise BadInput(f"knn: {number} images to compare with, of {others.shape[1]} features; give reference images")
    rows, own = F.normalize(others, dim=1), F.normalize(features, dim=1)
    classes = int(max(answers.max(), labels.max())) + 1
    right1 = right5 = 0
    for start in range(0, len(own), CHUNK):
        similarity = own[start : start + CHUNK] @ rows.T
        if reference is None:
            similarity[torch.arange(len(similarity)), start + torch.arange(len(similarity))] = -torch.inf
        best, nearest = similarity.topk(min(neighbors, number), dim=1)
        votes = torch.zeros(len(best), classes, dtype=torch.float64)
        votes.scatter_add_(1, answers[nearest], (best.double() / temperature).exp())
        most, winners = votes.topk(min(5, classes), dim=1)
        hits = (winners == labels[start : start + CHUNK, None]) & (most > 0)
        right1, right5 = right1 + int(hits[:, 0].sum()), right5 + int(hits.sum())
    return {"knn_top1": 100 * right1 / len(own), "knn_top5": 100 * right5 / len(own)}
