"""Options of the importance criteria."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vitprune.config.section import Count, Section

DIRECTIONS, SUMMED_DIRECTIONS = 8, 2
FEW_GRADIENTS, FEW_GRADIENTS_DAMPING = 512, 4e-6
MANY_GRADIENTS, MANY_GRADIENTS_DAMPING = 4096, 1e-8


class ScoreConfig(Section):
    """How importance scores are computed; each criterion reads the options that concern it."""

    section: ClassVar[str] = "score"

    batch_size: Count = 64
    """Images per batch of the calibration set. Only the pipeline uses it; in Python, give batches of this size."""

    memory_mb: Annotated[float, Field(gt=0)] = 1024
    """Memory in MiB for activations that autograd saves and for Fisher matrices; a smaller value takes longer. The
    model, gradients and temporary tensors are not included: the peak can be several times larger."""

    fisher_directions: Count | None = None
    """Gradients per image for the Fisher matrix of the logits (kl-fisher, unit-obs, obc). The scores are exact if it is
    at least the number of classes; otherwise at least two are used. Default null: 8, or 2 for unit-obs and obc, which
    sum them over all tokens of all images. 8 are more accurate, and take longer, for unit-obs with fewer than 100
    images, and for obc with an N:M pattern and `permute` without a reconstruction."""

    autocast: bool = False
    """Compute the forward and backward passes of kl-fisher in bfloat16."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.99
    """Method upvits: expected fraction of the kept units that exact scores would keep as well."""

    fisher_block_size: Count = 192
    """Weights per block of the block-diagonal Fisher matrix (ovit, woodfisher, fastcap): the smallest divisor of the
    layer's number of weights that is at least this."""

    damping: Annotated[float, Field(gt=0)] | None = None
    """Constant on the diagonal of a Fisher block, for gradients of `gradient_batch` images. For gradients of single
    images it is multiplied by `gradient_batch`, because their variance is that much larger. Default null: chosen by the
    number of gradients, 4e-6 up to 512 gradients, 1e-8 (CAP) from 4096, log-linear in between. Not used by fastcap,
    which adds 1e-2 of the mean of the diagonal."""

    num_gradients: Count | None = None
    """Gradients for the Fisher blocks. Default null: one per image, or one per `gradient_batch` images. A larger number
    adds random crops of the images. CAP takes 4096."""

    gradient_batch: Count = 128
    """Images whose mean loss gives one gradient if `per_sample` is false."""

    per_sample: bool = True
    """One gradient per image; false: one per `gradient_batch` images, as CAP."""

    nm_search: Literal["admm", "greedy"] = "admm"
    """How obc selects the weights of an N:M pattern: for all rows of a layer at once by ADMM, or greedily by row."""

    permute: bool = True
    """Re-order channels before an N:M pattern is selected (obc); the function of the model does not change."""

    @property
    def memory(self) -> int:
        """Memory limit in bytes."""
        return int(self.memory_mb * (1 << 20))

    def directions(self, summed: bool = False) -> int:
        """Return `fisher_directions`; by default 8, or 2 if a criterion sums gradients over tokens and images."""
        return self.fisher_directions or (SUMMED_DIRECTIONS if summed else DIRECTIONS)

    def damping_for(self, gradients: int) -> float:
        """Return the damping for a number of gradients: the value given, else the default for that number.

        Source: docs/LOG.md, "An update needs more damping than CAP's" (200 gradients); CAP, appendix (4096).
        """
        if self.damping is not None:
            return self.damping
        if gradients <= FEW_GRADIENTS:
            return FEW_GRADIENTS_DAMPING
        if gradients >= MANY_GRADIENTS:
            return MANY_GRADIENTS_DAMPING
        position = math.log(gradients / FEW_GRADIENTS) / math.log(MANY_GRADIENTS / FEW_GRADIENTS)
        return float(FEW_GRADIENTS_DAMPING * (MANY_GRADIENTS_DAMPING / FEW_GRADIENTS_DAMPING) ** position)
