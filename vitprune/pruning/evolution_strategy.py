"""Minimize a function without gradients by separable CMA-ES with mirrored samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vitprune.runtime.progress import track


@dataclass(frozen=True)
class Minimum:
    """Result of a minimization.

    Attributes:
        point: The best of all evaluated points.
        value: Its value.
        start: Value at zero.
        evaluations: Number of evaluated points.
    """

    point: np.ndarray
    value: float
    start: float
    evaluations: int


def population_of(size: int) -> int:
    """Return the number of points of a generation, an even one."""
    return 2 * ((4 + int(3 * math.log(size)) + 1) // 2)


def minimize(
    function: Callable[[np.ndarray], float], size: int, evaluations: int, seed: int, spread: float, description: str
) -> Minimum:
    """Minimize a function of a vector, starting at zero.

    Args:
        function: The function.
        size: Length of the vector.
        evaluations: Largest number of evaluations; only whole generations are evaluated.
        seed: Seed of the samples.
        spread: Standard deviation of the first samples.
        description: Text of the progress bar.

    Source: Ros & Hansen 2008, separable CMA-ES; mirrored samples: Brockhoff et al. 2010.
    """
    distribution, random = _Distribution(size, spread), np.random.default_rng(seed)
    population = population_of(size)
    start = function(np.zeros(size))
    best, value, generations = np.zeros(size), start, (evaluations - 1) // population
    for _ in track(range(generations), description, generations):
        half = random.standard_normal((population // 2, size))
        normals = np.concatenate([half, -half])
        points = distribution.points(normals)
        values = np.array([function(point) for point in points])
        if values.min() < value:
            best, value = points[values.argmin()], float(values.min())
        distribution.update(normals[values.argsort(kind="stable")[: population // 2]])
    return Minimum(best, value, start, 1 + generations * population)


class _Distribution:
    """Normal distribution with a diagonal covariance, adapted to the best half of its samples."""

    def __init__(self, size: int, spread: float):
        self.size, self.spread = size, spread
        parents = population_of(size) // 2
        weights = math.log(parents + 0.5) - np.log(np.arange(1, parents + 1))
        self.weights = weights / weights.sum()
        self.mass = float(1 / (self.weights**2).sum())  # effective number of parents
        self.mean, self.variance = np.zeros(size), np.ones(size)
        self.path_of_spread, self.path_of_mean = np.zeros(size), np.zeros(size)
        self.generation = 0

    def points(self, normals: np.ndarray) -> np.ndarray:
        """Return samples from standard normal ones, (population, size)."""
        result: np.ndarray = self.mean + self.spread * np.sqrt(self.variance) * normals
        return result

    def update(self, best: np.ndarray) -> None:
        """Adapt mean, spread and variances to the standard normals of the best points, best first, (parents, size)."""
        size, mass = self.size, self.mass
        rate_spread = (mass + 2) / (size + mass + 5)
        damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (size + 1)) - 1) + rate_spread
        rate_path = (4 + mass / size) / (size + 4 + 2 * mass / size)
        faster = (size + 2) / 3  # a diagonal has fewer entries to learn than a matrix
        rate_one = min(1.0, faster * 2 / ((size + 1.3) ** 2 + mass))
        rate_rank = min(1 - rate_one, faster * 2 * (mass - 2 + 1 / mass) / ((size + 2) ** 2 + mass))
        expected = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
        self.generation += 1
        steps = best * np.sqrt(self.variance)
        move = self.weights @ steps
        self.mean = self.mean + self.spread * move
        self.path_of_spread = (1 - rate_spread) * self.path_of_spread
        self.path_of_spread += math.sqrt(rate_spread * (2 - rate_spread) * mass) * (self.weights @ best)
        length = float(np.linalg.norm(self.path_of_spread))
        stationary = length / math.sqrt(1 - (1 - rate_spread) ** (2 * self.generation))
        active = stationary < (1.4 + 2 / (size + 1)) * expected
        self.path_of_mean = (1 - rate_path) * self.path_of_mean
        self.path_of_mean += active * math.sqrt(rate_path * (2 - rate_path) * mass) * move
        self.variance = (1 - rate_one - rate_rank) * self.variance + rate_one * self.path_of_mean**2
        self.variance += rate_rank * (self.weights @ steps**2)
        self.spread *= math.exp(rate_spread / damping * (length / expected - 1))
