"""Evaluate a model: accuracy, k-NN accuracy of its features or agreement with the dense model, and cost."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor, nn

from vitprune.data import example_input
from vitprune.data.batch_checks import first_image
from vitprune.errors import BadInput
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.agreement import cosine, linear_cka, map_iou
from vitprune.evaluation.cost import count
from vitprune.evaluation.nearest_neighbors import nearest_neighbors
from vitprune.evaluation.pooled_features import pooled_features
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.wrappers import is_timm_model, plain_model

Metric = Literal["accuracy", "knn", "cosine", "cka", "iou"]
METRICS: tuple[Metric, ...] = ("accuracy", "knn", "cosine", "cka", "iou")


@check_arguments()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Metric = "accuracy",
    *,
    dense: nn.Module | None = None,
    reference: Iterable[tuple[Tensor, Tensor]] | None = None,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Evaluate a model on images by one metric, and count its parameters and MACs.

    MACs are those of the model's own size of images; for models that are not timm's, of the size of the first image.

    Args:
        model: The model.
        batches: Batches (images (B, C, H, W), labels (B,)); for cosine, cka and iou images without labels suffice.
        metric: "accuracy": top-1 and top-5 of a classifier. "knn": those of a weighted k-nearest-neighbor classifier
            on the model's features (`pooled_features`), 20 neighbors and temperature 0.07 as in DINO. Agreement with
            the dense model: "cosine" (mean cosine similarity of the features), "cka" (linear CKA of the features, which
            may differ in width) or "iou" (of maps, such as a segmentation).
        dense: The dense model, for cosine, cka and iou.
        reference: Labeled batches that knn compares with; None: the other images of `batches`.
        threshold: For iou, threshold of a map of one channel; 0 is the probability 0.5 of a logit.

    Returns:
        `top1` and `top5`, or `knn_top1` and `knn_top5`, in percent, or the agreement by the name of the metric; and the
        fields of `Counts`.

    Raises:
        BadInput: the metric is unknown or needs a dense model, or as `accuracy`.

    Source: k-NN: Caron et al. 2021 (DINO); CKA: Kornblith et al. 2019.
    """
    counts = asdict(count(model, _example(plain_model(model), batches)))
    if metric not in METRICS:
        raise BadInput(f"metric {metric!r}: unknown; use one of {', '.join(METRICS)}")
    if metric == "accuracy":
        return accuracy(model, batches)[0] | counts
    if metric == "knn":
        others = None if reference is None else pooled_features(model, reference, "reference")
        return nearest_neighbors(*pooled_features(model, batches), others) | counts
    if dense is None:
        raise BadInput(f"metric {metric!r}: compares with the dense model; give dense")
    batches = list(batches)
    if metric == "iou":
        return {"iou": map_iou(model, dense, batches, threshold)} | counts
    first, second = (pooled_features(network, batches)[0] for network in (model, dense))
    return {metric: cosine(first, second) if metric == "cosine" else linear_cka(first, second)} | counts


def _example(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Return an input for the counts: the first image, or one of the model's size if that is timm's."""
    if is_timm_model(model) or isinstance(batches, Iterator):
        return example_input(model, 1)
    return first_image(batches, model, "batches", labeled=False)
