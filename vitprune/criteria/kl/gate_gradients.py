"""Where the removal of a unit acts on the activations, and what a gate on the unit does to the answer there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import LayerNorm2d, RmsNorm2d
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitprune.errors import BadInput
from vitprune.groups import Group, ParamSlice

CENTRED, UNCENTRED = nn.LayerNorm, ("RMSNorm", "RmsNorm", "RmsNorm2d")
Probe = tuple[str, str]  # path of a module, and what of it is watched: input, query, norm or output
Reader = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class UnitGate:
    """One place where a group's units act: a probe whose channels are read as (outer, units, inner).

    Where `at` names units, the whole of the probe, one number per image, belongs to each of them.
    """

    group: str
    probe: Probe
    outer: int
    units: int
    inner: int
    at: tuple[int, ...] = ()

    def fold(self, channels: Tensor) -> Tensor:
        """Sum over a unit's channels; (B, channels) -> (B, units)."""
        if self.at:
            spread = channels.new_zeros(len(channels), self.units)
            spread[:, self.at] = channels
            return spread
        return channels.view(-1, self.outer, self.units, self.inner).sum(dim=(1, 3))


@dataclass
class GateTape:
    """What hooks note of a forward pass over some images, and of the backward passes after it."""

    images: int
    sources: list[Tensor] = field(default_factory=list)  # where backward passes may end
    found: dict[Probe, Tensor] = field(default_factory=dict)  # derivatives by channel, (B, channels)
    last: list[tuple[nn.Linear, Tensor]] = field(default_factory=list)  # the last Linear layer, what it gave
    hooks: list[RemovableHandle] = field(default_factory=list)

    def watch(self, probe: Probe, tensor: Tensor, reader: Reader) -> Tensor:
        """The same values, whose gradients are read from now on."""
        known = tensor.requires_grad
        own = tensor.view_as(tensor) if known else tensor.detach().requires_grad_()
        if not known:
            self.sources.append(own)
        hook = own.register_hook(lambda gradient: self._add(probe, reader(gradient)))  # type: ignore[no-untyped-call]
        self.hooks.append(hook)
        return own

    def forget(self) -> None:
        """Let go of the forward pass: its graph holds hooks that hold this tape, a ring that no collector sees."""
        for hook in self.hooks:
            hook.remove()
        self.sources, self.found, self.last = [], {}, []

    def _add(self, probe: Probe, value: Tensor) -> None:
        if probe in self.found:  # its two gradients would need a sum, and its two inputs different values
            raise _refused(probe[0], "it takes part in the forward pass more than once")
        self.found[probe] = value

    def head(self, logits: Tensor) -> Tensor | None:
        """Weight (classes, d) of the Linear layer that gave the logits, or None where it was none."""
        return next((layer.weight.detach() for layer, output in self.last if output is logits), None)

    def derivatives(self, logits: Tensor, pull: Tensor, gates: Sequence[UnitGate]) -> dict[str, Tensor]:
        """Derivative of sum(logits * pull) by the gate of every unit, group name -> (B, units)."""
        self.found = {}
        if logits.requires_grad:
            torch.autograd.grad(logits, self.sources, pull, retain_graph=True, allow_unused=True)
        total: dict[str, Tensor] = {}
        for gate in gates:
            if gate.probe not in self.found:
                raise _refused(gate.probe[0], "no gradient reaches it")
            folded = gate.fold(self.found[gate.probe])
            total[gate.group] = total[gate.group] + folded if gate.group in total else folded
        return total


