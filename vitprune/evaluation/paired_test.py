"""What two models' predictions on the same images say about the difference between them."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Paired:
    """McNemar's four counts: images that both, one or neither model classifies rightly."""

    both: int
    dense_only: int
    pruned_only: int
    neither: int

    @property
    def images(self) -> int:
        """All images."""
        return self.both + self.dense_only + self.pruned_only + self.neither

    @property
    def discordant(self) -> int:
        """Images that exactly one model classifies rightly: all that the difference rests on."""
        return self.dense_only + self.pruned_only

    @property
    def difference(self) -> float:
        """Top-1 of the pruned model minus that of the dense one, in points."""
        return 100 * (self.pruned_only - self.dense_only) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference, in points.

        Source: Wald's interval for paired proportions (Agresti, Categorical Data Analysis, section 11.1.1).
        """
        spread = self.discordant - (self.pruned_only - self.dense_only) ** 2 / self.images
        half = 100 * Z95 * math.sqrt(spread) / self.images
        return self.difference - half, self.difference + half

    @property
    def p_worse(self) -> float:
        """How often chance alone would let the pruned model lose this many of the images that tell the two apart.

        Source: McNemar's exact test, one-sided: a binomial tail at even odds.
        """
        tail, ways = 0, 1
        for won in range(self.pruned_only + 1):
            tail += ways
            ways = ways * (self.discordant - won) // (won + 1)
        return tail / (1 << self.discordant)


@dataclass(frozen=True)
class ClassResult:
    """One class: its images, how many each model classifies rightly, and what the pruned model newly takes them for."""

    label: int
    images: int
    dense: int
    pruned: int
    taken_for: int | None
    taken_times: int


def compare(predictions: pa.Table) -> Paired:
    """Count the pairs of an `EVALUATION` table, which has at least one row."""
    dense, pruned = _right(predictions, "dense"), _right(predictions, "pruned")
    return Paired(
        both=int(np.sum(dense & pruned)),
        dense_only=int(np.sum(dense & ~pruned)),
        pruned_only=int(np.sum(~dense & pruned)),
        neither=int(np.sum(~dense & ~pruned)),
    )


def by_class(predictions: pa.Table) -> list[ClassResult]:
    """Each class of an `EVALUATION` table, those that lost most images first."""
    labels = predictions["label"].to_numpy()
    taken = predictions["pruned"].to_numpy()
    dense, pruned = _right(predictions, "dense"), _right(predictions, "pruned")
    results = []
    for label in np.unique(labels):
        here = labels == label
        wrong, times = np.unique(taken[here & dense & ~pruned], return_counts=True)
        most = int(np.argmax(times)) if len(times) else None
        results.append(
            ClassResult(
                label=int(label),
                images=int(np.sum(here)),
                dense=int(np.sum(here & dense)),
                pruned=int(np.sum(here & pruned)),
                taken_for=None if most is None else int(wrong[most]),
                taken_times=0 if most is None else int(times[most]),
            )
        )
    return sorted(results, key=lambda result: (result.pruned - result.dense, result.images, result.label))


def _right(predictions: pa.Table, model: str) -> npt.NDArray[np.bool_]:
    right: npt.NDArray[np.bool_] = predictions[model].to_numpy() == predictions["label"].to_numpy()
    return right
