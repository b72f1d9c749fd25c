"""The score stage: importance scores, computed by several processes and resumed after an interruption."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitprune import models
from vitprune.architectures.stream_rotation import rotate_stream, stream_layers
from vitprune.config.params import Params
from vitprune.criteria import Batches, Criterion, Importance, ScoringContext
from vitprune.criteria.obs.stream import rotated, stream_basis
from vitprune.errors import BadInput
from vitprune.groups import Group, Scores
from vitprune.models.weights import read_optional_weights, write_weights
from vitprune.pipeline.artifacts import SCORES, summary_rows
from vitprune.pipeline.project_data import METRICS, OUT, calibration, device
from vitprune.pruning.cycle_masks import all_groups
from vitprune.pruning.held_out import fitted_images
from vitprune.pruning.plan import Plan, plan_of, scored_kinds
from vitprune.pruning.preparation import merging, narrowed
from vitprune.pruning.unusable_groups import scorable_groups
from vitprune.runtime import tables
from vitprune.runtime.distributed import ProcessGroup, process_group
from vitprune.runtime.files import sha256, write_json
from vitprune.runtime.progress import track

STATISTICS, ORDERS, ROTATION = "statistics.safetensors", "orders.safetensors", "rotation.safetensors"
NOT_ROTATED: Mapping[str, Tensor] = {}
PARTIAL = Path(".vitprune/partial")  # DVC empties the outputs of a stage before it runs, not this directory
WRITE_INTERVAL = 300.0  # seconds between two writes of partial sums, which can be gigabytes


def run(params: Params) -> None:
    """Write the scores of the dense model, their summary and metrics/score.json."""
    plan = plan_of(params)
    with process_group() as dist:
        model = narrowed(models.load(OUT / "dense").to(device()), plan)
        batches, rotation = fitted_images(calibration(model, params), plan.config.reconstruct), {}
        if plan.config.rotate_residual:
            rotation = {"matrix": _shared_basis(model, batches, plan, dist)}
            model = rotated(model.cpu(), rotation["matrix"], batches[0][0][:1]).to(device())
        model = merging(model, plan)
        groups = scored_groups(model, plan)
        job = ScoringJob(plan.method.criterion, groups, batches, plan.context(1))
        importance = job.importance(model, plan.method.additive, PARTIAL, dist, plan.method.collective)
    if importance is None:  # rank 0 writes
        return
    facts = write_scores(OUT / "score", groups, importance, rotation)
    write_json(METRICS / "score.json", {"method": plan.config.method} | facts)
    clear_partial(PARTIAL)


def load_prepared(plan: Plan) -> nn.Module:
    """Load the dense model that the cycles prune: of `prune.classes`, rotated as by the score stage, merging tokens."""
    model, rotation = narrowed(models.load(OUT / "dense"), plan), read_optional_weights(OUT / "score" / ROTATION)
    return merging(rotate_stream(model, rotation["matrix"]) if rotation else model, plan)


def _shared_basis(model: nn.Module, batches: Batches, plan: Plan, dist: ProcessGroup) -> Tensor:
    """Return the basis of the residual stream that rank 0 has computed, on every rank."""
    stream_layers(model)  # refuses a model on every rank
    if dist.rank:
        width = cast(Any, model).embed_dim
        return dist.all_reduce(torch.zeros(width, width, dtype=torch.float64))
    return dist.all_reduce(stream_basis(model, batches, plan.context(0)))


def scored_groups(model: nn.Module, plan: Plan) -> list[Group]:
    """Return the groups to score, with attention heads merged as the plan says."""
    return scorable_groups(model, all_groups(model, plan, scored_kinds(plan)), plan.method)


def write_scores(
    directory: Path, groups: Sequence[Group], importance: Importance, rotation: Mapping[str, Tensor] = NOT_ROTATED
) -> dict[str, Any]:
    """Write scores, their summary, statistics for weight updates, orders of channels and rotation of the stream.

    Args:
        directory: Directory to write.
        groups: The scored groups.
        importance: Scores, statistics and orders.
        rotation: Matrix of the rotation; empty for none.

    Returns:
        Number of groups and units, the criterion's own figures, and the SHA-256 of the scores.
    """
    write_weights(importance.scores, directory / SCORES)
    for name, tensors in ((STATISTICS, importance.statistics), (ORDERS, importance.orders), (ROTATION, rotation)):
        (directory / name).unlink(missing_ok=True)
        if tensors:
            write_weights(tensors, directory / name)
    tables.write_table(summary_rows(groups, importance.scores), tables.SCORES, directory / "summary.parquet")
    units = sum(group.units for group in groups)
    return {"groups": len(groups), "units": units, **importance.facts, "sha256": sha256(directory / SCORES)}


@dataclass(frozen=True)
class ScoringJob:
    """Everything that scores depend on except the model.

    Attributes:
        criterion: Importance criterion.
        groups: Groups to score.
        batches: Calibration batches.
        context: Options of the criterion and seed.
    """

    criterion: Criterion
    groups: Sequence[Group]
    batches: Batches
    context: ScoringContext

    @property
    def units(self) -> int:
        """Total number of units."""
        return sum(group.units for group in self.groups)

    def importance(
        self, model: nn.Module, additive: bool, directory: Path, dist: ProcessGroup, collective: bool = False
    ) -> Importance | None:
        """Compute the scores over all batches.

        Args:
            model: The dense model.
            additive: Whether scores are sums over batches. In each round every process scores one batch, and rank 0
                adds the results in the order of the batches, so the sum is bit-identical for any number of processes.
                After each round it writes the sum under `directory`, from which an interrupted job resumes.
            directory: Directory of the partial results.
            dist: Process group.
            collective: Whether the criterion itself distributes its work, through `context.dist`.

        Returns:
            The scores on rank 0, None on the other ranks.

        Raises:
            BadInput: several processes, and scores that are neither additive nor collective.
        """
        if additive:
            total = self._summed(model, directory, dist)
            return None if dist.rank else Importance(_by_group(self.groups, total))
        if collective:
            name = f"scores-{self._digest(model)}-{dist.rank}-of-{dist.size}"
            context = replace(self.context, dist=dist, partial=PartialScoreStore(directory, name))
            importance = self.criterion(model, self.groups, self.batches, context)
            return None if dist.rank else importance
        if dist.size > 1:
            raise BadInput(f"{self.criterion.__qualname__}: its scores are no sums over images; use one process")
        return self.criterion(model, self.groups, self.batches, self.context)

    def _summed(self, model: nn.Module, directory: Path, dist: ProcessGroup) -> Tensor:
        path = directory / f"scores-{self._digest(model)}.safetensors" if dist.rank == 0 else directory
        total, done = _read_partial(path, self.units) if dist.rank == 0 else (torch.empty(0), 0)
        done = dist.broadcast(done)
        rounds = range(done, len(self.batches), dist.size)
        before = -(-done // dist.size)
        for first in track(rounds, "scoring, batch by batch", before + len(rounds), before):
            for part in dist.gather(self._part(model, first + dist.rank)):  # zeros beyond the last batch
                total += part
            if dist.rank == 0:
                done = min(len(self.batches), first + dist.size)
                write_weights({"total": total, "done": torch.tensor(done)}, path)
        return total

    def _part(self, model: nn.Module, number: int) -> Tensor:
        """Return the scores of one batch, concatenated over groups: (units,), float64."""
        if number >= len(self.batches):
            return torch.zeros(self.units, dtype=torch.float64)
        first = self.context.first + sum(len(images) for images, _ in self.batches[:number])
        context = replace(self.context, first=first)
        scores = self.criterion(model, self.groups, [self.batches[number]], context).scores
        return torch.cat([scores[group.name].flatten().to("cpu", torch.float64) for group in self.groups])

    def _digest(self, model: nn.Module) -> str:
        """Hash model, images, settings and machine type, so that partial sums of another job are never used."""
        sha = hashlib.sha256()
        machine = (torch.__version__, next(model.parameters()).device.type, torch.get_num_threads())
        sha.update(repr((self.criterion.__module__, self.criterion.__qualname__, self.context, machine)).encode())
        sha.update(repr([(group.name, group.shape, group.slices) for group in self.groups]).encode())
        weights = [tensor for _, tensor in sorted(model.state_dict().items())]
        for tensor in [*weights, *(tensor for batch in self.batches for tensor in batch)]:
            sha.update(repr((tensor.shape, tensor.dtype)).encode())
            sha.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()[:32]


class PartialScoreStore:
    """Partial results of one rank of a collective criterion, as files in a directory.

    Args:
        directory: Directory of the files.
        name: Prefix of their names.
    """

    def __init__(self, directory: Path, name: str):
        self._directory, self._name = directory, name
        self._written = time.monotonic()

    def read(self, name: str) -> dict[str, Tensor]:
        """Read the tensors written under a name; empty if there are none."""
        return read_optional_weights(self._path(name))

    def due(self) -> bool:
        """Return whether the interval between two writes has passed since the last write."""
        return time.monotonic() - self._written >= WRITE_INTERVAL

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors under a name; an empty mapping deletes them."""
        if tensors:
            write_weights(tensors, self._path(name))
        else:
            self._path(name).unlink(missing_ok=True)
        self._written = time.monotonic()

    def _path(self, name: str) -> Path:
        return self._directory / f"{self._name}-{name}.safetensors"


def clear_partial(directory: Path) -> None:
    """Delete partial results after the scores have been written."""
    for path in directory.glob("scores-*.safetensors"):
        path.unlink()


def _read_partial(path: Path, units: int) -> tuple[Tensor, int]:
    saved = read_optional_weights(path) or {"total": torch.zeros(units, dtype=torch.float64), "done": torch.tensor(0)}
    return saved["total"], int(saved["done"])


def _by_group(groups: Sequence[Group], total: Tensor) -> Scores:
    pieces = torch.split(total, [group.units for group in groups])
    return {group.name: piece.view(group.shape).clone() for group, piece in zip(groups, pieces, strict=True)}
