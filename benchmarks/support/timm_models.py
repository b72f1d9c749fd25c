"""Check which kinds of units timm's models support, on random weights, as `vitprune check` does.

The 48 models that were always checked, and one variant of every family of timm's models with attention
(benchmarks/support/timm_variants.txt, by timm_variants.py). Each model runs in a child process with limits of time and
memory, and Torch-Pruning's generic recipe on the same model in another. Finished models are recorded in
benchmarks/results/coverage-notes.jsonl, one JSON object per line, and skipped when the command runs again; `--again`
repeats some, deleting the file all. Writes benchmarks/results/coverage.json and docs/guides/models.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.lib.children import run_limited
from benchmarks.lib.results import RESULTS, Row, write_results, write_table
from benchmarks.lib.torch_pruning_generic import verdict
from benchmarks.support.timm_variants import has_attention, read_list
from vitprune.evaluation.check_model import check, make_test_model

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
KINDS = ("ffn", "head", "attention", "residual", "block", "branch")
EITHER = {"heads, or heads and channels": ("head", "attention"), "blocks, or branches": ("block", "branch")}
GOALS = {"ffn": 0.97, "heads, or heads and channels": 0.9, "residual": 0.85, "blocks, or branches": 0.85}  # of models
SECONDS = 10.0  # for finding all groups of a model
ABSENT = ("its trace has no units of kind", "there is no ", "it has only one block")  # of refusals: no such units
TITLE = "Supported models"
ABOUT = """\
Written by `python -m benchmarks.support.timm_models`. Rows: timm models with random weights, in float64, on images of
64 or 128 pixels where the model takes them: {number} models with attention, of {all} in the list with one variant of
every family, and {others} without it. Columns: kinds of [units](../concepts/groups.md). In every group about half of
the units are removed, an odd number. **proven**: the logits equal those of literal removal
(difference below 1e-10 of the largest logit), parameters and MACs decrease by the amounts that the groups state,
gradients are finite, and the model is the same after saving and loading; in brackets: modules whose units of this
kind are left out. **refused** N: not supported, for reason N below. **-**: the model has no such units. block: whole
blocks; branch: the attention or the MLP of a block alone, **not run** where it was not measured. Last but one
column: CPU time to find all groups. The last column: Torch-Pruning's MagnitudePruner on the same model, half of the
channels, the classifier ignored, numbers of heads given for the layers of queries, keys and values. Models above 50
million parameters have two blocks if timm takes a depth."""


def main() -> None:
    """Check every model in a child process and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three models, not written into the documents")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one model; default: %(default)s")
    parser.add_argument(
        "--peer-limit", type=float, default=120, help="the same for Torch-Pruning; 0: later; default: %(default)s"
    )
    parser.add_argument("--memory", type=float, default=14, help="GiB for one model; default: %(default)s")
    parser.add_argument("--more", action="store_true", help="also the kinds that recorded models lack")
    parser.add_argument("--again", default="", help="names of models to check again, separated by commas")
    parser.add_argument("--table", action="store_true", help="only write the tables from the recorded models")
    options = parser.parse_args()
    variants: dict[str, dict[str, int]] = read_list()
    names = [*MODELS[:3]] if options.quick else [*dict.fromkeys((*MODELS, *FURTHER, *variants))]
    notes = RESULTS / ("coverage-quick-notes.jsonl" if options.quick else "coverage-notes.jsonl")
    done = _recorded(notes)
    again = options.again.split(",")
    for name in () if options.table else sorted(names, key=lambda name: [*variants, *names].index(name)):
        one = {} if name in again else dict(done.get(name, {}))
        args = variants.get(name, {})
        missing = [kind for kind in KINDS if kind not in one.get("kinds", {})]
        if missing and (len(missing) == len(KINDS) or options.more):
            ours = run_limited(check_kinds, name, args, missing, seconds=options.limit, gigabytes=options.memory)
            if isinstance(ours, str):
                ours = {"kinds": {kind: {"verdict": "stopped", "why": ours} for kind in missing}}
            one |= ours | {"kinds": one.get("kinds", {}) | ours["kinds"]}
        if "peer" not in one and options.peer_limit:
            peer = run_limited(check_peer, name, args, seconds=options.peer_limit, gigabytes=options.memory)
            one["peer"] = peer if peer.startswith(("works", "fails")) else f"fails: {peer}"
        if one == done.get(name):
            continue
        done[name] = {"model": name, **one}
        with notes.open("a") as file:
            file.write(json.dumps(done[name]) + "\n")
        print(name, {kind: one["verdict"] for kind, one in done[name]["kinds"].items()}, one.get("peer"), flush=True)
    results = {name: done[name] for name in names if name in done}
    if not options.quick:
        _document(results)
    write_results("coverage", _rows(results), options.quick)


def _recorded(notes: Path) -> dict[str, dict[str, Any]]:
    lines = notes.read_text().splitlines() if notes.exists() else []
    return {one["model"]: one for one in map(json.loads, lines)}


