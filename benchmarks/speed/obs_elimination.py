"""Second-order pruning of one DeiT-S projection layer, 768 blocks of 192 weights: reference algorithms against ours.

Reference, as in the paper's equations: one rank-1 update of the inverse per gradient (Sherman-Morrison), and a new
inverse of every block after every weight (right-looking, batched torch, float32, to the end, weights of every step
stored); also its fastest form in torch, updated in place. Ours: outer products of gradients summed in float64 with one
Cholesky inverse at the end, and left-looking elimination to the end, storing only losses. Both sides run in one process
on the same numbers, one thread each, in CPU time. Gradients are synthetic: products of an output gradient and an input
with correlated channels, summed over 197 tokens. Also the elimination of the 3,072 hidden units of an FFN of DeiT-B:
reference, a new inverse after every unit (float64, in place, removed units left out every 64 steps). Writes
benchmarks/results/obs.json and docs/results/obs.md.
"""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lib.results import Row, arguments, write_results, write_table
from vitprune.criteria.obs.fisher_blocks import add_outer_products, invert_blocks, symmetrize
from vitprune.criteria.obs.greedy import eliminate_weights
from vitprune.criteria.obs.unit_elimination import add_ridge, eliminate_units

ROOT = Path(__file__).parents[2]
WIDTH, TOKENS, BLOCK, SHARE = 384, 197, 192, 0.5
GRADIENTS, CHUNK, DAMP = 1024, 128, 1e-7
PAPER = 4096  # gradients that the paper takes
UNITS, OUTPUTS, RIDGE = 3072, 768, 1e-3
FASTER, CHEAPER, SMALLER, AGREEMENT = 100.0, 15.0, 50.0, 0.999


def main() -> None:
    """Run both sides and write the tables."""
    options = arguments(
        __doc__, {"device": ("cpu", "where to run: cpu or cuda"), "threads": (1, "threads of our side")}
    )
    torch.set_num_threads(1)
    device = torch.device(options.device)
    rows = 48 if options.quick else WIDTH  # of the layer, two blocks each
    weights, gradients = (value.to(device) for value in layer(rows, 256 if options.quick else GRADIENTS))
    fisher, results = fisher_rows(gradients)
    results += greedy_rows(fisher, weights, options.threads)
    results += unit_rows(256 if options.quick else UNITS)
    if options.quick:  # both sides fit in the CPU cache, so the bounds do not apply
        results = [Row(row.what, row.value, row.unit) for row in results]
    else:
        cells = [[row.what, f"{row.value:.4g}", row.unit, row.target or ""] for row in results]
        header = ["what", "value", "unit", "bound"]
        write_table(ROOT / "docs/results/obs.md", "Second-order pruning of one layer", __doc__ or "", header, cells)
    write_results("obs", results, options.quick)


