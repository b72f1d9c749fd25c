"""A model as a chain: an embedding, branches that each add to a stream, and an ending that reads the answer off it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SelfAttention:
    """What is inside a plain multi-head attention over all tokens; rows of `qkv` are (q k v, heads, channels)."""

    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    heads: int
    scale: float


@dataclass(frozen=True)
class Perceptron:
    """What is inside a plain MLP: a layer and an activation before the consumer."""

    fc1: nn.Linear
    act: nn.Module


@dataclass(frozen=True)
class Branch:
    """One addition to the stream: x + scale(run(norm(x))), in evaluation mode.

    `name` is the path of the attention or MLP and so of its group. `consumer` is the layer whose output, token by
    token, is what `run` returns; None where something else (windows) lies between. `inside` is there where the branch
    is plain, and None where only `run` knows what it does.
    """

    name: str
    kind: str
    norm: Step
    run: Step
    scale: Step
    consumer: nn.Linear | None = None
    inside: SelfAttention | Perceptron | None = None

    def __call__(self, stream: Tensor) -> Tensor:
        """The stream after the branch; (B, ..., channels), as it came in."""
        added: Tensor = self.scale(self.run(self.norm(stream)))
        return stream + added


@dataclass(frozen=True)
class Chain:
    """A model in evaluation mode, step by step: `embed` an image, add the branches, `finish` with the answer.

    A step that is no Branch changes the stream as a whole (patch merging, a norm). `reads` is how many leading tokens
    the ending looks at, None for all. `narrow` says that a residual channel is one channel of the embedding, of every
    LayerNorm's input and output and of every branch's output, and of nothing else.
    """

    embed: Step
    steps: tuple[Step, ...]
    ending: tuple[Step, ...]
    reads: int | None = None
    narrow: bool = False

    def finish(self, stream: Tensor) -> Tensor:
        """Logits (B, classes) from the stream after the last step; of its tokens only the first `reads` matter."""
        for step in self.ending:
            stream = step(stream)
        return stream

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes), equal to the model's."""
        stream = self.embed(images)
        for step in self.steps:
            stream = step(stream)
        return self.finish(stream)

    def branch(self, name: str) -> int | None:
        """Position among the steps of the branch of that name."""
        found = [place for place, step in enumerate(self.steps) if isinstance(step, Branch) and step.name == name]
        return found[0] if found else None
