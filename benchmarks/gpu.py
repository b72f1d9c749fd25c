"""What no CPU can say, in one command of about ten minutes on one H100 or H200.

`equality`: masks of DeiT-Tiny by several methods on the device and on the CPU. `scoring`: Fisher scores of DeiT-B,
images per second and share of the multiply-adds that the device reaches in a matrix product of the same type.
`pruning`: seconds and memory of one-shot pruning of DeiT-B (benchmarks.speed.one_shot_time). `training`: distillation
by `training.loop` and by a plain loop of timm's parts, images per second (benchmarks.speed.training_throughput; timm's
train.py is not part of its package). `inference`: dense and pruned DeiT-B in float32, bfloat16 and with torch.compile,
alternately. `two_four`: FFN layers of DeiT-B in torch's semi-structured format against dense ones, in float16; on a CPU
only the layout is checked. `recovery`: DeiT-Tiny pruned to 0.5x MACs, then distilled on Imagenette; needs
VITPRUNE_REAL_DATA. A part that fails is reported, and the others still run. Apart from `recovery`, models have random
weights. `--device cpu --quick` tries all parts at small size. Writes benchmarks/results/gpu.json and
docs/results/gpu.md.
"""

import copy
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

from benchmarks.lib.deit_tiny import load_dense, load_images, split
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from benchmarks.speed import one_shot_time, training_throughput
from vitprune import DistillConfig, ScoreConfig, TrainConfig, accuracy, count, find_groups, finetune, prune, score
from vitprune.evaluation.latency import alternating_times, run_model

ROOT = Path(__file__).parents[1]
EQUAL = {  # share of the mask's entries that must be the same on both devices
    "unit-obs": 0.999,
    "upvits-fisher": 0.999,
    "channel-taylor": 0.999,
    "obc": 0.99,
}
SETTINGS = {"obc": {"sparsity": 0.5}}
TOLERANCE = 1e-2  # of a float16 product


