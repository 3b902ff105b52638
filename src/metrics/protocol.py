"""Under which conditions videos are compared, and which name a distance may therefore carry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

# FVD and KVD of the literature are measured on 2,048 videos or more; the finite-sample bias of the Fréchet
# distance falls as 1/n, so that fewer videos give another quantity.
STANDARD_NUM_VIDEOS = 2048
STANDARD_FEATURES = "i3d"
_SHORT_NAMES = {
    "frechet_distance": "fvd",
    "kernel_distance": "kvd",
    "kernel_distance_subsets": "kvd_subsets",
    "reconstruction_frechet_distance": "rfvd",
}

VideoChoice = Literal["shuffled", "sorted", "balanced"]
ClipChoice = Literal["random", "first", "middle"]
Arithmetic = Literal["float64", "float32_svd"]

# Words of a protocol that say where it comes from and decide no number.
_ABOUT = ("name", "source", "open_points")


@dataclass(frozen=True)
class Protocol:
    """How a distance between real and generated videos is measured: everything but the videos themselves.

    Frames are compared as 8-bit pictures of the data set's resolution, which the extractor then resizes.

    Attributes:
        name: under which it is known.
        source: where its rules are written down.
        open_points: where the source leaves something open, or we can't do as it does; None if nothing.
        features: name of the feature extractor (`metrics.features`); None measures no distances.
        resize: the rule by which frames reach the extractor's size (`metrics.features.RESIZES`).
        num_frames: of a clip; None as in the model's training, or as the data set's option says.
        split: of the data set, from which real clips come.
        num_real, num_generated: videos on each side; None takes all real ones.
        real_videos: which real videos, if there are more: a random choice, the first in sorted order, or
            equally many of each class.
        real_clip, generated_clip: which clip of a longer video.
        real_stride, generated_stride: frames from one of a clip to the next; None as in the model's training
            (or as the data set's option says), since samples are made at that pace.
        jpeg_quality: frames of both sides go through JPEG of this quality; None doesn't.
        arithmetic: of the Fréchet distance, see `metrics.frechet.frechet_distance`.
        biased_covariance: divisor n instead of n - 1.
        seeds: the measurement is repeated with each, and the mean and deviation over them reported.
        resample_real, resample_generated: whether each seed chooses real clips, makes samples, anew.
    """

    name: str
    source: str
    open_points: str | None
    features: str | None
    resize: str
    num_frames: int | None
    split: str
    num_real: int | None
    num_generated: int
    real_videos: VideoChoice
    real_clip: ClipChoice
    generated_clip: ClipChoice
    real_stride: int | None
    generated_stride: int
    jpeg_quality: int | None
    arithmetic: Arithmetic
    biased_covariance: bool
    seeds: Sequence[int]
    resample_real: bool
    resample_generated: bool

    def __post_init__(self) -> None:
        seeds = self.seeds if isinstance(self.seeds, list | tuple) else [self.seeds]
        object.__setattr__(self, "seeds", tuple(seeds))
        for field in ("num_real", "num_generated"):
            if (number := getattr(self, field)) is not None and number < 2:
                raise ValueError(f"protocol.{field} must be at least 2, got {number}")
        for field in ("num_frames", "real_stride", "generated_stride"):
            if (number := getattr(self, field)) is not None and number < 1:
                raise ValueError(f"protocol.{field} must be at least 1, got {number}")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"protocol.jpeg_quality must be 1 to 100 or null, got {self.jpeg_quality}")
        whole = all(isinstance(seed, int) and not isinstance(seed, bool) for seed in self.seeds)
        if not (self.seeds and whole) or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"protocol.seeds must be different whole numbers from 0, one or more, got {list(self.seeds)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "seeds": list(self.seeds)}

    @property
    def digest(self) -> str:
        """Identifies what decides numbers: equal for two protocols that differ only in words."""
        decisive = {name: value for name, value in self.to_dict().items() if name not in _ABOUT}
        return _digest(decisive)


@dataclass(frozen=True)
class Comparison:
    """What was compared under a protocol: all that its numbers depend on but the samples.

    Attributes:
        protocol: the one that was followed.
        num_real, num_generated: videos that there were on each side.
        num_frames, real_stride: of every clip; the stride is that of the real videos.
        fps: the rate that real videos were read at; None for their own.
        resolution: height and width of the videos that are compared.
        crop: how real frames reach it.
        short_videos: what becomes of real videos that are shorter than a clip.
        dataset: name of the data set.
        fingerprint: of its content.
        weights: checksum of the feature extractor's; None without one.
    """

    protocol: Protocol
    num_real: int
    num_generated: int
    num_frames: int
    real_stride: int
    fps: float | None
    resolution: tuple[int, int]
    crop: str
    short_videos: str
    dataset: str
    fingerprint: str
    weights: str | None

    def __post_init__(self) -> None:
        if min(self.num_real, self.num_generated) < 2:
            raise ValueError(
                f"a distance needs at least 2 videos on each side, got {self.num_real} real, "
                f"{self.num_generated} generated"
            )

    @property
    def digest(self) -> str:
        """Numbers with equal digests may stand in one column."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        told |= {"protocol": self.protocol.digest, "resolution": list(self.resolution)}
        del told["dataset"]  # a name; the fingerprint says what it holds
        return _digest(told)

    def name(self, metric: str) -> str:
        """The name under which to report a metric: `fvd`, `fvd_fast@64`, `frechet_distance_r3d_18@64`.

        The bare names of the literature need I3D features and 2,048 videos or more on both sides.

        Args:
            metric: `frechet_distance`, `kernel_distance`, `kernel_distance_subsets` or
                `reconstruction_frechet_distance`.
        """
        return name_of(metric, self.protocol.features or "none", self.num_real, self.num_generated)

    def sentence(self) -> str:
        """One line for people: what was compared with what, and how."""
        protocol = self.protocol
        height, width = self.resolution
        stride = "every frame" if self.real_stride == 1 else f"every {_ordinal(self.real_stride)} frame"
        if self.fps is not None:
            stride = f"at {self.fps:g} frames per second"
        parts = [
            f"Protocol {protocol.name} ({protocol.digest[:8]})",
            f"{self.num_generated:,} generated against {self.num_real:,} real clips "
            f"({self.dataset}, {protocol.split}; {protocol.real_videos} videos, {protocol.real_clip} clip)",
            f"{self.num_frames} frames ({stride}) at {height}×{width}",
        ]
        if protocol.features:
            parts.append(f"features {protocol.features} after {protocol.resize}, {protocol.arithmetic}")
        seeds = ", ".join(map(str, protocol.seeds))
        return "; ".join([*parts, f"seed{'s' if len(protocol.seeds) > 1 else ''} {seeds}."])


def name_of(metric: str, features: str, num_real: int, num_generated: int) -> str:
    """The name of a metric that was measured on so many videos; see `Comparison.name`."""
    if metric not in _SHORT_NAMES:
        raise ValueError(f"unknown metric {metric!r}; choices: {', '.join(_SHORT_NAMES)}")
    enough = min(num_real, num_generated) >= STANDARD_NUM_VIDEOS
    if features == STANDARD_FEATURES and enough:
        return _SHORT_NAMES[metric]
    count = f"{num_real}" if num_real == num_generated else f"{num_real}vs{num_generated}"
    if features == STANDARD_FEATURES:
        return f"{_SHORT_NAMES[metric]}_fast@{count}"
    return f"{metric}_{features}@{count}"


def _digest(told: object) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _ordinal(number: int) -> str:
    if 10 <= number % 100 <= 20:
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
