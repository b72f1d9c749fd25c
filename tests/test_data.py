"""Sources, manifest, calibration table and loaders on real images: scanned digits, and photographs where they are."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import struct
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from vitprune import data, tables
from vitprune.data.augment import RandomAffine
from vitprune.data.images import intact
from vitprune.data.splits import draw_stratified
from vitprune.errors import BadInput
from vitprune.progress import track

GREY8 = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "interpolation": "bicubic"}
RGB32 = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def digits() -> data.Source:
    return data.open_source("digits")


@pytest.fixture(scope="module")
def manifest(digits: data.Source) -> pa.Table:
    return as_table(data.build_manifest(digits, eval_fraction=0.2, seed=0, skip_limit=0.0))


def as_table(manifest: data.Manifest) -> pa.Table:
    return pa.Table.from_pylist(manifest.rows, schema=tables.MANIFEST)


def jpeg(source: data.Source, row: int) -> bytes:
    """Return one digit at 32 px as JPEG."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(source.read(source.ids[row]))).resize((32, 32)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_folder(root: Path, source: data.Source, rows: Sequence[int]) -> None:
    """Write digits as root/CLASS/ROW.jpg."""
    for row in rows:
        file = root / f"class{source.labels[row]}" / f"{row}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(source, row))


def write_parquet(path: Path, source: data.Source, rows: Sequence[int], names: Sequence[str] = ()) -> None:
    images = [{"bytes": source.read(source.ids[row]), "path": f"{row}.png"} for row in rows]
    schema = pa.schema([("image", tables.IMAGE), ("label", pa.int64())])
    if names:
        info = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        schema = schema.with_metadata({"huggingface": json.dumps(info)})
    table = pa.table({"image": images, "label": [source.labels[row] for row in rows]}, schema=schema)
    pq.write_table(table, path, row_group_size=7)


# Sources


def test_digits_are_scikit_learns_scans(digits: data.Source) -> None:
    assert len(digits.ids) == 1797
    assert digits.ids[0] == "digits/0000"
    assert digits.labels[:10] == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert digits.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    image = Image.open(io.BytesIO(digits.read("digits/0000")))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
    # scikit-learn's first row of the first digit: 0 0 5 13 9 1 0 0 of 16
    assert np.asarray(image)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_the_digest_of_a_digit_is_the_same_everywhere(digits: data.Source) -> None:
    digest = hashlib.sha256(digits.read("digits/0000")).hexdigest()
    assert digest == "d79b74a84660260fea78c0b6384a0ffa2d88bef62d035c7a70a4a233c4ae194a"


def test_folder_is_one_pool_in_natural_order(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(20))
    (tmp_path / "class10" / "deep").mkdir(parents=True)
    (tmp_path / "class10" / "deep" / "x.JPEG").write_bytes(jpeg(digits, 30))
    (tmp_path / "class10" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    source = data.open_source(f"folder:{tmp_path}")
    assert source.classes == (*(f"class{digit}" for digit in range(10)), "class10")
    assert source.ids[:3] == ("class0/0.jpg", "class0/10.jpg", "class1/1.jpg")
    assert source.ids[-1] == "class10/deep/x.JPEG"
    assert source.labels[-1] == 10
    assert source.splits is None
    assert source.read("class1/1.jpg") == jpeg(digits, 1)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_folder_splits_are_used(tmp_path: Path, digits: data.Source, name: str) -> None:
    write_folder(tmp_path / "train", digits, range(20))
    write_folder(tmp_path / name, digits, range(20, 30))
    result = data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.5, 0, 0.0)
    assert Counter(row["split"] for row in result.rows) == {"train": 20, "eval": 10}
    assert {row["id"].split("/")[0] for row in result.rows if row["split"] == "eval"} == {name}


def test_classes_choose_and_order_the_folders(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(10))
    source = data.open_source(f"folder:{tmp_path}", ["class7", "class2"])
    assert list(zip(source.ids, source.labels, strict=True)) == [("class7/7.jpg", 0), ("class2/2.jpg", 1)]


