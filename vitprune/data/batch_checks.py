"""Check batches and inputs that a user gives to the Python API, and convert them to the type of the model."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.kept_classes import output_labels
from vitprune.runtime.messages import first_line, warn
from vitprune.runtime.outputs import main_tensor
from vitprune.runtime.wrappers import plain_model

SUM_TOLERANCE = 0.01  # of probabilities in half precision
BRIGHT = 100  # pixels above are not normalized
IGNORED = -100  # label of torch for no label
NORMALIZE = "convert them to floating point and normalize them as timm.data.create_transform does"


def checked_batches(batches: Any, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Read the calibration batches into a list, so that every pass sees the same images, and check them.

    Args:
        batches: A list, a tuple or a DataLoader of pairs (images, labels), or of images without labels.
        model: The model that they are for.

    Raises:
        BadInput: an iterator, a batch that is not a pair or has no image, or images that the model does not take.
    """
    if isinstance(batches, Iterator):
        raise BadInput("calibration: an iterator is used up after one pass; give a list, a tuple or a DataLoader")
    return list(_checked(batches, model, "calibration", None, labeled=False, mapped=True))


def checked_stream(
    batches: Any, model: nn.Module, name: str, classes: int | None = None, labeled: bool = True, mapped: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield checked batches one by one.

    Args:
        batches: An iterable of pairs (images, labels).
        model: The model that they are for. Labels of a model that was cut to some classes are those of the dense model;
            they become its outputs if `mapped`.
        name: Name of the argument for messages.
        classes: Number of classes that labels must be below; None for no check. -100 marks an image without a label.
        labeled: Whether a batch must be a pair; else images alone get the label -100.
        mapped: Whether labels become outputs of a model that was cut to some classes.

    Raises:
        BadInput: there are no batches, a label is not a class, or as `checked_batches`, except for iterators.
    """
    empty = True
    for pair in _checked(batches, model, name, classes, labeled, mapped):
        empty = False
        yield pair
    if empty:
        raise no_images(name)


def first_image(batches: Any, model: nn.Module, name: str, labeled: bool = True) -> Tensor:
    """Return the first image (1, C, H, W) of batches that can be iterated again; the random state is restored.

    Args:
        batches: An iterable of pairs (images, labels).
        model: The model that they are for.
        name: Name of the argument for messages.
        labeled: Whether a batch must be a pair; else images alone suffice.

    Raises:
        BadInput: as `checked_stream`.
    """
    with torch.random.fork_rng(devices=[]):
        images, _ = next(checked_stream(batches, model, name, labeled=labeled, mapped=False))
    return images[:1]


def no_images(name: str) -> BadInput:
    """Return the error for an argument without any batch."""
    return BadInput(f"{name}: no images; give at least one batch")


def _checked(
    batches: Any, model: nn.Module, name: str, classes: int | None, labeled: bool, mapped: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | dict | str):
        kind, alone = type(batches).__name__, "" if labeled else " or of tensors of images"
        raise BadInput(f"{name}: is a {kind}; give a list or a DataLoader of pairs (images, labels){alone}")
    if isinstance(batches, tuple) and len(batches) == 2 and all(isinstance(part, Tensor) for part in batches):
        labeled = True  # one pair instead of a list of pairs
    shapes: set[tuple[int, ...]] = set()
    for number, batch in enumerate(batches):
        where = f"{name}[{number}]"
        images, labels = _pair(where, batch, labeled)
        images = checked_input(where, images, model, shapes, logits=True)
        if len(labels) != len(images):
            raise BadInput(f"{where}: {len(images)} images and {len(labels)} labels; give one label per image")
        labels = output_labels(model, labels, where, IGNORED) if mapped else labels
        _check_classes(where, labels, classes)
        yield images, labels


def checked_input(
    where: str, images: Any, model: nn.Module, shapes: set[tuple[int, ...]] | None = None, logits: bool = False
) -> Tensor:
    """Return inputs in the type of the model's weights, after a trial run of the first one.

    Args:
        where: Name of the argument for messages.
        images: Images (B, C, H, W), or tokens (B, T) of a causal language model.
        model: The model.
        shapes: Shapes of an input that need no trial run; new ones are added.
        logits: Whether the output must be logits, not features.

    Raises:
        BadInput: it is not such a tensor, is empty or not finite, or the model does not run on it.
    """
    if not isinstance(images, Tensor):
        raise BadInput(f"{where}: is a {type(images).__name__}; give a tensor of images (B, C, H, W)")
    if images.is_meta or images.layout is not torch.strided:
        kind = "on the meta device" if images.is_meta else str(images.layout)
        raise BadInput(f"{where}: is a tensor {kind}; give a dense tensor with values")
    config = getattr(plain_model(model), "pretrained_cfg", {})  # a model without one may take any shape
    tokens = "context_length" in config
    if (config and images.dim() != (2 if tokens else 4)) or not images.numel():
        wanted = "tokens (B, T)" if tokens else "images (B, C, H, W)"
        raise BadInput(f"{where}: has shape {tuple(images.shape)}; give {wanted}, at least one")
    if images.is_floating_point() == tokens:
        wanted = "give integer tokens" if tokens else NORMALIZE
        raise BadInput(f"{where}: images are {images.dtype}; {wanted}")
    if not tokens and not bool(images.isfinite().all()):
        raise BadInput(f"{where}: has pixels that are not finite; check the images and their normalization")
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    result = _normal_tensor(images, None if tokens else weight.dtype)
    known = set() if shapes is None else shapes
    if result.shape[1:] not in known:
        if config and not tokens and float(result.min()) >= 0 and float(result.max()) > BRIGHT:
            warn(f"{where}: has pixels from 0 to {float(result.max()):g}; normalize the images as for the training")
        output = _trial_run(where, result[:1].to(weight.device), model)
        output = output if config else main_tensor(output)  # criteria see the output of timm's models as it is
        if logits and not isinstance(output, Tensor):
            raise BadInput(f"{where}: {_name(model)} returns a {type(output).__name__}, not logits; use a classifier")
        known.add(result.shape[1:])
    return result


def _check_classes(where: str, labels: Tensor, classes: int | None) -> None:
    if labels.is_floating_point() and labels.dim() > 1:
        rows = labels.double().flatten(0, -2)
        if not bool((rows >= 0).all()) or not bool(((rows.sum(dim=1) - 1).abs() < SUM_TOLERANCE).all()):
            raise BadInput(f"{where}: labels are no probabilities; give class indices (B,), or rows with the sum 1")
    if classes is None or labels.is_floating_point():
        return
    if bool((labels == IGNORED).all()):
        raise BadInput(f"{where}: no image has a label (all are {IGNORED}); give class indices")
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise BadInput(f"{where}: label {int(wrong[0])} is not a class; the model has the classes 0 to {classes - 1}")


def _pair(where: str, batch: Any, labeled: bool) -> tuple[Any, Tensor]:
    if isinstance(batch, Tensor) and batch.dim() and not labeled:
        return batch, torch.full(batch.shape[:1], IGNORED)
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
        alone = "" if labeled else ", or tensors of images"
        raise BadInput(f"{where}: is a {type(batch).__name__}{size}; give pairs, as in [(images, labels), ...]{alone}")
    images, labels = batch
    if isinstance(labels, list | tuple) and all(isinstance(label, int) for label in labels):
        labels = torch.tensor(labels, dtype=torch.int64)
    if not isinstance(labels, Tensor) or not labels.dim():
        raise BadInput(f"{where}: labels must be a tensor of class indices (B,), not {type(labels).__name__}")
    return images, _normal_tensor(labels, None if labels.is_floating_point() else torch.int64)


def _normal_tensor(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor that autograd can save, also for a caller in inference mode."""
    with torch.inference_mode(False):
        normal = tensor.clone() if tensor.is_inference() else tensor.detach()
        return normal if dtype is None else normal.to(dtype)


def _trial_run(where: str, image: Tensor, model: nn.Module) -> Any:
    try:
        with torch.no_grad(), eval_mode(model):
            return model(image)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a forward pass may raise anything for an input that it does not take
        shape = tuple(image.shape[1:])
        raise BadInput(
            f"{where}: {_name(model)} does not run on inputs of shape {shape} ({first_line(error)})"
        ) from None


def _name(model: nn.Module) -> str:
    return type(plain_model(model)).__name__
