"""Which kinds of units can be pruned in vision models of transformers, torchvision and open_clip.

Small models with random weights, made by the code of these libraries. In every group half of the units are removed, an
odd number. "proven": in float64 the output equals that of the model with zeros (for blocks and residual channels: that
of literal removal), parameters and MACs decrease by the amounts that the groups state, gradients are finite, and the
model is the same after saving and loading. Last column: Torch-Pruning's MagnitudePruner, half of the channels, with the
numbers of heads given. Below the table: reasons of refusals. Writes
benchmarks/results/other_models.json and docs/results/other_models.md.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lib.children import run_limited
from benchmarks.lib.results import Row, arguments, write_results, write_table
from benchmarks.lib.torch_pruning_generic import verdict
from tests.support.other_models import MODELS, make_model
from vitprune import BadInput, find_groups
from vitprune.architectures.traced_groups import left_out, size_attributes_of
from vitprune.evaluation.check_model import random_odd_masks
from vitprune.evaluation.check_removal import check_removal
from vitprune.runtime.input_size import input_size
from vitprune.runtime.random_parameters import randomize_parameters

ROOT = Path(__file__).parents[2]
KINDS = ("ffn", "head", "attention", "residual", "block")
PEER_SECONDS, PEER_MEMORY = 300.0, 14.0  # GiB
SIZES = {"torchvision maxvit": (64, 64)}


def main() -> None:
    """Check every model and write the table."""
    options = arguments(__doc__)
    rows, table, reasons = [], [], dict[str, int]()
    for name in list(MODELS)[: 2 if options.quick else None]:
        dense = randomize_parameters(make_model(name))
        size = SIZES.get(name, input_size(dense)[1:])
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        cells, changed, start = [], dict[str, None](), time.perf_counter()
        for kind in KINDS:
            try:
                groups = find_groups(dense, [kind], images)
                failures = check_removal(dense, groups, random_odd_masks(groups, 0.5), images).failures
                verdict, why = "failed" if failures else "proven", "; ".join(failures)
                changed |= dict.fromkeys(size_attributes_of(groups))
                others = left_out(dense, kind)
                verdict += f" ({len(others)} left out)" if others else ""
            except BadInput as error:
                verdict, why = "refused", str(error)
            number = reasons.setdefault(why, len(reasons) + 1) if why else ""
            cells.append(f"{verdict} {number}".strip())
            rows.append(Row(f"{name}, {kind}", float(verdict.startswith("proven")), "proven"))
        seconds = time.perf_counter() - start
        peer = run_limited(check_peer, name, size, seconds=PEER_SECONDS, gigabytes=PEER_MEMORY)
        peer = peer if peer.startswith(("works", "fails")) else f"fails: {peer}"
        rows.append(Row(f"{name}, Torch-Pruning's generic recipe", float(peer.startswith("works")), "works"))
        table.append([name, *cells, ", ".join(changed), f"{seconds:.0f}", peer])
        print(table[-1], flush=True)
    if not options.quick:
        header = ["model", *KINDS, "attributes that change", "seconds for all checks", "Torch-Pruning's generic recipe"]
        listed = "\n".join(f"{number}. {why}" for why, number in reasons.items())
        write_table(ROOT / "docs/results/other_models.md", "Models of other libraries", __doc__ or "", header, table)
        page = ROOT / "docs/results/other_models.md"
        page.write_text(f"{page.read_text()}\n{listed}\n")
    write_results("other_models", rows, options.quick)


def check_peer(name: str, size: Sequence[int]) -> str:
    """Return the verdict of Torch-Pruning's generic recipe on the same model."""
    return verdict(make_model(name), torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)))


if __name__ == "__main__":
    main()
