"""Training options: layer decay, gradient checkpointing, compile, channels_last, patience."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.model_zoo import batches, noisy, random_masks, same_state, state, tiny
from tests.support.subprocesses import ONE_THREAD
from vitprune import BadInput, find_groups, prune, zero
from vitprune.config.train_config import TrainConfig
from vitprune.training.distillation import classification, feature_distillation
from vitprune.training.loop import FrozenZeros, train

ROOT = Path(__file__).parents[2]
PLAIN = {"epochs": 1, "lr": 0.1, "optimizer": "sgd", "weight_decay": 0.0, "clip": None}


def fit(
    model: nn.Module,
    more: dict[str, Any],
    task: Any = None,
    held: FrozenZeros | None = None,
    number: int = 3,
    **given: Any,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    recipe = TrainConfig.model_validate({"epochs": 2, "lr": 0.01} | more)
    noise = batches(model, number, 6)
    train(task or classification(model), lambda epoch: noise, number, recipe, 0, rows.append, held, **given)
    return rows


def moved(task: Callable[[nn.Module], Any], more: dict[str, Any]) -> tuple[dict[str, Tensor], nn.Module]:
    """Change of each trained parameter after one step of gradient descent."""
    model = tiny("vit")
    made = task(model)
    before = state(made.trainable_module)
    fit(model, PLAIN | more, made, number=1)
    return {name: tensor - before[name] for name, tensor in state(made.trainable_module).items()}, model


def test_layer_decay_scales_the_rate_of_every_layer() -> None:
    full, shared = (moved(classification, more)[0] for more in ({}, {"layer_decay": 0.5}))
    shares = {
        "cls_token": 1 / 8,
        "pos_embed": 1 / 8,
        "patch_embed": 1 / 8,
        "norm": 1 / 2,
        "head": 1.0,
    }  # a norm belongs to the previous block
    for name, change in full.items():
        first, number = name.split(".")[0], name.split(".")[1] if "." in name else ""
        share = shares.get(first) or {"0": 1 / 4, "1": 1 / 2}[number]  # of 2 blocks
        torch.testing.assert_close(shared[name], share * change, rtol=1e-9, atol=1e-14)
        assert name in ("pos_embed", "cls_token") or bool(change.any())


def test_additional_modules_have_the_full_rate() -> None:
    def task(model: nn.Module) -> Any:
        torch.manual_seed(0)
        teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1,
                                    num_heads=3, num_classes=7).double()  # fmt: skip
        return feature_distillation(model, teacher, 1.0, 0.0, 0)

    full, shared = (moved(task, more)[0] for more in ({}, {"layer_decay": 0.5}))
    (beside,) = [name for name in full if name.endswith("projection.weight")]
    assert bool(full[beside].any())
    torch.testing.assert_close(shared[beside], full[beside], rtol=1e-9, atol=1e-14)
    inner = "student.blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(shared[inner], full[inner] / 4, rtol=1e-9, atol=1e-14)


def test_layer_rates_follow_the_schedule(vit: nn.Module) -> None:
    rows = fit(vit, PLAIN | {"epochs": 2, "layer_decay": 0.5, "min_lr": 0.02, "decay": "linear"}, number=1)
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.02])


@pytest.mark.parametrize("name", ["vit", "swin", "pvt"])
def test_gradient_checkpointing_is_bit_identical(name: str) -> None:
    result = []
    for again in (False, True):
        model = noisy() if name == "vit" else tiny(name)
        kinds = {"vit": "Block", "swin": "SwinTransformerBlock", "pvt": "PyramidVisionTransformerStage"}
        calls: list[bool] = []
        first = next(module for module in model.modules() if type(module).__name__ == kinds[name])
        inner = first.mlp.fc1 if name != "pvt" else first.blocks[0].mlp.fc1
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(True))
        fit(model, {"checkpointing": again, "drop_path": 0.2 if name == "vit" else 0.0})
        result.append((state(model), len(calls)))
        model.train()
        model(batches(model, 1, 2)[0][0]).sum().backward()
        assert len(calls) == result[-1][1] + 1  # not recomputed after the training
    assert all(torch.equal(result[0][0][key], result[1][0][key]) for key in result[0][0])
    assert (result[0][1], result[1][1]) == (6, 12)


def test_gradient_checkpointing_is_refused_for_models_without_it() -> None:
    class Plain(nn.Linear):
        num_classes = 7

    message = r"^train.checkpointing: not supported by Plain; set it to false$"
    model = Plain(4, 7)
    noise = [(torch.rand(3, 4), torch.arange(3))]
    with pytest.raises(BadInput, match=message):
        train(
            classification(model), lambda epoch: noise, 1, TrainConfig(epochs=1, lr=0.1, checkpointing=True), 0, print
        )


@pytest.mark.parametrize("name", ["vit", "swin", "pvt"])
def test_channels_last_changes_only_rounding(name: str) -> None:
    result = []
    for last in (False, True):
        model, seen = tiny(name), []
        convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        convolution.register_forward_pre_hook(
            lambda module, given, seen=seen: seen.append(
                [x.is_contiguous(memory_format=torch.channels_last) for x in (given[0], module.weight)]
            )
        )
        fit(model, {"channels_last": last, "ema": 0.5})
        result.append(state(model))
        assert seen[0] == [last, last]
        assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert max(float((result[0][key] - result[1][key]).abs().max()) for key in result[0]) < 1e-9


WORKER = """
import sys
from pathlib import Path
import torch
from tests.support.model_zoo import batches, random_masks, tiny
from vitprune import find_groups, zero
from vitprune.models import write_weights
from vitprune.config.train_config import TrainConfig
from vitprune.training.loop import FrozenZeros, train
from vitprune.training.distillation import classification
torch.set_num_threads(1)
model = tiny("vit")
model.blocks = model.blocks[:1]  # compiling takes most of the time
groups = find_groups(model, ["weight"])
held = FrozenZeros(groups, random_masks(groups, 0.5))
zero(model, groups, held.masks)
names, noise = list(model.state_dict()), batches(model, 2, 6)
recipe = TrainConfig(epochs=2, lr=0.01, compile=sys.argv[2] == "compile", ema=0.5)
train(classification(model), lambda epoch: noise, 2, recipe, 0, lambda row: None, held)
assert list(model.state_dict()) == names
assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in held.masks.items())
write_weights(model.state_dict(), Path(sys.argv[1]))
"""


def compiled(path: Path, how: str, more: dict[str, str]) -> tuple[dict[str, Tensor], str]:
    env = ONE_THREAD | {"PYTHONPATH": str(ROOT)} | more
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(path / "cache")}
    file = path / f"{how}.safetensors"
    command = [sys.executable, "-c", WORKER, str(file), how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return load_file(file), done.stderr


def uncompiled() -> dict[str, Tensor]:
    """Result of the worker without compile."""
    model = tiny("vit")
    model.blocks = model.blocks[:1]
    groups = find_groups(model, ["weight"])
    held = FrozenZeros(groups, random_masks(groups, 0.5))
    zero(model, groups, held.masks)
    fit(model, {"ema": 0.5}, held=held, number=2)
    return state(model)


def test_compile_gives_a_similar_training(tmp_path: Path) -> None:
    plain, (code, message) = uncompiled(), compiled(tmp_path, "compile", {})
    assert "train.compile failed" not in message
    assert max(float((plain[key] - code[key]).abs().max()) for key in plain) < 1e-9


def test_training_continues_without_compile_on_failure(tmp_path: Path) -> None:
    plain, (remaining, message) = uncompiled(), compiled(tmp_path, "compile", {"CXX": "/no/such/compiler"})
    assert message.count("train.compile failed") == 1
    assert "training, epoch 1, step 1: train.compile failed (" in message
    assert "); continuing without it" in message
    assert all(torch.equal(plain[key], remaining[key]) for key in plain)


@pytest.mark.parametrize(
    ("top1", "patience", "epochs"),
    [
        ([0.1, 0.2, 0.3, 0.2, 0.2, 0.2], 2, 5),
        ([0.1, 0.2, 0.2, 0.3, 0.3, 0.3], 2, 6),  # an equal value is not better; 0.3 comes before patience ends
        ([0.5, 0.1, 0.6, 0.1, 0.1, 0.1], 1, 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 1, 6),
    ],
)
def test_patience_stops_after_epochs_without_a_better_top1(
    vit: nn.Module, top1: list[float], patience: int, epochs: int
) -> None:
    output, seen = iter(top1), []

    def evaluate() -> dict[str, float]:
        seen.append(state(vit))
        return {"top1": next(output)}

    rows = fit(vit, {"epochs": 6, "patience": patience}, evaluate=evaluate)
    assert [row["top1"] for row in rows] == top1[:epochs]
    assert same_state(vit, seen[-1])  # last weights, not the best
    plain = tiny("vit")
    expected = fit(plain, {"epochs": 6})[:epochs]
    assert [row["lr"] for row in rows] == [
        row["lr"] for row in expected
    ]  # the schedule does not depend on early stopping


def test_patience_without_an_evaluation_is_refused(vit: nn.Module) -> None:
    message = r"^train.patience: top-1 is not evaluated after each epoch here; set it to null$"
    with pytest.raises(BadInput, match=message):
        fit(vit, {"patience": 1})


def test_all_keys_together_keep_the_zeros_of_a_pruned_model() -> None:
    model = prune(tiny("vit"), "channel-magnitude", sparsity={"ffn": 0.5}).model
    groups = find_groups(model, ["weight"])
    held = FrozenZeros(groups, random_masks(groups, 0.5))
    zero(model, groups, held.masks)
    names = list(model.state_dict())
    more = {"layer_decay": 0.7, "checkpointing": True, "channels_last": True, "patience": 1, "ema": 0.9}
    rows = fit(model, more | {"accumulate": 2, "clip": 0.1}, held=held, evaluate=lambda: {"top1": 0.5})
    assert len(rows) == 2
    assert names == list(model.state_dict())
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in held.masks.items())
