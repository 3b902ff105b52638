"""Whether loading needs more and more memory: `make soak`, or `python -m tests.soak --clips 20000`.

Clips are loaded over many epochs, from video files by two workers, and then from latents by two others. The
resident memory of this process and its workers is added up after a warm-up and at the end; it may have grown
by half a kilobyte a clip. With --leak so many bytes of each clip are kept, to see that this would be noticed.
"""

import argparse
import ctypes
import gc
import math
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from src.data.latents import LatentDataset, LatentWriter
from src.data.sampler import PositionSampler, batches
from src.data.synthetic import synthetic

NUM_WORKERS = 2
BATCH_SIZE = 10
# Growth in bytes a clip: what is allowed is half of what must be noticed.
ALLOWED = 512
SOURCES = ("videos", "latents")


def give_back() -> None:
    """Returns to the system what this process has freed, so that what remains is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Watched(Dataset[dict[str, Any]]):
    """A data set whose processes return freed memory now and then, and may keep some bytes of every clip."""

    def __init__(self, dataset: Dataset[dict[str, Any]], leak: int) -> None:
        self.dataset = dataset
        self.leak = leak
        self.kept: list[bytes] = []
        self.num_read = 0

    def __getitem__(self, position: int) -> dict[str, Any]:
        self.num_read += 1
        if self.leak:
            self.kept.append(os.urandom(self.leak))
        if self.num_read % 200 == 0:
            give_back()
        return self.dataset[position]


def videos(folder: Path) -> Dataset[dict[str, Any]]:
    """Clips of 16 frames out of 24 files of 20 frames, decoded each time."""
    return synthetic(
        str(folder / "data"), split="train", num_videos=24, num_test_videos=1, num_frames_per_video=20,
        video_fps=8.0, scene_seed=0, num_frames=16, frame_stride=1, resolution=32, horizontal_flip=True,
        seed=0, cache=None, strict=True,
    )  # fmt: skip


def latents(folder: Path) -> Dataset[dict[str, Any]]:
    """Latents of 500 clips in 5 shards."""
    writer = LatentWriter(folder / "latents", {}, num_clips=500, clips_per_shard=100)
    for shard in range(writer.num_shards):
        moments = torch.randn(2, 100, 4, 4, 8, 8)
        writer.write(shard, moments[0], moments[1], torch.zeros(100, dtype=torch.int64))
    writer.finish()
    return LatentDataset(folder / "latents", {}, seed=0)


@dataclass
class Memory:
    """Resident memory of all processes in bytes, after the warm-up and at the end, and clips in between."""

    before: float
    after: float
    num_clips: int

    @property
    def growth(self) -> float:
        """Bytes a clip."""
        return (self.after - self.before) / self.num_clips


def resident() -> int:
    """Bytes of this process and its workers."""
    give_back()
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(source: str, num_clips: int, *, leak: int = 0) -> Memory:
    """Load so many clips, of which the first fifth warms up.

    Memory goes up and down with what is freed at once and what later, so that what counts is the least over
    a fifth of the clips: over the second fifth, and over the last.
    """
    with tempfile.TemporaryDirectory() as name:
        dataset = Watched({"videos": videos, "latents": latents}[source](Path(name)), leak)
        give_back()  # before the workers inherit it
        part = num_clips // BATCH_SIZE // 5
        sampler = PositionSampler(
            global_batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE, num_steps=5 * part
        )
        least: dict[int, float] = {}
        loaded = batches(dataset, sampler, num_workers=NUM_WORKERS, device="cpu")
        for step, _ in enumerate(loaded):
            if step // part in (1, 4) and step % 20 == 0:
                least[step // part] = min(least.get(step // part, math.inf), resident())
            if step == 4 * part:
                assert len(multiprocessing.active_children()) == NUM_WORKERS
    return Memory(least[1], least[4], 3 * part * BATCH_SIZE)


def main() -> None:
    """Loads, prints and ends with status 1 if memory has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--leak", type=int, default=0, help="bytes of each clip that are kept")
    options = parser.parse_args()
    grown = False
    for source in SOURCES:
        memory = soak(source, options.clips, leak=options.leak)
        grown |= memory.growth > ALLOWED
        print(
            f"{source}: {memory.before / 1e6:.1f} MB after the warm-up, {memory.after / 1e6:.1f} MB after "
            f"{options.clips:,} clips: {memory.growth:+.0f} bytes a clip, allowed are {ALLOWED}",
            flush=True,
        )
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
