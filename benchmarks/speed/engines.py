"""Latency of pruned models in five engines, compared with the reduction of their MACs.

DeiT-Tiny, -S, -B and Swin-T with random weights, on which speed does not depend, dense and pruned to 0.7, 0.5 and 0.35x
MACs by `channel-magnitude` with `round_to: {ffn: 32, attention: 8}`, and to 0.5x MACs without `round_to`; 224 x 224
pixels, batches of 1 and 32. *Whole heads*: heads are removed instead of channels of heads. The dense and all pruned
models of a row run alternately in one process, so that other load affects all of them equally; times are medians.
*Efficiency* is the speed-up divided by the factor by which the MACs decrease: 1 if the latency decreases by the same
factor. onnxruntime and OpenVINO run the ONNX export; OpenVINO computes in its default precision, bfloat16 on processors
that have it. ExecuTorch runs the exported program, with XNNPACK as far as it supports the operations; the first
measurement installs it into .venv-peers. The second part prunes all FFNs, or all heads, of a DeiT-S of four blocks to
widths that are a multiple of 1, 2, 4, ... but of no higher power of two, and compares the time per MAC, except in
ExecuTorch; the smallest multiple within 3 % of the best is the value for `round_to`. Rows are recorded in
benchmarks/results/engines-notes.jsonl, so that an interrupted benchmark continues; delete the file to start over.
Estimated from the number of operations, all rows take one to two hours on two otherwise idle cores; rows that were not
measured are missing. Writes benchmarks/results/engines.json and docs/results/engines.md.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.lib.peer_environments import ENVIRONMENTS, run_script
from benchmarks.lib.results import Recorded, Row, Section, arguments, write_results, write_sections
from vitprune import count, find_groups, prune, shrink
from vitprune.evaluation.engines import check_engine, forward_call
from vitprune.evaluation.latency import alternating_times
from vitprune.models.export_check import BOUND

ROOT = Path(__file__).parents[2]
MODELS = {
    "DeiT-Tiny": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
}
EXECUTORCH, EXECUTORCH_SECONDS = "ExecuTorch", 3600.0
ENGINES = {"onnxruntime": "ort", "OpenVINO": "openvino", "torch": "torch", "torch.compile": "torch"}
ALL_ENGINES = (*ENGINES, EXECUTORCH)
ROUND_TO = {"ffn": 32, "attention": 8}
DENSE, UNROUNDED, HEADS = "1.0x MACs", "0.5x MACs, not rounded", "0.5x MACs, whole heads"
NOTES = {UNROUNDED: " (not rounded)", HEADS: " (whole heads)"}
TARGETS: dict[str, tuple[float, Any]] = {
    "0.7x MACs": (0.7, ROUND_TO),
    "0.5x MACs": (0.5, ROUND_TO),
    "0.35x MACs": (0.35, ROUND_TO),
    UNROUNDED: (0.5, None),
    HEADS: (0.5, {"ffn": 32}),
}
RUNS = {1: 50, 32: 7}
MULTIPLES = {"ffn": (1, 2, 4, 8, 16, 32, 64), "attention": (1, 2, 4, 8, 16)}
MIDDLE = {"ffn": 768, "attention": 32}  # widths near which the multiples lie
TOLERANCE = 0.03  # of the time per MAC


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one model in one engine, and its MACs as a fraction of the dense model's."""

    model: str
    variant: str
    batch: int
    engine: str
    macs: float
    ms: float

    @property
    def cell(self) -> tuple[str, int, str]:
        """The models that ran alternately: model, batch, engine."""
        return self.model, self.batch, self.engine


def main() -> None:
    """Measure what is missing and write the tables."""
    options = arguments(
        __doc__,
        {
            "threads": (2, "threads of one process"),
            "models": (",".join(MODELS), "models"),
            "batches": ("1,32", "images per batch"),
            "engines": (",".join(ALL_ENGINES), "engines"),
        },
    )
    torch.set_num_threads(options.threads)
    engines = options.engines.split(",")
    if unknown := set(engines) - set(ALL_ENGINES):
        sys.exit(f"--engines: unknown: {', '.join(sorted(unknown))}; use {', '.join(ALL_ENGINES)}")
    for engine in engines:
        check_engine(ENGINES.get(engine, "torch"))
    batches = [int(batch) for batch in options.batches.split(",")]
    models, targets, multiples = options.models.split(","), TARGETS, MULTIPLES
    if options.quick:
        models, batches, targets, multiples = ["DeiT-Tiny"], [1], {"0.5x MACs": TARGETS["0.5x MACs"]}, {"ffn": (1, 32)}
        if not (ENVIRONMENTS / "executorch").exists():
            engines = [engine for engine in engines if engine != EXECUTORCH]
    done = Recorded("engines", Timing, options.quick)
    for rows in measured(models, batches, engines, targets, multiples, done, options.quick):
        done.record(*rows)
    if not options.quick:
        write_sections(ROOT / "docs/results/engines.md", "Pruned models in engines", __doc__ or "", sections(done))
    write_results("engines", result_rows(done), options.quick)


