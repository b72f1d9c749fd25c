"""Image batches, bit-identical for the same seed and any number of worker processes."""

import contextlib
import math
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from vitprune.data.augment import Transform
from vitprune.data.calibration import read_verified
from vitprune.data.images import decode
from vitprune.data.sources import Source
from vitprune.errors import BadInput, Interrupted
from vitprune.runtime.progress import track

Batch = tuple[torch.Tensor, torch.Tensor]
MEMORY = 1 << 30  # bytes
SAMPLES_FOR_SIZE = 16


class ReadRow(Protocol):
    """Reads the encoded bytes of a row."""

    def __call__(self, row: int, /) -> bytes:
        """Return the encoded bytes."""


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Images of one split, in the order of the manifest.

    Attributes:
        ids: Image ids.
        labels: (N,) int64.
        transform: Transform of the images.
        read: Reads the encoded bytes of a row.
        tensors: Transformed images (N, C, H, W) if they are kept in memory, else None.
    """

    ids: tuple[str, ...]
    labels: torch.Tensor
    transform: Transform
    read: ReadRow
    tensors: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, row: int) -> torch.Tensor:
        """Return the transformed image (C, H, W). A random transform uses the global random generators.

        Raises:
            BadInput: the image has changed since the manifest was made, or cannot be read or decoded.
        """
        if self.tensors is not None:
            return self.tensors[row]
        encoded = self.read(row)
        try:
            image = decode(encoded, self.transform.mode, self.transform.orient)
        except MemoryError:
            raise
        except Exception:  # Pillow's decoders raise various errors
            line = f"{self.ids[row]}: unchanged, but this version of Pillow cannot decode it"
            raise BadInput(f"{line}; run `vitprune dataset` again") from None
        return self.transform.image(image)


@dataclass(frozen=True, eq=False)
class SourceRows:
    """Reads rows of the manifest from the source and verifies their checksums."""

    source: Source
    ids: Sequence[str]
    sha256: Sequence[str]

    def __call__(self, row: int, /) -> bytes:
        """Return the encoded bytes."""
        return read_verified(self.source, self.ids[row], self.sha256[row])


def open_split(manifest: pa.Table, source: Source, split: str, transform: Transform) -> ImageTable:
    """Open the images of one split of a manifest.

    At most MEMORY bytes are kept in memory: tensors if the transform is not random and they fit, else encoded bytes if
    they fit, else nothing.

    Args:
        manifest: Table of tables.MANIFEST.
        source: The source of its images.
        split: "train" or "eval".
        transform: Transform of the images.

    Returns:
        The images.

    Raises:
        BadInput: the split is empty, or an image has changed or is missing.
    """
    rows = [row for row in manifest.to_pylist() if row["split"] == split]
    if not rows:
        raise BadInput(f"the manifest has no image in its {split} split; run `vitprune dataset` again")
    ids = tuple(row["id"] for row in rows)
    labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
    read: ReadRow = SourceRows(source, ids, [row["sha256"] for row in rows])
    table = ImageTable(ids, labels, transform, read, None)
    if not transform.random and len(rows) * math.prod(transform.shape) * 4 <= MEMORY:
        return replace(table, tensors=_all_tensors(table, split))
    if _encoded_size(read, len(rows)) <= MEMORY:
        encoded = list(track(map(read, range(len(rows))), f"reading the {split} images", len(rows)))
        return replace(table, read=encoded.__getitem__)
    return table


def _all_tensors(table: ImageTable, split: str) -> torch.Tensor:
    tensors = torch.empty((len(table), *table.transform.shape))
    with ThreadPoolExecutor(min(8, _cores())) as pool:  # Pillow releases the GIL
        images = pool.map(table.image, range(len(table)))
        for row, image in enumerate(track(images, f"decoding the {split} images", len(table))):
            tensors[row] = image
    return tensors


def _encoded_size(read: ReadRow, rows: int) -> int:
    """Estimate the bytes of all rows from evenly spaced samples."""
    sample = np.unique(np.linspace(0, rows - 1, SAMPLES_FOR_SIZE, dtype=np.int64))
    return int(np.mean([len(read(int(row))) for row in sample]) * rows)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def train_batches(
    table: ImageTable,
    batch_size: int,
    seed: int,
    epoch: int,
    workers: int = 0,
    repeats: int = 1,
    begin: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Yield the batches of one epoch in seeded random order. A last batch of one image is dropped if others have more.

    Args:
        table: The images.
        batch_size: Images per batch.
        seed: Seed of the order and of the augmentation.
        epoch: Epoch, from 0.
        workers: Worker processes for decoding; they do not change the batches.
        repeats: Repeated augmentation: every image occurs this many times in a row with different augmentations, and
            the epoch, of the same length, has correspondingly fewer distinct images.
        begin: First batch to yield.
        part: (k, n) yields share k of n of every batch, possibly empty.

    Yields:
        Images (B, C, H, W) float32 and labels (B,) int64.

    Source: Hoffer et al. 2020 (repeated augmentation), as timm's RepeatAugSampler orders it in a single process.
    """
    batches, numbers = _epoch(table, batch_size, seed, epoch, repeats)
    shares = [np.array_split(rows, part[1])[part[0]] for rows in batches[begin:]]
    augment = table.transform.batch
    for rows, (images, labels) in zip(shares, _batches(table, shares, (seed, epoch), workers), strict=True):
        yield (images if augment is None else augment(images, numbers[rows])), labels


