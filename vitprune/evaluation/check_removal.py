"""Compare a pruned model with a masked reference: logits, gradients, cost, and saving and loading."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

from vitprune import models
from vitprune.evaluation.cost import count_macs
from vitprune.evaluation.logits import logits_of
from vitprune.groups import REMOVED, Group, Masks, is_within, positions, removed_modules, shrink, zero
from vitprune.models.other_libraries import load_like
from vitprune.runtime.outputs import main_tensor
from vitprune.runtime.wrappers import is_timm_model

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, nn.GroupNorm)  # normalize over channels
LOGIT_TOLERANCE = 1e-10  # relative to the largest logit, in float64
MIN_CHANGE = 1e-6  # relative change of the logits below which removing the units proves nothing

_Cost = tuple[int, tuple[int, dict[str, int]]]


@dataclass(frozen=True)
class RemovalCheck:
    """Result of one check.

    Attributes:
        difference: Largest difference of a logit, relative to the largest logit.
        params_before: Parameters of the dense model.
        params_after: Parameters of the pruned model.
        macs_before: MACs per image of the dense model.
        macs_after: MACs per image of the pruned model.
        failures: One line per failed check; empty if all passed.
    """

    difference: float
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    failures: tuple[str, ...]


def check_removal(dense: nn.Module, groups: Sequence[Group], masks: Masks, inputs: Tensor) -> RemovalCheck:
    """Prune a copy of a model and compare it with the masked reference.

    Args:
        dense: Model in float64; it is not changed.
        groups: Groups of one kind. For single weights, the pruned copy has zeros; other kinds are shrunk.
        masks: Masks by group name, True = kept.
        inputs: Images (B, C, H, W).

    Returns:
        The result, with the failures.
    """
    kind = groups[0].kind
    dense_logits = logits_of(dense, [inputs])[0]
    counts = [(sum(p.numel() for p in dense.parameters()), count_macs(dense, inputs[:1]))] * 2
    failures: list[str] = []
    difference = float("nan")
    try:
        expected = logits_of(_masked_reference(dense, groups, masks), [inputs])[0]
        smaller = (zero if kind == "weight" else shrink)(copy.deepcopy(dense), groups, masks)
        logits = logits_of(smaller, [inputs])[0]
        scale = float(expected.abs().max())
        difference = float((logits - expected).abs().max()) / scale
        if not difference <= LOGIT_TOLERANCE:
            failures.append(f"logits differ by {difference:.2g} from those of the masked reference")
        if not float((expected - dense_logits).abs().max()) >= MIN_CHANGE * scale:
            failures.append("removing the units does not change the logits, so the check proves nothing")
        counts[1] = sum(p.numel() for p in smaller.parameters()), count_macs(smaller, inputs[:1])
        if kind == "weight":
            failures += _check_zeros(smaller, groups, masks)
        else:
            failures += _check_costs(dense, groups, masks, counts)
        failures += _check_round_trip(smaller, dense, inputs) + _check_backward(smaller, inputs)
    except Exception as error:  # wrong slices can break a forward pass in any way
        failures.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    (before, (macs_before, _)), (after, (macs_after, _)) = counts
    return RemovalCheck(difference, before, after, macs_before, macs_after, tuple(failures))


def _masked_reference(dense: nn.Module, groups: Sequence[Group], masks: Masks) -> nn.Module:
    """Return a copy of a model at full size, in which the removed units of groups of one kind have no effect."""
    # The weights of the units are zeroed. Norms of the residual stream use the remaining channels only. Removed blocks
    # and branches add nothing to the residual stream.
    model = copy.deepcopy(dense)
    if groups[0].kind not in ("residual", *REMOVED):
        return zero(model, groups, masks)
    pairs = [pair for group in groups for pair in zip(group.sublayers, masks[group.name].tolist(), strict=False)]
    for paths in dict.fromkeys(paths for paths, kept in pairs if not kept):
        is_block = groups[0].whole_blocks  # the module is the whole block: it returns its input
        hook = (lambda module, args, output: args[0]) if is_block else (lambda *call: _zeros_like(call[-1]))
        for path in paths[:1] if groups[0].kind == "branch" else paths:  # the others scale it, or only it reads them
            model.get_submodule(path).register_forward_hook(hook)
    for group in groups:
        for part in group.slices:
            module = model.get_submodule(part.param.rpartition(".")[0])
            if part.param.endswith(".weight") and isinstance(module, NORMS):
                kept = positions(part, masks[group.name])
                module.register_forward_hook(partial(_narrow_norm_output, _narrow_norm(module, kept), kept))
            with torch.no_grad():
                model.get_parameter(part.param).index_fill_(part.axis, positions(part, ~masks[group.name]), 0)  # type: ignore[arg-type]
    return model


def _zeros_like(output: Any) -> Any:
    """Return zeros for a tensor, or for the first of several outputs."""
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def _narrow_norm(norm: nn.Module, kept: Tensor) -> nn.Module:
    narrow: Any = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters():
        setattr(narrow, name, nn.Parameter(parameter.detach()[kept]))
    narrow.normalized_shape, narrow.num_channels = (len(kept),), len(kept)
    return narrow  # type: ignore[no-any-return]


def _narrow_norm_output(
    narrow: nn.Module, kept: Tensor, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Return the output of a norm over the remaining channels; the removed ones are zero."""
    axis = _channel_axis(norm, output.dim())
    return torch.zeros_like(output).index_copy(axis, kept, narrow(args[0].index_select(axis, kept)))


