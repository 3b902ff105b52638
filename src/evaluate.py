"""Measure a model or some videos: ``python -m src.evaluate model=runs/ucf101/model dataset=ucf101``."""

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

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
    from torch import Tensor, nn

    from .data.clips import ClipDataset
    from .data.transforms import Resize
    from .evaluation.checking import NearestClips
    from .evaluation.comparing import Following, Videos
    from .evaluation.measuring import ClipSet
    from .metrics.drift import Drift
    from .metrics.features import FeatureExtractor
    from .metrics.protocol import Protocol
    from .model_folder import DataRecord, DiffusionModel
    from .training.share import Share


@dataclass
class Measured:
    """All that an evaluation has found out."""

    metrics: dict[str, float]
    uncertainty: dict[str, dict[str, Any]]
    shown: "dict[str, Tensor]"
    copies: "NearestClips"
    drift: "Drift | None"
    notes: list[str]


@verb("evaluate", EvaluateConfig)
def main(cfg: DictConfig) -> None:
    """Writes ``evaluation.json``: distances by their protocol, plain statistics, reconstruction."""
    from .data.storage import read_json
    from .evaluation.comparing import Following, clip_step
    from .evaluation.measuring import Measuring
    from .model_folder import fingerprint, load_diffusion
    from .training.device import pick_device
    from .training.share import Share

    check_request(cfg)
    cfg.first_seed += 1_000_000 * cfg.seed
    protocol: Protocol = build(cfg.protocol)
    share, device = Share(), pick_device(keeps_memory=cfg.model is not None and cfg.num_frames is None)
    output = output_path(cfg)
    model = None if cfg.model is None else load_diffusion(cfg.model).to(device)
    node = clip_geometry(cfg.dataset, None if model is None else short_videos_of(model), protocol)
    source = cfg.videos
    if cfg.num_frames is not None:
        source, model = long_samples(cfg, protocol, output, share), None
    extractor = extractor_of(cfg, protocol, node["num_frames"], device)
    perceptual = None if cfg.perceptual is None else build(cfg.perceptual).to(device)
    with share.first_alone():
        real = build(node, split=protocol.split, seed=0)
        training = real if protocol.split == "train" else build(node, split="train", seed=0)
        held_out = held_out_part(node)
        given = None if source is None else videos_given(source, protocol, real)
    made_by: dict[str, Any]
    if model is not None:
        made_by = recipe(cfg, share.from_first(lambda: fingerprint(Path(cfg.model)))) | {"step": model.step}
        generated = sampled(cfg, model, made_by, following_clips(protocol, real))
    else:
        assert given is not None
        clip_step(given, range(len(given)), cfg.num_positions)
        made_by = {"content": share.from_first(lambda: given.fingerprint), "summary": given.summary()}
        if cfg.num_frames is not None:
            made_by["samples"] = (read_json(Path(source) / "samples.json") or {}).get("made_by")
        generated = from_files(given, made_by["content"], protocol)
    following = Following(
        protocol,
        Measuring(share, cfg.batch_size, device),
        extractor,
        real,
        share.from_first(lambda: real.fingerprint),
        generated,
        None if given is None else len(given),
    )
    measured = measure(cfg, following, training, held_out, model, given, made_by, perceptual)
    share.close()
    if share.rank == 0:
        write(output, following, measured, training, made_by)
        print_result(following, measured)
        print(f"written to {output}")


def long_samples(cfg: DictConfig, protocol: "Protocol", output: Path, share: "Share") -> str:
    """The folder, beside the result, with long videos made by a plan: as many as are measured."""
    from .sample import make_videos

    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    shared = ("model", "first_seed", "batch_size", "num_frames", "noise_level", "decoding_window", "machine")
    settings = {key: plain[key] for key in (*shared, "guidance", "plan", "interpolation", "sampler")}
    settings |= {"num_samples": protocol.num_generated, "labels": None, "video": None, "direction": "forward"}
    folder = output.with_name(f"{output.stem}_samples")
    make_videos(OmegaConf.create(settings | {"loop": False, "dry_run": False}), folder, share)
    return str(folder)


