"""Forward passes for scoring: plain branches fast, in full precision, and only for the tokens that the answer reads."""

import torch
from torch import Tensor, nn

from vitprune.architectures.chain import Branch, Chain, SelfAttention, Step
from vitprune.criteria.kl.fast_matmul import activated, attended, linear


def projected(inside: SelfAttention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a plain attention; (B, heads, tokens, width) each."""
    batch, tokens, _ = normed.shape
    q, k, v = linear(normed, inside.qkv).view(batch, tokens, 3, inside.heads, -1).permute(2, 0, 3, 1, 4)
    return inside.q_norm(q), inside.k_norm(k), v


def consumed(branch: Branch, stream: Tensor, queries: int | None = None) -> Tensor:
    """What a branch's consumer reads, for the first `queries` tokens if the branch is plain; (B, ..., inputs)."""
    if branch.inside is None:
        return _captured(branch, stream)
    if isinstance(branch.inside, SelfAttention):
        return _heads(branch.inside, branch.norm(stream), queries)
    return activated(branch.norm(stream[:, :queries]), branch.inside.fc1, branch.inside.act)


def _heads(inside: SelfAttention, normed: Tensor, queries: int | None) -> Tensor:
    """Outputs of an attention's heads side by side, (B, queries, heads * width)."""
    width = inside.qkv.out_features // (3 * inside.heads)
    if queries is not None and queries < width and isinstance(inside.k_norm, nn.Identity):
        return _few(inside, normed, queries, width)
    q, k, v = projected(inside, normed)
    return attended(q[:, :, :queries], k, v, inside.scale)


def _few(inside: SelfAttention, normed: Tensor, queries: int, width: int) -> Tensor:
    """The same for few queries, without any key or value: q (W_k n) = (q W_k) n and sum a (W_v n) = W_v (sum a n).

    The keys' bias adds the same to all logits of a query, so softmax drops it; the weights a sum to 1.
    """
    heads, channels = inside.heads, normed.shape[-1]
    weights = inside.qkv.weight.view(3, heads, width, channels)
    bias = None if inside.qkv.bias is None else inside.qkv.bias.view(3, heads, width)
    q = torch.einsum("bqd,hwd->bqhw", normed[:, :queries], weights[0])
    q = inside.q_norm(q if bias is None else q + bias[0])
    seen = torch.einsum("bqhw,hwd->bqhd", q, weights[1]).flatten(1, 2)  # (B, queries * heads, channels)
    share = (inside.scale * seen @ normed.transpose(1, 2)).softmax(-1)
    mixed = (share @ normed).view(-1, queries, heads, channels)
    z = torch.einsum("bqhd,hwd->bqhw", mixed, weights[2])
    return (z if bias is None else z + bias[2]).flatten(2)


def forward(step: Step, stream: Tensor, queries: int | None = None) -> Tensor:
    """The stream after a step, for its first `queries` tokens; all for None."""
    if not isinstance(step, Branch) or step.inside is None or step.consumer is None:
        return step(stream)[:, :queries]
    added: Tensor = step.scale(linear(consumed(step, stream, queries), step.consumer))
    return stream[:, :queries] + added


def needed(chain: Chain, place: int) -> int | None:
    """How many leading tokens after the step at that place can still reach the answer, None for all."""
    later = chain.steps[place + 1 :]
    lonely = all(isinstance(step, Branch) and step.kind == "ffn" and step.inside is not None for step in later)
    return chain.reads if lonely else None


def onwards(chain: Chain, place: int, stream: Tensor) -> Tensor:
    """Logits from the input stream of the step at that place; (B, classes)."""
    for number in range(place, len(chain.steps)):
        stream = forward(chain.steps[number], stream, needed(chain, number))
    return chain.finish(stream)


def prefixes(chain: Chain, images: Tensor) -> list[Tensor]:
    """Input stream of every step and, last, of the ending; only the tokens that are needed."""
    streams = [chain.embed(images)]
    for number, step in enumerate(chain.steps):
        streams.append(forward(step, streams[-1], needed(chain, number)))
    return streams


def _captured(branch: Branch, stream: Tensor) -> Tensor:
    """The consumer's input, read off while the branch runs; with the stream's leading dimensions."""
    assert branch.consumer is not None
    seen: list[Tensor] = []
    handle = branch.consumer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        branch.run(branch.norm(stream))
    finally:
        handle.remove()
    return seen[0].reshape(*stream.shape[:-1], -1)
