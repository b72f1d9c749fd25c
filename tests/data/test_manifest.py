"""Manifest: splits, corrupt images, empty classes and duplicates."""

import hashlib
import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.on_disk import as_table, jpeg, write_folder
from vitprune import data
from vitprune.data.images import examine
from vitprune.data.manifest import draw_stratified
from vitprune.errors import BadInput
from vitprune.runtime import tables


def test_digits_are_split_by_class(manifest: pa.Table, digits: data.Source) -> None:
    count = Counter(manifest["split"].to_pylist())
    assert count == {"train": 1438, "eval": 359}
    rows = manifest.to_pylist()
    held_out = Counter(row["label"] for row in rows if row["split"] == "eval")
    every = Counter(digits.labels)
    assert all(abs(held_out[label] - 0.2 * every[label]) < 1 for label in every)
    assert all(hashlib.sha256(digits.read(row["id"])).hexdigest() == row["sha256"] for row in rows[:50])


def test_the_same_seed_gives_the_same_split(manifest: pa.Table, digits: data.Source) -> None:
    assert as_table(data.build_manifest(digits, 0.2, 0, 0.0)).equals(manifest)
    assert not as_table(data.build_manifest(digits, 0.2, 1, 0.0)).equals(manifest)


def test_stratified_draw_in_numbers() -> None:
    labels = np.array([0] * 10 + [1] * 5 + [2])
    rng = np.random.default_rng(0)
    drawn = draw_stratified(labels, np.ones(16, dtype=bool), 0.4, rng, keep_one=True)
    # quotas 4, 2 and 0.4 of 6.4: four of class 0, two of class 1, and none of class 2, which has one row
    assert [int(drawn[labels == label].sum()) for label in range(3)] == [4, 2, 0]
    all_but = draw_stratified(labels, labels != 1, 1.0, rng, keep_one=True)
    assert [int(all_but[labels == label].sum()) for label in range(3)] == [9, 0, 0]


def test_corrupt_images_are_skipped_and_counted(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(40))
    truncated = tmp_path / "class3" / "13.jpg"
    truncated.write_bytes(truncated.read_bytes()[:300])
    (tmp_path / "class5" / "25.jpg").write_bytes(b"")
    source = data.open_source(f"folder:{tmp_path}")
    result = data.build_manifest(source, 0.25, 0, skip_limit=0.05)
    assert result.skipped == ["class3/13.jpg", "class5/25.jpg"]
    assert len(result.rows) == 38
    with pytest.raises(
        BadInput, match=r"class3/13.jpg: cannot be decoded, like 2 of 40 .* \(class5/25.jpg\); .*skip_limit \(0.04\)"
    ):
        data.build_manifest(source, 0.25, 0, skip_limit=0.04)


def test_many_corrupt_images_are_named_up_to_eight(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(20))
    for file in tmp_path.glob("*/*.jpg"):
        file.write_bytes(b"")
    message = (
        r"cannot be decoded, like 20 of 20 images of folder:.* \(([^,]*, ){6}[^,]*jpg and 12 more\); repair or remove"
    )
    with pytest.raises(BadInput, match=message):
        data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.25, 0, skip_limit=0.5)


def test_a_flipped_bit_in_a_png_is_detected(digits: data.Source) -> None:
    full = digits.read("digits/0000")
    assert examine(full).sha256 == hashlib.sha256(full).hexdigest()
    with pytest.raises(SyntaxError, match="broken PNG file"):
        examine(full[:-30] + bytes([full[-30] ^ 1]) + full[-29:])


def test_null_images_in_parquet_are_skipped(tmp_path: Path, digits: data.Source) -> None:
    schema = pa.schema([("image", tables.IMAGE), ("label", pa.int64())])
    images = [{"bytes": digits.read(image_id), "path": None} for image_id in digits.ids[:9]]
    pq.write_table(pa.table({"image": [*images, None], "label": [0, 1] * 5}, schema=schema), tmp_path / "x.parquet")
    result = data.build_manifest(data.open_source(f"parquet:{tmp_path}/x.parquet"), 0.2, 0, 0.1)
    assert result.skipped == ["x.parquet#9"]


def test_an_empty_class_is_named(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(40))
    (tmp_path / "class4b").mkdir()
    with pytest.raises(BadInput, match=r"class class4b has no image to train on \(1 of 11 classes are empty\)"):
        data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.25, 0, 0.0)
    with pytest.raises(BadInput, match=r"class cat has no image"):
        data.build_manifest(data.open_source(f"folder:{tmp_path}", ["class1", "cat"]), 0.25, 0, 0.0)


