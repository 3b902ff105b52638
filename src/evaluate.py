"""Measure a model or some videos: ``python -m src.evaluate model=runs/ucf101/model dataset=ucf101``."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from .config import (
    CLIP_FACTS,
    ConfigError,
    EvaluateConfig,
    GuidanceSettings,
    MachineSettings,
    build,
    typed,
    verb,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .data.clips import ClipDataset
    from .metrics.features import FeatureExtractor
    from .model_folder import DataRecord, DiffusionModel
    from .training.share import Share

NUM_SHOWN = 8
FOLDER_OF_SAMPLES = {
    "_target_": ".data.folder.folder",
    "test_fraction": 0.0,
    "frame_stride": 1,
    "fps": None,
    "crop": "center_crop",
    "horizontal_flip": False,
    "short_videos": "skip",
    "clips_per_opening": 1,
    "cache": None,
    "strict": False,
}


@dataclass
class Summary:
    """What is kept of a set of videos: features and plain statistics, never the videos themselves.

    Args:
        features: of the extractor, ``n d``; None without one.
        pixels: small versions as vectors, ``n d``, for distances between videos.
        contrast: mean over videos and frames.
        motion: mean over videos and pairs of neighbouring frames.
        shown: the first few videos, ``b c t h w``.
    """

    features: "Tensor | None"
    pixels: "Tensor"
    contrast: float
    motion: float
    shown: "Tensor"


@verb("evaluate", EvaluateConfig)
def main(cfg: DictConfig) -> None:
    """Writes ``evaluation.json``: distances named by their protocol, plain statistics, reconstruction."""
    import torch

    from .metrics.features import I3D_RESIZE, i3d_features
    from .metrics.frechet import GaussianStatistics, frechet_distance
    from .metrics.i3d import MIN_FRAMES, load_i3d
    from .metrics.kernel import kernel_distance
    from .metrics.protocol import Protocol
    from .metrics.video_statistics import mean_pairwise_distance, nearest
    from .model_folder import load_diffusion
    from .training.device import pick_device
    from .training.share import Share

    if (cfg.model is None) == (cfg.samples is None):
        raise ConfigError("give either model=FOLDER (videos are sampled) or samples=FOLDER (of videos)")
    typed(cfg, "machine", MachineSettings)
    scale = typed(cfg, "guidance", GuidanceSettings).scale
    share = Share()
    device = pick_device()
    model = None if cfg.model is None else load_diffusion(cfg.model).to(device)
    if cfg.samples is not None and not Path(cfg.samples).is_dir():
        raise FileNotFoundError(f"no folder of videos at samples={cfg.samples}")

    node = clip_geometry(cfg.dataset, None if model is None else model.data)
    extractor: Callable[[torch.Tensor], torch.Tensor] | None = None
    if cfg.protocol.features == "i3d":
        if node["num_frames"] < MIN_FRAMES:
            raise ConfigError(
                f"I3D needs at least {MIN_FRAMES} frames, clips here have {node['num_frames']}; measure "
                "longer ones (dataset.num_frames), or do without features: protocol.features=null"
            )
        network = load_i3d(cfg.i3d).to(device)
        extractor = lambda video: i3d_features(network, video)  # noqa: E731
    elif cfg.protocol.features is not None:
        raise ConfigError(f"protocol.features={cfg.protocol.features} is unknown; choose i3d or null")

    with share.first_alone():
        training = build(node, split=cfg.protocol.split, seed=cfg.seed)
        held_out = build(node, split="test", seed=cfg.seed)
    notes = [] if model is None else differences(training, model)
    num_real = min(cfg.protocol.num_real, len(training))
    if num_real < cfg.protocol.num_real:
        notes.append(f"only {num_real} real videos, fewer than the protocol's {cfg.protocol.num_real}")

    def summary_of(clips: Clips, count: int, title: str) -> Summary:
        return summarize(clips, share, count, cfg.batch_size, extractor, title)

    real = summary_of(_real_clips(training, device), num_real, "real")
    if model is not None:
        num_generated = cfg.protocol.num_generated
        clips = _generated(cfg, model, scale)
        output = Path(cfg.output) if cfg.output else Path(cfg.model).parent / "evaluation.json"
    else:
        with share.first_alone():
            given = build(samples_node(node, cfg.samples), split="all", seed=cfg.seed)
        num_generated = min(cfg.protocol.num_generated, len(given))
        if num_generated < cfg.protocol.num_generated:
            notes.append(f"only {num_generated} videos in {cfg.samples}")
        clips = _middle_clips(given, num_generated, device)
        samples = Path(cfg.samples)
        beside = samples.with_name(f"{samples.name}_evaluation") / "evaluation.json"
        output = Path(cfg.output) if cfg.output else beside
        if samples.resolve() in output.resolve().parents:
            raise ConfigError(
                f"output={output} lies inside samples={samples}, where its videos would be taken for samples "
                "the next time; choose another folder"
            )
    generated = summary_of(clips, num_generated, "generated")
    summary = None
    if model is not None and cfg.compare_untrained:
        untrained = load_diffusion(cfg.model, trained=False).to(device)
        summary = summary_of(_generated(cfg, untrained, scale), num_generated, "untrained")
    share.close()
    if share.rank > 0:
        return

    protocol = Protocol(
        features=cfg.protocol.features or "none",
        num_real=num_real,
        num_generated=num_generated,
        num_frames=training.num_frames,
        frame_stride=training.frame_stride,
        resolution=training.resolution,
        resize=I3D_RESIZE if cfg.protocol.features else "no resizing",
        dataset=training.name,
        split=cfg.protocol.split,
        clip_choice="one random clip of each video",
        seed=cfg.seed,
    )
    metrics: dict[str, float] = {}

    def distances(other: Summary, suffix: str) -> None:
        if real.features is None or other.features is None:
            return
        dim = real.features.shape[1]
        a = GaussianStatistics(dim).update(real.features)
        b = GaussianStatistics(dim).update(other.features)
        metrics[protocol.name("frechet_distance") + suffix] = frechet_distance(a, b)
        metrics[protocol.name("kernel_distance") + suffix] = kernel_distance(real.features, other.features)

    distances(generated, "")
    if summary is not None:
        distances(summary, "_untrained")
        metrics["contrast_ratio_untrained"] = summary.contrast / real.contrast
        metrics["motion_ratio_untrained"] = summary.motion / real.motion

    pairwise = mean_pairwise_distance(real.pixels)
    candidates = _training_pixels(training, cfg.batch_size, device)
    closest = nearest(generated.pixels, [candidates])
    held_out_pixels = torch.cat([_pixels(video) for video in _held_out(held_out, 64, cfg.batch_size, device)])
    metrics |= {
        "contrast_real": real.contrast,
        "contrast_generated": generated.contrast,
        "contrast_ratio": generated.contrast / real.contrast,
        "motion_real": real.motion,
        "motion_generated": generated.motion,
        "motion_ratio": generated.motion / real.motion,
        "pairwise_distance_real": pairwise,
        "pairwise_distance_generated": mean_pairwise_distance(generated.pixels),
        "pairwise_distance_ratio": mean_pairwise_distance(generated.pixels) / pairwise,
        "nearest_training_clip": float(closest.distances[:, 0].mean()),
        "nearest_training_clip_of_held_out": float(
            nearest(held_out_pixels, [candidates]).distances[:, 0].mean()
        ),
    }
    if model is not None:
        metrics |= _reconstruction(model, held_out, cfg.batch_size, device)

    indices = closest.indices[:NUM_SHOWN, 0].tolist()
    shown = {
        "real": real.shown,
        "generated": generated.shown,
        "nearest": _clips_at(training, indices, device).cpu(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    videos = _write_videos(output.parent, shown, training.fps)
    record = {
        "metrics": metrics,
        "protocol": protocol.to_dict() | {"sentence": protocol.sentence()},
        "dataset_fingerprint": training.fingerprint,
        "model_step": None if model is None else model.step,
        "guidance_scale": scale,
        "videos": videos,
        "notes": notes,
    }
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, output)
    print(protocol.sentence())
    for note in notes:
        print(f"note: {note}")
    for name, value in metrics.items():
        print(f"  {name:45} {value:.4g}")
    print(f"written to {output}")


def clip_geometry(dataset: DictConfig, record: "DataRecord | None") -> dict[str, Any]:
    """The dataset node, with what it leaves open (null) as in the model's training."""
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(dataset, resolve=True)
    assert isinstance(node, dict)
    if record is not None and record.target_fps and not node.get("frame_stride") and not node.get("fps"):
        if "fps" not in node:
            raise ConfigError(
                f"the model was trained at {record.target_fps:g} frames per second, and dataset "
                f"{node['_target_']} can't be read at a rate; give dataset.frame_stride"
            )
        node["fps"] = record.target_fps
    for fact in CLIP_FACTS:
        if node.get(fact) is None:
            if record is None:
                raise ConfigError(f"dataset.{fact} must be given, as there is no model to take it from")
            value = getattr(record, fact)
            node[fact] = list(value) if fact == "resolution" else value
    return {str(key): value for key, value in node.items()}