def check_request(cfg: DictConfig) -> None:
    """Raises ConfigError for options that can't be, or don't go together."""
    from .metrics.uncertainty import LEAST_REPLICATES

    if (cfg.model is None) == (cfg.videos is None):
        raise ConfigError("give either model=FOLDER (videos are sampled) or videos=PATH (made before)")
    for name, least in (
        ("num_replicates", 0),
        ("num_reconstructed", 0),
        ("num_candidates", 1),
        ("num_positions", 1),
        ("seed", 0),
        ("first_seed", 0),
    ):
        if cfg[name] is not None and cfg[name] < least:
            raise ConfigError(f"{name} must be at least {least}, got {cfg[name]}")
    if cfg.num_positions != 1 and cfg.videos is None and cfg.num_frames is None:
        raise ConfigError(
            f"num_positions={cfg.num_positions} is for long videos: give videos=FOLDER, or num_frames=NUMBER "
            "to have them sampled by a plan"
        )
    if cfg.num_frames is not None and (
        cfg.model is None or cfg.compare_untrained or cfg.perceptual is not None
    ):
        raise ConfigError(
            f"num_frames={cfg.num_frames} has long videos sampled from model=FOLDER and measured: it goes "
            "with neither videos=PATH, nor compare_untrained=true, nor perceptual, which are about short ones"
        )
    if cfg.compare_untrained and cfg.model is None:
        raise ConfigError("compare_untrained=true needs model=FOLDER, there is no network behind videos=PATH")
    if cfg.perceptual is not None and cfg.model is None:
        raise ConfigError(
            "perceptual measures reconstructions: it needs model=FOLDER, videos=PATH has no autoencoder"
        )
    features = cfg.protocol.features
    if features is not None and 0 < cfg.num_replicates < LEAST_REPLICATES:
        raise ConfigError(
            f"percentiles need at least {LEAST_REPLICATES} replicates, got num_replicates="
            f"{cfg.num_replicates}; 0 does without"
        )
    if features is None and cfg.weights is not None:
        raise ConfigError(
            f"weights={cfg.weights} are a feature extractor's, and protocol.features=null has none; leave "
            "one away"
        )


def measure(
    cfg: DictConfig,
    following: "Following",
    training: "ClipDataset",
    held_out: "ClipDataset | None",
    model: "DiffusionModel | None",
    given: "Videos | None",
    made_by: dict[str, Any],
    perceptual: "nn.Module | None",
) -> Measured:
    """Everything that needs the processes; each of them gets the whole."""
    from .evaluation.checking import nearest_clips, plain_statistics, reconstruction
    from .evaluation.comparing import distances
    from .evaluation.measuring import NUM_SHOWN
    from .model_folder import load_diffusion

    protocol, extractor = following.protocol, following.extractor
    result = following.result(cfg.num_replicates)
    metrics = result.metrics
    real = following.real_rows(protocol.seeds[0])
    others = {"generated": following.generated_rows(protocol.seeds[0])}
    if cfg.compare_untrained:
        untrained = load_diffusion(cfg.model, trained=False).to(following.measuring.device)
        initial = made_by | {"untrained": True}
        clips = sampled(cfg, untrained, initial, following_clips(protocol, following.real))
        others["untrained"] = following.rows_of(clips(protocol.seeds[0], following.num_generated))
        if extractor is not None:
            told = distances(real["features"], others["untrained"]["features"], protocol)
            metrics |= {f"{following.comparison.name(metric)}_untrained": told[metric] for metric in told}
    metrics |= plain_statistics(real, others)
    copies = nearest_clips(following, training, held_out, others["generated"], cfg.num_candidates, NUM_SHOWN)
    metrics |= copies.metrics
    drift = None
    if given is not None and cfg.num_positions > 1:
        drift = following.drift(given, made_by["content"], cfg.num_positions)
    if model is not None and held_out is not None and cfg.num_reconstructed:
        metrics |= reconstruction(
            model.autoencoder,
            made_by["weights_sha256"],
            held_out,
            following.measuring,
            cfg.num_reconstructed,
            extractor,
            perceptual,
        )
    shown = {"real": real["shown"], "generated": others["generated"]["shown"], "nearest": copies.frames}
    notes = notes_on(following, model, given)
    if copies.of_held_out is None:
        notes.append("no videos are held out from training: nothing stands beside the nearest clips")
    return Measured(metrics, result.uncertainty, shown, copies, drift, notes)


