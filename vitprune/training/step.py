"""One optimizer step on accelerate: mixed precision, micro-batches, gradient clipping and data parallelism."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from vitprune.config.train_config import TrainConfig
from vitprune.data.batch_checks import IGNORED
from vitprune.errors import BadInput
from vitprune.runtime.distributed import ProcessGroup
from vitprune.training.checkpoint import rng_states, set_rng_state

LAUNCHES = ("NO", "MULTI_CPU", "MULTI_GPU")  # of accelerate's DistributedType
PRECISIONS = {False: "no", True: "bf16", "bfloat16": "bf16", "float16": "fp16"}


class TrainStep:
    """Optimizer steps: forward and backward in micro-batches, gradient all-reduce, clipping and update.

    Attributes:
        micro_batches: Micro-batches per batch and process; doubled when memory is insufficient.
    """

    def __init__(self, task: Any, optimizer: Any, recipe: TrainConfig, dist: ProcessGroup, accelerator: Any):
        self._module, self._dist, self._accelerator = task.trainable_module, dist, accelerator
        self._task = accelerator.prepare_model(task, device_placement=False)
        self._forward, self._compiled = self._task, recipe.compile
        if recipe.compile:
            self._forward = torch.compile(self._task)
        self._optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        self._max_norm = recipe.clip
        self.micro_batches = recipe.accumulate

    @property
    def scaler(self) -> Any:
        """The loss scaler of float16; None for other precisions."""
        return self._accelerator.scaler

    def step(self, batch: tuple[Tensor, ...], mask_gradients: Callable[[], None], where: str) -> tuple[float, float]:
        """Run one optimizer step on this process's share of a batch.

        If the loss or the gradient norm is not finite, the update is skipped; float16 then continues with a smaller
        loss scale.

        Args:
            batch: Arguments of the task, each (B, ...): images, labels and further per-image tensors.
            mask_gradients: Called on the gradients of the whole batch, before their norm is computed.
            where: Prefix of messages.

        Returns:
            Mean loss and gradient norm of the whole batch.

        Raises:
            BadInput: out of memory with one image at a time, or in one of several processes; or no image of a
                micro-batch has a label.
        """
        images, labels = self._dist.all_reduce(torch.tensor([len(batch[0]), label_count(batch[1])])).tolist()
        loss = self._dist.all_reduce(self._passes(batch, images, labels, where))
        mask_gradients()
        value, norm = torch.stack([loss, self._norm().to(loss)]).tolist()  # one device synchronization
        if math.isfinite(value) and (math.isfinite(norm) or self.scaler is not None):
            self._optimizer.step()
            norm = 0.0 if self.scaler is not None and not math.isfinite(norm) else norm
        return value, norm

    def _norm(self) -> Tensor:
        """Norm () of the gradients of the whole batch, before clipping; clips them if configured."""
        if self._max_norm is not None:
            return torch.as_tensor(self._accelerator.clip_grad_norm_(self._module.parameters(), self._max_norm))
        self._accelerator.unscale_gradients()
        return get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])

    def _passes(self, batch: tuple[Tensor, ...], images: int, labels: int, where: str) -> Tensor:
        """Accumulate gradients of the batch's mean loss; returns this share's part of that loss (), float64."""
        random = rng_states(batch[0].device)
        while True:
            try:
                return self._backward(batch, images, labels, where)
            except BadInput:
                raise
            except Exception as error:
                memory, cause = _out_of_memory(error), str(error).strip().partition("\n")[0]
                if not memory and not self._compiled:
                    raise
            self._optimizer.zero_grad(set_to_none=True)
            if memory:
                self._split_further(len(batch[0]), where, cause)
            else:
                self._disable_compile(where, cause)
            for kind, state in random.items():
                set_rng_state(kind, state)

    def _backward(self, batch: tuple[Tensor, ...], images: int, labels: int, where: str) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        value = torch.zeros((), dtype=torch.float64, device=batch[0].device)
        if not len(batch[0]):  # an empty share still takes part in the all-reduce
            pieces = [(tuple(tensor.new_zeros((1, *tensor.shape[1:])) for tensor in batch), 0.0, 0.0)]
        else:
            count = min(self.micro_batches, len(batch[0]))
            split = zip(*(tensor.tensor_split(count) for tensor in batch), strict=True)
            pieces = [(piece, len(piece[0]) / images, label_count(piece[1]) / max(1, labels)) for piece in split]
            if not all(labeled for _, _, labeled in pieces):
                remedy = "leave such images out, or set train.accumulate to 1"
                raise BadInput(f"{where}: no image of a micro-batch has a label; {remedy}")
        for number, (piece, share, labeled) in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else self._accelerator.no_sync(self._task):
                losses = self._forward(*piece)
                loss = losses["loss"]
                if labeled != share:  # the loss of labels is a mean over those that have one
                    loss = loss + losses.get("task_loss", loss) * (labeled / share - 1)
                self._accelerator.backward(loss * (share * self._dist.size))  # DDP averages over the processes
            value += loss.detach().double() * share
        return value

    def _disable_compile(self, where: str, cause: str) -> None:
        if self._dist.size > 1:
            why = f"train.compile failed in one of {self._dist.size} processes ({cause})"
            raise BadInput(f"{where}: {why}; set it to false")
        self._forward, self._compiled = self._task, False
        print(f"{where}: train.compile failed ({cause}); continuing without it", file=sys.stderr)

    def _split_further(self, images: int, where: str, cause: str) -> None:
        if self._dist.size > 1:
            raise BadInput(f"{where}: out of memory in one of {self._dist.size} processes; double train.accumulate")
        if self.micro_batches >= images:
            remedy = "use a smaller model or img_size"
            raise BadInput(f"{where}: out of memory with one image at a time; {remedy} ({cause})")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.micro_batches = min(images, 2 * self.micro_batches)
        size = -(-images // self.micro_batches)
        smaller = f"{self.micro_batches} micro-batches of {size} images"
        print(f"{where}: out of memory; continuing with {smaller}", file=sys.stderr)


@contextmanager
def make_train_step(
    task: Any, optimizer: Any, recipe: TrainConfig, device: torch.device, dist: ProcessGroup
) -> Iterator[TrainStep]:
    """Create the step of one training; accelerate's global state is reset at the end.

    Raises:
        BadInput: the device does not support the precision or the kind of launch.
    """
    from accelerate import Accelerator  # slow to import: only processes that train need it
    from accelerate.state import AcceleratorState, GradientState

    threads = torch.get_num_threads()
    if recipe.amp == "float16" and device.type == "cpu":
        raise BadInput("train.amp float16: not supported on CPU; use bfloat16 or false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # accelerate changes the number of threads, restored below
            accelerator = Accelerator(
                cpu=device.type == "cpu", device_placement=False, mixed_precision=PRECISIONS[recipe.amp]
            )
        torch.set_num_threads(threads)
        if accelerator.num_processes != dist.size or accelerator.distributed_type.value not in LAUNCHES:
            raise BadInput(f"VITPRUNE_LAUNCH: starts {accelerator.distributed_type.value}; use plain torchrun")
        yield TrainStep(task, optimizer, recipe, dist, accelerator)
    finally:
        if recipe.compile:
            torch.compiler.reset()  # free the code compiled for this training
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _out_of_memory(error: Exception) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or bool(should_reduce_batch_size(error))


def label_count(labels: Tensor) -> int:
    """Return the number of labels, without those of no class (-100); of class probabilities, the number of images."""
    return len(labels) if labels.is_floating_point() else int((labels != IGNORED).sum())


def local_share(images: Tensor, labels: Tensor, dist: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return this rank's share of a batch; shares differ by at most one image."""
    if dist.size == 1:
        return images, labels
    return images.tensor_split(dist.size)[dist.rank], labels.tensor_split(dist.size)[dist.rank]
