"""CutMix, distillation with mixed images, stochastic depth, EMA and bfloat16 in training."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch import nn

from tests.support.model_zoo import batches, images, random_masks, state, tiny
from vitprune import BadInput, find_groups, zero
from vitprune.config.params import load_params
from vitprune.config.train_config import TrainConfig
from vitprune.data import cutmix
from vitprune.pruning.plan import plan_of
from vitprune.training.distillation import classification, logit_distillation
from vitprune.training.loop import FrozenZeros, train
from vitprune.training.lr_schedule import learning_rate
from vitprune.training.stochastic_depth import stochastic_depth

RECIPE = TrainConfig(epochs=2, lr=0.01)


def fit(
    model: nn.Module, more: dict, task: nn.Module | None = None, held: FrozenZeros | None = None, seed: int = 0
) -> list:
    noise = [(x.to(next(model.parameters()).dtype), labels) for x, labels in batches(model, 3, 6)]
    rows: list[dict] = []
    recipe = RECIPE.model_copy(update=more)
    train(task or classification(model), lambda epoch: noise, 3, recipe, seed, rows.append, held)
    return rows


def test_cutmix_label_weights_are_pixel_counts_of_the_box() -> None:
    generator, kept = np.random.default_rng(0), []
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 24, 16).double()  # constant images whose value is their label
    for _ in range(200):
        mixed, target = cutmix(x, torch.arange(6), 7, 0.5, generator)
        for image, shares in zip(mixed, target, strict=True):
            counted = torch.bincount(image.long().flatten(), minlength=7).double() / image.numel()
            torch.testing.assert_close(shares, counted)
        changed = (mixed != x).any(1).any(0)  # (H, W)
        assert int(changed.sum()) == int(changed.any(1).sum() * changed.any(0).sum())  # a box
        kept.append(1 - float(changed.double().mean()))
    assert 0.5 <= min(kept) < 0.6
    assert max(kept) > 0.9
    assert torch.equal(x[:, 0, 0, 0], torch.arange(6.0).double())


def test_training_with_cutmix_uses_the_loss_on_mixed_labels(vit: nn.Module) -> None:
    noise = batches(vit, 1, 6)
    x, target = cutmix(*noise[0], 7, 0.5, np.random.default_rng(3))
    with torch.no_grad():
        expected = float(-(target * vit(x).log_softmax(-1)).sum(1).mean())
    rows: list[dict] = []
    train(classification(vit), lambda epoch: noise, 1, TrainConfig(epochs=1, lr=0.01, cutmix=0.5), 3, rows.append)
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-9)


def test_the_teacher_gets_the_mixed_images() -> None:
    student, teacher, seen = tiny("vit", 0), tiny("vit", 1), []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fit(student, {"cutmix": 0.5, "epochs": 1}, logit_distillation(student, teacher, 1.0, 1.0, 0.0))
    generator = np.random.default_rng(0)
    for given, (x, labels) in zip(seen, batches(student, 3, 6), strict=True):
        torch.testing.assert_close(given, cutmix(x, labels, 7, 0.5, generator)[0])


def test_stochastic_depth_rates_are_linear_over_blocks_and_restored() -> None:
    model = tiny("odd")
    before, x = copy.deepcopy(model), images(model)
    with stochastic_depth(model, 0.4):
        result = [(b.drop_path1.drop_prob, b.drop_path2.drop_prob) for b in model.blocks]
        assert result == [(0.0, 0.0), (0.2, 0.2), (0.4, 0.4)]
        model.train()
        torch.manual_seed(0)
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), before(x))
    assert not any(isinstance(module, DropPath) for module in model.modules())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    with pytest.raises(BadInput, match=r"^train.drop_path 0.1: Linear has no drop-path modules"):
        stochastic_depth(nn.Linear(2, 2), 0.1).__enter__()


def test_ema_averages_the_weights_of_all_steps(vit: nn.Module) -> None:
    name, noise, seen, plain = "blocks.0.mlp.fc1.weight", batches(vit, 3, 6), [], tiny("vit")

    def watched(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in noise:
            seen.append(plain.get_parameter(name).detach().clone())
            yield batch

    train(classification(plain), watched, 3, RECIPE, 0, lambda row: None)
    seen.append(plain.get_parameter(name).detach())
    average = seen[0]
    for step, weight in enumerate(seen[1:]):
        decay = min(0.6, 1 - (1 + step) ** (-2 / 3))  # the decay increases: 0, 0.37, 0.52, 0.6, ...
        average = decay * average + (1 - decay) * weight
    fit(vit, {"ema": 0.6})
    torch.testing.assert_close(vit.get_parameter(name).detach(), average)
    assert not torch.equal(average, seen[-1])


def test_ema_keeps_frozen_zeros(vit: nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    masks = random_masks(groups, 0.6)
    zero(vit, groups, masks)
    fit(vit, {"ema": 0.9, "cutmix": 1.0, "drop_path": 0.2}, held=FrozenZeros(groups, masks))
    assert all(torch.equal(vit.get_parameter(group.name) != 0, masks[group.name]) for group in groups)


def test_all_options_together_are_bit_identical_for_a_seed() -> None:
    more = {"ema": 0.9, "cutmix": 1.0, "drop_path": 0.2, "amp": True}
    result = []
    for seed in (1, 1, 2):
        model = tiny("vit").float()
        fit(model, more, seed=seed)
        result.append(state(model))
    assert all(torch.equal(result[0][name], result[1][name]) for name in result[0])
    assert any(not torch.equal(result[0][name], result[2][name]) for name in result[0])


def test_bfloat16_keeps_the_type_of_the_weights() -> None:
    model, exact, seen = tiny("vit").float(), tiny("vit").float(), []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    rows, expected = fit(model, {"amp": True, "epochs": 1}), fit(exact, {"epochs": 1})
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.02)
    assert rows[0]["loss"] != expected[0]["loss"]


def test_dimap_fine_tuning_matches_its_paper() -> None:
    params = load_params(Path(__file__).parents[2] / "recipes/dimap_swin_tiny.yaml")
    plan, recover = plan_of(params), params.prune.finetune
    assert recover is not None
    assert (plan.config.method, plan.scope_of("weight"), plan.targets()) == ("dimap", "module", [{"weight": 0.55}])
    assert (recover.epochs, recover.warmup_epochs, recover.optimizer) == (30, 15, "adamw")
    assert (recover.lr, recover.min_lr, recover.weight_decay) == (2e-5, 2e-7, 1e-8)
    assert params.distill.train is None
    rates = [learning_rate(step, 30, recover.lr, recover.min_lr, 15) for step in (0, 1, 14, 15, 30)]
    assert rates == pytest.approx([0, 2e-5 / 15, 2e-5 * 14 / 15, (2e-5 + 2e-7) / 2, 2e-7])  # the decay starts at step 0

    model = tiny("swin").float()
    groups = find_groups(model, ["weight"])
    masks = random_masks(groups, 0.55)
    zero(model, groups, masks)
    before = state(model)
    fit(model, recover.model_dump() | {"epochs": 2, "warmup_epochs": 1}, held=FrozenZeros(groups, masks))
    for group in groups:
        assert torch.equal(model.get_parameter(group.name) != 0, masks[group.name])
        assert not torch.equal(model.get_parameter(group.name), before[group.name])
