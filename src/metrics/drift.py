"""Whether long videos stay what they were: statistics along time beside the band of real clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .video_statistics import clipped_fraction, contrast, frozen, motion_energy, saturation, sharpness

# Each of a video `(b c t h w)` in [-1, 1] → `(b t)`, or `(b t-1)` of neighbouring frames.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "contrast": contrast,
    "saturation": saturation,
    "sharpness": sharpness,
    "clipped_fraction": clipped_fraction,
    "motion_energy": motion_energy,
    "freeze_rate": frozen,
}
BAND = (0.05, 0.95)
# Traits of a clip that belong to its video, if that goes on with what it began with.
LASTING = ("colour", "contrast", "saturation", "sharpness", "motion_energy")
FAR = 0.95


@dataclass(frozen=True)
class Curve:
    """One statistic along long videos, window by window, beside the band of real clips.

    Attributes:
        median: over the videos, of each window.
        share_outside: of the videos, in each window, that lie outside the band. Of real ones it is the share
            that the band leaves out; a minority that drifts shows here and not in the median.
        band: lower and upper quantile of real clips.
        outside: indices of the windows whose median lies outside.
    """

    median: list[float]
    share_outside: list[float]
    band: tuple[float, float]
    outside: list[int]

    @property
    def left_at(self) -> int | None:
        """The first window whose median lies outside the band; None if there is none."""
        return self.outside[0] if self.outside else None


@dataclass(frozen=True)
class Change:
    """How far clips have gone from the first one of their own video, in one trait.

    Attributes:
        limit: which 95 % of real clips stay within, at any distance in time from their video's first.
        median: of the distances, over the videos, at each position; 0 at the first.
        share_beyond: of the videos, at each position, that have gone further than the limit. Of real ones it
            is 0.05 on average; a video that turns into another one shows here, and in no single clip.
        real_share_beyond: the same of the real videos, as far as they reach.
    """

    limit: float
    median: list[float]
    share_beyond: list[float]
    real_share_beyond: list[float]


@dataclass(frozen=True)
class Blocks:
    """Whether parts of a long video stand still, or repeat another part of the same video.

    Attributes:
        num_frames: of a block.
        motion: mean motion energy of each block as a part of that of real clips: the smallest over all blocks
            of all videos, and their median.
        share_slow: of the blocks that move less than half as much as real clips.
        nearest: distance of two blocks of one video (root mean square of pixels averaged down): the smallest,
            which is 0 where a block is a copy, and the median over the videos of each one's smallest.
        real_nearest: the same of the real videos; None if they are too short.
    """

    num_frames: int
    motion: tuple[float, float]
    share_slow: float
    nearest: tuple[float, float]
    real_nearest: tuple[float, float] | None


@dataclass(frozen=True)
class DistanceCurve:
    """A distance to real clips, of each window, and what real clips score for the same numbers of videos.

    The latter is None where it can't be told.
    """

    values: list[float]
    floor: float | None


@dataclass(frozen=True)
class Drift:
    """What time does to long videos.

    Attributes:
        num_frames: of a window, and of the real clips.
        num_videos: long videos.
        num_real: real clips.
        quantiles: of real clips, between which the bands lie.
        statistics: by their names in `STATISTICS`.
        distances: by name; may be empty.
        changes: from each video's own beginning, by trait; empty where real videos hold one clip only.
        blocks: what longer parts of the videos are like; None where there are no two of them.
    """

    num_frames: int
    num_videos: int
    num_real: int
    quantiles: tuple[float, float]
    statistics: dict[str, Curve]
    distances: dict[str, DistanceCurve]
    changes: dict[str, Change]
    blocks: Blocks | None

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON; with `left_at` of every statistic, for readers."""
        values = asdict(self)
        values["quantiles"] = list(self.quantiles)
        for name, curve in self.statistics.items():
            values["statistics"][name] |= {"band": list(curve.band), "left_at": curve.left_at}
        return values


def clip_statistics(clip: Tensor) -> dict[str, Tensor]:
    """Means over time of every statistic in `STATISTICS`: `(b c t h w)` in [-1, 1], t ≥ 2 → `(b,)` each."""
    return {name: statistic(clip).mean(1) for name, statistic in STATISTICS.items()}


