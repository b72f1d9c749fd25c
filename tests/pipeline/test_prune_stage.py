"""Gradual pruning in the stage: cumulative zeros, optimizer state of pruned weights, one model per cycle."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import vitprune
from tests.support.model_zoo import batches, random_masks, state, tiny
from tests.support.plans import plan_for
from vitprune import METHODS, find_groups, models, zero
from vitprune.config.params import load_params
from vitprune.config.prune_config import Schedule
from vitprune.config.train_config import TrainConfig
from vitprune.criteria import Importance, ScoringContext
from vitprune.criteria import magnitude as by_weights
from vitprune.evaluation.accuracy import accuracy
from vitprune.pipeline import stages
from vitprune.pipeline.project_data import open_images
from vitprune.pruning.methods import Method
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.runtime.files import sha256
from vitprune.training import optimizers as optimizing
from vitprune.training.distillation import classification
from vitprune.training.loop import FrozenZeros, ScheduleSpan, train

ROOT = Path(__file__).parents[2]
STEPS = [0.5, 0.6, 0.75, 0.9]


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record every optimizer that training creates."""
    made: list[Any] = []
    create: Callable[..., Any] = optimizing.create_optimizer_v2

    def watched(model: nn.Module, name: str, **more: float) -> Any:
        made.append(create(model, name, **more))
        return made[-1]

    monkeypatch.setattr(optimizing, "create_optimizer_v2", watched)
    return made


def fit(
    model: nn.Module, recipe: TrainConfig, held: FrozenZeros | None = None, span: ScheduleSpan | None = None
) -> list[dict]:
    data, rows = batches(model, 3, 6), []
    train(classification(model), lambda epoch: data, len(data), recipe, 0, rows.append, held, span=span)
    return rows


def halved(model: nn.Module) -> FrozenZeros:
    groups = find_groups(model, ["weight"])
    held = FrozenZeros(groups, random_masks(groups, 0.6))
    zero(model, groups, held.masks)
    return held


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "nadamw", "lamb", "lion"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_optimizer_moments_of_kept_zeros_are_zero(
    vit: nn.Module, optimizers: list[Any], optimizer: str, ema: float
) -> None:
    held = halved(vit)
    fit(vit, TrainConfig(epochs=2, lr=0.002, weight_decay=0.1, optimizer=optimizer, ema=ema), held)
    remembered = 0
    for group in held.groups:
        parameter, mask = vit.get_parameter(group.name), held.masks[group.name]
        assert torch.equal(parameter != 0, mask)
        for value in optimizers[0].state[parameter].values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                remembered += 1
                assert not value[~mask].any()
                assert value[mask].all()
    assert remembered >= len(held.groups)


@pytest.mark.parametrize("clip", [0.05, None])
def test_gradients_of_kept_zeros_do_not_count_in_clipping(clip: float | None) -> None:
    def through(how: str) -> dict[str, Tensor]:
        model = tiny("vit")
        held = halved(model)
        if how == "hooks":  # the reference: gradients masked in the backward pass
            for group in held.groups:
                mask = held.masks[group.name].double()
                model.get_parameter(group.name).register_hook(lambda gradient, mask=mask: gradient * mask)
        fit(model, TrainConfig(epochs=1, lr=0.1, optimizer="sgd", weight_decay=0.1, clip=clip), held)
        return state(model)

    plain, hooked = through("plain"), through("hooks")
    assert all(torch.equal(plain[name], hooked[name]) for name in plain)


def test_the_learning_rate_decays_over_the_run_or_in_every_cycle(vit: nn.Module) -> None:
    recipe = TrainConfig(epochs=2, lr=0.01, min_lr=0.001, decay="linear")
    anew = [fit(vit, recipe)[1]["lr"] for _ in range(2)]
    assert anew == pytest.approx([0.001, 0.001])
    once = [row["lr"] for before in (0, 6) for row in fit(vit, recipe, span=ScheduleSpan(before, 12))]
    assert once == pytest.approx([0.01 - 0.009 * step / 11 for step in (2, 5, 8, 11)])


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_kept_optimizer_state_equals_uninterrupted_training(optimizer: str) -> None:
    """Two trainings of one epoch with equal learning rates equal one training of two epochs."""
    recipe = TrainConfig(epochs=1, lr=0.01, decay="linear", decay_over="run", optimizer=optimizer)
    result = []
    for parts in ([2], [1, 1]):
        model, memory, before = tiny("vit"), {}, 0
        held = halved(model)
        for epochs in parts:
            fit(model, recipe.model_copy(update={"epochs": epochs}), held, ScheduleSpan(before, 6, memory))
            before += 3 * epochs
        result.append(state(model))
    assert all(torch.equal(result[0][name], result[1][name]) for name in result[0])


def test_optimizer_state_of_newly_pruned_weights_is_zeroed(vit: nn.Module, optimizers: list[Any]) -> None:
    memory: dict[str, dict[str, Any]] = {}
    recipe = TrainConfig(epochs=1, lr=0.01)
    fit(vit, recipe, span=ScheduleSpan(0, 3, memory))
    assert set(memory) == set(dict(vit.named_parameters()))
    held = halved(vit)
    fit(vit, recipe, held, ScheduleSpan(0, 3, memory))
    for group in held.groups:
        mask, known = held.masks[group.name], memory[group.name]
        assert float(known["step"]) == 6
        assert not known["exp_avg_sq"][~mask].any()
        assert known["exp_avg_sq"][mask].all()


