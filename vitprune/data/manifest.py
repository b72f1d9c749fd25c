"""Dataset manifest: id, split, label and SHA-256 checksum of every image."""

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitprune.data.images import ExaminedImage, examine, why_unreadable
from vitprune.data.sources import Source
from vitprune.errors import BadInput
from vitprune.runtime.progress import track

NAMED = 8  # maximum number of corrupt images in an error message


@dataclass(frozen=True)
class Manifest:
    """A manifest.

    Attributes:
        rows: Rows of tables.MANIFEST.
        skipped: Ids of corrupt images.
        overlap: Number of train images dropped because they are also in the eval split.
        oriented: Number of images whose EXIF orientation is applied.
    """

    rows: list[dict[str, Any]]
    skipped: list[str]
    overlap: int
    oriented: int


def build_manifest(source: Source, eval_fraction: float, seed: int, skip_limit: float, orient: bool = True) -> Manifest:
    """Read, decode and hash every image and assign it to the train or eval split.

    If the source has splits, they are kept, and copies of eval images are dropped from train. Otherwise the eval split
    is a stratified random draw; images that occur more than once are all assigned to train. Images are the same if
    their decoded pixels are, whatever their encoding.

    Args:
        source: The image source.
        eval_fraction: Fraction of each class for the eval split.
        seed: Seed of the draw.
        skip_limit: Maximum fraction of corrupt images.
        orient: Apply EXIF orientations.

    Returns:
        The manifest.

    Raises:
        BadInput: too many corrupt images, a class or a split is empty, or there is only one class.
    """
    examined = dict(zip(source.ids, _examined(source, orient), strict=True))
    images = {image_id: result for image_id, result in examined.items() if isinstance(result, ExaminedImage)}
    skipped = [image_id for image_id in examined if image_id not in images]
    if len(skipped) > skip_limit * len(source.ids):
        others, more = ", ".join(skipped[1:NAMED]), len(skipped) - NAMED
        also = f" ({others}{f' and {more} more' if more > 0 else ''})" if others else ""
        raise BadInput(
            f"{skipped[0]}: cannot be decoded, like {len(skipped)} of {len(source.ids)} images of {source.spec}{also}; "
            f"repair or remove them, or raise dataset.skip_limit ({skip_limit}); reason: {examined[skipped[0]]}"
        )
    native = source.splits or ("",) * len(source.ids)
    rows = [
        {"id": image_id, "split": split, "label": label, "sha256": images[image_id].sha256}
        for image_id, label, split in zip(source.ids, source.labels, native, strict=True)
        if image_id in images
    ]
    pixels = {image_id: image.pixels for image_id, image in images.items()}
    if source.splits is None:
        rows = _draw_eval_split(rows, pixels, eval_fraction, seed, keep_classes=source.classes is not None)
    kept = _without_overlap(rows, pixels)
    _check_classes(source, [row for row in kept if row["split"] == "train"])
    for split in ("train", "eval"):
        if not any(row["split"] == split for row in kept):
            raise BadInput(
                f"{source.spec}: no image for {split}; change dataset.eval_fraction ({eval_fraction}) or the source"
            )
    return Manifest(kept, skipped, len(rows) - len(kept), sum(image.oriented for image in images.values()))


def _examined(source: Source, orient: bool) -> Iterator[ExaminedImage | str]:
    """Yield the facts about each image in order; for a corrupt image, the reason."""

    def examined(image_id: str) -> ExaminedImage | str:
        try:
            return examine(source.read(image_id), orient)
        except (MemoryError, BadInput):
            raise
        except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
            return why_unreadable(error)

    with warnings.catch_warnings(), ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        warnings.filterwarnings("ignore", module="PIL")  # about metadata
        # chunks: map() over all images would queue a task for each of them at once
        chunks = (source.ids[start : start + 1024] for start in range(0, len(source.ids), 1024))
        results = itertools.chain.from_iterable(pool.map(examined, chunk) for chunk in chunks)
        yield from track(results, "reading images", len(source.ids))


def _check_classes(source: Source, train: Sequence[dict[str, Any]]) -> None:
    present = {row["label"] for row in train}
    empty = [name for label, name in enumerate(source.classes or ()) if label not in present]
    if empty:
        raise BadInput(
            f"{source.spec}: class {empty[0]} has no image to train on ({len(empty)} of {len(source.classes or ())} "
            "classes are empty); add images or list the classes to use in dataset.classes"
        )
    if len(present) == 1:
        raise BadInput(
            f"{source.spec}: all images to train on have one class; give at least two, or correct the source"
        )


def _without_overlap(rows: list[dict[str, Any]], pixels: Mapping[str, bytes]) -> list[dict[str, Any]]:
    held_out = {pixels[row["id"]] for row in rows if row["split"] == "eval"}
    return [row for row in rows if row["split"] == "eval" or pixels[row["id"]] not in held_out]


def _draw_eval_split(
    rows: list[dict[str, Any]], pixels: Mapping[str, bytes], fraction: float, seed: int, keep_classes: bool
) -> list[dict[str, Any]]:
    """Assign a split to each row; with `keep_classes`, every class keeps at least one train image."""
    copies = Counter(pixels[row["id"]] for row in rows)
    single = np.array([copies[pixels[row["id"]]] == 1 for row in rows], dtype=bool)
    labels = np.array([row["label"] for row in rows], dtype=np.int64)
    held_out = draw_stratified(labels, single, fraction, np.random.default_rng(seed), keep_classes)
    return [row | {"split": "eval" if chosen else "train"} for row, chosen in zip(rows, held_out, strict=True)]


def draw_stratified(
    labels: np.ndarray, eligible: np.ndarray, fraction: float, rng: np.random.Generator, keep_one: bool
) -> np.ndarray:
    """Draw round(fraction * N) of N rows, stratified by class with the largest-remainder method.

    Args:
        labels: (N,) int64.
        eligible: (N,) bool, the rows that can be drawn; a class with too few of them contributes fewer.
        fraction: Fraction of the rows to draw.
        rng: Random generator.
        keep_one: Leave at least one row of each class undrawn.

    Returns:
        (N,) bool.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    share = counts * fraction
    quota = np.floor(share).astype(np.int64)
    order = np.lexsort((rng.random(len(counts)), quota - share))  # largest remainder first, ties at random
    quota[order[: round(len(labels) * fraction) - int(quota.sum())]] += 1
    if keep_one:
        quota = np.minimum(quota, counts - 1)
    drawn = np.zeros(len(labels), dtype=bool)
    shuffled = rng.permutation(np.flatnonzero(eligible))
    drawn[shuffled[rank_in_class(classes[shuffled]) < quota[classes[shuffled]]]] = True
    return drawn


def rank_in_class(classes: np.ndarray) -> np.ndarray:
    """Number the rows of each class 0, 1, ... in order; (N,) int64 to (N,) int64."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    ranks = np.empty(len(classes), dtype=np.int64)
    ranks[order] = np.arange(len(classes)) - starts
    return ranks