def notes_on(following: "Following", model: "DiffusionModel | None", given: "Videos | None") -> list[str]:
    """What has to be known of the numbers, in words."""
    from .metrics.i3d_weights import WEIGHTS_SHA256

    notes = [*following.notes, *following.suspicions()]
    if model is not None:
        notes += differences(following.real, model)
    if getattr(given, "too_short", None) or getattr(given, "broken", None):
        assert given is not None
        notes.append(f"not all given videos could be used: {given.summary()}")
    extractor = following.extractor
    if extractor is not None and extractor.name == "i3d" and extractor.weights_sha256 != WEIGHTS_SHA256:
        notes.append(
            "the I3D weights aren't exactly those of TF-Hub: compare only with numbers of the same file"
        )
    if extractor is not None and extractor.name != "i3d":
        notes.append(
            f"the weights of {extractor.name} can't be checked by a known answer: the result names them by "
            "their checksum; compare only with numbers of the same"
        )
    if following.real.broken:
        count = len(following.real.broken)
        notes.append(f"{count:,} real videos are broken and left out, see python -m src.prepare")
    return notes


def write(
    output: Path,
    following: "Following",
    measured: Measured,
    training: "ClipDataset",
    made_by: dict[str, Any],
) -> None:
    """Writes the record, the first videos of each side, and the table of nearest training clips."""
    from .data.storage import write_json

    protocol, copies = following.protocol, measured.copies
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "metrics": measured.metrics,
        "uncertainty": measured.uncertainty,
        "protocol": protocol.to_dict()
        | {"digest": protocol.digest, "sentence": following.comparison.sentence()},
        "comparison": comparison_record(following),
        "generated": made_by,
        "drift": None if measured.drift is None else measured.drift.to_dict(),
        "copies": {"space": copies.space, "num_candidates": copies.num_candidates},
        "videos": write_videos(shown_folder(output), measured.shown, following.real.fps),
        "notes": measured.notes,
        "software": software(),
        "created": now(),
    }
    write_nearest(shown_folder(output) / "nearest.csv", copies, training)
    write_json(output, record)


def clip_geometry(
    dataset: DictConfig, record: "DataRecord | None", protocol: "Protocol | None" = None
) -> dict[str, Any]:
    """The dataset node with the protocol's clips, and what both leave open (null) as in the model's training.

    Raises:
        ConfigError: if the data set's options contradict the protocol, or nobody says what a clip is.
    """
    node: Any = OmegaConf.to_container(dataset, resolve=True)
    for fact, rule in (("num_frames", "num_frames"), ("frame_stride", "real_stride")):
        asked = None if protocol is None else getattr(protocol, rule)
        if asked is None:
            continue
        if node.get(fact) not in (None, asked):
            raise ConfigError(
                f"dataset.{fact}={node[fact]}, but the protocol has protocol.{rule}={asked}; leave "
                f"dataset.{fact} away, or change the protocol: protocol.{rule}={node[fact]}"
            )
        node[fact] = asked
    told = node.get("frame_stride") or node.get("fps")
    if record is not None and record.target_fps and not told:
        if "fps" not in node:
            raise ConfigError(
                f"the model was trained at {record.target_fps:g} frames per second, and dataset "
                f"{node['_target_']} can't be read at a rate; give dataset.frame_stride"
            )
        node["fps"] = record.target_fps
    if record is None and node.get("frame_stride") is None:
        node["frame_stride"] = 1  # videos that were made before are taken frame by frame, too
    for fact in CLIP_FACTS:
        if node.get(fact) is None:
            if record is None:
                raise ConfigError(f"dataset.{fact} must be given, as there is no model to take it from")
            value = getattr(record, fact)
            node[fact] = list(value) if fact == "resolution" else value
    if protocol is not None and record is not None and record.num_frames < node["num_frames"]:
        raise ConfigError(
            f"the model makes clips of {record.num_frames} frames, fewer than the {node['num_frames']} that "
            f"are compared; use protocol.num_frames={record.num_frames}, or sample longer videos first "
            "(src.sample num_frames=…) and give them as videos=FOLDER"
        )
    return {str(key): value for key, value in node.items()}


