"""Calibration set: balance, overlap with the eval split, size, corrupt images."""

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tests.support.on_disk import GRAY8, as_table, jpeg, write_folder
from vitprune import data
from vitprune.errors import BadInput
from vitprune.runtime import tables


def test_class_counts_differ_by_at_most_one(manifest: pa.Table, digits: data.Source) -> None:
    rows = data.draw_calibration(manifest, digits, 203, "class", seed=0)
    counts = Counter(row["label"] for row in rows)
    assert sorted(counts.values()) == [20] * 7 + [21] * 3
    assert len({row["id"] for row in rows}) == 203
    assert {row["label"] for row in rows[:10]} == set(range(10))  # the first rows are balanced too
    train = {row["id"] for row in manifest.to_pylist() if row["split"] == "train"}
    assert {row["id"] for row in rows} <= train
    assert rows[0]["image"]["bytes"] == digits.read(rows[0]["id"])
    assert rows == data.draw_calibration(manifest, digits, 203, "class", seed=0)
    assert rows != data.draw_calibration(manifest, digits, 203, "class", seed=1)


def test_small_classes_contribute_all_images(manifest: pa.Table, digits: data.Source) -> None:
    rows = [row for row in manifest.to_pylist() if row["split"] == "train"]
    few = [row for row in rows if row["label"] == 0][:3] + [row for row in rows if row["label"] == 1][:50]
    few += [row for row in rows if row["label"] == 2][:50]
    table = pa.Table.from_pylist(few, schema=tables.MANIFEST)
    counts = Counter(row["label"] for row in data.draw_calibration(table, digits, 43, "class", 0))
    assert counts == {0: 3, 1: 20, 2: 20}


def test_uniform_calibration_and_the_default_size(manifest: pa.Table, digits: data.Source) -> None:
    assert len(data.draw_calibration(manifest, digits, 100, "uniform", 0)) == 100
    assert len(data.draw_calibration(manifest, digits, None, "uniform", 0)) == 1438
    with pytest.raises(BadInput, match=r"calibrate.balance: 'odd' is unknown"):
        data.draw_calibration(manifest, digits, 10, "odd", 0)


def test_a_size_above_the_train_split_is_refused(manifest: pa.Table, digits: data.Source) -> None:
    with pytest.raises(BadInput, match=r"calibrate.size: 2000 is larger than the train split, which has 1438 images"):
        data.draw_calibration(manifest, digits, 2000, "class", 0)


def test_calibration_never_overlaps_eval(manifest: pa.Table, digits: data.Source) -> None:
    rows = manifest.to_pylist()
    held_out = next(row for row in rows if row["split"] == "eval")
    edited = pa.Table.from_pylist([*rows, held_out | {"split": "train"}], schema=tables.MANIFEST)
    with pytest.raises(BadInput, match=f"{held_out['id']}: in the train and in the eval split"):
        data.draw_calibration(edited, digits, None, "class", 0)


def test_changed_and_missing_images_are_refused(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(40))
    source = data.open_source(f"folder:{tmp_path}")
    table = as_table(data.build_manifest(source, 0.25, 0, 0.0))
    victim = next(row["id"] for row in table.to_pylist() if row["split"] == "train")
    (tmp_path / victim).write_bytes(jpeg(digits, 50))
    with pytest.raises(BadInput, match=f"{victim}: has changed since .* run `vitprune dataset` again"):
        data.draw_calibration(table, source, None, "class", 0)
    (tmp_path / victim).unlink()
    with pytest.raises(BadInput, match=f"{victim}: not in folder:.* run `vitprune dataset` again"):
        data.open_split(table, source, "train", data.transform(GRAY8))


def test_calibration_table_round_trip(tmp_path: Path, manifest: pa.Table, digits: data.Source) -> None:
    rows = data.draw_calibration(manifest, digits, 25, "class", 0)
    path = tmp_path / "calibration.parquet"
    tables.write_table(rows, tables.CALIBRATION, path)
    batches = data.load_calibration(path, data.transform(GRAY8), 10)
    assert [tuple(images.shape) for images, _ in batches] == [(10, 1, 8, 8), (10, 1, 8, 8), (5, 1, 8, 8)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [row["label"] for row in rows]
    pixels = np.asarray(Image.open(io.BytesIO(rows[0]["image"]["bytes"])), dtype=np.float32)
    np.testing.assert_allclose(batches[0][0][0, 0].numpy(), pixels / 255 * 2 - 1, atol=1e-6)


def test_a_corrupt_row_is_refused(tmp_path: Path, manifest: pa.Table, digits: data.Source) -> None:
    rows = data.draw_calibration(manifest, digits, 5, "class", 0)
    path = tmp_path / "calibration.parquet"
    for broken in (b"", rows[3]["image"]["bytes"][:60]):
        digest = hashlib.sha256(broken).hexdigest()
        bad = rows[3] | {"image": {"bytes": broken, "path": ""}, "sha256": digest}
        tables.write_table([*rows[:3], bad], tables.CALIBRATION, path)
        with pytest.raises(BadInput, match=f"image {rows[3]['id']} is corrupt"):
            data.load_calibration(path, data.transform(GRAY8), 10)
    tables.write_table([rows[0] | {"sha256": "0" * 64}], tables.CALIBRATION, path)
    with pytest.raises(BadInput, match=f"image {rows[0]['id']} is corrupt"):
        data.load_calibration(path, data.transform(GRAY8), 10)