def test_parquet_reads_any_row_of_any_file(tmp_path: Path, digits: data.Source) -> None:
    write_parquet(tmp_path / "a.parquet", digits, range(40))
    write_parquet(tmp_path / "b.parquet", digits, range(40, 45))
    source = data.open_source(f"parquet:{tmp_path}")
    assert (source.ids[0], source.ids[39], source.ids[-1]) == ("a.parquet#0", "a.parquet#39", "b.parquet#4")
    assert source.labels == digits.labels[:45]
    assert source.classes is None
    for row in np.random.default_rng(0).permutation(45):
        assert source.read(source.ids[row]) == digits.read(digits.ids[row])
    copy = pickle.loads(pickle.dumps(source.read))  # what a worker process that is not forked gets
    assert copy("b.parquet#2") == digits.read(digits.ids[42])


def test_parquet_splits_and_names_of_hugging_face(tmp_path: Path, digits: data.Source) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", digits, range(20), "abcdefghij")
    write_parquet(tmp_path / "train-00001-of-00002.parquet", digits, range(20, 30), "abcdefghij")
    write_parquet(tmp_path / "test-00000-of-00001.parquet", digits, range(30, 40), "abcdefghij")
    source = data.open_source(f"parquet:{tmp_path}")
    assert source.classes == tuple("abcdefghij")
    assert Counter(source.splits or ()) == {"train": 30, "eval": 10}


def test_eval_source_gives_the_eval_split(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path / "a", digits, range(30))
    write_folder(tmp_path / "b", digits, [37, 38])  # classes 9 and 8 alone: matched by name
    source = data.open_source(f"folder:{tmp_path}/a", eval_source=f"folder:{tmp_path}/b")
    rows = data.build_manifest(source, 0.2, 0, 0.0).rows
    assert [(row["id"], row["label"]) for row in rows if row["split"] == "eval"] == [
        (f"eval:class{digits.labels[row]}/{row}.jpg", digits.labels[row]) for row in (38, 37)
    ]
    assert source.read(rows[-1]["id"]) == jpeg(digits, 37)


def test_timm_names_are_read_through_timm(tmp_path: Path, digits: data.Source) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, rows in (("train", range(50)), ("t10k", range(50, 60))):
        pixels = [np.asarray(Image.open(io.BytesIO(digits.read(digits.ids[row])))) for row in rows]
        shape = struct.pack(">iiii", 2051, len(rows), 8, 8)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(shape + np.stack(pixels).tobytes())
        labels = bytes(digits.labels[row] for row in rows)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, len(rows)) + labels)
    source = data.open_source(f"torch/mnist:{tmp_path}")
    assert source.labels == digits.labels[:60]
    assert Counter(source.splits or ()) == {"train": 50, "eval": 10}
    assert source.read("train#3") == digits.read("digits/0003")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digitz", "dataset.source: 'digitz' is unknown"),
        ("wds/imagenet", "is a stream"),
        ("torch/mnist:/nowhere", "torch/mnist:/nowhere cannot be opened: Dataset not found"),
        ("torch/image_folder:x", "write folder:x"),
        ("folder:", "lacks the path"),
        ("folder:/nowhere", "folder:/nowhere: no such folder"),
        ("parquet:/nowhere.parquet", "parquet:/nowhere.parquet: no such file"),
    ],
)
def test_source_that_cannot_be_opened(spec: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        data.open_source(spec)
    assert "\n" not in str(error.value)


def test_hugging_face_names_need_their_package() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(BadInput, match="pip install datasets"):
            data.open_source("hfds/some/name")
    else:
        pytest.skip("the package datasets is installed")


def test_parquet_that_is_no_image_table(tmp_path: Path, digits: data.Source) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(BadInput, match=r"x.parquet: not a readable Parquet file"):
        data.open_source(f"parquet:{path}")
    pq.write_table(pa.table({"image": [b""], "label": [0]}), path)
    with pytest.raises(BadInput, match=r"x.parquet: needs the columns image: struct"):
        data.open_source(f"parquet:{path}")
    write_parquet(path, digits, range(10))
    with pytest.raises(BadInput, match=r"x.parquet: row 3 has label 3, which must be 0..2 \(3 classes\)"):
        data.open_source(f"parquet:{path}", ["a", "b", "c"])
    write_folder(tmp_path / "f", digits, [0, 1])
    with pytest.raises(BadInput, match=r"class 2 is not a class of"):
        data.open_source(f"folder:{tmp_path}/f", eval_source=f"parquet:{path}")


def test_digits_have_ten_classes() -> None:
    with pytest.raises(BadInput, match=r"dataset.classes: digits has 10 classes, not 2"):
        data.open_source("digits", ["a", "b"])


# Manifest


def test_digits_are_divided_by_class(manifest: pa.Table, digits: data.Source) -> None:
    count = Counter(manifest["split"].to_pylist())
    assert count == {"train": 1438, "eval": 359}
    rows = manifest.to_pylist()
    held_out = Counter(row["label"] for row in rows if row["split"] == "eval")
    every = Counter(digits.labels)
    assert all(abs(held_out[label] - 0.2 * every[label]) < 1 for label in every)
    assert all(hashlib.sha256(digits.read(row["id"])).hexdigest() == row["sha256"] for row in rows[:50])


def test_the_same_seed_draws_the_same_split(manifest: pa.Table, digits: data.Source) -> None:
    assert as_table(data.build_manifest(digits, 0.2, 0, 0.0)).equals(manifest)
    assert not as_table(data.build_manifest(digits, 0.2, 1, 0.0)).equals(manifest)


def test_stratified_draw_in_numbers() -> None:
    labels = np.array([0] * 10 + [1] * 5 + [2])
    rng = np.random.default_rng(0)
    drawn = draw_stratified(labels, np.ones(16, dtype=bool), 0.4, rng, keep_one=True)
    # shares 4, 2 and 0.4 of 6.4: four of class 0, two of class 1, and the only one of class 2 stays
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
    with pytest.raises(BadInput, match=r"class3/13.jpg: cannot be decoded, like 2 of 40 .*skip_limit \(0.04\)"):
        data.build_manifest(source, 0.25, 0, skip_limit=0.04)


def test_a_flipped_bit_in_a_png_is_found(digits: data.Source) -> None:
    whole = digits.read("digits/0000")
    assert intact(whole)
    assert not intact(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])


