"""Process group of torch.distributed: rank, world size and collectives."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

TIMEOUT = datetime.timedelta(days=7)  # the other ranks wait while rank 0 scores or evaluates alone


@dataclass(frozen=True)
class ProcessGroup:
    """Rank of this process and number of processes, with the collectives that scoring and training need.

    Attributes:
        rank: Rank of this process, from 0.
        size: World size, the number of processes.
    """

    rank: int = 0
    size: int = 1

    def gather(self, vector: Tensor) -> list[Tensor]:
        """Gather one CPU tensor per process on rank 0.

        Args:
            vector: Tensor of the same shape and type in every process.

        Returns:
            On rank 0 the tensors in rank order; an empty list on the other ranks.
        """
        if self.size == 1:
            return [vector]
        received = [torch.empty_like(vector) for _ in range(self.size)] if self.rank == 0 else None
        distributed.gather(vector, received)
        return received or []

    def broadcast(self, number: int) -> int:
        """Broadcast an int from rank 0.

        Args:
            number: The value to send; only that of rank 0 counts.

        Returns:
            The value of rank 0, on every rank.
        """
        value = torch.tensor(number)
        if self.size > 1:
            distributed.broadcast(value, 0)
        return int(value)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        if self.size > 1:
            on_cpu = values.cpu()  # gloo reduces CPU tensors
            distributed.all_reduce(on_cpu)
            values.copy_(on_cpu)
        return values

    def owns(self, number: int) -> bool:
        """Return whether work item `number` is assigned to this rank (round-robin)."""
        return number % self.size == self.rank


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group(device: torch.device | None = None) -> Iterator[ProcessGroup]:
    """Initialize torch.distributed under torchrun (RANK and WORLD_SIZE are set); a single process otherwise.

    Scores are small and are reduced by gloo. On a GPU, gradients are reduced by NCCL.

    Args:
        device: Device of the training, if the processes train; None for scoring.

    Yields:
        The process group, which is destroyed at the end.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ProcessGroup()
        return
    cuda = device is not None and device.type == "cuda"
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield ProcessGroup(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
