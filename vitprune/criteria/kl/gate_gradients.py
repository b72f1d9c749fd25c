"""Hooks that give the gradient of the logits w.r.t. a multiplicative gate on each unit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitprune.errors import BadInput
from vitprune.groups import REMOVED, Group, ParamSlice
from vitprune.runtime.hooks import forward_hooks
from vitprune.runtime.norm_axis import norm_axis, norm_eps

CENTERED_NORMS, RMS_NORMS = nn.LayerNorm, ("RMSNorm", "RmsNorm", "RmsNorm2d")
Probe = tuple[str, str]  # path of a module, and the hooked value: input, query, norm or output
Reader = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class UnitGate:
    """A module input or output on which the gates of a group act; its channels are (outer, units, inner).

    If `at` is given, the probe gives one number per image, which is added to each of these units.
    """

    group: str
    probe: Probe
    outer: int
    units: int
    inner: int
    at: tuple[int, ...] = ()

    def fold(self, channels: Tensor) -> Tensor:
        """Sum over the channels of every unit: (B, channels) -> (B, units)."""
        if self.at:
            spread = channels.new_zeros(len(channels), self.units)
            spread[:, self.at] = channels
            return spread
        return channels.view(-1, self.outer, self.units, self.inner).sum(dim=(1, 3))


@dataclass
class GateTape:
    """State of the hooks during one forward pass and the backward passes after it."""

    images: int
    sources: list[Tensor] = field(default_factory=list)  # leaves of the backward passes
    grads: dict[Probe, Tensor] = field(default_factory=dict)  # gate gradients by channel, (B, channels)
    last_linear: list[tuple[nn.Linear, Tensor]] = field(default_factory=list)  # the last Linear layer and its output
    hooks: list[RemovableHandle] = field(default_factory=list)

    def watch(self, probe: Probe, tensor: Tensor, reader: Reader) -> Tensor:
        """Return a view of a tensor whose gradient is recorded."""
        has_grad = tensor.requires_grad
        view = tensor.view_as(tensor) if has_grad else tensor.detach().requires_grad_()
        if not has_grad:
            self.sources.append(view)
        hook = view.register_hook(lambda gradient: self._add(probe, reader(gradient)))  # type: ignore[no-untyped-call]
        self.hooks.append(hook)
        return view

    def forget(self) -> None:
        """Release the forward pass: the autograd graph and this tape refer to each other."""
        for hook in self.hooks:
            hook.remove()
        self.sources, self.grads, self.last_linear = [], {}, []

    def _add(self, probe: Probe, value: Tensor) -> None:
        if probe in self.grads:  # gradients of several calls would mix different inputs
            raise _unsupported(probe[0], "it runs more than once per forward pass")
        self.grads[probe] = value

    def note(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Note a Linear layer and its output: the last call is the head."""
        assert isinstance(module, nn.Linear)
        self.last_linear = [(module, output)]

    def head(self, logits: Tensor) -> Tensor | None:
        """Return the weight (classes, d) of the Linear layer whose output is the logits, None if there is none."""
        return next((layer.weight.detach() for layer, output in self.last_linear if output is logits), None)

    def derivatives(self, logits: Tensor, direction: Tensor, gates: Sequence[UnitGate]) -> dict[str, Tensor]:
        """Return d sum(logits * direction) / dg for the gate g of every unit; group name -> (B, units)."""
        self.grads = {}
        if logits.requires_grad:
            torch.autograd.grad(logits, self.sources, direction, retain_graph=True, allow_unused=True)
        total: dict[str, Tensor] = {}
        for gate in gates:
            if gate.probe not in self.grads:
                raise _unsupported(gate.probe[0], "no gradient reaches it")
            folded = gate.fold(self.grads[gate.probe])
            total[gate.group] = total[gate.group] + folded if gate.group in total else folded
        return total


