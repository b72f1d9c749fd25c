"""Speed of unstructured sparse DeiT in DeepSparse 1.8.0, the engine of the papers of oViT and CAP.

DeiT-Tiny, -S and -B with random weights, on which speed does not depend, dense and with 50, 75 and 90 % of all prunable
weights removed by magnitude within layers (method `uniform`); 224 x 224 pixels, batches of 1 and 16. fp32, and INT8:
the linear layers of the blocks, scales per output channel, in the form of SparseML's exporter (MatMulInteger). The
benchmark fails if DeepSparse does not support all operators of a model (column "supported", the engine's
`fraction_of_supported_ops`). All models of one size and batch run alternately in one process, so that other load
affects all of them equally; times are medians. "difference": the largest difference of a logit from that of torch with
the same weights in fp32, divided by the largest logit. The abstract of the paper states speed-ups of 1.5x to 2.4x
without accuracy loss, the text four cores of a Xeon Gold 6238R and batches of 64; figures by model and sparsity were
not available. The last column compares the speed-up in fp32 with this range. DeepSparse has not been maintained since
June 2025, has no wheel for Python 3.12, and its license is for evaluation only; the first full run installs it into
.venv-peers. Rows are recorded in benchmarks/results/deepsparse-notes.jsonl, so that an interrupted benchmark continues;
delete the file to start over. Needs pip install 'vitprune[export]'. Writes benchmarks/results/deepsparse.json and
docs/results/deepsparse.md.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import timm
import torch
from torch import Tensor

from benchmarks.lib.deepsparse_onnx import export_float, export_int8
from benchmarks.lib.peer_environments import ENVIRONMENTS, run_script
from benchmarks.lib.results import Recorded, Row, Section, arguments, write_results, write_sections
from vitprune import prune
from vitprune.models.export_check import BOUND

ROOT = Path(__file__).parents[2]
MODELS = {
    "DeiT-Tiny": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
}
SPARSITIES = (0.0, 0.5, 0.75, 0.9)
FLOAT, INT8 = "fp32", "INT8"
BOUNDS = {FLOAT: BOUND["float32"], INT8: BOUND["int8"]}  # of the difference
PAPER = (1.5, 2.4)
RUNS = {1: 50}  # by batch; fewer for larger batches
FEW = 10
SECONDS = 1800.0


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one model, its fraction of supported operators, and the difference of its logits."""

    model: str
    type: str
    zeros: float
    batch: int
    ms: float
    supported: float
    difference: float
    runs: int
    threads: int

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.model}, {self.type}, {100 * self.zeros:.0f} % zeros, batch {self.batch}"


def main() -> None:
    """Measure what is missing and write the tables."""
    options = arguments(
        __doc__,
        {
            "threads": (2, "threads of the engine"),
            "models": (",".join(MODELS), "models"),
            "batches": ("1,16", "images per batch"),
            "note": ("", "a sentence for the page, such as what else ran on the machine"),
        },
    )
    if sys.version_info >= (3, 12):
        print("DeepSparse 1.8.0 has no wheel for this version of Python: run the benchmark with Python 3.11")
        sys.exit(0)
    if options.quick and not (ENVIRONMENTS / "deepsparse").exists():
        print("DeepSparse is not installed: the full form of this benchmark installs it into .venv-peers")
        sys.exit(0)
    torch.set_num_threads(options.threads)
    models, batches = options.models.split(","), [int(batch) for batch in options.batches.split(",")]
    if unknown := set(models) - set(MODELS):
        sys.exit(f"--models: unknown: {', '.join(sorted(unknown))}; use {', '.join(MODELS)}")
    if options.quick:
        models, batches = ["DeiT-Tiny"], [1]
    done = Recorded("deepsparse", Timing, options.quick)
    for model in models:
        for batch in batches:
            if (model, batch) not in {(row.model, row.batch) for row in done}:
                done.record(*measure(model, batch, options.threads, options.quick))
    if not options.quick:
        about = f"{__doc__} {options.note}"
        write_sections(ROOT / "docs/results/deepsparse.md", "Sparse weights in DeepSparse", about, tables(done))
    write_results("deepsparse", result_rows(done), options.quick)