def test_null_image_in_parquet_is_skipped(tmp_path: Path, digits: data.Source) -> None:
    schema = pa.schema([("image", tables.IMAGE), ("label", pa.int64())])
    images = [{"bytes": digits.read(image_id), "path": None} for image_id in digits.ids[:9]]
    pq.write_table(pa.table({"image": [*images, None], "label": [0] * 10}, schema=schema), tmp_path / "x.parquet")
    result = data.build_manifest(data.open_source(f"parquet:{tmp_path}/x.parquet"), 0.2, 0, 0.1)
    assert result.skipped == ["x.parquet#9"]


def test_empty_class_is_named(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(40))
    (tmp_path / "class4b").mkdir()
    with pytest.raises(BadInput, match=r"class class4b has no image to train on \(1 of 11 classes are empty\)"):
        data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.25, 0, 0.0)
    with pytest.raises(BadInput, match=r"class cat has no image"):
        data.build_manifest(data.open_source(f"folder:{tmp_path}", ["class1", "cat"]), 0.25, 0, 0.0)


def test_empty_split_is_an_error(digits: data.Source) -> None:
    with pytest.raises(BadInput, match=r"digits: no image for eval; change dataset.eval_fraction \(0.0\)"):
        data.build_manifest(digits, 0.0, 0, 0.0)


def test_copies_stay_together_in_train(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(60))
    for row in range(15):
        (tmp_path / f"class{digits.labels[row]}" / f"copy{row}.jpg").write_bytes(jpeg(digits, row))
    for seed in range(3):
        result = data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.3, seed, 0.0)
        held_out = [row for row in result.rows if row["split"] == "eval"]
        in_train = {row["sha256"] for row in result.rows if row["split"] == "train"}
        assert (len(result.rows), len(held_out), result.overlap) == (75, 22, 0)
        assert not in_train & {row["sha256"] for row in held_out}


def test_copies_of_eval_images_leave_train(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path / "train", digits, range(40))
    write_folder(tmp_path / "val", digits, range(30, 50))
    result = data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.2, 0, 0.0)
    assert result.overlap == 10
    assert Counter(row["split"] for row in result.rows) == {"train": 30, "eval": 20}


# Calibration