def measured(
    models: Sequence[str],
    batches: Sequence[int],
    engines: Sequence[str],
    targets: Mapping[str, tuple[float, Any]],
    multiples: Mapping[str, Sequence[int]],
    done: Sequence[Timing],
    quick: bool,
) -> Iterator[list[Timing]]:
    """Measure every cell that is not among the rows of an earlier run."""
    known = {row.cell for row in done}
    for name in models:
        missing = [(batch, engine) for batch in batches for engine in engines if (name, batch, engine) not in known]
        if missing:
            variants = pruned_models(name, targets, {"depth": 2} if quick else {})
            for batch, engine in missing:
                yield times(name, variants, batch, engine, 5 if quick else RUNS[batch])
    for kind, values in multiples.items():
        label = f"width, {kind}"
        missing_engines = [
            engine
            for engine in engines[: 1 if quick else None]
            if engine in ENGINES and (label, 1, engine) not in known
        ]
        variants = widths(kind, values, 1 if quick else 4) if missing_engines else {}
        for engine in missing_engines:
            yield times(label, variants, 1, engine, 5 if quick else 2 * RUNS[1])


def pruned_models(name: str, targets: Mapping[str, tuple[float, Any]], args: Mapping[str, int]) -> dict[str, nn.Module]:
    """Return the dense and the pruned models by variant."""
    torch.manual_seed(0)
    dense = timm.create_model(MODELS[name], **args).eval()
    variants = {DENSE: dense}
    for variant, (macs, round_to) in targets.items():
        kinds = ["ffn", "head" if variant == HEADS else "attention"]
        settings = {"target": {"macs": macs}, "kinds": kinds, "round_to": round_to}
        variants[variant] = prune(dense, "channel-magnitude", **settings).model.eval()
    return variants


def widths(kind: str, multiples: Sequence[int], blocks: int) -> dict[str, nn.Module]:
    """Return a DeiT-S of few blocks, dense and with two widths per multiple, which no higher power of two divides."""
    torch.manual_seed(0)
    variants = {DENSE: timm.create_model(MODELS["DeiT-S"], depth=blocks).eval()}
    for multiple in multiples:
        for width in (MIDDLE[kind] - multiple, MIDDLE[kind] + multiple):
            model = timm.create_model(MODELS["DeiT-S"], depth=blocks)
            groups = find_groups(model, [kind])
            masks = {group.name: torch.arange(group.shape[-1]).expand(group.shape) < width for group in groups}
            variants[f"{multiple}: {width}"] = shrink(model, groups, masks).eval()
    return variants


def times(name: str, variants: Mapping[str, nn.Module], batch: int, engine: str, runs: int) -> list[Timing]:
    """Measure the variants of a model alternately in one engine."""
    images = torch.randn(batch, 3, 224, 224)
    if engine == EXECUTORCH:
        milliseconds = executorch_times(variants, images, runs)
    else:
        models = [torch.compile(model) if engine == "torch.compile" else model for model in variants.values()]
        durations = alternating_times([forward_call(model, ENGINES[engine], images) for model in models], runs)
        milliseconds = [median(row) for row in durations]
    macs = [count(model, images[:1]).macs for model in variants.values()]
    return [
        Timing(name, variant, batch, engine, number / macs[0], ms)
        for variant, number, ms in zip(variants, macs, milliseconds, strict=True)
    ]


