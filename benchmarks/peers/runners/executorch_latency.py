"""ExecuTorch with XNNPACK: latency of exported programs, which run alternately.

job.json: models (names of .pt2 files), threads, runs. images.safetensors: images (B, 3, 224, 224). Writes
logits.safetensors, the logits of each model, and result.json: versions, and by name `ms`, the median milliseconds of a
run, and `outside`, the operations that XNNPACK does not compute.
"""

import importlib.metadata
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from safetensors.torch import load_file, save_file

NO_WORK = ("executorch_call_delegate", "getitem", "alloc")  # calls of XNNPACK, and memory


def main() -> None:
    """Lower and run the programs of the job on the command line."""
    folder = Path(sys.argv[1])
    job, images = json.loads((folder / "job.json").read_text()), load_file(folder / "images.safetensors")["images"]
    portable_lib._unsafe_reset_threadpool(job["threads"])
    runtime, programs, methods, facts, logits = Runtime.get(), [], {}, {}, {}
    for name in job["models"]:
        program = to_edge_transform_and_lower(
            torch.export.load(folder / f"{name}.pt2"), partitioner=[XnnpackPartitioner()]
        ).to_executorch()
        buffer = program.buffer
        loaded = runtime.load_program(buffer)
        methods[name] = loaded.load_method("forward")
        programs.append((buffer, loaded))  # methods read this memory
        facts[name] = {"outside": operations(program.exported_program().graph_module)}
        logits[name] = methods[name].execute([images])[0].clone()
    save_file(logits, folder / "logits.safetensors")
    times: dict[str, list[float]] = {name: [] for name in methods}
    for run in range(-max(3, job["runs"] // 5), job["runs"]):
        for name, method in methods.items():
            start = time.perf_counter()
            method.execute([images])
            if run >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    models = {name: {"ms": statistics.median(times[name]), **facts[name]} for name in methods}
    versions = {name: importlib.metadata.version(name) for name in ("executorch", "torch")}
    (folder / "result.json").write_text(json.dumps({"models": models, "versions": versions}))


def operations(module: Any) -> dict[str, int]:
    """Return how often each operation is computed outside of XNNPACK."""
    targets = (str(node.target) for node in module.graph.nodes if node.op == "call_function")
    return dict(Counter(target for target in targets if not any(word in target for word in NO_WORK)))


if __name__ == "__main__":
    main()
