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
    """Prove every model in a process of its own and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three models, not written into the documents")
    parser.add_argument("--ratios", default="0.25,0.5,0.75", help="shares of units to remove; default: %(default)s")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one model; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="models at once; default: %(default)s")
    parser.add_argument("--model", help="prove this model alone and print its rows as JSON")
    given = parser.parse_args()
    ratios = [float(ratio) for ratio in given.ratios.split(",")]
    if given.model:
        print(json.dumps(worker(given.model, ratios)))
        return
    notes = RESULTS / "coverage-notes.jsonl"
    known = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() and not given.quick else []
    done = {one["model"]: one for one in known if one["ratios"] == given.ratios}
    names = MODELS[:3] if given.quick else MODELS + FURTHER
    waiting = [name for name in names if name not in done]
    with ThreadPoolExecutor(given.jobs) as pool:
        answers = pool.map(lambda name: _apart(name, given.ratios, given.limit), waiting)
        for name, one in zip(waiting, answers, strict=True):
            done[name] = one
            if not given.quick:
                with notes.open("a") as file:
                    file.write(json.dumps(one | {"model": name, "ratios": given.ratios}) + "\n")
            print(name, one, flush=True)
    found = {name: done[name] for name in names}
    rows = [row for name, one in found.items() for row in _rows(name, one)]
    if not given.quick:
        _document(found, given.ratios)
    write_results("coverage", rows, given.quick)


def _rows(name: str, found: dict) -> list[Row]:
    """The figures of one model; of the common ones, what is promised of them."""
    verdicts = found["cells"]
    proven = [kind for kind, verdict in verdicts.items() if verdict == "proven"]
    failed = [kind for kind, verdict in verdicts.items() if verdict.startswith("failed")]
    promised = name in MODELS
    held = {"ffn", "weight"} <= set(proven) and not failed if promised else not failed
    wanted = "ffn, weight; none fails" if promised else "none fails"
    return [
        Row(f"{name}: kinds proven", len(proven), "kinds", wanted, held),
        Row(f"{name}: largest difference", found["difference"], "of the largest logit"),
        Row(f"{name}: groups found", found["seconds"], "s", "<= 5 s", found["seconds"] <= SECONDS),
    ]


def worker(name: str, ratios: list[float]) -> dict[str, object]:
    """Verdict per kind, the largest difference of all proofs, and the seconds that finding all groups took."""
    torch.set_num_threads(1)
    model = models.create(name)
    start = time.process_time()  # of one thread: what else runs here does not count
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


def _apart(name: str, ratios: str, limit: int) -> dict:
    """What the workers of both sides say of a model."""
    own = _said(["-m", "benchmarks.support.timm_models", "--model", name, "--ratios", ratios], limit)
    if isinstance(own, str):
        own = {"cells": dict.fromkeys(KINDS, f"failed: {own}"), "difference": float("nan"), "seconds": float("nan")}
    theirs = _said(["-m", "benchmarks.lib.torch_pruning_generic", name], limit)
    return own | {"peer": theirs}


def _said(command: list[str], limit: int) -> Any:
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=limit, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"not done in {limit} s"
    except subprocess.CalledProcessError as error:
        return f"ends with exit code {error.returncode}"
    except json.JSONDecodeError:
        return "-"


def _document(found: dict[str, dict], ratios: str) -> None:
    reasons: dict[str, int] = {}
    table = []
    for name, model in found.items():
        shown = []
        for kind in KINDS:
            verdict = model["cells"][kind]
            number = reasons.setdefault(verdict, len(reasons) + 1) if verdict != "proven" else 0
            shown.append(f"{verdict.partition(':')[0]} {number}" if number else "proven")
        table.append([f"`{name}`", *shown, f"{model['seconds']:.1f}", model["peer"]])
    path, memory = ROOT / "docs/guides/models.md", psutil.virtual_memory().total / 2**30
    columns = ["model", *KINDS, "all groups found in, s", "Torch-Pruning's generic recipe"]
    write_table(path, TITLE, ABOUT.format(removed=ratios.replace(",", ", "), memory=memory), columns, table)
    listed = [f"{number}. {why.partition(': ')[2]}" for why, number in reasons.items()]
    path.write_text(path.read_text() + "\n" + "\n".join(listed) + "\n")


if __name__ == "__main__":
    main()
