"""vitprune: `obc` without reconstruction, as a peer among the others."""

from collections.abc import Mapping

from job import Job, run
from torch import Tensor

import vitprune


def pruned(job: Job) -> Mapping[str, Tensor]:
    """Return the weights after pruning and refit."""
    goal = {"scope": job.pattern} if job.pattern else {"sparsity": job.sparsity}
    return vitprune.prune(job.timm_model(), job.method, calibration=job.batches, **goal).model.state_dict()


if __name__ == "__main__":
    run(pruned)