def find_gates(model: nn.Module, groups: Sequence[Group]) -> list[UnitGate]:
    """Return all gates of the groups, derived from their slices.

    A unit is gated at the input of the layers that consume it (slices along axis 1). Attention channels are gated at q
    as well, residual channels in the statistics of every norm over the stream, blocks at the output of both sub-layers,
    branches at their output.

    Raises:
        BadInput: single weights, or a module through which the gate gradient is not defined.
    """
    gates: list[UnitGate] = []
    for group in groups:
        if group.kind == "weight":
            raise BadInput(f"{group.name}: Fisher scores are for units, not for kind 'weight'; use taylor or energy")
        if group.whole_blocks:
            why = "blocks that are removed with all their layers can be scored only by kl-literal"
            raise BadInput(f"{group.name}: {why}")
        gates_of_group = [_gate(group, part, (path, "input")) for path, part in _consumers(model, group)]
        if group.kind in REMOVED:
            gates_of_group += [_branch(group, unit) for unit in range(group.units)]
        if group.kind == "attention":
            gates_of_group.append(_query(model, group))
        if group.kind == "residual":
            gates_of_group += [_gate(group, part, (path, "norm")) for path, part in _norms(model, group)]
        if not gates_of_group:
            raise BadInput(f"{group.name}: no Linear layer consumes its units; score them with kl-literal")
        gates += gates_of_group
    return gates


def _gate(group: Group, part: ParamSlice, probe: Probe) -> UnitGate:
    return UnitGate(group.name, probe, part.outer, group.units, part.inner)


def _branch(group: Group, unit: int) -> UnitGate:
    """Return the gate of a branch; in groups of blocks, it is in the pair that it begins and in the pair before."""
    pairs = [unit] if group.kind == "branch" else [unit - 1, unit]
    pairs = [pair for pair in pairs if 0 <= pair < group.num_candidates]
    return UnitGate(group.name, (group.sublayers[unit][0], "output"), 1, group.units, 1, tuple(pairs))


def _unsupported(path: str, why: str) -> BadInput:
    return BadInput(f"{path}: {why}, so its units have no gate gradient; score them with kl-literal")


def _layers(model: nn.Module, group: Group) -> Iterator[tuple[str, str, nn.Module, ParamSlice]]:
    for part in group.slices:
        path, _, leaf = part.param.rpartition(".")
        yield path, leaf, model.get_submodule(path), part


def _consumers(model: nn.Module, group: Group) -> Iterator[tuple[str, ParamSlice]]:
    for path, leaf, module, part in _layers(model, group):
        if leaf != "weight" or part.axis != 1:
            continue
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            raise _unsupported(path, "grouped convolutions are not supported")
        if part.start is not None:
            raise _unsupported(path, "it reads other channels too")
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield path, part


def _query(model: nn.Module, group: Group) -> UnitGate:
    """Gate of q: the first third of a fused qkv, or a separate Linear layer q next to kv."""
    rows = [
        (path, part)
        for path, leaf, module, part in _layers(model, group)
        if leaf == "weight" and part.axis == 0 and isinstance(module, nn.Linear)
    ]
    fused = [(path, part) for path, part in rows if part.outer == 3]
    separate = [(path, part) for path, part in rows if part.outer == 1 and path.rpartition(".")[2] in ("q", "q_proj")]
    if len(fused) + len(separate) != 1:
        why = "cannot tell which rows are q; supported are a fused qkv, and separate q and kv layers"
        raise BadInput(f"{group.name}: {why}")
    ((path, part),) = fused + separate
    return UnitGate(group.name, (path, "query"), 1, group.units, part.inner)


def _norms(model: nn.Module, group: Group) -> Iterator[tuple[str, ParamSlice]]:
    for path, leaf, module, part in _layers(model, group):
        normalizes = isinstance(module, CENTERED_NORMS) or type(module).__name__ in RMS_NORMS
        if normalizes and leaf == "weight":
            yield path, part
        elif isinstance(module, nn.GroupNorm) or (normalizes and len(list(module.parameters())) == 0):
            raise _unsupported(path, f"the statistics of {type(module).__name__} are not supported")


