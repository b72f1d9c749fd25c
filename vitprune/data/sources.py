"""Image sources: the common `Source`, scikit-learn digits, and joining two sources."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vitprune.config.section import shown
from vitprune.data.images import encode
from vitprune.errors import BadInput

MAX_LABEL = (1 << 31) - 1


class SourceError(BadInput):
    """An image source that cannot be opened; the message names the setting of the source.

    Attributes:
        setting: Key of params.yaml or option of the command line.
        first: Whether the message begins with the setting; else it ends with the request to correct it.
    """

    setting = "dataset.source"

    def __init__(self, problem: str, first: bool = False) -> None:
        super().__init__(problem)
        self.first = first

    def __str__(self) -> str:
        problem = super().__str__()
        return f"{self.setting}: {problem}" if self.first else f"{problem}; correct {self.setting}"


class Read(Protocol):
    """Reads the encoded bytes of one image, as stored; raises BadInput for an unknown id."""

    def __call__(self, image_id: str, /) -> bytes:
        """Return the encoded bytes."""


@dataclass(frozen=True, eq=False)
class Source:
    """Labeled images that can be read by id in any order, from several threads and processes.

    Attributes:
        spec: The source as written in params.yaml.
        ids: Image ids.
        labels: Label of each image.
        classes: Class names by label; None if the source has only numbers.
        splits: "train" or "eval" for each image; None if the source has no splits.
        read: Reads the encoded bytes of an image.
        left_out: Names of files that are not used, such as files of no image format, or a third split.
    """

    spec: str
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...] | None
    splits: tuple[str, ...] | None
    read: Read
    left_out: tuple[str, ...] = ()


def checked_label(label: Any, classes: Sequence[str] | None, where: str) -> int:
    """Return a label, which must be a whole number and, if there are class names, the index of one.

    Args:
        label: The label as stored: a number, or text of a number.
        classes: Class names by label; None if the source has only numbers.
        where: File and image, for messages.

    Raises:
        BadInput: it is no whole number, or outside the classes.
    """
    text: Any = label.strip() if isinstance(label, str) else label
    is_text = isinstance(text, str) and text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 20
    is_whole = type(text) in (int, float) and abs(text) < 1 << 64 and text == int(text)
    if not (is_text or is_whole):
        raise BadInput(f"{where} has the label {shown(label)}, which must be one integer")
    number, highest = int(text), MAX_LABEL if classes is None else len(classes) - 1
    if not 0 <= number <= highest:
        wanted = "0 or more" if classes is None and number < 0 else f"0..{highest}"
        wanted += f" ({len(classes)} classes)" if classes is not None else ""
        raise BadInput(f"{where} has label {number}, which must be {wanted}")
    return number


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
    if classes is not None and len(classes) != 10:
        raise BadInput(f"dataset.classes: digits has 10 classes, not {len(classes)}; give 10 names or null")
    digits = _digits()
    return digits if classes is None else replace(digits, classes=tuple(classes))


@cache
def _digits() -> Source:
    """Return the digits with scikit-learn's class names; encoding them takes longer than a small stage's training."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    images = {f"digits/{row:04d}": encode(Image.fromarray(image)) for row, image in enumerate(pixels)}
    labels = tuple(int(label) for label in digits.target)
    names = tuple(str(name) for name in digits.target_names)
    return Source("digits", tuple(images), labels, names, None, MemoryReader("digits", images))


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


def source_hint(spec: str) -> str:
    """Return what to write instead of an unknown source: the prefix of an existing path, or all forms."""
    if os.path.lexists(spec):
        return f"did you mean {'parquet' if spec.endswith('.parquet') else 'folder'}:{spec}?"
    return "use digits, folder:PATH, parquet:PATH, wds/PATH, hfds/NAME or torch/NAME:ROOT"


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
    evaluation = _relabeled(evaluation, train)
    kept = [row for row in range(len(train.ids)) if train.splits is None or train.splits[row] == "train"]
    held_out = [
        row for row in range(len(evaluation.ids)) if evaluation.splits is None or evaluation.splits[row] == "eval"
    ]
    spec, reader = f"{train.spec} and {evaluation.spec}", JoinedReader(train.read, evaluation.read)
    ids = tuple(train.ids[row] for row in kept) + tuple(EVAL_PREFIX + evaluation.ids[row] for row in held_out)
    labels = tuple(train.labels[row] for row in kept) + tuple(evaluation.labels[row] for row in held_out)
    splits = ("train",) * len(kept) + ("eval",) * len(held_out)
    return Source(spec, ids, labels, train.classes, splits, reader, train.left_out + evaluation.left_out)


def _relabeled(evaluation: Source, train: Source) -> Source:
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