def _epoch(
    table: ImageTable, batch_size: int, seed: int, epoch: int, repeats: int
) -> tuple[list[np.ndarray], torch.Tensor]:
    """Sample numbers of every batch, and four random numbers per sample."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(table))
    numbers = torch.from_numpy(rng.random((len(table) * repeats, 4), dtype=np.float32))
    # repetition k of row r is sample r + k * rows, with its own random numbers
    order = (order[:, None] + len(table) * np.arange(repeats)).flatten()[: len(table)]
    starts = range(0, len(table), batch_size)[: batch_count(len(table), batch_size)]
    return [order[start : start + batch_size] for start in starts], numbers


def batch_ids(table: ImageTable, batch_size: int, seed: int, epoch: int, number: int, repeats: int = 1) -> list[str]:
    """Return the image ids of batch `number` (from 0) of `train_batches`."""
    return [table.ids[row] for row in batch_rows(table, batch_size, seed, epoch, repeats)[number]]


def batch_rows(
    table: ImageTable,
    batch_size: int,
    seed: int,
    epoch: int,
    repeats: int = 1,
    begin: int = 0,
    part: tuple[int, int] = (0, 1),
) -> list[np.ndarray]:
    """Return the table rows, (B,) int64, of each batch of `train_batches`; arguments as there."""
    batches, _ = _epoch(table, batch_size, seed, epoch, repeats)
    return [np.array_split(rows, part[1])[part[0]] % len(table) for rows in batches[begin:]]


def batch_count(images: int, batch_size: int) -> int:
    """Return the number of batches in one epoch of `train_batches`."""
    full, rest = divmod(images, batch_size)
    return full + (rest > 1 or not full)


def eval_batches(table: ImageTable, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Return all images in order, as batches of images (B, C, H, W) float32 and labels (B,) int64."""
    if table.transform.random or table.transform.batch is not None:
        raise ValueError("evaluation needs a transform without augmentation")
    rows = np.arange(len(table))
    batches = [rows[start : start + batch_size] for start in range(0, len(table), batch_size)]
    return _batches(table, batches, (0, 0), workers)


def _batches(table: ImageTable, batches: Sequence[np.ndarray], seed: tuple[int, int], workers: int) -> Iterator[Batch]:
    if table.tensors is not None:
        for rows in batches:
            yield table.tensors[rows % len(table)], table.labels[rows % len(table)]
        return
    samples = SeededRows(table, seed)
    if workers == 0:
        for rows in batches:
            images = [samples[int(row)][0] for row in rows]
            yield (torch.stack(images), table.labels[rows % len(table)]) if images else _empty_batch(samples)
        return
    yield from _from_workers(samples, batches, min(workers, _cores()))


def _from_workers(samples: "SeededRows", batches: Sequence[np.ndarray], workers: int) -> Iterator[Batch]:
    loader: Iterable[Batch] = DataLoader(
        samples,
        batch_sampler=[rows.tolist() for rows in batches if len(rows)],
        num_workers=workers,
        generator=torch.Generator(),  # does not advance the global generator
    )
    loaded = iter(loader)
    try:
        for rows in batches:
            yield next(loaded) if len(rows) else _empty_batch(samples)
    except BadInput as error:
        # torch's message is the worker's traceback; its last line is ours
        line = str(error.args[0]).strip().splitlines()[-1]
        # the traceback keeps the loader in a reference cycle, and collecting it waits 5 seconds per worker
        error.__traceback__ = None
        raise BadInput(line.removeprefix("vitprune.errors.BadInput: ")) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        error.__traceback__ = None
        line = str(error).splitlines()[0].rstrip(".")
        raise Interrupted(f"{line}; it was killed, probably out of memory; use fewer than {workers} workers") from None


def _empty_batch(samples: "SeededRows") -> Batch:
    return torch.zeros((0, *samples.shape)), torch.zeros(0, dtype=torch.int64)


class SeededRows(Dataset[tuple[torch.Tensor, int]]):
    """Dataset over a table, with augmentation seeded by (seed, epoch, sample).

    Sample n is row n modulo the length of the table.
    """

    def __init__(self, table: ImageTable, seed: tuple[int, int]):
        self._table = table
        self._seed = seed

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image, (C, H, W)."""
        return tuple(self._table.transform.shape)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, int]:
        row = sample % len(self._table)
        label = int(self._table.labels[row])
        if not self._table.transform.random:
            return self._table.image(row), label
        with _seeded((*self._seed, sample)):
            return self._table.image(row), label


@contextlib.contextmanager
def _seeded(key: tuple[int, int, int]) -> Iterator[None]:
    """Seed the generators that timm's transforms use (Python, NumPy, torch on CPU); restore them at the end."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
