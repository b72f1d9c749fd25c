"""Second moments of layer inputs, and the Fisher metric of layer outputs (K-FAC factors)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, ScoringContext, Statistics, layer_io
from vitprune.criteria.fisher_directions import fisher_directions
from vitprune.criteria.memory import max_batch_size
from vitprune.errors import BadInput
from vitprune.groups import Group, Projections
from vitprune.runtime.eval_mode import eval_mode, frozen
from vitprune.runtime.hooks import forward_hooks
from vitprune.runtime.messages import warn
from vitprune.runtime.progress import track

NUM_FOLDS = 2  # moments of even and odd images: a ridge is selected on images that were not fitted
MANY_CLASSES, NARROW = 100, 0.3  # least classes of a warning; predicted classes relative to the most that are possible

GradMoment = Literal["metric", "metric_diagonal"]


@dataclass(frozen=True)
class Consumer:
    """The one Linear layer that reads the units of a group, with `inner` input channels per unit."""

    path: str
    inner: int


def find_consumer(model: nn.Module, group: Group) -> Consumer:
    """Return the consumer of a group of FFN units, heads or attention channels.

    Raises:
        BadInput: not exactly one Linear layer reads the units.
    """
    result = [
        Consumer(part.param.removesuffix(".weight"), part.inner)
        for part in group.slices
        if part.axis == 1
        and part.start is None
        and isinstance(model.get_submodule(part.param.rpartition(".")[0]), nn.Linear)
    ]
    if len(result) != 1 or group.kind == "residual":
        why = f"{len(result)} Linear layers read its units, the method needs one"
        raise BadInput(f"{group.name}: {why}; choose another")
    return result[0]


def find_projections(group: Group) -> Projections:
    """Return the layers of q, k and v of an attention group.

    Raises:
        BadInput: a change of basis of its channels is not possible, or the group has merged heads.
    """
    if group.projections is None:
        raise BadInput(
            f"{group.name}: its q, k and v do not come from plain Linear layers, so there is no change of basis; "
            "use heads or ffn here"
        )
    if group.shape[0] != group.projections.heads:
        raise BadInput(
            f"{group.name}: each of its {group.projections.heads} heads has its own basis, so heads cannot be merged; "
            "unset prune.merge_heads_to"
        )
    return group.projections


def collect_unit_moments(
    model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext, grads: bool = False
) -> Statistics:
    """Collect the sums over all tokens of all images that refit and structured OBS need, per consumer.

    Args:
        model: The dense model.
        groups: Groups of FFN units, heads or channels of heads.
        batches: Calibration batches.
        context: The scoring options (`memory`, number of Fisher directions, seed).
        grads: Also run backward passes for the Fisher metric.

    Returns:
        By name, in float64:

        - PATH/inputs (folds, k+1, k+1): second moment of the consumer's input with a 1 appended.
        - PATH/metric (o, o), with `grads`: second moment of the gradient of the logits w.r.t. its output (Fisher).
        - of the layer of q, with `grads`, for channels of q and k: PATH/query and PATH/key (heads, c, c), k centered
          over the tokens of a softmax; PATH/query_grad_sq (heads,), squared gradient w.r.t. q; PATH/tokens, their
          number.

    Raises:
        BadInput: no batches, or a group without exactly one consumer.
    """
    readers = list(dict.fromkeys(find_consumer(model, group).path for group in groups if group.kind != "qk"))
    attentions = [find_projections(group) for group in groups if grads and group.kind in ("attention", "qk")]
    return collect_layer_moments(model, readers, attentions, batches, context, "metric" if grads else None)


def collect_layer_moments(
    model: nn.Module,
    readers: Sequence[str],
    attentions: Sequence[Projections],
    batches: Batches,
    context: ScoringContext,
    grads: GradMoment | None,
) -> Statistics:
    """Collect sums over all tokens of all images for layers given by path.

    Args:
        model: The dense model.
        readers: Paths of plain layers, see `layer_io.is_plain_layer`.
        attentions: Layers of q, k and v.
        batches: Calibration batches.
        context: The scoring options.
        grads: Sums of gradients to collect for `readers`: "metric", "metric_diagonal", or None without backward passes.

    Returns:
        The sums of `collect_unit_moments`; PATH/metric_diagonal (o,) is the diagonal of PATH/metric.

    Raises:
        BadInput: no batches, or a layer is not used in the forward pass, or more than once, or on other values than
            those of images, such as a table of positions.
    """
    if not batches:
        raise BadInput("second moments: need images; give calibration batches")
    total: Statistics = {}
    first = context.first
    predicted: set[int] = set()
    with eval_mode(model), frozen(model):
        size = _at_once(model, readers, attentions, batches[0][0], context)
        for batch, _ in track(batches, "collecting second moments"):
            for images in torch.split(batch, size):
                result, logits = _of_batch(model, readers, attentions, images, context, grads, first)
                for name, value in result.items():
                    _add(total, name, value)
                first += len(images)
                predicted.update(logits.argmax(dim=-1).flatten().tolist())
    _warn_if_narrow(len(predicted), logits.shape[-1], first - context.first)
    return total


def _warn_if_narrow(predicted: int, classes: int, images: int) -> None:
    """Warn if the calibration images cover few of the model's classes: the pruned model may lose the others."""
    if classes >= MANY_CLASSES and predicted < NARROW * min(classes, images):
        warn(
            f"calibration: on these {images} images the model answers only {predicted} of its {classes} classes; "
            "the pruned model can lose the others, add images of other kinds"
        )


