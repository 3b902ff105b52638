"""Numbers beside the distances: plain statistics, copies of training clips, reconstruction."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.clips import ClipDataset
from ..data.transforms import to_frames, to_video
from ..metrics.features import FeatureExtractor
from ..metrics.frechet import GaussianStatistics, frechet_distance
from ..metrics.protocol import name_of
from ..metrics.reconstruction import psnr, ssim, video_perceptual_distance
from ..metrics.video_statistics import mean_pairwise_distance, nearest
from ..metrics.weight_files import state_sha256
from ..models.autoencoder import LatentSpace
from .comparing import Following, chosen_clips, geometry
from .measuring import Measuring, Rows, identity

# Held-out clips whose nearest training clips are looked for beside the samples', and those of the mean frame.
NUM_HELD_OUT = 32


def plain_statistics(real: Rows, others: dict[str, Rows]) -> dict[str, float]:
    """What sets of clips look and move like and how they vary, each beside the real ones.

    Args:
        real: what is kept of the real clips.
        others: of other sets, by the ending of their metrics' names.
    """
    metrics = {}
    for name in ("contrast", "saturation", "sharpness", "motion"):
        row = "motion_energy" if name == "motion" else name
        of_real = float(real[row].double().mean())
        metrics[f"{name}_real"] = of_real
        for title, rows in others.items():
            metrics[f"{name}_{title}"] = float(rows[row].double().mean())
            metrics[f"{name}_ratio{_ending(title)}"] = metrics[f"{name}_{title}"] / max(of_real, 1e-12)
    variety = mean_pairwise_distance(real["pixels"])
    metrics["pairwise_distance_real"] = variety
    for title, rows in others.items():
        metrics[f"pairwise_distance_{title}"] = mean_pairwise_distance(rows["pixels"])
        metrics[f"pairwise_distance_ratio{_ending(title)}"] = metrics[f"pairwise_distance_{title}"] / max(
            variety, 1e-12
        )
    return metrics


def _ending(title: str) -> str:
    return "" if title == "generated" else f"_{title}"


@dataclass(frozen=True)
class NearestClips:
    """The nearest training clip of every sample.

    Attributes:
        space: in which distances are taken.
        items: index of its video in the training set, int64 ``n``.
        frames: the nearest clips of the first few samples, uint8 ``k t h w c``.
        distances: ``n``.
        num_candidates: training clips that were looked at.
        of_held_out: distance of held-out real clips to theirs, ``m``: what is to be expected of no copies;
            None if there are none.
    """

    space: str
    items: Tensor
    frames: Tensor
    distances: Tensor
    num_candidates: int
    of_held_out: Tensor | None

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the samples, and over held-out clips."""
        told = {"nearest_training_clip": float(self.distances.mean())}
        if self.of_held_out is not None:
            told["nearest_training_clip_of_held_out"] = float(self.of_held_out.mean())
        return told


