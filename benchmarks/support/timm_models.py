"""Check which kinds of units 28 common and 20 further timm models support, on random weights, by `vitprune check`.

Each model runs in its own process with a time limit, and Torch-Pruning's generic recipe in another, if it is installed.
Writes benchmarks/results/coverage.json and docs/guides/models.md: per model and kind, proven, or refused with the
reason. Finished models are recorded in benchmarks/results/coverage-notes.jsonl and skipped; delete it to start over.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.lib.results import RESULTS, Row, write_results, write_table
from vitprune import find_groups, models
from vitprune.config.prune_config import KINDS
from vitprune.errors import BadInput
from vitprune.evaluation.check_model import check

ROOT = Path(__file__).parents[2]
MODELS = (
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "pvt_v2_b0",
    "xcit_nano_12_p16_224",
    "xcit_tiny_12_p16_224",
    "cait_xxs24_224",
    "levit_128s",
    "pit_ti_224",
    "tiny_vit_5m_224",
    "efficientformer_l1",
    "convit_tiny",
    "coat_tiny",
    "mvitv2_tiny",
    "twins_pcpvt_small",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "maxvit_pico_rw_256",
    "poolformer_s12",
    "efficientvit_b0",
    "convnext_atto",
    "resnet50",
)
FURTHER = (
    "caformer_s18",
    "coatnet_nano_rw_224",
    "convformer_s18",
    "crossvit_tiny_240",
    "davit_tiny",
    "edgenext_xx_small",
    "efficientformerv2_s0",
    "efficientvit_m0",
    "vit_small_patch16_rope_224",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "hiera_tiny_224",
    "mixer_s32_224",
    "nest_tiny",
    "nextvit_small",
    "repvit_m0_9",
    "swinv2_cr_tiny_224",
    "visformer_tiny",
    "volo_d1_224",
)
SECONDS = 5.0  # for finding all groups of a model
TITLE = "Supported models"
ABOUT = """\
Written by `python -m benchmarks.support.timm_models`. Rows: timm models with random weights, in float64. Columns:
kinds of [units](../concepts/groups.md). In every group about {removed} of the units are removed, an odd number (for
block: whole blocks). **proven**: the logits equal those of literal removal (difference below 1e-10 of the largest
logit), parameters and MACs decrease by the amounts that the groups state, gradients are finite, and the model is the
same after saving and loading. **refused** N: not supported, for reason N below. The last column: Torch-Pruning with
magnitude importance, 30 % of the channels, the classifier ignored, heads given for layers named qkv; its
documentation says that some models need settings of their own. Exit code -9: the process ran out of memory
({memory:.0f} GiB for everything on this machine)."""


def main() -> None:
    """Check every model in its own process and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three models, not written into the documents")
    parser.add_argument("--ratios", default="0.25,0.5,0.75", help="fractions of units to remove; default: %(default)s")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one model; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="models checked in parallel; default: %(default)s")
    parser.add_argument("--model", help="check only this model and print the result as JSON")
    options = parser.parse_args()
    ratios = [float(ratio) for ratio in options.ratios.split(",")]
    if options.model:
        print(json.dumps(worker(options.model, ratios)))
        return
    notes = RESULTS / "coverage-notes.jsonl"
    known = (
        [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() and not options.quick else []
    )
    done = {one["model"]: one for one in known if one["ratios"] == options.ratios}
    names = MODELS[:3] if options.quick else MODELS + FURTHER
    remaining = [name for name in names if name not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda name: _run_workers(name, options.ratios, options.limit), remaining)
        for name, one in zip(remaining, results, strict=True):
            done[name] = one
            if not options.quick:
                with notes.open("a") as file:
                    file.write(json.dumps(one | {"model": name, "ratios": options.ratios}) + "\n")
            print(name, one, flush=True)
    results = {name: done[name] for name in names}
    rows = [row for name, one in results.items() for row in _rows(name, one)]
    if not options.quick:
        _document(results, options.ratios)
    write_results("coverage", rows, options.quick)


def _rows(name: str, result: dict) -> list[Row]:
    """Return the rows of one model, with the bounds promised for the common models."""
    verdicts = result["cells"]
    proven = [kind for kind, verdict in verdicts.items() if verdict == "proven"]
    failed = [kind for kind, verdict in verdicts.items() if verdict.startswith("failed")]
    promised = name in MODELS
    holds = {"ffn", "weight"} <= set(proven) and not failed if promised else not failed
    bound = "ffn, weight; none fails" if promised else "none fails"
    return [
        Row(f"{name}: kinds proven", len(proven), "kinds", bound, holds),
        Row(f"{name}: largest difference", result["difference"], "of the largest logit"),
        Row(f"{name}: groups found", result["seconds"], "s", "<= 5 s", result["seconds"] <= SECONDS),
    ]


def worker(name: str, ratios: list[float]) -> dict[str, object]:
    """Return the verdict per kind, the largest difference, and the seconds for finding all groups."""
    torch.set_num_threads(1)
    model = models.create(name)
    start = time.process_time()  # CPU time: other processes do not count
    for kind in KINDS:
        try:
            find_groups(model, [kind])
        except BadInput:
            continue
    seconds = time.process_time() - start
    cells: dict[str, str] = {}
    largest = 0.0
    for row in check(name, KINDS, ratios):
        if row.verdict != "proven" or row.kind not in cells:
            cells[row.kind] = row.verdict if row.verdict == "proven" else f"{row.verdict}: {row.why}"
        largest = max(largest, row.proof.difference if row.proof else 0.0)
    return {"cells": cells, "difference": largest, "seconds": seconds}


def _run_workers(name: str, ratios: str, limit: int) -> dict:
    """Return the results of vitprune and of Torch-Pruning for a model."""
    ours = _run_worker(["-m", "benchmarks.support.timm_models", "--model", name, "--ratios", ratios], limit)
    if isinstance(ours, str):
        ours = {"cells": dict.fromkeys(KINDS, f"failed: {ours}"), "difference": float("nan"), "seconds": float("nan")}
    theirs = _run_worker(["-m", "benchmarks.lib.torch_pruning_generic", name], limit)
    return ours | {"peer": theirs}


def _run_worker(command: list[str], limit: int) -> Any:
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=limit, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"not finished in {limit} s"
    except subprocess.CalledProcessError as error:
        return f"ends with exit code {error.returncode}"
    except json.JSONDecodeError:
        return "-"


def _document(results: dict[str, dict], ratios: str) -> None:
    reasons: dict[str, int] = {}
    table = []
    for name, model in results.items():
        shown = []
        for kind in KINDS:
            verdict = model["cells"][kind]
            number = reasons.setdefault(verdict, len(reasons) + 1) if verdict != "proven" else 0
            shown.append(f"{verdict.partition(':')[0]} {number}" if number else "proven")
        table.append([f"`{name}`", *shown, f"{model['seconds']:.1f}", model["peer"]])
    path, memory = ROOT / "docs/guides/models.md", psutil.virtual_memory().total / 2**30
    columns = ["model", *KINDS, "time to find all groups, s", "Torch-Pruning's generic recipe"]
    write_table(path, TITLE, ABOUT.format(removed=ratios.replace(",", ", "), memory=memory), columns, table)
    listed = [f"{number}. {why.partition(': ')[2]}" for why, number in reasons.items()]
    path.write_text(path.read_text() + "\n" + "\n".join(listed) + "\n")


if __name__ == "__main__":
    main()