def curve_beside_band(values: Tensor, real: Tensor, quantiles: tuple[float, float] = BAND) -> Curve:
    """Whether and where a statistic along time leaves what most real clips show.

    Args:
        values: of long videos `(n, num_windows)`.
        real: the same statistic of real clips of as many frames `(m,)`.
        quantiles: of the real clips, between which the band lies.
    """
    if values.ndim != 2 or real.ndim != 1 or min(*values.shape, len(real)) < 1:
        raise ValueError(
            "a statistic must have shapes (n, windows) and (m,) for long videos and real clips, got "
            f"{tuple(values.shape)} and {tuple(real.shape)}"
        )
    if not 0 <= quantiles[0] < quantiles[1] <= 1:
        raise ValueError(f"quantiles must rise between 0 and 1, got {quantiles}")
    values, real = values.double(), real.double()
    low, high = real.quantile(torch.tensor(quantiles, dtype=torch.float64, device=real.device)).tolist()
    median = values.quantile(0.5, dim=0)
    beyond = (values < low) | (values > high)
    return Curve(
        median=median.tolist(),
        share_outside=beyond.double().mean(0).tolist(),
        band=(low, high),
        outside=((median < low) | (median > high)).nonzero().flatten().tolist(),
    )


def change_from_first(values: Tensor, real: Tensor, far: float = FAR) -> Change:
    """How far a trait goes from what it was in a video's first clip, beside how far it goes in real videos.

    Args:
        values: of long videos, position by position `(n, positions, d)`.
        real: of real videos `(m, real_positions, d)`, two positions or more.
        far: quantile of real distances that is the limit.
    """
    if values.ndim != 3 or real.ndim != 3 or values.shape[2] != real.shape[2] or real.shape[1] < 2:
        raise ValueError(
            "a trait must have shapes (n, positions, d) and (m, at least 2, d) for long and for real videos, "
            f"got {tuple(values.shape)} and {tuple(real.shape)}"
        )
    gone, usual = (torch.linalg.vector_norm(x - x[:, :1], dim=2) for x in (values.double(), real.double()))
    limit = usual[:, 1:].flatten().quantile(far)
    return Change(
        limit=limit.item(),
        median=gone.quantile(0.5, dim=0).tolist(),
        share_beyond=(gone > limit).double().mean(0).tolist(),
        real_share_beyond=(usual > limit).double().mean(0).tolist(),
    )


def compare_blocks(
    motion: Tensor,
    pixels: Tensor,
    real_motion: float,
    real_pixels: Tensor | None,
    clips: int,
    num_frames: int,
) -> Blocks | None:
    """What blocks of neighbouring clips are like; None if a video holds fewer than two.

    Args:
        motion: mean motion energy of each clip `(n, positions)`.
        pixels: `pixel_features` of each clip `(n, positions, d)`.
        real_motion: mean motion energy of real clips.
        real_pixels: of real videos `(m, real_positions, d)`, if they are that long.
        clips: of a block.
        num_frames: of a clip.
    """
    count = motion.shape[1] // clips
    if count < 2:
        return None
    of_real = None if real_pixels is None else _nearest_blocks(real_pixels, clips)
    ratios = rearrange(motion[:, : count * clips].double(), "n (b c) -> n b c", c=clips).mean(2) / real_motion
    nearest = _nearest_blocks(pixels, clips)
    assert nearest is not None
    return Blocks(
        num_frames=clips * num_frames,
        motion=(ratios.min().item(), ratios.flatten().quantile(0.5).item()),
        share_slow=(ratios < 0.5).double().mean().item(),
        nearest=nearest,
        real_nearest=of_real,
    )


def _nearest_blocks(pixels: Tensor, clips: int) -> tuple[float, float] | None:
    """The smallest distance of two blocks of one video, and the median over the videos."""
    count = pixels.shape[1] // clips
    if count < 2:
        return None
    blocks = rearrange(pixels[:, : count * clips].double(), "n (b c) d -> n b (c d)", c=clips) / clips**0.5
    smallest = torch.stack([torch.nn.functional.pdist(video).min() for video in blocks])
    return smallest.min().item(), smallest.quantile(0.5).item()


def measure_drift(
    statistics: Mapping[str, Tensor],
    real: Mapping[str, Tensor],
    num_frames: int,
    *,
    quantiles: tuple[float, float] = BAND,
    distances: Mapping[str, DistanceCurve] | None = None,
    changes: Mapping[str, Change] | None = None,
    blocks: Blocks | None = None,
) -> Drift:
    """Every statistic of long videos beside its band.

    Args:
        statistics: of long videos window by window, `(n, num_windows)` each.
        real: what `clip_statistics` gives of real clips, `(m,)` each.
        num_frames: of a window, and of the real clips.
        quantiles: of the real clips, between which the bands lie.
        distances, changes, blocks: what else was found.
    """
    if not statistics or statistics.keys() != real.keys():
        raise ValueError(
            "long videos and real clips must have the same statistics, "
            f"got {sorted(statistics)} and {sorted(real)}"
        )
    curves = {name: curve_beside_band(values, real[name], quantiles) for name, values in statistics.items()}
    return Drift(
        num_frames=num_frames,
        num_videos=len(next(iter(statistics.values()))),
        num_real=len(next(iter(real.values()))),
        quantiles=quantiles,
        statistics=curves,
        distances=dict(distances or {}),
        changes=dict(changes or {}),
        blocks=blocks,
    )
