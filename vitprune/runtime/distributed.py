"""Processes that work together: who does what, and what they tell each other."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that score together: this one's number, and how many they are."""

    rank: int = 0
    size: int = 1

    def gather(self, vector: Tensor) -> list[Tensor]:
        """The same vector (float64, on the CPU) of every process in their order; nothing but in the first."""
        if self.size == 1:
            return [vector]
        room = [torch.empty_like(vector) for _ in range(self.size)] if self.rank == 0 else None
        distributed.gather(vector, room)
        return room or []

    def broadcast(self, number: int) -> int:
        """A number of the first process, in every process."""
        value = torch.tensor(number)
        if self.size > 1:
            distributed.broadcast(value, 0)
        return int(value)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all processes of what each of them has, in place, in every process."""
        if self.size > 1:
            sent = values.cpu()  # gloo carries what lies there
            distributed.all_reduce(sent)
            values.copy_(sent)
        return values

    def owns(self, number: int) -> bool:
        """Whether this process does the piece of work of that number."""
        return number % self.size == self.rank


SINGLE_PROCESS = ProcessGroup()
