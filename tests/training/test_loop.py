"""Training loop: reproducibility, frozen zeros, non-finite losses, learning rate, distillation."""

import math

import pytest
import torch
from torch import nn

from tests.support.model_zoo import batches, noisy, random_masks, same_state, state, tiny
from vitprune import BadInput, find_groups, prune, zero
from vitprune.config.train_config import TrainConfig
from vitprune.training.distillation import classification, feature_distillation, logit_distillation
from vitprune.training.loop import FrozenZeros, train

RECIPE = TrainConfig(epochs=2, lr=0.01, weight_decay=0.1)


def fit(
    model: nn.Module, recipe: TrainConfig = RECIPE, seed: int = 0, task: nn.Module | None = None, **more
) -> list[dict]:
    data, rows = batches(model, 3, 6), []
    train(task or classification(model), lambda epoch: data, len(data), recipe, seed, rows.append, **more)
    return rows


def test_the_same_seed_gives_bit_identical_weights() -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.rand(len(runs) + 1)  # earlier draws must not matter
        model = noisy()
        runs.append((fit(model, seed=seed), state(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
    assert any(not torch.equal(runs[0][1][name], runs[2][1][name]) for name in runs[0][1])


def test_training_does_not_change_the_global_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(noisy())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("optimizer", "lr"), [("adamw", 0.01), ("sgd", 0.1), ("momentum", 0.1), ("nadamw", 0.01), ("lion", 0.001)]
)
def test_frozen_zeros_are_exactly_zero_after_every_step(vit: nn.Module, optimizer: str, lr: float) -> None:
    groups = find_groups(vit, ["weight"])
    masks = random_masks(groups, 0.6)
    fit(vit, RECIPE.model_copy(update={"epochs": 1, "lr": lr}))  # non-zero optimizer state and weights before pruning
    zero(vit, groups, masks)
    before = state(vit)
    recipe = RECIPE.model_copy(update={"optimizer": optimizer, "lr": lr})
    seen: list[bool] = []

    def check() -> dict[str, float]:
        seen.append(all(torch.equal(vit.get_parameter(n) != 0, mask) for n, mask in masks.items()))
        return {}

    fit(vit, recipe, frozen_zeros=FrozenZeros(groups, masks), evaluate=check)
    assert seen == [True, True]
    assert all(not torch.equal(vit.get_parameter(name), before[name]) for name in masks)


def test_pruned_weights_become_nonzero_without_frozen_zeros(vit: nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    masks = random_masks(groups, 0.6)
    zero(vit, groups, masks)
    fit(vit)
    assert any(bool(vit.get_parameter(name)[~mask].any()) for name, mask in masks.items())


def test_a_non_finite_loss_stops_before_the_update(vit: nn.Module) -> None:
    data = batches(vit, 3, 6)
    data[1][0][0, 0, 0, 0] = math.nan
    good = [data[0], data[0], data[0]]
    expected = tiny("vit")
    rows: list[dict] = []
    one = TrainConfig(epochs=1, lr=0.01)
    with pytest.raises(BadInput, match=r"^recovery, epoch 1, step 2: the loss is nan; lower the learning rate") as bad:
        train(classification(vit), lambda epoch: data, 3, one, 0, rows.append, name="recovery")
    assert "\n" not in str(bad.value)
    assert rows == []

    def one_good_step(epoch: int):
        yield good[0]

    train(classification(expected), one_good_step, 3, one, 0, rows.append)
    assert same_state(vit, state(expected))
    assert all(bool(parameter.isfinite().all()) for parameter in vit.parameters())


def test_an_unknown_optimizer_is_refused(vit: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^train.optimizer 'adamww': timm cannot create it") as refused:
        fit(vit, RECIPE.model_copy(update={"optimizer": "adamww"}))
    assert "\n" not in str(refused.value)


def test_an_empty_epoch_is_refused(vit: nn.Module) -> None:
    with pytest.raises(BadInput, match="no batch"):
        train(classification(vit), lambda epoch: [], 1, RECIPE, 0, lambda row: None)


def test_the_learning_rate_warms_up_and_decays_to_min_lr(vit: nn.Module) -> None:
    recipe = TrainConfig(epochs=4, lr=0.01, min_lr=0.001, warmup_epochs=1)
    rows = fit(vit, recipe)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    rates = [row["lr"] for row in rows]
    # step 2 of a warm-up over 3 steps: 2/3 of 0.01; then a cosine over 12 steps, seen at steps 5, 8 and 11
    cosine = [0.001 + 0.009 * (1 + math.cos(math.pi * step / 12)) / 2 for step in (5, 8, 11)]
    assert rates == pytest.approx([0.01 * 2 / 3, *cosine])


def test_training_reduces_the_loss(vit: nn.Module) -> None:
    rows = fit(vit, TrainConfig(epochs=15, lr=0.005))
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]
    assert [set(row) for row in rows[:1]] == [{"epoch", "step", "loss", "lr"}]


def test_parameters_without_gradient_do_not_change(vit: nn.Module) -> None:
    vit.blocks[0].requires_grad_(False)
    before = state(vit)
    fit(vit)
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("blocks.0.")


def loss_of(student: nn.Module, teacher: nn.Module, alpha: float, temperature: float) -> float:
    task = logit_distillation(student, teacher, alpha, temperature, 0.0).eval()
    images, labels = batches(student, 1, 6)[0]
    with torch.no_grad():
        return float(task(images, labels)["loss"])


def test_the_distillation_loss_is_cross_entropy_plus_kl_divergence() -> None:
    student, teacher = tiny("vit", 0), tiny("vit", 1)
    images, labels = batches(student, 1, 6)[0]
    with torch.no_grad():
        ours, theirs = student(images), teacher(images)
        entropy = float(-ours.log_softmax(-1)[torch.arange(6), labels].mean())
    for temperature in (1.0, 4.0):
        p, q = (theirs / temperature).softmax(-1), (ours / temperature).softmax(-1)
        divergence = float((p * (p / q).log()).sum() / 6)
        expected = entropy + 0.7 * divergence * temperature**2
        assert loss_of(student, teacher, 0.7, temperature) == pytest.approx(expected, rel=1e-6)
    assert loss_of(student, teacher, 0.0, 1.0) == pytest.approx(entropy, rel=1e-6)
    assert loss_of(student, tiny("vit", 0), 5.0, 1.0) == pytest.approx(entropy, rel=1e-6)


def test_distillation_changes_the_student_only() -> None:
    student, teacher = tiny("vit", 0), tiny("vit", 1)
    before = state(teacher)
    selected = state(student)
    fit(student, task=logit_distillation(student, teacher, 1.0, 2.0, 0.1))
    assert same_state(teacher, before)
    assert not teacher.training
    assert not same_state(student, selected)


def test_a_shrunk_student_approaches_its_teacher() -> None:
    teacher = tiny("vit")
    student = prune(teacher, "channel-magnitude", sparsity={"ffn": 0.5, "residual": 0.25}).model
    rows = fit(student, TrainConfig(epochs=5, lr=0.005), task=logit_distillation(student, teacher, 1.0, 2.0, 0.0))
    assert rows[-1]["loss"] < rows[0]["loss"]


def features_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Pooled features of a PVTv2."""
    return model.stages(model.patch_embed(images)).mean(dim=(-1, -2))


def test_the_feature_distillation_loss_is_cross_entropy_plus_squared_error_of_pooled_features() -> None:
    student, teacher = tiny("pvt", 0), tiny("pvt", 1)
    images, labels = batches(student, 1, 6)[0]
    with torch.no_grad():
        logits = student(images)
        entropy = float(-logits.log_softmax(-1)[torch.arange(6), labels].mean())
        error = float(((features_of(student, images) - features_of(teacher, images)) ** 2).sum() / (6 * 40))
        for alpha in (0.0, 20.0):
            task = feature_distillation(student, teacher, alpha, 0.0, 0).eval()
            assert float(task(images, labels)["loss"]) == pytest.approx(entropy + alpha * error, rel=1e-9)


@pytest.mark.parametrize("name", ["vit", "distilled", "swin", "pvt"])
def test_a_narrower_student_approaches_its_teachers_features(name: str) -> None:
    teacher = tiny(name)
    before = state(teacher)
    student = prune(teacher, "channel-magnitude", sparsity={"ffn": 0.5, "residual": 0.25}).model
    names = student.state_dict().keys()
    task = feature_distillation(student, teacher, 20.0, 0.0, seed=3)
    rows = fit(student, TrainConfig(epochs=5, lr=0.005), task=task)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert student.state_dict().keys() == names  # the mapping layer is not part of the model
    assert same_state(teacher, before)


def test_feature_distillation_is_bit_identical_and_keeps_zeros() -> None:
    result = []
    for number in range(2):
        torch.rand(number + 1)
        teacher = tiny("pvt")
        student = prune(teacher, "channel-magnitude", sparsity={"residual": 0.25}).model
        groups = find_groups(student, ["weight"])
        masks = random_masks(groups, 0.5)
        held = FrozenZeros(groups, masks)
        fit(zero(student, groups, masks), task=feature_distillation(student, teacher, 20.0, 0.0, 0), frozen_zeros=held)
        assert all(torch.equal(student.get_parameter(n) != 0, mask) for n, mask in masks.items())
        result.append(state(student))
    assert all(torch.equal(result[0][name], result[1][name]) for name in result[0])
