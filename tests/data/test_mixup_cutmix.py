"""Mixup and CutMix: seeding and soft labels; augmentation presets; repeated augmentation."""

import random

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tests.support.on_disk import GRAY8, RGB32
from vitprune import data
from vitprune.data.augment import TIMM_PRESETS
from vitprune.data.mixup_cutmix import cutmix


def drawn(number: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Constant images whose value is their label."""
    return torch.arange(float(number)).view(-1, 1, 1, 1).expand(number, 3, 24, 16).double(), torch.arange(number)


@pytest.mark.parametrize("number", [6, 7])
def test_soft_labels_are_the_shares_of_the_image(number: int) -> None:
    images, labels = drawn(number)
    mix, boxes = data.make_mixer(0.8, 1.0, 1.0, number, 0), 0
    for _ in range(60):
        mixed, shares = mix(images, labels)
        assert (mixed.shape, shares.shape, shares.dtype) == (images.shape, (number, number), torch.float64)
        # the mean of a mixed image equals the mean of its soft label, for CutMix and Mixup
        torch.testing.assert_close(mixed.mean((1, 2, 3)), (shares * torch.arange(number)).sum(1), rtol=0, atol=1e-5)
        torch.testing.assert_close(shares.sum(1), torch.ones(number).double(), rtol=0, atol=1e-6)
        boxes += all(value in range(number) for value in mixed.unique().tolist())
    assert 10 < boxes < 50  # both CutMix and Mixup occur
    assert torch.equal(images[:, 0, 0, 0], torch.arange(float(number)).double())


def test_mixing_is_seeded_and_does_not_change_global_generators() -> None:
    np.random.seed(5)
    expected = np.random.random(3).tolist()
    np.random.seed(5)
    runs = []
    for seed in (1, 1, 2):
        mix = data.make_mixer(0.8, 1.0, 1.0, 6, seed)
        runs.append(torch.stack([mix(*drawn())[0] for _ in range(5)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert np.random.random(3).tolist() == expected


@pytest.mark.parametrize(("mixup", "cut"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix_prob_mixes_only_some_batches(mixup: float, cut: float) -> None:
    mix, (images, labels) = data.make_mixer(mixup, cut, 0.2, 6, 0), drawn()
    result = [mix(images, labels) for _ in range(200)]
    same = [torch.equal(mixed, images) for mixed, _ in result]
    assert 130 < sum(same) < 190
    assert all(
        torch.equal(shares, torch.eye(6).double()) for (_, shares), alike in zip(result, same, strict=True) if alike
    )


def test_cutmix_without_mixup_is_that_of_up_vits() -> None:
    mix, generator = data.make_mixer(0.0, 0.5, 1.0, 6, 3), np.random.default_rng(3)
    for _ in range(5):
        for ours, theirs in zip(mix(*drawn()), cutmix(*drawn(), 6, 0.5, generator), strict=True):
            assert torch.equal(ours, theirs)


def steps_of(augment: str) -> dict[str, object]:
    compose = data.transform(RGB32, augment).image
    return {type(step).__name__: step for step in compose.transforms}  # type: ignore[attr-defined]


def test_cap_presets_as_timm_transforms() -> None:
    magnitudes = {"light1": 0, "light2": 10, "medium1": 15, "medium2": 15, "deit_wide": 9, "deit_light": 6, "deit": 9}
    for name, magnitude in magnitudes.items():
        steps = steps_of(name)
        ops, crop = steps["RandAugment"].ops, steps["RandomResizedCropAndInterpolation"]  # type: ignore[attr-defined]
        assert (ops[0].magnitude, steps["RandAugment"].num_layers) == (magnitude, 2)  # type: ignore[attr-defined]
        assert ops[0].magnitude_std == (0.5 if name.startswith("deit") else 0)
        ratio = (0.67, 1.5) if name in ("deit_wide", "deit_light") else (3 / 4, 4 / 3)
        assert (crop.scale, crop.ratio) == ((0.08, 1.0), pytest.approx(ratio, abs=4e-3))  # type: ignore[attr-defined]
        assert ("RandomErasing" in steps) == name.startswith("deit")
        assert "ColorJitter" not in steps  # timm drops it in combination with RandAugment


def test_timm_limits_magnitudes_to_ten() -> None:
    assert TIMM_PRESETS["medium1"] == TIMM_PRESETS["medium2"]
    image = Image.fromarray((np.random.default_rng(0).random((32, 32, 3)) * 255).astype(np.uint8))
    result = {}
    for name in ("light1", "light2", "medium1"):
        result[name] = []
        for operation in steps_of(name)["RandAugment"].ops:  # type: ignore[attr-defined]
            random.seed(1)
            operation.prob = 1.0
            result[name].append(np.asarray(operation(image)).tolist())
    assert result["medium1"] == result["light2"] != result["light1"]


def test_repeated_augmentation_puts_views_into_one_batch(manifest: pa.Table, digits: data.Source) -> None:
    few = manifest.slice(0, 80)
    for augment in ("light", "digits", "none"):
        table = data.open_split(few, digits, "train", data.transform(GRAY8, augment))
        plain = [images for images, _ in data.train_batches(table, 12, 0, 0)]
        once = [images for images, _ in data.train_batches(table, 12, 0, 0, repeats=1)]
        assert all(torch.equal(one, other) for one, other in zip(plain, once, strict=True))
        batches = list(data.train_batches(table, 12, 0, 0, repeats=3))
        assert [len(labels) for _, labels in batches] == [len(images) for images in plain]
        images, labels = batches[0]
        assert torch.equal(labels.view(4, 3), labels.view(4, 3)[:, :1].expand(4, 3))
        views = images.view(4, 3, -1)
        assert torch.equal(views[:, 0], views[:, 1]) == (augment == "none")
