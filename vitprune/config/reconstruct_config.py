"""Settings of the reconstruction after pruning."""

from typing import Annotated, ClassVar

from pydantic import Field

from vitprune.config.section import Count, Section


class ReconstructConfig(Section):
    """Fit the remaining weights to the dense model's logits and blocks on the calibration images, without labels."""

    section: ClassVar[str] = "prune.reconstruct"

    passes: Count = 18
    """Passes over the images."""

    lr: Annotated[float, Field(gt=0)] = 4e-4
    """Peak learning rate; it rises over ten steps and decays to zero by a cosine."""

    batch_size: Count = 10
    """Images per step."""

    mirror: bool = True
    """Mirror half of the images of every batch, at random."""

    stream_weight: Annotated[float, Field(ge=0)] = 300.0
    """Weight of the mean relative squared error of the block outputs, beside the KL divergence of the logits. A few
    hundred images overfit the logits."""

    holdout: Annotated[int, Field(ge=2)] = 10
    """Every n-th image is held out. The weights of the pass with the least KL divergence on these images are kept, or
    those before the reconstruction if no pass is better."""
