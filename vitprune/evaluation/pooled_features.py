"""Features of images: the vector that a classifier reads, or the class token or mean of the features of an encoder."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.data.batch_checks import checked_stream
from vitprune.errors import BadInput
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.hooks import forward_hooks
from vitprune.runtime.outputs import main_tensor, tensors_of
from vitprune.runtime.progress import track
from vitprune.runtime.wrappers import is_timm_model, plain_model

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")  # names of parameters


@torch.no_grad()
def pooled_features(model: nn.Module, batches: Iterable[Any], where: str = "batches") -> tuple[Tensor, Tensor]:
    """Return one feature vector per image, and the labels.

    Of a timm model, the vector before the classifier (`forward_head(..., pre_logits=True)`). Of other models: the input
    of the last Linear layer, if the output has named logits; else of an output (B, N, C) the class token if there is
    one, and the mean over positions of any other output (B, N, C) or (B, C, H, W). A vector (B, C) is returned itself.

    Args:
        model: The model.
        batches: Batches (images (B, C, H, W), labels (B,)), or of images alone, which get the label -100.
        where: Name of the batches for messages.

    Returns:
        Features (N, C) in float32 and labels (N,), on the CPU.

    Raises:
        BadInput: there are no images, a batch cannot be used, batches have labels of several shapes, or the output is
            of another shape.
    """
    model = plain_model(model)
    device = next(model.parameters()).device
    features, targets = [], []
    with eval_mode(model):
        for images, labels in checked_stream(track(batches, "evaluating"), model, where, labeled=False, mapped=False):
            features.append(_features(model, images.to(device)).float().cpu())
            targets.append(labels.cpu())
    if len({labels.shape[1:] for labels in targets}) > 1:
        raise BadInput(f"{where}: have labels of several shapes; give class indices (B,) in all of them")
    return torch.cat(features), torch.cat(targets)


def _features(model: Any, images: Tensor) -> Tensor:
    if is_timm_model(model) and hasattr(model, "forward_head"):
        return _vectors(model, model.forward_head(model.forward_features(images), pre_logits=True))
    inputs: list[Tensor] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with forward_hooks((layer, lambda layer, args, output: inputs.append(args[0])) for layer in linear):
        output = model(images)
    named = isinstance(output, dict) and "logits" in output
    vectors = [value for value in inputs if value.dim() == 2 and len(value) == len(images)]
    return vectors[-1] if named and vectors else _vectors(model, output)


def _vectors(model: nn.Module, output: Any) -> Tensor:
    value = main_tensor(output)
    value = next(tensors_of(output), value) if isinstance(value, tuple | list) else value
    if not isinstance(value, Tensor) or value.dim() not in (2, 3, 4):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise BadInput(f"{type(model).__name__}: has no feature vector per image (its output: {shape}); use accuracy")
    if value.dim() == 4:
        return value.flatten(2).mean(dim=2)
    if value.dim() == 2:
        return value
    has_class_token = any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in model.named_parameters())
    return value[:, 0] if has_class_token else value.mean(dim=1)
