"""The stream behind a branch without one of its units, for many units at once, from what the whole branch computed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitprune.architectures.chain import Branch, SelfAttention
from vitprune.criteria.kl.partial_forward import consumed, projected
from vitprune.groups import Group, ParamSlice, positions

Removed = Callable[[Tensor], Tensor]  # units (C,) -> streams behind the branch (C, B, ..., channels)


@dataclass(frozen=True)
class BranchContext:
    """A branch and the streams of some images before and behind it; `queries` tokens go on, None for all."""

    branch: Branch
    before: Tensor
    behind: Tensor
    queries: int | None


def ablation_fn(model: nn.Module, group: Group, around: BranchContext) -> Removed:
    """How the units of a group are removed from its branch: by the consumer's columns, inside a head, or by zeroing."""
    branch = around.branch
    columns = _columns(model, group, branch)
    if group.kind in ("ffn", "head") and columns is not None:
        return _by_columns(around, columns)
    if group.kind == "attention" and isinstance(branch.inside, SelfAttention) and branch.consumer is not None:
        return _in_heads(around, branch.inside, branch.consumer)
    return _by_zeroing(model, group, around)


def _columns(model: nn.Module, group: Group, branch: Branch) -> ParamSlice | None:
    """The slice of a group along the inputs of its branch's consumer."""
    if branch.consumer is None:
        return None
    same = [part for part in group.slices if model.get_parameter(part.param) is branch.consumer.weight]
    return next((part for part in same if part.axis == 1 and part.outer == 1), None)


def _by_columns(around: BranchContext, part: ParamSlice) -> Removed:
    """A unit that reaches the stream through columns of the consumer alone takes their products with it."""
    branch, behind = around.branch, around.behind
    assert branch.consumer is not None
    inputs = consumed(branch, around.before, around.queries)  # (B, ..., inputs)
    rows = branch.scale(branch.consumer.weight.t().clone())  # (inputs, channels)
    inner = torch.arange(part.inner, device=rows.device)

    def removed(units: Tensor) -> Tensor:
        places = units[:, None].to(rows.device) * part.inner + inner  # (C, inner)
        own = inputs[..., places.flatten()].movedim(-1, 0)  # (C * inner, B, ...)
        if part.inner == 1:
            weight = rows[places[:, 0]].view(-1, *[1] * (behind.dim() - 1), behind.shape[-1])
            return torch.addcmul(behind[None], own[..., None], weight, value=-1)
        own = own.reshape(len(units), part.inner, -1).transpose(1, 2)  # (C, B * ..., inner)
        taken = own @ rows[places]  # (C, B * ..., channels)
        return behind[None] - taken.view(len(units), *behind.shape)

    return removed


def _in_heads(around: BranchContext, inside: SelfAttention, consumer: nn.Linear) -> Removed:
    """A channel leaves the logits of its head; that head's softmax and output change, the others stay.

    Source: UP-ViTs, component 2; logits - scale * q_c k_c^T.
    """
    q, k, v = (part.transpose(0, 1) for part in projected(inside, around.branch.norm(around.before)))
    q = q[:, :, : around.queries]  # (heads, B, queries, width)
    logits = inside.scale * q @ k.transpose(2, 3)  # (heads, B, queries, tokens)
    z = logits.softmax(-1) @ v
    heads, _, _, width = q.shape
    rows = around.branch.scale(consumer.weight.t().clone()).view(heads, width, -1)  # (heads, width, channels)

    def removed(units: Tensor) -> Tensor:
        head, channel = units.to(q.device) // width, units.to(q.device) % width
        own_q, own_k = q[head, :, :, channel], k[head, :, :, channel]  # (C, B, queries), (C, B, tokens)
        weights = torch.addcmul(logits[head], own_q[..., None], own_k[..., None, :], value=-inside.scale).softmax(-1)
        changed = weights @ v[head]  # (C, B, queries, width)
        changed[torch.arange(len(units), device=q.device), :, :, channel] = 0
        moved = (changed - z[head]).flatten(1, 2) @ rows[head]  # (C, B * queries, channels)
        return around.behind[None] + moved.view(len(units), *around.behind.shape)

    return removed


def _by_zeroing(model: nn.Module, group: Group, around: BranchContext) -> Removed:
    """Any other branch runs again for every unit, with the unit's slices at zero."""
    branch = around.branch
    running = Running(model, branch)

    def removed(units: Tensor) -> Tensor:
        streams = []
        for unit in units.cpu():
            chosen = torch.arange(group.units) == unit
            named = {f"model.{part.param}": _emptied(model, part, chosen) for part in group.slices}
            streams.append(functional_call(running, named, around.before)[:, : around.queries])
        return torch.stack(streams)

    return removed


def _emptied(model: nn.Module, part: ParamSlice, chosen: Tensor) -> Tensor:
    assert part.axis is not None
    weight = model.get_parameter(part.param)
    return weight.detach().index_fill(part.axis, positions(part, chosen).to(weight.device), 0)


class Running(nn.Module):
    """A branch as a module, so that `functional_call` can give its model other weights for one run."""

    def __init__(self, model: nn.Module, branch: Branch):
        super().__init__()
        self.model, self.branch = model, branch
        self.training = False

    def forward(self, stream: Tensor) -> Tensor:
        """The stream after the branch."""
        return self.branch(stream)
