"""Whether long videos stay what they were: statistics along time beside the band of real clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
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
    """

    num_frames: int
    num_videos: int
    num_real: int
    quantiles: tuple[float, float]
    statistics: dict[str, Curve]
    distances: dict[str, DistanceCurve]

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


def measure_drift(
    statistics: Mapping[str, Tensor],
    real: Mapping[str, Tensor],
    num_frames: int,
    *,
    quantiles: tuple[float, float] = BAND,
    distances: Mapping[str, DistanceCurve] | None = None,
) -> Drift:
    """Every statistic of long videos beside its band.

    Args:
        statistics: of long videos window by window, `(n, num_windows)` each.
        real: what `clip_statistics` gives of real clips, `(m,)` each.
        num_frames: of a window, and of the real clips.
        quantiles: of the real clips, between which the bands lie.
        distances: by name, if features were taken.
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
    )