def gates_of(model: nn.Module, groups: Sequence[Group]) -> list[UnitGate]:
    """Every place where the groups' units act, found from their slices alone.

    A unit's values are gated where the layers that consume it (slices along axis 1) read them; attention channels
    also where q enters the logits, residual channels also in the statistics of every norm over the stream, a block in
    what its two sub-layers add to the stream.

    Raises:
        BadInput: single weights, or a module at which the effect of a removal is not understood.
    """
    found: list[UnitGate] = []
    for group in groups:
        if group.kind == "weight":
            raise BadInput(f"{group.name}: Fisher scores are for units, not for kind 'weight'; use taylor or energy")
        if group.whole:
            raise BadInput(f"{group.name}: blocks that go as a whole are scored by removal alone; use kl-literal")
        own = [_gate(group, part, (path, "input")) for path, part in _consumers(model, group)]
        if group.kind == "block":
            own += [_branch(group, unit) for unit in range(group.units)]
        if group.kind == "attention":
            own.append(_query(model, group))
        if group.kind == "residual":
            own += [_gate(group, part, (path, "norm")) for path, part in _norms(model, group)]
        if not own:
            raise BadInput(f"{group.name}: no Linear layer consumes its units, so their gates have no place")
        found += own
    return found


def _gate(group: Group, part: ParamSlice, probe: Probe) -> UnitGate:
    return UnitGate(group.name, probe, part.outer, group.units, part.inner)


def _branch(group: Group, unit: int) -> UnitGate:
    """A sub-layer goes as the first of a pair, and as the second of the pair before it."""
    pairs = [pair for pair in (unit - 1, unit) if 0 <= pair < group.candidates]
    return UnitGate(group.name, (group.sublayers[unit][0], "output"), 1, group.units, 1, tuple(pairs))


def _refused(path: str, why: str) -> BadInput:
    return BadInput(f"{path}: {why}, so the gates of its units have no derivative; score them with kl-literal")


def _owners(model: nn.Module, group: Group) -> Iterator[tuple[str, str, nn.Module, ParamSlice]]:
    for part in group.slices:
        path, _, leaf = part.param.rpartition(".")
        yield path, leaf, model.get_submodule(path), part


def _consumers(model: nn.Module, group: Group) -> Iterator[tuple[str, ParamSlice]]:
    for path, leaf, module, part in _owners(model, group):
        if leaf != "weight" or part.axis != 1:
            continue
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            raise _refused(path, "a convolution in groups mixes only some of the channels that it reads")
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield path, part


def _query(model: nn.Module, group: Group) -> UnitGate:
    """Where q enters the logits: the first third of a fused qkv, or a Linear layer of its own (q beside kv)."""
    rows = [
        (path, part)
        for path, leaf, module, part in _owners(model, group)
        if leaf == "weight" and part.axis == 0 and isinstance(module, nn.Linear)
    ]
    fused = [(path, part) for path, part in rows if part.outer == 3]
    alone = [(path, part) for path, part in rows if part.outer == 1 and path.rpartition(".")[2] in ("q", "q_proj")]
    if len(fused) + len(alone) != 1:
        raise BadInput(f"{group.name}: which rows make q is unclear; Fisher knows a fused qkv, or q beside kv")
    path, part = (fused + alone)[0]
    return UnitGate(group.name, (path, "query"), 1, group.units, part.inner)


def _norms(model: nn.Module, group: Group) -> Iterator[tuple[str, ParamSlice]]:
    for path, leaf, module, part in _owners(model, group):
        normalises = isinstance(module, CENTRED) or type(module).__name__ in UNCENTRED
        if normalises and leaf == "weight":
            yield path, part
        elif isinstance(module, nn.GroupNorm) or (normalises and len(list(module.parameters())) == 0):
            raise _refused(path, f"the statistics of a {type(module).__name__} are not understood")


@contextmanager
def watching(model: nn.Module, gates: Sequence[UnitGate], images: int) -> Iterator[GateTape]:
    """While this is open, a forward pass over so many images sends its gradients to the tape."""
    tape = GateTape(images)
    with ExitStack() as stack:
        stack.callback(tape.forget)
        for path, what in dict.fromkeys(gate.probe for gate in gates):
            module, probe = model.get_submodule(path), (path, what)
            if what == "input":
                handle = module.register_forward_pre_hook(_input_hook(tape, probe))
            else:
                widths = [gate.outer * gate.units * gate.inner for gate in gates if gate.probe == probe]
                handle = module.register_forward_hook(_output_hook(tape, probe, widths[0]))
            stack.callback(handle.remove)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(_note_hook(tape)).remove)
        yield tape


