"""What is known of exact scores while they are being measured on more and more images, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PRIOR_SPREAD = 0.5  # of log(exact / surrogate) where nothing is measured yet
PRIOR_UNITS = 4  # as many units' worth that first guess has
NOISE_IMAGES = 8  # as many images' worth the pool's noise has in that of a unit
FREEDOM = 4  # degrees of it in Student's t, for what lies outside the normal
LEAST = 1e-30  # a score below it counts as zero


@dataclass
class ScorePosterior:
    """Running sums of every unit over the images on which it was measured; all vectors are (units,), float64.

    `surrogate` is a unit's surrogate score over all `images`, `pool` the number of units whose ratios are alike.
    """

    surrogate: Tensor
    pool: Tensor
    images: int

    def __post_init__(self) -> None:
        self.seen = torch.zeros(len(self.surrogate), dtype=torch.int64)
        self.exact, self.control, self.squares, self.products, self.controls = (
            torch.zeros_like(self.surrogate) for _ in range(5)
        )

    def add(self, units: Tensor, exact: Tensor, control: Tensor) -> None:
        """Take in the exact scores of units on some images, and the surrogate's on the same: (units, images) each.

        The surrogate's may be left out (zeros) in the last step to all images.
        """
        self.seen[units] += exact.shape[1]
        self.exact[units] += exact.sum(dim=1)
        self.control[units] += control.sum(dim=1)
        self.squares[units] += exact.square().sum(dim=1)
        self.products[units] += (exact * control).sum(dim=1)
        self.controls[units] += control.square().sum(dim=1)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the logarithm of every unit's exact score over all images.

        The ratio exact / surrogate, estimated on the images seen with the finite-population correction, meets a normal
        prior of its pool (by default 0 +- PRIOR_SPREAD), which is fitted to the units measured. Where all images are
        seen, the score is exact and the deviation 0.

        Source: Cochran, Sampling Techniques (1977), section 6.4 (ratio estimator); normal empirical Bayes.
        """
        ratio, variance = self._ratios()
        middle, spread = self._priors(ratio, variance)
        weight = spread.square() / (spread.square() + variance)  # of the measurement; 0 where there is none
        mean = self.surrogate.clamp(min=LEAST).log() + middle + weight * (ratio - middle)
        deviation = ((1 - weight) * spread.square()).sqrt()
        whole = self.seen == self.images
        mean[whole] = self.exact[whole].clamp(min=LEAST).log()
        deviation[whole] = 0
        return mean, deviation

    def scores(self) -> Tensor:
        """Best estimates of the exact scores: measured sums where all images were seen."""
        mean, _ = self.posterior()
        return torch.where(self.seen == self.images, self.exact, mean.exp())

    def _ratios(self) -> tuple[Tensor, Tensor]:
        """log(exact / surrogate) of the images seen, and its variance: infinite where there are fewer than two."""
        whole = self.seen == self.images
        ratio = self.exact.clamp(min=LEAST) / torch.where(whole, self.surrogate, self.control).clamp(min=LEAST)
        residual = self.squares - 2 * ratio * self.products + ratio.square() * self.controls
        noise = residual.clamp(min=0) / self.exact.clamp(min=LEAST).square() * self.seen.square()
        known = (self.seen > 1) & ~whole
        noise = noise / (self.seen - 1).clamp(min=1)  # squared coefficient of variation of an image's residual
        for pool in range(int(self.pool.max()) + 1):
            own = known & (self.pool == pool)
            if bool(own.any()):
                degrees = self.seen[own] - 1
                noise[own] = (noise[own] * degrees + noise[own].mean() * NOISE_IMAGES) / (degrees + NOISE_IMAGES)
        variance = noise * (1 / self.seen.clamp(min=1) - 1 / self.images)
        return ratio.log(), torch.where(known, variance, torch.where(whole, 0.0, torch.inf))

    def _priors(self, ratio: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Middle and spread of the ratios of every unit's pool, fitted to what is measured of it."""
        middle, spread = torch.zeros_like(ratio), torch.full_like(ratio, PRIOR_SPREAD)
        for pool in range(int(self.pool.max()) + 1):
            own = self.pool == pool
            seen = own & variance.isfinite() & (self.surrogate > LEAST)
            number = int(seen.sum())
            if number:
                centre = ratio[seen].median()
                excess = (ratio[seen] - centre).square() - variance[seen]
                fitted = (excess.sum() + PRIOR_UNITS * PRIOR_SPREAD**2) / (number + PRIOR_UNITS)
                middle[own] = centre * number / (number + PRIOR_UNITS)
                spread[own] = fitted.clamp(min=(PRIOR_SPREAD / 10) ** 2).sqrt()
        return middle, spread


@dataclass(frozen=True)
class Doubt:
    """How sure a contest is: every unit's probability to be on the wrong side, and how much of the kept is right."""

    wrong: Tensor
    overlap: float


def doubt(mean: Tensor, deviation: Tensor, remove: int, draws: Tensor) -> Doubt:
    """Compare the kept set of the means with those of scores drawn from the posterior; draws are standard, (D, units).

    `overlap` is the expected share of the units that stay which the exact scores would keep as well.
    """
    keep = len(mean) - remove
    if remove == 0 or keep == 0:
        return Doubt(torch.zeros_like(mean), 1.0)
    drawn = (mean + deviation * draws).topk(keep, dim=1).indices
    stays = torch.zeros(draws.shape, dtype=torch.bool).scatter(1, drawn, True)
    best = torch.zeros(len(mean), dtype=torch.bool).scatter(0, mean.topk(keep).indices, True)
    wrong = (stays != best).double().mean(dim=0)
    return Doubt(wrong, 1 - float(wrong[best].sum()) / keep)


def heavy_tailed(shape: tuple[int, int], source: torch.Generator) -> Tensor:
    """Draws from Student's t: an image can weigh more than all before it, and some ratios are far from their pool's."""
    normal, *others = torch.randn((1 + FREEDOM, *shape), generator=source, dtype=torch.float64)
    scale = torch.stack(others).square().mean(dim=0).sqrt()
    drawn: Tensor = normal / scale
    return drawn


def doubtful(wrong: Tensor, able: Tensor, effort: Tensor, allowed: float) -> Tensor:
    """Units to measure on: the cheapest, of those that are able, without whom the errors expected are as allowed."""
    order = (wrong / effort).argsort(stable=True)  # ascending: the surest and the dearest are left alone
    left_alone = wrong[order].cumsum(0) / 2 <= allowed  # an error is two units on the wrong side
    chosen = order[~left_alone]
    going: Tensor = chosen[able[chosen].nonzero().flatten()]
    return going


def pools(sizes: Sequence[int]) -> Tensor:
    """Number of its pool for every unit, from the sizes of the pools."""
    return torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