def test_calibration_is_balanced_to_one_image(manifest: pa.Table, digits: data.Source) -> None:
    rows = data.draw_calibration(manifest, digits, 203, "class", seed=0)
    counts = Counter(row["label"] for row in rows)
    assert sorted(counts.values()) == [20] * 7 + [21] * 3
    assert len({row["id"] for row in rows}) == 203
    assert {row["label"] for row in rows[:10]} == set(range(10))  # so is its beginning
    train = {row["id"] for row in manifest.to_pylist() if row["split"] == "train"}
    assert {row["id"] for row in rows} <= train
    assert rows[0]["image"]["bytes"] == digits.read(rows[0]["id"])
    assert rows == data.draw_calibration(manifest, digits, 203, "class", seed=0)
    assert rows != data.draw_calibration(manifest, digits, 203, "class", seed=1)


def test_small_classes_give_all_and_others_fill_up(manifest: pa.Table, digits: data.Source) -> None:
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


def test_calibration_larger_than_the_data(manifest: pa.Table, digits: data.Source) -> None:
    with pytest.raises(BadInput, match=r"calibrate.size: 2000 is larger than the train split, which has 1438 images"):
        data.draw_calibration(manifest, digits, 2000, "class", 0)


def test_calibration_never_overlaps_eval(manifest: pa.Table, digits: data.Source) -> None:
    rows = manifest.to_pylist()
    held_out = next(row for row in rows if row["split"] == "eval")
    edited = pa.Table.from_pylist([*rows, held_out | {"split": "train"}], schema=tables.MANIFEST)
    with pytest.raises(BadInput, match=f"{held_out['id']}: in the train and in the eval split"):
        data.draw_calibration(edited, digits, None, "class", 0)


def test_changed_or_missing_image_is_found(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(40))
    source = data.open_source(f"folder:{tmp_path}")
    table = as_table(data.build_manifest(source, 0.25, 0, 0.0))
    victim = next(row["id"] for row in table.to_pylist() if row["split"] == "train")
    (tmp_path / victim).write_bytes(jpeg(digits, 50))
    with pytest.raises(BadInput, match=f"{victim}: has changed since .* run `vitprune dataset` again"):
        data.draw_calibration(table, source, None, "class", 0)
    (tmp_path / victim).unlink()
    with pytest.raises(BadInput, match=f"{victim}: not in folder:.* run `vitprune dataset` again"):
        data.open_split(table, source, "train", data.transform(GREY8))


def test_calibration_table_round_trip(tmp_path: Path, manifest: pa.Table, digits: data.Source) -> None:
    rows = data.draw_calibration(manifest, digits, 25, "class", 0)
    path = tmp_path / "calibration.parquet"
    tables.write(rows, tables.CALIBRATION, path)
    batches = data.load_calibration(path, data.transform(GREY8), 10)
    assert [tuple(images.shape) for images, _ in batches] == [(10, 1, 8, 8), (10, 1, 8, 8), (5, 1, 8, 8)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [row["label"] for row in rows]
    pixels = np.asarray(Image.open(io.BytesIO(rows[0]["image"]["bytes"])), dtype=np.float32)
    np.testing.assert_allclose(batches[0][0][0, 0].numpy(), pixels / 255 * 2 - 1, atol=1e-6)


def test_corrupt_row_of_the_calibration_table(tmp_path: Path, manifest: pa.Table, digits: data.Source) -> None:
    rows = data.draw_calibration(manifest, digits, 5, "class", 0)
    path = tmp_path / "calibration.parquet"
    for broken in (b"", rows[3]["image"]["bytes"][:60]):
        digest = hashlib.sha256(broken).hexdigest()
        bad = rows[3] | {"image": {"bytes": broken, "path": ""}, "sha256": digest}
        tables.write([*rows[:3], bad], tables.CALIBRATION, path)
        with pytest.raises(BadInput, match=f"image {rows[3]['id']} is corrupt"):
            data.load_calibration(path, data.transform(GREY8), 10)
    tables.write([rows[0] | {"sha256": "0" * 64}], tables.CALIBRATION, path)
    with pytest.raises(BadInput, match=f"image {rows[0]['id']} is corrupt"):
        data.load_calibration(path, data.transform(GREY8), 10)


# Transforms


def test_data_config_is_that_of_the_model_as_built() -> None:
    small = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=1, in_chans=1, depth=1, num_classes=10)
    config = data.data_config(small)
    assert (config["input_size"], config["crop_pct"], config["mean"]) == ((1, 8, 8), 1.0, (0.5,))
    plain = data.data_config(timm.create_model("deit_tiny_patch16_224", depth=1))
    assert (plain["input_size"], plain["crop_pct"], len(plain["mean"])) == ((3, 224, 224), 0.9, 3)


