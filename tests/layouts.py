"""Folders laid out as the published data sets unpack to, made of a few real clips."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from src.data.video import VIDEO_EXTENSIONS, iterate_frames, write_video


def clips_in(folder: Path) -> Iterator[Path]:
    """Clips under a folder, sorted by path."""
    return iter(sorted(path for path in folder.rglob("*") if path.suffix in VIDEO_EXTENSIONS))


def as_images(clip: Path, folder: Path, count: int) -> None:
    """Writes the first frames of a clip as JPEGs, numbered from 1 as in the archives."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(islice(iterate_frames(clip), count), start=1):
        Image.fromarray(frame).save(folder / f"{folder.name}_frames_{number:08d}.jpg", quality=95)


def ucf101(shared: Path, root: Path) -> None:
    """``UCF-101/<Class>/v_<Class>_gXX_cYY.avi`` and the lists of split 1."""
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for source in ("ApplyEyeMakeup", "Archery"):
        (clip,) = (shared / "clips/ucf101").glob(f"v_{source}_*.avi")
        folder = root / "UCF-101" / source
        folder.mkdir(parents=True)
        for group in range(1, 5):
            name = f"v_{source}_g{group:02d}_c01.avi"
            (folder / name).symlink_to(clip)
            lists["test" if group == 1 else "train"].append(f"{source}/{name}")
    (root / "ucfTrainTestlist").mkdir()
    for split, names in lists.items():
        label = " 1" if split == "train" else ""
        text = "\r\n".join(name + label for name in names) + "\r\n"
        (root / "ucfTrainTestlist" / f"{split}list01.txt").write_text(text)


def ucf101_frames(shared: Path, root: Path) -> None:
    """``train/v_<Class>_gXX_cYY/*.jpg`` and ``test/…``, as in the release of LVDM."""
    for source in ("ApplyEyeMakeup", "Archery"):
        (clip,) = (shared / "clips/ucf101").glob(f"v_{source}_*.avi")
        for split, groups in (("train", (8, 9, 10)), ("test", (1,))):
            for group in groups:
                as_images(clip, root / split / f"v_{source}_g{group:02d}_c01", 24)


def sky(shared: Path, root: Path) -> None:
    """``sky_train/<video>/<clip>/*.jpg`` and ``sky_test/…``, one of them too short."""
    clips = clips_in(shared / "clips_sky/real")
    for part, videos in (("sky_train", 3), ("sky_test", 1)):
        for video in range(videos):
            for number in range(2):
                as_images(next(clips), root / part / f"video{video}" / f"video{video}_{number}", 24)
    as_images(next(clips), root / "sky_train/video0/video0_2", 5)


def taichi(shared: Path, root: Path) -> None:
    """``train/<id>#<start>#<end>.mp4`` and ``test/…``, squares."""
    clips = clips_in(shared / "clips/human_motion")
    for split, count in (("train", 5), ("test", 2)):
        for number in range(count):
            frames = list(islice(iterate_frames(next(clips)), 32))
            square = [Image.fromarray(frame).resize((128, 128)) for frame in frames]
            path = root / split / f"aDyyTMUBoLE#{number:06d}#{number + 32:06d}.mp4"
            write_video(path, np.stack([np.asarray(image) for image in square]), 25)


LAYOUTS = {"ucf101": ucf101, "ucf101_frames": ucf101_frames, "sky": sky, "taichi": taichi}