def layer(rows: int, number: int) -> tuple[Tensor, Tensor]:
    """Weights (blocks, B) of some rows of the layer, and gradients (number, weights), float32."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    mixing = torch.logspace(0, -1.5, WIDTH)[:, None] * turn  # inputs: a few directions matter most
    weights = torch.randn(rows, WIDTH, generator=generator) * 0.05
    gradients = torch.empty(number, rows * WIDTH)
    for gradient in gradients:
        inputs = torch.randn(TOKENS, WIDTH, generator=generator) @ mixing
        grads = torch.randn(TOKENS, rows, generator=generator) * 1e-3
        gradient.copy_((grads.T @ inputs).flatten())
    return weights.view(-1, BLOCK), gradients


def fisher_rows(gradients: Tensor) -> tuple[Tensor, list[Row]]:
    """Return damped Fisher blocks, and the time per gradient of every way to their inverses."""
    blocks, number = gradients.shape[1] // BLOCK, len(gradients)
    plain, strong = streamed(sherman_morrison, gradients), streamed(sherman_morrison_in_place, gradients)
    total = torch.zeros(blocks, BLOCK, BLOCK, dtype=torch.float64, device=gradients.device)
    ours = min(timed(lambda: summed(total.zero_(), gradients)) for _ in range(2)) / number
    symmetrize(total)
    fisher = total / number + DAMP * torch.eye(BLOCK, dtype=torch.float64, device=total.device)
    once = min(timed(lambda: invert_blocks(fisher)) for _ in range(2))
    ratio = plain / ours
    return fisher, [
        Row("Fisher, Sherman-Morrison, per gradient", 1e3 * plain, "ms"),
        Row("Fisher, Sherman-Morrison in place, per gradient", 1e3 * strong, "ms"),
        Row("Fisher, ours, per gradient", 1e3 * ours, "ms"),
        Row("Fisher, ours, inverses at the end", 1e3 * once, "ms"),
        Row("Sherman-Morrison / ours", ratio, "x", f">= {CHEAPER:g}", ratio >= CHEAPER),
        Row("Sherman-Morrison in place / ours", strong / ours, "x"),
        Row(f"the same, inverses included, {PAPER} gradients", strong / (ours + once / PAPER), "x"),
    ]


def streamed(update: Callable[[Tensor, Tensor, int], None], gradients: Tensor) -> float:
    """Return the seconds per gradient of an update of the inverses, over the first gradients."""
    few = gradients[:8].view(8, -1, BLOCK)
    inverse = torch.eye(BLOCK, device=few.device).repeat(few.shape[1], 1, 1) / DAMP
    return min(timed(lambda: update(inverse, few, len(gradients))) for _ in range(3)) / len(few)


def summed(total: Tensor, gradients: Tensor) -> None:
    """Add the outer products of all gradients, in chunks."""
    for chunk in gradients.split(CHUNK):
        add_outer_products(total, chunk)


def sherman_morrison(inverse: Tensor, gradients: Tensor, number: int) -> None:
    """Compute H - x x^T / (m + g^T x), x = H g, for gradients (some, blocks, B) and H (blocks, B, B)."""
    for gradient in gradients:
        moved = torch.bmm(inverse, gradient[:, :, None])
        scale = number + torch.bmm(gradient[:, None, :], moved)
        inverse = inverse - torch.bmm(moved, moved.mT) / scale


def sherman_morrison_in_place(inverse: Tensor, gradients: Tensor, number: int) -> None:
    """The same in place, reading rows of the inverses, which is faster."""
    for gradient in gradients:
        moved = torch.bmm(gradient[:, None, :], inverse)
        scale = number + torch.bmm(moved, gradient[:, :, None])
        inverse.baddbmm_((moved / scale).mT, moved, alpha=-1)


def greedy_rows(fisher: Tensor, weights: Tensor, threads: int) -> list[Row]:
    """Return time and memory of both eliminations, and how often they remove the same weight at the same step."""
    inverses, wide = invert_blocks(fisher), weights.double()
    eliminate_weights(inverses[:2], wide[:2])  # compiles
    slow, heavy = measured(lambda h: right_looking(h, weights)[0], inverses.float())
    strong, _ = measured(lambda h: right_looking(h, weights, in_place=True)[0], inverses.float())
    torch.set_num_threads(threads)
    runs = [measured(lambda h: eliminate_weights(h, wide), inverses) for _ in range(3)]
    torch.set_num_threads(1)
    to_end, lean = min(took for took, _ in runs), max(peak for _, peak in runs)
    steps = int(BLOCK * SHARE)
    order, traces = right_looking(inverses.float(), weights, in_place=True)
    same = float((eliminate_weights(inverses, wide).argsort(dim=1)[:, :steps] == order[:, :steps]).double().mean())
    traced = traces.numel() * traces.element_size()
    ratio, room = slow / to_end, traced / max(lean, 1)
    return [
        Row("greedy, right-looking", slow, "s"),
        Row("greedy, right-looking in place", strong, "s"),
        Row("greedy, ours, to the end", to_end, "s"),
        Row("right-looking / ours, to the end", ratio, "x", f">= {FASTER:g}", ratio >= FASTER),
        Row("right-looking in place / ours, to the end", strong / to_end, "x"),
        Row(f"same weight at the same step, to {SHARE:.0%}", same, "of all", f">= {AGREEMENT:g}", same >= AGREEMENT),
        Row("peak memory beside inverses and weights, right-looking", heavy / 2**20, "MiB"),
        Row("weights after every step alone", traced / 2**20, "MiB"),
        Row("peak memory beside inverses and weights, ours, to the end", lean / 2**20, "MiB"),
        Row("weights after every step / ours, memory", room, "x", f">= {SMALLER:g}", room >= SMALLER),
    ]


def right_looking(h: Tensor, weights: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Return order (blocks, B) and weights after every step (B + 1, blocks, B), as in the paper's algorithm.

    h (blocks, B, B) are the inverses, replaced by H - H_p H_p^T / H_pp after every weight, or overwritten in place.
    """
    w, rows = weights.clone(), torch.arange(len(weights), device=weights.device)
    removed, order = torch.zeros_like(w, dtype=torch.bool), torch.zeros_like(w, dtype=torch.int64)
    traces = torch.empty(w.shape[1] + 1, *w.shape, device=w.device)
    traces[0] = w
    for step in range(w.shape[1]):
        costs = (w.square() / h.diagonal(dim1=1, dim2=2)).masked_fill(removed, torch.inf)
        index = costs.argmin(dim=1)
        order[:, step] = index
        column, pivot = h[rows, :, index], h[rows, index, index]
        w -= column * (w[rows, index] / pivot)[:, None]
        removed[rows, index] = True
        w.masked_fill_(removed, 0)
        if in_place:
            h.baddbmm_(column[:, :, None], (column / pivot[:, None])[:, None, :], alpha=-1)
        else:
            h = h - torch.bmm(column[:, :, None], column[:, None, :]) / pivot[:, None, None]
        traces[step + 1] = w
    return order, traces


