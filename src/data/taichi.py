"""Taichi-HD: people doing Tai chi, cropped to squares (Siarohin et al., NeurIPS 2019)."""

from pathlib import PurePosixPath
from typing import Unpack

from .clips import ClipDataset, ClipOptions, find_videos
from .counts import Count
from .folder import check_split, left_outside, require_videos

SUBSETS = ("all", "split")

HINT = """\
There is no archive: the scripts of https://github.com/AliaksandrSiarohin/video-preprocessing cut the videos
out of YouTube by the list taichi-metadata.csv, which comes with them:
    python load_videos.py --metadata taichi-metadata.csv --format .mp4 --out_folder ROOT --workers 8
(--format .png gives folders of frames, about 80 GB). This makes
    ROOT/train/*.mp4    ROOT/test/*.mp4    (or a folder of .png frames in place of each .mp4)
Then check and prepare it:
    python -m src.prepare dataset=taichi dataset.root=ROOT"""


def taichi(
    root: str | None,
    *,
    split: str,
    subset: str,
    **clips: Unpack[ClipOptions],
) -> ClipDataset:
    """Clips of Taichi-HD, without classes.

    With ``subset`` "all", as in the LVDM paper, every split is both folders; with "split" training is on
    train and testing on test.

    Raises FileNotFoundError, which tells where to get it, if it isn't there.
    """
    check_split(split)
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset {subset!r} of Taichi-HD; choose one of: {', '.join(SUBSETS)}")
    left_out: dict[str, str] = {}
    names = require_videos(root, "Taichi-HD", HINT, left_out)
    parts = ("train", "test") if "all" in (subset, split) else (split,)
    chosen = [name for name in names if set(parts) & set(name.split("/")[:-1])]
    outside = [name for name in names if not set(SIZES) & set(name.split("/")[:-1])]
    left_out |= left_outside(str(root), outside, tuple(SIZES))
    if not chosen:
        raise FileNotFoundError(
            f"no Taichi-HD: {root} holds {len(names)} videos, but none in {' or '.join(parts)}.\n{HINT}"
        )
    found = find_videos(
        str(root), names=chosen, class_of=lambda name: "", strict=clips["strict"], left_out=left_out
    )
    return ClipDataset(
        found.entries,
        found.classes,
        name=f"Taichi-HD, {subset}, {split}",
        broken=found.broken,
        left_out=left_out,
        counts=_counts(chosen, parts),
        **clips,
    )


# Pieces of YouTube's videos, of 128 to 1,024 frames.
SIZES = {"train": 3_049, "test": 285}


def _counts(names: list[str], parts: tuple[str, ...]) -> list[Count]:
    return [
        Count(
            f"videos in {part}",
            sum(part in PurePosixPath(name).parts[:-1] for name in names),
            SIZES[part],
            "Siarohin et al. 2019",
            "some are on YouTube no more",
        )
        for part in parts
    ]
