"""A toy pipeline: the ten stages of dvc.yaml as one shell script, to test running, killing and resuming.

Untracked files control a stage: `sleep_STAGE`, `bad_STAGE`, `lost_STAGE` and `code_STAGE` (its exit code).
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from tests.support import preloaded
from vitprune.orchestration.execution.processes import mark_of

REPOSITORY = Path(__file__).parents[2]

SCRIPT = """set -e
stage=$1; shift
echo "$stage begins"
if [ -f bad_$stage ]; then echo 'Error: params.yaml: prune.sparsity is 2; give 0 to 1' >&2; exit 2; fi
if [ -f lost_$stage ]; then rm lost_$stage; kill -9 $$; fi
if [ -f code_$stage ]; then exit $(cat code_$stage); fi
for out in "$@"; do
  case $out in
    */) mkdir -p $out; echo "$stage made this" > ${out}weights ;;
    metrics/evaluate.json | metrics/latency.json) cp $(basename $out) $out ;;
    *.json) mkdir -p metrics; echo '{"top1": 90.0}' > $out ;;
    *.csv) mkdir -p plots; echo 'step,loss' > $out ;;
    *) mkdir -p data; echo "$stage made this" > $out ;;
  esac
  if [ -f sleep_$stage ]; then (sleep 600.25) & wait; fi
done
"""

RESULT = """{"top1": 97.0, "top5": 99.0, "params": 1000000, "nonzero_params": 1000000, "macs": 2000000,
"nonzero_macs": 2000000, "nominal_macs": 2000000}"""
SPEED = '{"latency_ms": {"median": 1.0, "p10": 0.9, "p90": 1.1}, "throughput": 1000.0}'


def make(project: Path) -> Path:
    """Create a git and DVC project whose stages are the shell script's."""
    project.mkdir()
    pipeline = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())
    for name, stage in pipeline["stages"].items():
        outs = [*stage["outs"], *(next(iter(file)) for file in [*stage.get("metrics", []), *stage.get("plots", [])])]
        stage["cmd"] = f"sh stage.sh {name} {' '.join(outs)}"
        stage["deps"] = ["stage.sh", *(dep for dep in stage["deps"] if not dep.startswith("vitprune/"))]
    (project / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    (project / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    (project / "stage.sh").write_text(SCRIPT)
    shutil.copytree(REPOSITORY / "flows", project / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "evaluate.json").write_text(f'{{"dense": {RESULT}, "pruned": {RESULT}, "kept": {{"params": 1.0}}}}')
    (project / "latency.json").write_text(f'{{"dense": {SPEED}, "pruned": {SPEED}, "environment": {{}}}}')
    (project / ".gitignore").write_text("/out/\n/metrics/\n/plots/\n/data/\n/.vitprune/\n/ml*\n__pycache__/\n")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    assert preloaded.run("dvc", "init", "-q", cwd=project).returncode == 0
    (project / ".dvc/config").write_text((REPOSITORY / ".dvc/config").read_text())
    return project


def flow(project: Path, *options: str, **env: str) -> "subprocess.Popen[str]":
    """Start `vitprune run` in a new process group, as a shell does."""
    return subprocess.Popen(
        [sys.executable, "-m", "vitprune.cli", "run", "--project", str(project), *options],
        cwd=REPOSITORY, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def wait_for(happened: Callable[[], object], seconds: float) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def processes_of(project: Path, command: str | None = None) -> list[psutil.Process]:
    """Return the running processes of a project's flow, or only those of one command."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # the process has ended meanwhile
            ours = mark_of(process) == str(project) and process.status() != psutil.STATUS_ZOMBIE
            if ours and (command is None or process.cmdline()[:1] == [command]):
                processes.append(process)
    return processes


def sleepers(project: Path) -> list[psutil.Process]:
    """Return the stage processes that `sleep_STAGE` delays."""
    return processes_of(project, "sleep")
