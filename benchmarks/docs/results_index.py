"""Write the tables of docs/results/index.md: what each page measures, its command, date and duration.

Date, machine and duration are those of benchmarks/results/NAME.json; nothing is measured here. `--check` writes nothing
and exits with 1 if the page differs from the results.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from benchmarks.docs.readme_table import ROOT

PAGE = ROOT / "docs/results/index.md"
BEGIN, END = "<!-- benchmarks/docs/results_index.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Measured:
    """A page of results: its path from docs/results, the module that writes it, its results file, and its question."""

    page: str
    module: str
    results: str
    question: str

    def row(self) -> str:
        """Return the row of the page."""
        facts, name = self.facts(), self.page.rpartition("/")[2].removesuffix(".md")
        cells = [f"[{name}]({self.page})", self.question, f"`{self.module}`", facts["date"], facts["duration"]]
        return f"| {' | '.join(cells)} |"

    def facts(self) -> Mapping[str, str]:
        """Return date, machine and duration of the newest row."""
        rows: list[dict[str, Any]] = json.loads(
            (ROOT / f"benchmarks/results/{self.results}.json").read_text(encoding="utf-8")
        )
        newest = max(rows, key=lambda row: row["date"])
        seconds = newest.get("run_seconds")
        return {
            "date": newest["date"],
            "machine": newest["machine"],
            "duration": "-" if seconds is None else f"{max(1, round(seconds / 60))} min",
        }


SECTIONS: dict[str, tuple[Measured, ...]] = {
    "Accuracy": (
        Measured(
            "demo.md", "accuracy.demo_digits", "demo", "the digits demo at less than half of the MACs, three seeds"
        ),
        Measured(
            "oneshot.md",
            "accuracy.unstructured_oneshot",
            "oneshot",
            "all methods for single weights, several sparsities and 2:4, without training",
        ),
        Measured(
            "structured.md", "accuracy.structured_oneshot", "structured", "all methods for units, without training"
        ),
        Measured(
            "rotation.md",
            "accuracy.residual_rotation",
            "rotation",
            "residual channels removed after a rotation of the stream, without training",
        ),
        Measured(
            "label_free.md",
            "accuracy.label_free",
            "label_free",
            "pruning by 200 images without labels, with and without reconstruction",
        ),
        Measured(
            "classes.md",
            "accuracy.classes",
            "classes",
            "ten of 1,000 classes at 0.5x and 0.35x MACs, with and without `prune.classes`",
        ),
        Measured(
            "token_merging.md",
            "accuracy.token_merging",
            "token_merging",
            "fewer tokens, alone and with fewer units, without training",
        ),
        Measured(
            "saliency.md", "accuracy.saliency", "saliency", "the backbone of a saliency network, pruned without labels"
        ),
        Measured("peers.md", "accuracy.torch_pruning", "peers", "Torch-Pruning's best settings on the same images"),
        Measured(
            "sparsifiers.md",
            "accuracy.sparsifiers",
            "sparsifiers",
            "SparseGPT, Wanda and magnitude of five other libraries on the same images",
        ),
        Measured(
            "stacked.md",
            "accuracy.structured_then_unstructured",
            "stacked",
            "units first, then weights of the smaller model",
        ),
        Measured(
            "gradual.md",
            "accuracy.gradual",
            "gradual",
            "50 to 90 % zeros in five steps with training; two learning-rate schedules",
        ),
        Measured(
            "recovery.md",
            "accuracy.recovery",
            "recovery",
            "vitprune and Torch-Pruning at 0.5x MACs after the same distillation",
        ),
        Measured(
            "dimap.md", "accuracy.dimap_swin", "dimap", "DIMAP's table 1 on Swin, nominal and mask-weighted FLOPs"
        ),
        Measured("int8.md", "accuracy.int8_ptq", "int8", "INT8 after pruning, by calibration method"),
        Measured(
            "int8_training.md",
            "accuracy.int8_qat",
            "int8_training",
            "INT8 with and without quantization-aware training",
        ),
        Measured(
            "language.md",
            "accuracy.language_model",
            "language",
            "a small causal language model, pruned and distilled by the same code",
        ),
    ),
    "Cost and speed": (
        Measured("targets.md", "accuracy.cost_targets", "targets", "cost targets and reached costs"),
        Measured(
            "latency_table.md",
            "accuracy.latency_table",
            "latency_table",
            "latency targets by a table of measured group times, compared with a ranking per MAC",
        ),
        Measured(
            "allocation.md",
            "accuracy.allocation",
            "allocation",
            "widths found by a search on held-out images, compared with the ranking",
        ),
        Measured(
            "one_shot_time.md",
            "speed.one_shot_time",
            "one_shot_time",
            "pruning without training: time and memory by model size",
        ),
        Measured(
            "obc_speed.md",
            "speed.obc_phases",
            "obc_speed",
            "phases of obc compared with exact elimination and one Cholesky factor per row: time and memory",
        ),
        Measured(
            "kl_scoring.md",
            "speed.kl_scoring",
            "kl_scoring",
            "KL scores compared with leave-one-out removal: time and agreement",
        ),
        Measured(
            "obs.md",
            "speed.obs_elimination",
            "obs",
            "second-order pruning of one layer compared with the equations as written: time",
        ),
        Measured(
            "training.md",
            "speed.training_throughput",
            "training",
            "throughput and memory of training with a teacher, compared with a plain loop",
        ),
        Measured(
            "sparse_engine.md",
            "speed.openvino_sparse",
            "sparse_engine",
            "do zeros make inference faster? OpenVINO and CSR",
        ),
        Measured(
            "deepsparse.md",
            "speed.deepsparse_engine",
            "deepsparse",
            "do zeros make inference faster? DeepSparse, fp32 and INT8",
        ),
        Measured(
            "engines.md",
            "speed.engines",
            "engines",
            "pruned models in onnxruntime, OpenVINO, torch, torch.compile and ExecuTorch: latency and speed-up",
        ),
    ),
    "Support": (
        Measured(
            "../guides/models.md",
            "support.timm_models",
            "coverage",
            "supported kinds of units of timm models, compared with Torch-Pruning's generic recipe",
        ),
        Measured(
            "other_models.md",
            "support.other_models",
            "other_models",
            "supported kinds of units of models of transformers, torchvision and open_clip",
        ),
        Measured(
            "prunable.md",
            "support.prunable_weights",
            "prunable",
            "number of prunable single weights per model family",
        ),
    ),
    "Reliability": (
        Measured(
            "equality.md",
            "reliability.multi_process",
            "equality",
            "one, two and four processes: differences of scores and weights",
        ),
        Measured(
            "faults.md",
            "reliability.kill_and_resume",
            "faults",
            "`prune` and `distill` killed at random moments: are the results identical?",
        ),
        Measured(
            "drill.md",
            "reliability.fault_injection",
            "drill",
            "fault injection: worker, flow, servers, remote or disk fail in each stage",
        ),
        Measured(
            "fleet.md",
            "reliability.concurrent_flows",
            "fleet",
            "four concurrent runs; overhead of Prefect, DVC and MLflow",
        ),
        Measured(
            "audit.md",
            "reliability.audit_tampering",
            "audit",
            "ways to tamper with a run, by level of the audit, and honest runs",
        ),
    ),
}


def tables() -> Iterator[str]:
    """Return the tables; a page that was not measured yet is left out."""
    machines = {}
    for heading, pages in SECTIONS.items():
        yield f"## {heading}\n"
        yield "| page | question | `python -m benchmarks.` | date | full form |\n| --- | --- | --- | --- | --- |"
        for page in pages:
            if (ROOT / f"benchmarks/results/{page.results}.json").exists():
                machines[page.facts()["machine"]] = None
                yield page.row()
        yield ""
    yield f"Machine: {'; '.join(machines)}."


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", "--quick", action="store_true", help="write nothing")
    missing = [
        page.module for pages in SECTIONS.values() for page in pages if not find_spec(f"benchmarks.{page.module}")
    ]
    if missing:
        sys.exit(f"benchmarks/docs/results_index.py: no such module: {', '.join(missing)}")
    before = PAGE.read_text(encoding="utf-8")
    text = "\n".join(tables())
    now = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n\n{text}\n\n{END}", before, flags=re.DOTALL)
    if parser.parse_args().check:
        sys.exit(f"{PAGE}: run python -m benchmarks.docs.results_index" if now != before else 0)
    PAGE.write_text(now, encoding="utf-8")


if __name__ == "__main__":
    main()
