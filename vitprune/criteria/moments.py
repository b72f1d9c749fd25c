"""Second moments of what a unit's consumer reads, and the metric in which errors of its output cost nats."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, ScoreConfig, Statistics, layer_io
from vitprune.criteria.fisher_directions import fisher_directions
from vitprune.criteria.memory import images_at_once, minibatches
from vitprune.errors import BadInput
from vitprune.groups import Group
from vitprune.runtime.eval_mode import evaluating, frozen
from vitprune.runtime.progress import track

HALVES = (
    2  # moments of the even and of the odd images, so that a ridge can be chosen on images that it was not fitted to
)

Slopes = Literal["metric", "each"]


@dataclass(frozen=True)
class Consumer:
    """The one Linear layer that reads a group's units: its input channels are (units, inner)."""

    path: str
    units: int
    inner: int


def consumer(model: nn.Module, group: Group) -> Consumer:
    """The consumer of a group of FFN units, heads or attention channels.

    Raises:
        BadInput: not exactly one Linear layer reads the units.
    """
    found = [
        Consumer(part.param.removesuffix(".weight"), group.units, part.inner)
        for part in group.slices
        if part.axis == 1 and isinstance(model.get_submodule(part.param.rpartition(".")[0]), nn.Linear)
    ]
    if len(found) != 1 or group.kind == "residual":
        raise BadInput(f"{group.name}: {len(found)} layers read its units; an update needs exactly one Linear layer")
    return found[0]


def producer(model: nn.Module, group: Group) -> str:
    """Path of the one layer that makes q, k and v of an attention group.

    Raises:
        BadInput: q, k and v do not come from one Linear layer, or the group reads several heads as one.
    """
    own = cast(Any, model.get_submodule(group.owner)).num_heads
    if group.shape[0] != own:
        raise BadInput(
            f"{group.name}: each of its {own} heads has a basis of its own, so they cannot merge; drop heads"
        )
    found = [
        part.param.removesuffix(".weight")
        for part in group.slices
        if part.axis == 0 and part.outer == 3 and part.param.endswith(".weight")
    ]
    layers = {part.param.rpartition(".")[0] for part in group.slices + group.buffers}
    if len(found) != 1 or len(layers) != 2 or "scale" not in vars(model.get_submodule(group.owner)):
        raise BadInput(f"{group.name}: its q, k and v do not come from one Linear layer; use heads or ffn here")
    return found[0]


def collect(
    model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig, slopes: bool = False
) -> Statistics:
    """Sums over all tokens of all images, for the consumer of every group.

    PATH/inputs (halves, k+1, k+1): second moment of the consumer's input with a 1 appended, which is all that a refit
    needs. With `slopes`, by backward passes, PATH/metric (o, o): second moment of the answer's gradient by its output,
    which is Fisher's; and of an attention's layer that makes q, k and v: PATH/query and PATH/key (heads, c, c), k
    centred over the tokens of a softmax; PATH/slope (heads,), squared gradient by q; PATH/tokens, their number.

    Raises:
        BadInput: no batches, or a group without one consumer.
    """
    readers = list(dict.fromkeys(consumer(model, group).path for group in groups))
    heads = {producer(model, group): group.shape[0] for group in groups if slopes and group.kind == "attention"}
    return sums(model, readers, heads, batches, setting, "metric" if slopes else None)


def sums(
    model: nn.Module,
    readers: Sequence[str],
    heads: dict[str, int],
    batches: Batches,
    setting: ScoreConfig,
    slopes: Slopes | None,
) -> Statistics:
    """The same of plain layers (`readers`) and of layers that make q, k and v (`heads`: how many), by path.

    With slopes "each", PATH/each (o,) instead of PATH/metric: its diagonal.

    Raises:
        BadInput: no batches, or a layer takes no part in the answer, or more than one.
    """
    if not batches:
        raise BadInput("second moments: need images; give batches")
    total: Statistics = {}
    first = setting.first
    with evaluating(model), frozen(model):
        size = _at_once(model, readers, heads, batches[0][0], setting)
        for batch, _ in track(batches, "taking second moments"):
            for images in minibatches(batch, size):
                found = _of_batch(model, readers, heads, images, setting, slopes, first)
                for name, value in found.items():
                    _add(total, name, value)
                first += len(images)
    return total


