import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from src.data import sampler as sampling
from src.data.sampler import (
    Batch,
    EndlessOrder,
    LatentBatch,
    PositionSampler,
    batches,
    clip_generator,
    collate,
    derive_seed,
    held_out_batches,
    rand_per_clip,
    randint_per_clip,
    randn_per_clip,
    to_batch,
)
from src.data.video import VideoError
from tests import soak

ROOT = Path(__file__).parents[2]


class Clips(Dataset[dict[str, Any]]):
    """Clips whose pixels tell their position."""

    def __getitem__(self, position: int) -> dict[str, Any]:
        frames = torch.full((2, 4, 4, 3), position % 256, dtype=torch.uint8)
        return {"frames": frames, "label": position % 3, "position": position}

    def __len__(self) -> int:
        return 10

    def held_out(self, index: int) -> dict[str, Any]:
        return self[index]


class Latents(Clips):
    def __getitem__(self, position: int) -> dict[str, Any]:
        mean = torch.full((4, 1, 2, 2), float(position))
        return {"mean": mean, "std": mean + 1, "label": -1, "position": position}


def test_seeds_are_stable_and_all_different() -> None:
    # Written down once: a change here would change every run.
    assert derive_seed(0, 0, "clip") == 3353197107266786065
    seeds = {
        derive_seed(seed, position, purpose)
        for seed in range(20)
        for position in range(500)
        for purpose in ("clip", "noise")
    }
    assert len(seeds) == 20 * 500 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_draws_belong_to_the_clip_not_to_the_batch() -> None:
    together = randn_per_clip((4, 2), 3, torch.tensor([5, 9, 7]), "noise", "cpu")
    for row, position in enumerate([5, 9, 7]):
        alone = randn_per_clip((4, 2), 3, [position], "noise", "cpu")[0]
        assert torch.equal(together[row], alone)
        assert torch.equal(alone, torch.randn(4, 2, generator=clip_generator(3, position, "noise")))
    assert not torch.equal(together[0], randn_per_clip((4, 2), 3, [5], "posterior", "cpu")[0])
    assert not torch.equal(together[0], randn_per_clip((4, 2), 4, [5], "noise", "cpu")[0])


def test_draws_over_positions_follow_their_law() -> None:
    positions = range(4000)
    noise = randn_per_clip((4,), 0, positions, "noise", "cpu")
    assert abs(noise.mean()) < 0.03 and abs(noise.var() - 1) < 0.05
    assert abs(torch.corrcoef(noise.T)[0, 1]) < 0.06
    uniform = rand_per_clip((), 0, positions, "u", "cpu")
    assert uniform.shape == (4000,) and abs(uniform.mean() - 0.5) < 0.02
    numbers = randint_per_clip(2, 6, (), 0, positions, "t", "cpu")
    assert numbers.dtype == torch.int64
    assert torch.bincount(numbers, minlength=6)[:2].sum() == 0
    assert torch.all((torch.bincount(numbers)[2:] - 1000).abs() < 110)