def _at_once(
    model: nn.Module, readers: Sequence[str], attentions: Sequence[Projections], images: Tensor, context: ScoringContext
) -> int:
    """Number of images per forward pass that fits into `context.config.memory`."""
    image = images[:1].to(next(model.parameters()).device)
    with record_layer_io(model, readers, _makers(attentions)):
        return max_batch_size(model, model, image, context.config.memory)


def _of_batch(
    model: nn.Module,
    readers: Sequence[str],
    attentions: Sequence[Projections],
    images: Tensor,
    context: ScoringContext,
    grads: GradMoment | None,
    first: int,
) -> tuple[Statistics, Tensor]:
    """Return the sums of some images, and the logits."""
    device = next(model.parameters()).device
    with (
        torch.set_grad_enabled(grads is not None),
        record_layer_io(model, readers, _makers(attentions)) as (inputs, outputs),
    ):
        logits = model(images.to(device))
    for path in readers:
        if path not in inputs:
            raise BadInput(f"{path}: is not used in the forward pass; exclude it")
        if inputs[path].numel() % (len(images) * inputs[path].shape[-1]):
            raise BadInput(f"{path}: its inputs do not belong to single images; exclude it")
    parity = torch.arange(first, first + len(images), device=device) % NUM_FOLDS
    layers = {path: model.get_submodule(path) for path in readers}
    result = {f"{path}/inputs": _of_inputs(layer, inputs[path], parity) for path, layer in layers.items()}
    if grads is None:
        return result, logits.detach()
    leaves = list(outputs.values())
    probability, where = logits.detach().double().softmax(dim=-1), range(first, first + len(images))
    number = context.config.directions(summed=True)
    for direction in fisher_directions(probability, None, number, context.seed, where):
        output_grads = torch.autograd.grad(logits, leaves, direction.to(logits.dtype), retain_graph=True)
        by_path = dict(zip(outputs, output_grads, strict=True))
        for attention in attentions:
            query = attention.select(by_path)[0].flatten(0, -3)  # (tokens of all images, heads, c)
            _add(result, f"{attention.path}/query_grad_sq", query.double().square().sum(dim=(0, 2)).cpu())
        for path in readers:
            flat = layer_io.layer_outputs(layers[path], by_path[path], len(images)).flatten(0, 1)
            value = flat.T @ flat if grads == "metric" else flat.square().sum(dim=0)
            _add(result, f"{path}/{grads}", value.double().cpu())
    for attention in attentions:
        result |= _of_heads(attention, {path: outputs[path].detach() for path in attention.layers})
    return result, logits.detach()


def _makers(attentions: Sequence[Projections]) -> list[str]:
    return list(dict.fromkeys(path for attention in attentions for path in attention.layers))


def _add(result: dict[str, Tensor], name: str, value: Tensor) -> None:
    result[name] = result[name] + value if name in result else value


def _of_inputs(layer: nn.Module, value: Tensor, parity: Tensor) -> Tensor:
    """Return second moments of a layer's input with a 1 appended, per fold (even, odd images): (folds, k+1, k+1)."""
    inputs = layer_io.layer_inputs(layer, value, len(parity))
    rows = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
    halves = [rows[parity == half].flatten(0, 1) for half in range(NUM_FOLDS)]
    return torch.stack([(half.T @ half).double().cpu() for half in halves])


def _of_heads(attention: Projections, outputs: Mapping[str, Tensor]) -> Statistics:
    """Second moments of q and of k, centered over tokens because softmax is invariant to a shift of k."""
    query, key, _ = (part.flatten(0, -4) if part.dim() > 4 else part for part in attention.select(outputs))
    shifted = key - key.mean(dim=1, keepdim=True)  # (windows, tokens, heads, c)
    return {
        f"{attention.path}/query": torch.einsum("bthc,bthd->hcd", query, query).double().cpu(),
        f"{attention.path}/key": torch.einsum("bthc,bthd->hcd", shifted, shifted).double().cpu(),
        f"{attention.path}/tokens": torch.tensor(float(query.shape[0] * query.shape[1]), dtype=torch.float64),
    }


@contextmanager
def record_layer_io(
    model: nn.Module, readers: Sequence[str], makers: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Record inputs and outputs of layers while the context is open.

    Args:
        model: The model.
        readers: Paths of layers whose inputs and outputs are recorded.
        makers: Paths of layers whose outputs alone are recorded.

    Yields:
        Inputs and outputs by path. Outputs are part of the autograd graph, inputs are not.

    Raises:
        BadInput: a layer runs more than once in one forward pass.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if path in outputs:
            raise BadInput(f"{path}: runs more than once per forward pass; exclude it")
        # the first recorded output becomes a leaf: inputs may be token ids, which have no gradient
        outputs[path] = output if output.requires_grad else output.detach().requires_grad_()
        if path in readers:
            inputs[path] = args[0].detach().clone()
        return outputs[path].clone()  # what follows may change it in place, as the input above

    with forward_hooks((model.get_submodule(path), partial(record, path)) for path in (*readers, *makers)):
        yield inputs, outputs
