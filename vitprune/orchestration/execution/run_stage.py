"""Run one DVC stage; classify the result as cached, succeeded or failed, with the failure class."""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from vitprune.orchestration.attestation.signing import PASSPHRASE, SIGNING_KEY
from vitprune.orchestration.execution.dvc_cache import damaged_output
from vitprune.orchestration.execution.processes import process_environment, run
from vitprune.pipeline.stages import STAGES as COMPUTED

STAGES = (*COMPUTED, "report")


class FailureClass(Enum):
    """Failure class of a stage: it decides about a retry and the exit code."""

    NONE = "none"
    INPUT = "bad input"
    INFRASTRUCTURE = "infrastructure"
    LIMIT = "time limit"
    STAGE = "stage"


@dataclass(frozen=True)
class StageResult:
    """Result of one stage: cached or run; `started` and `seconds` in seconds; `error` is one line, empty on success.

    `epochs` has the time of each epoch that the stage trained, in seconds since 1970.
    """

    stage: str
    cached: bool
    started: float
    seconds: float
    exit_code: int
    failure: FailureClass = FailureClass.NONE
    error: str = ""
    epochs: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {**asdict(self), "failure": self.failure.value}


# DVC's messages for failures that a retry may cure: a lock held by another process, a remote that does not answer, an
# entry of the run cache that another process was writing (DVC reads and removes its temporary files).
_INFRASTRUCTURE = re.compile(
    r"is busy, it is being blocked by|Unable to acquire lock|Failed to acquire lock|failed to (pull|fetch|download)"
    r"|Connection (refused|reset|aborted)|Could not connect|Temporary failure in name resolution|Read timed out"
    r"|No such file or directory: '[^']*/runs/[0-9a-f]{2}/[0-9a-f]+/[^'/]*\.tmp'"
)
# DVC's messages for a dvc.yaml or params.yaml that the user has to correct.
_INPUT = re.compile(
    r"^ERROR: .*(Parameters .* are missing from|YAML file structure is corrupted|not inside of a DVC repository"
    r"|is git-ignored|Stage '.*' not found inside)|^'.*dvc.yaml' (validation failed|is invalid)"
)
# DVC's hints about its lock file, git and remotes.
_HINT = re.compile(
    r"\s*(To track the changes with git|git add |To enable auto staging|dvc config core\.autostage|Use `dvc push`"
    r"|Generating lock file|Updating lock file|Data and pipelines are up to date)"
)
_EXITED = re.compile(r"^ERROR: failed to reproduce .* exited with (-?\d+)$")
# killed by a signal (worker lost, out of memory); 75 (EX_TEMPFAIL): the stage asks for a retry
_KILLED = {-9, -15, 75, 137, 143}


def reproduce(stage: str, project: Path, limit: float | None, log: Callable[[str], None]) -> StageResult:
    """Run `dvc repro --single-item STAGE` in this process's group.

    Args:
        stage: Name of the stage in dvc.yaml.
        project: The project's directory.
        limit: Seconds after which the stage with all its descendants is killed; None: no limit.
        log: Called with every line of output, except for DVC's hints about git and its lock file.

    Returns:
        How the stage ended, with its failure class.
    """
    lines: list[str] = []
    ran = False

    def line(text: str) -> None:
        nonlocal ran
        ran = ran or text == f"Running stage '{stage}':"
        lines.append(text)
        del lines[:-400]
        if text.strip() and not _HINT.match(text):
            log(text)

    started = time.time()
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    env = {name: value for name, value in process_environment(project).items() if name not in (SIGNING_KEY, PASSPHRASE)}
    ended = run(command, project, env, limit, line)
    seconds = time.time() - started
    if ended.timed_out:
        error = f"{stage}: killed after {seconds:.0f} s by --stage-limit {limit:g}; raise the limit and run again"
        return StageResult(stage, False, started, seconds, ended.exit_code, FailureClass.LIMIT, error)
    if ended.exit_code == 0:
        if damage := damaged_output(project, stage):
            return StageResult(stage, False, started, seconds, 1, FailureClass.STAGE, f"{stage}: {damage}")
        return StageResult(stage, not ran, started, seconds, 0)
    failure, code = _classify_failure(ended.exit_code, lines)
    return StageResult(stage, False, started, seconds, code, failure, _error_line(stage, lines, code))


def _classify_failure(exit_code: int, lines: list[str]) -> tuple[FailureClass, int]:
    """Return the failure class and exit code of the stage from DVC's messages; DVC itself always exits with 255."""
    codes = [int(match[1]) for text in lines if (match := _EXITED.match(text))]
    if codes:
        code = codes[-1]
        if code == 2:
            return FailureClass.INPUT, code
        return (FailureClass.INFRASTRUCTURE if code in _KILLED else FailureClass.STAGE), code
    if exit_code in _KILLED or any(_INFRASTRUCTURE.search(text) for text in lines):
        return FailureClass.INFRASTRUCTURE, exit_code
    if any(_INPUT.search(text) for text in lines):
        return FailureClass.INPUT, exit_code
    return FailureClass.STAGE, exit_code


def _error_line(stage: str, lines: list[str], code: int) -> str:
    """Return the reason of the failure in one line: the stage's error line, else DVC's."""
    for prefix in ("Error: ", "ERROR: "):
        errors = [text.removeprefix(prefix) for text in lines if text.startswith(prefix)]
        if errors:
            return f"{stage}: {errors[-1]}"
    if invalid := next((text for text in lines if _INPUT.search(text)), ""):
        return f"{stage}: {invalid} {' '.join(' '.join(lines).removeprefix(invalid).split())[:200]}"
    return f"{stage}: ended with exit code {code} and no error line; see the output above"
