"""Changes of a dense model before the first pruning cycle: classes, rotation of the residual stream, token merging."""

import torch
from torch import nn

from vitprune.architectures.classifier import keep_classes
from vitprune.architectures.token_merging import merge_tokens
from vitprune.criteria import Batches
from vitprune.criteria.obs.stream import rotated, stream_basis
from vitprune.errors import BadInput
from vitprune.pruning.held_out import fitted_images
from vitprune.pruning.plan import Plan
from vitprune.runtime.eval_mode import scoring_mode


def prepared(model: nn.Module, plan: Plan, batches: Batches) -> nn.Module:
    """Return the model that the cycles of a plan prune: with the outputs of some classes, rotated, with merged tokens.

    Args:
        model: A copy of the dense model; it may be changed.
        plan: The pruning plan.
        batches: Calibration batches, from `vitprune.data.class_subset.images_of_classes`.

    Raises:
        BadInput: no batches for the rotation, or the stream cannot be rotated, or tokens cannot be merged.
    """
    model = narrowed(model, plan)
    if plan.config.rotate_residual:
        with scoring_mode(model):
            basis = stream_basis(model, fitted_images(batches, plan.config.reconstruct), plan.context(0))
        with torch.inference_mode(False):
            model = rotated(model, basis, batches[0][0][:1])
    return merging(model, plan)


def merging(model: nn.Module, plan: Plan) -> nn.Module:
    """Merge tokens of a model in place, if the plan says so; return the model.

    Raises:
        BadInput: the tokens of the model cannot be merged.
    """
    number = plan.config.merge_tokens
    return model if number is None else merge_tokens(model, number)


def narrowed(model: nn.Module, plan: Plan) -> nn.Module:
    """Cut the classifier of a model to the classes of a plan, in place, if it names some; return the model.

    Raises:
        BadInput: as `keep_classes`.
    """
    classes = plan.config.classes
    if classes is None:
        return model
    try:
        return keep_classes(model, classes)
    except BadInput as error:
        raise BadInput(f"prune.{error}") from None
