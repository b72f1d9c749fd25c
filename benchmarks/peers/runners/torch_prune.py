"""torch.nn.utils.prune: magnitude within layers, or of all layers in one ranking."""

from collections.abc import Mapping

from job import Job, is_pruned, run
from torch import Tensor
from torch.nn.utils import prune


def pruned(job: Job) -> Mapping[str, Tensor]:
    """Return the weights after magnitude pruning."""
    model = job.timm_model()
    layers = [(module, "weight") for name, module in model.named_modules() if is_pruned(name)]
    if job.method == "magnitude, global":
        prune.global_unstructured(layers, prune.L1Unstructured, amount=job.sparsity)
    else:
        for module, name in layers:
            prune.l1_unstructured(module, name, amount=job.sparsity)
    for module, name in layers:
        prune.remove(module, name)
    return model.state_dict()


if __name__ == "__main__":
    run(pruned)
