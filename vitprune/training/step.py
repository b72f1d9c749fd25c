"""The step of a training on accelerate: precision, micro-batches, clipping, and processes that share a batch."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.nn.utils import get_total_norm

from vitprune.config.train_config import Train
from vitprune.errors import BadInput
from vitprune.runtime.distributed import ProcessGroup
from vitprune.training.checkpoint import set_random

KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
PRECISIONS = {False: "no", True: "bf16", "bfloat16": "bf16", "float16": "fp16"}


class TrainStep:
    """Takes steps: forward and backward passes in micro-batches, gradients shared among the processes, the update.

    `parts` is how many micro-batches a process makes of its share; it doubles where memory does not suffice.
    """

    def __init__(self, task: Any, optimizer: Any, recipe: Train, dist: ProcessGroup, accelerator: Any):
        self._module, self._dist, self._accelerator = task.trainable_module, dist, accelerator
        self._task = accelerator.prepare_model(task, device_placement=False)
        self._forward, self._compiled = self._task, recipe.compile
        if recipe.compile:
            self._forward = torch.compile(self._task)
        self._optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        self._most = recipe.clip
        self.parts = recipe.accumulate

    @property
    def scaler(self) -> Any:
        """What scales the loss in float16; None in other precisions."""
        return self._accelerator.scaler

    def step(self, batch: tuple[Tensor, ...], hold: Callable[[], None], where: str) -> tuple[float, float]:
        """Take one step on this process's share of a batch; returns the whole batch's loss and its gradient's norm.

        A batch is what the task takes: images first, then labels and what else belongs to each image.

        `hold` is called on the gradients of the whole batch, before their norm counts. Where one of the two is not
        finite the step is not taken; float16 goes on with a smaller scale.

        Raises:
            BadInput: memory does not suffice for one image at a time, or for the share of one of several processes.
        """
        total = int(self._dist.all_reduce(torch.tensor(len(batch[0]))))
        loss = self._dist.all_reduce(self._passes(batch, total, where))
        hold()
        value, norm = torch.stack([loss, self._norm().to(loss)]).tolist()  # one wait for the device
        if math.isfinite(value) and (math.isfinite(norm) or self.scaler is not None):
            self._optimizer.step()
            norm = 0.0 if self.scaler is not None and not math.isfinite(norm) else norm
        return value, norm

    def _norm(self) -> Tensor:
        """The norm () of the gradients of the whole batch; where it is clipped, they are."""
        if self._most is not None:
            return torch.as_tensor(self._accelerator.clip_grad_norm_(self._module.parameters(), self._most))
        self._accelerator.unscale_gradients()
        return get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])

    def _passes(self, batch: tuple[Tensor, ...], total: int, where: str) -> Tensor:
        """Gradients of the mean loss of the whole batch; returns what this share adds to it (), float64."""
        random = {"cpu": torch.get_rng_state()}
        if batch[0].device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        while True:
            try:
                return self._backward(batch, total)
            except Exception as error:
                memory, cause = _out_of_memory(error), str(error).strip().partition("\n")[0]
                if not memory and not self._compiled:
                    raise
            self._optimizer.zero_grad(set_to_none=True)
            if memory:
                self._smaller(len(batch[0]), where, cause)
            else:
                self._eager(where, cause)
            for kind, state in random.items():
                set_random(kind, state)

    def _backward(self, batch: tuple[Tensor, ...], total: int) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        value = torch.zeros((), dtype=torch.float64, device=batch[0].device)
        if not len(batch[0]):  # a share without images waits for the others at the same place
            pieces = [(tuple(given.new_zeros((1, *given.shape[1:])) for given in batch), 0.0)]
        else:
            parts = min(self.parts, len(batch[0]))
            split = zip(*(given.tensor_split(parts) for given in batch), strict=True)
            pieces = [(piece, len(piece[0]) / total) for piece in split]
        for number, (piece, share) in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else self._accelerator.no_sync(self._task):
                loss = self._forward(*piece)["loss"]
                self._accelerator.backward(loss * (share * self._dist.size))  # the processes' mean is taken
            value += loss.detach().double() * share
        return value

    def _eager(self, where: str, cause: str) -> None:
        if self._dist.size > 1:
            raise BadInput(
                f"{where}: train.compile failed in one of {self._dist.size} processes ({cause}); set it to false"
            )
        self._forward, self._compiled = self._task, False
        print(f"{where}: train.compile failed ({cause}); going on without it", file=sys.stderr)

    def _smaller(self, images: int, where: str, cause: str) -> None:
        if self._dist.size > 1:
            raise BadInput(f"{where}: out of memory in one of {self._dist.size} processes; double train.accumulate")
        if self.parts >= images:
            raise BadInput(
                f"{where}: out of memory with one image at a time; use a smaller model or img_size ({cause})"
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.parts = min(images, 2 * self.parts)
        size = -(-images // self.parts)
        print(f"{where}: out of memory; going on with {self.parts} micro-batches of {size} images", file=sys.stderr)


@contextmanager
def make_train_step(
    task: Any, optimizer: Any, recipe: Train, device: torch.device, dist: ProcessGroup
) -> Iterator[TrainStep]:
    """An engine for one training; nothing of accelerate's global state is left after it.

    Raises:
        BadInput: the precision or the kind of launch is none for this device.
    """
    threads = torch.get_num_threads()
    if recipe.amp == "float16" and device.type == "cpu":
        raise BadInput("train.amp float16: not on a CPU; use bfloat16 or false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about threads, which are set again below
            accelerator = Accelerator(
                cpu=device.type == "cpu", device_placement=False, mixed_precision=PRECISIONS[recipe.amp]
            )
        torch.set_num_threads(threads)
        if accelerator.num_processes != dist.size or accelerator.distributed_type not in KINDS:
            raise BadInput(f"VITPRUNE_LAUNCH: starts {accelerator.distributed_type.value}; use plain torchrun")
        yield TrainStep(task, optimizer, recipe, dist, accelerator)
    finally:
        if recipe.compile:
            torch.compiler.reset()  # what was compiled for this training is of no use to the next one
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or bool(should_reduce_batch_size(error))


def shared(images: Tensor, labels: Tensor, dist: ProcessGroup) -> tuple[Tensor, Tensor]:
    """This process's share of a batch: as many images as the others have, or one more or less."""
    if dist.size == 1:
        return images, labels
    return images.tensor_split(dist.size)[dist.rank], labels.tensor_split(dist.size)[dist.rank]
