"""Work that several processes share without training: which part is whose, and putting it together again."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor

_A = TypeVar("_A")


class Share:
    """This process's part of numbered work: one of `torchrun`'s processes, or all of it.

    Numbers are dealt out in batches, in turn. Processes that have found each other already stay together.
    """

    def __init__(self) -> None:
        self._processes: PartialState | None = None
        self.rank, self.world_size = 0, 1
        if "WORLD_SIZE" in os.environ:
            # The others wait while the first reads a large data set for the first time.
            self._processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
            self.rank, self.world_size = self._processes.process_index, self._processes.num_processes

    def batches(self, count: int, batch_size: int) -> Iterator[list[int]]:
        """This process's batches of the numbers below ``count``, smaller ones if some would get none."""
        batch_size = max(min(batch_size, -(-count // self.world_size)), 1)
        for begin in range(self.rank * batch_size, count, self.world_size * batch_size):
            yield list(range(begin, min(begin + batch_size, count)))

    def gather(self, numbers: list[int], rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """All processes' rows (tensors ``n *`` on the CPU, one row a number), in the order of the numbers."""
        parts = [(numbers, rows)]
        if self.world_size > 1:
            received: list[tuple[list[int], dict[str, Tensor]] | None] = [None] * self.world_size
            torch.distributed.all_gather_object(received, (numbers, rows))
            parts = [part for part in received if part is not None]
        order = torch.tensor([number for part, _ in parts for number in part]).argsort()
        names = {name for _, part in parts for name in part}
        return {name: torch.cat([part[name] for _, part in parts if name in part])[order] for name in names}

    def first_alone(self) -> AbstractContextManager[None]:
        """In it the first process goes ahead, and the others find what it has made."""
        return nullcontext() if self._processes is None else self._processes.main_process_first()

    def from_first(self, make: Callable[[], _A]) -> _A:
        """What the first process makes (and nobody else does), handed to all."""
        if self.world_size == 1:
            return make()
        told = [make() if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(told, src=0)
        return told[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Waits until all processes have come here."""
        if self._processes is not None:
            self._processes.wait_for_everyone()

    def close(self) -> None:
        """Waits for all processes and takes them apart."""
        if self._processes is not None:
            self._processes.wait_for_everyone()
            if self.world_size > 1:
                torch.distributed.destroy_process_group()