def _at_once(
    model: nn.Module, readers: Sequence[str], heads: dict[str, int], images: Tensor, setting: ScoreConfig
) -> int:
    """How many images fit into the memory at a time."""
    one = images[:1].to(next(model.parameters()).device)
    with recording(model, readers, list(heads)):
        return images_at_once(model, model, one, setting.memory)


def _of_batch(
    model: nn.Module,
    readers: Sequence[str],
    heads: dict[str, int],
    images: Tensor,
    setting: ScoreConfig,
    slopes: Slopes | None,
    first: int,
) -> Statistics:
    device = next(model.parameters()).device
    with torch.set_grad_enabled(slopes is not None), recording(model, readers, list(heads)) as (inputs, outputs):
        logits = model(images.to(device))
    unused = [path for path in readers if path not in inputs]
    if unused:
        raise BadInput(f"{unused[0]}: takes no part in the answer; leave it out")
    parity = torch.arange(first, first + len(images), device=device) % HALVES
    layers = {path: model.get_submodule(path) for path in readers}
    found = {f"{path}/inputs": _of_inputs(layer, inputs[path], parity) for path, layer in layers.items()}
    if slopes is None:
        return found
    watched = list(outputs)
    probability, where = logits.detach().double().softmax(dim=-1), range(first, first + len(images))
    for pull in fisher_directions(probability, None, setting.classes, setting.seed, where):
        steep = torch.autograd.grad(logits, [outputs[p] for p in watched], pull.to(logits.dtype), retain_graph=True)
        for path, slope in zip(watched, steep, strict=True):
            if path in heads:
                query = slope[..., : slope.shape[-1] // 3].reshape(
                    -1, heads[path], slope.shape[-1] // (3 * heads[path])
                )
                _add(found, f"{path}/slope", query.double().square().sum(dim=(0, 2)).cpu())
            else:
                flat = layer_io.layer_outputs(layers[path], slope, len(images)).flatten(0, 1)
                value = flat.T @ flat if slopes == "metric" else flat.square().sum(dim=0)
                _add(found, f"{path}/{slopes}", value.double().cpu())
    for path, number in heads.items():
        found |= _of_heads(path, outputs[path].detach(), number)
    return found


def _add(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    found[name] = found[name] + value if name in found else value


def _of_inputs(layer: nn.Module, value: Tensor, parity: Tensor) -> Tensor:
    """Second moment of what a layer reads with a 1 appended, for even and for odd images; (halves, k+1, k+1)."""
    own = layer_io.layer_inputs(layer, value, len(parity))
    rows = torch.cat([own, torch.ones_like(own[..., :1])], dim=-1)
    halves = [rows[parity == half].flatten(0, 1) for half in range(HALVES)]
    return torch.stack([(half.T @ half).double().cpu() for half in halves])


def _of_heads(path: str, qkv: Tensor, heads: int) -> Statistics:
    """Moments of q and of k (centred over the tokens that attend to each other, as softmax does not see a shift)."""
    query, key, _ = qkv.reshape(-1, qkv.shape[-2], 3, heads, qkv.shape[-1] // (3 * heads)).unbind(dim=2)
    shifted = key - key.mean(dim=1, keepdim=True)  # (windows, tokens, heads, c)
    return {
        f"{path}/query": torch.einsum("bthc,bthd->hcd", query, query).double().cpu(),
        f"{path}/key": torch.einsum("bthc,bthd->hcd", shifted, shifted).double().cpu(),
        f"{path}/tokens": torch.tensor(float(query.shape[0] * query.shape[1]), dtype=torch.float64),
    }


@contextmanager
def recording(
    model: nn.Module, readers: Sequence[str], makers: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """While this is open, the inputs of the readers and the outputs of readers and makers are kept, by path."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(path: str, read: bool) -> object:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if path in outputs:
                raise BadInput(f"{path}: runs more than once in a pass, and has no one input; leave it out")
            # the first one watched is where gradients end: images may be tokens, which have none
            outputs[path] = output if output.requires_grad else output.detach().requires_grad_()
            if read:
                inputs[path] = given[0].detach()
            return outputs[path]

        return model.get_submodule(path).register_forward_hook(hook)

    handles = [keep(path, True) for path in readers] + [keep(path, False) for path in makers]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
