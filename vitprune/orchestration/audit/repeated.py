"""Run the stages without training again in a second process, while this one checks the records."""

import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.errors import BadInput

if TYPE_CHECKING:
    from vitprune.orchestration.audit.collect import CollectedRun


class RepeatedStages:
    """The second process. It imports the stages at once, and runs them in its own copy of the tree."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lines: dict[str, Sequence[str]] = {}

    def start(self, collected: "CollectedRun", limit: float) -> None:
        """Copy a run's tree and run its stages there.

        Args:
            collected: The run.
            limit: Seconds; a stage that took longer is not run again.
        """
        copy = collected.scratch / "repeated"
        shutil.copytree(collected.scratch / "tree", copy, symlinks=True)
        try:
            outputs = collected.outputs
        except BadInput as error:
            from vitprune.pipeline.verify import REPEATED

            self._lines = dict.fromkeys(REPEATED, (str(error),))
        else:
            self._connection.send((copy / collected.prefix, outputs, collected.seconds, limit))

    def differences(self, stage: str) -> Iterator[str]:
        """Wait for a stage, and yield its differences and notes."""
        while stage not in self._lines:
            try:
                done, lines = self._connection.recv()
            except EOFError:
                done, lines = stage, [f"{stage}: the process that ran it again ended; is there enough memory?"]
            self._lines[done] = lines
        yield from self._lines[stage]


@contextmanager
def repeated_stages() -> Iterator[RepeatedStages]:
    """Start the second process; it ends with the block."""
    connection, other = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_serve, args=(connection, other))
    process.start()
    other.close()
    try:
        yield RepeatedStages(connection)
    finally:
        process.kill()
        process.join()
        connection.close()


def _serve(of_parent: Connection, connection: Connection) -> None:
    """Import the stages, then run those of one tree and send their lines."""
    of_parent.close()  # the end of the parent then ends `recv`
    from vitprune.config.params import load_params
    from vitprune.pipeline.verify import REPEATED, RecordedRun, recheck

    try:
        tree, outputs, seconds, limit = connection.recv()
    except EOFError:
        return
    os.chdir(tree)
    for stage in REPEATED:
        try:
            lines = list(recheck(stage, RecordedRun(load_params(Path("params.yaml")), outputs, seconds, limit)))
        except BadInput as error:
            lines = [str(error)]
        connection.send((stage, lines))
