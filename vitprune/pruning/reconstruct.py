"""Reconstruction: fit the remaining weights of a pruned model to the dense model, without labels."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.architectures.token_merging import without_merging
from vitprune.config.reconstruct_config import ReconstructConfig
from vitprune.criteria import Batches
from vitprune.errors import BadInput, NotFinite
from vitprune.evaluation.logits import logits_of
from vitprune.evaluation.losses import kl_divergence
from vitprune.pruning.held_out import held_out
from vitprune.pruning.rotated_adam import RotatedAdam, input_bases
from vitprune.runtime.eval_mode import eval_mode, frozen
from vitprune.runtime.hooks import forward_hooks
from vitprune.runtime.outputs import tensors_of
from vitprune.runtime.progress import track
from vitprune.training.finetune import zero_weights
from vitprune.training.frozen_zeros import set_removed_to_zero
from vitprune.training.lr_schedule import learning_rate

WARMUP_STEPS, BETAS = 10, (0.9, 0.99)
MAX_PASSES, TIMED_BATCHES = 48, 3
TARGET_BYTES = 1 << 30  # of the dense model's outputs that are stored
BASIS_IMAGES = 100
EVALUATION_SHARE = 0.3  # time of an image's logits, relative to a training step


@dataclass(frozen=True)
class Reconstruction:
    """Result of a reconstruction.

    Attributes:
        facts: KL divergence from the dense logits on held-out images before and after, in nats per image, the pass
            whose weights were kept, 0 for those before, and the number of passes.
        curve: After every pass: step, mean loss, learning rate and KL divergence on held-out images (held_out_nats).
    """

    facts: Mapping[str, float] = field(default_factory=dict)
    curve: Sequence[Mapping[str, float]] = ()


def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    batches: Batches,
    config: ReconstructConfig,
    seed: int = 0,
    deadline: float | None = None,
) -> Reconstruction:
    """Fit the remaining weights, biases and norms of a pruned model to the dense model, in place.

    Classifier and embeddings are not changed.

    Minimizes the KL divergence of the logits plus `stream_weight` times the mean relative squared error of the block
    outputs, each relative to the variance of the dense one; outputs of another shape are left out. Weights that are
    zero remain zero. The held-out images decide which pass is kept; if none has a lower KL divergence than the pruned
    model, it is not changed. On one device, the same seed gives bit-identical weights.

    Args:
        model: The pruned model.
        dense: The dense model.
        batches: Calibration batches; labels are not used.
        config: The settings.
        seed: Seed of the order of the images, and of which are mirrored.
        deadline: Time of `time.perf_counter` at which it should end: instead of `config.passes`, as many passes as are
            expected to fit, at most MAX_PASSES. The result then depends on the machine; `facts` has the number.

    Raises:
        BadInput: there are fewer images than `config.holdout`, they have no mirror images, or all parameters that are
            fitted are frozen.
        NotFinite: the loss is not finite.

    Source: ours; block-wise reconstruction (BRECQ, Li et al., ICLR 2021) over all blocks at once, with the KL
        divergence that UP-ViTs scores with.
    """
    device = next(model.parameters()).device
    held = held_out(batches, config)
    images = torch.cat([images for images, _ in batches])
    if config.mirror and (images.dim() != 4 or not images.is_floating_point()):
        raise BadInput("prune.reconstruct.mirror: the inputs are not images (B, C, H, W); set it to false")
    if not _trained(model):
        raise BadInput("prune.reconstruct: all parameters of the blocks are frozen; call requires_grad_(True) first")
    fit, test, forked = images[~held], images[held].to(device), [device] if device.type == "cuda" else []
    with eval_mode(model), eval_mode(dense), frozen(dense), torch.random.fork_rng(forked):
        expected = _logits(dense, test, config.batch_size)
        nats, curve = [float(kl_divergence(_logits(model, test, config.batch_size), expected))], []
        bases = input_bases(model, _trained(model), torch.split(fit[:BASIS_IMAGES], config.batch_size))
        paths = _shared_blocks(model, dense)
        if deadline is not None:
            timed = _Targets(dense, fit, paths, config.mirror)
            config = config.model_copy(update={"passes": _passes_until(deadline, model, timed, config)})
        targets = _Targets(dense, fit, paths, config.mirror)  # the same batches run as without a deadline
        torch.manual_seed(seed)
        best, kept = _state(model), 0
        for row in track(_passes(model, targets, config, bases), "reconstructing", config.passes):
            nats.append(float(kl_divergence(_logits(model, test, config.batch_size), expected)))
            curve.append(row | {"held_out_nats": nats[-1]})
            if nats[-1] < nats[kept]:
                best, kept = _state(model), len(curve)
        model.load_state_dict(best)
    facts = {"nats_before": nats[0], "nats_after": nats[kept], "pass": kept, "passes": config.passes}
    return Reconstruction(facts, curve)


@dataclass
class _Batch:
    """Images of one step, with the dense model's logits and block outputs."""

    images: Tensor
    logits: Tensor
    streams: Mapping[str, Tensor]