@pytest.mark.parametrize("config", [GREY8, RGB32], ids=["grey", "colour"])
@pytest.mark.parametrize("augment", [None, *data.AUGMENTATIONS])
def test_every_preset_gives_the_models_shape(
    manifest: pa.Table, digits: data.Source, config: dict[str, object], augment: str | None
) -> None:
    few = manifest.slice(0, 40)
    table = data.open_split(few, digits, "train", data.transform(config, augment))
    images, labels = next(data.train_batches(table, 16, 0, 0))
    assert (images.shape, images.dtype, labels.dtype) == ((16, *config["input_size"]), torch.float32, torch.int64)  # type: ignore[misc]
    assert torch.isfinite(images).all()


def test_deit_preset_never_posterizes_to_nothing(digits: data.Source) -> None:
    compose = data.transform(RGB32, "deit").image
    (augment,) = [step for step in compose.transforms if type(step).__name__ == "RandAugment"]  # type: ignore[attr-defined]
    (posterize,) = [operation for operation in augment.ops if operation.name == "PosterizeIncreasing"]
    posterize.magnitude_std, posterize.prob = 5.0, 1.0  # far over the top, half of the time
    image = Image.open(io.BytesIO(digits.read("digits/0000"))).convert("RGB")
    assert all(np.asarray(posterize(image)).max() > 0 for _ in range(50))


def test_digits_affine_in_numbers() -> None:
    image = torch.full((1, 1, 8, 8), -1.0)
    image[0, 0, 4, 4] = 1.0
    affine = RandomAffine(torch.full((1, 1, 1, 1), -1.0))
    assert torch.allclose(affine(image, torch.tensor([[0.5, 0.5, 0.5, 0.5]])), image, atol=1e-5)
    moved = affine(image, torch.tensor([[0.5, 1.0, 0.0, 0.5]]))  # one pixel each way
    assert moved[0, 0, 5, 3].item() == pytest.approx(1.0, abs=1e-5)
    assert moved.sum().item() == pytest.approx(-62.0, abs=1e-3)  # black came in from outside


def test_unknown_preset_and_channels() -> None:
    with pytest.raises(BadInput, match="augment: 'strong' is unknown; use one of none, digits, light, deit"):
        data.transform(GREY8, "strong")
    with pytest.raises(BadInput, match="4 channels"):
        data.transform(GREY8 | {"input_size": (4, 8, 8)})


# Loaders