def measure(name: str, batch: int, threads: int, quick: bool) -> list[Timing]:
    """Export the dense and the pruned models in float and INT8, and run them alternately in the engine."""
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    runs = 5 if quick else RUNS.get(batch, FEW)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        numpy.save(folder / "images.npy", images.numpy())
        expected = dict(exported(name, images, folder, {"depth": 2} if quick else {}))
        files = {f"{kind}-{zeros}": (kind, zeros) for kind in (FLOAT, INT8) for zeros in SPARSITIES}
        spec = {"models": list(files), "batch": batch, "threads": threads, "runs": runs}
        result = run_script(folder, "deepsparse", "deepsparse_latency", spec, SECONDS)
        if isinstance(result, str):
            sys.exit(f"{name}, batch {batch}: {result}")
        rows = []
        for file, (kind, zeros) in files.items():
            facts, logits = result["models"][file], torch.from_numpy(numpy.load(folder / f"{file}.npy"))
            difference = float((logits - expected[zeros]).abs().max() / expected[zeros].abs().max())
            row = Timing(name, kind, zeros, batch, facts["ms"], facts["supported"], difference, runs, threads)
            if not difference <= BOUNDS[kind]:
                sys.exit(f"{row.name}: the logits differ by {difference:.2g} of the largest; at most {BOUNDS[kind]}")
            rows.append(row)
    return rows


def exported(name: str, images: Tensor, folder: Path, args: dict[str, int]) -> Iterator[tuple[float, Tensor]]:
    """Write the ONNX files of a model; yield sparsity and torch's logits."""
    torch.manual_seed(0)
    dense = timm.create_model(MODELS[name], **args).eval()
    for zeros in SPARSITIES:
        model = prune(dense, "uniform", sparsity=zeros).model if zeros else dense
        source = folder / f"{FLOAT}-{zeros}.onnx"
        yield zeros, export_float(model, source, images)
        export_int8(source, folder / f"{INT8}-{zeros}.onnx", images)


def speedup(row: Timing, done: Sequence[Timing], kind: str) -> float:
    """Return the speed-up over the dense model of a type."""
    (dense,) = (
        other.ms
        for other in done
        if (other.model, other.batch, other.type, other.zeros) == (row.model, row.batch, kind, 0)
    )
    return dense / row.ms


def compared(row: Timing, done: Sequence[Timing]) -> str:
    """Return where the speed-up of a sparse model in float lies relative to the paper's range."""
    if row.type != FLOAT or not row.zeros:
        return ""
    low, high = PAPER
    value = speedup(row, done, FLOAT)
    return "below" if value < low else "above" if value > high else "within"


def ranges(batch: int, done: Sequence[Timing]) -> str:
    """Return a sentence with the smallest and the largest speed-up of all models, by type and zeros."""
    parts = []
    for kind in (FLOAT, INT8):
        for zeros in SPARSITIES[1:]:
            rows = [row for row in done if (row.batch, row.type, row.zeros) == (batch, kind, zeros)]
            found = [speedup(row, done, kind) for row in rows]
            extremes = " to ".join(dict.fromkeys(f"{value:.2f}x" for value in (min(found), max(found))))
            parts.append(f"{kind} with {100 * zeros:.0f} % zeros {extremes}")
    models = dict.fromkeys(row.model for row in done if row.batch == batch)
    return f"Speed-up over the dense model of the same type, {', '.join(models)}: {'; '.join(parts)}."


def tables(done: Sequence[Timing]) -> list[Section]:
    """Return one table per batch size."""
    header = ["model", "type", "zeros", "ms", "over dense fp32", "over dense of its type", "supported", "difference"]
    header.append("1.5x to 2.4x")
    sections = []
    for batch in sorted({row.batch for row in done}):
        rows = [
            [
                row.model,
                row.type,
                f"{100 * row.zeros:.0f} %",
                f"{row.ms:.1f}",
                f"{speedup(row, done, FLOAT):.2f}x",
                f"{speedup(row, done, row.type):.2f}x",
                f"{row.supported:.2f}",
                f"{row.difference:.1e}",
                compared(row, done),
            ]
            for row in done
            if row.batch == batch
        ]
        settings = {f"{row.runs} runs, threads: {row.threads}." for row in done if row.batch == batch}
        about = " ".join([*sorted(settings), ranges(batch, done)])
        sections.append(Section(f"Batch {batch}", about, header, rows))
    return sections


def result_rows(done: Sequence[Timing]) -> list[Row]:
    """Return times, speed-ups, supported fractions and differences."""
    rows = []
    for row in done:
        rows.append(Row(row.name, row.ms, "ms", runs=row.runs))
        rows += [
            Row(f"{row.name}: over dense {kind}", speedup(row, done, kind), "x", runs=row.runs)
            for kind in dict.fromkeys((FLOAT, row.type))
        ]
        supported = f"{row.name}: supported operators"
        rows.append(Row(supported, row.supported, "fraction", "1.0", row.supported == 1.0))
        rows.append(Row(f"{row.name}: difference of the logits", row.difference, "of the largest"))
    return rows


if __name__ == "__main__":
    main()
