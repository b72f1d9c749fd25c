"""Training steps with micro-batches, several processes, and out-of-memory errors."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import vitprune
from tests.support import preloaded
from tests.support.model_zoo import batches, random_masks, state, tiny
from tests.support.train_worker import CASES, cached_outputs, trained
from vitprune import BadInput, DistillConfig, data, find_groups, zero
from vitprune.config.params import load_params
from vitprune.config.train_config import TrainConfig
from vitprune.errors import Interrupted
from vitprune.runtime.distributed import ProcessGroup
from vitprune.training import loop as training
from vitprune.training.distillation import classification
from vitprune.training.loop import FrozenZeros, train
from vitprune.training.step import local_share

ROOT = Path(__file__).parents[2]
HELD = ("adamw", "momentum", "sgd", "lamb", "nadamw", "lion")


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_the_steps_of_one(tmp_path: Path, processes: int) -> None:
    preloaded.run_together(processes, "tests.support.train_worker", str(tmp_path))
    assert [json.loads((tmp_path / f"size-{rank}.json").read_text()) for rank in range(processes)] == [
        processes
    ] * processes
    requested = [load_file(tmp_path / f"answers-{rank}.safetensors")["answers"] for rank in range(processes)]
    assert requested[0].shape == (27, 7)
    assert all(torch.equal(result, cached_outputs()) for result in requested)
    for name, settings in CASES.items():
        alone = trained(settings | {"accumulate": 1}, taught=name == "all")
        files = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(processes)]
        for number, step in enumerate(alone):
            together = {key: files[0][f"{number}/{key}"] for key in step}
            assert furthest(step, together) < 1e-9, (name, number)
            assert all(torch.equal(file[f"{number}/{key}"], together[key]) for file in files for key in step)
        assert furthest(alone[0], alone[-1]) > 1e-3
        assert len(alone) == {"patience": 3}.get(name, 2) * 3 + 1


@pytest.mark.parametrize("accumulate", [2, 3, 4, 100])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_micro_batches_give_the_step_of_the_batch(accumulate: int, clip: float | None) -> None:
    full, parts = (trained({"clip": clip, "ema": 0.5} | more) for more in ({}, {"accumulate": accumulate}))
    assert len(full) == len(parts) > 4
    assert max(furthest(one, other) for one, other in zip(full, parts, strict=True)) < 1e-9


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_micro_batches_with_unlabeled_images_give_the_step_of_the_batch(alpha: float | None) -> None:
    images, labels = batches(tiny("vit"), 1, 8)[0]
    given = [(images, torch.where(torch.tensor([0, 1, 0, 0, 1, 1, 0, 1]).bool(), -100, labels))] * 2
    results = []
    for accumulate in (1, 2, 3):
        model = tiny("vit")
        recipe = TrainConfig(epochs=1, lr=0.01, optimizer="sgd", accumulate=accumulate)
        teacher = None if alpha is None else tiny("vit", 1)
        history = vitprune.finetune(model, given, recipe, teacher, distillation=DistillConfig(alpha=alpha or 1.0))
        results.append((history[0]["loss"], state(model)))
    for loss, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        assert furthest(weights, results[0][1]) < 1e-12
    with pytest.raises(BadInput, match="step 1: no image of a micro-batch has a label; leave such images out, or set"):
        vitprune.finetune(tiny("vit"), given, TrainConfig(epochs=1, lr=0.01, accumulate=8))


def test_local_shares_partition_the_batch_in_order() -> None:
    images, labels = torch.arange(7).view(7, 1, 1, 1), torch.arange(7)
    result = [local_share(images, labels, ProcessGroup(rank, 3)) for rank in range(3)]
    assert [share[1].tolist() for share in result] == [[0, 1, 2], [3, 4], [5, 6]]
    assert all(torch.equal(x.flatten(), y) for x, y in result)


class Greedy(nn.Module):
    """A criterion that raises an out-of-memory error for more than a number of images."""

    def __init__(self, most: int):
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.seen.append(len(output))
        if len(output) > self.most:
            torch.empty(1 << 60)
        return torch.nn.functional.cross_entropy(output, target)


def test_out_of_memory_splits_the_batch_with_the_same_result(capsys: pytest.CaptureFixture[str]) -> None:
    result = []
    for most, accumulate in ((6, 1), (2, 1), (2, 4)):
        model, rows = tiny("vit"), []
        for block in model.blocks:
            block.mlp.drop1.p = 0.2 if most == 2 else 0.0
        task = classification(model)
        task.criterion = Greedy(most)
        noise = batches(model, 2, 6)
        recipe = TrainConfig(epochs=2, lr=0.01, accumulate=accumulate)
        train(task, lambda epoch, noise=noise: noise, 2, recipe, 0, rows.append)
        result.append((state(model), rows, task.criterion.seen, capsys.readouterr().err))
    assert result[1][2][:2] == [6, 3]  # 6 images at once, then the first of 2 parts, then 4 parts
    assert result[1][2][2:6] == [2, 2, 1, 1]
    message = result[1][3].splitlines()
    assert message == [
        "training, epoch 1, step 1: out of memory; continuing with 2 micro-batches of 3 images",
        "training, epoch 1, step 1: out of memory; continuing with 4 micro-batches of 2 images",
    ]
    assert [row.get("micro_batches") for row in result[1][1]] == [4, 4]
    assert "micro_batches" not in result[2][1][0]
    assert all(torch.equal(result[1][0][name], result[2][0][name]) for name in result[1][0])  # dropout included


def test_out_of_memory_with_one_image_is_refused(vit: nn.Module) -> None:
    task = classification(vit)
    task.criterion = Greedy(0)
    with pytest.raises(
        BadInput, match=r"^training, epoch 1, step 1: out of memory with one image at a time"
    ) as refused:
        train(task, lambda epoch: batches(vit, 1, 3), 1, TrainConfig(epochs=1, lr=0.01), 0, print)
    assert "\n" not in str(refused.value)


def test_float16_is_refused_on_a_cpu(vit: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^train.amp float16: not supported on CPU; use bfloat16 or false$"):
        train(
            classification(vit), lambda epoch: batches(vit), 2, TrainConfig(epochs=1, lr=0.01, amp="float16"), 0, print
        )


@pytest.mark.parametrize("optimizer", HELD)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"clip": 0.05},
        {"ema": 0.9},
        {"accumulate": 3},
        {"clip": 0.05, "ema": 0.9, "accumulate": 2},
        {"ema": 0.9, "layer_decay": 0.7, "checkpointing": True, "channels_last": True},
    ],
    ids=str,
)
def test_pruned_weights_are_zero_after_every_step_and_in_the_ema(
    vit: nn.Module, monkeypatch: pytest.MonkeyPatch, optimizer: str, more: dict[str, Any]
) -> None:
    groups = find_groups(vit, ["weight"])
    held, averages, checked = FrozenZeros(groups, random_masks(groups, 0.6)), [], [0]
    zero(vit, groups, held.masks)
    make = training.ModelEmaV3

    def watched(*args: Any, **settings: Any) -> Any:
        averages.append(make(*args, **settings))
        return averages[-1]

    monkeypatch.setattr(training, "ModelEmaV3", watched)

    def exact(model: nn.Module) -> None:
        for name, mask in held.masks.items():
            assert torch.equal(model.get_parameter(name) != 0, mask), name

    class Watch:
        resumed_from = None

        def due(self) -> bool:  # called after every step
            checked[0] += 1
            for model in (vit, *(average.module for average in averages)):
                exact(model)
            return False

        def write(self, snapshot: Any) -> None:
            raise AssertionError

    recipe = TrainConfig.model_validate({"epochs": 2, "lr": 0.02, "weight_decay": 0.2, "optimizer": optimizer} | more)
    noise = batches(vit, 3, 6)
    train(classification(vit), lambda epoch: noise, 3, recipe, 0, lambda row: None, held, checkpointer=Watch())
    assert checked == [6]
    assert len(averages) == ("ema" in more)
    exact(vit)


def test_all_optimizers_of_the_recipes_are_tested() -> None:
    result = set()
    for path in (ROOT / "recipes").glob("*.yaml"):
        params = load_params(path)
        result |= {r.optimizer for r in (params.dense.train, params.prune.finetune, params.distill.train) if r}
    assert {"adamw", "momentum"} <= result <= set(HELD)


def deadly(row: int) -> bytes:
    """A reader whose worker process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_killed_worker_is_reported_as_transient() -> None:
    transform = data.Transform(lambda image: torch.zeros(3, 8, 8), "RGB", (3, 8, 8), True, None)
    table = data.ImageTable(tuple("abcdefgh"), torch.zeros(8, dtype=torch.int64), transform, deadly, None)
    message = r"^DataLoader worker .*; it was killed, probably out of memory; use fewer than 1 workers$"
    with pytest.raises(Interrupted, match=message) as lost:
        list(data.train_batches(table, 4, 0, 0, workers=1))
    assert lost.value.code == 75


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_an_undecodable_training_image_is_named(workers: int) -> None:
    transform = data.Transform(lambda image: torch.zeros(3, 8, 8), "RGB", (3, 8, 8), True, None)
    table = data.ImageTable(("a/b.jpg",), torch.zeros(1, dtype=torch.int64), transform, lambda row: b"none", None)
    message = r"^a/b.jpg: unchanged, but this version of Pillow cannot decode it; run `vitprune dataset` again$"
    with pytest.raises(BadInput, match=message):
        list(data.train_batches(table, 4, 0, 0, workers))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_shares_of_loaded_batches_partition_them(workers: int) -> None:
    transform = data.Transform(lambda image: torch.rand(3, 8, 8), "RGB", (3, 8, 8), True, None)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    table = data.ImageTable(tuple("abcdefg"), torch.arange(7), transform, lambda row: picture.getvalue(), None)
    full = list(data.train_batches(table, 5, 0, 0))
    shares = [list(data.train_batches(table, 5, 0, 0, workers, 1, 0, (rank, 3))) for rank in range(3)]
    assert [[len(y) for _, y in share] for share in shares] == [[2, 1], [2, 1], [1, 0]]
    for number, (images, labels) in enumerate(full):
        assert torch.equal(torch.cat([share[number][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[number][1] for share in shares]), labels)
    later = list(data.train_batches(table, 5, 0, 0, begin=1))
    assert len(later) == 1
    assert torch.equal(later[0][0], full[1][0])