@pytest.mark.parametrize("augment", ["none", "digits", "deit"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12, in torch's loader
def test_same_seed_gives_the_same_bits_with_any_workers(manifest: pa.Table, digits: data.Source, augment: str) -> None:
    few = manifest.slice(0, 81)
    transform = data.transform(GREY8, augment)
    held = data.open_split(few, digits, "train", transform)
    lazy = data.open_split(few, digits, "train", transform, memory=0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    first = list(data.train_batches(held, 16, seed=3, epoch=1))
    for table, workers in ((held, 0), (lazy, 0), (held, 2), (lazy, 2)):
        again = list(data.train_batches(table, 16, seed=3, epoch=1, workers=workers))
        assert len(again) == len(first)
        for (images, labels), (other, names) in zip(first, again, strict=True):
            assert torch.equal(images, other)
            assert torch.equal(labels, names)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert after == states


def test_every_epoch_has_its_own_order_and_numbers(manifest: pa.Table, digits: data.Source) -> None:
    table = data.open_split(manifest.slice(0, 80), digits, "train", data.transform(GREY8, "light"))
    epochs = [torch.cat([labels for _, labels in data.train_batches(table, 16, 0, epoch)]) for epoch in (0, 1)]
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    one = data.open_split(manifest.slice(0, 1), digits, "train", data.transform(GREY8, "digits"))
    looks = [next(data.train_batches(one, 1, 0, epoch))[0] for epoch in (0, 1)]
    assert not torch.equal(looks[0], looks[1])


def test_last_batch_of_one_is_left_out(manifest: pa.Table, digits: data.Source) -> None:
    train = manifest.filter(pa.compute.equal(manifest["split"], "train"))
    for rows, sizes in ((33, [16, 16]), (34, [16, 16, 2]), (1, [1])):
        table = data.open_split(train.slice(0, rows), digits, "train", data.transform(GREY8))
        assert [len(labels) for _, labels in data.train_batches(table, 16, 0, 0)] == sizes
        assert sum(len(labels) for _, labels in data.eval_batches(table, 16)) == rows


def test_eval_batches_are_in_the_manifests_order(manifest: pa.Table, digits: data.Source) -> None:
    table = data.open_split(manifest, digits, "eval", data.transform(GREY8))
    rows = [row for row in manifest.to_pylist() if row["split"] == "eval"]
    assert list(table.ids) == [row["id"] for row in rows]
    labels = torch.cat([labels for _, labels in data.eval_batches(table, 64)])
    assert labels.tolist() == [row["label"] for row in rows]
    with pytest.raises(ValueError, match="without augmentation"):
        data.eval_batches(data.open_split(manifest, digits, "eval", data.transform(GREY8, "light")), 64)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_error_in_a_worker_is_one_line(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(40))
    source = data.open_source(f"folder:{tmp_path}")
    table = data.open_split(
        as_table(data.build_manifest(source, 0.25, 0, 0.0)), source, "train", data.transform(GREY8, "light"), memory=0
    )
    for name in table.ids:
        (tmp_path / name).write_bytes(jpeg(digits, 50))
    with pytest.raises(BadInput, match=r"^class\d/\d+.jpg: has changed .* again$"):
        list(data.train_batches(table, 16, 0, 0, workers=2))
    assert multiprocessing.active_children() == []


def test_an_augmented_epoch_of_digits_is_quick(manifest: pa.Table, digits: data.Source) -> None:
    table = data.open_split(manifest, digits, "train", data.transform(GREY8, "digits"))
    start = time.process_time()  # not wall-clock time: other processes may hold the cores
    assert sum(len(labels) for _, labels in data.train_batches(table, 64, 0, 0)) == 1438
    assert time.process_time() - start < 1.0


def test_progress_draws_nothing_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


# Photographs


@pytest.fixture(scope="module")
def photographs() -> Path:
    folder = os.environ.get("VITPRUNE_REAL_DATA")
    if folder is None:
        pytest.skip("VITPRUNE_REAL_DATA is not set")
    path = Path(folder) / "imagenet-val-800.parquet"
    if not path.exists():
        pytest.skip(f"VITPRUNE_REAL_DATA has no {path.name}")
    return path


@pytest.mark.real
def test_photographs_in_parquet(photographs: Path) -> None:
    source = data.open_source(f"parquet:{photographs}")
    assert (len(source.ids), len(set(source.labels)), source.labels[0]) == (800, 534, 472)
    row = source.read("imagenet-val-800.parquet#0")
    assert hashlib.sha256(row).hexdigest() == "b4ba0d149ef9f1834e88050cf40537d47f7c69e095f6c67a5bd494f04f6cb560"
    images = pq.read_table(photographs)["image"]
    for number in (799, 3, 400, 250):
        assert source.read(f"imagenet-val-800.parquet#{number}") == images[number].as_py()["bytes"]


@pytest.mark.real
def test_photographs_from_manifest_to_batches(photographs: Path, tmp_path: Path) -> None:
    source = data.open_source(f"parquet:{photographs}")
    result = data.build_manifest(source, 0.75, 0, 0.0)
    assert (Counter(row["split"] for row in result.rows), result.skipped) == ({"train": 200, "eval": 600}, [])
    table = as_table(result)
    rows = data.draw_calibration(table, source, 40, "class", 0)
    assert len({row["label"] for row in rows}) == 40  # one each, for there are more than 40 classes
    tables.write(rows, tables.CALIBRATION, tmp_path / "calibration.parquet")
    transform = data.transform(data.data_config(timm.create_model("deit_tiny_patch16_224", depth=1)))
    batches = data.load_calibration(tmp_path / "calibration.parquet", transform, 32)
    assert [tuple(images.shape) for images, _ in batches] == [(32, 3, 224, 224), (8, 3, 224, 224)]
    lazy = data.open_split(table.slice(0, 20), source, "eval", transform, memory=0)
    held = data.open_split(table.slice(0, 20), source, "eval", transform)
    pairs = zip(data.eval_batches(lazy, 8), data.eval_batches(held, 8), strict=True)
    assert all(torch.equal(one[0], other[0]) for one, other in pairs)
