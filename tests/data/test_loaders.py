"""Transforms in numbers, and bit-identical batches."""

import io
import multiprocessing
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from PIL import Image

from tests.support.on_disk import GRAY8, RGB32, as_table, jpeg, write_folder
from vitprune import data
from vitprune.data.augment import RandomAffine
from vitprune.errors import BadInput
from vitprune.runtime import tables
from vitprune.runtime.progress import track


def test_data_config_has_the_actual_input_size() -> None:
    small = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=1, in_chans=1, depth=1, num_classes=10)
    config = data.data_config(small)
    assert (config["input_size"], config["crop_pct"], config["mean"]) == ((1, 8, 8), 1.0, (0.5,))
    plain = data.data_config(timm.create_model("deit_tiny_patch16_224", depth=1))
    assert (plain["input_size"], plain["crop_pct"], len(plain["mean"])) == ((3, 224, 224), 0.9, 3)
    with torch.device("meta"):  # the patch embedding follows a stem: 112 px
        assert data.data_config(timm.create_model("visformer_tiny"))["input_size"] == (3, 224, 224)
        levit = timm.create_model("levit_128s", img_size=64)  # has an input size but no PatchEmbed
        assert data.data_config(levit)["input_size"] == (3, 64, 64)
        frequencies = timm.create_model("csatv2")  # its first convolution reads coefficients of cosines
        assert data.data_config(frequencies)["input_size"] == (3, 512, 512)


@pytest.mark.parametrize("config", [GRAY8, RGB32], ids=["gray", "color"])
@pytest.mark.parametrize("augment", [None, *data.AUGMENTATIONS])
def test_every_preset_gives_the_input_shape(
    manifest: pa.Table, digits: data.Source, config: dict[str, object], augment: str | None
) -> None:
    few = manifest.slice(0, 40)
    table = data.open_split(few, digits, "train", data.transform(config, augment))
    images, labels = next(data.train_batches(table, 16, 0, 0))
    assert (images.shape, images.dtype, labels.dtype) == ((16, *config["input_size"]), torch.float32, torch.int64)  # type: ignore[misc]
    assert torch.isfinite(images).all()


def test_posterize_never_uses_zero_bits(digits: data.Source) -> None:
    compose = data.transform(RGB32, "deit").image
    (augment,) = [step for step in compose.transforms if type(step).__name__ == "RandAugment"]  # type: ignore[attr-defined]
    (posterize,) = [operation for operation in augment.ops if operation.name == "PosterizeIncreasing"]
    posterize.magnitude_std, posterize.prob = 5.0, 1.0  # far above the maximum in half of the draws
    image = Image.open(io.BytesIO(digits.read("digits/0000"))).convert("RGB")
    assert all(np.asarray(posterize(image)).max() > 0 for _ in range(50))


def test_random_affine_in_numbers() -> None:
    image = torch.full((1, 1, 8, 8), -1.0)
    image[0, 0, 4, 4] = 1.0
    affine = RandomAffine(torch.full((1, 1, 1, 1), -1.0))
    assert torch.allclose(affine(image, torch.tensor([[0.5, 0.5, 0.5, 0.5]])), image, atol=1e-5)
    moved = affine(image, torch.tensor([[0.5, 1.0, 0.0, 0.5]]))  # one pixel in each direction
    assert moved[0, 0, 5, 3].item() == pytest.approx(1.0, abs=1e-5)
    assert moved.sum().item() == pytest.approx(-62.0, abs=1e-3)  # pixels from outside are black


def test_unknown_presets_and_channel_counts_are_refused() -> None:
    with pytest.raises(BadInput, match="augment: 'strong' is unknown; use one of none, digits, light, deit"):
        data.transform(GRAY8, "strong")
    with pytest.raises(BadInput, match="4 channels"):
        data.transform(GRAY8 | {"input_size": (4, 8, 8)})