def _channel_axis(norm: nn.Module, dimensions: int) -> int:
    """Return the axis over which a norm computes mean and variance."""
    if isinstance(norm, nn.GroupNorm):
        return 1
    if dimensions < 4:
        return -1
    # if it is not the last axis, scaling the columns of an image does not change the normalized values of a pixel
    width = len(next(norm.parameters()))
    pixels = torch.randn(1, width, 2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(1, 2, width, dtype=torch.float64)
    return 1 if torch.allclose(norm.forward(pixels * scale), norm.forward(pixels), rtol=1e-3, atol=1e-3) else -1


def _check_zeros(model: nn.Module, groups: Sequence[Group], masks: Masks) -> list[str]:
    """Check that exactly the masked weights are zero."""
    wrong = [g.name for g in groups if not torch.equal(model.get_parameter(g.name) != 0, masks[g.name])]
    return [f"{wrong[0]}: the zeros are not those of its mask"] if wrong else []


def _check_costs(dense: nn.Module, groups: Sequence[Group], masks: Masks, counts: Sequence[_Cost]) -> list[str]:
    """Check that parameters decrease by the size of the slices, and MACs of a layer in proportion to its weights."""
    (before, (total, layers)), (after, (left, layers_left)) = counts
    removals = expected_removals(dense, groups, masks)
    removed = sum(removals.values())
    failures = [] if before - after == removed else [f"{before - after} parameters removed, expected {removed}"]
    saved = 0
    for name, cost in layers.items():
        share = removals.get(f"{name}.weight", 0)
        expected = cost - cost * share // dense.get_parameter(f"{name}.weight").numel()
        saved += cost - expected
        if groups[0].kind == "block":  # later blocks are renumbered
            continue
        left_here = layers_left.get(name, 0)  # a removed branch has no layers
        if left_here > expected or (share and left_here != expected):
            failures.append(f"{name}: {left_here} MACs remain, expected {expected}")
    return failures if total - left >= saved else [*failures, f"{total - left} MACs removed, expected {saved}"]


def expected_removals(dense: nn.Module, groups: Sequence[Group], masks: Masks) -> dict[str, int]:
    """Return the number of elements that each parameter loses, computed from the slices alone.

    Args:
        dense: The model.
        groups: Groups of one kind.
        masks: Masks by group name, True = kept.
    """
    kept: dict[str, Tensor] = {}
    parameters = dict(dense.named_parameters())
    removed = removed_modules(groups, masks)
    for name, parameter in parameters.items():
        if is_within(name, removed):
            kept[name] = torch.zeros(parameter.shape, dtype=torch.bool)
    for group in groups:
        for part in group.slices:
            mask = kept.setdefault(part.param, torch.ones(parameters[part.param].shape, dtype=torch.bool))
            assert part.axis is not None
            mask.index_fill_(part.axis, positions(part, ~masks[group.name]), False)
    return {name: int((~mask).sum()) for name, mask in kept.items()}


def _check_round_trip(model: nn.Module, dense: nn.Module, inputs: Tensor) -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        models.save(model, directory)
        loaded = models.load(directory) if is_timm_model(model) else load_like(dense, Path(directory))
    same = torch.equal(logits_of(loaded, [inputs])[0], logits_of(model, [inputs])[0])
    return [] if same else ["after saving and loading, the logits differ"]


def _check_backward(model: nn.Module, inputs: Tensor) -> list[str]:
    model.train()
    output = main_tensor(model(inputs))
    logits = output if isinstance(output, Tensor) else torch.cat(output)
    logits.square().mean().backward()  # type: ignore[no-untyped-call]
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    finite = bool(grads) and all(bool(grad.isfinite().all()) for grad in grads)
    return [] if finite and bool(logits.isfinite().all()) else ["logits or gradients are not finite"]
