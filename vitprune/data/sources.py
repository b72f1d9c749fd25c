"""Image sources: the common `Source`, scikit-learn digits, image folders, and joining two sources."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from vitprune.data.images import encode
from vitprune.errors import BadInput

EVAL_FOLDERS = ("val", "validation", "valid", "test")


class Read(Protocol):
    """Reads the encoded bytes of one image, as stored; raises BadInput for an unknown id."""

    def __call__(self, image_id: str, /) -> bytes:
        """Return the encoded bytes."""


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled images that can be read by id in any order, from several threads and processes.

    Attributes:
        spec: The source as written in params.yaml.
        ids: Image ids.
        labels: Label of each image.
        classes: Class names by label; None if the source has only numbers.
        splits: "train" or "eval" for each image; None if the source has no splits.
        read: Reads the encoded bytes of an image.
    """

    spec: str
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...] | None
    splits: tuple[str, ...] | None
    read: Read


def missing_image(image_id: str, spec: str) -> BadInput:
    """Create the error for an id that the source does not contain."""
    return BadInput(f"{image_id}: not in {spec}, so the source has changed; run `vitprune dataset` again")


@dataclass(frozen=True, eq=False)
class MemoryReader:
    """Reads images from memory."""

    spec: str
    images: Mapping[str, bytes]

    def __call__(self, image_id: str, /) -> bytes:
        """Return the encoded bytes."""
        if image_id not in self.images:
            raise missing_image(image_id, self.spec)
        return self.images[image_id]


def open_digits(classes: Sequence[str] | None) -> Source:
    """Open scikit-learn's 1,797 scanned digits: 8 x 8 pixels, 0..16 scaled to 0..255, as PNG.

    Args:
        classes: Ten class names; None for "0" to "9".

    Returns:
        The source.

    Raises:
        BadInput: not ten class names.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    if classes is not None and len(classes) != 10:
        raise BadInput(f"dataset.classes: digits has 10 classes, not {len(classes)}; give 10 names or null")
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    images = {f"digits/{row:04d}": encode(Image.fromarray(image)) for row, image in enumerate(pixels)}
    names = tuple(classes) if classes is not None else tuple(str(name) for name in digits.target_names)
    labels = tuple(int(label) for label in digits.target)
    return Source("digits", tuple(images), labels, names, None, MemoryReader("digits", images))


@dataclass(frozen=True)
class FolderReader:
    """Reads image files below a folder; the id is the path relative to it, with forward slashes."""

    root: Path

    def __call__(self, image_id: str, /) -> bytes:
        """Return the content of the file."""
        try:
            return (self.root / image_id).read_bytes()
        except FileNotFoundError:
            raise missing_image(image_id, f"folder:{self.root}") from None


def open_folder(root: Path, classes: Sequence[str] | None) -> Source:
    """Open a folder with one sub-folder per class, or with train/ and val/ (validation/, valid/, test/) of that layout.

    Args:
        root: The folder.
        classes: Sub-folders to use, in the order of the labels; None for all, in timm's natural order.

    Returns:
        The source.

    Raises:
        BadInput: the folder is missing or has no images.
    """
    if not root.is_dir():
        raise BadInput(f"folder:{root}: no such folder; correct dataset.source")
    parts = _folder_parts(root)
    names = tuple(classes) if classes is not None else _class_folders(parts.values())
    ids: list[str] = []
    labels: list[int] = []
    splits: list[str] = []
    for split, part in parts.items():
        for label, name in enumerate(names):
            files = _image_files(part / name)
            ids += [file.relative_to(root).as_posix() for file in files]
            labels += [label] * len(files)
            splits += [split] * len(files)
    if not ids:
        raise BadInput(
            f"folder:{root}: no images in its sub-folders; put the images of each class into their own folder"
        )
    return Source(
        f"folder:{root}",
        tuple(ids),
        tuple(labels),
        names,
        tuple(splits) if len(parts) == 2 else None,
        FolderReader(root),
    )


def _folder_parts(root: Path) -> dict[str, Path]:
    if not (root / "train").is_dir():
        return {"train": root}
    evaluation = [root / name for name in EVAL_FOLDERS if (root / name).is_dir()]
    return {"train": root / "train"} | ({"eval": evaluation[0]} if evaluation else {})


def _class_folders(parts: Iterable[Path]) -> tuple[str, ...]:
    names = {entry.name for part in parts for entry in part.iterdir() if entry.is_dir() and entry.name[0] != "."}
    return tuple(sorted(names, key=natural_key))


def _image_files(folder: Path) -> list[Path]:
    extensions = get_img_extensions(as_set=True)
    files = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in extensions and name[0] != "."
    ]
    return sorted(files, key=lambda file: natural_key(str(file)))


@dataclass(frozen=True, eq=False)
class JoinedReader:
    """Reads training images from one source and evaluation images (ids with a prefix) from another."""

    train: Read
    evaluation: Read

    def __call__(self, image_id: str, /) -> bytes:
        """Return the encoded bytes."""
        if image_id.startswith(EVAL_PREFIX):
            return self.evaluation(image_id.removeprefix(EVAL_PREFIX))
        return self.train(image_id)


EVAL_PREFIX = "eval:"


def join(train: Source, evaluation: Source) -> Source:
    """Join two sources.

    Args:
        train: Its train split, or all of it, becomes the train split.
        evaluation: Its eval split, or all of it, becomes the eval split. Labels are matched by class name if both
            sources have names.

    Returns:
        The joined source.

    Raises:
        BadInput: an eval image has a class that the train source does not have.
    """
    evaluation = _relabelled(evaluation, train)
    kept = [row for row in range(len(train.ids)) if train.splits is None or train.splits[row] == "train"]
    held_out = [
        row for row in range(len(evaluation.ids)) if evaluation.splits is None or evaluation.splits[row] == "eval"
    ]
    return Source(
        f"{train.spec} and {evaluation.spec}",
        tuple(train.ids[row] for row in kept) + tuple(EVAL_PREFIX + evaluation.ids[row] for row in held_out),
        tuple(train.labels[row] for row in kept) + tuple(evaluation.labels[row] for row in held_out),
        train.classes,
        ("train",) * len(kept) + ("eval",) * len(held_out),
        JoinedReader(train.read, evaluation.read),
    )


def _relabelled(evaluation: Source, train: Source) -> Source:
    if train.classes is None:
        return evaluation
    position = {name: label for label, name in enumerate(train.classes)}
    names = evaluation.classes if evaluation.classes is not None else train.classes
    for label in sorted(set(evaluation.labels)):
        if label >= len(names) or names[label] not in position:
            name = names[label] if label < len(names) else str(label)
            raise BadInput(
                f"{evaluation.spec}: class {name} is not a class of {train.spec}; correct dataset.eval_source"
            )
    return replace(evaluation, labels=tuple(position[names[label]] for label in evaluation.labels))