def test_the_order_visits_everything_once_per_epoch_and_is_reshuffled() -> None:
    order = EndlessOrder(7, seed=1)
    epochs = [[order.item(position) for position in range(7 * e, 7 * e + 7)] for e in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    # Going back gives the same again.
    assert [order.item(position) for position in range(7)] == epochs[0]


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (1, 4), (2, 3), (3, 4), (4, 1)])
def test_ranks_and_micro_batches_cover_the_step_exactly(world_size: int, micro_batch_size: int) -> None:
    for step in (0, 1, 5):
        seen = []
        for rank in range(world_size):
            sampler = PositionSampler(
                global_batch_size=12,
                micro_batch_size=micro_batch_size,
                start_step=step,
                num_steps=step + 1,
                rank=rank,
                world_size=world_size,
            )
            micro = list(sampler)
            assert len(micro) == sampler.num_micro_batches == 12 // world_size // micro_batch_size
            seen += [position for batch in micro for position in batch]
        assert seen == list(range(12 * step, 12 * step + 12))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 10"):
        PositionSampler(global_batch_size=12, micro_batch_size=5, world_size=2)
    with pytest.raises(ValueError, match="rank"):
        PositionSampler(global_batch_size=12, micro_batch_size=3, rank=2, world_size=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_and_resume(num_workers: int) -> None:
    state = torch.random.get_rng_state()
    sampler = PositionSampler(global_batch_size=4, micro_batch_size=2, start_step=3, num_steps=5)
    found = list(batches(Clips(), sampler, num_workers=num_workers, device="cpu"))
    assert [batch.positions.tolist() for batch in found] == [[12, 13], [14, 15], [16, 17], [18, 19]]
    first = found[0]
    assert isinstance(first, Batch)
    assert first.video.shape == (2, 3, 2, 4, 4) and first.video.dtype == torch.float32
    assert first.video[1].unique().item() == pytest.approx(13 / 127.5 - 1)
    assert first.label.tolist() == [0, 1]
    # The loader leaves the global random state alone.
    assert torch.equal(state, torch.random.get_rng_state())


class Fragile(Dataset[dict[str, Any]]):
    """Its fifth item kills the process that loads it, or can't be read."""

    def __init__(self, dies: bool) -> None:
        self.dies = dies

    def __getitem__(self, position: int) -> dict[str, Any]:
        if position == 5:
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise VideoError("clip.mp4", "gone")
        return {"frames": torch.zeros(1, 2, 2, 3, dtype=torch.uint8), "label": 0, "position": position}


def load_fragile(dies: bool) -> None:
    """Loads until something breaks."""
    sampler = PositionSampler(global_batch_size=2, micro_batch_size=2, num_steps=9)
    for _ in batches(Fragile(dies), sampler, num_workers=1, device="cpu"):
        pass


def test_a_clip_that_cant_be_loaded_is_one_clear_error() -> None:
    with pytest.raises(OSError, match=r"clip\.mp4.*gone"):
        load_fragile(dies=False)


def test_a_worker_that_dies_is_one_clear_error() -> None:
    """In a process of its own: PyTorch tells of the death by a signal, whenever it comes."""
    code = (
        "from src.data.sampler import explained; from tests.unit.test_sampler import load_fragile\n"
        "try: load_fragile(True)\n"
        "except Exception as error: print(explained(error))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )  # which ends by itself
    assert told.returncode == 0, told.stderr
    assert "has died" in told.stdout and "machine.num_workers" in told.stdout


class Counted(Dataset[dict[str, Any]]):
    """Counts in all processes what is read; its label is the number of threads."""

    def __init__(self) -> None:
        self.num_read = multiprocessing.Value("i", 0)

    def __getitem__(self, position: int) -> dict[str, Any]:
        with self.num_read.get_lock():
            self.num_read.value += 1
        frames = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
        return {"frames": frames, "label": torch.get_num_threads(), "position": position}


@pytest.mark.parametrize("prefetch_factor", [1, 3])
def test_each_worker_keeps_so_many_batches_ready_and_has_one_thread(prefetch_factor: int) -> None:
    clips, num_workers, taken = Counted(), 2, 3
    sampler = PositionSampler(global_batch_size=4, micro_batch_size=4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loading = batches(
            clips, sampler, num_workers=num_workers, device="cpu", prefetch_factor=prefetch_factor
        )
        for _ in range(taken):
            assert next(loading).label.tolist() == [1] * 4, "threads of a worker"
        expected = 4 * (taken + num_workers * prefetch_factor)
        deadline = time.monotonic() + 30
        while clips.num_read.value < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert clips.num_read.value == expected, "and no more"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "device, pin_memory, pins", [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_memory_is_pinned_for_a_gpu_that_asks_for_it(
    device: str, pin_memory: bool, pins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to PyTorch; pinning itself needs a GPU."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(sampling, "DataLoader", lambda *arguments, **options: told.update(options) or [])
    sampler = PositionSampler(global_batch_size=2, micro_batch_size=2, num_steps=1)
    options = {"num_workers": 0, "prefetch_factor": 2, "pin_memory": pin_memory}
    assert list(batches(Clips(), sampler, device=device, **options)) == []
    assert told["pin_memory"] is pins and told["prefetch_factor"] is None, "without workers nothing is ready"


def test_positions_stay_where_random_numbers_are_drawn() -> None:
    """On the device they would have to be waited for in every step; meta tensors can't even be read."""
    batch = to_batch(collate([Latents()[3], Latents()[4]]), "meta")
    assert batch.positions.tolist() == [3, 4] and batch.label.device.type == "meta"


@pytest.mark.slow
@pytest.mark.parametrize("source", soak.SOURCES)
def test_memory_does_not_grow_over_epochs(source: str) -> None:
    """`make soak` in short: an allowed growth that a leak of a kilobyte a clip goes beyond."""
    assert soak.soak(source, soak.SHORT[source]).growth < soak.ALLOWED
    assert soak.soak(source, soak.SHORT[source], leak=1024).growth > soak.ALLOWED


def test_latent_items_become_latent_batches() -> None:
    sampler = PositionSampler(global_batch_size=2, micro_batch_size=2)
    batch = next(batches(Latents(), sampler, num_workers=0, device="cpu"))
    assert isinstance(batch, LatentBatch)
    assert batch.mean.shape == (2, 4, 1, 2, 2) and batch.std[1].unique().item() == 2


def test_held_out_clips_are_spread_and_counted() -> None:
    found = list(held_out_batches(Clips(), batch_size=3, num_clips=5, device="cpu"))
    assert [batch.positions.tolist() for batch in found] == [[0, 1, 2], [3, 4]]
    levels = [round((video.mean().item() + 1) * 127.5) for batch in found for video in batch.video]
    assert levels == [0, 2, 4, 6, 8]
    everything = list(held_out_batches(Clips(), batch_size=100, num_clips=None, device="cpu"))
    assert everything[0].positions.tolist() == list(range(10))
    assert len(list(held_out_batches(Clips(), batch_size=4, num_clips=99, device="cpu"))) == 3
