"""Which clips make up training step s, and the random numbers that belong to each clip.

Data order is endless and every clip has a *position* in it. All randomness is drawn per clip from
(seed, position, purpose), so that micro-batches, ranks, gradient accumulation and resumption all see the same
draws: only the step counter has to be remembered.
"""

import atexit
import hashlib
import signal
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .transforms import to_video


def derive_seed(seed: int, position: int, purpose: str) -> int:
    """Derive the 63-bit seed of one draw: equal on every machine, unrelated to any other draw."""
    key = f"{int(seed)}/{int(position)}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def clip_generator(seed: int, position: int, purpose: str) -> torch.Generator:
    """Give the CPU generator that draws one clip's random numbers for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, position, purpose))


def _positions(positions: Tensor | Sequence[int]) -> list[int]:
    return positions.tolist() if isinstance(positions, Tensor) else [int(position) for position in positions]


def randn_per_clip(
    shape: Sequence[int],
    seed: int,
    positions: Tensor | Sequence[int],
    purpose: str,
    device: torch.device | str,
) -> Tensor:
    """Draw standard normal noise of ``shape`` for each clip, float32 ``(b, *shape)``.

    Drawn on the CPU whatever the device, so that clip 17 sees the same noise on every machine.
    """
    draws = [
        torch.randn(tuple(shape), generator=clip_generator(seed, position, purpose))
        for position in _positions(positions)
    ]
    return torch.stack(draws).to(device)


def rand_per_clip(
    shape: Sequence[int],
    seed: int,
    positions: Tensor | Sequence[int],
    purpose: str,
    device: torch.device | str,
) -> Tensor:
    """Draw uniform numbers in [0, 1) of ``shape`` (``()`` for one) for each clip, float32 ``(b, *shape)``."""
    draws = [
        torch.rand(tuple(shape), generator=clip_generator(seed, position, purpose))
        for position in _positions(positions)
    ]
    return torch.stack(draws).to(device)


def randint_per_clip(
    low: int,
    high: int,
    shape: Sequence[int],
    seed: int,
    positions: Tensor | Sequence[int],
    purpose: str,
    device: torch.device | str,
) -> Tensor:
    """Draw integers in [low, high) of ``shape`` (``()`` for one) for each clip, int64 ``(b, *shape)``."""
    draws = [
        torch.randint(low, high, tuple(shape), generator=clip_generator(seed, position, purpose))
        for position in _positions(positions)
    ]
    return torch.stack(draws).to(device)


# So many archives are mixed at a time, where items lie in archives that have to be fetched.
GROUPS_AT_ONCE = 8


def epoch_order(num_items: int, seed: int, epoch: int, groups: Sequence[Hashable] | None = None) -> list[int]:
    """Give the order in which an epoch visits its items: a permutation fixed by (seed, epoch).

    With ``groups``, one for each item, items of a few groups at a time are mixed, group after group in a
    random order: who reads along needs few of them at once.
    """
    generator = clip_generator(seed, epoch, "order")
    if groups is None:
        return torch.randperm(num_items, generator=generator).tolist()
    members: dict[Hashable, list[int]] = {}
    for item, group in enumerate(groups):
        members.setdefault(group, []).append(item)
    chosen = list(members.values())
    shuffled = [chosen[i] for i in torch.randperm(len(chosen), generator=generator).tolist()]
    order = []
    for begin in range(0, len(shuffled), GROUPS_AT_ONCE):
        mixed = [item for group in shuffled[begin : begin + GROUPS_AT_ONCE] for item in group]
        order += [mixed[i] for i in torch.randperm(len(mixed), generator=generator).tolist()]
    return order


class EndlessOrder:
    """The endless data order: epoch after epoch, each a fresh permutation of all items (`epoch_order`)."""

    def __init__(self, num_items: int, seed: int, groups: Sequence[Hashable] | None = None) -> None:
        self.num_items = num_items
        self.seed = seed
        self.groups = groups
        # Accumulation and several workers touch at most two neighbouring epochs at a time.
        self._orders: dict[int, list[int]] = {}
        self._places: dict[int, list[int]] = {}

    def item(self, position: int) -> int:
        """Tell which item stands at ``position`` (0, 1, 2, … without end)."""
        if position < 0:
            raise IndexError(f"positions count from 0, got {position}")
        epoch, place = divmod(position, self.num_items)
        return self._order(epoch)[place]

    def position(self, item: int, epoch: int) -> int:
        """Tell where an item stands in an epoch: the inverse of `item`."""
        if epoch not in self._places:
            self._places = {epoch: torch.tensor(self._order(epoch)).argsort().tolist()}
        return epoch * self.num_items + self._places[epoch][item]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                self._orders.pop(min(self._orders))
            self._orders[epoch] = epoch_order(self.num_items, self.seed, epoch, self.groups)
        return self._orders[epoch]


class PositionSampler(Sampler[list[int]]):
    """Yield the positions of one process's micro-batches, step after step.

    Step s covers positions [s·B, (s+1)·B) with B the global batch; rank r takes its contiguous
    B/world_size of them, in micro-batches of ``micro_batch_size``. Endless if ``num_steps`` is None, else it
    ends before step ``num_steps`` (counted from 0, not from ``start_step``).

    Raises ValueError if the sizes don't divide.
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        start_step: int = 0,
        num_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if min(global_batch_size, micro_batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "batch sizes and world_size must be at least 1 and 0 <= rank < world_size; got "
                f"{global_batch_size=}, {micro_batch_size=}, {rank=}, {world_size=}"
            )
        if global_batch_size % (world_size * micro_batch_size):
            raise ValueError(
                f"the global batch of {global_batch_size} clips must divide into {world_size} process(es) x "
                f"micro-batches of {micro_batch_size}; use a multiple of {world_size * micro_batch_size}"
            )
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.start_step = start_step
        self.num_steps = num_steps
        self.rank = rank
        self.world_size = world_size

    @property
    def num_micro_batches(self) -> int:
        """How many micro-batches of this process make up one step (the accumulation)."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        share = self.global_batch_size // self.world_size
        while self.num_steps is None or step < self.num_steps:
            first = step * self.global_batch_size + self.rank * share
            for begin in range(first, first + share, self.micro_batch_size):
                yield list(range(begin, begin + self.micro_batch_size))
            step += 1


@dataclass
class Batch:
    """Clips: ``video`` float ``b c t h w`` in [-1, 1]; ``label`` (−1: none), ``positions`` int64 ``b``.

    Positions stay in the host's memory: random numbers are drawn there, and nobody waits for the device.
    """

    video: Tensor
    label: Tensor
    positions: Tensor


@dataclass
class LatentBatch:
    """Encoded clips: normalised posterior ``mean`` and ``std`` ``b c t h w``; the rest as above."""

    mean: Tensor
    std: Tensor
    label: Tensor
    positions: Tensor


class HeldOut(Protocol):
    """A data set whose items can also be taken one by one, each the same at every call."""

    def __len__(self) -> int: ...

    def held_out(self, index: int) -> dict[str, Any]: ...


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack the items of a clip or latent data set; whole numbers become int64 ``b``."""
    return {
        key: torch.stack([item[key] for item in items])
        if isinstance(items[0][key], Tensor)
        else torch.tensor([item[key] for item in items], dtype=torch.int64)
        for key in items[0]
    }


