"""Residual chain: a model as an embedding, a sequence of residual branches and a classification head."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AttentionLayers:
    """Layers of a plain multi-head self-attention over all tokens.

    Attributes:
        qkv: Projection to queries, keys and values; its output is (..., 3 * heads * head_dim), q before k before v.
        q_norm: Normalization of the queries; Identity if there is none.
        k_norm: Normalization of the keys; Identity if there is none.
        heads: Number of heads.
        scale: Factor of the attention logits.
    """

    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    heads: int
    scale: float


@dataclass(frozen=True)
class MlpLayers:
    """Layers of a plain MLP before its output projection: the first Linear and the activation."""

    fc1: nn.Linear
    act: nn.Module


@dataclass(frozen=True)
class Branch:
    """One residual branch in evaluation mode: x + scale(run(norm(x))).

    Attributes:
        name: Path of the attention or MLP module, which is also the name of its group.
        kind: "attention" or "ffn".
        norm: The normalization before the attention or MLP.
        run: The attention or MLP.
        scale: LayerScale, or Identity.
        consumer: The output projection, if `run` returns its output token by token; None if other operations follow
            it, such as the reversal of windows.
        layers: The layers of a plain attention or MLP; None if only `run` can compute the branch.
    """

    name: str
    kind: str
    norm: Step
    run: Step
    scale: Step
    consumer: nn.Linear | None = None
    layers: AttentionLayers | MlpLayers | None = None

    def __call__(self, stream: Tensor) -> Tensor:
        """Return the residual stream after the branch, in the shape of its input (B, ..., channels)."""
        added: Tensor = self.scale(self.run(self.norm(stream)))
        return stream + added


@dataclass(frozen=True)
class Chain:
    """A model in evaluation mode as a sequence of steps on its residual stream.

    Attributes:
        embed: Function from the model's input to the residual stream (B, ..., channels).
        steps: Residual branches, and steps that replace the stream, such as patch merging.
        head: Functions from the last residual stream to the logits.
        num_tokens_read: Number of leading tokens that the head reads; None if it reads all tokens.
        allows_channel_ablation: True if a residual channel is one channel of the embedding, of the input and output of
            every LayerNorm and of the output of every branch, and occurs nowhere else.
    """

    embed: Step
    steps: tuple[Step, ...]
    head: tuple[Step, ...]
    num_tokens_read: int | None = None
    allows_channel_ablation: bool = False

    def run_head(self, stream: Tensor) -> Tensor:
        """Return the logits (B, classes) from the residual stream after the last step."""
        for step in self.head:
            stream = step(stream)
        return stream

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes), equal to those of the model."""
        stream = self.embed(images)
        for step in self.steps:
            stream = step(stream)
        return self.run_head(stream)

    def branch_index(self, name: str) -> int | None:
        """Return the index in `steps` of the branch with this name, None if there is none."""
        indices = (i for i, step in enumerate(self.steps) if isinstance(step, Branch) and step.name == name)
        return next(indices, None)
