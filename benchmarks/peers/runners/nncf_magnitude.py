"""NNCF: magnitude within layers, or of all layers in one ranking."""

from collections.abc import Mapping

import nncf
from job import Job, is_pruned, run
from torch import Tensor

MODES = {
    "magnitude, layer": nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL,
    "magnitude, global": nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL,
}


def pruned(job: Job) -> Mapping[str, Tensor]:
    """Return the weights after magnitude pruning; layers outside of the blocks are ignored."""
    example = job.batches[0][0][:1]
    model = nncf.prune(
        job.timm_model(),
        mode=MODES[job.method],
        ratio=job.sparsity,
        examples_inputs=example,
        ignored_scope=nncf.IgnoredScope(patterns=[".*patch_embed.*", ".*head.*"]),
    )
    model = nncf.strip(model, strip_format=nncf.StripFormat.IN_PLACE, example_input=example)
    weights = model.state_dict()
    return job.weights | {name: weights[name] for name in job.weights if is_pruned(name.removesuffix(".weight"))}


if __name__ == "__main__":
    run(pruned, "nncf")
