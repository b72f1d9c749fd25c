"""Time and memory of pruning without training, by model size: statistics, selection and weight update together.

Models of timm with seeded random weights (the time does not depend on the values, apart from the number of iterations
of the row solve), 200 random images of 224 x 224 pixels in batches of 50, float32 weights. One run per row, after a
small model has been pruned as a warm-up. `memory` is the largest allocation of the device's memory, on the CPU the
growth of the process's largest resident set. Writes benchmarks/results/one_shot_time.json and
docs/results/one_shot_time.md, with --device cuda one_shot_time_cuda of both.
"""

import resource
import time
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.lib.results import Row, arguments, write_results, write_table
from vitprune import ReconstructConfig, ScoreConfig, prune
from vitprune.pruning.reconstruct import reconstruct

ROOT = Path(__file__).parents[2]
MODELS = "deit_tiny_patch16_224,deit_small_patch16_224,deit_base_patch16_224,swin_base_patch4_window7_224"
IMAGES, BATCH, GIGA = 200, 50, 2**30
SETTINGS: dict[str, dict[str, Any]] = {
    "unit-obs, 0.5x MACs": {"method": "unit-obs", "target": {"macs": 0.5}},
    "upvits-fisher, 0.5x MACs": {"method": "upvits-fisher", "target": {"macs": 0.5}},
    "obc, 50 % of the weights": {"method": "obc", "sparsity": 0.5},
    "obc, 2:4": {"method": "obc", "scope": "2:4"},
    "fastcap, 50 % of the weights": {"method": "fastcap", "sparsity": 0.5},
}
RECONSTRUCTION = "one pass of reconstruction"


def main() -> None:
    """Measure every model and method and write the table."""
    options = arguments(
        __doc__,
        {
            "device": ("cpu", "where to run: cpu or cuda"),
            "threads": (2, "threads of the CPU"),
            "models": (MODELS, "timm names"),
            "seconds": (0, "do not start another row after so many seconds; 0: all rows"),
        },
    )
    torch.set_num_threads(options.threads)
    start, device = time.perf_counter(), torch.device(options.device)
    rows, cells = [], []
    measure("vit_tiny_patch16_224", "unit-obs, 0.5x MACs", device, 20, depth=2)
    for name in ["deit_tiny_patch16_224"] if options.quick else options.models.split(","):
        for what in [RECONSTRUCTION] if options.quick else [*SETTINGS, RECONSTRUCTION]:
            if options.seconds and time.perf_counter() - start > options.seconds:
                continue
            seconds, memory = measure(name, what, device, 20 if options.quick else IMAGES)
            rows += [Row(f"{name}, {what}", seconds, "s"), Row(f"{name}, {what}, memory", memory, "GB")]
            cells.append([name, what, f"{seconds:.1f}", f"{memory:.2f}"])
            print(*cells[-1], flush=True)
    page = "one_shot_time" + "_cuda" * (device.type == "cuda")
    if not options.quick:
        header = ["model", "method", "seconds", "memory, GB"]
        title = "Time of one-shot pruning" + " on a GPU" * (device.type == "cuda")
        write_table(ROOT / f"docs/results/{page}.md", title, __doc__ or "", header, cells)
    write_results(page, rows, options.quick)


def measure(name: str, what: str, device: torch.device, number: int, **args: Any) -> tuple[float, float]:
    """Return the seconds and the gigabytes that one pruning takes."""
    torch.manual_seed(0)
    model = timm.create_model(name, **args).eval().to(device)
    images = torch.randn(number, 3, 224, 224)
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(BATCH)]
    before = _peak(device, reset=True)
    start = time.perf_counter()
    if what == RECONSTRUCTION:
        pruned = prune(model, "magnitude", sparsity=0.5).model
        start = time.perf_counter()
        reconstruct(pruned, model, batches, ReconstructConfig(passes=1))
    else:
        prune(model, calibration=batches, config=ScoreConfig(memory_mb=4096), **SETTINGS[what])
    _wait(device)
    return time.perf_counter() - start, (_peak(device) - before) / GIGA


def _peak(device: torch.device, reset: bool = False) -> int:
    if device.type != "cuda":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    return torch.cuda.max_memory_allocated(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
