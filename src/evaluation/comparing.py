"""Following a protocol: which clips stand for each side, and the distances between them."""

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..data.arrays import ArrayVideos
from ..data.choice import ClipPlace, order_of_videos
from ..data.clips import ClipDataset
from ..metrics.drift import (
    LASTING,
    STATISTICS,
    DistanceCurve,
    Drift,
    change_from_first,
    compare_blocks,
    measure_drift,
)
from ..metrics.features import FeatureExtractor
from ..metrics.frechet import GaussianStatistics, frechet_distance, resampled_frechet_distances
from ..metrics.kernel import kernel_distance, kernel_distance_subsets, resampled_kernel_distances
from ..metrics.protocol import Comparison, Protocol
from ..metrics.suspicions import suspicions, suspicious_stride
from ..metrics.uncertainty import bootstrap, extrapolated_floor, kernel_floor
from .measuring import ClipSet, Measuring, Rows

# Videos of a subset of the kernel distance over subsets (that of the KID); fewer have none.
KERNEL_SUBSET = 1000
# A part of a long video, which should move, and repeat no other.
FRAMES_PER_BLOCK = 64

Videos = ClipDataset | ArrayVideos


def chosen_clips(
    videos: Videos, items: Sequence[int], where: ClipPlace, seed: int, title: str, fingerprint: str
) -> ClipSet:
    """One clip of each of some videos, numbered in their order.

    Args:
        videos: the set.
        items: indices of the videos.
        where: which clip of each.
        seed: of a random place.
        title: for the progress bar.
        fingerprint: of the set's content.
    """

    def frames(numbers: list[int]) -> Tensor:
        return torch.stack([videos.clip(items[number], where, seed)["frames"] for number in numbers])

    key = {
        "set": "files",
        "content": fingerprint,
        "items": hashlib.sha256(repr(list(items)).encode()).hexdigest(),
        "where": where,
        "seed": seed if where == "random" else None,
        "geometry": geometry(videos),
    }
    return ClipSet(title, len(items), frames, key)


