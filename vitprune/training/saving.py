"""When a training is kept: every few minutes, and at once when the machine is to be given back (SIGTERM)."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vitprune.errors import PREEMPTED, BadInput, Interrupted
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from vitprune.training.checkpoint import Snapshot
from vitprune.training.checkpoint_store import CheckpointStore

EVERY = "VITPRUNE_CHECKPOINT_MINUTES"  # of the machine, not of the result: no stage depends on it
COPIES = 12  # of the weights: they, their average and two moments, in two checkpoints and in one that is written
Rows = Callable[[], Sequence[dict[str, Any]]]


def minutes() -> float:
    """Minutes between two checkpoints of a training, from the environment; 10 if it does not say.

    Raises:
        BadInput: it is not a number of at least 0.
    """
    text = os.environ.get(EVERY, "10")
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise BadInput(f"{EVERY}={text}: give the minutes between two checkpoints, 0 for one after every step")
    return number


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come since; it ends the process no longer. In a thread that gets no signals: never."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)


class Checkpointer:
    """Keeps one training on a shelf, with the rows of its history so far."""

    def __init__(
        self,
        shelf: CheckpointStore,
        rows: Rows,
        asked: Callable[[], bool] = lambda: False,
        dist: ProcessGroup = SINGLE_PROCESS,
    ):
        self._shelf, self._rows, self._asked, self._dist = shelf, rows, asked, dist
        self._every, self._written = 60 * minutes(), time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.begun: Snapshot | None = None
        if (saved := shelf.newest()) is not None:
            self.begun, self.rows = Snapshot(saved.tensors(), saved.facts["training"]), saved.facts["history"]

    @property
    def broadcast(self) -> str:
        """Where the last good state is, for an error's line."""
        saved = self._shelf.newest()
        return f"; the last good state is in {saved.directory}" if saved is not None else ""

    def reserve(self, module: nn.Module) -> None:
        """Refuse a training for whose checkpoints the disk has no room.

        Raises:
            OSError: ENOSPC.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        self._shelf.reserve(COPIES * size)

    def due(self) -> bool:
        """Whether some process has been asked to stop, or the last writing of the first one is some minutes ago."""
        now = self._dist.rank == 0 and time.monotonic() - self._written >= self._every
        return bool(self._dist.all_reduce(torch.tensor(float(now or self._asked()))))

    def write(self, snapshot: Snapshot) -> None:
        """Keep it.

        Raises:
            Interrupted: some process has been asked to stop.
        """
        if self._dist.rank == 0:
            self._shelf.put({"training": snapshot.facts, "history": list(self._rows())}, snapshot.tensors)
        asked = bool(self._dist.all_reduce(torch.tensor(float(self._asked()))))  # all wait until it is written
        self._written = time.monotonic()
        if asked:
            where = f"epoch {snapshot.facts['epoch'] + 1}, step {snapshot.facts['step']}"
            raise Interrupted(f"asked to stop (SIGTERM): kept at {where}; run again and it goes on there", PREEMPTED)
