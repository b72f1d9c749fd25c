"""Compare the masks and the accuracy of DeiT-Tiny with those of an earlier revision, bit by bit.

Four methods on real weights and images, one thread, settings fixed here. golden_masks_reference.json has the SHA-256
of the masks and the top-1 at revision ee30bbd. Another CPU may round differently: there, record the reference with the
older revision first (`--record yes`).
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.deit_tiny import Entry, Goal, Setup, corrected, setup
from benchmarks.lib.results import Row, arguments, write_results
from vitprune import ScoreConfig, plan_for
from vitprune.evaluation.accuracy import accuracy
from vitprune.pruning.prune_cycles import prune_cycles

REFERENCE = Path(__file__).with_name("golden_masks_reference.json")
SETTINGS = ScoreConfig(memory_mb=4096, damping=4e-6, fisher_directions=8)
CASES = {
    "obc, 50 % of weights": (Entry("obc", correction=True), Goal("", {"weight": 0.5})),
    "ovit, 50 % of weights": (Entry("ovit"), Goal("", {"weight": 0.5})),
    "unit-obs, 0.5x MACs": (Entry("unit-obs", correction=True), Goal("", macs=0.5)),
    "upvits-fisher, 50 % of FFN": (Entry("upvits-fisher"), Goal("", {"ffn": 0.5})),
}
QUICK = ("upvits-fisher, 50 % of FFN",)


def main() -> None:
    """Prune, compare with the reference, or record it."""
    options = arguments(__doc__, {"record": ("no", "yes: write the reference instead of comparing with it")})
    case = setup()
    results = {name: measure(case, *CASES[name]) for name in (QUICK if options.quick else CASES)}
    if options.record == "yes":
        REFERENCE.write_text(json.dumps(results, indent=2) + "\n")
    reference = json.loads(REFERENCE.read_text())
    rows = []
    for name, now in results.items():
        before = reference[name]
        rows.append(
            Row(
                f"{name}: masks",
                float(now["masks"] == before["masks"]),
                "identical",
                "1",
                now["masks"] == before["masks"],
            )
        )
        rows += [
            Row(f"{name}: {key}", now[key], "top-1 %", f"{before[key]:.2f}", now[key] == before[key])
            for key in ("top1", "corrected")
            if before[key] is not None
        ]
    write_results("golden_masks", rows, options.quick)


def measure(case: Setup, entry: Entry, goal: Goal) -> dict[str, Any]:
    """Prune once; return the digest of the masks, and top-1 before and after the correction of norms."""
    model, config = copy.deepcopy(case.dense), entry.config(goal)
    if config is None:
        raise ValueError(f"{entry.method} cannot prune {', '.join(goal.kinds)}")
    (cycle,) = prune_cycles(model, plan_for(config, SETTINGS), case.calibration)
    top1 = accuracy(model, case.held_out)[0]["top1"]
    after = accuracy(corrected(case, model), case.held_out)[0]["top1"] if entry.correction else None
    result = {"masks": digest(dict(cycle.masks)), "top1": top1, "corrected": after}
    print(entry.method, result, flush=True)
    return result


def digest(masks: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and values of masks."""
    total = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        total.update(f"{name} {tuple(mask.shape)}\n".encode())
        total.update(mask.to("cpu", torch.uint8).contiguous().numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()
