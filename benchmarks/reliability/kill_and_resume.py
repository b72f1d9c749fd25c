"""Kill `prune` and `distill` at random moments, resume them, and compare the resulting files.

A small project on the embedded digits (a ViT of two blocks; gradual pruning in three cycles with fine-tuning, then
distillation; Mixup, CutMix, stochastic depth, averaged weights, optimizer state kept over the cycles). Each stage runs
once undisturbed. Then it is started, killed (SIGKILL) after a random fraction of that time, its outputs are removed as
by DVC, and it is started again to its end; the sha256 of all its files are compared. A checkpoint is written after
every step, so that some kills interrupt a write. Writes benchmarks/results/faults.json and docs/results/faults.md.
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
OUTPUTS = {"prune": ("prune", "cycles"), "distill": ("distill",)}


@dataclass(frozen=True)
class Fault:
    """One kill: stage, seconds after its start, complete and partial checkpoints, identical results or not."""

    stage: str
    seconds: float
    checkpoints: int
    partial: int
    same: bool


def main() -> None:
    """Kill, resume, compare, and write the tables."""
    options = arguments(__doc__, {"kills": (30, "number of kills"), "seed": (0, "seed of the moments")})
    kills, moments = 4 if options.quick else options.kills, random.Random(options.seed)
    faults = []
    with tempfile.TemporaryDirectory() as name:
        project = create(Path(name) / "project")
        for stage, number in (("prune", kills - kills // 2), ("distill", kills // 2)):
            start = time.perf_counter()
            run(project, stage)
            seconds, expected = time.perf_counter() - start, written(project, stage)
            for _ in range(number):
                faults.append(kill_and_resume(project, stage, moments.uniform(0.3, 0.98) * seconds, expected))
                print(faults[-1], flush=True)
    same = sum(fault.same for fault in faults)
    rows = [Row("identical results", same, "of the kills", f"{len(faults)}", same == len(faults), len(faults))]
    rows.append(Row("kills after the first checkpoint", sum(f.checkpoints > 0 for f in faults), "of the kills"))
    rows.append(Row("kills while writing a checkpoint", sum(f.partial > 0 for f in faults), "of the kills"))
    if not options.quick:
        header = ["kill", "stage", "seconds after start", "checkpoints", "partial", "identical results"]
        table = [
            [f"{n}", f.stage, f"{f.seconds:.2f}", f"{f.checkpoints}", f"{f.partial}", "yes" if f.same else "NO"]
            for n, f in enumerate(faults, 1)
        ]
        write_table(ROOT / "docs/results/faults.md", "Killed and resumed stages", __doc__ or "", header, table)
    write_results("faults", rows, options.quick)


def create(project: Path) -> Path:
    """Create the small project and run the stages before `prune`."""
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


def start_stage(project: Path, stage: str) -> subprocess.Popen[bytes]:
    """Start a stage with a checkpoint after every step."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"VITPRUNE_CHECKPOINT_MINUTES": "0", "VITPRUNE_DEVICE": "cpu", "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-m", "vitprune.cli", stage, "-C", str(project)], env=env)


def run(project: Path, stage: str) -> None:
    """Run a stage; exit if it fails."""
    code = start_stage(project, stage).wait()
    if code:
        sys.exit(f"{stage} failed with exit code {code}")


def kill_and_resume(project: Path, stage: str, seconds: float, expected: dict[str, str]) -> Fault:
    """Kill a stage after `seconds`, or earlier if it has ended by then, and run it again to its end.

    `expected` has the digests of its files in an undisturbed run.
    """
    while True:
        remove_outputs(project, stage)
        process = start_stage(project, stage)
        time.sleep(seconds)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            break
        seconds *= 0.9
    resume = project / ".vitprune/resume"
    checkpoints = len(list(resume.glob("*/*/[0-9]*/index.json")))
    partial = len(list(resume.rglob("*.partial")))
    remove_outputs(project, stage)
    run(project, stage)
    return Fault(stage, seconds, checkpoints, partial, written(project, stage) == expected)


def remove_outputs(project: Path, stage: str) -> None:
    """Remove the outputs of a stage, as DVC does before running it."""
    for name in OUTPUTS[stage]:
        shutil.rmtree(project / "out" / name, ignore_errors=True)


def written(project: Path, stage: str) -> dict[str, str]:
    """Return the sha256 of all files of a stage: weights, masks, histories, metrics, plots."""
    folders = [project / "out" / name for name in OUTPUTS[stage]]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [project / "metrics" / f"{stage}.json", project / "plots" / f"{stage}.csv"]
    return {str(path.relative_to(project)): sha256(path) for path in sorted(files)}


if __name__ == "__main__":
    main()