@dataclass(frozen=True)
class Case:
    """Device and size of the measurements."""

    device: torch.device
    quick: bool

    def size(self, full: int, quick: int) -> int:
        """Return a number for the full or the quick form."""
        return quick if self.quick else full

    @property
    def pixels(self) -> int:
        """Height and width of the images."""
        return self.size(224, 64)

    def model(self, name: str) -> nn.Module:
        """Return a timm model with seeded random weights; in the quick form of one block for small images."""
        torch.manual_seed(0)
        blocks = {"depth": 1, "img_size": self.pixels} if self.quick else {}
        return timm.create_model(name, **blocks).eval()

    def batches(self, images: int, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Return batches of seeded noise."""
        drawn = torch.randn((images, 3, self.pixels, self.pixels), generator=torch.Generator().manual_seed(0))
        return [(part, torch.arange(len(part)) % 1000) for part in drawn.split(batch)]

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds of a call, to the end of the device's work."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    """Run the parts and write the table."""
    names = ",".join(PARTS)
    options = arguments(
        __doc__, {"device": ("cuda", "cuda or cpu"), "parts": (names, "parts"), "threads": (0, "0: all")}
    )
    if options.threads:
        torch.set_num_threads(options.threads)
    case, rows, failed = Case(torch.device(options.device), options.quick), list[Row](), list[str]()
    for name in options.parts.split(","):
        start = time.perf_counter()
        try:
            rows += PARTS[name](case)
        except Exception:  # the other parts still run; a card may be lent for minutes only
            traceback.print_exc()
            failed.append(name)
        rows.append(Row(f"{name}, duration", time.perf_counter() - start, "s"))
        print(f"{name}: {rows[-1].value:.0f} s", flush=True)
    rows.append(Row("parts that failed", len(failed), "parts", "0", not failed))
    if not options.quick:
        cells = [[row.what, f"{row.value:.4g}", row.unit, row.target or ""] for row in rows]
        header = ["what", "value", "unit", "promised"]
        write_table(ROOT / "docs/results/gpu.md", "On a GPU", __doc__ or "", header, cells)
    write_results("gpu", rows, options.quick)


def equality(case: Case) -> list[Row]:
    """Compare the masks of a pruning on the device with those on the CPU."""
    dense, batches, rows = case.model("deit_tiny_patch16_224"), case.batches(case.size(64, 4), 32), []
    for method, least in EQUAL.items():
        settings = SETTINGS.get(method, {"target": {"macs": 0.6}})
        there, here = (
            prune(dense.to(device), method, calibration=batches, **settings)
            for device in (case.device, torch.device("cpu"))
        )
        pairs = [(there.masks[name].cpu(), here.masks[name].cpu()) for name in here.masks]
        same = sum(int((one == other).sum()) for one, other in pairs) / sum(one.numel() for one, _ in pairs)
        rows.append(Row(f"equality, {method}", same, "of the mask as on the CPU", f">= {least}", same >= least))
    return rows


def scoring(case: Case) -> list[Row]:
    """Time Fisher scores of DeiT-B in float32 and bfloat16."""
    model, images = case.model("deit_base_patch16_224").to(case.device), case.size(2000, 4)
    groups, batches = find_groups(model, ["ffn", "attention"]), case.batches(images, case.size(64, 2))
    macs, rows = count(model, batches[0][0][:1]).macs, []
    directions = 8  # the default of fisher_directions: a forward pass, and a backward pass per direction
    for autocast in (False, True):
        config = ScoreConfig(autocast=autocast, memory_mb=case.size(32768, 1024), batch_size=case.size(64, 2))
        score(model, groups, "kl-fisher", batches[:1], config=config)
        taken = case.seconds(partial(score, model, groups, "kl-fisher", batches, config=config))
        name = f"scoring, DeiT-B, {'bfloat16' if autocast else 'float32'}"
        used = 2 * macs * (1 + directions) * images / taken
        peak = matmul_rate(case, torch.bfloat16 if autocast else torch.float32)
        rows += [
            Row(name, images / taken, "images/s"),
            Row(f"{name}, of the peak", used / peak, "of the matrix product"),
        ]
    return rows


def matmul_rate(case: Case, dtype: torch.dtype) -> float:
    """Return the operations per second of a large matrix product."""
    width = case.size(8192, 512)
    one, other = (torch.randn(width, width, device=case.device, dtype=dtype) for _ in range(2))
    case.seconds(lambda: one @ other)
    return 2 * width**3 / median(case.seconds(lambda: one @ other) for _ in range(10))


def pruning(case: Case) -> list[Row]:
    """Time one-shot pruning: second-order statistics, elimination, ADMM and row solves, and reconstruction."""
    name, rows = "deit_tiny_patch16_224" if case.quick else "deit_base_patch16_224", []
    blocks = {"depth": 1} if case.quick else {}
    one_shot_time.measure("vit_tiny_patch16_224", "unit-obs, 0.5x MACs", case.device, 20, depth=1)
    for what in [*one_shot_time.SETTINGS, one_shot_time.RECONSTRUCTION]:
        number = 4 if case.quick else one_shot_time.IMAGES
        seconds, memory = one_shot_time.measure(name, what, case.device, number, **blocks)
        rows += [Row(f"pruning, {what}", seconds, "s"), Row(f"pruning, {what}, memory", memory, "GB")]
    return rows


def training(case: Case) -> list[Row]:
    """Compare the training loop with a plain one."""
    sizes = (2, 1, 1, 1) if case.quick else (256, 30, 5, 3)
    budget, rows = training_throughput.Budget(case.device, *sizes), []
    for student, name in list(training_throughput.STUDENTS.items())[: case.size(2, 1)]:
        loops = training_throughput.rounds_of(name, budget)
        speeds = {loop: median(measured.speed for measured in loops[loop]) for loop in loops}
        rows += [Row(f"training, {student}, {loop}", speed, "images/s") for loop, speed in speeds.items()]
        rows.append(Row(f"training, {student}, ours / plain", speeds["ours"] / speeds["plain"], "x"))
    return rows


def inference(case: Case) -> list[Row]:
    """Time the dense and a pruned DeiT-B in three ways, all alternately."""
    dense = case.model("deit_base_patch16_224")
    settings = {"target": {"macs": 0.5}, "round_to": {"ffn": 64, "attention": 8}}
    pair = {"dense": dense, "0.5x MACs": prune(dense, "channel-magnitude", **settings).model.eval()}
    images = torch.randn(case.size(256, 1), 3, case.pixels, case.pixels, device=case.device)
    calls: dict[str, Callable[[], object]] = {}
    for name, model in pair.items():
        single, half = model.to(case.device), copy.deepcopy(model).to(case.device, torch.bfloat16)
        compiled = torch.compile(half)
        calls[f"{name}, float32"] = partial(run_model, single, images)
        calls[f"{name}, bfloat16"] = partial(run_model, half, images.bfloat16())
        calls[f"{name}, bfloat16, compiled"] = partial(run_model, compiled, images.bfloat16())
    taken = [median(times) for times in alternating_times(list(calls.values()), case.size(20, 1))]
    speeds = {name: 1000 * len(images) / milliseconds for name, milliseconds in zip(calls, taken, strict=True)}
    rows = [Row(f"inference, {name}", speed, "images/s") for name, speed in speeds.items()]
    for way in ("float32", "bfloat16", "bfloat16, compiled"):
        ratio = speeds[f"0.5x MACs, {way}"] / speeds[f"dense, {way}"]
        rows.append(Row(f"inference, 0.5x MACs / dense, {way}", ratio, "x"))
    return rows


def two_four(case: Case) -> list[Row]:
    """Compare FFN layers of DeiT-B with 2:4 weights in the dense and in the semi-structured format."""
    result = prune(case.model("deit_base_patch16_224"), "n:m", scope="2:4")
    layer = result.model.blocks[0].mlp.fc1
    blocks = layer.weight.detach().reshape(layer.out_features, -1, 4)
    kept = int((blocks != 0).sum(dim=2).max())
    rows = [Row("two_four, nonzero weights of four, largest", kept, "weights", "<= 2", kept <= 2)]
    if case.device.type != "cuda":
        return rows
    weight = layer.weight.detach().to(case.device, torch.float16).contiguous()
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    images = torch.randn(64 * 197, layer.in_features, device=case.device, dtype=torch.float16)
    products = {"dense": lambda: images @ weight.T, "sparse": lambda: torch.mm(sparse, images.T).T}
    apart = float((products["sparse"]() - products["dense"]()).abs().max() / products["dense"]().abs().max())
    times = {name: median(case.seconds(work) for _ in range(50)) for name, work in products.items()}
    return [
        *rows,
        *(Row(f"two_four, fc1, {name}", 1000 * seconds, "ms") for name, seconds in times.items()),
        Row("two_four, fc1, speed-up", times["dense"] / times["sparse"], "x"),
        Row("two_four, largest difference", apart, "of the output", f"<= {TOLERANCE}", apart <= TOLERANCE),
    ]


def recovery(case: Case) -> list[Row]:
    """Prune the published DeiT-Tiny to 0.5x MACs and distil it on Imagenette."""
    folder = real_data()
    dense = load_dense(folder).to(case.device)
    calibration, _ = split(*load_images(folder / "imagenet-val-800.parquet", dense))
    result = prune(dense, "unit-obs", target={"macs": 0.5}, calibration=calibration[: case.size(4, 1)])
    few = case.size(10_000, 16)
    (images, labels), (held_out, truth) = (
        (part[:few] for part in load_images(folder / f"imagenette-{name}.parquet", dense))
        for name in ("train-3000", "val-1000")
    )
    batch = case.size(128, 8)
    loader = list(zip(images.split(batch), labels.split(batch), strict=True))
    evaluation = list(zip(held_out.split(batch), truth.split(batch), strict=True))
    tops = {"dense": accuracy(dense, evaluation)[0]["top1"], "pruned": accuracy(result.model, evaluation)[0]["top1"]}
    config = TrainConfig(
        epochs=case.size(60, 1), lr=5e-4, warmup_epochs=case.size(3, 0), amp=case.device.type == "cuda"
    )
    taken = case.seconds(lambda: finetune(result.model, loader, config, teacher=dense, distillation=DistillConfig()))
    tops["distilled"] = accuracy(result.model, evaluation)[0]["top1"]
    rows = [Row(f"recovery, 0.5x MACs, {name}", top1, "top-1 %") for name, top1 in tops.items()]
    speed = config.epochs * len(images) / taken
    return [*rows, Row("recovery, distillation", speed, "images/s"), Row("recovery, distillation", taken, "s")]


PARTS: Mapping[str, Callable[[Case], Sequence[Row]]] = {
    "equality": equality,
    "scoring": scoring,
    "pruning": pruning,
    "training": training,
    "inference": inference,
    "two_four": two_four,
    "recovery": recovery,
}


if __name__ == "__main__":
    main()
