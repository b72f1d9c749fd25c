"""Top-1 and top-5 accuracy."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitprune.data.batch_checks import checked_stream
from vitprune.errors import BadInput
from vitprune.evaluation.losses import check_labels
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.kept_classes import kept_classes
from vitprune.runtime.outputs import main_tensor, require_classifier
from vitprune.runtime.progress import track


@check_arguments()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], Tensor]:
    """Measure top-1 and top-5 accuracy.

    Args:
        model: A classifier.
        batches: Images (B, C, H, W) and labels (B,). Labels and predictions of a model that was cut to some classes
            (`prune.classes`) are classes of the dense model.

    Returns:
        `top1` and `top5` in percent, and the predicted class of every image (N,).

    Raises:
        BadInput: the model has no classifier, there are no images, a batch cannot be used, or a label is not a class of
            the model.
    """
    require_classifier(model, "evaluate it with another metric, such as knn or cosine")
    device = next(model.parameters()).device
    right1 = right5 = seen = 0
    predictions = []
    with torch.no_grad(), eval_mode(model):
        for images, labels in checked_stream(track(batches, "evaluating"), model, "batches"):
            logits = main_tensor(model(images.to(device))).float().cpu()  # (B, classes)
            if labels.is_floating_point():
                raise BadInput("labels: are probabilities; give class indices (B,), as torch.int64")
            check_labels(labels.cpu(), logits)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == labels.cpu().unsqueeze(1)
            right1, right5, seen = right1 + int(hits[:, 0].sum()), right5 + int(hits.sum()), seen + len(labels)
            predictions.append(best[:, 0])
    predicted, classes = torch.cat(predictions), kept_classes(model)
    predicted = predicted if classes is None else torch.tensor(classes)[predicted]
    return {"top1": 100 * right1 / seen, "top5": 100 * right5 / seen}, predicted
