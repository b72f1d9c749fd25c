"""Keep some classes of a classifier: the rows of its last layer that belong to other classes are cut out."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.input_size import input_size
from vitprune.runtime.kept_classes import CLASSES, kept_classes, listed_classes
from vitprune.runtime.outputs import main_tensor
from vitprune.runtime.wrappers import plain_model

ROUNDING = 1e-3  # of the largest logit: a product with fewer rows is rounded in another order


@torch.no_grad()
def keep_classes(model: nn.Module, classes: Sequence[int]) -> nn.Module:
    """Cut the classifier to some classes, in place: output i of the result is output classes[i] of the model.

    All layers that write logits are cut, such as both heads of a distilled DeiT; the new logits are compared with those
    of the model before.

    Args:
        model: A classifier with logits (B, classes), whose last layers are Linear or 1 x 1 convolutions.
        classes: Classes to keep, in the order of the new outputs.

    Returns:
        The model. `kept_classes` returns the classes, and `vitprune.save` records them.

    Raises:
        BadInput: a class is not one of the model or occurs twice, there are none, or the model has no such classifier.
    """
    name, example = type(model).__name__, _example(model)
    logits = _logits(model, example)
    number = logits.shape[1]
    check_classes(classes, number)
    if (before := kept_classes(model)) is not None:
        raise BadInput(
            f"classes: {name} has already been cut to classes {listed_classes(before)}; give the dense model"
        )
    rows, layers = torch.tensor(list(classes)), _layers(model, number)
    for chosen in _candidates(model, layers):
        cut = {path: _rows_of(layers[path], rows) for path in chosen}
        undo = {path: _rows_of(layers[path], slice(None)) for path in chosen}
        for path, tensors in cut.items():
            _set(layers[path], tensors)
        if _gives(model, example, logits[:, rows.to(logits.device)]):
            _record(model, tuple(int(label) for label in classes), number)
            return model
        for path, tensors in undo.items():
            _set(layers[path], tensors)
    listed = ", ".join(layers) or "none"
    raise BadInput(f"classes: {name} has no classifier whose rows are its classes (layers of {number} rows: {listed})")


def output_count(model: nn.Module) -> int:
    """Return the number of logits of a classifier.

    Raises:
        BadInput: the model is none.
    """
    with torch.no_grad():
        return _logits(model, _example(model)).shape[1]


def check_classes(classes: Sequence[int], number: int) -> None:
    """Check classes to keep.

    Args:
        classes: The classes.
        number: Number of classes of the model.

    Raises:
        BadInput: there are none, one occurs twice, or one is not a class of the model.
    """
    if not len(classes):
        raise BadInput("classes: is empty; name the classes to keep")
    for position, label in enumerate(classes):
        if not isinstance(label, int) or not 0 <= label < number:
            raise BadInput(f"classes: {label!r} is not a class; the model has the classes 0 to {number - 1}")
        if label in classes[:position]:
            raise BadInput(f"classes: {label} occurs twice; name every class once")


def _example(model: nn.Module) -> Tensor:
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    noise = torch.randn(2, *input_size(model), generator=torch.Generator().manual_seed(0))
    return noise.to(parameter.device, parameter.dtype)


def _logits(model: nn.Module, example: Tensor) -> Tensor:
    """Return the logits of two images.

    Raises:
        BadInput: the output is not of shape (2, classes).
    """
    with eval_mode(model):
        output = main_tensor(model(example))
    has_head = not hasattr(model, "num_classes") or bool(model.num_classes)
    if not has_head or not isinstance(output, Tensor) or output.dim() != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BadInput(
            f"classes: {type(model).__name__} has no classifier (its output: {shape}); use a model with logits, or "
            "leave classes out"
        )
    return output


def _layers(model: nn.Module, number: int) -> dict[str, nn.Module]:
    """Return the layers with as many rows as there are classes, by path, in the order of the model."""
    kinds = (nn.Linear, nn.Conv2d)
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds) and m.weight.shape[0] == number}


def _candidates(model: Any, layers: dict[str, nn.Module]) -> Iterator[list[str]]:
    """Yield sets of layers that may be the classifier: those that timm names, the last one, the last two, and so on."""
    if hasattr(model, "get_classifier"):
        named = model.get_classifier()
        heads = [m for head in (named if isinstance(named, tuple | list) else [named]) for m in head.modules()]
        yield [path for path, layer in layers.items() if any(layer is head for head in heads)]
    for start in reversed(range(len(layers))):
        yield list(layers)[start:]


def _rows_of(layer: Any, rows: Any) -> dict[str, Tensor | None]:
    return {
        name: None if (t := getattr(layer, name)) is None else t.detach()[rows].clone() for name in ("weight", "bias")
    }


def _set(layer: Any, tensors: dict[str, Tensor | None]) -> None:
    for name, value in tensors.items():
        old = getattr(layer, name)
        setattr(layer, name, None if value is None else nn.Parameter(value, requires_grad=old.requires_grad))
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", layer.weight.shape[0])


def _gives(model: nn.Module, example: Tensor, expected: Tensor) -> bool:
    """Return whether a model runs and has these logits, up to rounding."""
    try:
        cut = _logits(model, example)
    except (RuntimeError, BadInput):  # another layer needs the old number of classes
        return False
    tolerance = ROUNDING * float(expected.abs().max()) if expected.dtype.itemsize >= 4 else 0.05
    return cut.shape == expected.shape and torch.allclose(cut, expected, rtol=0, atol=tolerance)


def _record(model: Any, classes: tuple[int, ...], number: int) -> None:
    """Record the classes in the model, and their number in every module and configuration that had the old one."""
    setattr(model, CLASSES, classes)
    for module in model.modules():
        for name in ("num_classes", "num_labels"):
            if vars(module).get(name) == number:
                setattr(module, name, len(classes))
    config = vars(model).get("config")
    names = getattr(config, "id2label", None)
    if names is not None:
        config.id2label = {new: names.get(old, f"LABEL_{old}") for new, old in enumerate(classes)}
        config.label2id = {name: label for label, name in config.id2label.items()}
    published = vars(model).get("pretrained_cfg")
    if published is not None:
        names = published.get("label_names")
        chosen = {} if names is None else {"label_names": [names[label] for label in classes]}
        model.pretrained_cfg = {**published, "num_classes": len(classes), **chosen}


def of_same_classes(dense: nn.Module, model: nn.Module) -> nn.Module:
    """Return a dense model with the outputs of another one: a cut copy if that was cut to some classes.

    Raises:
        BadInput: as `keep_classes`.
    """
    classes = kept_classes(model)
    if classes is None or kept_classes(dense) == classes:
        return dense
    return keep_classes(copy.deepcopy(plain_model(dense)), classes)