def unit_rows(units: int) -> list[Row]:
    """Return the time of both eliminations of units, and how often they remove the same unit at the same step."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * units, units, generator=generator)
    rows[:, units // 2 :] += rows[:, : units // 2]  # correlated
    inputs = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).double()
    moment, weight = inputs.T @ inputs, torch.randn(OUTPUTS, units, generator=generator)
    errors = torch.randn(OUTPUTS, 2 * OUTPUTS, generator=generator).double()
    metric = errors @ errors.T
    orders: list[Tensor] = []
    slow = timed(lambda: orders.append(unit_by_unit(weight, moment, metric)))
    ours = timed(lambda: orders.append(eliminate_units(weight, moment, metric, 1, RIDGE).argsort()))
    same = float((orders[0] == orders[1]).double().mean())
    return [
        Row(f"{units} units, one update per unit", slow, "s"),
        Row(f"{units} units, ours", ours, "s"),
        Row("one update per unit / ours", slow / ours, "x"),
        Row("same unit at the same step", same, "of all", f">= {AGREEMENT:g}", same >= AGREEMENT),
    ]


def unit_by_unit(weight: Tensor, moment: Tensor, metric: Tensor) -> Tensor:
    """Return the units in the order of their removal: w_j^T G w_j / [C^-1]_jj, C^-1 and w updated for every unit."""
    values, vectors = torch.linalg.eigh(metric)
    carried = (vectors * values.clamp_min(0).sqrt()).T @ weight.double()
    inverse = torch.linalg.inv(add_ridge(moment, RIDGE))
    units, removed, order = torch.arange(weight.shape[1]), list[int](), list[int]()
    while len(order) < weight.shape[1]:
        if len(removed) == 64:
            left = torch.ones(len(units), dtype=torch.bool)
            left[removed] = False
            rows = torch.cat([left, torch.tensor([True])])
            units, carried, inverse, removed = units[left], carried[:, left], inverse[rows][:, rows], []
        costs = carried.square().sum(dim=0) / inverse.diagonal()[:-1]
        costs[removed] = torch.inf
        index = int(costs.argmin())
        row, pivot = inverse[index].clone(), inverse[index, index].clone()
        carried -= carried[:, index, None] * row[:-1] / pivot
        inverse.addr_(row, row / pivot, alpha=-1)
        inverse[index], inverse[:, index], inverse[index, index] = 0, 0, 1
        removed.append(index)
        order.append(int(units[index]))
    return torch.tensor(order)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of a call: CPU time, or wall time if there is a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    _wait()
    start = clock()
    work()
    _wait()
    return clock() - start


def measured(work: Callable[[Tensor], Tensor], given: Tensor) -> tuple[float, int]:
    """Return the seconds of a call and its peak memory above the memory before, result included, in bytes."""
    if given.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = timed(lambda: work(given))
        return took, torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory must not hide new allocations
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmHWM")
    took = timed(lambda: work(given))
    return took, _resident("VmHWM") - before


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{what}:"))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
