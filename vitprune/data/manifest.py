"""The manifest: which image is for training and which for evaluation, each checked and with its digest."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitprune.data.images import bytes_sha256, is_intact
from vitprune.data.sources import Source
from vitprune.errors import BadInput
from vitprune.runtime.progress import track

NAMED = 8  # corrupt images that an error names


@dataclass(frozen=True)
class Manifest:
    """Rows of tables.MANIFEST, the ids of corrupt images, and the number of train images dropped as in eval too."""

    rows: list[dict[str, Any]]
    skipped: list[str]
    overlap: int


def build_manifest(source: Source, eval_fraction: float, seed: int, skip_limit: float) -> Manifest:
    """Read, decode and hash every image once and divide them into train and eval.

    The source's own splits are kept; copies of an eval image are then dropped from train. A pool is divided by a seeded
    draw that takes `eval_fraction` of every class; images that occur more than once all stay in train.

    Raises:
        BadInput: more than `skip_limit` (a fraction) of the images is corrupt, a class or a split is empty.
    """
    digests = dict(zip(source.ids, _digests(source), strict=True))
    skipped = [image_id for image_id, found in digests.items() if found is None]
    if len(skipped) > skip_limit * len(source.ids):
        others, more = ", ".join(skipped[1:NAMED]), len(skipped) - NAMED
        also = f" ({others}{f' and {more} more' if more > 0 else ''})" if others else ""
        raise BadInput(
            f"{skipped[0]}: cannot be decoded, like {len(skipped)} of {len(source.ids)} images of {source.spec}{also}; "
            f"mend or remove them, or raise dataset.skip_limit ({skip_limit})"
        )
    native = source.splits or ("",) * len(source.ids)
    rows = [
        {"id": image_id, "split": split, "label": label, "sha256": digests[image_id]}
        for image_id, label, split in zip(source.ids, source.labels, native, strict=True)
        if digests[image_id] is not None
    ]
    if source.splits is None:
        rows = _drawn(rows, eval_fraction, seed, keep_classes=source.classes is not None)
    kept = _without_overlap(rows)
    _check_classes(source, [row for row in kept if row["split"] == "train"])
    for split in ("train", "eval"):
        if not any(row["split"] == split for row in kept):
            raise BadInput(
                f"{source.spec}: no image for {split}; change dataset.eval_fraction ({eval_fraction}) or the source"
            )
    return Manifest(kept, skipped, len(rows) - len(kept))


def _digests(source: Source) -> Iterator[str | None]:
    """Yield the digest of each image in order, None for a corrupt one."""

    def examine(image_id: str) -> str | None:
        try:
            data = source.read(image_id)
        except OSError:
            return None
        return bytes_sha256(data) if is_intact(data) else None

    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        # By the thousand: map() over everything would queue a task for each of a million images at once.
        chunks = (source.ids[start : start + 1024] for start in range(0, len(source.ids), 1024))
        found = itertools.chain.from_iterable(pool.map(examine, chunk) for chunk in chunks)
        yield from track(found, "reading images", len(source.ids))


def _check_classes(source: Source, train: Sequence[dict[str, Any]]) -> None:
    present = {row["label"] for row in train}
    empty = [name for label, name in enumerate(source.classes or ()) if label not in present]
    if empty:
        raise BadInput(
            f"{source.spec}: class {empty[0]} has no image to train on ({len(empty)} of {len(source.classes or ())} "
            "classes are empty); add images or list the classes to use in dataset.classes"
        )


def _without_overlap(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    held_out = {row["sha256"] for row in rows if row["split"] == "eval"}
    return [row for row in rows if row["split"] == "eval" or row["sha256"] not in held_out]


def _drawn(rows: list[dict[str, Any]], fraction: float, seed: int, keep_classes: bool) -> list[dict[str, Any]]:
    """Give each row its split; every named class keeps at least one train image."""
    copies = Counter(row["sha256"] for row in rows)
    single = np.array([copies[row["sha256"]] == 1 for row in rows], dtype=bool)
    labels = np.array([row["label"] for row in rows], dtype=np.int64)
    held_out = draw_stratified(labels, single, fraction, np.random.default_rng(seed), keep_classes)
    return [row | {"split": "eval" if chosen else "train"} for row, chosen in zip(rows, held_out, strict=True)]


def draw_stratified(
    labels: np.ndarray, eligible: np.ndarray, fraction: float, rng: np.random.Generator, keep_one: bool
) -> np.ndarray:
    """Draw round(fraction * N) of N rows, the same share of each class by largest remainder; returns (N,) bool.

    Fewer where a class has too few eligible rows; with `keep_one`, no class is drawn empty.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    share = counts * fraction
    quota = np.floor(share).astype(np.int64)
    order = np.lexsort((rng.random(len(counts)), quota - share))  # largest remainder first, ties by the seed
    quota[order[: round(len(labels) * fraction) - int(quota.sum())]] += 1
    if keep_one:
        quota = np.minimum(quota, counts - 1)
    drawn = np.zeros(len(labels), dtype=bool)
    shuffled = rng.permutation(np.flatnonzero(eligible))
    drawn[shuffled[rank_in_class(classes[shuffled]) < quota[classes[shuffled]]]] = True
    return drawn


def rank_in_class(classes: np.ndarray) -> np.ndarray:
    """Number the rows of each class 0, 1, ... in the order given; (N,) int64 to (N,) int64."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    ranks = np.empty(len(classes), dtype=np.int64)
    ranks[order] = np.arange(len(classes)) - starts
    return ranks