def executorch_times(variants: Mapping[str, nn.Module], images: Tensor, runs: int) -> list[float]:
    """Return the median milliseconds of the variants in ExecuTorch; the logits are compared with those of torch."""
    expected: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(temporary)
        save_file({"images": images}, folder / "images.safetensors")
        for number, model in enumerate(variants.values()):
            torch.export.save(torch.export.export(model, (images,)), folder / f"{number}.pt2")
            expected[str(number)] = model(images)
        spec = {"models": list(expected), "threads": torch.get_num_threads(), "runs": runs}
        result = run_script(folder, "executorch", "executorch_latency", spec, EXECUTORCH_SECONDS)
        if isinstance(result, str):
            sys.exit(f"ExecuTorch: {result}")
        for name, logits in load_file(folder / "logits.safetensors").items():
            difference = float((logits - expected[name]).abs().max() / expected[name].abs().max())
            if not difference <= BOUND["float32"]:
                sys.exit(f"ExecuTorch: the logits differ by {difference:.2g} of the largest")
        return [result["models"][name]["ms"] for name in expected]


def speedups(done: Sequence[Timing]) -> Iterator[tuple[Timing, float, float]]:
    """Return every pruned model with its speed-up and the speed-up divided by the reduction of the MACs."""
    dense = {row.cell: row.ms for row in done if row.variant == DENSE}
    for row in done:
        if row.variant != DENSE and row.model in MODELS:
            speedup = dense[row.cell] / row.ms
            yield row, speedup, speedup * row.macs


def per_mac(done: Sequence[Timing]) -> dict[tuple[str, str], dict[int, float]]:
    """Return by kind and engine: by multiple the time per MAC, as a multiple of the dense model's."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    dense = {row.cell: row.ms for row in done if row.variant == DENSE}
    for row in done:
        if row.model not in MODELS and row.variant != DENSE:
            multiple = int(row.variant.partition(":")[0])
            by_multiple = found.setdefault((row.model.removeprefix("width, "), row.engine), {})
            by_multiple.setdefault(multiple, []).append(row.ms / dense[row.cell] / row.macs)
    return {key: {multiple: mean(ratios) for multiple, ratios in row.items()} for key, row in found.items()}


def suggested(by_multiple: Mapping[int, float]) -> int:
    """Return the smallest multiple whose time per MAC is within the tolerance of the best."""
    best = min(by_multiple.values())
    return min(multiple for multiple, ratio in by_multiple.items() if ratio <= (1 + TOLERANCE) * best)


def sections(done: Sequence[Timing]) -> list[Section]:
    """Return one table per engine, and the tables of widths."""
    header = ["model", "batch", "MACs", "dense, ms", "pruned, ms", "speed-up", "efficiency"]
    tables = []
    for engine in ALL_ENGINES:
        rows = []
        for row, speedup, efficiency in speedups([row for row in done if row.engine == engine]):
            dense = row.ms * speedup
            cells = [
                row.model,
                str(row.batch),
                f"{row.macs:.2f}x{NOTES.get(row.variant, '')}",
                f"{dense:.2f}",
                f"{row.ms:.2f}",
            ]
            rows.append([*cells, f"{speedup:.2f}x", f"{efficiency:.2f}"])
        if rows:
            tables.append(Section(engine, "", header, rows))
    for kind, multiples in MULTIPLES.items():
        lines = [
            [engine, *(f"{ratios[m]:.2f}" if m in ratios else "-" for m in multiples), str(suggested(ratios))]
            for (of_kind, engine), ratios in per_mac(done).items()
            if of_kind == kind
        ]
        about = "Time per MAC, as a multiple of the dense model's, by the largest power of two that divides the width."
        if lines:
            heading = f"Widths of {'FFNs' if kind == 'ffn' else 'heads'}"
            tables.append(
                Section(heading, about, ["engine", *map(str, multiples), f"`round_to: {{{kind}: ...}}`"], lines)
            )
    return tables


def result_rows(done: Sequence[Timing]) -> list[Row]:
    """Return times, speed-ups, efficiencies, time per MAC by multiple, and the suggested multiples."""
    rows = []
    for timing in done:
        name = f"{timing.model}, {timing.variant}, batch {timing.batch}, {timing.engine}"
        rows.append(Row(name, timing.ms, "ms"))
    for timing, speedup, efficiency in speedups(done):
        name = f"{timing.model}, {timing.variant}, batch {timing.batch}, {timing.engine}"
        rows += [Row(f"{name}, speed-up", speedup, "x"), Row(f"{name}, efficiency", efficiency, "of the MACs saved")]
    for (kind, engine), ratios in per_mac(done).items():
        for multiple, ratio in ratios.items():
            rows.append(Row(f"{kind}, multiple of {multiple}, {engine}, time per MAC", ratio, "of the dense model's"))
        rows.append(Row(f"round_to, {kind}, {engine}", suggested(ratios), "units"))
    return rows


if __name__ == "__main__":
    main()
