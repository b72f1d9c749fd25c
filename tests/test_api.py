"""The public functions: what they return, which settings they take, and what they refuse."""

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import vitprune
from tests.support.model_zoo import PROVEN, SMALL, batches, cost, predict, redrawn, same_state, state, tiny
from vitprune import BadInput, DistillConfig, PruneConfig, Schedule, ScoreConfig, TrainConfig


def test_every_public_name_is_imported_on_first_use() -> None:
    code = (
        "import sys, vitprune\n"
        "assert not {'torch', 'timm', 'pydantic'} & set(sys.modules), 'import vitprune is slow'\n"
        "names = {name for name in dir(vitprune) if not name.startswith('_')}\n"
        "assert set(vitprune.__all__) <= names\n"
        "for name in vitprune.__all__: getattr(vitprune, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'vitprune' has no attribute 'prun'"):
        vitprune.prun  # noqa: B018


@pytest.mark.parametrize(
    ("gradients", "damping"), [(1, 4e-6), (200, 4e-6), (512, 4e-6), (1448, 2e-7), (4096, 1e-8), (100_000, 1e-8)]
)
def test_the_default_damping_depends_on_the_number_of_gradients(gradients: int, damping: float) -> None:
    assert ScoreConfig().damping_for(gradients) == pytest.approx(damping, rel=1e-3)
    assert ScoreConfig(damping=1e-7).damping_for(gradients) == 1e-7


def test_the_default_damping_is_the_one_of_few_gradients(vit: nn.Module) -> None:
    def pruned(**options: float) -> nn.Module:
        config = ScoreConfig(fisher_block_size=16, **options)
        return vitprune.prune(vit, "ovit", sparsity=0.5, calibration=batches(vit), config=config).model

    assert same_state(pruned(), state(pruned(damping=4e-6)))
    assert not same_state(pruned(), state(pruned(damping=1e-8)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreConfig(damp=1e-8), "score.damp: has been renamed to score.damping"),
        (lambda: ScoreConfig(classes=3), "score.classes: has been renamed to score.fisher_directions"),
        (lambda: ScoreConfig(damping=0), "score.damping: Input should be greater than 0, got 0"),
        (lambda: ScoreConfig(dampings=1), "score.dampings: unknown key; did you mean damping?"),
        (lambda: PruneConfig(method="lamp", sparsity=1.5), "prune.sparsity: Input should be less than 1, got 1.5"),
        (
            lambda: PruneConfig(method="upvits", sparsity=0.5, target={"macs": 0.5}),
            "prune.target: give a target or one sparsity, not both; with a target, sparsity is null or per kind",
        ),
        (lambda: PruneConfig(method="lamp", finetune={"epochs": 0, "lr": 1}), "prune.finetune.epochs: Input should"),
        (lambda: Schedule(), "prune.schedule: give a shape"),
        (lambda: DistillConfig(kind="hints"), "distill.kind: Input should be 'logits' or 'features', got 'hints'"),
        (lambda: TrainConfig(lr=1), "TrainConfig.epochs: Field required"),
    ],
)
def test_invalid_settings_in_python_give_a_one_line_error(make: object, message: str) -> None:
    with pytest.raises(BadInput) as error:
        make()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_result_contains_and_prints_sparsity_and_cost(vit: nn.Module) -> None:
    before = state(vit)
    result = vitprune.prune(vit, "channel-magnitude", sparsity={"ffn": 0.5, "attention": 0.25})
    assert same_state(vit, before)
    assert result.sparsity == {"ffn": 0.5, "attention": 0.25}
    assert (result.before.macs, result.after.macs) == (cost(vit, "macs"), cost(result.model, "macs"))
    assert (result.target_miss, result.skipped) == ("", {})
    assert {name: int(mask.sum()) for name, mask in result.masks.items() if name.endswith("mlp")} == {
        "blocks.0.mlp": 96,
        "blocks.1.mlp": 96,
    }
    assert result.seconds > 0
    head, params, _, macs, _, sparsity, _ = str(result).splitlines()
    change = result.after.params / result.before.params - 1
    assert head.split() == ["before", "after", "change"]
    assert params.split()[0] == "parameters"
    assert params.split()[-1] == f"{change:+.1%}"
    assert macs.split()[0] == "MACs"
    assert sparsity == "sparsity: ffn 0.5, attention 0.25"


def test_a_missed_target_is_explained_in_the_result(vit: nn.Module) -> None:
    result = vitprune.prune(vit, "channel-magnitude", kinds=["head"], target={"macs": 0.99})
    assert "units are removed together" in result.target_miss
    assert f"target: {result.target_miss}" in str(result)


@pytest.mark.parametrize("name", PROVEN)
def test_the_default_prunes_the_kinds_that_a_model_has(name: str) -> None:
    model = redrawn(timm.create_model(name, **{"num_classes": 7} | SMALL.get(name, {})), 0)
    proven = {"ffn", "attention"} & set(PROVEN[name].split())
    try:
        result = vitprune.prune(model, "channel-magnitude", sparsity=0.25)
    except BadInput:
        assert not proven
        return
    assert proven <= set(result.sparsity)
    assert (
        {"ffn", "attention"}
        <= set(result.sparsity) | set(result.skipped)
        <= {"ffn", "attention", "head"}
        | {path for module, _ in model.named_modules() for path in (module, f"{module}.heads")}
    )
    assert "head" not in result.sparsity or "attention" in result.skipped
    assert result.after.params < result.before.params
    for kind, reason in result.skipped.items():
        assert f"left out: {kind} ({reason})" in str(result)