def _note_hook(tape: GateTape) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        tape.last = [(module, output)]  # the head is the last one

    return note


def _input_hook(tape: GateTape, probe: Probe) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def watch(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        value = inputs[0].detach()
        pixels = isinstance(module, nn.Conv2d)
        reader = _over_pixels(value) if pixels else _over_tokens(value, tape.images, value.shape[-1])
        # a view of its own: what other modules read of the same tensor is not this one's gradient
        return (tape.watch(probe, inputs[0], reader), *inputs[1:])

    return watch


def _output_hook(tape: GateTape, probe: Probe, width: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if probe[1] == "query":
            return tape.watch(probe, output, _over_tokens(output.detach(), tape.images, width))
        if probe[1] == "output":
            return tape.watch(probe, output, _over_all(output.detach(), tape.images))
        return tape.watch(probe, output, _statistics(module, inputs[0].detach(), tape.images))

    return watch


def _over_tokens(value: Tensor, images: int, width: int) -> Reader:
    """Value times gradient of the first `width` channels, summed over an image's tokens (or windows of tokens)."""

    def read(gradient: Tensor) -> Tensor:
        product = _exact(value[..., :width]) * _exact(gradient[..., :width])
        return product.reshape(images, -1, width).sum(dim=1)  # (B, width)

    return read


def _over_all(value: Tensor, images: int) -> Reader:
    def read(gradient: Tensor) -> Tensor:
        return (_exact(value) * _exact(gradient)).reshape(images, -1).sum(dim=1, keepdim=True)  # (B, 1)

    return read


def _over_pixels(value: Tensor) -> Reader:
    def read(gradient: Tensor) -> Tensor:
        return (_exact(value) * _exact(gradient)).flatten(2).sum(dim=2)  # (B, C)

    return read


def _statistics(norm: Any, value: Tensor, images: int) -> Reader:
    """Derivative of a norm by a channel's share in its mean and variance, summed over tokens.

    With gates g in mean = sum(g x) / sum(g) and var = sum(g (x - mean)^2) / sum(g), at g = 1:
    dy_j/dg_c = -w_j / d * (xhat_c + xhat_j (xhat_c^2 - v) / 2) with v = var / (var + eps); without a mean, the first
    term is not there.
    """
    pixels = isinstance(norm, LayerNorm2d | RmsNorm2d)
    value = value.movedim(1, -1) if pixels else value
    x = _exact(value).reshape(images, -1, value.shape[-1])  # (B, tokens, d)
    centred = isinstance(norm, CENTRED)
    x = x - x.mean(dim=-1, keepdim=True) if centred else x
    var = x.square().mean(dim=-1)  # (B, tokens)
    scale = (var + norm.eps).rsqrt()
    xhat = x * scale[..., None]
    share = var * scale.square()
    weight = _exact(norm.weight.detach())

    def read(gradient: Tensor) -> Tensor:
        pull = _exact(gradient.movedim(1, -1) if pixels else gradient).reshape(xhat.shape) * weight
        along = (pull * xhat).sum(dim=-1)  # (B, tokens)
        total = (torch.einsum("bt,btd->bd", along, xhat.square()) - (along * share).sum(dim=1, keepdim=True)) / 2
        if centred:
            total = total + torch.einsum("bt,btd->bd", pull.sum(dim=-1), xhat)
        mean: Tensor = total / -xhat.shape[-1]
        return mean

    return read


def _exact(tensor: Tensor) -> Tensor:
    """Half precision as float32, the others as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
