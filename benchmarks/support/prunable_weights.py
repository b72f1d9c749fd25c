"""Number of prunable single weights per model; counted, not measured.

Layers are those of CAP's recipes (vitprune/architectures/unstructured_tables.py: stems, norms, depthwise convolutions
and classifiers are not pruned); sparsity is a fraction of these weights, not of all parameters. Writes
benchmarks/results/prunable.json and docs/results/prunable.md.
"""

from collections import Counter
from pathlib import Path

import timm
import torch

from benchmarks.lib.results import Row, arguments, write_results, write_table
from vitprune import find_groups

ROOT = Path(__file__).parents[2]
PROMISED = {"deit_tiny_patch16_224": 5.31, "deit_small_patch16_224": 21.23, "deit_base_patch16_224": 84.93}
SWINS = {"swin_tiny_patch4_window7_224": 25.88, "swin_small_patch4_window7_224": 47.11}
MODELS = (
    *PROMISED,
    "vit_large_patch16_224",
    *SWINS,
    "pvt_v2_b0",
    "pvt_v2_b2_li",
    "xcit_tiny_12_p16_224",
    "xcit_small_12_p16_224",
    "xcit_medium_24_p8_224",
    "efficientformer_l1",
    "efficientformer_l7",
    "efficientformerv2_s0",
    "efficientformerv2_l",
    "convnext_tiny",
    "convnext_large",
    "convnext_large_mlp.clip_laion2b_augreg_ft_in1k",
    "convnext_base.clip_laion2b",
    "convnextv2_atto",
    "convnextv2_tiny",
    "resnet18",
    "resnet50",
    "resnet50d",
    "seresnext50_32x4d",
    "efficientnet_b0",
    "mixnet_s",
    "tf_efficientnetv2_s",
    "efficientnetv2_rw_t",
)


def main() -> None:
    """Count every model and write the tables."""
    quick = arguments(__doc__).quick
    rows, table = [], []
    for name in MODELS[:3] if quick else MODELS:
        with torch.device("meta"):
            model = timm.create_model(name)
        groups = find_groups(model, ["weight"])
        pools: Counter[str] = Counter()
        for group in groups:
            pools[group.layer_type] += group.units
        weights, total = pools.total(), sum(parameter.numel() for parameter in model.parameters())
        expected = (PROMISED | SWINS).get(name)
        holds = None if expected is None else round(weights / 1e6, 2) == expected
        rows.append(Row(name, weights, "weights", None if expected is None else f"{expected} M", holds))
        shares = ", ".join(f"{pool} {number / 1e6:.2f}" for pool, number in pools.items())
        table.append([name, f"{len(groups)}", f"{weights:,}", f"{total:,}", f"{weights / total:.1%}", shares])
    if not quick:
        header = ["model", "layers", "prunable weights", "parameters", "fraction", "pools (DIMAP's modules), millions"]
        write_table(ROOT / "docs/results/prunable.md", "Prunable weights per model", __doc__ or "", header, table)
    write_results("prunable", rows, quick)


if __name__ == "__main__":
    main()
