"""Score a tiny model by CAP as one of several processes: cap_worker.py DIRECTORY."""

import sys
from pathlib import Path

import torch

from tests.support.model_zoo import batches, tiny
from tests.support.plans import changed, context
from vitprune import find_groups
from vitprune.criteria import ScoringContext
from vitprune.criteria.obs.cap import ovit
from vitprune.models.io import write_weights
from vitprune.pipeline import score_stage
from vitprune.runtime.distributed import process_group

KINDS = ("per-sample", "per-batch")


def setting_of(kind: str) -> ScoringContext:
    """Return settings with three passes over three batches and several chunks of blocks."""
    few = context(fisher_block_size=24, num_gradients=20, memory=4_000_000)
    return few if kind == "per-sample" else changed(few, num_gradients=5, per_sample=False, gradient_batch=4)


def main() -> None:
    torch.set_num_threads(1)
    model = tiny("vit")
    directory, groups = Path(sys.argv[1]), find_groups(model, ["weight"])[:4]
    with process_group() as dist:
        for kind in KINDS:
            work = score_stage.ScoringJob(ovit, groups, batches(model, 3), setting_of(kind))
            result = work.importance(model, False, directory / "partial", dist, collective=True)
            if result is not None:
                write_weights(result.scores, directory / f"{kind}.safetensors")


if __name__ == "__main__":
    main()
