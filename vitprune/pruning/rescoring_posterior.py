"""Posterior of exact scores that are measured on a part of the images, and the resulting selection errors."""

from dataclasses import dataclass

import torch
from torch import Tensor

PRIOR_SPREAD = 0.5  # of log(exact / surrogate), before any measurement
PRIOR_UNITS = 4  # weight of the prior spread, in measured units
NOISE_IMAGES = 8  # weight of the pool's mean noise in the noise of a unit, in images
FREEDOM = 4  # degrees of freedom of Student's t
LEAST = 1e-30  # smaller scores count as this


@dataclass
class ScorePosterior:
    """Sums of every unit over the images on which it was measured; all vectors are (units,), float64.

    Attributes:
        surrogate: Surrogate scores over all images.
        pool: Number of each unit's pool; the units of a pool have similar ratios exact / surrogate.
        images: Number of all images.
    """

    surrogate: Tensor
    pool: Tensor
    images: int

    def __post_init__(self) -> None:
        self.seen = torch.zeros(len(self.surrogate), dtype=torch.int64)
        zeros = (torch.zeros_like(self.surrogate) for _ in range(5))
        self.exact, self.control, self.squares, self.products, self.controls = zeros

    def add(self, units: Tensor, exact: Tensor, control: Tensor) -> None:
        """Add the exact and the surrogate scores of units on further images, (units, images) each.

        The surrogate scores may be zeros if the units have then been measured on all images.
        """
        self.seen[units] += exact.shape[1]
        self.exact[units] += exact.sum(dim=1)
        self.control[units] += control.sum(dim=1)
        self.squares[units] += exact.square().sum(dim=1)
        self.products[units] += (exact * control).sum(dim=1)
        self.controls[units] += control.square().sum(dim=1)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the logarithm of every unit's exact score over all images.

        The ratio exact / surrogate is estimated from the measured images with the finite-population correction, and
        combined with a normal prior per pool (initially 0 +- PRIOR_SPREAD) that is fitted to the measured units. After
        all images, the score is exact and the deviation is 0.

        Source: Cochran, Sampling Techniques (1977), section 6.4 (ratio estimator); normal empirical Bayes.
        """
        ratio, variance = self._ratios()
        center, spread = self._priors(ratio, variance)
        weight = spread.square() / (spread.square() + variance)  # of the measurement; 0 without one
        mean = self.surrogate.clamp(min=LEAST).log() + center + weight * (ratio - center)
        deviation = ((1 - weight) * spread.square()).sqrt()
        complete = self.seen == self.images
        mean[complete] = self.exact[complete].clamp(min=LEAST).log()
        deviation[complete] = 0
        return mean, deviation

    def scores(self) -> Tensor:
        """Return estimates of the exact scores; the measured sums after all images."""
        mean, _ = self.posterior()
        return torch.where(self.seen == self.images, self.exact, mean.exp())

    def _ratios(self) -> tuple[Tensor, Tensor]:
        """Return log(exact / surrogate) on the measured images, and its variance: infinite below two images."""
        complete = self.seen == self.images
        ratio = self.exact.clamp(min=LEAST) / torch.where(complete, self.surrogate, self.control).clamp(min=LEAST)
        residual = self.squares - 2 * ratio * self.products + ratio.square() * self.controls
        noise = residual.clamp(min=0) / self.exact.clamp(min=LEAST).square() * self.seen.square()
        known = (self.seen > 1) & ~complete
        noise = noise / (self.seen - 1).clamp(min=1)  # squared coefficient of variation of an image's residual
        for pool in range(int(self.pool.max()) + 1):
            members = known & (self.pool == pool)
            if bool(members.any()):
                degrees = self.seen[members] - 1
                pooled = noise[members].mean() * NOISE_IMAGES
                noise[members] = (noise[members] * degrees + pooled) / (degrees + NOISE_IMAGES)
        variance = noise * (1 / self.seen.clamp(min=1) - 1 / self.images)
        return ratio.log(), torch.where(known, variance, torch.where(complete, 0.0, torch.inf))

    def _priors(self, ratio: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return center and spread of the prior of every unit's ratio, fitted to the measured units of its pool."""
        center, spread = torch.zeros_like(ratio), torch.full_like(ratio, PRIOR_SPREAD)
        for pool in range(int(self.pool.max()) + 1):
            members = self.pool == pool
            measured = members & variance.isfinite() & (self.surrogate > LEAST)
            number = int(measured.sum())
            if number:
                median = ratio[measured].median()
                excess = (ratio[measured] - median).square() - variance[measured]
                fitted = (excess.sum() + PRIOR_UNITS * PRIOR_SPREAD**2) / (number + PRIOR_UNITS)
                center[members] = median * number / (number + PRIOR_UNITS)
                spread[members] = fitted.clamp(min=(PRIOR_SPREAD / 10) ** 2).sqrt()
        return center, spread


@dataclass(frozen=True)
class SelectionErrors:
    """Expected errors of the selection in a candidate pool.

    Attributes:
        wrong: Probability of every unit to be kept or removed wrongly.
        overlap: Expected share of the kept units that the exact scores would keep as well.
    """

    wrong: Tensor
    overlap: float


def selection_errors(mean: Tensor, deviation: Tensor, remove: int, draws: Tensor) -> SelectionErrors:
    """Compare the selection by the posterior means with selections by scores drawn from the posterior.

    Args:
        mean: Posterior means, (units,).
        deviation: Posterior standard deviations, (units,).
        remove: Number of units to remove.
        draws: Random numbers of a standard distribution, (draws, units).
    """
    keep = len(mean) - remove
    if remove == 0 or keep == 0:
        return SelectionErrors(torch.zeros_like(mean), 1.0)
    drawn = (mean + deviation * draws).topk(keep, dim=1).indices
    kept = torch.zeros(draws.shape, dtype=torch.bool).scatter(1, drawn, True)
    best = torch.zeros(len(mean), dtype=torch.bool).scatter(0, mean.topk(keep).indices, True)
    wrong = (kept != best).double().mean(dim=0)
    return SelectionErrors(wrong, 1 - float(wrong[best].sum()) / keep)


def heavy_tailed(shape: tuple[int, int], source: torch.Generator) -> Tensor:
    """Draw from Student's t distribution: single images may dominate a score, and single ratios differ from their pool.

    Returns:
        Random numbers in float64, of the given shape.
    """
    normal, *others = torch.randn((1 + FREEDOM, *shape), generator=source, dtype=torch.float64)
    scale = torch.stack(others).square().mean(dim=0).sqrt()
    drawn: Tensor = normal / scale
    return drawn


def units_to_measure(wrong: Tensor, measurable: Tensor, effort: Tensor, allowed: float) -> Tensor:
    """Return the units to measure next, so that the expected selection errors among the others are at most `allowed`.

    Args:
        wrong: Probability of every unit to be kept or removed wrongly.
        measurable: False for units that have been measured on all images.
        effort: Relative cost of a measurement of every unit; cheaper units are preferred.
        allowed: Allowed number of expected errors.
    """
    order = (wrong / effort).argsort(stable=True)
    skipped = wrong[order].cumsum(0) / 2 <= allowed  # each error concerns two units
    candidates = order[~skipped]
    chosen: Tensor = candidates[measurable[candidates].nonzero().flatten()]
    return chosen
