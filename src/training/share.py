"""Work that several processes share without training: which part is whose, and putting it together again."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState

from .device import refuse_broken_launch

_A = TypeVar("_A")


class Share:
    """This process's part of numbered work: one of `torchrun`'s processes, or all of it.

    Numbers are dealt out in batches, in turn. Processes that have found each other already stay together.

    Raises:
        ValueError: for a launch of several processes of which something else would become.
    """

    def __init__(self) -> None:
        refuse_broken_launch()
        self._processes: PartialState | None = None
        self.rank, self.world_size = 0, 1
        if "WORLD_SIZE" in os.environ:
            # The others wait while the first reads a large data set for the first time.
            self._processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
            self.rank, self.world_size = self._processes.process_index, self._processes.num_processes

    def batches(self, count: int, batch_size: int) -> list[list[int]]:
        """This process's batches of the numbers below ``count``."""
        return self.all_batches(count, batch_size)[self.rank :: self.world_size]

    def all_batches(self, count: int, batch_size: int) -> list[list[int]]:
        """All processes' batches of the numbers below ``count``, smaller ones if some would get none."""
        batch_size = max(min(batch_size, -(-count // self.world_size)), 1)
        return [list(range(begin, min(begin + batch_size, count))) for begin in range(0, count, batch_size)]

    def collect(self, parts: dict[int, _A]) -> dict[int, _A]:
        """All processes' numbered parts, in the order of their numbers."""
        received: list[dict[int, _A] | None] = [parts]
        if self.world_size > 1:
            received = [None] * self.world_size
            torch.distributed.all_gather_object(received, parts)
        together = {number: part for some in received if some for number, part in some.items()}
        return {number: together[number] for number in sorted(together)}

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
