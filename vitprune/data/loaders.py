"""Batches of images, the same bit for bit for the same seed, whatever the number of workers."""

import contextlib
import math
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
MEMORY = 1 << 30
SAMPLES_FOR_SIZE = 16


class ReadRow(Protocol):
    """Gives the encoded bytes of a row."""

    def __call__(self, row: int, /) -> bytes:
        """Return the encoded bytes."""


@dataclass(frozen=True, eq=False)
class ImageTable:
    """The images of one split in the manifest's order: `labels` (N,) int64, `tensors` (N, C, H, W) if held."""

    ids: tuple[str, ...]
    labels: torch.Tensor
    transform: Transform
    read: ReadRow
    tensors: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, row: int) -> torch.Tensor:
        """Return the transformed image (C, H, W); draws from the global generators where the transform is random.

        Raises:
            BadInput: it has changed since the manifest was made, or cannot be read or decoded any more.
        """
        if self.tensors is not None:
            return self.tensors[row]
        encoded = self.read(row)
        try:
            picture = decode(encoded, self.transform.mode)
        except MemoryError:
            raise
        except Exception:  # each of Pillow's decoders has its own errors
            told = f"{self.ids[row]}: is as the manifest says, but Pillow cannot decode it here"
            raise BadInput(f"{told}; run `vitprune dataset` again") from None
        return self.transform.image(picture)


@dataclass(frozen=True, eq=False)
class SourceRows:
    """Reads rows of the manifest from the source, each against its digest."""

    source: Source
    ids: Sequence[str]
    sha256: Sequence[str]

    def __call__(self, row: int, /) -> bytes:
        """Return the encoded bytes."""
        return read_verified(self.source, self.ids[row], self.sha256[row])


def open_split(
    manifest: pa.Table, source: Source, split: str, transform: Transform, memory: int = MEMORY
) -> ImageTable:
    """Open the train or eval images of a manifest, in `memory` bytes at most.

    Held as tensors if the transform is not random and they fit, else as encoded bytes if these fit, else not held.

    Raises:
        BadInput: the manifest has no image of the split, or an image has changed or gone since.
    """
    rows = [row for row in manifest.to_pylist() if row["split"] == split]
    if not rows:
        raise BadInput(f"the manifest has no image in its {split} split; run `vitprune dataset` again")
    ids = tuple(row["id"] for row in rows)
    labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
    read: ReadRow = SourceRows(source, ids, [row["sha256"] for row in rows])
    table = ImageTable(ids, labels, transform, read, None)
    if not transform.random and len(rows) * math.prod(transform.shape) * 4 <= memory:
        return ImageTable(ids, labels, transform, read, _all_tensors(table, split))
    if _encoded_size(read, len(rows)) <= memory:
        held = list(track(map(read, range(len(rows))), f"reading the {split} images", len(rows)))
        return ImageTable(ids, labels, transform, held.__getitem__, None)
    return table


def _all_tensors(table: ImageTable, split: str) -> torch.Tensor:
    tensors = torch.empty((len(table), *table.transform.shape))
    with ThreadPoolExecutor(min(8, _cores())) as pool:  # Pillow decodes and resizes without the interpreter's lock
        found = pool.map(table.image, range(len(table)))
        for row, image in enumerate(track(found, f"decoding the {split} images", len(table))):
            tensors[row] = image
    return tensors


def _encoded_size(read: ReadRow, rows: int) -> int:
    """Estimate the bytes of all rows from a few that are spread over them."""
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
    """Yield one epoch in a seeded order, from batch `begin` on: images (B, C, H, W) float32 and labels (B,) int64.

    The last batch is smaller; it is left out if it had a single image (batch statistics need two). With `repeats` an
    image comes that many times in a row, each time drawn anew by a random transform, and the epoch, no longer for it,
    has as many fewer images. With `part` (k, n) it is the k-th of n shares of every batch, which may have no image.

    Source: Hoffer et al. 2020 (repeated augmentation), as timm's RepeatAugSampler orders it in a single process.
    """
    cut, numbers = _epoch(table, batch_size, seed, epoch, repeats)
    cut, move = [np.array_split(rows, part[1])[part[0]] for rows in cut[begin:]], table.transform.batch
    for rows, (images, labels) in zip(cut, _batches(table, cut, (seed, epoch), workers), strict=True):
        yield (images if move is None else move(images, numbers[rows])), labels


