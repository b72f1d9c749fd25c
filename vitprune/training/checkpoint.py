"""A training at one moment as tensors and plain values: all that its next step depends on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup

PLAIN = (bool, int, float, str, type(None))
Known = Mapping[str, Mapping[str, Any]]  # parameter -> what an optimizer remembers of it


@dataclass(frozen=True)
class Snapshot:
    """Tensors by name, and values that JSON holds; of them `epoch` (from 0), `done` batches of it, and `step`."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Saving(Protocol):
    """Where a training is kept while it runs; `begun` is where it stood when it was broken off."""

    @property
    def begun(self) -> Snapshot | None:
        """What to go on from."""

    def due(self) -> bool:
        """Whether it is time to keep it again; the same in all processes."""

    def write(self, snapshot: Snapshot) -> None:
        """Keep it; called in all processes."""


def pack(known: Known, prefix: str) -> Snapshot:
    """What an optimizer remembers, as tensors `prefix/name/key` and plain values by name.

    Raises:
        BadInput: it remembers something else than tensors and plain values.
    """
    tensors, values = {}, dict[str, dict[str, Any]]()
    for name, own in known.items():
        values[name] = {}
        for key, value in own.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}/{name}/{key}"] = value
                values[name][key] = {"device": value.device.type}
            elif isinstance(value, PLAIN):
                values[name][key] = value
            else:
                raise BadInput(f"train.optimizer: keeps a {type(value).__name__} ({key}), which no checkpoint can hold")
    return Snapshot(tensors, {prefix: values})


def unpack(snapshot: Snapshot, prefix: str, device: torch.device) -> dict[str, dict[str, Any]]:
    """What `packed` made, on a device; what lay on the CPU lies there again."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in snapshot.facts[prefix].items():
        found[name] = {}
        for key, value in own.items():
            if isinstance(value, dict):
                place = device if value["device"] != "cpu" else torch.device("cpu")
                found[name][key] = snapshot.tensors[f"{prefix}/{name}/{key}"].to(place, copy=True)
            else:
                found[name][key] = value
    return found


@dataclass(frozen=True)
class TrainingState:
    """All that changes while a training runs, beside its counters: weights, optimizer, average, random numbers."""

    module: nn.Module
    optimizer: Any
    average: ModelEmaV3 | None
    generator: np.random.Generator
    scaler: Any = None
    dist: ProcessGroup = SINGLE_PROCESS

    def taken(self, counters: Mapping[str, Any]) -> Snapshot:
        """It as it is now; in all processes, of which the first gets the random numbers of all."""
        known = {str(number): self.optimizer.state[p] for number, p in self._parameters() if p in self.optimizer.state}
        optimizer = pack(known, "optimizer")
        tensors = optimizer.tensors | _prefixed("weights", self.module.state_dict())
        if self.average is not None:
            tensors |= _prefixed("average", self.average.module.state_dict())
        for kind, own in self._random().items():
            for rank, state in enumerate(self.dist.gather(own.double())):
                tensors[f"random/{kind}/{rank}"] = state.to(torch.uint8)
        groups = pack(self._groups(), "groups")
        tensors |= groups.tensors
        facts = optimizer.facts | groups.facts | {"generator": self.generator.bit_generator.state}
        facts |= {"scaler": self.scaler.state_dict()} if self.scaler is not None else {}
        return Snapshot(tensors, facts | dict(counters))

    def put_back(self, snapshot: Snapshot) -> None:
        """Make it as it was; a process that was not there then keeps the random numbers that it has."""
        self.module.load_state_dict(_below("weights", snapshot.tensors))
        if self.average is not None:
            self.average.module.load_state_dict(_below("average", snapshot.tensors))
        self.optimizer.state.clear()
        device = next(self.module.parameters()).device
        known, groups = (unpack(snapshot, prefix, device) for prefix in ("optimizer", "groups"))
        for number, parameter in self._parameters():
            if str(number) in known:
                self.optimizer.state[parameter] = known[str(number)]
        for number, group in enumerate(self.optimizer.param_groups):
            group.update(groups[str(number)])
        self.generator.bit_generator.state = snapshot.facts["generator"]
        if self.scaler is not None and "scaler" in snapshot.facts:
            self.scaler.load_state_dict(snapshot.facts["scaler"])
        for kind in self._random():
            state = snapshot.tensors.get(f"random/{kind}/{self.dist.rank}")
            if state is not None:
                set_random(kind, state)

    def _groups(self) -> Known:
        """What changes of the optimizer's groups; the rest is made of the recipe."""
        groups = enumerate(self.optimizer.param_groups)
        return {str(n): {k: v for k, v in group.items() if isinstance(v, (*PLAIN, Tensor))} for n, group in groups}

    def _parameters(self) -> Iterable[tuple[int, nn.Parameter]]:
        return enumerate(p for group in self.optimizer.param_groups for p in group["params"])

    def _random(self) -> dict[str, Tensor]:
        """torch's own generators: nothing else is drawn from between two batches."""
        found = {"cpu": torch.get_rng_state()}
        if next(self.module.parameters()).device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state()
        return found


def set_random(kind: str, state: Tensor) -> None:
    """Set one of torch's generators."""
    if kind == "cuda":
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
