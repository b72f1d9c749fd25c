"""NVIDIA ModelOpt: 2:4 by magnitude or SparseGPT, and FastNAS for FFN widths at a number of MACs."""

import copy
from collections.abc import Mapping

import modelopt.torch.opt as mto
import modelopt.torch.prune as mtp
import modelopt.torch.sparsity as mts
import torch
from job import Job, run
from torch import Tensor, nn

MODES = {"magnitude": "sparse_magnitude", "SparseGPT": "sparsegpt"}


def pruned(job: Job) -> Mapping[str, Tensor]:
    """Return the pruned weights."""
    if job.macs is not None:
        return fastnas(job)
    config = {"data_loader": job.batches, "collect_func": lambda batch: batch[0]}
    mode = MODES[job.method]
    kept = {"nn.Linear": {"*": {}, "*head*": None}, "nn.Conv2d": None}
    model = mts.sparsify(job.timm_model(), mode=[(mode, kept)], config=config)
    return mts.export(model).state_dict()


def fastnas(job: Job) -> Mapping[str, Tensor]:
    """Return the weights of the best FFN widths that a search by top-1 on the calibration images finds."""
    images = job.batches[0][0][:1]

    def top1(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            hits = [(model(batch).argmax(1) == labels).sum() for batch, labels in job.batches]
        return float(torch.stack(hits).sum())

    model, _ = mtp.prune(
        copy.deepcopy(job.timm_model()),
        mode="fastnas",
        constraints={"flops": f"{100 * job.macs:g}%"},
        dummy_input=images,
        config={"data_loader": job.batches, "score_func": top1, "checkpoint": str(job.folder / "search.pth")},
    )
    assert mto.ModeloptStateManager.is_converted(model)
    return model.state_dict()


if __name__ == "__main__":
    run(pruned, "nvidia-modelopt")
