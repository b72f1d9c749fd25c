"""Paths of a project and its images: image source, data splits, calibration batches, device."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from vitprune import data
from vitprune.config.params import Params
from vitprune.data.class_subset import Batches, images_of_classes
from vitprune.errors import BadInput
from vitprune.runtime import tables
from vitprune.runtime.kept_classes import class_positions, kept_classes
from vitprune.runtime.messages import first_line

MANIFEST, CALIBRATION = Path("data/manifest.parquet"), Path("data/calibration.parquet")
OUT, METRICS, PLOTS = Path("out"), Path("metrics"), Path("plots")
WORKERS = "VITPRUNE_WORKERS"
DEVICE = "VITPRUNE_DEVICE"


def device() -> torch.device:
    """Return the device of this process: VITPRUNE_DEVICE if set, else the GPU of its local rank, else the CPU.

    The device is not a parameter, so that cached stages are valid on every machine.

    Raises:
        BadInput: VITPRUNE_DEVICE is not a device of this machine.
    """
    default = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    name = os.environ.get(DEVICE) or default
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"{DEVICE}={name}: cannot be used ({first_line(error)}); give cpu, or unset it") from None
    return torch.device(name)


def source_of(params: Params) -> data.Source:
    """Open the image source of a project, with labels that are classes of the model.

    Raises:
        BadInput: the source cannot be opened, or `dataset.labels` does not name one class for each of its labels.
    """
    settings = params.dataset
    source = data.open_source(settings.source, settings.classes, settings.eval_source)
    if settings.labels is None:
        return source
    needed = max(source.labels) + 1 if source.classes is None else len(source.classes)
    if len(settings.labels) != needed or len(set(settings.labels)) != needed:
        raise BadInput(
            f"dataset.labels: names {len(settings.labels)} classes; {source.spec} has {needed}, name each once"
        )
    return replace(source, labels=tuple(settings.labels[label] for label in source.labels), classes=None)


def open_images(split: str, model: nn.Module, params: Params, augment: str | None = None) -> data.ImageTable:
    """Open a split with the preprocessing of a model, without the images of classes that the model does not have.

    Args:
        split: "train" or "eval".
        model: timm model that sets image size, channels and normalization. The labels are classes of the dense model,
            also if it was cut to some classes.
        params: The project's params.yaml.
        augment: Name of an augmentation of the training images; None for the evaluation preprocessing.

    Raises:
        BadInput: a label is not among the model's classes.
    """
    transform = data.transform(data.data_config(model), augment, params.dataset.exif_orientation)
    table = data.open_split(rows_of_classes(kept_classes(model)), source_of(params), split, transform)
    if kept_classes(model) is not None:
        return table
    highest, classes = int(table.labels.max()), int(cast(int, model.num_classes))
    if highest >= classes:
        raise BadInput(f"model.args.num_classes: {classes}, but the data has label {highest}; set it to {highest + 1}")
    return table


def labeled_by_output(table: data.ImageTable, model: nn.Module) -> data.ImageTable:
    """Return images of `open_images` whose labels are outputs of the model, also if it was cut to some classes."""
    classes = kept_classes(model)
    return table if classes is None else replace(table, labels=class_positions(table.labels, classes))


def rows_of_classes(classes: Sequence[int] | None) -> pa.Table:
    """Return the rows of the manifest whose images are of some classes; None for all."""
    manifest = tables.read_table(MANIFEST, tables.MANIFEST)
    return manifest if classes is None else manifest.filter(pc.is_in(manifest["label"], pa.array(classes, pa.int64())))


def calibration(model: nn.Module, params: Params) -> Batches:
    """Load the calibration images with the preprocessing of a model; labels are its outputs.

    If the model was cut to some classes, by `prune.classes` or in its checkpoint, images of others are left out.
    """
    transform = data.transform(data.data_config(model), None, params.dataset.exif_orientation)
    batches = data.load_calibration(CALIBRATION, transform, params.score.batch_size)
    return images_of_classes(batches, kept_classes(model))


def data_workers() -> int:
    """Return the number of processes that decode training images, from VITPRUNE_WORKERS; it does not change results.

    Raises:
        BadInput: the value is not a whole number of at least 0.
    """
    text = os.environ.get(WORKERS, "0")
    if not text.isdecimal():
        raise BadInput(f"{WORKERS}={text}: give the number of processes that decode images, or 0 to use the main one")
    return int(text)
