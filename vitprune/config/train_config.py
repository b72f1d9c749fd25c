"""One training run as a type: the recipe of dense training, of recovery and of distillation."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vitprune.config.targets import Count, Fraction, Section

Augment = Literal[
    "none", "digits", "light", "deit", "light1", "light2", "medium1", "medium2", "deit_wide", "deit_light"
]


class Train(Section):
    """One training run: epochs, optimizer and schedule (linear warm-up, then a fall to `min_lr`).

    The rate falls as a cosine or a line (`decay`), over each cycle's training anew or once over the whole gradual run
    (`decay_over`), and the optimizer's state starts anew with each cycle or is kept (`optimizer_state`); without cycles
    these are the same. `eps` is the optimizer's, null its own default.
    `cutmix` is the parameter of its Beta distribution; with a parameter for `mixup` as well, each batch takes one of
    the two at even odds, and `mix_prob` of the batches are mixed at all. `repeats` takes so many views of an image
    into a batch, and as many fewer images into an epoch. `drop_path` is the rate of stochastic depth in the last block,
    `ema` the decay, step by step, of the average of the weights that the run ends with; 0 is without any of them.
    `amp` runs the passes in bfloat16 (true) or in float16, whose loss is scaled. A batch goes through in `accumulate`
    parts, each process's share of it if there are several; batch_size is the whole.
    `layer_decay` gives a layer that share of the rate of the layer above it. `checkpointing` computes blocks again in
    the backward pass instead of keeping what they computed: less memory, more time, the same numbers. `compile` has
    torch.compile make code of the passes, and goes on without where it fails; `channels_last` stores images and
    convolutions that way. `patience` ends the run after so many epochs without a better top-1 of the training weights
    on the eval split, the one that is reported; weights are those of the last epoch, and rates fall as if it went on.
    `int8` rounds weights and inputs of the layers that have weights as `export.int8` will: the weights learn with it.
    """

    epochs: Count
    batch_size: Count = 64
    optimizer: str = "adamw"
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    decay: Literal["cosine", "linear"] = "cosine"
    decay_over: Literal["cycle", "run"] = "cycle"
    eps: Annotated[float, Field(gt=0)] | None = None
    optimizer_state: Literal["restart", "keep"] = "restart"
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    smoothing: Fraction = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    augment: Augment = "none"
    repeats: Count = 1
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    mix_prob: Annotated[float, Field(gt=0, le=1)] = 1.0
    drop_path: Fraction = 0.0
    ema: Fraction = 0.0
    amp: bool | Literal["bfloat16", "float16"] = False
    accumulate: Count = 1
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False
    int8: bool = False
    patience: Count | None = None

    @model_validator(mode="after")
    def _rounds_what_it_sees(self) -> Self:
        for key in ("compile", "checkpointing"):
            if self.int8 and getattr(self, key):
                raise ValueError(f"int8 rounds passes that run as they are written; set {key} to false, or int8")
        return self

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch are mixed."""
        return bool(self.mixup or self.cutmix)
