"""Residual stream after a branch with one unit ablated, batched over units, from cached activations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitprune.architectures.chain import AttentionLayers, Branch
from vitprune.criteria.kl.partial_forward import consumer_inputs, project_qkv
from vitprune.groups import Group, ParamSlice, positions

AblationFn = Callable[[Tensor], Tensor]  # units (C,) -> streams after the branch (C, B, ..., channels)


@dataclass(frozen=True)
class BranchContext:
    """A branch, its input and output stream, and how many leading tokens are needed (None: all)."""

    branch: Branch
    stream_in: Tensor
    stream_out: Tensor
    queries: int | None


def ablation_fn(model: nn.Module, group: Group, context: BranchContext) -> AblationFn:
    """Return a function from unit indices (C,) to the streams after the branch without them, (C, B, ..., channels).

    FFN units and heads subtract their columns of the consumer, attention channels change their head's softmax, and any
    other group runs the branch again with the unit's slices set to zero.
    """
    branch = context.branch
    columns = _columns(model, group, branch)
    if group.kind in ("ffn", "head") and columns is not None:
        return _by_columns(context, columns)
    if group.kind == "attention" and isinstance(branch.layers, AttentionLayers) and branch.consumer is not None:
        return _in_heads(context, branch.layers, branch.consumer)
    return _by_zeroing(model, group, context)


def _columns(model: nn.Module, group: Group, branch: Branch) -> ParamSlice | None:
    """Return the slice of a group along the inputs of its branch's consumer, if there is one."""
    if branch.consumer is None:
        return None
    slices = [part for part in group.slices if model.get_parameter(part.param) is branch.consumer.weight]
    return next((part for part in slices if part.axis == 1 and part.outer == 1), None)


def _by_columns(context: BranchContext, part: ParamSlice) -> AblationFn:
    """Subtract the product of the units' activations with their consumer columns from the stream."""
    branch, stream_out = context.branch, context.stream_out
    assert branch.consumer is not None
    inputs = consumer_inputs(branch, context.stream_in, context.queries)  # (B, ..., inputs)
    rows = branch.scale(branch.consumer.weight.t().clone())  # (inputs, channels)
    inner = torch.arange(part.inner, device=rows.device)

    def ablate(units: Tensor) -> Tensor:
        indices = units[:, None].to(rows.device) * part.inner + inner  # (C, inner)
        activations = inputs[..., indices.flatten()].movedim(-1, 0)  # (C * inner, B, ...)
        if part.inner == 1:
            weight = rows[indices[:, 0]].view(-1, *[1] * (stream_out.dim() - 1), stream_out.shape[-1])
            return torch.addcmul(stream_out[None], activations[..., None], weight, value=-1)
        activations = activations.reshape(len(units), part.inner, -1).transpose(1, 2)  # (C, B * ..., inner)
        contribution = activations @ rows[indices]  # (C, B * ..., channels)
        return stream_out[None] - contribution.view(len(units), *stream_out.shape)

    return ablate


def _in_heads(context: BranchContext, inside: AttentionLayers, consumer: nn.Linear) -> AblationFn:
    """Subtract scale * q_c k_c^T from the logits of the channel's head, and recompute only that head.

    Source: UP-ViTs, component 2.
    """
    q, k, v = (part.transpose(0, 1) for part in project_qkv(inside, context.branch.norm(context.stream_in)))
    q = q[:, :, : context.queries]  # (heads, B, queries, width)
    logits = inside.scale * q @ k.transpose(2, 3)  # (heads, B, queries, tokens)
    z = logits.softmax(-1) @ v
    heads, _, _, width = q.shape
    rows = context.branch.scale(consumer.weight.t().clone()).view(heads, width, -1)  # (heads, width, channels)

    def ablate(units: Tensor) -> Tensor:
        head, channel = units.to(q.device) // width, units.to(q.device) % width
        channel_q, channel_k = q[head, :, :, channel], k[head, :, :, channel]  # (C, B, queries), (C, B, tokens)
        without = torch.addcmul(logits[head], channel_q[..., None], channel_k[..., None, :], value=-inside.scale)
        changed = without.softmax(-1) @ v[head]  # (C, B, queries, width)
        changed[torch.arange(len(units), device=q.device), :, :, channel] = 0
        change = (changed - z[head]).flatten(1, 2) @ rows[head]  # (C, B * queries, channels)
        return context.stream_out[None] + change.view(len(units), *context.stream_out.shape)

    return ablate


def _by_zeroing(model: nn.Module, group: Group, context: BranchContext) -> AblationFn:
    """Run the branch once per unit with the unit's slices set to zero."""
    branch = context.branch
    module = BranchModule(model, branch)

    def ablate(units: Tensor) -> Tensor:
        streams = []
        for unit in units.cpu():
            chosen = torch.arange(group.units) == unit
            params = {f"model.{part.param}": _zeroed(model, part, chosen) for part in group.slices}
            streams.append(functional_call(module, params, context.stream_in)[:, : context.queries])
        return torch.stack(streams)

    return ablate


def _zeroed(model: nn.Module, part: ParamSlice, chosen: Tensor) -> Tensor:
    assert part.axis is not None
    weight = model.get_parameter(part.param)
    return weight.detach().index_fill(part.axis, positions(part, chosen).to(weight.device), 0)


class BranchModule(nn.Module):
    """A branch wrapped as a module, so that `functional_call` can replace weights of its model."""

    def __init__(self, model: nn.Module, branch: Branch):
        super().__init__()
        self.model, self.branch = model, branch
        self.training = False

    def forward(self, stream: Tensor) -> Tensor:
        """Return the residual stream after the branch."""
        return self.branch(stream)