def short_videos_of(model: "DiffusionModel") -> "DataRecord":
    """The data of a model, in clips as long as the videos that one window of it makes.

    Raises:
        ConfigError: if it makes none, but key latents.
    """
    if 1 not in model.latent_strides:
        raise ConfigError(
            f"this model makes key latents, {model.latent_strides[-1]} latent frames apart, and no short "
            "videos: sample "
            "long ones (src.sample plan=hierarchical interpolation.model=FOLDER) and give them as "
            "videos=FOLDER"
        )
    return replace(model.data, num_frames=model.window[1] * model.autoencoder.downsample[0])


def held_out_part(node: dict[str, Any]) -> "ClipDataset | None":
    """The test split; None if it holds no clip."""
    try:
        dataset: ClipDataset = build(node, split="test", seed=0)
    except (ValueError, FileNotFoundError):
        return None
    return dataset


def output_path(cfg: DictConfig) -> Path:
    """Where the result goes: beside the model folder, or beside the given videos.

    Raises:
        ConfigError: if it would be taken for one of the given videos the next time.
    """
    several = isinstance(cfg.videos, ListConfig) or (cfg.videos is not None and "*" in cfg.videos)
    if cfg.output:
        output = Path(cfg.output)
    elif cfg.videos is None:
        output = Path(cfg.model).parent / "evaluation.json"
    elif several:
        raise ConfigError("several videos lie in no one place; give output=FILE.json")
    else:
        source = Path(cfg.videos).resolve()
        output = source.with_name(f"{source.name}_evaluation") / "evaluation.json"
    given = list(cfg.videos) if isinstance(cfg.videos, ListConfig) else [cfg.videos]
    read = [("videos", name.partition("*")[0] if "*" in name else name) for name in given if name]
    read += [("dataset.root", cfg.dataset.get("root"))]
    shown_folder(output)
    for option, name in read:
        if name and Path(name).resolve() in (output.resolve(), *output.resolve().parents):
            raise ConfigError(
                f"the result would lie at {output}, inside {option}={name}, where its videos would be read "
                "the next time; choose another place: output=FILE.json"
            )
    return output


def shown_folder(output: Path) -> Path:
    """Where the videos and the table of a result lie: beside it, under its name.

    Raises:
        ConfigError: if the result's own place is a folder, or that folder holds anything else.
    """
    if output.is_dir():
        raise ConfigError(f"output={output} is a folder; name a file: output={output}/evaluation.json")
    folder = output.with_suffix("") if output.suffix else output.with_name(f"{output.name}_videos")
    inside = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in inside if not (name.endswith(".mp4") or "nearest.csv" in name)]
    if foreign or folder.is_file():
        raise ConfigError(
            f"the videos of output={output} would go into {folder}, which holds "
            f"{(foreign or ['a file'])[0]}; choose another name"
        )
    return folder


def extractor_of(
    cfg: DictConfig, protocol: "Protocol", num_frames: int, device: "torch.device"
) -> "FeatureExtractor | None":
    """The protocol's feature extractor; None if it has none.

    Raises:
        ConfigError: if clips are too short for it.
    """
    from .metrics.features import load_extractor

    if protocol.features is None:
        return None
    extractor = load_extractor(protocol.features, resize=protocol.resize, weights=cfg.weights, device=device)
    if num_frames < extractor.min_frames:
        raise ConfigError(
            f"{extractor.name} needs at least {extractor.min_frames} frames, clips here have {num_frames}; "
            "measure longer ones (protocol.num_frames), or do without features: protocol.features=null"
        )
    return extractor


def videos_given(source: Any, protocol: "Protocol", real: "ClipDataset") -> "Videos":
    """Videos that were made before, frame by frame as they stand, in the size of the real ones."""
    from .data.given import given_videos

    return given_videos(
        list(source) if isinstance(source, ListConfig) else source,
        num_frames=real.num_frames,
        frame_stride=protocol.generated_stride,
        resolution=real.resolution,
        crop=real.resize.mode,
    )


