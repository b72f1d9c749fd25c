"""Score a tiny model by Fisher, slowly, in its own process: score_worker.py DIRECTORY SECONDS_PER_BATCH."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tests.support.model_zoo import batches, tiny
from vitprune import Group, find_groups
from vitprune.criteria import DEFAULT_CONTEXT, Batches, Importance, ScoringContext
from vitprune.criteria.kl.fisher import fisher_kl
from vitprune.models.io import write_weights
from vitprune.pipeline import score_stage
from vitprune.runtime.distributed import process_group


def slow(model: nn.Module, groups: Sequence[Group], data: Batches, setting: ScoringContext) -> Importance:
    """Fisher scoring with a pause per batch, so that it can be killed."""
    time.sleep(float(sys.argv[2]))
    return fisher_kl(model, groups, data, setting)


def main() -> None:
    torch.set_num_threads(1)
    directory, model = Path(sys.argv[1]), tiny("vit")
    work = score_stage.ScoringJob(slow, find_groups(model, ["ffn", "residual"]), batches(model, 5, 2), DEFAULT_CONTEXT)
    with process_group() as dist:
        result = work.importance(model, True, directory / "partial", dist)
    if result is not None:
        write_weights(result.scores, directory / "scores.safetensors")


if __name__ == "__main__":
    main()