def test_a_requested_kind_is_not_left_out() -> None:
    model = redrawn(timm.create_model("eva02_tiny_patch14_224", num_classes=7, **SMALL["eva02_tiny_patch14_224"]), 0)
    assert set(vitprune.prune(model, "channel-magnitude", sparsity=0.5).skipped) == {"attention"}
    for options in ({"sparsity": 0.5, "kinds": ["ffn", "attention"]}, {"sparsity": {"ffn": 0.5, "attention": 0.5}}):
        with pytest.raises(BadInput, match=r"^blocks.0.attn \(EvaAttention\): its forward pass needs the old sizes"):
            vitprune.prune(model, "channel-magnitude", **options)


def zeros(model: nn.Module) -> int:
    return sum(int((parameter == 0).sum()) for parameter in model.parameters())


def test_finetune_keeps_zeros_and_reduces_the_loss(vit: nn.Module) -> None:
    loader = batches(vit, 3, 8)
    pruned = vitprune.prune(vit, "magnitude", sparsity=0.5).model
    removed = zeros(pruned)
    history = vitprune.finetune(pruned, loader, TrainConfig(epochs=8, lr=0.005))
    assert [record["epoch"] for record in history] == list(range(1, 9))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert zeros(pruned) == removed == 27648
    vitprune.finetune(pruned, loader, TrainConfig(epochs=1, lr=0.005), keep_zeros=False)
    assert zeros(pruned) < removed


def test_finetune_with_a_teacher_approaches_it(vit: nn.Module) -> None:
    loader = batches(vit, 3, 8)
    student = vitprune.prune(vit, "channel-magnitude", sparsity={"ffn": 0.5}).model
    before, dense = state(vit), predict(vit, loader[0][0])

    def distance() -> float:
        return float((predict(student, loader[0][0]).softmax(-1) - dense.softmax(-1)).abs().sum())

    far = distance()
    config = DistillConfig(alpha=50.0, temperature=1.0)
    vitprune.finetune(student, loader, TrainConfig(epochs=10, lr=0.003), teacher=vit, distillation=config)
    assert distance() < 0.5 * far
    assert same_state(vit, before)


def test_finetune_refuses_one_pass_iterators(vit: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^loader: has no length; give a list or a DataLoader"):
        vitprune.finetune(vit, iter(batches(vit)), TrainConfig(epochs=1, lr=0.001))


def test_gradual_prune_alternates_pruning_and_training(vit: nn.Module) -> None:
    before, loader = state(vit), batches(vit, 3, 8)
    recipe = TrainConfig(epochs=2, lr=0.005)
    config = PruneConfig(method="magnitude", sparsity=0.75, cycles=3, schedule="linear", finetune=recipe)
    result = vitprune.gradual_prune(vit, config, loader)
    again = vitprune.gradual_prune(vit, config, loader)
    one_shot = vitprune.prune(vit, "magnitude", sparsity=0.75)
    assert same_state(vit, before)
    assert [result.model.training, vitprune.gradual_prune(vit.train(), config, loader).model.training] == [False, True]
    assert same_state(result.model, state(again.model))
    assert result.sparsity == {"weight": 0.75}
    assert zeros(result.model) == zeros(one_shot.model) == 41472
    assert any(bool((result.masks[name] != one_shot.masks[name]).any()) for name in result.masks)

    def loss(model: nn.Module) -> float:
        return sum(float(nn.functional.cross_entropy(predict(model, images), labels)) for images, labels in loader)

    assert loss(result.model) < loss(one_shot.model)


def test_gradual_prune_needs_a_training_recipe(vit: nn.Module) -> None:
    config = PruneConfig(method="magnitude", sparsity=0.5, cycles=2)
    with pytest.raises(BadInput, match=r"^prune.finetune: gradual_prune trains after every cycle; give a TrainConfig"):
        vitprune.gradual_prune(vit, config, batches(vit))


def test_evaluate_returns_accuracy_and_cost() -> None:
    model = tiny("vit")
    loader = batches(model, 3, 8)
    right = sum(int((predict(model, images).argmax(1) == labels).sum()) for images, labels in loader)
    result = vitprune.evaluate(model, loader)
    assert result["top1"] == pytest.approx(100 * right / 24)
    assert result["top5"] >= result["top1"]
    assert (result["params"], result["macs"]) == (cost(model, "params"), cost(model, "macs"))
    with pytest.raises(BadInput):
        vitprune.evaluate(model, [])


def test_calibration_may_be_a_list_a_tuple_or_a_data_loader(vit: nn.Module) -> None:
    data = batches(vit, 4, 4)
    full = torch.utils.data.TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    loader = torch.utils.data.DataLoader(full, batch_size=4)
    results = [
        vitprune.prune(vit, "channel-taylor", sparsity=0.5, calibration=given).model
        for given in (data, tuple(data), loader)
    ]
    assert all(same_state(result, state(results[0])) for result in results[1:])