def test_an_empty_split_is_refused(digits: data.Source) -> None:
    with pytest.raises(BadInput, match=r"digits: no image for eval; change dataset.eval_fraction \(0.0\)"):
        data.build_manifest(digits, 0.0, 0, 0.0)


def test_duplicates_are_all_assigned_to_train(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(60))
    for row in range(15):
        (tmp_path / f"class{digits.labels[row]}" / f"copy{row}.jpg").write_bytes(jpeg(digits, row))
    for seed in range(3):
        result = data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.3, seed, 0.0)
        held_out = [row for row in result.rows if row["split"] == "eval"]
        in_train = {row["sha256"] for row in result.rows if row["split"] == "train"}
        assert (len(result.rows), len(held_out), result.overlap) == (75, 22, 0)
        assert not in_train & {row["sha256"] for row in held_out}


def test_copies_of_eval_images_are_dropped_from_train(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path / "train", digits, range(40))
    write_folder(tmp_path / "val", digits, range(30, 50))
    result = data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.2, 0, 0.0)
    assert result.overlap == 10
    assert Counter(row["split"] for row in result.rows) == {"train": 30, "eval": 20}


def test_the_same_picture_in_another_encoding_is_the_same_image(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path / "train", digits, range(40))
    write_folder(tmp_path / "val", digits, range(40, 60))
    suffixes = {"PNG": "png", "TIFF": "tif", "BMP": "bmp", "WEBP": "webp", "PPM": "ppm"}
    for row, (name, suffix) in zip(range(40, 45), suffixes.items(), strict=True):
        picture = Image.open(io.BytesIO(jpeg(digits, row))).convert("RGB" if row % 2 else "L")
        options = {"lossless": True} if name == "WEBP" else {}
        picture.save(tmp_path / "train" / f"class{digits.labels[row]}" / f"other.{suffix}", name, **options)
    result = data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.2, 0, 0.0)
    assert result.overlap == 5
    assert Counter(row["split"] for row in result.rows) == {"train": 40, "eval": 20}
    pool = tmp_path / "pool"
    (tmp_path / "train").rename(pool)
    for row, suffix in zip(range(40, 45), suffixes.values(), strict=True):
        (pool / f"class{digits.labels[row]}" / f"{row}.jpg").write_bytes(jpeg(digits, row))
        assert (pool / f"class{digits.labels[row]}" / f"other.{suffix}").exists()
    for seed in range(3):
        rows = data.build_manifest(data.open_source(f"folder:{pool}"), 0.5, seed, 0.0).rows
        held_out = {row["id"] for row in rows if row["split"] == "eval"}
        assert not [name for name in held_out if "other" in name or Path(name).stem in map(str, range(40, 45))]


def test_orientations_are_applied_counted_and_can_be_turned_off(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(20))
    exif = Image.Exif()
    exif[0x112] = 6
    picture = Image.open(io.BytesIO(digits.read(digits.ids[20]))).resize((32, 24))
    picture.save(tmp_path / "class0" / "turned.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "class0" / "upright.tif")
    source = data.open_source(f"folder:{tmp_path}")
    result = data.build_manifest(source, 0.5, 0, 0.0)
    assert result.oriented == 1
    assert not {"class0/turned.png", "class0/upright.tif"} & {r["id"] for r in result.rows if r["split"] == "eval"}
    assert data.build_manifest(source, 0.5, 0, 0.0, orient=False).oriented == 0


def test_files_that_are_not_images_are_counted_as_unreadable(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(40))
    (tmp_path / "class0" / "dead.jpg").symlink_to("/nowhere/cache/ab/cdef")
    (tmp_path / "class1" / "zeros.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "class2" / "pipe.png")
    with (tmp_path / "class3" / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    source = data.open_source(f"folder:{tmp_path}")
    result = data.build_manifest(source, 0.25, 0, skip_limit=0.1)
    assert result.skipped == ["class0/dead.jpg", "class1/zeros.png", "class2/pipe.png", "class3/sparse.png"]
    with pytest.raises(
        BadInput, match=r"dead.jpg: cannot be decoded, like 4 of 44 .*repair .*; reason: No such file or directory$"
    ):
        data.build_manifest(source, 0.25, 0, skip_limit=0.01)


def test_a_single_class_is_refused(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, [row for row in range(60) if digits.labels[row] == 3])
    with pytest.raises(BadInput, match="all images to train on have one class; give at least two"):
        data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.25, 0, 0.0)