def from_files(videos: "Videos", content: str, protocol: "Protocol") -> "Callable[[int, int], ClipSet]":
    """Given videos as the generated side: all of them, or of more than are needed a choice of each seed."""
    from .data.choice import order_of_videos
    from .evaluation.comparing import chosen_clips

    def clips(seed: int, count: int) -> "ClipSet":
        items = list(range(len(videos)))
        if len(videos) > count:
            # In the order of the files, which may be slow to go back in.
            items = sorted(order_of_videos([-1] * len(videos), "shuffled", seed)[:count])
        return chosen_clips(videos, items, protocol.generated_clip, seed, "generated", content)

    return clips


def recipe(cfg: DictConfig, weights: str) -> dict[str, Any]:
    """All that decides what a sample of a given seed looks like."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    decisive = ("sampler", "guidance", "noise_level", "first_seed")
    return {"weights_sha256": weights} | {key: plain[key] for key in decisive}


@dataclass(frozen=True)
class WantedClips:
    """What a sample is made into: so many frames, so far apart, of one size."""

    num_frames: int
    stride: int
    resize: "Resize"


def following_clips(protocol: "Protocol", real: "ClipDataset") -> WantedClips:
    """Clips of the generated side, like the real ones."""
    return WantedClips(real.num_frames, protocol.generated_stride, real.resize)


def sampled(
    cfg: DictConfig,
    model: "DiffusionModel",
    made_by: dict[str, Any],
    wanted: "WantedClips",
) -> "Callable[[int, int], ClipSet]":
    """Samples of a model as the generated side, rounded to 8 bits as a file would hold them.

    They are brought to the size of the real clips, as files are. Sample n of the protocol's seed s, N in all,
    has the seed ``first_seed + s N + n``.
    """
    import numpy as np
    import torch

    from .data.transforms import to_frames
    from .evaluation.measuring import ClipSet
    from .generation import require_finite
    from .request import interval_of
    from .sample import labels_of
    from .training.device import compile_in_place

    machine: MachineSettings = typed(cfg, "machine", MachineSettings)
    guidance: GuidanceSettings = typed(cfg, "guidance", GuidanceSettings)
    generator = model.generator(
        build(cfg.sampler),
        guidance_scale=guidance.scale,
        guidance_interval=interval_of("guidance.interval", guidance.interval),
        noise_level=cfg.noise_level,
    )
    if machine.compile:
        compile_in_place(generator.networks())
    span, whole = (wanted.num_frames - 1) * wanted.stride + 1, short_videos_of(model).num_frames
    if span > whole:
        raise ConfigError(
            f"{wanted.num_frames} frames {wanted.stride} apart are more than the model's {whole}; use a "
            "smaller "
            "protocol.generated_stride"
        )

    def clips(seed: int, count: int) -> "ClipSet":
        begin = cfg.first_seed + seed * count

        def frames(numbers: list[int]) -> "Tensor":
            seeds = [begin + number for number in numbers]
            video = generator.decode(generator.sample_window(seeds, labels_of(model, seeds, None)))
            kept = to_frames(require_finite(video.cpu())[:, :, : span : wanted.stride])
            if kept.shape[2:4] != (wanted.resize.height, wanted.resize.width):
                kept = np.stack([[wanted.resize(frame) for frame in clip] for clip in kept])
            return torch.from_numpy(kept)

        size = [wanted.resize.height, wanted.resize.width, wanted.resize.mode]
        key = made_by | {"set": "samples", "begin": begin, "frames": [span, wanted.stride], "size": size}
        return ClipSet("generated", count, frames, key)

    return clips


def differences(dataset: "ClipDataset", model: "DiffusionModel") -> list[str]:
    """What of the data differs from the model's training, in words."""
    pairs = {
        "data set": (model.data.name, dataset.name),
        "content": (model.data.fingerprint, dataset.fingerprint),
        "frames": (short_videos_of(model).num_frames, dataset.num_frames),
        "stride": (model.data.frame_stride, dataset.frame_stride),
        "frame rate asked for": (model.data.target_fps, dataset.sampling.fps),
        "resolution": (list(model.data.resolution), list(dataset.resolution)),
    }
    return [
        f"{what} differs from the model's training: {trained} there, {here} here"
        for what, (trained, here) in pairs.items()
        if trained != here
    ]