@pytest.mark.parametrize("augment", ["none", "digits", "deit"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12, in torch's loader
def test_batches_are_bit_identical_for_any_number_of_workers(
    manifest: pa.Table, digits: data.Source, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = manifest.slice(0, 81)
    transform = data.transform(GRAY8, augment)
    held = data.open_split(few, digits, "train", transform)
    monkeypatch.setattr("vitprune.data.loaders.MEMORY", 0)
    lazy = data.open_split(few, digits, "train", transform)
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


def test_every_epoch_has_its_own_order_and_random_numbers(manifest: pa.Table, digits: data.Source) -> None:
    table = data.open_split(manifest.slice(0, 80), digits, "train", data.transform(GRAY8, "light"))
    epochs = [torch.cat([labels for _, labels in data.train_batches(table, 16, 0, epoch)]) for epoch in (0, 1)]
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    one = data.open_split(manifest.slice(0, 1), digits, "train", data.transform(GRAY8, "digits"))
    looks = [next(data.train_batches(one, 1, 0, epoch))[0] for epoch in (0, 1)]
    assert not torch.equal(looks[0], looks[1])


def test_a_last_batch_of_one_image_is_dropped(manifest: pa.Table, digits: data.Source) -> None:
    train = manifest.filter(pa.compute.equal(manifest["split"], "train"))
    for rows, size, sizes in ((33, 16, [16, 16]), (34, 16, [16, 16, 2]), (1, 16, [1]), (5, 1, [1] * 5), (1, 1, [1])):
        table = data.open_split(train.slice(0, rows), digits, "train", data.transform(GRAY8))
        assert [len(labels) for _, labels in data.train_batches(table, size, 0, 0)] == sizes
        assert data.batch_count(rows, size) == len(sizes)
        assert sum(len(labels) for _, labels in data.eval_batches(table, size)) == rows


def test_eval_batches_are_in_manifest_order(manifest: pa.Table, digits: data.Source) -> None:
    table = data.open_split(manifest, digits, "eval", data.transform(GRAY8))
    rows = [row for row in manifest.to_pylist() if row["split"] == "eval"]
    assert list(table.ids) == [row["id"] for row in rows]
    labels = torch.cat([labels for _, labels in data.eval_batches(table, 64)])
    assert labels.tolist() == [row["label"] for row in rows]
    with pytest.raises(ValueError, match="without augmentation"):
        data.eval_batches(data.open_split(manifest, digits, "eval", data.transform(GRAY8, "light")), 64)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_an_error_in_a_worker_is_one_line(tmp_path: Path, digits: data.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, digits, range(40))
    source = data.open_source(f"folder:{tmp_path}")
    manifest = as_table(data.build_manifest(source, 0.25, 0, 0.0))
    monkeypatch.setattr("vitprune.data.loaders.MEMORY", 0)
    table = data.open_split(manifest, source, "train", data.transform(GRAY8, "light"))
    for name in table.ids:
        (tmp_path / name).write_bytes(jpeg(digits, 50))
    with pytest.raises(BadInput, match=r"^class\d/\d+.jpg: has changed .* again$"):
        list(data.train_batches(table, 16, 0, 0, workers=2))
    assert multiprocessing.active_children() == []


def test_an_augmented_epoch_has_every_training_image(manifest: pa.Table, digits: data.Source) -> None:
    table = data.open_split(manifest, digits, "train", data.transform(GRAY8, "digits"))
    assert sum(len(labels) for _, labels in data.train_batches(table, 64, 0, 0)) == 1438


def test_no_progress_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.real
def test_photographs_from_manifest_to_batches(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = data.open_source(f"parquet:{photographs}")
    result = data.build_manifest(source, 0.75, 0, 0.0)
    assert (Counter(row["split"] for row in result.rows), result.skipped) == ({"train": 200, "eval": 600}, [])
    table = as_table(result)
    rows = data.draw_calibration(table, source, 40, "class", 0)
    assert len({row["label"] for row in rows}) == 40  # one per class: there are more than 40 classes
    tables.write_table(rows, tables.CALIBRATION, tmp_path / "calibration.parquet")
    transform = data.transform(data.data_config(timm.create_model("deit_tiny_patch16_224", depth=1)))
    batches = data.load_calibration(tmp_path / "calibration.parquet", transform, 32)
    assert [tuple(images.shape) for images, _ in batches] == [(32, 3, 224, 224), (8, 3, 224, 224)]
    held = data.open_split(table.slice(0, 20), source, "eval", transform)
    monkeypatch.setattr("vitprune.data.loaders.MEMORY", 0)
    lazy = data.open_split(table.slice(0, 20), source, "eval", transform)
    pairs = zip(data.eval_batches(lazy, 8), data.eval_batches(held, 8), strict=True)
    assert all(torch.equal(one[0], other[0]) for one, other in pairs)
