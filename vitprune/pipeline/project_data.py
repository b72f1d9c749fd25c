"""Paths of a project and its images: image source, data splits, calibration batches, device."""

import os
from pathlib import Path
from typing import cast

import torch
from torch import nn

from vitprune import data
from vitprune.config.params import Params
from vitprune.errors import BadInput
from vitprune.runtime import tables
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
    """Open the image source of a project."""
    return data.open_source(params.dataset.source, params.dataset.classes, params.dataset.eval_source)


def open_images(split: str, model: nn.Module, params: Params, augment: str | None = None) -> data.ImageTable:
    """Open a split with the preprocessing of a model.

    Args:
        split: "train" or "eval".
        model: timm model that sets image size, channels and normalization.
        params: The project's params.yaml.
        augment: Name of an augmentation of the training images; None for the evaluation preprocessing.

    Raises:
        BadInput: a label is not among the model's classes.
    """
    transform = data.transform(data.data_config(model), augment, params.dataset.exif_orientation)
    table = data.open_split(tables.read_table(MANIFEST, tables.MANIFEST), source_of(params), split, transform)
    highest, classes = int(table.labels.max()), int(cast(int, model.num_classes))
    if highest >= classes:
        raise BadInput(f"model.args.num_classes: {classes}, but the data has label {highest}; set it to {highest + 1}")
    return table


def calibration(model: nn.Module, params: Params) -> list[data.Batch]:
    """Load the calibration images with the preprocessing of a model."""
    transform = data.transform(data.data_config(model), None, params.dataset.exif_orientation)
    return data.load_calibration(CALIBRATION, transform, params.score.batch_size)


def data_workers() -> int:
    """Return the number of processes that decode training images, from VITPRUNE_WORKERS; it does not change results.

    Raises:
        BadInput: the value is not a whole number of at least 0.
    """
    text = os.environ.get(WORKERS, "0")
    if not text.isdecimal():
        raise BadInput(f"{WORKERS}={text}: give the number of processes that decode images, or 0 to use the main one")
    return int(text)