class _Targets:
    """Outputs of the dense model for images and their mirror images; each is computed once if they can be stored."""

    def __init__(self, dense: nn.Module, images: Tensor, paths: Sequence[str], mirror: bool) -> None:
        self._dense, self.images, self._paths, self._mirror = dense, images, paths, mirror
        self._device = next(dense.parameters()).device
        self._stored: dict[tuple[int, bool], dict[str, Tensor]] = {}
        self._storable: bool | None = None  # after the first batch

    @property
    def views(self) -> int:
        """Number of different inputs of the dense model; 0 if its outputs are not stored."""
        return len(self.images) * (1 + self._mirror) if self._storable else 0

    def batch(self, rows: Tensor) -> _Batch:
        """Return a batch of images, some of them mirrored at random."""
        mirrored = torch.rand(len(rows)) < (0.5 if self._mirror else 0.0)  # drawn on the CPU: equal on all devices
        images = self.images[rows].to(self._device)
        if self._mirror:
            images = torch.where(mirrored.view(-1, 1, 1, 1).to(self._device), images.flip(-1), images)
        keys = list(zip(rows.tolist(), mirrored.tolist(), strict=True))
        outputs = self._recall(images, keys) if self._storable else self._run(images)
        if self._storable is None:
            self._storable = self._fits(outputs, len(rows))
        logits = outputs.pop("")
        return _Batch(images, logits, outputs)

    def _recall(self, images: Tensor, keys: Sequence[tuple[int, bool]]) -> dict[str, Tensor]:
        missing = [place for place, key in enumerate(keys) if key not in self._stored]
        if missing:
            outputs = self._run(images[missing])
            for number, place in enumerate(missing):
                self._stored[keys[place]] = {name: value[number].clone() for name, value in outputs.items()}
        return {name: torch.stack([self._stored[key][name] for key in keys]) for name in self._stored[keys[0]]}

    @torch.no_grad()
    def _run(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs of the blocks by path, and the logits by the empty path."""
        with _recorded(self._dense, self._paths) as outputs:
            logits = self._dense(images)
        return {"": logits, **outputs}

    def _fits(self, outputs: Mapping[str, Tensor], images: int) -> bool:
        by_image = all(value.dim() > 0 and len(value) == images for value in outputs.values())
        size = sum(value.nbytes for value in outputs.values()) / images * len(self.images) * (1 + self._mirror)
        return by_image and size <= TARGET_BYTES


def _passes_until(deadline: float, model: nn.Module, targets: _Targets, config: ReconstructConfig) -> int:
    """Return the number of passes expected to end before the deadline; a few batches are timed."""
    parameters = _trained(model)
    dense, step = [], []
    for rows in torch.split(torch.arange(len(targets.images)), config.batch_size)[:TIMED_BATCHES]:
        start = time.perf_counter()
        batch = targets.batch(rows)
        float(batch.logits.sum())  # waits for the device
        dense.append(time.perf_counter() - start)
        loss = _loss(model, batch, config.stream_weight)
        torch.autograd.grad(loss, parameters, allow_unused=True)
        float(loss.detach())
        step.append(time.perf_counter() - start - dense[-1])
    steps, left = -(-len(targets.images) // config.batch_size), deadline - time.perf_counter()
    one_pass = steps * (min(step) + EVALUATION_SHARE / config.holdout * (min(step) + min(dense)))
    if targets.views:
        left -= targets.views / config.batch_size * min(dense)
    else:
        one_pass += steps * min(dense)
    return max(0, min(MAX_PASSES, int(left / one_pass)))


def _passes(
    model: nn.Module, targets: _Targets, config: ReconstructConfig, bases: Mapping[nn.Parameter, Tensor]
) -> Iterator[dict[str, float]]:
    """Train pass by pass; yield step, mean loss and learning rate after every pass."""
    parameters = _trained(model)
    optimizer, removed = RotatedAdam(parameters, bases, BETAS), _removed(model)
    steps = -(-len(targets.images) // config.batch_size)
    step = 0
    for _ in range(config.passes):
        losses = []
        for rows in torch.split(torch.randperm(len(targets.images)), config.batch_size):
            lr = learning_rate(step + 1, config.passes * steps + 1, config.lr, 0.0, WARMUP_STEPS)
            loss = _loss(model, targets.batch(rows), config.stream_weight)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise NotFinite("prune.reconstruct: the loss is not finite; lower lr or check the images", 0, step)
            loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
            optimizer.step(lr)
            set_removed_to_zero(removed)
            step += 1
        yield {"step": step, "loss": sum(losses) / len(losses), "lr": lr}


def _removed(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the weights that contain zeros, with masks of the zeros, whose gradients matter in a rotated basis."""
    zeros = zero_weights(model)
    return [(model.get_parameter(name), ~mask) for name, mask in zeros.masks.items()] if zeros else []


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the stages that have the blocks, and of norms; all without blocks."""
    # classifier and embeddings keep their values: a few images have too few classes to fit a classifier
    stages = {path.split(".")[0] for path in _blocks(model)}
    result = []
    for path, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not stages or path.split(".")[0] in stages or all(parameter.ndim < 2 for parameter in own):
            result += [parameter for parameter in own if parameter.requires_grad]
    return list(dict.fromkeys(result))


def _loss(model: nn.Module, batch: _Batch, weight: float) -> Tensor:
    with torch.enable_grad(), _recorded(model, list(batch.streams)) as outputs:
        divergence = kl_divergence(model(batch.images), batch.logits)
        errors = [
            (outputs[path] - target).square().mean() / target.var()
            for path, target in batch.streams.items()
            if path in outputs and outputs[path].shape == target.shape
        ]
        loss: Tensor = divergence + weight * torch.stack(errors).mean() if errors else divergence
        return loss


def _shared_blocks(model: nn.Module, dense: nn.Module) -> list[str]:
    """Paths of the blocks of both models; none if tokens are merged."""
    # with merged tokens, most outputs have other shapes, and the weight of the others would grow
    ours, theirs = _blocks(model), _blocks(dense)
    return ours if ours == theirs and without_merging(model) is model else []


def _blocks(model: nn.Module) -> list[str]:
    """Paths of neighbors of one class in a list, that have no such neighbors inside."""
    result = []
    for path, module in model.named_modules():
        children = list(module.named_children())
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(children) > 1:
            kinds = {type(child) for _, child in children}
            if len(kinds) == 1 and all(any(True for _ in child.children()) for _, child in children):
                result += [f"{path}.{name}" for name, _ in children]
    return [path for path in result if not any(other.startswith(f"{path}.") for other in result)]


@contextmanager
def _recorded(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of modules by path."""
    outputs: dict[str, Tensor] = {}

    def record(path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        first = next(tensors_of(output), None)  # blocks of other libraries return tuples
        if first is not None:
            outputs[path] = first

    with forward_hooks((model.get_submodule(path), partial(record, path)) for path in paths):
        yield outputs


def _logits(model: nn.Module, images: Tensor, size: int) -> Tensor:
    return torch.cat(logits_of(model, torch.split(images, size))).double()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
