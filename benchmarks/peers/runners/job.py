"""Input and output of a runner, through files in the folder of a job.

A runner is a script that the Python of a peer's environment executes with the folder as its only argument. It imports
this module and the peer, not vitprune.

job.json: method, sparsity or pattern, threads. model.safetensors: weights of timm's DeiT-Tiny.
images.safetensors: calibration images (N, 3, 224, 224) and labels (N,). The runner writes pruned.safetensors, with the
same names, and result.json: seconds, and versions of the packages.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODEL, BATCH = "deit_tiny_patch16_224", 50
PRUNED = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # not the classifier


@dataclass(frozen=True)
class Job:
    """What to prune: `sparsity` of single weights, or an N:M `pattern`."""

    folder: Path
    method: str
    sparsity: float | None = None
    pattern: str | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights of the dense model."""
        return load_file(self.folder / "model.safetensors")

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Calibration images and labels."""
        data = load_file(self.folder / "images.safetensors")
        return list(zip(data["images"].split(BATCH), data["labels"].split(BATCH), strict=True))

    def timm_model(self) -> nn.Module:
        """Return the dense model of timm."""
        import timm

        model = timm.create_model(MODEL, pretrained=False)
        model.load_state_dict(self.weights)
        return model.eval()


def run(prune: Callable[[Job], Mapping[str, Tensor]], *packages: str) -> None:
    """Prune the job on the command line, and write weights and result.

    Args:
        prune: Returns the pruned weights by timm's names.
        packages: Packages whose versions the result has.
    """
    folder = Path(sys.argv[1])
    spec: dict[str, Any] = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(spec.pop("threads"))
    torch.manual_seed(0)
    job, start = Job(folder, **spec), time.perf_counter()
    weights = {name: value.detach().clone().contiguous() for name, value in prune(job).items()}
    result = {
        "seconds": time.perf_counter() - start,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", *packages)},
    }
    save_file(weights, folder / "pruned.safetensors")
    (folder / "result.json").write_text(json.dumps(result))


def is_pruned(name: str) -> bool:
    """Return whether a layer of timm's DeiT takes part."""
    return name.startswith("blocks.") and name.endswith(PRUNED)
