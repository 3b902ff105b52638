"""The embedded data set: procedural scenes, rendered once to mp4 files, and read back as any videos are."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .clips import ClipDataset, VideoEntry, in_parallel
from .folder import check_split
from .sampler import derive_seed
from .sprites import CLASSES, SCENE_VERSION, Scene, make_scene, render_scene
from .storage import exclusive, read_json, write_json
from .transforms import Frames, as_size
from .video import VideoWriter

# Low, so that thin colours survive the halved chroma of 4:2:0.
CRF = 12


def scene(scene_seed: int, split: str, index: int, aspect: float, varied_sky: bool = False) -> Scene:
    """Draw the scene of one video, a function of (seed, split, index); the classes take turns."""
    generator = np.random.default_rng(derive_seed(scene_seed, index, f"synthetic {split}"))
    return make_scene(generator, index % len(CLASSES), aspect, varied_sky)


def render(
    scene_seed: int,
    split: str,
    index: int,
    num_frames: int,
    resolution: int | Sequence[int],
    varied_sky: bool = False,
) -> Frames:
    """Draw one video as frames uint8 ``t h w c``, as they are before encoding."""
    height, width = as_size(resolution)
    what = scene(scene_seed, split, index, width / height, varied_sky)
    return np.concatenate(list(render_scene(what, num_frames, (height, width))))


def _name(split: str, index: int) -> str:
    return f"{split}/{CLASSES[index % len(CLASSES)]}/{index:06d}.mp4"


def synthetic(
    root: str,
    *,
    split: str,
    num_videos: int,
    num_test_videos: int,
    num_frames_per_video: int,
    video_fps: float,
    scene_seed: int,
    varied_sky: bool = False,
    num_frames: int,
    frame_stride: int,
    resolution: int | tuple[int, int],
    horizontal_flip: bool,
    seed: int,
    cache: str | None,
    strict: bool,
) -> ClipDataset:
    """Clips of coloured shapes that fly before a drifting sky: 6 classes, rendered on first use.

    A disc, square or triangle, in half the classes with a dark moon that passes behind it; straight motion,
    mirrored at the borders. ``num_videos`` for training and ``num_test_videos`` for testing, each of
    ``num_frames_per_video`` frames, are written as mp4 under ``root``, in a folder of their own for each set
    of parameters, with a ``manifest.json`` that tells classes, parameters and every sprite's motion. A video
    depends on (scene_seed, split, index) only: a larger number adds videos and leaves those that are there.
    With ``varied_sky`` each has a sky of its own hue and brightness, which stays as long as the video.

    ``seed`` is that of the clips' order and places. Raises ValueError for numbers that make no videos.
    """
    check_split(split)
    height, width = as_size(resolution)
    numbers = {"train": num_videos, "test": num_test_videos}
    if min(*numbers.values(), num_frames_per_video, video_fps) <= 0:
        raise ValueError(
            "the synthetic data set needs num_videos, num_test_videos, num_frames_per_video and video_fps "
            f"above 0; got {num_videos}, {num_test_videos}, {num_frames_per_video}, {video_fps}"
        )
    parameters = {
        "scene_version": SCENE_VERSION,
        "scene_seed": scene_seed,
        "num_frames": num_frames_per_video,
        "fps": float(video_fps),
        "height": height,
        "width": width,
        "crf": CRF,
    }
    if varied_sky:
        parameters["varied_sky"] = True
    key = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(root) / f"{height}x{width}-{num_frames_per_video}frames-{key}"
    jobs = [(which, index) for which, number in numbers.items() for index in range(number)]
    sizes = _rendered(folder, jobs, parameters)
    # 4:2:0 has even sizes only: the file of an odd one is a row or column larger, and cropped at reading.
    entries = [
        VideoEntry(
            path=str(folder / _name(which, index)),
            label=index % len(CLASSES),
            num_frames=num_frames_per_video,
            fps=float(video_fps),
            num_bytes=sizes[_name(which, index)],
        )
        for which, index in jobs
        if split in (which, "all")
    ]
    return ClipDataset(
        entries,
        CLASSES,
        num_frames=num_frames,
        frame_stride=frame_stride,
        resolution=(height, width),
        crop="center_crop",
        horizontal_flip=horizontal_flip,
        seed=seed,
        cache=cache,
        strict=strict,
        name="synthetic",
    )


def _rendered(folder: Path, jobs: Sequence[tuple[str, int]], parameters: dict[str, Any]) -> dict[str, int]:
    """Render the videos that aren't there yet; returns the sizes of all that are asked for, in bytes.

    Each file appears whole or not at all, so an interrupted rendering goes on where it stopped.
    """
    manifest_file = folder / "manifest.json"
    with exclusive(folder / ".lock"):
        manifest = read_json(manifest_file) or {"videos": {}}
        known = {name: video["num_bytes"] for name, video in manifest["videos"].items()}

        def size(name: str) -> int | None:
            try:
                return (folder / name).stat().st_size
            except FileNotFoundError:
                return None

        sizes = {_name(*job): size(_name(*job)) for job in jobs}
        # A file that isn't as the manifest says was touched; one without an entry was written before an end.
        missing = [
            job
            for job in jobs
            if sizes[_name(*job)] is None or known.get(_name(*job), sizes[_name(*job)]) != sizes[_name(*job)]
        ]

        def render_one(job: tuple[str, int]) -> None:
            what = _scene_of(parameters, *job)
            resolution = (parameters["height"], parameters["width"])
            # Files of another size than the manifest's are rendered again: no need to wait for the disk.
            with VideoWriter(
                folder / _name(*job), parameters["fps"], crf=CRF, preset="veryfast", durable=False
            ) as writer:
                for frames in render_scene(what, parameters["num_frames"], resolution):
                    writer.write(frames)

        for _ in in_parallel(render_one, missing, "rendering videos"):
            pass
        for job in missing:
            sizes[_name(*job)] = os.path.getsize(folder / _name(*job))
        found = {name: number for name, number in sizes.items() if number is not None}
        if any(known.get(name) != number for name, number in found.items()):
            _write_manifest(manifest_file, manifest["videos"], jobs, found, parameters)
    return found


def _scene_of(parameters: dict[str, Any], split: str, index: int) -> Scene:
    aspect = parameters["width"] / parameters["height"]
    return scene(parameters["scene_seed"], split, index, aspect, parameters.get("varied_sky", False))


def _write_manifest(
    path: Path,
    videos: dict[str, Any],
    jobs: Sequence[tuple[str, int]],
    sizes: dict[str, int],
    parameters: dict[str, Any],
) -> None:
    for which, index in jobs:
        what = _scene_of(parameters, which, index)
        name = _name(which, index)
        videos[name] = {
            "split": which,
            "class": CLASSES[what.label],
            "num_bytes": sizes[name],
            "sprites": [asdict(sprite) for sprite in what.sprites],
            "clouds": asdict(what.clouds),
        }
        if what.sky:
            videos[name]["sky"] = asdict(what.sky)
    write_json(
        path,
        {
            "about": "lengths in picture heights from the upper left corner, speeds in heights per frame; a "
            "sprite flies straight, mirrored where its circle would leave the picture; depth 1 is in front",
            "parameters": parameters,
            "classes": list(CLASSES),
            "videos": videos,
        },
    )