@contextmanager
def record_gates(model: nn.Module, gates: Sequence[UnitGate], images: int) -> Iterator[GateTape]:
    """Register the hooks of gates on a model while the context is open.

    Args:
        model: The model.
        gates: Gates from `find_gates`.
        images: Number of images of the forward pass.

    Yields:
        The tape, which records the forward pass, and from which `GateTape.derivatives` computes gradients.
    """
    tape = GateTape(images)
    with ExitStack() as stack:
        stack.callback(tape.forget)
        for path, side in dict.fromkeys(gate.probe for gate in gates):
            module, probe = model.get_submodule(path), (path, side)
            if side == "input":
                handle = module.register_forward_pre_hook(_input_hook(tape, probe))
            else:
                widths = [gate.outer * gate.units * gate.inner for gate in gates if gate.probe == probe]
                handle = module.register_forward_hook(_output_hook(tape, probe, widths[0]))
            stack.callback(handle.remove)
        linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        stack.enter_context(forward_hooks((layer, tape.note) for layer in linear))
        yield tape


def _input_hook(tape: GateTape, probe: Probe) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def watch(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        value = inputs[0].detach().clone()  # a residual sum may be added to the tensor in place
        pixels = isinstance(module, nn.Conv2d)
        reader = _over_pixels(value) if pixels else _over_tokens(value, tape.images, value.shape[-1])
        # a separate view: other consumers of the same tensor must not add to this gradient
        return (tape.watch(probe, inputs[0], reader), *inputs[1:])

    return watch


def _output_hook(tape: GateTape, probe: Probe, width: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):  # of an attention that returns its weights, too
            return (watch(module, inputs, output[0]), *output[1:])
        if probe[1] == "query":
            reader = _over_tokens(output.detach(), tape.images, width)
        elif probe[1] == "output":
            reader = _over_all(output.detach(), tape.images)
        else:
            reader = _statistics(probe[0], module, inputs[0].detach(), output.detach(), tape.images)
        return tape.watch(probe, output, reader).clone()  # what follows may change it in place

    return watch


def _over_tokens(value: Tensor, images: int, width: int) -> Reader:
    """Sum value * gradient of the first `width` channels over the tokens (or windows) of an image."""

    def read(gradient: Tensor) -> Tensor:
        product = _at_least_float32(value[..., :width]) * _at_least_float32(gradient[..., :width])
        return product.reshape(images, -1, width).sum(dim=1)  # (B, width)

    return read


def _over_all(value: Tensor, images: int) -> Reader:
    def read(gradient: Tensor) -> Tensor:
        product = _at_least_float32(value) * _at_least_float32(gradient)
        return product.reshape(images, -1).sum(dim=1, keepdim=True)  # (B, 1)

    return read


def _over_pixels(value: Tensor) -> Reader:
    def read(gradient: Tensor) -> Tensor:
        return (_at_least_float32(value) * _at_least_float32(gradient)).flatten(2).sum(dim=2)  # (B, C)

    return read


def _statistics(path: str, norm: Any, value: Tensor, output: Tensor, images: int) -> Reader:
    """Sum the derivative of a norm w.r.t. a channel's weight in its mean and variance over tokens."""
    # With mean = sum(g x) / sum(g) and var = sum(g (x - mean)^2) / sum(g), at g = 1:
    # dy_j/dg_c = -w_j / d * (xhat_c + xhat_j (xhat_c^2 - v) / 2), v = var / (var + eps); RMSNorm has no first term.
    axis = norm_axis(norm, value, output)
    if axis is None:
        raise _unsupported(path, f"{type(norm).__name__} does more than normalize, scale and shift its channels")
    weight, centered = _at_least_float32(norm.weight.detach()), isinstance(norm, CENTERED_NORMS)
    x = _at_least_float32(value).movedim(axis, -1).reshape(images, -1, len(weight))  # (B, tokens, d)
    x = x - x.mean(dim=-1, keepdim=True) if centered else x
    var = x.square().mean(dim=-1)  # (B, tokens)
    scale = (var + norm_eps(norm, value.dtype)).rsqrt()
    xhat = x * scale[..., None]
    share = var * scale.square()

    def read(gradient: Tensor) -> Tensor:
        weighted = _at_least_float32(gradient.movedim(axis, -1)).reshape(xhat.shape) * weight
        along = (weighted * xhat).sum(dim=-1)  # (B, tokens)
        total = (torch.einsum("bt,btd->bd", along, xhat.square()) - (along * share).sum(dim=1, keepdim=True)) / 2
        if centered:
            total = total + torch.einsum("bt,btd->bd", weighted.sum(dim=-1), xhat)
        mean: Tensor = total / -xhat.shape[-1]
        return mean

    return read


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
