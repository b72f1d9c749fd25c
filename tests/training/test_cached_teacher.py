"""Cached teacher outputs: same result as a teacher in the loop; refused with random augmentation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.model_zoo import images, noisy, random_masks, state, tiny
from tests.support.recipe_models import stand_in, write_images
from vitprune import BadInput, data, find_groups, zero
from vitprune.config.params import Dataset, Params, checked, load_params
from vitprune.config.train_config import DistillConfig, TrainConfig
from vitprune.pipeline import dataset_stage
from vitprune.pipeline.artifacts import History
from vitprune.pipeline.stage_training import train_model
from vitprune.runtime.distributed import ProcessGroup
from vitprune.training.cached_teacher import CachedDistillationTask, cache_teacher, with_teacher_outputs
from vitprune.training.checkpoint_store import CheckpointStore
from vitprune.training.distillation import distillation_task
from vitprune.training.loop import FrozenZeros, train

ROOT = Path(__file__).parents[2]
RECIPE = {"epochs": 3, "batch_size": 6, "lr": 0.01, "clip": 0.5, "ema": 0.5, "drop_path": 0.2}


def table() -> data.ImageTable:
    """20 noise images in float64, as tensors."""
    transform = data.transform({"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}, "none")
    noise = images(tiny("vit"), 20)
    return data.ImageTable(tuple(map(str, range(20))), torch.arange(20) % 7, transform, lambda row: b"", noise)


def taught(kind: str, how: str, more: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]], int]:
    """Weights, records and number of teacher images; the teacher runs per step, in image order or in batch order."""
    student, teacher, seen, rows = noisy(), tiny("vit", 1), [], []
    recipe = TrainConfig.model_validate(RECIPE | more)
    settings = DistillConfig(kind=kind, alpha=2.0, temperature=2.0, cache=how != "each step", train=recipe)
    groups = find_groups(student, ["weight"])
    held = FrozenZeros(groups, random_masks(groups, 0.5))
    zero(student, groups, held.masks)
    task, source, outputs = distillation_task(student, teacher, settings, 0.1, 0), table(), None
    teacher.patch_embed.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    first = np.concatenate(data.batch_rows(source, 6, 5, 0))
    if how == "in order":
        outputs = cache_teacher(task, settings, data.eval_batches(source, 6), ProcessGroup())
    elif how == "as in an epoch":
        outputs = cache_teacher(task, settings, data.train_batches(source, 6, 5, 0), ProcessGroup())[np.argsort(first)]
    task = task if outputs is None else CachedDistillationTask(task)

    def epochs(epoch: int) -> Any:
        result = data.train_batches(source, 6, 5, epoch, 0, recipe.repeats)
        rows_of = data.batch_rows(source, 6, 5, epoch, recipe.repeats)
        return result if outputs is None else with_teacher_outputs(result, outputs, rows_of)

    train(task, epochs, data.batch_count(20, 6), recipe, 5, rows.append, held)
    return state(student), rows, sum(seen)


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_a_cached_teacher_gives_the_same_training(kind: str) -> None:
    """Bit-identical for the same batches; other batches round matrix products differently."""
    plain, same = (taught(kind, how, {"epochs": 1}) for how in ("each step", "as in an epoch"))
    assert all(torch.equal(plain[0][name], same[0][name]) for name in plain[0])
    assert plain[1] == same[1]
    more = {"epochs": 2, "accumulate": 2, "repeats": 2}
    plain, ordered = (taught(kind, how, more) for how in ("each step", "in order"))
    assert max(float((plain[0][name] - ordered[0][name]).abs().max()) for name in plain[0]) < 1e-9
    assert (plain[2], ordered[2]) == (40, 20)


def test_batch_rows_match_the_batches() -> None:
    source = table()
    for part in ((0, 1), (1, 3)):
        rows = data.batch_rows(source, 6, 5, 1, 2, 1, part)
        result = list(data.train_batches(source, 6, 5, 1, 0, 2, 1, part))
        assert len(rows) == len(result) == 3
        for selected, (pictures, labels) in zip(rows, result, strict=True):
            assert torch.equal(source.tensors[selected], pictures)
            assert torch.equal(source.labels[selected], labels)


@pytest.mark.parametrize("key", ["augment", "mixup", "cutmix"])
def test_random_augmentation_is_refused_with_a_cached_teacher(key: str) -> None:
    value = "light" if key == "augment" else 0.5
    settings = {"cache": True, "train": {"epochs": 1, "lr": 0.1, key: value}}
    message = rf"^here: train.{key} changes the images in every epoch; set it to (none|0), or cache to false"
    with pytest.raises(BadInput, match=message):
        checked(settings, DistillConfig, "here")
    assert checked(settings | {"cache": False}, DistillConfig, "here").train is not None


def test_a_stage_runs_its_teacher_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    params: Params = load_params(ROOT / "params.yaml")
    params = params.model_copy(update={"dataset": Dataset(source="folder:images", eval_fraction=0.17)})
    dataset_stage.run(params)
    result = []
    for cache in (False, True):
        student, teacher, seen = stand_in("deit"), stand_in("deit"), []
        recipe = TrainConfig(epochs=2, batch_size=5, lr=0.01, amp=True)
        settings = DistillConfig(temperature=2.0, cache=cache, train=recipe)
        project = params.model_copy(update={"distill": settings})
        with torch.no_grad():
            teacher.head.weight.add_(torch.linspace(-1, 1, teacher.head.weight.numel()).view(7, -1))
        teacher.patch_embed.register_forward_hook(lambda *given, seen=seen: seen.append(len(given[2])))
        task = distillation_task(student, teacher, settings, 0.0, 0)
        history = History(tmp_path / str(cache), "distill")
        train_model(
            task, recipe, project, history, CheckpointStore(tmp_path / f"s{cache}", "key"), cache_outputs=settings.cache
        )
        result.append((sum(seen), history.rows))
    assert [images for images, _ in result] == [20, 10]
    losses = [[row["loss"] for row in rows] for _, rows in result]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)  # in bfloat16