def to_batch(collated: dict[str, Tensor], device: torch.device | str) -> Batch | LatentBatch:
    """Move a collated batch to the device; frames travel as bytes and become float there."""
    moved = {
        key: value if key == "position" else value.to(device, non_blocking=True)
        for key, value in collated.items()
    }
    if "frames" in moved:
        return Batch(to_video(moved["frames"]), moved["label"], moved["position"])
    return LatentBatch(moved["mean"], moved["std"], moved["label"], moved["position"])


GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def _stop_complaining() -> None:
    """No more errors out of the blue about workers that have died."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _kill(workers: Sequence[Any]) -> None:
    _stop_complaining()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _start_worker(worker: int) -> None:
    # A signal to the whole group of processes asks the run to finish its step, which needs its workers; they
    # end with the process that started them, or are killed by it.
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


def batches(
    dataset: Dataset[dict[str, Any]],
    sampler: Iterable[list[int]],
    *,
    num_workers: int,
    device: torch.device | str,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
) -> Iterator[Batch | LatentBatch]:
    """Load the sampler's micro-batches in order, in ``num_workers`` processes (0: in this one).

    Each worker, of one thread, keeps ``prefetch_factor`` batches ready (None: as PyTorch chooses). With
    ``pin_memory`` batches for a GPU come from page-locked memory, so that they are copied during
    computations. The workers live until the sampler ends: there is one pass over an endless order, and
    nothing that PyTorch's ``persistent_workers`` could keep from one pass to the next.

    Raises OSError if one of them dies, or can't read its clips.
    """
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory and torch.device(device).type == "cuda",
        prefetch_factor=prefetch_factor if num_workers else None,
        # A generator of its own: the loader would otherwise draw from, and so disturb, the global one.
        generator=torch.Generator().manual_seed(0),
    )
    # No signal may come between a worker's birth and its deafness.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    loading = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if num_workers:  # which at the program's end are asked to end by a signal to which they are deaf
        atexit.register(_kill, getattr(loading, "_workers", []))
    while True:
        try:
            collated = next(loading)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            _stop_complaining()
            meant = explained(error)
            if meant is error:
                raise
            raise meant from error
        yield to_batch(collated, device)


def explained(error: Exception) -> Exception:
    """What an error of PyTorch's loader means, as an OSError; any other error as it is.

    That a worker has died PyTorch tells by a signal, so that the error may come up anywhere.
    """
    told = str(error)
    # What it was about to send may break off before PyTorch notices.
    if told.startswith("DataLoader worker") or isinstance(error, ConnectionError | EOFError):
        return OSError(
            f"a process that loads clips has died ({told or type(error).__name__}), perhaps for lack of "
            "memory; the same command goes on from the last saved state, and a smaller machine.num_workers "
            "needs less"
        )
    if told.startswith("Caught "):  # the worker's traceback, of which the last line tells
        return OSError(f"a process that loads clips failed: {told.strip().splitlines()[-1]}")
    return error


def held_out_batches(
    dataset: HeldOut,
    *,
    batch_size: int,
    num_clips: int | None,
    device: torch.device | str,
) -> Iterator[Batch | LatentBatch]:
    """Load ``num_clips`` clips for evaluation, the same at every call: one a video, no flip, no random start.

    Fewer clips than videos are spread evenly over the sorted videos (and so over the classes); None, or more
    clips than videos, takes every video once. Positions are 0, 1, 2, …; the last batch may be smaller.
    """
    count = len(dataset) if num_clips is None else min(num_clips, len(dataset))
    for begin in range(0, count, batch_size):
        items = []
        for position in range(begin, min(begin + batch_size, count)):
            items.append(dataset.held_out(position * len(dataset) // count) | {"position": position})
        yield to_batch(collate(items), device)
