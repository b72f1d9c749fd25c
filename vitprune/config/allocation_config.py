"""Settings of the search for the sparsity of every group."""

from typing import Annotated, ClassVar

from pydantic import Field

from vitprune.config.section import Count, Section


class AllocationConfig(Section):
    """Search one factor per group for its scores, by the KL divergence from the dense model; without labels."""

    section: ClassVar[str] = "prune.allocation"

    evaluations: Count = 200
    """Pruned models to evaluate. Scores and weight updates come from every second calibration image, and each model
    is evaluated on the other images."""

    spread: Annotated[float, Field(gt=0)] = 0.5
    """Standard deviation of the logarithm of the factors at the start of the search."""