def clips_along(videos: Videos, items: Sequence[int], positions: int, fingerprint: str) -> ClipSet:
    """Neighbouring clips of long videos: number ``n positions + p`` is clip p of the n-th.

    Args:
        videos: the set.
        items: indices of the videos.
        positions: clips of each, one after another from its beginning.
        fingerprint: of the set's content.

    Raises:
        ValueError: if a video is too short for so many.
    """
    step = clip_step(videos, items, positions)

    def frames(numbers: list[int]) -> Tensor:
        clips = []
        for item, members in groupby(numbers, key=lambda number: number // positions):
            starts = [number % positions * step for number in members]
            clips += [clip["frames"] for clip in videos.clips(items[item], starts)]
        return torch.stack(clips)

    key = {
        "set": "along",
        "content": fingerprint,
        "items": list(items),
        "positions": positions,
        "geometry": geometry(videos),
    }
    return ClipSet("along time", len(items) * positions, frames, key)


def clip_step(videos: Videos, items: Sequence[int], positions: int) -> int:
    """Frames from one of so many neighbouring clips to the next; ValueError if a video is too short."""
    shortest = min(items, key=videos.length)
    fit = num_clips(videos, shortest)
    if not 1 <= positions <= fit:
        raise ValueError(
            f"num_positions={positions}: the shortest video has {videos.length(shortest):,} frames, which "
            f"hold {fit} clips of {videos.num_frames} frames, {videos.frame_stride} apart"
        )
    return videos.num_frames * videos.frame_stride


def num_clips(videos: Videos, item: int) -> int:
    """How many neighbouring clips a video holds."""
    return (videos.length(item) + videos.frame_stride - 1) // (videos.num_frames * videos.frame_stride)


def geometry(videos: Videos) -> dict[str, Any]:
    """How clips are cut out of videos, ready for JSON."""
    sampling = videos.sampling if isinstance(videos, ClipDataset) else None
    return {
        "num_frames": videos.num_frames,
        "frame_stride": videos.frame_stride,
        "resolution": [videos.resize.height, videos.resize.width],
        "crop": videos.resize.mode,
        "fps": sampling.fps if sampling else None,
        "short_videos": sampling.short_videos if sampling else "skip",
    }


@dataclass
class Result:
    """Numbers by the names under which they may be reported, and what is known of how sure they are."""

    metrics: dict[str, float] = field(default_factory=dict)
    uncertainty: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Floor:
    """What real videos score against other real ones.

    Attributes:
        values: by metric; none if there are too few videos.
        measured_on: how many were compared.
        between: which, in words.
    """

    values: dict[str, float]
    measured_on: tuple[int, int]
    between: str


class Following:
    """A protocol as it is followed on some videos.

    Args:
        protocol: the rules.
        measuring: does the work.
        extractor: of the protocol's features; None if it names none.
        real: the real videos, of the protocol's split.
        fingerprint: of their content.
        generated: makes the generated side's clips of a seed, so many.
        available: generated videos that there are; None if any number can be made.
    """

    def __init__(
        self,
        protocol: Protocol,
        measuring: Measuring,
        extractor: FeatureExtractor | None,
        real: ClipDataset,
        fingerprint: str,
        generated: Callable[[int, int], ClipSet],
        available: int | None,
    ) -> None:
        self.protocol, self.measuring, self.extractor = protocol, measuring, extractor
        self.real, self.fingerprint, self._generated = real, fingerprint, generated
        self._available = available
        wanted_real = len(real) if protocol.num_real is None else protocol.num_real
        self.num_real = min(wanted_real, len(real))
        wanted = protocol.num_generated
        self.num_generated = wanted if available is None else min(wanted, available)
        self.notes = []
        if self.num_real < wanted_real:
            self.notes.append(
                f"only {self.num_real:,} real videos, fewer than the protocol's {wanted_real:,}"
            )
        if self.num_generated < wanted:
            self.notes.append(
                f"only {self.num_generated:,} videos given, fewer than the protocol's {wanted:,}"
            )
        if len(protocol.seeds) > 1 and protocol.resample_generated and not self.resampled["generated"]:
            self.notes.append(
                f"all {self.num_generated:,} given videos are used with every seed: the deviation over seeds "
                "is that of the real side alone"
            )
        self.comparison = Comparison(
            protocol=protocol,
            num_real=self.num_real,
            num_generated=self.num_generated,
            num_frames=real.num_frames,
            real_stride=real.frame_stride,
            fps=real.sampling.fps,
            resolution=real.resolution,
            crop=real.resize.mode,
            short_videos=real.sampling.short_videos,
            dataset=real.name,
            fingerprint=fingerprint,
            weights=None if extractor is None else extractor.weights_sha256,
        )

    @property
    def resampled(self) -> dict[str, bool]:
        """Which sides differ from seed to seed."""
        protocol = self.protocol
        all_given = self._available is not None and self._available <= self.num_generated
        fixed = {
            "real": protocol.real_clip != "random"
            and (self.num_real == len(self.real) or protocol.real_videos == "sorted"),
            "generated": protocol.generated_clip != "random" and all_given,
        }
        return {
            "real": protocol.resample_real and not fixed["real"],
            "generated": protocol.resample_generated and not fixed["generated"],
        }

    @cache  # noqa: B019
    def order(self, seed: int) -> list[int]:
        """All real videos in the order in which the protocol chooses them."""
        labels = [entry.label for entry in self.real.entries]
        return order_of_videos(labels, self.protocol.real_videos, seed, names=self.real.names)

    def real_items(self, seed: int) -> list[int]:
        """Indices of the real videos of a seed; all of them stand in their own order."""
        chosen = self.order(seed)[: self.num_real]
        return sorted(chosen) if self.num_real == len(self.real) else chosen

    @cache  # noqa: B019
    def real_rows(self, seed: int) -> Rows:
        """What is kept of the real side; of another seed than the first only what candidates need."""
        seed = seed if self.protocol.resample_real else self.protocol.seeds[0]
        return self._needed(seed, self.rows_of(self._real_clips(self.real_items(seed), seed, "real")))

    @cache  # noqa: B019
    def floor_items(self) -> list[list[int]]:
        """Two sets of real videos of one law, as many as on the two sides; none if the split holds too few.

        They have no video in common. The first is the real side, unless that is no random choice: what comes
        next in the order is then of other classes, and both are drawn from the whole split.
        """
        first = self.protocol.seeds[0]
        order = self.order(first)
        if self.protocol.real_videos != "shuffled":
            order = order_of_videos([-1] * len(self.real), "shuffled", first)
        end = self.num_real + self.num_generated
        return [order[: self.num_real], order[self.num_real : end]] if end <= len(order) else []

    @cache  # noqa: B019
    def floor_rows(self) -> list[Rows]:
        """What is kept of both sets of `floor_items`."""
        first = self.protocol.seeds[0]
        return [
            self.real_rows(first)
            if items == self.real_items(first)
            else self.rows_of(self._real_clips(items, first, "other real"))
            for items in self.floor_items()
        ]

    @cache  # noqa: B019
    def generated_rows(self, seed: int) -> Rows:
        """What is kept of the generated side; of another seed than the first only its features."""
        seed = seed if self.protocol.resample_generated else self.protocol.seeds[0]
        return self._needed(seed, self.rows_of(self._generated(seed, self.num_generated)))

    def rows_of(self, clips: ClipSet) -> Rows:
        """What is kept of any clips, measured like those of both sides."""
        return self.measuring.clips(clips, self.extractor, self.protocol.jpeg_quality)

    @property
    def space(self) -> str:
        """In which rows clips are near to each other: `features`, or `pixels` without an extractor."""
        return "pixels" if self.extractor is None else "features"

    def _needed(self, seed: int, rows: Rows) -> Rows:
        return rows if seed == self.protocol.seeds[0] else {self.space: rows[self.space]}

    def result(self, num_replicates: int) -> Result:
        """The distances: mean and deviation over seeds, an interval, and what real videos score.

        Args:
            num_replicates: of the bootstrap; 0 does without.
        """
        result = Result()
        if self.extractor is None:
            return result
        pairs = [
            (self.real_rows(seed)["features"], self.generated_rows(seed)["features"])
            for seed in self.protocol.seeds
        ]
        by_seed = [distances(real, generated, self.protocol) for real, generated in pairs]
        floor = self.floor()
        resampled = {
            "frechet_distance": resampled_frechet_distances,
            "kernel_distance": resampled_kernel_distances,
        }
        for metric in by_seed[0]:
            name, values = self.comparison.name(metric), [told[metric] for told in by_seed]
            result.metrics[name] = statistics.fmean(values)
            told: dict[str, Any] = {"by_seed": dict(zip(map(str, self.protocol.seeds), values, strict=True))}
            if len(values) > 1:
                told["deviation_over_seeds"] = statistics.stdev(values)
                told["resampled"] = self.resampled
            if metric in resampled and num_replicates:
                drawn = bootstrap(*pairs[0], resampled[metric], num_replicates=num_replicates, seed=0)
                low, high = (edge - drawn.estimate + values[0] for edge in drawn.interval)
                told["bootstrap"] = {
                    "interval_95": [low, high],
                    "deviation": drawn.deviation,
                    "seed": self.protocol.seeds[0],
                    "num_replicates": num_replicates,
                }
            if metric in floor.values:
                told["floor"] = floor.values[metric]
                told["floor_measured_on"] = list(floor.measured_on)
                told["floor_measured_between"] = floor.between
            result.uncertainty[name] = told
        return result

    def drift(self, videos: Videos, fingerprint: str, positions: int) -> Drift:
        """What time does to long videos: each clip position beside the real side of the first seed.

        Beside real videos in their length, too, as far as they reach: what the long ones have changed from
        their beginning, and whether parts of them stand still or return. Without features the distances are
        those of pixels.

        Args:
            videos: the long videos; the first ``num_generated``.
            fingerprint: of their content.
            positions: clips of each, see `clips_along`.
        """
        items = list(range(self.num_generated))
        rows = self._along(clips_along(videos, items, positions, fingerprint), positions, self.extractor)
        real, beside = self.real_rows(self.protocol.seeds[0]), self._real_along(positions)
        curves, changes = self._distances_along(real, rows), {}
        if beside is None:
            self.notes.append(
                "the real videos hold no two clips one after the other: what the long ones have changed from "
                "their beginning can't be told from what real ones do"
            )
        else:
            changes = {
                name: change_from_first(_with_width(rows[name]), _with_width(beside[name]))
                for name in LASTING
            }
            if (reach := beside["colour"].shape[1]) < positions:
                self.notes.append(
                    f"real videos reach {reach} clips far, the long ones {positions}: what real ones change "
                    "from their beginning is known that far only"
                )
        return measure_drift(
            {name: rows[name] for name in STATISTICS},
            {name: real[name] for name in STATISTICS},
            self.real.num_frames,
            distances=curves,
            changes=changes,
            blocks=compare_blocks(
                rows["motion_energy"],
                rows["pixels"],
                float(real["motion_energy"].double().mean()),
                None if beside is None else beside["pixels"],
                max(1, FRAMES_PER_BLOCK // self.real.num_frames),
                self.real.num_frames,
            ),
        )

    def _along(self, clips: ClipSet, positions: int, extractor: FeatureExtractor | None) -> Rows:
        """Rows `n positions *` of neighbouring clips."""
        rows = self.measuring.clips(clips, extractor, self.protocol.jpeg_quality)
        return {name: value.unflatten(0, (-1, positions)) for name, value in rows.items() if name != "shown"}

    def _distances_along(self, real: Rows, rows: Rows) -> dict[str, DistanceCurve]:
        wanted = (self.num_real, self.num_generated)
        if self.extractor is None:
            # To pixels in [-1, 1], for a kernel that takes the mean of products.
            scale = real["pixels"].shape[1] ** 0.5
            told = [
                kernel_distance(real["pixels"] * scale, at * scale) for at in rows["pixels"].transpose(0, 1)
            ]
            floor = kernel_floor(real["pixels"] * scale, wanted, seed=0) if min(wanted) >= 4 else None
            return {"kernel_distance_of_pixels": DistanceCurve(told, floor)}
        at_each = [
            distances(real["features"], features, self.protocol)
            for features in rows["features"].transpose(0, 1)
        ]
        floors = self.floor().values
        return {
            self.comparison.name(metric): DistanceCurve([one[metric] for one in at_each], floors.get(metric))
            for metric in at_each[0]
        }

    def _real_along(self, positions: int) -> Rows | None:
        """Rows of neighbouring clips of as many real videos as generated ones, if there are so many.

        As far as half of those that hold two clips reach, or fewer positions; None if there are no two.
        """
        lengths = {item: num_clips(self.real, item) for item in self.order(self.protocol.seeds[0])}
        several = sorted((length for length in lengths.values() if length > 1), reverse=True)
        if len(several) < 2:
            return None
        wanted = min(self.num_generated, len(several))
        reach = min(positions, several[max(wanted, (len(several) + 1) // 2) - 1])
        items = [item for item, length in lengths.items() if length >= reach][:wanted]
        clips = clips_along(self.real, items, reach, self.fingerprint)
        return self._along(replace(clips, title="real along time"), reach, None)

    @cache  # noqa: B019
    def floor(self) -> "Floor":
        """What real videos score against other real ones at the numbers of the two sides."""
        wanted = (self.num_real, self.num_generated)
        if min(wanted) < 4:
            self.notes.append("no real videos are set against real ones: that needs 4 on both sides")
            return Floor({}, (0, 0), "")
        if rows := self.floor_rows():
            between = "the real side and other real videos"
            if self.protocol.real_videos != "shuffled":
                between = "random parts of the whole split"
                self.notes.append(
                    f"the real side is a {self.protocol.real_videos} choice: real against real is measured "
                    "between random parts of the whole split"
                )
            one, other = (part["features"] for part in rows)
            return Floor(floor_of_sets(one, other, wanted, self.protocol), wanted, between)
        real = self.real_rows(self.protocol.seeds[0])["features"]
        half = len(real) // 2
        values = floor_of_halves(real, wanted, self.protocol)
        return Floor(values, (half, half), "random halves of the real side")

    def suspicions(self) -> list[str]:
        """What looks like a mistake in the generated videos; of given ones also another stride."""
        first = self.protocol.seeds[0]
        real, generated = self.real_rows(first), self.generated_rows(first)
        return suspicions(real, generated) + (
            suspicious_stride(real, generated) if self._available is not None else []
        )

    def _real_clips(self, items: list[int], seed: int, title: str) -> ClipSet:
        return chosen_clips(self.real, items, self.protocol.real_clip, seed, title, self.fingerprint)


def _with_width(values: Tensor) -> Tensor:
    return values if values.ndim == 3 else values[..., None]


def distances(real: Tensor, generated: Tensor, protocol: Protocol) -> dict[str, float]:
    """Fréchet and kernel distances of features ``n d`` (or ``n t d``), by their long names."""
    real, generated = real.flatten(0, -2), generated.flatten(0, -2)
    told = {
        "frechet_distance": frechet_between(real, generated, protocol),
        "kernel_distance": kernel_distance(real, generated),
    }
    if min(len(real), len(generated)) >= KERNEL_SUBSET:
        subsets = kernel_distance_subsets(real, generated, subset_size=KERNEL_SUBSET, seed=0)
        told["kernel_distance_subsets"] = subsets.mean
    return told


def frechet_between(real: Tensor, generated: Tensor, protocol: Protocol) -> float:
    """The Fréchet distance of features ``n d`` (or ``n t d``), by a protocol's arithmetic."""
    real, generated = real.flatten(0, -2), generated.flatten(0, -2)
    dim, biased = real.shape[1], protocol.biased_covariance
    one, other = (GaussianStatistics(dim, biased=biased).update(side) for side in (real, generated))
    return frechet_distance(one, other, protocol.arithmetic)


def floor_of_sets(
    real: Tensor, others: Tensor, wanted: tuple[int, int], protocol: Protocol
) -> dict[str, float]:
    """What real videos score against other real ones, by metric.

    Args:
        real, others: features ``n d`` (or ``n t d``) of two sets of one law.
        wanted: videos of the two sides for which the floors shall hold.
        protocol: of the distances.
    """
    between = frechet_between(real, others, protocol)
    return {"frechet_distance": between} | _kernel_floor(torch.cat([real, others]), wanted)


def floor_of_halves(real: Tensor, wanted: tuple[int, int], protocol: Protocol) -> dict[str, float]:
    """`floor_of_sets` where there is only one set: between its parts, and their law goes on."""
    half = len(real) // 2
    by_size = [
        (size, mean_distance_of_parts(real, size, protocol)) for size in (half // 2, half) if size >= 2
    ]
    return {"frechet_distance": extrapolated_floor(by_size, wanted)} | _kernel_floor(real, wanted)


def _kernel_floor(real: Tensor, wanted: tuple[int, int]) -> dict[str, float]:
    # Of single frames there is none: halves would share videos.
    return {"kernel_distance": kernel_floor(real, wanted, seed=0)} if real.ndim == 2 else {}


def mean_distance_of_parts(features: Tensor, size: int, protocol: Protocol, num_draws: int = 8) -> float:
    """The Fréchet distance of two disjoint parts of a set, ``size`` each, over some random draws."""
    generator = torch.Generator().manual_seed(0)
    told = []
    for _ in range(num_draws):
        order = torch.randperm(len(features), generator=generator)
        one, other = features[order[:size]], features[order[size : 2 * size]]
        told.append(frechet_between(one, other, protocol))
    return statistics.fmean(told)
