"""Any folder of videos: nested folders are classes, a folder of frame images is a video."""

import hashlib
from pathlib import Path

from .clips import ClipDataset, find_videos, list_videos

SPLITS = ("train", "test", "all")


def check_split(split: str) -> None:
    """Refuse a split that isn't one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")


def split_by_name(names: list[str], test_fraction: float, split: str) -> list[str]:
    """Pick the videos of a split by a hash of their names.

    So it is the same on any machine, and new files hardly move it.
        The test split has ``test_fraction`` of the videos, but at least one if the fraction isn't zero.
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction must be in [0, 1), got {test_fraction}")
    if split == "all":
        return names
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    count = max(1, round(len(names) * test_fraction)) if test_fraction > 0 else 0
    test = set(by_hash[:count])
    return [name for name in names if (name in test) == (split == "test")]


def folder(
    root: str | None,
    *,
    split: str,
    test_fraction: float,
    num_frames: int,
    frame_stride: int,
    resolution: int | tuple[int, int],
    crop: str,
    horizontal_flip: bool,
    seed: int,
    cache: str | None,
    strict: bool,
) -> ClipDataset:
    """Clips of all videos under ``root``; the folder that a video lies in is its class.

    If ``root`` holds the folders ``train`` and ``test``, these are the splits; else ``test_fraction`` of the
    videos, chosen by a hash of their names, is kept for testing.

    Raises FileNotFoundError if there are no videos, ValueError if none is long enough.
    """
    check_split(split)
    hint = (
        "Put videos there (mp4, avi, mkv, webm, …) or folders of frame images (jpg, png, …), in sub-folders\n"
        "by class if there are classes; or point to another folder and check it:\n"
        "    python -m src.prepare dataset=folder dataset.root=PATH"
    )
    if root is None or not Path(root).is_dir():
        where = "dataset.root is not set" if root is None else f"there is no folder {root}"
        raise FileNotFoundError(f"no videos: {where}.\n{hint}")
    names = list_videos(root)
    if not names:
        raise FileNotFoundError(f"no videos: the folder {root} holds none.\n{hint}")
    tops = {name.split("/", 1)[0] for name in names}
    if tops >= {"train", "test"}:
        chosen = [name for name in names if split == "all" or name.split("/", 1)[0] == split]
        depth = 1
    else:
        chosen = split_by_name(names, test_fraction, split)
        depth = 0
    if not chosen:
        raise ValueError(
            f"the split {split!r} of {root} is empty: it has {len(names)} videos and dataset.test_fraction="
            f"{test_fraction:g}; raise the fraction, add videos, or use dataset.split=all"
        )

    def class_of(name: str) -> str:
        return "/".join(name.split("/")[depth:-1])

    # The whole folder's classes, so that a label means the same in every split.
    found = find_videos(root, strict=strict, names=names, class_of=class_of)
    wanted = {str(Path(root) / name) for name in chosen}
    return ClipDataset(
        [entry for entry in found.entries if entry.path in wanted],
        found.classes,
        num_frames=num_frames,
        frame_stride=frame_stride,
        resolution=resolution,
        crop=crop,
        horizontal_flip=horizontal_flip,
        seed=seed,
        cache=cache,
        strict=strict,
        name=str(root),
        broken=[error for error in found.broken if error.path in wanted],
    )
