"""NVIDIA ModelOpt: 2:4 by magnitude or SparseGPT."""

from collections.abc import Mapping

import modelopt.torch.sparsity as mts
from job import Job, run
from torch import Tensor

MODES = {"magnitude": "sparse_magnitude", "SparseGPT": "sparsegpt"}


def pruned(job: Job) -> Mapping[str, Tensor]:
    """Return the pruned weights of all linear layers but the classifier."""
    config = {"data_loader": job.batches, "collect_func": lambda batch: batch[0]}
    layers = {"nn.Linear": {"*": {}, "*head*": None}, "nn.Conv2d": None}
    return mts.export(mts.sparsify(job.timm_model(), mode=[(MODES[job.method], layers)], config=config)).state_dict()


if __name__ == "__main__":
    run(pruned, "nvidia-modelopt")
