"""The dense stage: create the model to prune, with random, published or checkpoint weights, and train it if asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune import models
from vitprune.config.params import Params
from vitprune.errors import BadInput
from vitprune.pipeline.artifacts import History, model_facts
from vitprune.pipeline.project_data import MANIFEST, METRICS, OUT, PLOTS, device
from vitprune.pipeline.stage_training import evaluate_model, stage_checkpoint, train_model
from vitprune.runtime.distributed import process_group
from vitprune.runtime.files import sha256, write_json
from vitprune.training.distillation import classification
from vitprune.training.finetune import zero_weights
from vitprune.training.loop import FrozenZeros


@dataclass(frozen=True)
class InitialModel:
    """The model before training.

    Attributes:
        model: The model.
        frozen_zeros: Weights that are zero in its checkpoint and remain zero in training; None for none.
        facts: Where the weights come from, for metrics/dense.json.
    """

    model: nn.Module
    frozen_zeros: FrozenZeros | None
    facts: dict[str, Any]


def run(params: Params) -> None:
    """Write the dense model, its training curve and metrics/dense.json."""
    settings = params.dense
    inputs = [MANIFEST, *([settings.checkpoint] if settings.checkpoint is not None else [])]
    with process_group(device()) as dist, stage_checkpoint("dense", params, inputs, dist) as checkpoint:
        initial = initial_model(params)
        model = initial.model.to(device())
        evaluate = evaluate_model(model, params)
        history = History(OUT / "dense", "dense", dist.rank == 0)
        if settings.train is not None:
            task = classification(model, settings.train.smoothing)
            store = checkpoint.store("training")
            train_model(task, settings.train, params, history, store, initial.frozen_zeros, evaluate, dist=dist)
        if dist.rank:  # rank 0 writes
            return
        history.close(PLOTS / "dense.csv")
        models.save(model, OUT / "dense")
        facts = initial.facts | {"epochs": history.epochs} | model_facts(model, OUT / "dense") | evaluate()
        write_json(METRICS / "dense.json", facts)


def initial_model(params: Params) -> InitialModel:
    """Create the model that `dense` starts from.

    Zeros of a checkpoint are frozen. A checkpoint directory written by `save` may hold a pruned model; if
    model.args.num_classes differs from it, the model gets a new classifier, initialized with the seed.

    Raises:
        BadInput: a setting is missing or does not fit the checkpoint.
    """
    settings = params.dense
    if settings.start == "checkpoint" and settings.checkpoint is None:
        raise BadInput("dense.checkpoint: start is checkpoint, so give the path of a safetensors file or a directory")
    if settings.start == "train" and settings.train is None:
        raise BadInput("dense.train: start is train, so give epochs, lr and the rest")
    checkpoint = settings.checkpoint if settings.start == "checkpoint" else None
    if checkpoint is not None and checkpoint.is_dir():
        return _from_directory(checkpoint, params)
    model = models.create(params.model.name, params.model.args, params.seed, settings.start == "pretrained", checkpoint)
    facts: dict[str, Any] = {"from": settings.start, "checkpoint_sha256": None}
    if checkpoint is None:
        return InitialModel(model, None, facts)
    frozen = zero_weights(model)
    facts |= {"checkpoint_sha256": sha256(checkpoint), "frozen_zeros": _count(frozen)}
    return InitialModel(model, frozen, facts)


def zeros_to_keep(model: nn.Module, params: Params, pruned: FrozenZeros | None, keep_zeros: bool) -> FrozenZeros | None:
    """Return the weights that remain zero while a pruned model is fine-tuned.

    Args:
        model: The pruned model.
        params: The project's params.yaml.
        pruned: The weights that pruning has set to zero; None for structured pruning.
        keep_zeros: Whether to keep all zeros of a model that started from a checkpoint, those of the checkpoint
            included. If False, or without a checkpoint, only `pruned` remains zero.
    """
    return zero_weights(model) if keep_zeros and params.dense.start == "checkpoint" else pruned


def _from_directory(directory: Path, params: Params) -> InitialModel:
    """Load the model of a directory in float32, as the images are, with a new classifier for other classes."""
    model: Any = models.load(directory).float()
    architecture = model.pretrained_cfg["architecture"]
    if params.model.name.partition(".")[0] != architecture:
        raise BadInput(f"model.name: {params.model.name}, but {directory} holds {architecture}; set it to that")
    for key in params.model.args:
        if key != "num_classes":
            raise BadInput(
                f"model.args.{key}: is fixed by checkpoint {directory}; remove it (only num_classes can be overridden)"
            )
    classes = params.model.args.get("num_classes", model.num_classes)
    if type(classes) is not int or classes < 1:
        raise BadInput(f"model.args.num_classes: {classes!r} is not a number of classes; give a whole number above 0")
    frozen = zero_weights(model)
    facts: dict[str, Any] = {"from": "checkpoint", "checkpoint_sha256": sha256(directory / models.WEIGHTS)}
    facts |= {"checkpoint_classes": model.num_classes, "frozen_zeros": _count(frozen)}
    if classes != model.num_classes:
        if params.dense.train is None:
            raise BadInput(
                f"dense.train: the classifier for {classes} classes is new ({directory} has {model.num_classes}), "
                "so give epochs, lr and the rest"
            )
        _new_classifier(model, classes, params.seed)
    return InitialModel(model, frozen, facts)


def _new_classifier(model: Any, classes: int, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(classes)


def _count(frozen: FrozenZeros | None) -> int:
    return sum(int((~mask).sum()) for mask in frozen.masks.values()) if frozen is not None else 0
