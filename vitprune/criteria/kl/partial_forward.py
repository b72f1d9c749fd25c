"""Run a model from one step on, computing only the tokens that the logits depend on."""

import torch
from torch import Tensor, nn

from vitprune.architectures.chain import AttentionLayers, Branch, Chain, Step
from vitprune.criteria.kl.fast_matmul import attention, linear, linear_activation
from vitprune.runtime.hooks import forward_hooks


def project_qkv(inside: AttentionLayers, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of a plain attention; (B, heads, tokens, width) each."""
    batch, tokens, _ = normed.shape
    q, k, v = linear(normed, inside.qkv).view(batch, tokens, 3, inside.heads, -1).permute(2, 0, 3, 1, 4)
    return inside.q_norm(q), inside.k_norm(k), v


def consumer_inputs(branch: Branch, stream: Tensor, queries: int | None) -> Tensor:
    """Return the input of a branch's consumer for the first `queries` tokens (plain branches); (B, ..., inputs)."""
    if branch.layers is None:
        return _captured(branch, stream)
    if isinstance(branch.layers, AttentionLayers):
        return _head_outputs(branch.layers, branch.norm(stream), queries)
    return linear_activation(branch.norm(stream[:, :queries]), branch.layers.fc1, branch.layers.act)


def _head_outputs(inside: AttentionLayers, normed: Tensor, queries: int | None) -> Tensor:
    """Return the concatenated head outputs of an attention, (B, queries, heads * width)."""
    width = inside.qkv.out_features // (3 * inside.heads)
    if queries is not None and queries < width and isinstance(inside.k_norm, nn.Identity):
        return _few_queries(inside, normed, queries, width)
    q, k, v = project_qkv(inside, normed)
    return attention(q[:, :, :queries], k, v, inside.scale)


def _few_queries(inside: AttentionLayers, normed: Tensor, queries: int, width: int) -> Tensor:
    """Return the head outputs for few queries without computing keys and values."""
    # q (W_k n) = (q W_k) n, and sum a (W_v n) = W_v (sum a n), with attention weights a, which sum to 1. The key bias
    # adds a constant to all logits of a query, which softmax cancels.
    heads, channels = inside.heads, normed.shape[-1]
    weights = inside.qkv.weight.view(3, heads, width, channels)
    bias = None if inside.qkv.bias is None else inside.qkv.bias.view(3, heads, width)
    q = torch.einsum("bqd,hwd->bqhw", normed[:, :queries], weights[0])
    q = inside.q_norm(q if bias is None else q + bias[0])
    projected = torch.einsum("bqhw,hwd->bqhd", q, weights[1]).flatten(1, 2)  # (B, queries * heads, channels)
    attention_weights = (inside.scale * projected @ normed.transpose(1, 2)).softmax(-1)
    mixed = (attention_weights @ normed).view(-1, queries, heads, channels)
    z = torch.einsum("bqhd,hwd->bqhw", mixed, weights[2])
    return (z if bias is None else z + bias[2]).flatten(2)


def forward_step(step: Step, stream: Tensor, queries: int | None) -> Tensor:
    """Return the residual stream after a step for its first `queries` tokens (None: all)."""
    if not isinstance(step, Branch) or step.layers is None or step.consumer is None:
        return step(stream)[:, :queries]
    added: Tensor = step.scale(linear(consumer_inputs(step, stream, queries), step.consumer))
    return stream[:, :queries] + added


def num_tokens_needed(chain: Chain, index: int) -> int | None:
    """Return how many leading tokens after step `index` the logits depend on, None for all."""
    later = chain.steps[index + 1 :]
    token_wise = all(isinstance(step, Branch) and step.kind == "ffn" and step.layers is not None for step in later)
    return chain.num_tokens_read if token_wise else None


def logits_from_step(chain: Chain, index: int, stream: Tensor) -> Tensor:
    """Return the logits (B, classes) from the input stream of step `index`."""
    for number in range(index, len(chain.steps)):
        stream = forward_step(chain.steps[number], stream, num_tokens_needed(chain, number))
    return chain.run_head(stream)


def step_inputs(chain: Chain, images: Tensor) -> list[Tensor]:
    """Return the input stream of every step and of the ending, restricted to the tokens that are needed."""
    streams = [chain.embed(images)]
    for number, step in enumerate(chain.steps):
        streams.append(forward_step(step, streams[-1], num_tokens_needed(chain, number)))
    return streams


def _captured(branch: Branch, stream: Tensor) -> Tensor:
    """Run a branch and return its consumer's input, with the leading dimensions of the stream."""
    assert branch.consumer is not None
    captured: list[Tensor] = []
    with forward_hooks([(branch.consumer, lambda module, inputs, output: captured.append(inputs[0]))]):
        branch.run(branch.norm(stream))
    return captured[0].reshape(*stream.shape[:-1], -1)
