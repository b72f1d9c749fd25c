"""Where the weights of the model to prune start: at random, published by timm, in a file, or in a pruned model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune import models
from vitprune.architectures import find_groups
from vitprune.config.params import Params
from vitprune.errors import BadInput
from vitprune.runtime.files import sha256
from vitprune.training.loop import FrozenZeros


@dataclass(frozen=True)
class InitialModel:
    """A model, the weights that stay zero in its training, and where it came from."""

    model: nn.Module
    held: FrozenZeros | None
    facts: dict[str, Any]


def initial_model(params: Params) -> InitialModel:
    """The model that `dense` begins with.

    The zeros of a checkpoint are held. It may be a directory of `save`, whose model is as it was pruned; where
    model.args.num_classes is another number it gets a new classifier, drawn from the seed.

    Raises:
        BadInput: a setting is missing or does not fit the checkpoint; it is named.
    """
    settings = params.dense
    if settings.start == "checkpoint" and settings.checkpoint is None:
        raise BadInput("dense.checkpoint: start is checkpoint, so give the path of a safetensors file or a directory")
    if settings.start == "train" and settings.train is None:
        raise BadInput("dense.train: start is train, so give epochs, lr and the rest")
    checkpoint = settings.checkpoint if settings.start == "checkpoint" else None
    if checkpoint is not None and checkpoint.is_dir():
        return _pruned(checkpoint, params)
    model = models.create(params.model.name, params.model.args, params.seed, settings.start == "pretrained", checkpoint)
    held = _zeros(model) if checkpoint is not None else None
    facts: dict[str, Any] = {"from": settings.start, "checkpoint_sha256": sha256(checkpoint) if checkpoint else None}
    return InitialModel(model, held, facts | ({"held_weights": _count(held)} if checkpoint else {}))


def zeros_to_keep(model: nn.Module, params: Params, own: FrozenZeros | None, hold: bool) -> FrozenZeros | None:
    """What a training of the pruned model holds at zero: what its plan removed, `own`, and what came as zero.

    A model that began with a checkpoint inherits its zeros, those that no cut has taken; `hold` false lets them grow.
    """
    return _zeros(model) if hold and params.dense.start == "checkpoint" else own


def _pruned(directory: Path, params: Params) -> InitialModel:
    """The model of a directory, with the classifier that the params ask for."""
    model: Any = models.load(directory)
    architecture = model.pretrained_cfg["architecture"]
    if params.model.name.partition(".")[0] != architecture:
        raise BadInput(f"model.name: {params.model.name}, but {directory} holds {architecture}; set it to that")
    for key in params.model.args:
        if key != "num_classes":
            raise BadInput(f"model.args.{key}: {directory} says it itself; remove it, only num_classes may be another")
    classes = params.model.args.get("num_classes", model.num_classes)
    if type(classes) is not int or classes < 1:
        raise BadInput(f"model.args.num_classes: {classes!r} is not a number of classes; give a whole number above 0")
    held = _zeros(model)
    facts: dict[str, Any] = {"from": "checkpoint", "checkpoint_sha256": sha256(directory / models.WEIGHTS)}
    facts |= {"checkpoint_classes": model.num_classes, "held_weights": _count(held)}
    if classes != model.num_classes:
        if params.dense.train is None:
            raise BadInput(
                f"dense.train: the classifier for {classes} classes is new ({directory} has {model.num_classes}), "
                "so give epochs, lr and the rest"
            )
        _new_classifier(model, classes, params.seed)
    return InitialModel(model, held, facts)


def _new_classifier(model: Any, classes: int, seed: int) -> None:
    dtype = next(model.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(classes)
    model.to(dtype)


def _zeros(model: nn.Module) -> FrozenZeros | None:
    """The single weights that a pruning has left at zero, layer by layer; None where there are none."""
    try:
        groups = find_groups(model, ["weight"])
    except BadInput:  # a model that cannot lose single weights has lost none
        return None
    masks = {group.name: model.get_parameter(group.name).detach() != 0 for group in groups}
    held = [group for group in groups if not bool(masks[group.name].all())]
    return FrozenZeros(held, {group.name: masks[group.name] for group in held}) if held else None


def _count(held: FrozenZeros | None) -> int:
    return sum(int((~mask).sum()) for mask in held.masks.values()) if held is not None else 0
