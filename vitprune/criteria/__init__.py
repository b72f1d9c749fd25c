"""What a unit is worth: a criterion reads a model, its groups and batches, and gives one score per unit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitprune.groups import Group, Masks, Scores

Batches = Sequence[tuple[Tensor, Tensor]]  # (images (B, C, H, W), labels (B,))
Update = Callable[[Masks], dict[str, Tensor]]


@dataclass(frozen=True)
class Importance:
    """Scores (larger = worth more) and, where the criterion has one, the update of the surviving weights.

    `update` maps masks to new values by parameter name, by which the survivors make up for what goes.
    """

    scores: Scores
    update: Update | None = None


Criterion = Callable[[nn.Module, Sequence[Group], Batches, int], Importance]
