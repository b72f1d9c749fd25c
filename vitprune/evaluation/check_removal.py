"""One cut held against the literal removal of the same units: logits, gradients, costs, and a round trip by file."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d, RmsNorm
from torch import Tensor, nn

from vitprune import models
from vitprune.evaluation.cost import count_macs
from vitprune.groups import Group, Masks, is_within, positions, removed_modules, shrink, zero
from vitprune.runtime.eval_mode import eval_mode

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, nn.GroupNorm)  # whose statistics run over channels
LOGIT_TOLERANCE = 1e-10  # of the largest logit, in float64
MIN_CHANGE = 1e-6

Counted = tuple[int, tuple[int, dict[str, int]]]


@dataclass(frozen=True)
class RemovalCheck:
    """What one cut did: largest difference of a logit (relative to the largest logit), and costs of one image.

    `faults` says what did not hold; a proof without one is a proof.
    """

    difference: float
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    faults: tuple[str, ...]


def check_removal(dense: nn.Module, groups: Sequence[Group], masks: Masks, inputs: Tensor) -> RemovalCheck:
    """Cut a copy of a model in float64 and hold it against the literal removal of the same units.

    Single weights are zeroed, as they have no smaller form.
    """
    kind = groups[0].kind
    whole = _answer(dense, inputs)
    counts = [(sum(p.numel() for p in dense.parameters()), count_macs(dense, inputs[:1]))] * 2
    faults: list[str] = []
    difference = float("nan")
    try:
        expected = _answer(masked_reference(dense, groups, masks), inputs)
        smaller = (zero if kind == "weight" else shrink)(copy.deepcopy(dense), groups, masks)
        found = _answer(smaller, inputs)
        scale = float(expected.abs().max())
        difference = float((found - expected).abs().max()) / scale
        if not difference <= LOGIT_TOLERANCE:
            faults.append(f"its logits differ by {difference:.2g} from those of the literal removal")
        if not float((expected - whole).abs().max()) >= MIN_CHANGE * scale:
            faults.append("removing its units changes nothing, so nothing is proven")
        counts[1] = sum(p.numel() for p in smaller.parameters()), count_macs(smaller, inputs[:1])
        faults += _zeros(smaller, groups, masks) if kind == "weight" else _costs(dense, groups, masks, counts)
        faults += _round_trip(smaller, inputs) + _backward(smaller, inputs)
    except Exception as error:  # a wrong rule can break a forward pass in any way
        faults.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    (before, (macs_before, _)), (after, (macs_after, _)) = counts
    return RemovalCheck(difference, before, after, macs_before, macs_after, tuple(faults))


def masked_reference(dense: nn.Module, groups: Sequence[Group], masks: Masks) -> nn.Module:
    """A copy of a model at its full size in which the removed units do nothing.

    Units are zeroed; norms of a residual stream run over what is left of it; of blocks, the branches add nothing.
    """
    model = copy.deepcopy(dense)
    if groups[0].kind not in ("residual", "block"):
        return zero(model, groups, masks)
    for path in dict.fromkeys(removed_modules(groups, masks)):
        given = groups[0].whole_blocks  # to a block that goes as a whole, and on to the next
        hook = (lambda module, args, output: args[0]) if given else (lambda *call: torch.zeros_like(call[-1]))
        model.get_submodule(path).register_forward_hook(hook)
    for group in groups:
        for part in group.slices:
            module = model.get_submodule(part.param.rpartition(".")[0])
            if part.param.endswith(".weight") and isinstance(module, NORMS):
                kept = positions(part, masks[group.name])
                module.register_forward_hook(partial(_live, _narrow(module, kept), kept))
            with torch.no_grad():
                model.get_parameter(part.param).index_fill_(part.axis, positions(part, ~masks[group.name]), 0)  # type: ignore[arg-type]
    return model


def _narrow(norm: nn.Module, kept: Tensor) -> nn.Module:
    narrow: Any = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters():
        setattr(narrow, name, nn.Parameter(parameter.detach()[kept]))
    narrow.normalized_shape, narrow.num_channels = (len(kept),), len(kept)
    return narrow  # type: ignore[no-any-return]


def _live(narrow: nn.Module, kept: Tensor, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A norm's answer with statistics over the channels that are left; the others are zero."""
    axis = 1 if isinstance(norm, LayerNorm2d | nn.GroupNorm) else -1
    return torch.zeros_like(output).index_copy(axis, kept, narrow(args[0].index_select(axis, kept)))


def _answer(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad(), eval_mode(model):
        answer: Tensor = model(inputs)
    return answer


def _zeros(model: nn.Module, groups: Sequence[Group], masks: Masks) -> list[str]:
    """Of single weights, exactly those of the masks are zero."""
    wrong = [g.name for g in groups if not torch.equal(model.get_parameter(g.name) != 0, masks[g.name])]
    return [f"{wrong[0]}: other weights are zero than its mask removes"] if wrong else []


def _costs(dense: nn.Module, groups: Sequence[Group], masks: Masks, counts: Sequence[Counted]) -> list[str]:
    """Parameters must fall by what the slices hold, and the MACs of every layer in proportion to its weights."""
    (before, (total, layers)), (after, (left, layers_left)) = counts
    promised = expected_removals(dense, groups, masks)
    gone = sum(promised.values())
    faults = [] if before - after == gone else [f"{before - after} parameters went, its groups promise {gone}"]
    saved = 0
    for name, cost in layers.items():
        share = promised.get(f"{name}.weight", 0)
        expected = cost - cost * share // dense.get_parameter(f"{name}.weight").numel()
        saved += cost - expected
        if groups[0].kind == "block":  # those behind a removed one move up, and have other names
            continue
        if layers_left[name] > expected or (share and layers_left[name] != expected):
            faults.append(f"{name}: {layers_left[name]} MACs are left, its groups promise {expected}")
    return faults if total - left >= saved else [*faults, f"{total - left} MACs went, its groups promise {saved}"]


def expected_removals(dense: nn.Module, groups: Sequence[Group], masks: Masks) -> dict[str, int]:
    """How many elements of each parameter go with the removed units, by its slices alone."""
    kept: dict[str, Tensor] = {}
    parameters = dict(dense.named_parameters())
    doomed = removed_modules(groups, masks)
    for name, parameter in parameters.items():
        if is_within(name, doomed):
            kept[name] = torch.zeros(parameter.shape, dtype=torch.bool)
    for group in groups:
        for part in group.slices:
            mask = kept.setdefault(part.param, torch.ones(parameters[part.param].shape, dtype=torch.bool))
            assert part.axis is not None
            mask.index_fill_(part.axis, positions(part, ~masks[group.name]), False)
    return {name: int((~mask).sum()) for name, mask in kept.items()}


def _round_trip(model: nn.Module, inputs: Tensor) -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        models.save(model, directory)
        again = models.load(directory)
    same = torch.equal(_answer(again, inputs), _answer(model, inputs))
    return [] if same else ["saved and loaded again, it answers differently"]


def _backward(model: nn.Module, inputs: Tensor) -> list[str]:
    model.train()
    answer = model(inputs)
    logits = answer if isinstance(answer, Tensor) else torch.cat(answer)
    logits.square().mean().backward()  # type: ignore[no-untyped-call]
    slopes = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    fine = bool(slopes) and all(bool(slope.isfinite().all()) for slope in slopes)
    return [] if fine and bool(logits.isfinite().all()) else ["its logits or gradients are not finite"]
