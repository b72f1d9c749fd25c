"""Start a stage in several processes with torchrun or accelerate launch."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from vitprune.errors import EXIT_PREEMPTED, BadInput

LAUNCH = "VITPRUNE_LAUNCH"  # the launcher and its options
CODE = "VITPRUNE_CODE_FILE"  # file to which the processes write their exit code
DISTRIBUTED_STAGES = ("dense", "score", "prune", "distill")


def wanted(stage: str) -> bool:
    """Return whether this process has to start the launcher for a stage, and is not itself started by one."""
    return stage in DISTRIBUTED_STAGES and bool(os.environ.get(LAUNCH)) and "WORLD_SIZE" not in os.environ


def launch(stage: str, project: Path) -> int:
    """Run a stage with the launcher of VITPRUNE_LAUNCH; SIGTERM is forwarded to it, Ctrl-C reaches it by itself.

    Returns:
        The exit code of the stage.

    Raises:
        BadInput: the launcher cannot be started.
    """
    command = [*shlex.split(os.environ[LAUNCH]), "-m", "vitprune.cli", stage, "-C", str(project)]
    with tempfile.TemporaryDirectory() as name:
        code_file = Path(name) / "code"
        try:
            process = subprocess.Popen(command, env=os.environ | {CODE: str(code_file)})
        except OSError as error:
            raise BadInput(f"{LAUNCH}={os.environ[LAUNCH]}: cannot be started ({error.strerror})") from None
        signals: list[int] = []

        def forward(number: int, frame: object) -> None:
            signals.append(number)
            if number == signal.SIGTERM:
                process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            launcher_code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        stage_code = int(code_file.read_text()) if code_file.exists() else 0
    if launcher_code == 0:
        return 0
    return EXIT_PREEMPTED if signals else stage_code or launcher_code


def report_exit_code(code: int) -> None:
    """Write the exit code of this process for `launch`: launchers exit with 1 whatever the code of the process."""
    if (path := os.environ.get(CODE)) and "WORLD_SIZE" in os.environ:
        Path(path).write_text(str(code))
        sys.stderr.flush()
