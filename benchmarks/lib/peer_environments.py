"""Environments of other pruning libraries, and jobs that run in them."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.lib.deit_tiny import Batches

PEERS_FOLDER = Path(__file__).parents[1] / "peers"
ENVIRONMENTS = Path(__file__).parents[2] / ".venv-peers"
SHARES_PACKAGES = "# shares the packages of the benchmark's environment"  # first words of requirements that do


def python_of(environment: str) -> Path:
    """Return the Python of an environment; create it from benchmarks/peers/requirements/ENVIRONMENT.txt if needed.

    The empty name is the environment of the benchmark. An environment whose requirements begin with SHARES_PACKAGES
    also finds the packages of the benchmark's.
    """
    if not environment:
        return Path(sys.executable)
    folder, requirements = ENVIRONMENTS / environment, PEERS_FOLDER / "requirements" / f"{environment}.txt"
    installed = folder / "installed.txt"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        venv.create(folder, clear=True, with_pip=True)
        if requirements.read_text().startswith(SHARES_PACKAGES):
            (own,) = folder.glob("lib/python*/site-packages")
            (own / "shared.pth").write_text(sysconfig.get_path("purelib"))
        command = [folder / "bin/python", "-m", "pip", "install", "--quiet", "-r", requirements]
        if subprocess.run(command).returncode:
            sys.exit(f"{requirements}: cannot be installed into {folder}; pip's message is above")
        installed.write_text(requirements.read_text())
    return folder / "bin/python"


def run_job(
    folder: Path, environment: str, runner: str, spec: Mapping[str, Any], seconds: float
) -> tuple[dict[str, Tensor], dict[str, Any]] | str:
    """Run a runner that prunes.

    Args:
        folder: The job's folder, with the files of `write_case`.
        environment: Name of the environment.
        runner: Name of the script in benchmarks/peers/runners.
        spec: Contents of job.json.
        seconds: Limit of wall time.

    Returns:
        The pruned weights and result.json, or the last line of the error.
    """
    result = run_script(folder, environment, runner, spec, seconds)
    return result if isinstance(result, str) else (load_file(folder / "pruned.safetensors"), result)


def run_script(
    folder: Path, environment: str, runner: str, spec: Mapping[str, Any], seconds: float
) -> dict[str, Any] | str:
    """Run a runner on a folder, in its environment.

    Args:
        folder: The job's folder.
        environment: Name of the environment.
        runner: Name of the script in benchmarks/peers/runners.
        spec: Contents of job.json.
        seconds: Limit of wall time.

    Returns:
        result.json, or the last line of the error.
    """
    (folder / "job.json").write_text(json.dumps(spec))
    (folder / "result.json").unlink(missing_ok=True)
    script, variables = PEERS_FOLDER / "runners" / f"{runner}.py", dict(os.environ)
    variables.pop("PYTHONPATH", None)  # the peer's packages only
    command = [python_of(environment), script, folder]
    try:
        process = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} s"
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        return lines[-1] if lines else f"ends with exit code {process.returncode}"
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def write_case(folder: Path, weights: Mapping[str, Tensor], batches: Batches) -> None:
    """Write the dense weights and the calibration images of all jobs."""
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    save_file({"images": images, "labels": labels}, folder / "images.safetensors")