def comparison_record(following: "Following") -> dict[str, Any]:
    """What was compared with what, ready for JSON; equal digests may stand in one column."""
    from .evaluation.measuring import identity

    told = asdict(following.comparison)
    del told["protocol"]
    return told | {
        "resolution": list(following.comparison.resolution),
        "digest": following.comparison.digest,
        "features": identity(following.extractor),
    }


def software() -> dict[str, str]:
    """Versions that numbers may depend on in their last digits."""
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version(), "torch": version("torch"), "av": version("av")}


def now() -> str:
    """The time, to the second."""
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")


def write_videos(folder: Path, sets: "dict[str, Tensor]", fps: float) -> dict[str, list[str]]:
    """Writes mp4 files into a folder and gives their names relative to where it lies."""
    from .data.video import write_video

    names: dict[str, list[str]] = {}
    folder.mkdir(exist_ok=True)
    for title, clips in sets.items():
        names[title] = []
        for i, frames in enumerate(clips.numpy()):
            path = folder / f"{title}_{i:02d}.mp4"
            write_video(path, frames, fps)
            names[title].append(f"{folder.name}/{path.name}")
    return names


def write_nearest(path: Path, copies: "NearestClips", training: "ClipDataset") -> None:
    """Writes a table with the nearest training clip of every sample, nearest first."""
    from .data.storage import atomic_path

    rows = sorted(
        (float(distance), sample, training.entries[int(item)].path)
        for sample, (distance, item) in enumerate(zip(copies.distances, copies.items, strict=True))
    )
    with (
        atomic_path(path) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        table = csv.writer(file)
        table.writerow(["sample", "distance", "training_video"])
        table.writerows([sample, f"{distance:.6g}", video] for distance, sample, video in rows)


def print_result(following: "Following", measured: Measured) -> None:
    """The result for people: each distance beside its uncertainty and its floor."""
    print(following.comparison.sentence())
    for note in measured.notes:
        print(f"note: {note}")
    for name, value in measured.metrics.items():
        told = measured.uncertainty.get(name, {})
        beside = []
        if "deviation_over_seeds" in told:
            beside.append(f"± {told['deviation_over_seeds']:.3g} over {len(told['by_seed'])} seeds")
        if "bootstrap" in told:
            low, high = told["bootstrap"]["interval_95"]
            beside.append(f"95 % of draws within {low:.4g} … {high:.4g}")
        if "floor" in told:
            measured_on = told["floor_measured_on"]
            here = [following.num_real, following.num_generated]
            by = "" if measured_on == here else f" (extrapolated from {measured_on[0]})"
            beside.append(f"real against real {told['floor']:.4g}{by}")
        print(f"  {name:45} {value:.4g}{'   ' if beside else ''}{'; '.join(beside)}")
    if measured.drift is not None:
        print_drift(measured.drift)


def print_drift(along: "Drift") -> None:
    """What time does to long videos, for people."""
    print(f"along time, by clip of {along.num_frames} frames (band: where 90 % of the real clips lie):")
    for name, distance in along.distances.items():
        values = " ".join(f"{value:.4g}" for value in distance.values)
        floor = "" if distance.floor is None else f"   real against real {distance.floor:.4g}"
        print(f"  {name:25} {values}{floor}")
    for name, curve in along.statistics.items():
        values = " ".join(f"{value:.3g}" for value in curve.median)
        left = "inside" if curve.left_at is None else f"outside from clip {curve.left_at}"
        print(f"  {name:25} {values}   band {curve.band[0]:.3g} … {curve.band[1]:.3g}: {left}")
    if along.changes:
        print("share of videos gone further from their own first clip than 95 % of real ones do:")
    for name, change in along.changes.items():
        print(f"  {name:25} {' '.join(f'{share:.2f}' for share in change.share_beyond)}")
    if (blocks := along.blocks) is not None:
        of_real = "" if blocks.real_nearest is None else f" (in real ones {blocks.real_nearest[0]:.3g})"
        print(
            f"{blocks.share_slow:.1%} of the blocks of {blocks.num_frames} frames move less than half as "
            f"much as real clips; the nearest two of a video are {blocks.nearest[0]:.3g} apart{of_real}, "
            "copies 0"
        )


if __name__ == "__main__":
    main()
