"""The calibration table: images drawn from the train split, never one that is evaluated on."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from vitprune.data.augment import Transform
from vitprune.data.images import bytes_sha256, decode
from vitprune.data.manifest import rank_in_class
from vitprune.data.sources import Source
from vitprune.errors import BadInput
from vitprune.runtime import tables
from vitprune.runtime.progress import track

DEFAULT_SIZE = 2000


def draw_calibration(
    manifest: pa.Table, source: Source, size: int | None, balance: str, seed: int
) -> list[dict[str, Any]]:
    """Draw `size` images (None: 2000, or all where there are fewer) and return rows of tables.CALIBRATION.

    `balance` "class" gives equal counts; classes with fewer images give all they have and the others fill up. Every
    beginning of the table is balanced too. "uniform" draws from all images alike.

    Raises:
        BadInput: `size` is larger than the train split, an image is also in the eval split, or the source has changed.
    """
    rows = manifest.to_pylist()
    train = [row for row in rows if row["split"] == "train"]
    if size is not None and size > len(train):
        raise BadInput(
            f"calibrate.size: {size} is larger than the train split, which has {len(train)} images; lower it"
        )
    count = min(DEFAULT_SIZE, len(train)) if size is None else size
    if count < 1:
        raise BadInput(f"calibrate.size: {count} images cannot calibrate anything; draw at least 1")
    labels = np.array([row["label"] for row in train], dtype=np.int64)
    chosen = [train[index] for index in _order(labels, balance, seed)[:count]]
    held_out = {row["sha256"] for row in rows if row["split"] == "eval"}
    return [_read(row, source, held_out) for row in track(chosen, "reading the calibration images", count)]


def _order(labels: np.ndarray, balance: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    if balance == "uniform":
        return shuffled
    if balance != "class":
        raise BadInput(f"calibrate.balance: {balance!r} is unknown; use class or uniform")
    _, classes = np.unique(labels[shuffled], return_inverse=True)
    # One image of every class, then the next of every class, ...; the seed says which classes come first.
    turn = rng.permutation(classes.max() + 1)[classes]
    return shuffled[np.lexsort((turn, rank_in_class(classes)))]


def _read(row: dict[str, Any], source: Source, held_out: set[str]) -> dict[str, Any]:
    data = read_verified(source, row["id"], row["sha256"])
    if row["sha256"] in held_out:
        raise BadInput(f"{row['id']}: in the train and in the eval split of the manifest; run `vitprune dataset` again")
    path = row["id"]
    return {"id": row["id"], "label": row["label"], "sha256": row["sha256"], "image": {"bytes": data, "path": path}}


def read_verified(source: Source, image_id: str, sha256: str) -> bytes:
    """Read one image and make sure that it is the one in the manifest.

    Raises:
        BadInput: the bytes have another digest than the manifest says, or cannot be read.
    """
    try:
        data = source.read(image_id)
    except OSError as error:
        raise BadInput(f"{image_id}: cannot be read ({error}); run `vitprune dataset` again") from None
    if bytes_sha256(data) != sha256:
        raise BadInput(f"{image_id}: has changed since the manifest was made; run `vitprune dataset` again")
    return data


def load_calibration(path: Path, transform: Transform, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Load a calibration table as batches of images (B, C, H, W) float32 and labels (B,) int64, in the table's order.

    Raises:
        BadInput: the file is missing or no calibration table, it is empty, or an image in it is corrupt.
    """
    rows = tables.read_table(path, tables.CALIBRATION).to_pylist()
    if not rows:
        raise BadInput(f"{path}: holds no image; run `vitprune calibrate` again")
    images = [_tensor(row, path, transform) for row in track(rows, "decoding the calibration images", len(rows))]
    labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
    starts = range(0, len(rows), batch_size)
    return [(torch.stack(images[at : at + batch_size]), labels[at : at + batch_size]) for at in starts]


def _tensor(row: dict[str, Any], path: Path, transform: Transform) -> torch.Tensor:
    corrupt = BadInput(f"{path}: image {row['id']} is corrupt; run `vitprune calibrate` again")
    data = (row["image"] or {}).get("bytes")
    if data is None or bytes_sha256(data) != row["sha256"]:
        raise corrupt
    try:
        image = decode(data, transform.mode)
    except MemoryError:
        raise
    except Exception:  # each of Pillow's decoders has its own errors
        raise corrupt from None
    return transform.image(image)