def test_optimizer_state_of_a_resized_parameter_restarts() -> None:
    model, memory = tiny("vit"), {}
    fit(model, TrainConfig(epochs=1, lr=0.01), span=ScheduleSpan(0, 3, memory))
    cut = vitprune.prune(model, "channel-magnitude", sparsity={"ffn": 0.5}).model
    fit(cut, TrainConfig(epochs=1, lr=0.01), span=ScheduleSpan(0, 3, memory))
    steps = {name: float(known["step"]) for name, known in memory.items()}
    assert steps["blocks.0.mlp.fc1.weight"] == 3
    assert steps["blocks.0.attn.qkv.weight"] == 6


def test_eps_is_passed_to_the_optimizer(vit: nn.Module, optimizers: list[Any]) -> None:
    fit(vit, TrainConfig(epochs=1, lr=0.01, eps=1e-5))
    assert {group["eps"] for group in optimizers[0].param_groups} == {1e-5}


def compensating(model: nn.Module, groups: list, data: object, setting: ScoringContext) -> Importance:
    """Magnitude with an update that adds the removed sum of each row to all its weights, pruned ones included."""

    def update(masks: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, mask in masks.items():
            weight = model.get_parameter(name).detach()
            result[name] = weight + (weight * ~mask).mean(1, keepdim=True) + 1e-3
        return result

    return Importance(by_weights.magnitude(model, groups, data, setting).scores, update)


@pytest.mark.parametrize("method", ["magnitude", "lamp", "taylor", "compensating"])
@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_zeros_are_cumulative_over_four_cycles_with_and_without_update(
    vit: nn.Module, monkeypatch: pytest.MonkeyPatch, method: str, ema: float
) -> None:
    row = Method(compensating, {"weight": "global"}, ("weight",), False, "for this test")
    monkeypatch.setitem(METHODS, "compensating", row)
    plan = plan_for(method, 0.9, cycles=4, schedule=Schedule(steps=STEPS))
    recipe, zeros, before = TrainConfig(epochs=1, lr=0.01, weight_decay=0.1, ema=ema), [], {}
    for cycle in prune_cycles(vit, plan, batches(vit, 2, 8)):
        fit(vit, recipe, FrozenZeros(cycle.zeroed, cycle.masks))
        now = {group.name: vit.get_parameter(group.name).detach() == 0 for group in cycle.groups}
        assert all(torch.equal(removed, ~cycle.masks[name]) for name, removed in now.items())
        assert all(bool(now[name][removed].all()) for name, removed in before.items())
        before = now
        zeros.append(sum(int(removed.sum()) for removed in now.values()))
    assert zeros == [int(share * 55296 + 0.5) for share in STEPS]


def test_every_cycle_saves_its_fine_tuned_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"]["args"] |= {"depth": 1, "embed_dim": 24, "num_heads": 3, "patch_size": 16}
    short = {"epochs": 1, "batch_size": 64, "lr": 0.003, "min_lr": 0.0003, "augment": "digits"}
    params["dense"]["train"], params["calibrate"]["size"] = short, 50
    recover = short | {
        "decay": "linear",
        "decay_over": "run",
        "optimizer_state": "keep",
        "mixup": 0.2,
        "cutmix": 0.2,
        "repeats": 2,
    }
    steps = {0: 0.3, 2: 0.5, 3: 0.7}
    params["prune"] = {
        "method": "lamp",
        "sparsity": 0.7,
        "cycles": 3,
        "schedule": {"steps": steps},
        "finetune": recover,
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    for stage in ("dataset", "dense", "calibrate", "score", "mask", "prune"):
        stages.run(stage, tmp_path)
    history = [json.loads(line) for line in (tmp_path / "out/prune/history.jsonl").read_text().splitlines()]
    assert [(row["cycle"], row["epoch"]) for row in history] == [(1, 1), (1, 2), (2, 1), (3, 1)]
    last = [23 * row for row in (1, 2, 3, 4)]  # 1438 images of digits in batches of 64
    assert [row["lr"] for row in history] == pytest.approx([0.003 - 0.0027 * (end - 1) / 91 for end in last])
    table, before = None, {}
    for cycle, share in enumerate(steps.values(), 1):
        folder = tmp_path / f"out/cycles/{cycle:02d}"
        facts, model = json.loads((folder / "metrics.json").read_text()), models.load(folder)
        table = table or open_images("eval", model, load_params(Path("params.yaml")))
        result = accuracy(model, vitprune.data.eval_batches(table, 256))[0]["top1"]
        assert (result, sha256(folder / models.WEIGHTS)) == (facts["top1_after"], facts["sha256"])
        masks = load_file(folder / "masks.safetensors")
        assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())
        units = sum(mask.numel() for mask in masks.values())
        assert sum(int((~mask).sum()) for mask in masks.values()) == int(share * units + 0.5)
        assert all(not bool((masks[name] & ~mask).any()) for name, mask in before.items())
        before = masks
    assert sha256(tmp_path / "out/prune/model.safetensors") == facts["sha256"]
