"""What a unit is worth: a criterion reads a model, its groups and batches, and gives one score per unit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from vitprune.groups import Group, Masks, Scores
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup

Batches = Sequence[tuple[Tensor, Tensor]]  # (images (B, C, H, W), labels (B,))
Update = Callable[[Masks], dict[str, Tensor]]


class PartialScores(Protocol):
    """What is done so far, kept where a kill cannot reach it; by names that the criterion chooses."""

    def read(self, name: str) -> dict[str, Tensor]:
        """What was written under that name, empty where nothing was."""

    def due(self) -> bool:
        """Whether so much time has passed since the last writing that large things are worth it again."""

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, in the place of what was there; none: forget it."""


@dataclass(frozen=True)
class ScoreConfig:
    """How a criterion runs: its seed, and limits that change time and memory, or the last digits of an estimate.

    `memory` (bytes) bounds the activations of candidates in flight, `fisher_directions` counts the gradients that are
    taken of an image's answer (half in its leading directions, half in random ones), `autocast` lets forward and
    backward passes run in bfloat16, `confidence` is the expected share of a kept set that is exact. `first` is the
    position of the first image among all images, where the batches are a part of them.

    Of Fisher blocks: `fisher_block_size` weights each, at least; `damping` on the diagonal; as many `num_gradients`,
    None for one look at every image; each of one image (`per_sample`) or of the mean loss of `gradient_batch` images.
    `memory` bounds the matrices that are held. `pattern` is (N, M) where N of every M consecutive weights are to stay.
    The processes of `team` share the gradients and the blocks; each has `notes` of its own, if it has any.
    """

    seed: int = 0
    memory: int = 1 << 30
    fisher_directions: int = 8
    autocast: bool = False
    confidence: float = 0.99
    first: int = 0
    fisher_block_size: int = 192
    damping: float = 1e-8
    num_gradients: int | None = None
    gradient_batch: int = 128
    per_sample: bool = True
    pattern: tuple[int, int] | None = None
    team: ProcessGroup = field(default=SINGLE_PROCESS, repr=False, compare=False)
    notes: PartialScores | None = field(default=None, repr=False, compare=False)


DEFAULT_SCORE_CONFIG = ScoreConfig()


@dataclass(frozen=True)
class Importance:
    """Scores (larger = worth more) and, where the criterion has one, the update of the surviving weights.

    `update` maps masks to new values by parameter name, by which the survivors make up for what goes. `facts` are
    figures about the scoring itself, for its metrics.
    `statistics` are what the update needs, so that another run need not look at the images again.
    """

    scores: Scores
    update: Update | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


Statistics = dict[str, Tensor]  # float64 sums over images, by "path of a layer/what"
UpdateFromStats = Callable[[nn.Module, Sequence[Group], Statistics], Update]  # the update from what was summed before
Criterion = Callable[[nn.Module, Sequence[Group], Batches, ScoreConfig], Importance]
RecomputeUpdate = Callable[
    [nn.Module, Sequence[Group], Batches, ScoreConfig], Update
]  # the update alone, from the images