def nearest_clips(
    following: Following,
    training: ClipDataset,
    held_out: ClipDataset | None,
    generated: Rows,
    num_candidates: int | None,
    num_shown: int,
) -> NearestClips:
    """Looks for copies: the nearest training clip of every sample, in the protocol's features or in pixels.

    Args:
        following: the protocol as it is followed.
        training: the training split.
        held_out: clips that no model has seen; None if there are none.
        generated: what is kept of the samples.
        num_candidates: training videos of which a clip is looked at. None takes the training clips that were
            measured for the distances anyway, or as many as there are samples if these came from elsewhere.
        num_shown: samples whose nearest clips are given whole.
    """
    protocol = following.protocol
    first = protocol.seeds[0]
    space = following.space
    if training is following.real and num_candidates is None:
        seeds = protocol.seeds if protocol.resample_real else protocol.seeds[:1]
        sets = [(following.real_items(seed), following.real_rows(seed), seed) for seed in seeds]
        others = zip(following.floor_items(), following.floor_rows(), strict=True)
        sets += [(items, rows, first) for items, rows in others if rows is not following.real_rows(first)]
        where = protocol.real_clip
    else:
        count = min(len(training), num_candidates or following.num_generated)
        items, where = [number * len(training) // count for number in range(count)], "random"
        clips = chosen_clips(training, items, where, first, "training", training.fingerprint)
        sets = [(items, following.rows_of(clips), first)]
    candidates = [vectors(rows[space]) for _, rows, _ in sets]
    places = [(item, seed) for chosen, _, seed in sets for item in chosen]
    found = nearest(vectors(generated[space]), candidates)
    expected = None
    if held_out is not None and held_out.fingerprint != training.fingerprint:
        spread = {number * len(held_out) // NUM_HELD_OUT for number in range(NUM_HELD_OUT)}
        apart = chosen_clips(held_out, sorted(spread), "middle", 0, "held-out", held_out.fingerprint)
        expected = nearest(vectors(following.rows_of(apart)[space]), candidates).distances[:, 0]
    rows = found.indices[:, 0].tolist()
    frames = [training.clip(places[row][0], where, places[row][1])["frames"] for row in rows[:num_shown]]
    return NearestClips(
        space=space if following.extractor is None else f"{following.extractor.name} features",
        items=torch.tensor([places[row][0] for row in rows]),
        frames=torch.stack(frames),
        distances=found.distances[:, 0],
        num_candidates=len(set(places)),
        of_held_out=expected,
    )


def vectors(features: Tensor) -> Tensor:
    """One vector a clip, ``n d``, also of features that have several."""
    return features if features.ndim == 2 else features.mean(1)


def reconstruction(
    autoencoder: LatentSpace,
    weights: str,
    clips: ClipDataset,
    measuring: Measuring,
    count: int,
    extractor: FeatureExtractor | None,
    perceptual: nn.Module | None,
) -> dict[str, float]:
    """How well held-out clips survive the autoencoder, and how well still pictures would do.

    Args:
        autoencoder: maps clips to latents and back; its posterior's mean is decoded.
        weights: checksum of the model that it belongs to.
        clips: held-out clips; the middle one of each of ``count`` videos, spread evenly.
        measuring: does the work.
        count: of clips.
        extractor: for the Fréchet distance between clips and reconstructions; None for none.
        perceptual: LPIPS; None for none.
    """
    count = min(count, len(clips))
    items = [number * len(clips) // count for number in range(count)]
    device = measuring.device

    def read(numbers: list[int]) -> Tensor:
        return to_video(torch.stack([clips.clip(items[n], "middle")["frames"] for n in numbers]).to(device))

    @functools.cache
    def mean_frame() -> Tensor:
        few = range(min(count, NUM_HELD_OUT))
        return torch.stack([read([number]).double().mean((0, 2)) for number in few]).mean(0).float()

    @torch.no_grad()
    def compute(numbers: list[int]) -> Rows:
        video = read(numbers)
        decoded = autoencoder.decode(autoencoder.encode(video).mean).clamp(-1, 1)
        decoded = to_video(torch.from_numpy(to_frames(decoded))).to(device)
        rows = {
            "reconstruction_psnr": psnr(decoded, video),
            "reconstruction_ssim": ssim(decoded, video),
            "mean_frame_psnr": psnr(mean_frame()[None, :, None].expand_as(video), video),
            "still_frame_psnr": psnr(video.mean(2, keepdim=True).expand_as(video), video),
        }
        if perceptual is not None:
            name = f"reconstruction_{perceptual.name}"
            rows[name] = video_perceptual_distance(perceptual, decoded, video)
        if extractor is not None:
            rows |= {"features": extractor(video), "decoded_features": extractor(decoded)}
        return rows

    key = {
        "set": "reconstruction",
        "weights": weights,
        "content": clips.fingerprint,
        "items": items,
        "geometry": geometry(clips),
        "features": identity(extractor),
        "perceptual": None if perceptual is None else [perceptual.name, state_sha256(perceptual)],
    }
    rows = measuring.rows("reconstruction", count, key, compute)
    metrics = {name: float(values.double().mean()) for name, values in rows.items() if "features" not in name}
    if extractor is not None and count >= 2:
        sides = [rows[name].flatten(0, -2) for name in ("features", "decoded_features")]
        gaussians = [GaussianStatistics(side.shape[1]).update(side) for side in sides]
        name = name_of("reconstruction_frechet_distance", extractor.name, count, count)
        metrics[name] = frechet_distance(gaussians[0], gaussians[1])
    return metrics
