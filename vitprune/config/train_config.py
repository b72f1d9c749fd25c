"""Settings of one training run: dense training, fine-tuning after pruning, or distillation."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from vitprune.config.section import Count, Fraction, Section

Augment = Literal[
    "none", "digits", "light", "deit", "light1", "light2", "medium1", "medium2", "deit_wide", "deit_light"
]


class TrainConfig(Section):
    """One training run: epochs, optimizer, learning-rate schedule (linear warm-up, then decay) and augmentation."""

    epochs: Count
    """Passes over the training images. In gradual pruning: after every cycle."""

    batch_size: Count = 64
    """Images per optimizer step, over all processes and micro-batches."""

    optimizer: str = "adamw"
    """Name of a timm optimizer."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""

    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""

    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the decay from `lr` to `min_lr`."""

    decay_over: Literal["cycle", "run"] = "cycle"
    """Gradual pruning: decay within the fine-tuning of every cycle, or once over all cycles."""

    eps: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of the optimizer; null: the optimizer's default."""

    optimizer_state: Literal["restart", "keep"] = "restart"
    """Gradual pruning: reset the optimizer's state at every cycle, or keep that of the remaining weights."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay; not applied to biases and norms."""

    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up from 0 to `lr`."""

    smoothing: Fraction = 0.0
    """Label smoothing."""

    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null: no clipping."""

    augment: Augment = "none"
    """Augmentation of the training images. none: resize and crop as in the evaluation; digits: small rotations, shifts
    and scalings; light: random crops and flips; deit: the augmentation of DeiT, with RandAugment and random erasing.
    Presets of CAP: light1, light2, medium1 and medium2 have RandAugment of rising magnitude, deit_wide and deit_light
    also random erasing."""

    repeats: Count = 1
    """Augmented views of every image in a batch (repeated augmentation); an epoch has that many fewer images."""

    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Parameter of Mixup's Beta distribution; 0: no Mixup. With CutMix, every batch uses one of them at random."""

    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Parameter of CutMix's Beta distribution; 0: no CutMix."""

    mix_prob: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that a batch is mixed."""

    drop_path: Fraction = 0.0
    """Stochastic depth: drop rate of the last block, rising linearly from 0 at the first."""

    ema: Fraction = 0.0
    """Decay per step of the exponential moving average (EMA) of the weights; the result of the training is then this
    average. 0: no average."""

    amp: bool | Literal["bfloat16", "float16"] = False
    """Mixed precision: true or bfloat16, or float16 with loss scaling."""

    accumulate: Count = 1
    """Micro-batches per optimizer step; each has `batch_size` / `accumulate` images."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learning rate of a layer relative to that of the next one; null: the same for all."""

    checkpointing: bool = False
    """Gradient checkpointing: recompute blocks in the backward pass; less memory, more time, the same result."""

    compile: bool = False
    """Use torch.compile; if it fails, training continues without it."""

    channels_last: bool = False
    """Store images and convolution weights in the channels-last format."""

    int8: bool = False
    """Quantization-aware training: round weights and inputs of all layers as `export.int8` does."""

    patience: Count | None = None
    """Stop after this many epochs without a higher top-1 on the eval split; null: never. The weights of the last epoch
    are kept, and the learning rate decays as if training continued to the end."""

    @model_validator(mode="after")
    def _check_int8(self) -> Self:
        for key in ("compile", "checkpointing"):
            if self.int8 and getattr(self, key):
                raise ValueError(f"int8 cannot be combined with {key}; set one of them to false")
        return self

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return bool(self.mixup or self.cutmix)


class DistillConfig(Section):
    """Fine-tuning with the dense model as teacher: cross-entropy + alpha * distance between student and teacher."""

    section: ClassVar[str] = "distill"

    kind: Literal["logits", "features"] = "logits"
    """Distance: KL divergence of the softened logits, or mean squared error of the features before the head."""

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance. The recipe of PVTv2 takes 20 for features."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the logits; not used for features."""

    cache: bool = False
    """Compute the teacher's outputs once per image and keep them in memory; only without augmentation and mixing."""

    train: TrainConfig | None = None
    """The training run; null: no distillation."""

    keep_zeros: bool = True
    """Also keep the zeros of the checkpoint that the run started from. Weights that this run has pruned remain zero in
    any case."""

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        t = self.train
        if self.cache and t is not None and (t.augment != "none" or t.mixes):
            key, off = ("augment", "none") if t.augment != "none" else ("mixup" if t.mixup else "cutmix", 0)
            raise ValueError(f"train.{key} changes the images in every epoch; set it to {off}, or cache to false")
        return self
