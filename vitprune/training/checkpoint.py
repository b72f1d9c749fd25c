"""Training checkpoints: the state of a run, and when it is saved (every few minutes, on SIGTERM and Ctrl-C)."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitprune.errors import EXIT_PREEMPTED, BadInput, Interrupted
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from vitprune.training.checkpoint_store import CheckpointStore

JSON_TYPES = (bool, int, float, str, type(None))
INTERVAL_ENV = "VITPRUNE_CHECKPOINT_MINUTES"  # an environment variable: it does not change the result
WEIGHT_COPIES = 12  # weights, EMA and two optimizer moments, in two checkpoints and in the one being written
ParameterState = Mapping[str, Mapping[str, Any]]  # parameter -> its optimizer state
Rows = Callable[[], Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Snapshot:
    """Tensors by name and JSON values.

    The values of a training include `epoch` (from 0), `done` (finished batches of that epoch) and `step`.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def pack(states: ParameterState, prefix: str) -> Snapshot:
    """Split optimizer state into tensors and JSON values.

    Args:
        states: Optimizer state by parameter.
        prefix: Prefix of the names; a tensor is named `prefix/parameter/key`.

    Returns:
        The state, which `unpack` restores.

    Raises:
        BadInput: a state is neither a tensor nor a plain value.
    """
    tensors, values = {}, dict[str, dict[str, Any]]()
    for name, state in states.items():
        values[name] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}/{name}/{key}"] = value
                values[name][key] = {"device": value.device.type}
            elif isinstance(value, JSON_TYPES):
                values[name][key] = value
            else:
                why = f"state {key} is a {type(value).__name__}, which cannot be saved"
                raise BadInput(f"train.optimizer: {why}; use another optimizer")
    return Snapshot(tensors, {prefix: values})


def unpack(snapshot: Snapshot, prefix: str, device: torch.device) -> dict[str, dict[str, Any]]:
    """Restore the optimizer state that `pack` split.

    Args:
        snapshot: Tensors and values of `pack`.
        prefix: The same prefix.
        device: Device of the tensors; those that were on the CPU are placed on the CPU.

    Returns:
        Optimizer state by parameter.
    """
    states: dict[str, dict[str, Any]] = {}
    for name, state in snapshot.facts[prefix].items():
        states[name] = {}
        for key, value in state.items():
            if isinstance(value, dict):
                target = device if value["device"] != "cpu" else torch.device("cpu")
                states[name][key] = snapshot.tensors[f"{prefix}/{name}/{key}"].to(target, copy=True)
            else:
                states[name][key] = value
    return states


@dataclass(frozen=True)
class TrainingState:
    """State of a training apart from its counters: weights, optimizer, EMA, gradient scaler and random generators."""

    module: nn.Module
    optimizer: Any
    average: ModelEmaV3 | None
    generator: np.random.Generator
    scaler: Any = None
    dist: ProcessGroup = SINGLE_PROCESS

    def capture(self, counters: Mapping[str, Any]) -> Snapshot:
        """Take a snapshot; call it in every process. Rank 0 gets the random states of all ranks.

        Args:
            counters: Values to store with the state: epoch, step and so on.

        Returns:
            The snapshot; it is complete on rank 0 only.
        """
        states = {str(number): self.optimizer.state[p] for number, p in self._parameters() if p in self.optimizer.state}
        optimizer = pack(states, "optimizer")
        tensors = optimizer.tensors | _add_prefix("weights", self.module.state_dict())
        if self.average is not None:
            tensors |= _add_prefix("average", self.average.module.state_dict())
        for kind, local in rng_states(next(self.module.parameters()).device).items():
            for rank, state in enumerate(self.dist.gather(local.double())):
                tensors[f"random/{kind}/{rank}"] = state.to(torch.uint8)
        groups = pack(self._param_groups(), "groups")
        tensors |= groups.tensors
        facts = optimizer.facts | groups.facts | {"generator": self.generator.bit_generator.state}
        facts |= {"scaler": self.scaler.state_dict()} if self.scaler is not None else {}
        return Snapshot(tensors, facts | dict(counters))

    def restore(self, snapshot: Snapshot) -> None:
        """Load a snapshot in place. A rank that the snapshot does not have keeps its own random state."""
        self.module.load_state_dict(_strip_prefix("weights", snapshot.tensors))
        if self.average is not None:
            self.average.module.load_state_dict(_strip_prefix("average", snapshot.tensors))
        self.optimizer.state.clear()
        device = next(self.module.parameters()).device
        states, groups = (unpack(snapshot, prefix, device) for prefix in ("optimizer", "groups"))
        for number, parameter in self._parameters():
            if str(number) in states:
                self.optimizer.state[parameter] = states[str(number)]
        for number, group in enumerate(self.optimizer.param_groups):
            group.update(groups[str(number)])
        self.generator.bit_generator.state = snapshot.facts["generator"]
        if self.scaler is not None and "scaler" in snapshot.facts:
            self.scaler.load_state_dict(snapshot.facts["scaler"])
        for kind in rng_states(device):
            state = snapshot.tensors.get(f"random/{kind}/{self.dist.rank}")
            if state is not None:
                set_rng_state(kind, state)

    def _param_groups(self) -> ParameterState:
        """Plain values and tensors of the parameter groups; the rest is rebuilt from the settings."""
        groups = enumerate(self.optimizer.param_groups)
        return {str(n): {k: v for k, v in group.items() if isinstance(v, (*JSON_TYPES, Tensor))} for n, group in groups}

    def _parameters(self) -> Iterable[tuple[int, nn.Parameter]]:
        return enumerate(p for group in self.optimizer.param_groups for p in group["params"])


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators, the only global ones that training uses between two batches."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | cuda


