"""Settings of pruning: method, sparsity or cost target, constraints, and the gradual schedule."""

from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from vitprune.config.allocation_config import AllocationConfig
from vitprune.config.reconstruct_config import ReconstructConfig
from vitprune.config.section import Count, Fraction, Section, at_key
from vitprune.config.targets import Rule, Target
from vitprune.config.train_config import TrainConfig

Epoch = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0)]
Label = Annotated[int, Field(ge=0)]
Kind = Literal["weight", "ffn", "attention", "qk", "vo", "head", "residual", "block", "branch"]
KINDS: tuple[Kind, ...] = get_args(Kind)
APART = ("qk", "vo")  # channels of queries and keys, and of values and output, as two sets
HEAD_CHANNELS = ("attention", *APART)  # kinds of channels of heads, of which all heads keep the same number


class Schedule(Section):
    """Sparsity over the cycles: a shape, or the sparsity of every cycle. Both end at `prune.sparsity`."""

    section: ClassVar[str] = "prune.schedule"

    shape: Literal["linear", "cubic"] | None = None
    """Shape of the curve (cubic: Zhu & Gupta, 2017)."""

    initial: Fraction | None = None
    """Sparsity after the first cycle; null: the first step of the shape from 0 to the final sparsity."""

    steps: Annotated[list[Fraction], Field(min_length=1)] | dict[Epoch, Fraction] | None = None
    """Sparsity after every cycle: a list, or a mapping from the epoch of the whole run at which a cycle prunes,
    starting with 0, to the sparsity. With a mapping, the last cycle trains for `prune.finetune.epochs`."""

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if (self.shape is None) == (self.steps is None) or (self.steps is not None and self.initial is not None):
            raise ValueError("give a shape, with or without an initial sparsity, or steps")
        return self


class PruneConfig(Section):
    """What to prune and how much; exactly one of `sparsity` and `target`, except for N:M methods, which need neither.

    Example:
        PruneConfig(method="upvits", target={"macs": 0.5}, round_to=8)
    """

    section: ClassVar[str] = "prune"

    method: str
    """Name of a pruning method; `vitprune methods` lists them."""

    kinds: list[Kind] | None = None
    """Kinds of units to score and, unless `sparsity` names fewer, to prune; null: the default kinds of the method."""

    sparsity: Fraction | dict[Kind, Share] | None = None
    """Fraction of units to remove, one for all kinds or one per kind (scope macs: fraction of the MACs). With a
    target, sparsities per kind are relative to each other."""

    target: Target | None = None
    """Cost of the pruned model, instead of a sparsity."""

    scope: str | None = None
    """Units that are ranked together: layer, global, isomorphic, macs or N:M; null: as the method defines it."""

    round_to: Count | dict[Kind, Count] | None = None
    """Remaining units of every group are a multiple of this, one for all widths or one per kind (attention: channels of
    every head)."""

    rules: tuple[Rule, ...] = ()
    """Constraints on single groups; the first rule that matches a group's name applies."""

    merge_heads_to: Count | None = None
    """Merge the attention heads into this many before pruning attention channels (UP-ViTs)."""

    classes: list[Label] | None = None
    """Classes of the dense model that are needed: importance, weight updates and reconstruction use their logits alone,
    calibration images of other classes are left out, and the pruned model has one output per class, in this order;
    null: all. Costs and targets refer to the dense model with these outputs."""

    allocation: AllocationConfig | None = None
    """Search the sparsity of every group by the KL divergence on held-out calibration images, for scope macs; null: the
    ranking decides."""

    rotate_residual: bool = False
    """Before the first cycle, rotate the residual stream of a plain ViT into a basis whose last channels matter least.
    Masks of residual channels are those of the new channels."""

    merge_tokens: Count | None = None
    """Number of patch tokens of a plain ViT that are merged into similar ones before every block but the first; null:
    none. The model then returns fewer tokens. Costs count them, targets refer to the dense model with all tokens."""

    cycles: Count = 1
    """Pruning cycles. More than one: gradual pruning, scores are computed again in every cycle."""

    schedule: Literal["linear", "cubic"] | Schedule = "cubic"
    """Sparsity over the cycles."""

    correct_norms: bool = False
    """After every cycle, correct norms and biases by one Gauss-Newton step towards the dense model's logits, without
    labels."""

    reconstruct: ReconstructConfig | None = None
    """After every cycle, fit the remaining weights to the dense model on the calibration images, without labels; null:
    no reconstruction."""

    finetune: TrainConfig | None = None
    """Training after every cycle; null: none."""

    keep_zeros: bool = True
    """While fine-tuning, also keep the zeros of the checkpoint that the run started from. Weights that this run has
    pruned remain zero in any case."""

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if self.classes is not None and len(self.classes) < 2:
            raise at_key("classes", "name at least two classes to keep, or null for all", self.classes)
        for position, label in enumerate(self.classes or ()):
            if label in (self.classes or ())[:position]:
                raise at_key("classes", f"{label} occurs twice; name every class once", self.classes)
        return self

    @model_validator(mode="after")
    def _check_amount(self) -> Self:
        if self.target is not None and isinstance(self.sparsity, float):
            message = "give a target or one sparsity, not both; with a target, sparsity is null or per kind"
            raise at_key("target", message, self.target.costs)
        if self.target is None and isinstance(self.sparsity, dict):
            for kind, share in self.sparsity.items():
                if share >= 1:
                    raise at_key(f"sparsity.{kind}", "give the fraction to remove, at least 0 and below 1", share)
        return self