def samples_node(node: dict[str, Any], folder: str) -> dict[str, Any]:
    """A folder of videos that were made before, read with the geometry of the real ones.

    The stride is that of sampling: made videos are taken frame by frame.
    """
    return FOLDER_OF_SAMPLES | {
        "root": folder,
        "num_frames": node["num_frames"],
        "resolution": node["resolution"],
    }


def differences(dataset: "ClipDataset", model: "DiffusionModel") -> list[str]:
    """What of the data differs from the model's training, in words."""
    pairs = {
        "data set": (model.data.name, dataset.name),
        "content": (model.data.fingerprint, dataset.fingerprint),
        "frames": (model.data.num_frames, dataset.num_frames),
        "stride": (model.data.frame_stride, dataset.frame_stride),
        "frame rate asked for": (model.data.target_fps, dataset.sampling.fps),
        "resolution": (list(model.data.resolution), list(dataset.resolution)),
    }
    return [
        f"{what} differs from the model's training: {trained} there, {here} here"
        for what, (trained, here) in pairs.items()
        if trained != here
    ]


Clips = Callable[[list[int]], "Tensor"]
"""Videos ``b c t h w`` of numbered clips."""


def summarize(
    clips: Clips,
    share: "Share",
    count: int,
    batch_size: int,
    extractor: "FeatureExtractor | None",
    title: str,
) -> Summary:
    """Features and statistics of the clips below ``count``, which the processes share."""
    import torch
    from tqdm import tqdm

    from .metrics.video_statistics import contrast, motion_energy

    numbers: list[int] = []
    rows: dict[str, list[torch.Tensor]] = {}
    shown: list[torch.Tensor] = []
    with tqdm(total=count, unit="video", desc=title, disable=share.rank > 0) as bar:
        for batch in share.batches(count, batch_size):
            video = clips(batch)
            told = {
                "pixels": _pixels(video),
                "contrast": contrast(video).mean(1).cpu(),
                "motion": motion_energy(video).mean(1).cpu(),
            }
            if extractor is not None:
                told["features"] = extractor(video).cpu()
            for name, values in told.items():
                rows.setdefault(name, []).append(values)
            numbers += batch
            shown.append(video[: max(NUM_SHOWN - batch[0], 0)].cpu())
            bar.update(min(len(batch) * share.world_size, count - bar.n))
    whole = share.gather(numbers, {name: torch.cat(parts) for name, parts in rows.items()})
    few = share.gather(
        [number for number in numbers if number < NUM_SHOWN], {"shown": torch.cat(shown)} if shown else {}
    )
    return Summary(
        features=whole.get("features"),
        pixels=whole["pixels"],
        contrast=float(whole["contrast"].double().mean()),
        motion=float(whole["motion"].double().mean()),
        shown=few["shown"],
    )


