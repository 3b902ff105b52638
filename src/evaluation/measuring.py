"""From sets of clips to what is kept of them: shared by processes, kept on the disk, resumed."""

import hashlib
import io
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.storage import atomic_path, cache_home, load_tensors, save_tensors
from ..data.transforms import to_video
from ..metrics.drift import clip_statistics
from ..metrics.features import FeatureExtractor
from ..metrics.suspicions import traits
from ..metrics.video_statistics import pixel_features
from ..training.share import Share

# Of what is kept on the disk: another number makes all of it anew.
FORMAT = 2
NUM_SHOWN = 8

Rows = dict[str, Tensor]
"""One row a clip, ``n *``, on the CPU; ``shown`` alone has rows for the first few only."""


@dataclass(frozen=True)
class ClipSet:
    """Numbered clips of one origin.

    Args:
        title: for the progress bar.
        count: how many there are.
        frames: uint8 ``b t h w c`` of some of them, by their numbers.
        key: what decides every pixel, ready for JSON; clips with equal keys are measured once.
    """

    title: str
    count: int
    frames: Callable[[list[int]], Tensor]
    key: Mapping[str, Any]


class Measuring:
    """Computes rows of clips in fixed batches that the processes deal out among themselves.

    A batch holds the same clips whatever the number of processes, and the last one is filled up, so that
    every number comes out the same to the last bit. On a CPU each process has one thread for that, since
    several round sums differently: use as many processes as there are cores. Each batch is kept on the disk
    as soon as it is done: what was interrupted goes on, and what was measured before isn't measured again.

    Args:
        share: the processes.
        batch_size: clips of a batch.
        device: on which rows are computed.
    """

    def __init__(self, share: Share, batch_size: int, device: torch.device) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.share, self.batch_size, self.device = share, batch_size, device
        if device.type == "cpu":
            torch.set_num_threads(1)

    def rows(
        self, title: str, count: int, key: Mapping[str, Any], compute: Callable[[list[int]], Rows]
    ) -> Rows:
        """Rows of all clips below ``count``, on every process.

        Args:
            title: for the progress bar.
            count: how many clips there are.
            key: decides, with the batch size, what the rows hold.
            compute: rows of some clips.
        """
        kept = _Kept(
            {
                "format": FORMAT,
                "batch_size": self.batch_size,
                "device": self.device.type,
                "count": count,
                **key,
            }
        )
        known = self.share.from_first(kept.known)
        if known is not None:
            return known
        # As many batches as are needed, of one size: the last one is filled up with little that is lost.
        size = -(-count // -(-count // self.batch_size))
        batches = [list(range(begin, min(begin + size, count))) for begin in range(0, count, size)]
        mine: dict[int, Rows] = {}
        with tqdm(total=count, unit="video", desc=title, disable=self.share.rank > 0) as bar:
            for index in range(self.share.rank, len(batches), self.share.world_size):
                batch = batches[index]
                rows = kept.part(index)
                if rows is None:
                    filled = batch + batch[-1:] * (size - len(batch))
                    rows = {
                        name: value[: len(batch)].cpu().contiguous()
                        for name, value in compute(filled).items()
                    }
                    if "shown" in rows:
                        # A copy: a slice, even an empty one, would keep the whole batch in memory.
                        rows["shown"] = rows["shown"][: max(NUM_SHOWN - batch[0], 0)].clone()
                    kept.keep(index, rows)
                mine[index] = rows
                bar.update(min(len(batch) * self.share.world_size, count - bar.n))
        parts = list(self.share.collect(mine).values())
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.share.rank == 0:
            kept.finish(whole)
        self.share.wait()
        return whole

    def clips(self, clips: ClipSet, extractor: FeatureExtractor | None, jpeg_quality: int | None) -> Rows:
        """What is kept of a set: features, statistics, small pictures, the first few clips whole.

        Args:
            clips: the set.
            extractor: of the features; None for none.
            jpeg_quality: frames go through JPEG of this quality first; None doesn't.
        """

        def compute(numbers: list[int]) -> Rows:
            frames = clips.frames(numbers)
            if jpeg_quality is not None:
                frames = through_jpeg(frames, jpeg_quality)
            # A batch of 8-bit frames takes little memory, its floats take much.
            at_once = 2 if self.device.type == "cpu" else 4
            parts = [of_few(part) for part in frames.split(at_once)]
            rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            return rows | {"shown": frames}

        @torch.no_grad()
        def of_few(frames: Tensor) -> Rows:
            video = to_video(frames.to(self.device))
            rows = traits(frames) | {"pixels": pixel_features(video)} | clip_statistics(video)
            if extractor is not None:
                rows["features"] = extractor(video)
            return {name: value.cpu() for name, value in rows.items()}

        key = dict(clips.key) | {"jpeg_quality": jpeg_quality, "features": identity(extractor)}
        return self.rows(clips.title, clips.count, key, compute)


def identity(extractor: FeatureExtractor | None) -> dict[str, Any] | None:
    """What decides an extractor's features, ready for JSON."""
    if extractor is None:
        return None
    return {
        "name": extractor.name,
        "resize": extractor.resize,
        "weights_sha256": extractor.weights_sha256,
    }


def through_jpeg(frames: Tensor, quality: int) -> Tensor:
    """Frames uint8 ``b t h w c`` as they come back from JPEG files of that quality (Pillow's defaults)."""
    flat = frames.reshape(-1, *frames.shape[2:])
    decoded = []
    for frame in flat.cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        decoded.append(torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8))
    return torch.stack(decoded).reshape(frames.shape)


class _Kept:
    """Rows on the disk, named by their key; what is damaged there is computed again."""

    def __init__(self, key: Mapping[str, Any]) -> None:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        folder = cache_home() / "features"
        self._whole = folder / f"{name}.safetensors"
        self._parts = folder / f"{name}.parts"
        self._works = True

    def known(self) -> Rows | None:
        return _read(self._whole)

    def part(self, index: int) -> Rows | None:
        return _read(self._parts / f"{index:06d}.safetensors")

    def keep(self, index: int, rows: Rows) -> None:
        self._write(rows, self._parts / f"{index:06d}.safetensors")

    def finish(self, whole: Rows) -> None:
        self._write(whole, self._whole)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _write(self, rows: Rows, path: Path) -> None:
        if not self._works:
            return
        try:
            with atomic_path(path) as part:
                save_tensors(rows, part)
        except OSError as error:
            self._works = False
            warnings.warn(
                f"can't keep what was measured in {path.parent} ({error}); it goes on without. "
                "LATENT_VIDEO_CACHE=FOLDER names another place",
                stacklevel=2,
            )


def _read(path: Path) -> Rows | None:
    try:
        return load_tensors(path)
    except (OSError, ValueError):
        return None
