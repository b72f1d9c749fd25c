"""Recipes: values of the papers, and two training steps of each on a small model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.model_zoo import random_masks, state
from tests.support.recipe_models import stand_in, write_images
from vitprune import find_groups, prune, zero
from vitprune.config.params import Dataset, Params, load_params
from vitprune.config.train_config import TrainConfig
from vitprune.pipeline import dataset_stage
from vitprune.pipeline.artifacts import History
from vitprune.pipeline.stage_training import RecoverySegment, train_model
from vitprune.pruning.plan import plan_of
from vitprune.training.checkpoint_store import CheckpointStore
from vitprune.training.distillation import classification, distillation_task
from vitprune.training.loop import FrozenZeros

RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))}
STAGES = ("dense", "finetune", "distill")

# augment: mixup, cutmix, mix_prob, drop_path, weight_decay, clip, eps, repeats (CAP's presets)
PRESETS = {
    "light1": (0.0, 0.0, 1.0, 0.0, 0.03, 1.0, 1e-6, 1),
    "light2": (0.2, 0.2, 1.0, 0.0, 0.03, 1.0, 1e-6, 1),
    "medium1": (0.2, 0.2, 1.0, 0.0, 0.03, 1.0, 1e-6, 1),
    "medium2": (0.5, 0.5, 1.0, 0.0, 0.03, 1.0, 1e-6, 1),
    "deit_wide": (0.8, 1.0, 1.0, 0.1, 0.05, None, 1e-8, 3),
    "deit_light": (0.8, 1.0, 0.2, 0.1, 0.005, None, 1e-8, 1),
}
LINE, COSINE = "linear", "cosine"
# epochs of the run, first and last rate, decay, per cycle or once; sparsity; Fisher block and damping
CAP: dict[str, tuple[Any, ...]] = {
    "ovit_deit_tiny_gradual": (280, 5e-4, 1e-5, LINE, "cycle", 0.9, 192, 1e-8),
    "ovit_deit_tiny_light2": (280, 5e-4, 1e-5, LINE, "cycle", 0.9, 192, 1e-8),
    "ovit_deit_tiny_medium1": (280, 5e-4, 1e-5, LINE, "cycle", 0.9, 192, 1e-8),
    "ovit_deit_tiny_medium2": (280, 5e-4, 1e-5, LINE, "cycle", 0.9, 192, 1e-8),
    "ovit_deit_small_gradual": (280, 5e-4, 1e-5, LINE, "cycle", 0.9, 192, 1e-8),
    "ovit_deit_small_deit_light": (280, 5e-4, 1e-5, LINE, "cycle", 0.9, 192, 1e-8),
    "ovit_deit_tiny_gradual_cosine": (100, 5e-4, 1e-5, COSINE, "run", 0.9, 192, 1e-8),
    "ovit_deit_tiny_gradual_cyclic": (100, 5e-4, 1e-5, LINE, "cycle", 0.9, 192, 1e-8),
    "ovit_deit_tiny_gradual_120": (120, 4e-4, 1e-5, LINE, "cycle", 0.75, 192, 1e-8),
    "ovit_deit_tiny_cubic": (300, 5e-4, 0.0, LINE, "cycle", 0.75, 192, 1e-8),
    "ovit_deit_tiny_finetune": (20, 1e-4, 1e-5, LINE, "cycle", 0.5, 192, 1e-8),
    "ovit_deit_tiny_two_four": (50, 5e-4, 1e-5, LINE, "cycle", 0.5, 192, 1e-8),
    "ovit_xcit_small_finetune": (20, 1e-4, 1e-5, LINE, "cycle", 0.5, 192, 1e-8),
    "ovit_convnext_small_finetune": (20, 1e-4, 1e-5, LINE, "cycle", 0.5, 192, 1e-8),
    "ovit_resnet50d_finetune": (20, 1e-4, 1e-5, LINE, "cycle", 0.75, 256, 1e-7),
    "ovit_resnet50d_gradual": (300, 0.2, 1e-3, LINE, "cycle", 0.9, 256, 1e-8),
    "ovit_efficientnetv2_s_gradual": (300, 0.2, 1e-3, LINE, "cycle", 0.9, 16, 1e-8),
    "fastcap_deit_tiny_gradual": (10, 5e-4, 1e-5, COSINE, "run", 0.9, 192, 1e-8),
    "ovit_deit_tiny_longer": (100, 1e-4, 1e-5, COSINE, "cycle", 0.0, 192, 1e-8),
    "ovit_resnet50d_longer": (100, 0.1, 1e-3, COSINE, "cycle", 0.0, 192, 1e-8),
}
UP = {"epochs": 200, "batch_size": 256, "optimizer": "adamw", "lr": 1e-3, "min_lr": 0.0, "weight_decay": 1e-3}
UP |= {"clip": None, "warmup_epochs": 2, "cutmix": 0.5, "mixup": 0.0, "drop_path": 0.1, "ema": 0.999}
DIMAP = {"epochs": 30, "optimizer": "adamw", "lr": 2e-5, "min_lr": 2e-7, "weight_decay": 1e-8, "warmup_epochs": 15}
PAPERS = {"up_deit_tiny": UP, "up_deit_small": UP, "up_pvt_v2_b0": UP, "dimap_swin_tiny": DIMAP}


def section(params: Params, stage: str) -> TrainConfig | None:
    result = {"dense": params.dense.train, "finetune": params.prune.finetune, "distill": params.distill.train}
    return result[stage]


TRAINED = [(name, stage) for name, path in RECIPES.items() for stage in STAGES if section(load_params(path), stage)]
# the rate of the second of two steps, if it is neither the last one (linear decay) nor half-way (cosine)
SECOND = dict.fromkeys(("up_deit_tiny", "up_deit_small", "up_pvt_v2_b0"), 1e-3 / 4)  # a warm-up over 2 x 2 steps
SECOND |= {"dimap_swin_tiny": 2e-5 / 30, "transfer_deit_tiny_folder": 1e-4 / 2}
SECOND |= {
    "ovit_deit_tiny_gradual_cosine": 1e-5 + 4.9e-4 * (1 + math.cos(math.pi / 200)) / 2,
    "fastcap_deit_tiny_gradual": 1e-5 + 4.9e-4 * (1 + math.cos(math.pi / 20)) / 2,
}


@pytest.mark.parametrize("name", CAP)
def test_cap_recipes_have_the_values_of_the_papers_tables(name: str) -> None:
    params = load_params(RECIPES[name])
    recipe = section(params, "finetune") or section(params, "dense")
    assert recipe is not None
    plan = plan_of(params)
    epochs = sum(plan.epochs(recipe.epochs))
    run = (epochs, recipe.lr, recipe.min_lr, recipe.decay, recipe.decay_over)
    assert (*run, params.prune.sparsity, params.score.fisher_block_size, params.score.damping_for(4096)) == CAP[name]
    assert (recipe.smoothing, recipe.batch_size, recipe.warmup_epochs, recipe.ema) == (0.1, 1024, 0.0, 0.0)
    mixing = (recipe.mixup, recipe.cutmix, recipe.mix_prob, recipe.drop_path)
    result = (*mixing, recipe.weight_decay, recipe.clip, recipe.eps, recipe.repeats)
    expected = PRESETS[recipe.augment]
    if recipe.optimizer == "momentum":  # the presets use AdamW
        expected = (*expected[:4], 1e-4, expected[5], None, expected[7])
    assert result == expected
    assert params.distill.train is None  # trained without a teacher


def test_every_preset_has_a_recipe() -> None:
    trained = [section(load_params(RECIPES[name]), stage) for name, stage in TRAINED]
    assert set(PRESETS) <= {recipe.augment for recipe in trained if recipe is not None}


@pytest.mark.parametrize("name", PAPERS)
def test_other_recipes_have_the_values_of_their_papers(name: str) -> None:
    params = load_params(RECIPES[name])
    recipe = section(params, "distill") or section(params, "finetune")
    assert recipe is not None
    assert {key: getattr(recipe, key) for key in PAPERS[name]} == PAPERS[name]


@pytest.mark.parametrize(("name", "stage"), TRAINED)
def test_a_recipe_trains_two_steps(name: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(RECIPES[name])
    recipe = section(params, stage)
    assert recipe is not None
    write_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    params = params.model_copy(update={"dataset": Dataset(source="folder:images", eval_fraction=0.17)})
    dataset_stage.run(params)

    dense, held = stand_in(params.model.name), None
    if stage == "distill":
        model = prune(dense, "channel-magnitude", sparsity={"ffn": 0.5, "residual": 0.25}).model
        task = distillation_task(model, dense, params.distill, recipe.smoothing, params.seed)
    else:
        model, task = dense, classification(dense, recipe.smoothing)
        groups = find_groups(model, ["weight"])
        held = FrozenZeros(groups, random_masks(groups, 0.5))
        zero(model, groups, held.masks)
    before, history = state(model), History(tmp_path / "out", stage)
    short = recipe.model_copy(update={"epochs": 1, "batch_size": 5})  # of 10 images
    part = RecoverySegment(1, plan_of(params).epochs(recipe.epochs), {}) if stage == "finetune" else None
    train_model(task, short, params, history, CheckpointStore(tmp_path / "shelf", "key"), held, None, part)

    (row,) = history.rows
    middle = (recipe.lr + recipe.min_lr) / 2
    expected = SECOND.get(name, recipe.min_lr if recipe.decay == "linear" else middle)
    assert (row["epoch"], row["step"]) == (1, 2)
    assert row["lr"] == pytest.approx(expected, rel=1e-9)
    assert math.isfinite(row["loss"])
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    for key, mask in held.masks.items() if held is not None else ():
        assert torch.equal(model.get_parameter(key) != 0, mask)
