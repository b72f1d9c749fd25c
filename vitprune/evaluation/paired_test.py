"""McNemar test: compare two models' predictions on the same images."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Z95 = 1.959963984540054


@dataclass(frozen=True)
class McNemarTable:
    """Number of images that both, one or neither model classifies correctly."""

    both: int
    dense_only: int
    pruned_only: int
    neither: int

    @property
    def images(self) -> int:
        """Number of images."""
        return self.both + self.dense_only + self.pruned_only + self.neither

    @property
    def discordant(self) -> int:
        """Number of images that exactly one of the models classifies correctly."""
        return self.dense_only + self.pruned_only

    @property
    def difference(self) -> float:
        """Top-1 of the pruned minus that of the dense model, in percentage points."""
        return 100 * (self.pruned_only - self.dense_only) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the difference, in percentage points.

        Source: Wald interval for paired proportions (Agresti, Categorical Data Analysis, section 11.1.1).
        """
        spread = self.discordant - (self.pruned_only - self.dense_only) ** 2 / self.images
        half = 100 * Z95 * math.sqrt(spread) / self.images
        return self.difference - half, self.difference + half

    @property
    def p_worse(self) -> float:
        """One-sided p-value of the null hypothesis that the pruned model is not worse than the dense one.

        Source: McNemar's exact test: a binomial tail with probability 1/2 over the discordant images.
        """
        tail, ways = 0, 1
        for count in range(self.pruned_only + 1):
            tail += ways
            ways = ways * (self.discordant - count) // (count + 1)
        return tail / (1 << self.discordant)


@dataclass(frozen=True)
class ClassComparison:
    """Correct predictions per class; `taken_for` is the most frequent new wrong prediction, `taken_times` its count."""

    label: int
    images: int
    dense: int
    pruned: int
    taken_for: int | None
    taken_times: int


def mcnemar_table(predictions: pa.Table) -> McNemarTable:
    """Count the pairs of predictions in a table of schema `EVALUATION` with at least one row."""
    dense, pruned = _right(predictions, "dense"), _right(predictions, "pruned")
    return McNemarTable(
        both=int(np.sum(dense & pruned)),
        dense_only=int(np.sum(dense & ~pruned)),
        pruned_only=int(np.sum(~dense & pruned)),
        neither=int(np.sum(~dense & ~pruned)),
    )


def compare_classes(predictions: pa.Table) -> list[ClassComparison]:
    """Compare the models per class of an `EVALUATION` table, sorted by accuracy loss, largest first."""
    labels = predictions["label"].to_numpy()
    predicted = predictions["pruned"].to_numpy()
    dense, pruned = _right(predictions, "dense"), _right(predictions, "pruned")
    results = []
    for label in np.unique(labels):
        in_class = labels == label
        wrong, times = np.unique(predicted[in_class & dense & ~pruned], return_counts=True)
        most_frequent = int(np.argmax(times)) if len(times) else None
        results.append(
            ClassComparison(
                label=int(label),
                images=int(np.sum(in_class)),
                dense=int(np.sum(in_class & dense)),
                pruned=int(np.sum(in_class & pruned)),
                taken_for=None if most_frequent is None else int(wrong[most_frequent]),
                taken_times=0 if most_frequent is None else int(times[most_frequent]),
            )
        )
    return sorted(results, key=lambda result: (result.pruned - result.dense, result.images, result.label))


def _right(predictions: pa.Table, model: str) -> npt.NDArray[np.bool_]:
    correct: npt.NDArray[np.bool_] = predictions[model].to_numpy() == predictions["label"].to_numpy()
    return correct
