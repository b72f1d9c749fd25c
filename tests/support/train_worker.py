"""Train a tiny model as one of several processes: train_worker.py DIRECTORY; write the weights of all steps."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.support.model_zoo import batches, random_masks, tiny
from vitprune import find_groups, zero
from vitprune.config.train_config import DistillConfig, TrainConfig
from vitprune.models.io import write_weights
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from vitprune.training.cached_teacher import cache_teacher
from vitprune.training.distillation import classification, logit_distillation
from vitprune.training.loop import FrozenZeros, train
from vitprune.training.step import local_share

STEPS = 3
CASES = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "all": {"ema": 0.9, "cutmix": 0.5, "mixup": 0.3, "clip": 0.1, "accumulate": 3},
    "momentum": {"optimizer": "momentum", "lr": 0.1, "clip": None},
    "patience": {"epochs": 5, "patience": 1, "layer_decay": 0.7, "checkpointing": True, "channels_last": True},
}


def trained(settings: dict, dist: ProcessGroup = SINGLE_PROCESS, taught: bool = False) -> list[dict[str, Tensor]]:
    """Return the weights after every step, and the final weights."""
    model, seen = tiny("vit"), []
    groups = find_groups(model, ["weight"])
    held = FrozenZeros(groups, random_masks(groups, 0.5))
    zero(model, groups, held.masks)
    recipe = TrainConfig.model_validate({"epochs": 2, "lr": 0.01, "weight_decay": 0.1} | settings)
    noise = [*batches(model, STEPS - 1, 6), *batches(model, 1, 3)]  # the last is smaller, with 4 processes one has none

    def of(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in noise:
            if epoch or seen:
                seen.append(weights(model))
            yield batch if recipe.mixes else local_share(*batch, dist)
            if not seen:
                seen.append(weights(model))

    task = logit_distillation(model, tiny("vit", 1), 1.0, 2.0, 0.0) if taught else classification(model, 0.1)
    output = iter((0.1, 0.3, 0.2, 0.1, 0.1))  # enough after 3 epochs
    evaluate = (lambda: {"top1": next(output)}) if dist.rank == 0 else None
    train(task, of, STEPS, recipe, 0, lambda row: None, held, evaluate, dist=dist)
    for step in [*seen, weights(model)]:
        assert all(bool((step[name][~mask] == 0).all()) for name, mask in held.masks.items())
    return [*seen, weights(model)]


def cached_outputs(dist: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """Return the cached teacher outputs of 5 batches, the last one smaller."""
    model = tiny("vit")
    task = logit_distillation(model, tiny("vit", 1), 1.0, 2.0, 0.0)
    return cache_teacher(task, DistillConfig(), [*batches(model, 4, 6), *batches(model, 1, 3)], dist)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def main() -> None:
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    with process_group() as dist:
        for name, settings in CASES.items():
            steps = trained(settings, dist, name == "all")
            flat = {f"{number}/{key}": tensor for number, step in enumerate(steps) for key, tensor in step.items()}
            write_weights(flat, directory / f"{name}-{dist.rank}.safetensors")
        write_weights({"answers": cached_outputs(dist)}, directory / f"answers-{dist.rank}.safetensors")
        (directory / f"size-{dist.rank}.json").write_text(json.dumps(dist.size))


if __name__ == "__main__":
    main()