def _pixels(video: "Tensor") -> "Tensor":
    from .metrics.video_statistics import pixel_features

    return pixel_features(video).cpu()


def _real_clips(dataset: "ClipDataset", device: "torch.device") -> Clips:
    """One random clip of each video, in the data set's endless order."""
    return lambda positions: _clips_at(dataset, positions, device)


def _middle_clips(dataset: "ClipDataset", count: int, device: "torch.device") -> Clips:
    """The middle clips of ``count`` videos, spread evenly."""
    from .data.sampler import Batch, collate, to_batch

    def clips(numbers: list[int]) -> "Tensor":
        items = [dataset.held_out(number * len(dataset) // count) for number in numbers]
        batch = to_batch(collate(items), device)
        assert isinstance(batch, Batch)
        return batch.video

    return clips


def _held_out(
    dataset: "ClipDataset", count: int, batch_size: int, device: "torch.device"
) -> "Iterator[Tensor]":
    """The middle clip of ``count`` videos, spread evenly."""
    from .data.sampler import Batch, held_out_batches

    for batch in held_out_batches(dataset, batch_size=batch_size, num_clips=count, device=device):
        assert isinstance(batch, Batch)
        yield batch.video


def _generated(cfg: DictConfig, model: "DiffusionModel", scale: float) -> Clips:
    """Samples of consecutive seeds, rounded to 8 bits as a file would hold them."""
    from .data.transforms import to_frames, to_video
    from .generation import require_finite
    from .sample import labels_of
    from .training.device import compile_in_place

    generator = model.generator(build(cfg.sampler), guidance_scale=scale, noise_level=cfg.noise_level)
    if cfg.machine.compile:
        compile_in_place(generator.networks())

    def clips(numbers: list[int]) -> "Tensor":
        seeds = [cfg.first_seed + number for number in numbers]
        video = generator.decode(generator.sample_window(seeds, labels_of(model, seeds, None)))
        return to_video(to_frames(require_finite(video.cpu()))).to(generator.device)

    return clips


def _training_pixels(dataset: "ClipDataset", batch_size: int, device: "torch.device") -> "Tensor":
    """Small versions of one clip of each training video (2,048 at most)."""
    import torch

    count, clips = min(len(dataset), 2048), _real_clips(dataset, device)
    return torch.cat(
        [
            _pixels(clips(list(range(begin, min(begin + batch_size, count)))))
            for begin in range(0, count, batch_size)
        ]
    )


def _clips_at(dataset: "ClipDataset", positions: list[int], device: "torch.device") -> "Tensor":
    from .data.sampler import Batch, collate, to_batch

    batch = to_batch(collate([dataset[position] for position in positions]), device)
    assert isinstance(batch, Batch)
    return batch.video


def _reconstruction(
    model: "DiffusionModel", dataset: "ClipDataset", batch_size: int, device: "torch.device"
) -> dict[str, float]:
    """How well held-out clips survive the autoencoder, and how well a still picture would do."""
    import torch

    from .data.transforms import to_frames, to_video
    from .metrics.reconstruction import psnr, ssim

    scores: dict[str, list[torch.Tensor]] = {}

    total, count = torch.zeros((), dtype=torch.float64), 0
    for video in _held_out(dataset, 256, batch_size, device):
        total = total + video.double().cpu().mean(2).sum(0)
        count += len(video)
    mean_frame = (total / count).float()[None, :, None].to(device)
    with torch.no_grad():
        for video in _held_out(dataset, 256, batch_size, device):
            latents = model.autoencoder.encode(video).mean
            decoded = model.autoencoder.decode(latents).clamp(-1, 1)
            rounded = to_video(to_frames(decoded.cpu())).to(device)
            row = {
                "reconstruction_psnr": psnr(rounded, video),
                "reconstruction_ssim": ssim(rounded, video),
                "mean_frame_psnr": psnr(mean_frame.expand_as(video), video),
                "still_frame_psnr": psnr(video.mean(2, keepdim=True).expand_as(video), video),
            }
            for name, values in row.items():
                scores.setdefault(name, []).append(values.cpu())
    return {name: float(torch.cat(values).mean()) for name, values in scores.items()}


def _write_videos(folder: Path, sets: "dict[str, Tensor]", fps: float) -> dict[str, list[str]]:
    """Writes mp4 files under ``evaluation/`` and gives their names relative to the folder."""
    from .data.transforms import to_frames
    from .data.video import write_video

    names: dict[str, list[str]] = {}
    (folder / "evaluation").mkdir(exist_ok=True)
    for title, videos in sets.items():
        names[title] = []
        for i, frames in enumerate(to_frames(videos)):
            name = f"evaluation/{title}_{i:02d}.mp4"
            write_video(folder / name, frames, fps)
            names[title].append(name)
    return names


if __name__ == "__main__":
    main()