def _epoch(
    table: ImageTable, batch_size: int, seed: int, epoch: int, repeats: int
) -> tuple[list[np.ndarray], torch.Tensor]:
    """The samples of every batch, and four random numbers of each sample."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(table))
    numbers = torch.from_numpy(rng.random((len(table) * repeats, 4), dtype=np.float32))
    # the k-th view of row r is sample r + k * rows, whose random numbers are its own
    order = (order[:, None] + len(table) * np.arange(repeats)).flatten()[: len(table)]
    cut = [order[start : start + batch_size] for start in range(0, len(table), batch_size)]
    if len(cut) > 1 and len(cut[-1]) == 1:
        cut.pop()
    return cut, numbers


def batch_ids(table: ImageTable, batch_size: int, seed: int, epoch: int, number: int, repeats: int = 1) -> list[str]:
    """The ids of the images of one batch of `train_batches`, counted from 0."""
    cut, _ = _epoch(table, batch_size, seed, epoch, repeats)
    return [table.ids[int(row) % len(table)] for row in cut[number]]


def batch_rows(
    table: ImageTable,
    batch_size: int,
    seed: int,
    epoch: int,
    repeats: int = 1,
    begin: int = 0,
    part: tuple[int, int] = (0, 1),
) -> list[np.ndarray]:
    """The rows of the table in the batches of `train_batches`, (B,) int64 each."""
    cut, _ = _epoch(table, batch_size, seed, epoch, repeats)
    return [np.array_split(rows, part[1])[part[0]] % len(table) for rows in cut[begin:]]


def batch_count(images: int, batch_size: int) -> int:
    """Count the batches of one epoch of `train_batches`."""
    whole, rest = divmod(images, batch_size)
    return whole + (rest > 1 or not whole)


def eval_batches(table: ImageTable, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Yield all images once, in order: images (B, C, H, W) float32 and labels (B,) int64."""
    if table.transform.random or table.transform.batch is not None:
        raise ValueError("evaluation needs a transform without augmentation")
    rows = np.arange(len(table))
    cut = [rows[start : start + batch_size] for start in range(0, len(table), batch_size)]
    return _batches(table, cut, (0, 0), workers)


def _batches(table: ImageTable, cut: Sequence[np.ndarray], seed: tuple[int, int], workers: int) -> Iterator[Batch]:
    if table.tensors is not None:
        for rows in cut:
            yield table.tensors[rows % len(table)], table.labels[rows % len(table)]
        return
    samples = SeededRows(table, seed)
    if workers == 0:
        for rows in cut:
            images = [samples[int(row)][0] for row in rows]
            yield (torch.stack(images), table.labels[rows % len(table)]) if images else _nothing(samples)
        return
    yield from _from_workers(samples, cut, min(workers, _cores()))


def _from_workers(samples: "SeededRows", cut: Sequence[np.ndarray], workers: int) -> Iterator[Batch]:
    loader: Iterable[Batch] = DataLoader(
        samples,
        batch_sampler=[rows.tolist() for rows in cut if len(rows)],
        num_workers=workers,
        generator=torch.Generator(),  # its own, so that the number of workers does not move the global one
    )
    found = iter(loader)
    try:
        for rows in cut:
            yield next(found) if len(rows) else _nothing(samples)
    except BadInput as error:
        # torch puts the worker's whole traceback into the message; the last line of it is ours.
        line = str(error).strip().splitlines()[-1]
        # Its traceback holds the loader in a cycle, and a loader that dies in one waits 5 seconds for each worker.
        error.__traceback__ = None
        raise BadInput(line.removeprefix("vitprune.errors.BadInput: ")) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        error.__traceback__ = None
        line = str(error).splitlines()[0].rstrip(".")
        raise Interrupted(f"{line}; it was killed, most often for memory: use fewer than {workers} workers") from None


def _nothing(samples: "SeededRows") -> Batch:
    return torch.zeros((0, *samples.shape)), torch.zeros(0, dtype=torch.int64)


class SeededRows(Dataset[tuple[torch.Tensor, int]]):
    """The rows of a table, the random ones drawn from (seed, epoch, row) alone; past its end it begins again."""

    def __init__(self, table: ImageTable, seed: tuple[int, int]):
        self._table = table
        self._seed = seed

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image: (C, H, W)."""
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
    """Seed the three generators that timm's transforms use (Python, NumPy, torch on CPU) and put them back after."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
