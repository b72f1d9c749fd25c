"""Speed of unstructured sparse DeiT-Tiny in OpenVINO (INT8) and of torch's CSR product.

INT8 exports (as by `export.int8`) at several sparsities of all prunable weights, one thread, batch 1: OpenVINO by
default and with its sparse path requested (CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE). Models run alternately, so that
ratios hold on a busy machine; medians. "sparse kernels" counts layers whose kernel OpenVINO reports as sparse: where it
is 0, the sparse path was not used and a ratio other than 1 is noise. OpenVINO uses it only on CPUs with AMX. Also one
fc1 (768 x 192, 197 tokens) in float: torch's CSR product against the dense one. Needs VITPRUNE_REAL_DATA and
pip install 'vitprune[engine,export]'. Writes benchmarks/results/sparse_engine.json and docs/results/sparse_engine.md.
"""

import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.deit_tiny import load_dense
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune import PruneConfig, data, plan_for
from vitprune.models.export import export_onnx
from vitprune.models.int8 import quantize_int8
from vitprune.pruning.prune_cycles import prune_cycles

ROOT = Path(__file__).parents[2]
SPARSITIES = (0.0, 0.5, 0.75, 0.9)
RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
AT_LEAST = 0.45  # smallest sparsity of a layer for the sparse path; all layers have the same sparsity here


def main() -> None:
    """Measure both engines and write the tables."""
    quick = arguments(__doc__).quick
    runs = 10 if quick else 50
    torch.set_num_threads(1)
    dense = load_dense(real_data())
    image = torch.randn(data.example_input(dense, 1).shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        compiled = engines(dense, image, Path(name))
        kernels = {label: sparse_kernels(engine) for label, engine in compiled.items()}
        calls = {label: caller(engine, image) for label, engine in compiled.items()}
        times = interleaved(calls, runs)
    times |= interleaved(products(dense), 10 * runs)
    rows, table = [], []
    for label, value in times.items():
        against = times["fc1, dense" if label.startswith("fc1") else "INT8, 0 % zeros"]
        sparse = str(kernels.get(label, ""))
        table.append([label, f"{value:.3f}", f"{against / value:.2f}x", sparse])
        rows.append(Row(label, value, "ms", runs=runs))
        rows.append(Row(f"{label}: faster than dense", against / value, "times", runs=runs))
    if not quick:
        header = ["what", "median ms", "speed-up over dense", "sparse kernels"]
        about = f"{__doc__} {runs} runs."
        write_table(ROOT / "docs/results/sparse_engine.md", "Sparse weights in an engine", about, header, table)
    write_results("sparse_engine", rows, quick)


def engines(dense: torch.nn.Module, image: torch.Tensor, folder: Path) -> dict[str, Any]:
    """Return OpenVINO's compiled models by label."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own deprecations
            import openvino
    except ImportError:
        print("OpenVINO is not installed: pip install 'vitprune[engine,export]'")
        sys.exit(0)
    core, compiled = openvino.Core(), {}
    plain = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    for sparsity in SPARSITIES:
        model = copy.deepcopy(dense)
        for _ in prune_cycles(model, plan_for(PruneConfig(method="uniform", sparsity=sparsity)), []):
            pass
        source, path = folder / f"{sparsity}.onnx", folder / f"{sparsity}-int8.onnx"
        export_onnx(model, source, image.expand(2, -1, -1, -1))
        quantize_int8(source, path, image, "minmax")  # activation ranges do not affect the time
        label = f"{sparsity:.0%} zeros".replace("%", " %")
        if sparsity in (0.0, 0.9):
            compiled[f"float, {label}"] = core.compile_model(str(source), "CPU", plain)
        compiled[f"INT8, {label}"] = core.compile_model(str(path), "CPU", plain)
        if sparsity:
            compiled[f"INT8, {label}, sparse path requested"] = core.compile_model(
                str(path), "CPU", plain | {RATE: AT_LEAST}
            )
    return compiled


def caller(engine: Any, image: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs one inference."""
    request, given = engine.create_infer_request(), [image.numpy()]
    return lambda: request.infer(given)


def sparse_kernels(engine: Any) -> int:
    """Count layers with "sparse" in the name of their kernel; known only after the first inference."""
    engine.create_infer_request().infer([torch.zeros(1, 3, 224, 224).numpy()])
    infos = [node.get_rt_info() for node in engine.get_runtime_model().get_ops()]
    return sum("sparse" in str(info["primitiveType"].astype(str)) for info in infos)


def products(dense: torch.nn.Module) -> dict[str, Callable[[], object]]:
    """Return the first fc1 as a dense product and as CSR at each sparsity."""
    weight = dense.get_parameter("blocks.0.mlp.fc1.weight").detach()
    tokens = torch.randn(weight.shape[1], 197, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], object]] = {"fc1, dense": lambda: weight @ tokens}
    for sparsity in SPARSITIES[1:]:
        threshold = weight.abs().flatten().kthvalue(round(sparsity * weight.numel())).values
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CSR is a beta feature
            sparse = (weight * (weight.abs() > threshold)).to_sparse_csr()
        calls[f"fc1, {sparsity:.0%} zeros, CSR".replace("%", " %")] = lambda sparse=sparse: sparse @ tokens
    return calls


def interleaved(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Return the median milliseconds of each call; calls alternate."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(-3, runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if run >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