def set_rng_state(kind: str, state: Tensor) -> None:
    """Set the state of torch's "cpu" or "cuda" random generator."""
    if kind == "cuda":
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def checkpoint_minutes() -> float:
    """Return the minutes between two checkpoints: VITPRUNE_CHECKPOINT_MINUTES, by default 10.

    Raises:
        BadInput: the value is not a number of at least 0.
    """
    text = os.environ.get(INTERVAL_ENV, "10")
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise BadInput(f"{INTERVAL_ENV}={text}: give the minutes between two checkpoints, 0 for one after every step")
    return number


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM and Ctrl-C instead of ending the process; the previous handlers are restored at the end.

    A second Ctrl-C ends the process at once, except under a launcher, which repeats the signal of the terminal.

    Yields:
        A function that returns whether a signal has been received; outside the main thread it always returns False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT and "WORLD_SIZE" not in os.environ:
            signal.signal(number, signal.default_int_handler)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Checkpointer:
    """Save one training to a checkpoint store, at an interval and when a stop is requested.

    Args:
        store: The store of this training.
        rows: Returns the rows of the training history so far.
        stop_requested: Returns whether this process should stop, for example `catch_stop_signals`'s function.
        dist: The process group; only rank 0 writes.

    Attributes:
        resumed_from: The latest checkpoint, None for a new training.
        history_rows: The history rows of that checkpoint.
    """

    def __init__(
        self,
        store: CheckpointStore,
        rows: Rows,
        stop_requested: Callable[[], bool] = lambda: False,
        dist: ProcessGroup = SINGLE_PROCESS,
    ):
        self._store, self._rows, self._stop_requested, self._dist = store, rows, stop_requested, dist
        self._interval, self._last_write = 60 * checkpoint_minutes(), time.monotonic()
        self.history_rows: list[dict[str, Any]] = []
        self.resumed_from: Snapshot | None = None
        if (saved := store.latest()) is not None:
            self.resumed_from = Snapshot(saved.tensors(), saved.facts["training"])
            self.history_rows = saved.facts["history"]

    @property
    def last_checkpoint_note(self) -> str:
        """End of an error message that names the latest checkpoint; empty if there is none."""
        saved = self._store.latest()
        return f"; the last checkpoint is {saved.directory}" if saved is not None else ""

    def check_disk_space(self, module: nn.Module) -> None:
        """Check that the disk has room for the checkpoints of a module.

        Raises:
            OSError: ENOSPC.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        self._store.check_disk_space(WEIGHT_COPIES * size)

    def due(self) -> bool:
        """Return whether to save now: a stop is requested in some process, or the interval has passed on rank 0."""
        elapsed = self._dist.rank == 0 and time.monotonic() - self._last_write >= self._interval
        return bool(self._dist.all_reduce(torch.tensor(float(elapsed or self._stop_requested()))))

    def write(self, snapshot: Snapshot) -> None:
        """Save a snapshot; call it in every process.

        Raises:
            Interrupted: a stop is requested in some process.
        """
        if self._dist.rank == 0:
            self._store.save({"training": snapshot.facts, "history": list(self._rows())}, snapshot.tensors)
        # the sum is also a barrier: no process continues before the checkpoint is written
        stop = bool(self._dist.all_reduce(torch.tensor(float(self._stop_requested()))))
        self._last_write = time.monotonic()
        if stop:
            saved = f"checkpoint saved at epoch {snapshot.facts['epoch'] + 1}, step {snapshot.facts['step']}"
            raise Interrupted(f"stopped by a signal, {saved}; run again to resume", EXIT_PREEMPTED)
