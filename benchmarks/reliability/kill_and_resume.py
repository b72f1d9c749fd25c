"""Kill `prune` and `distill` at random moments, start them again, and compare what they leave: identical or not.

A small project on the embedded digits (a ViT of two blocks; gradual pruning in three cycles with recovery, then
distillation; Mixup, CutMix, stochastic depth, averaged weights, an optimizer that is kept over the cycles). Each stage
runs once undisturbed. Then each is started, killed (SIGKILL) after a random share of the time that it took, emptied as
DVC does, and started again to its end; sha256 of all files that it writes are compared. A checkpoint is written after
every step, so that kills meet half-written ones. Writes benchmarks/results/faults.json and docs/results/faults.md.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.lib.results import Row, arguments, write_results, write_table
from vitprune.runtime.files import sha256

ROOT = Path(__file__).parents[2]
RECIPE = {"epochs": 2, "batch_size": 256, "lr": 0.002, "augment": "digits", "ema": 0.9, "cutmix": 0.5, "mixup": 0.2}
RECIPE |= {"drop_path": 0.1}
EMPTIED = {"prune": ("prune", "cycles"), "distill": ("distill",)}


@dataclass(frozen=True)
class Fault:
    """One kill: the stage, seconds into it, checkpoints that lay there then, and whether the end is the same."""

    stage: str
    seconds: float
    found: int
    broken: int
    same: bool


def main() -> None:
    """Kill, start again, compare, and write the tables."""
    asked = arguments(__doc__, {"kills": (30, "how many in all"), "seed": (0, "of the moments")})
    kills, moments = 4 if asked.quick else asked.kills, random.Random(asked.seed)
    faults = []
    with tempfile.TemporaryDirectory() as name:
        project = made(Path(name) / "project")
        for stage, number in (("prune", kills - kills // 2), ("distill", kills // 2)):
            begun = time.perf_counter()
            run(project, stage)
            whole, expected = time.perf_counter() - begun, written(project, stage)
            for _ in range(number):
                faults.append(killed(project, stage, moments.uniform(0.3, 0.98) * whole, expected))
                print(faults[-1], flush=True)
    same = sum(fault.same for fault in faults)
    rows = [Row("endings that are identical", same, "of the kills", f"{len(faults)}", same == len(faults), len(faults))]
    rows.append(Row("kills with a checkpoint to go on from", sum(f.found > 0 for f in faults), "of the kills"))
    rows.append(Row("kills in the middle of writing one", sum(f.broken > 0 for f in faults), "of the kills"))
    if not asked.quick:
        header = ["kill", "stage", "seconds into it", "checkpoints there", "half-written", "ending identical"]
        table = [
            [f"{n}", f.stage, f"{f.seconds:.2f}", f"{f.found}", f"{f.broken}", "yes" if f.same else "NO"]
            for n, f in enumerate(faults, 1)
        ]
        write_table(ROOT / "docs/results/faults.md", "Stages that are killed", __doc__ or "", header, table)
    write_results("faults", rows, asked.quick)


def made(project: Path) -> Path:
    """The small project, up to the stage before `prune`."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"]["args"] |= {"depth": 2, "embed_dim": 48, "num_heads": 3}
    params["dense"]["train"] = {"epochs": 2, "batch_size": 256, "lr": 0.002}
    params["prune"]["finetune"] = RECIPE | {"optimizer_state": "keep", "decay_over": "run"}
    params["distill"]["train"], params["calibrate"]["size"] = RECIPE | {"epochs": 6}, 100
    project.mkdir()
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in ("dataset", "dense", "calibrate", "score", "mask"):
        run(project, stage)
    return project


def started(project: Path, stage: str) -> subprocess.Popen[bytes]:
    """A stage in a process of its own, with a checkpoint after every step."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"VITPRUNE_CHECKPOINT_MINUTES": "0", "VITPRUNE_DEVICE": "cpu", "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-m", "vitprune.cli", stage, "-C", str(project)], env=env)


def run(project: Path, stage: str) -> None:
    """A stage to its end."""
    code = started(project, stage).wait()
    if code:
        sys.exit(f"{stage} ended with {code}")


def killed(project: Path, stage: str, seconds: float, expected: dict[str, str]) -> Fault:
    """Kill a stage after so many seconds, sooner if it has ended by then, and run it again to its end.

    `expected` are the digests of what it writes.
    """
    while True:
        emptied(project, stage)
        victim = started(project, stage)
        time.sleep(seconds)
        victim.kill()
        if victim.wait() == -signal.SIGKILL:
            break
        seconds *= 0.9
    kept = project / ".vitprune/resume"
    found = len(list(kept.glob("*/*/[0-9]*/index.json")))
    broken = len(list(kept.rglob("*.partial")))
    emptied(project, stage)
    run(project, stage)
    return Fault(stage, seconds, found, broken, written(project, stage) == expected)


def emptied(project: Path, stage: str) -> None:
    """Remove what the stage writes, as DVC does before it runs."""
    for name in EMPTIED[stage]:
        shutil.rmtree(project / "out" / name, ignore_errors=True)


def written(project: Path, stage: str) -> dict[str, str]:
    """sha256 of all that a stage writes: weights, masks, histories, metrics, plots."""
    folders = [project / "out" / name for name in EMPTIED[stage]]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [project / "metrics" / f"{stage}.json", project / "plots" / f"{stage}.csv"]
    return {str(path.relative_to(project)): sha256(path) for path in sorted(files)}


if __name__ == "__main__":
    main()
