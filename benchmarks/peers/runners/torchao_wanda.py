"""torchao: Wanda (Sun et al., 2023), unstructured within rows, or N:M."""

from collections.abc import Mapping

import torch
from job import Job, is_pruned, run
from torch import Tensor
from torchao.sparsity import WandaSparsifier


def pruned(job: Job) -> Mapping[str, Tensor]:
    """Return the weights after pruning by magnitude times norm of the input."""
    model = job.timm_model()
    group = int(job.pattern.split(":")[1]) if job.pattern else None
    sparsifier = WandaSparsifier(sparsity_level=0.5 if job.pattern else job.sparsity, semi_structured_block_size=group)
    layers = [{"tensor_fqn": f"{name}.weight"} for name, _ in model.named_modules() if is_pruned(name)]
    sparsifier.prepare(model, config=layers)
    with torch.no_grad():
        for images, _ in job.batches:
            model(images)
    sparsifier.step()
    sparsifier.squash_mask()
    return model.state_dict()


if __name__ == "__main__":
    run(pruned, "torchao")
