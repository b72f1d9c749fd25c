"""Scores that are sums over images: shared among processes, and taken up again where they were broken off."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Criterion, Importance, ScoreConfig
from vitprune.errors import BadInput
from vitprune.groups import Group, Scores
from vitprune.models.io import read_weights, write_weights
from vitprune.runtime.distributed import ProcessGroup
from vitprune.runtime.progress import track

WRITE_EVERY = 300.0  # seconds between two writings of sums that may be gigabytes


@dataclass(frozen=True)
class ScoringJob:
    """What is to be scored, and how: all that scores depend on, beside the model."""

    criterion: Criterion
    groups: Sequence[Group]
    batches: Batches
    setting: ScoreConfig

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(group.units for group in self.groups)

    def importance(
        self, model: nn.Module, additive: bool, directory: Path, dist: ProcessGroup, collective: bool = False
    ) -> Importance | None:
        """Scores over all batches, in the first process; None in the others.

        Additive ones are shared and resumed: in each round every process scores one batch, and the first adds the
        results in the order of the batches, so the sum is the same to the bit for any number of processes. After each
        round it writes the sum under `directory`; what is there of the same work is taken up. A `collective` criterion
        shares the work itself, by `setting.team`.

        Raises:
            BadInput: several processes are to share scores that are no sums over batches.
        """
        if additive:
            total = self._summed(model, directory, dist)
            return None if dist.rank else Importance(_by_group(self.groups, total))
        if collective:
            name = f"scores-{self._digest(model)}-{dist.rank}-of-{dist.size}"
            own = replace(self.setting, team=dist, notes=PartialScoreStore(directory, name))
            found = self.criterion(model, self.groups, self.batches, own)
            return None if dist.rank else found
        if dist.size > 1:
            raise BadInput(f"{self.criterion.__qualname__}: its scores are no sums over images; use one process")
        return self.criterion(model, self.groups, self.batches, self.setting)

    def _summed(self, model: nn.Module, directory: Path, dist: ProcessGroup) -> Tensor:
        path = directory / f"scores-{self._digest(model)}.safetensors" if dist.rank == 0 else directory
        total, done = _taken_up(path, self.units) if dist.rank == 0 else (torch.empty(0), 0)
        done = dist.broadcast(done)
        rounds = range(done, len(self.batches), dist.size)
        before = -(-done // dist.size)
        for begin in track(rounds, "scoring, batch by batch", before + len(rounds), before):
            parts = dist.gather(self._part(model, begin + dist.rank))
            for part in parts:  # those beyond the last batch are zeros
                total += part
            if dist.rank == 0:
                done = min(len(self.batches), begin + dist.size)
                write_weights({"total": total, "done": torch.tensor(done)}, path)
        return total

    def _part(self, model: nn.Module, number: int) -> Tensor:
        """Scores of one batch in a row, group by group (units,), float64."""
        if number >= len(self.batches):
            return torch.zeros(self.units, dtype=torch.float64)
        first = self.setting.first + sum(len(images) for images, _ in self.batches[:number])
        setting = replace(self.setting, first=first)
        found = self.criterion(model, self.groups, [self.batches[number]], setting).scores
        return torch.cat([found[group.name].flatten().to("cpu", torch.float64) for group in self.groups])

    def _digest(self, model: nn.Module) -> str:
        """Another model, image, setting or kind of machine has another one, so that a stale sum is never taken up."""
        sha = hashlib.sha256()
        where = (torch.__version__, next(model.parameters()).device.type, torch.get_num_threads())
        sha.update(repr((self.criterion.__module__, self.criterion.__qualname__, self.setting, where)).encode())
        sha.update(repr([(group.name, group.shape, group.slices) for group in self.groups]).encode())
        weights = [tensor for _, tensor in sorted(model.state_dict().items())]
        for tensor in [*weights, *(tensor for batch in self.batches for tensor in batch)]:
            sha.update(repr((tensor.shape, tensor.dtype)).encode())
            sha.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()[:32]


class PartialScoreStore:
    """What one process has done so far, as files of one work's name in a directory."""

    def __init__(self, directory: Path, name: str, every: float = WRITE_EVERY):
        self._directory, self._name, self._every = directory, name, every
        self._written = time.monotonic()

    def read(self, name: str) -> dict[str, Tensor]:
        """What was written under that name, empty where nothing was."""
        return read_weights(self._path(name)) if self._path(name).exists() else {}

    def due(self) -> bool:
        """Whether the last writing is some minutes ago."""
        return time.monotonic() - self._written >= self._every

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name; none: forget it."""
        if tensors:
            write_weights(tensors, self._path(name))
        else:
            self._path(name).unlink(missing_ok=True)
        self._written = time.monotonic()

    def _path(self, name: str) -> Path:
        return self._directory / f"{self._name}-{name}.safetensors"


def clear_partial(directory: Path) -> None:
    """Remove the partial sums, once what they became is written."""
    for path in directory.glob("scores-*.safetensors"):
        path.unlink()


def _taken_up(path: Path, units: int) -> tuple[Tensor, int]:
    if not path.exists():
        return torch.zeros(units, dtype=torch.float64), 0
    found = read_weights(path)
    return found["total"], int(found["done"])


def _by_group(groups: Sequence[Group], total: Tensor) -> Scores:
    pieces = torch.split(total, [group.units for group in groups])
    return {group.name: piece.view(group.shape).clone() for group, piece in zip(groups, pieces, strict=True)}
