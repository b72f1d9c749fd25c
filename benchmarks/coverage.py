"""Which kinds of group each of 28 common timm models can lose, proven on random weights as `vitprune check` proves it.

Each model runs in a process of its own with a time limit. Writes benchmarks/results/coverage.json and docs/models.md:
per model and kind, proven, or refused with the reason that the library gives.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import Row, write_results, write_table

from vitprune import find_groups, models
from vitprune.check import check
from vitprune.errors import BadInput
from vitprune.groups import KINDS

if __name__ != "__main__":  # numba asks for a package of this name, and benchmarks/ is where scripts look first
    raise ImportError("benchmarks/coverage.py is a script; run it")
ROOT = Path(__file__).parent.parent
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
SECONDS = 5.0  # for finding all groups of a model
TITLE = "What each model can lose"
ABOUT = """Written by benchmarks/coverage.py. Random weights in float64; of every group about {removed} of the units are
removed, and an odd number is left (block: whole blocks).
Proven: what is cut out leaves the logits of the literal removal (difference below 1e-10 of the largest logit),
parameters and MACs fall by what the groups promise, gradients are finite, and the model is the same from a file. A
number is a reason below."""


def main() -> None:
    """Prove every model in a process of its own and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three models, not written into the documents")
    parser.add_argument("--ratios", default="0.25,0.5,0.75", help="shares of units to remove; default: %(default)s")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one model; default: %(default)s")
    parser.add_argument("--model", help="prove this model alone and print its rows as JSON")
    given = parser.parse_args()
    ratios = [float(ratio) for ratio in given.ratios.split(",")]
    if given.model:
        print(json.dumps(worker(given.model, ratios)))
        return
    rows: list[Row] = []
    cells: dict[str, dict[str, str]] = {}
    for name in MODELS[:3] if given.quick else MODELS:
        found = _apart(name, given.ratios, given.limit)
        cells[name] = found["cells"]
        proven = sum(cell == "proven" for cell in cells[name].values())
        failed = [f"{kind} {cell}" for kind, cell in cells[name].items() if cell.startswith("failed")]
        needed = {"ffn", "weight"} <= {kind for kind, cell in cells[name].items() if cell == "proven"}
        rows.append(Row(f"{name}: kinds proven", proven, "kinds", "ffn, weight; none fails", needed and not failed))
        rows.append(Row(f"{name}: largest difference", found["difference"], "of the largest logit"))
        rows.append(Row(f"{name}: groups found", found["seconds"], "s", "<= 5 s", found["seconds"] <= SECONDS))
        print(name, cells[name], f"{found['seconds']:.2f} s", flush=True)
    if not given.quick:
        _document(cells, given.ratios)
    write_results("coverage", rows, given.quick)


def worker(name: str, ratios: list[float]) -> dict[str, object]:
    """Verdict per kind, the largest difference of all proofs, and the seconds that finding all groups took."""
    torch.set_num_threads(1)
    start, model = 0.0, models.create(name)
    start = time.perf_counter()
    for kind in KINDS:
        try:
            find_groups(model, [kind])
        except BadInput:
            continue
    seconds = time.perf_counter() - start
    cells: dict[str, str] = {}
    largest = 0.0
    for row in check(name, KINDS, ratios):
        if row.verdict != "proven" or row.kind not in cells:
            cells[row.kind] = row.verdict if row.verdict == "proven" else f"{row.verdict}: {row.why}"
        largest = max(largest, row.proof.difference if row.proof else 0.0)
    return {"cells": cells, "difference": largest, "seconds": seconds}


def _apart(name: str, ratios: str, limit: int) -> dict:
    command = [sys.executable, __file__, "--model", name, "--ratios", ratios]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        why = f"failed: {type(error).__name__}"
        return {"cells": dict.fromkeys(KINDS, why), "difference": float("nan"), "seconds": float("nan")}
    return json.loads(done.stdout.splitlines()[-1])


def _document(cells: dict[str, dict[str, str]], ratios: str) -> None:
    reasons: dict[str, int] = {}
    table = []
    for name, verdicts in cells.items():
        shown = []
        for kind in KINDS:
            verdict = verdicts[kind]
            number = reasons.setdefault(verdict, len(reasons) + 1) if verdict != "proven" else 0
            shown.append(f"{verdict.partition(':')[0]} {number}" if number else "proven")
        table.append([f"`{name}`", *shown])
    path = ROOT / "docs/models.md"
    write_table(path, TITLE, ABOUT.format(removed=ratios.replace(",", ", ")), ["model", *KINDS], table)
    listed = [f"{number}. {why.partition(': ')[2]}" for why, number in reasons.items()]
    path.write_text(path.read_text() + "\n" + "\n".join(listed) + "\n")


if __name__ == "__main__":
    main()