def check_kinds(name: str, args: dict[str, int], chosen: Sequence[str] = KINDS) -> dict[str, Any]:
    """Return whether a model has attention, and per kind of units the verdict, the reason, and what was found.

    Args:
        name: Name of a timm model.
        args: Arguments of timm.create_model.
        chosen: The kinds.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for row in check(name, chosen, (0.5,), args):
        absent = row.verdict == "refused" and any(part in row.why for part in ABSENT)
        kinds[row.kind] = {
            "verdict": "-" if absent else row.verdict,
            "why": row.why,
            "groups": row.groups,
            "left_out": len(row.left_out),
            "first_left_out": next(iter(row.left_out.values()), ""),
            "seconds": row.seconds,
            "difference": row.proof.difference if row.proof else None,
            "size": row.image_size,
        }
    with torch.device("meta"):
        model = timm.create_model(name, **args)
    return {"attention": has_attention(model), "kinds": kinds}


def check_peer(name: str, args: dict[str, int]) -> str:
    """Return the verdict of Torch-Pruning's generic recipe on the same model."""
    return verdict(*make_test_model(name, args))


def _rows(results: dict[str, dict[str, Any]]) -> list[Row]:
    """Return the totals against their goals, then the rows of every model."""
    found = {what: (len(proven), len(proven) + len(refused)) for what, (proven, refused) in _totals(results).items()}
    rows = [
        Row(f"{what} proven", proven / max(1, all_), f"of {all_} models", f">= {goal:.0%}", proven >= goal * all_)
        for what, goal in GOALS.items()
        for proven, all_ in [found[what]]
    ]
    cells = [(name, kind, one) for name, model in results.items() for kind, one in model["kinds"].items()]
    broken = sum(one["verdict"] == "failed" for _, _, one in cells)
    rows.append(Row("broken kinds of models", broken, "kinds", "0", broken == 0))
    works, run = _peer_counts(results)
    if run:
        rows.append(Row("Torch-Pruning's generic recipe works", works, f"of {run} models"))
    for name, model in results.items():
        proven = [kind for kind, one in model["kinds"].items() if one["verdict"] == "proven"]
        seconds = sum(one.get("seconds") or 0.0 for one in model["kinds"].values())
        rows.append(Row(f"{name}: kinds proven", len(proven), "kinds"))
        rows.append(Row(f"{name}: groups found", seconds, "s", f"<= {SECONDS:.0f} s", seconds <= SECONDS))
    return rows


def _peer_counts(results: dict[str, dict[str, Any]]) -> tuple[int, int]:
    """Return for how many models the other recipe works, and on how many it was run."""
    peers = [model["peer"] for model in results.values() if "peer" in model]
    return sum(peer.startswith("works") for peer in peers), len(peers)


def _totals(results: dict[str, dict[str, Any]]) -> dict[str, tuple[list[str], list[str]]]:
    """Return by goal the models with attention where it is proven, and the others that have such units."""
    totals: dict[str, tuple[list[str], list[str]]] = {what: ([], []) for what in GOALS}
    for name, model in results.items():
        verdicts = {kind: one["verdict"] for kind, one in model["kinds"].items()}
        for what, pair in EITHER.items():
            of_pair = [verdicts.get(kind, "-") for kind in pair]
            verdicts[what] = "proven" if "proven" in of_pair else next((one for one in of_pair if one != "-"), "-")
        for what, (proven, others) in totals.items():
            if model.get("attention", True) and verdicts.get(what, "-") != "-":
                (proven if verdicts[what] == "proven" else others).append(name)
    return totals


def _document(results: dict[str, dict[str, Any]]) -> None:
    reasons: dict[str, int] = {}
    table = []
    for name, model in results.items():
        shown = []
        for one in (model["kinds"].get(kind) for kind in KINDS):
            if one is None:
                shown.append("not run")
                continue
            refused = one["verdict"] not in ("proven", "-")
            number = f" {reasons.setdefault(one['why'], len(reasons) + 1)}" if refused else ""
            others = f" ({one['left_out']} left out)" if one["verdict"] == "proven" and one["left_out"] else ""
            shown.append(f"{one['verdict']}{number}{others}")
        seconds = sum(one.get("seconds") or 0.0 for one in model["kinds"].values())
        table.append([f"`{name}`", *shown, f"{seconds:.1f}", model.get("peer", "not run")])
    path = ROOT / "docs/guides/models.md"
    columns = ["model", *KINDS, "s", "Torch-Pruning's generic recipe"]
    number = sum(bool(model.get("attention", True)) for model in results.values())
    write_table(
        path, TITLE, ABOUT.format(number=number, all=len(read_list()), others=len(results) - number), columns, table
    )
    totals = _totals(results)
    lines = [
        f"| {what} | {len(proven)} of {len(proven) + len(others)} "
        f"| {len(proven) / max(1, len(proven) + len(others)):.0%} | {GOALS[what]:.0%} |"
        for what, (proven, others) in totals.items()
    ]
    works, run = _peer_counts(results)
    summary = [
        "## Totals",
        "",
        "Models with attention that have such units.",
        "",
        "| proven | models | share | goal |",
        "| --- | --- | --- | --- |",
        *lines,
        "",
        f"Torch-Pruning's generic recipe works for {works} of the {run} models on which it was run.",
        "",
        "## Reasons of refusals",
        "",
        *(f"{number}. {why}" for why, number in reasons.items()),
    ]
    path.write_text(path.read_text() + "\n" + "\n".join(summary) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
