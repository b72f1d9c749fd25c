"""One stage under DVC: run it, and say whether DVC had it already, how it ended and whose fault that was."""

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from vitprune.orchestration.execution.processes import MARK, run

STAGES = ("dataset", "dense", "calibrate", "score", "mask", "prune", "distill", "evaluate", "export", "report")


class Fault(Enum):
    """Whose fault a failure is: it decides about a new attempt and the exit code."""

    NONE = "none"
    INPUT = "bad input"
    INFRASTRUCTURE = "infrastructure"
    LIMIT = "time limit"
    STAGE = "stage"


@dataclass(frozen=True)
class StageResult:
    """How one stage went: DVC had it already (cached) or it ran; times in seconds; error is one line, empty if none."""

    stage: str
    cached: bool
    started: float
    seconds: float
    exit_code: int
    fault: Fault = Fault.NONE
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {**asdict(self), "fault": self.fault.value}


# DVC's own words for what goes away by itself: a lock that another process holds, a remote that does not answer.
_INFRASTRUCTURE = re.compile(
    r"is busy, it is being blocked by|Unable to acquire lock|Failed to acquire lock|failed to (pull|fetch|download)"
    r"|Connection (refused|reset|aborted)|Could not connect|Temporary failure in name resolution|Read timed out"
)
# DVC's own words for a dvc.yaml or params.yaml that has to be mended by hand.
_INPUT = re.compile(
    r"^ERROR: .*(Parameters .* are missing from|YAML file structure is corrupted|not inside of a DVC repository"
    r"|is git-ignored|Stage '.*' not found inside)|^'.*dvc.yaml' (validation failed|is invalid)"
)
_EXITED = re.compile(r"^ERROR: failed to reproduce .* exited with (-?\d+)$")
# by a signal from outside: a lost worker, the kernel short of memory; 75: a stage asks for another attempt
_KILLED = {-9, -15, 75, 137, 143}


def reproduce(stage: str, project: Path, limit: float | None, tell: Callable[[str], None]) -> StageResult:
    """Run `dvc repro --single-item STAGE` in this process's group; every line of output goes to `tell`.

    `limit` is in seconds. What runs at the limit, with all its descendants, is killed.
    """
    lines: list[str] = []
    ran = False

    def line(text: str) -> None:
        nonlocal ran
        ran = ran or text == f"Running stage '{stage}':"
        lines.append(text)
        del lines[:-400]
        if text.strip() and not _is_chatter(text):
            tell(text)

    started = time.time()
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    ended = run(command, project, environment(project), limit, line)
    seconds = time.time() - started
    if ended.timed_out:
        error = f"{stage}: stopped after {seconds:.0f} s by --stage-limit {limit:g}; raise the limit and start again"
        return StageResult(stage, False, started, seconds, ended.exit_code, Fault.LIMIT, error)
    if ended.exit_code == 0:
        return StageResult(stage, not ran, started, seconds, 0)
    fault, code = _whose_fault(ended.exit_code, lines)
    return StageResult(stage, False, started, seconds, code, fault, _error_line(stage, lines, code))


def environment(project: Path) -> dict[str, str]:
    """Return the stages' environment: this interpreter's programs first, output at once, no run of MLflow to join."""
    env = {name: value for name, value in os.environ.items() if name not in {"MLFLOW_RUN_ID", "PYTHONHOME"}}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env | {MARK: str(project), "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"}


def _whose_fault(exit_code: int, lines: list[str]) -> tuple[Fault, int]:
    """Tell from DVC's words (it ends with 255 whatever the stage's code was) whose fault a failure is."""
    codes = [int(match[1]) for text in lines if (match := _EXITED.match(text))]
    if codes:
        code = codes[-1]
        if code == 2:
            return Fault.INPUT, code
        return (Fault.INFRASTRUCTURE if code in _KILLED else Fault.STAGE), code
    if exit_code in _KILLED or any(_INFRASTRUCTURE.search(text) for text in lines):
        return Fault.INFRASTRUCTURE, exit_code
    if any(_INPUT.search(text) for text in lines):
        return Fault.INPUT, exit_code
    return Fault.STAGE, exit_code


def _error_line(stage: str, lines: list[str], code: int) -> str:
    """Return the one line that says what went wrong: the stage's own, else DVC's."""
    for prefix in ("Error: ", "ERROR: "):
        said = [text.removeprefix(prefix) for text in lines if text.startswith(prefix)]
        if said:
            return f"{stage}: {said[-1]}"
    if broken := next((text for text in lines if _INPUT.search(text)), ""):
        return f"{stage}: {broken} {' '.join(' '.join(lines).removeprefix(broken).split())[:200]}"
    return f"{stage}: ended with exit code {code} and no error line; see the output above"


def _is_chatter(text: str) -> bool:
    """Whether a line is DVC's talk about its lock file, git and remotes, which says nothing about the stage."""
    return text.strip().startswith(
        (
            "To track the changes with git",
            "git add ",
            "To enable auto staging",
            "dvc config core.autostage",
            "Use `dvc push`",
            "Generating lock file",
            "Updating lock file",
            "Data and pipelines are up to date",
        )
    )


def check_params(project: Path) -> str:
    """Return what is wrong with params.yaml in one line, empty if nothing is.

    DVC sees only the keys that a stage names, so a misspelt key would pass as "nothing changed". The check runs in a
    process of its own: the library brings torch along, which a flow has no use for.
    """
    lines: list[str] = []
    ended = run([sys.executable, "-c", _CHECK], project, environment(project), None, lines.append)
    return (
        ""
        if ended.exit_code == 0
        else next((text for text in reversed(lines) if text.strip()), "params.yaml: unreadable")
    )


# The package is laid out but not run: it brings torch and timm along, which cost seconds and are not needed here.
_CHECK = """
import sys
from importlib.util import find_spec, module_from_spec
from pathlib import Path
sys.modules["vitprune"] = module_from_spec(find_spec("vitprune"))
from vitprune.errors import BadInput
from vitprune.config.params import load
try:
    load(Path("params.yaml"))
except BadInput as error:
    sys.exit(str(error))
"""
