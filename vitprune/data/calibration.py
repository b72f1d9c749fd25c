"""Calibration set: images drawn from the train split, disjoint from the eval split."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from vitprune.data.augment import Transform
from vitprune.data.images import bytes_sha256, decode
from vitprune.data.manifest import rank_in_class
from vitprune.data.sources import Source, missing_image
from vitprune.errors import BadInput
from vitprune.runtime import tables
from vitprune.runtime.messages import first_line
from vitprune.runtime.progress import track

DEFAULT_SIZE = 2000


def draw_calibration(
    manifest: pa.Table, source: Source, size: int | None, balance: str, seed: int
) -> list[dict[str, Any]]:
    """Draw calibration images.

    Args:
        manifest: Table of tables.MANIFEST.
        source: The source of its images.
        size: Number of images; None for 2000, or for all if there are fewer.
        balance: "class": equal counts per class (a class with too few images contributes all of them); the first n rows
            are balanced for every n. "uniform": drawn from all images with equal probability.
        seed: Seed of the draw.

    Returns:
        Rows of tables.CALIBRATION.

    Raises:
        BadInput: `size` exceeds the train split, an image is also in the eval split, or the source has changed.
    """
    rows = manifest.to_pylist()
    train = [row for row in rows if row["split"] == "train"]
    if size is not None and size > len(train):
        raise BadInput(
            f"calibrate.size: {size} is larger than the train split, which has {len(train)} images; lower it"
        )
    count = min(DEFAULT_SIZE, len(train)) if size is None else size
    if count < 1:
        raise BadInput(f"calibrate.size: {count} images; draw at least 1")
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
    # one image of every class, then the second of every class, ...; the order of the classes is seeded
    class_order = rng.permutation(classes.max() + 1)[classes]
    return shuffled[np.lexsort((class_order, rank_in_class(classes)))]


def _read(row: dict[str, Any], source: Source, held_out: set[str]) -> dict[str, Any]:
    data = read_verified(source, row["id"], row["sha256"])
    if row["sha256"] in held_out:
        raise BadInput(f"{row['id']}: in the train and in the eval split of the manifest; run `vitprune dataset` again")
    path = row["id"]
    return {"id": row["id"], "label": row["label"], "sha256": row["sha256"], "image": {"bytes": data, "path": path}}


def read_verified(source: Source, image_id: str, sha256: str) -> bytes:
    """Read one image and verify its checksum.

    Args:
        source: The image source.
        image_id: Id of the image.
        sha256: Checksum in the manifest.

    Returns:
        The encoded bytes.

    Raises:
        BadInput: the image cannot be read or its checksum differs.
    """
    try:
        data = source.read(image_id)
    except FileNotFoundError:
        raise missing_image(image_id, source.spec) from None
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise BadInput(f"{image_id}: cannot be read ({reason}); run `vitprune dataset` again") from None
    if bytes_sha256(data) != sha256:
        raise BadInput(f"{image_id}: has changed since the manifest was made; run `vitprune dataset` again")
    return data


def load_calibration(path: Path, transform: Transform, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Load a calibration table.

    Args:
        path: Parquet file of tables.CALIBRATION.
        transform: Transform of the images.
        batch_size: Images per batch.

    Returns:
        Batches of images (B, C, H, W) float32 and labels (B,) int64, in the order of the table.

    Raises:
        BadInput: the file is missing, empty or no calibration table, or an image is corrupt.
    """
    rows = tables.read_table(path, tables.CALIBRATION).to_pylist()
    if not rows:
        raise BadInput(f"{path}: contains no images; run `vitprune calibrate` again")
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
        image = decode(data, transform.mode, transform.orient)
    except MemoryError:
        raise
    except Exception:  # Pillow's decoders raise various errors
        raise corrupt from None
    return transform.image(image)
