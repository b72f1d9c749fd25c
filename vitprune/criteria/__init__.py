"""Importance criteria: functions of a model, its groups and calibration batches that score every unit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from vitprune.config.score_config import ScoreConfig
from vitprune.groups import Group, Masks, Scores
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup

DEFAULT_SCORE_CONFIG = ScoreConfig()
Batches = Sequence[tuple[Tensor, Tensor]]  # (images (B, C, H, W), labels (B,))
Statistics = dict[str, Tensor]  # float64 sums over images, by "path of a layer/what"
Update = Callable[[Masks], dict[str, Tensor]]  # masks -> new values of the remaining weights, by parameter name


class PartialScores(Protocol):
    """Storage of intermediate results, from which an interrupted criterion resumes."""

    def read(self, name: str) -> dict[str, Tensor]:
        """Read the tensors written under a name; empty if there are none."""

    def due(self) -> bool:
        """Return whether the last write is long enough ago to write large tensors again."""

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors under a name; an empty mapping deletes them."""


@dataclass(frozen=True)
class ScoringContext:
    """The user's options, and what belongs to one call of a criterion.

    Attributes:
        config: Options of the criteria.
        seed: Seed of the call's random numbers; every pruning cycle has its own.
        first: Index of the first image among all calibration images, if the batches are a part of them.
        pattern: (N, M) if N of every M consecutive weights will remain; None otherwise.
        dist: Process group that shares the work.
        partial: Storage of intermediate results of this process; None for none.
    """

    config: ScoreConfig = DEFAULT_SCORE_CONFIG
    seed: int = 0
    first: int = 0
    pattern: tuple[int, int] | None = None
    dist: ProcessGroup = field(default=SINGLE_PROCESS, repr=False, compare=False)
    partial: PartialScores | None = field(default=None, repr=False, compare=False)


DEFAULT_CONTEXT = ScoringContext()


@dataclass(frozen=True)
class Importance:
    """Result of a criterion.

    Attributes:
        scores: Importance of every unit; larger = more important.
        update: New values of the remaining weights that compensate for the removed ones; None for none.
        facts: Figures about the scoring, for its metrics.
        statistics: Sums over images from which the update can be computed later, without the images.
        orders: Orders of channels, by group name: scores, update and statistics are those of the model after
            `permute`. Empty if the channels are not re-ordered.
    """

    scores: Scores
    update: Update | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    orders: Mapping[str, Tensor] = field(default_factory=dict)


Criterion = Callable[[nn.Module, Sequence[Group], Batches, ScoringContext], Importance]
UpdateFromStats = Callable[[nn.Module, Sequence[Group], Statistics], Update]
RecomputeUpdate = Callable[[nn.Module, Sequence[Group], Batches, ScoringContext], Update]
