"""McNemar test: compare two models' predictions on the same images."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import stats


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
        """95 % confidence interval of the difference, in percentage points; it holds for few images too.

        Source: Newcombe, Statistics in Medicine 17 (1998), 2635-2650, method 10: Wilson's intervals of both accuracies,
        with the correlation of the pairs.
        """
        dense, pruned = self.both + self.dense_only, self.both + self.pruned_only
        low = self._distance(pruned, 0, dense, 1)
        high = self._distance(dense, 0, pruned, 1)
        return self.difference - low, self.difference + high

    def _distance(self, lower: int, lower_end: int, upper: int, upper_end: int) -> float:
        """Distance in percent of an end from the difference, by two models' correct images and Wilson interval ends."""
        below = abs(lower / self.images - _wilson(lower, self.images)[lower_end])
        above = abs(upper / self.images - _wilson(upper, self.images)[upper_end])
        return 100 * math.sqrt(max(0.0, below**2 - 2 * self._correlation * below * above + above**2))

    @property
    def _correlation(self) -> float:
        """Correlation of the pairs with Newcombe's continuity correction."""
        products = self.both * self.neither - self.dense_only * self.pruned_only
        dense, pruned = self.both + self.dense_only, self.both + self.pruned_only
        margins = (dense, self.images - dense, pruned, self.images - pruned)
        sides = math.prod(math.sqrt(side) for side in margins)
        return 0.0 if not sides else (max(products - self.images / 2, 0) if products > 0 else products) / sides

    @property
    def p_worse(self) -> float:
        """One-sided p-value of the null hypothesis that the pruned model is not worse than the dense one.

        Source: McNemar's exact test: a binomial test with probability 1/2 of the discordant images.
        """
        return self._exact_test("less")

    @property
    def p_different(self) -> float:
        """Two-sided p-value of the null hypothesis that the models are equally accurate, by McNemar's exact test."""
        return self._exact_test("two-sided")

    def _exact_test(self, alternative: str) -> float:
        if not self.discordant:
            return 1.0
        return float(stats.binomtest(self.pruned_only, self.discordant, alternative=alternative).pvalue)


def _wilson(count: int, total: int) -> tuple[float, float]:
    interval = stats.binomtest(count, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


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
        taken_for, taken_times = (int(wrong[times.argmax()]), int(times.max())) if len(times) else (None, 0)
        results.append(
            ClassComparison(
                label=int(label),
                images=int(np.sum(in_class)),
                dense=int(np.sum(in_class & dense)),
                pruned=int(np.sum(in_class & pruned)),
                taken_for=taken_for,
                taken_times=taken_times,
            )
        )
    return sorted(results, key=lambda result: (result.pruned - result.dense, result.images, result.label))


def _right(predictions: pa.Table, model: str) -> npt.NDArray[np.bool_]:
    correct: npt.NDArray[np.bool_] = predictions[model].to_numpy() == predictions["label"].to_numpy()
    return correct
