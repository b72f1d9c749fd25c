"""A stage in several processes: torchrun or accelerate launch, as the environment says."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from vitprune.errors import PREEMPTED, BadInput

LAUNCH, CODE = "VITPRUNE_LAUNCH", "VITPRUNE_CODE_FILE"  # how; where the processes say how they ended
TOGETHER = ("dense", "score", "prune", "distill")


def wanted(stage: str) -> bool:
    """Whether this process is to start others for a stage, and is none of them itself."""
    return stage in TOGETHER and bool(os.environ.get(LAUNCH)) and "WORLD_SIZE" not in os.environ


def together(stage: str, project: Path) -> int:
    """Run a stage by the launcher that VITPRUNE_LAUNCH names with its options; returns the exit code of the stage.

    SIGTERM is handed on, and is the end of the stage that has kept its work.

    Raises:
        BadInput: there is no such launcher.
    """
    words = shlex.split(os.environ[LAUNCH])
    command = [*words, "-m", "vitprune.cli", stage, "-C", str(project)]
    with tempfile.TemporaryDirectory() as name:
        code = Path(name) / "code"
        try:
            process = subprocess.Popen(command, env=os.environ | {CODE: str(code)})
        except OSError as error:
            raise BadInput(f"{LAUNCH}={os.environ[LAUNCH]}: cannot be started ({error.strerror})") from None
        asked: list[int] = []

        def hand_on(number: int, frame: object) -> None:
            asked.append(number)
            process.send_signal(signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, hand_on)
        try:
            ended = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        said = int(code.read_text()) if code.exists() else 0
    return PREEMPTED if ended and asked else said if ended and said else ended


def say(code: int) -> None:
    """Tell the process that has started this one how it ends: the launchers say 1 whatever it was."""
    if (path := os.environ.get(CODE)) and "WORLD_SIZE" in os.environ:
        Path(path).write_text(str(code))
        sys.stderr.flush()
