"""Scores a tiny model by Fisher, slowly, in a process of its own: sharding_worker.py DIRECTORY SECONDS_PER_BATCH."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_models import batches, tiny
from torch import nn

from vitprune import Group, find_groups, sharding
from vitprune.criteria import DEFAULTS, Batches, Importance, Setting
from vitprune.criteria.fisher import fisher
from vitprune.models import write_weights


def slow(model: nn.Module, groups: Sequence[Group], data: Batches, setting: Setting) -> Importance:
    """Fisher, with time to be killed in."""
    time.sleep(float(sys.argv[2]))
    return fisher(model, groups, data, setting)


def main() -> None:
    torch.set_num_threads(1)
    directory, model = Path(sys.argv[1]), tiny("vit")
    work = sharding.Work(slow, find_groups(model, ["ffn", "residual"]), batches(model, 5, 2), DEFAULTS)
    with sharding.team() as mates:
        scores = work.scores(model, True, directory / "partial", mates)
    if scores is not None:
        write_weights(scores, directory / "scores.safetensors")


if __name__ == "__main__":
    main()
