"""Sky Time-lapse: clips of moving clouds, 640x360 (Xiong et al., CVPR 2018)."""

from pathlib import PurePosixPath
from typing import Unpack

from .clips import ClipDataset, ClipOptions, FoundVideos, find_videos
from .counts import Count
from .folder import check_split, left_outside, require_videos

SUBSETS = ("split", "all")

HINT = """\
From the page of MD-GAN (https://github.com/weixiong-ur/mdgan, "our time-lapse dataset") take
sky_timelapse.zip (about 29 GB). It unpacks to folders of frames, each of which counts as one video:
    ROOT/sky_train/<video>/<clip>/*.jpg
    ROOT/sky_test/<video>/<clip>/*.jpg
mp4 files in sky_train and sky_test work as well. Then check and prepare it:
    python -m src.prepare dataset=sky dataset.root=ROOT
For any other layout use dataset=folder."""


def sky(
    root: str | None,
    *,
    split: str,
    subset: str,
    **clips: Unpack[ClipOptions],
) -> ClipDataset:
    """Clips of Sky Time-lapse, without classes.

    With ``subset`` "split", as in the LVDM paper, training is on sky_train and testing on sky_test; with
    "all" every split is both.

    Raises FileNotFoundError, which tells where to get it, if it isn't there.
    """
    check_split(split)
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset {subset!r} of Sky Time-lapse; choose one of: {', '.join(SUBSETS)}")
    left_out: dict[str, str] = {}
    names = require_videos(root, "Sky Time-lapse", HINT, left_out)
    parts = ("sky_train", "sky_test") if "all" in (subset, split) else (f"sky_{split}",)
    chosen = [name for name in names if set(parts) & set(name.split("/")[:-1])]
    outside = [name for name in names if not set(SIZES) & set(name.split("/")[:-1])]
    left_out |= left_outside(str(root), outside, tuple(SIZES))
    if not chosen:
        raise FileNotFoundError(
            f"no Sky Time-lapse: {root} holds {len(names)} videos, but none in {' or '.join(parts)}.\n{HINT}"
        )
    found = find_videos(
        str(root), names=chosen, class_of=lambda name: "", strict=clips["strict"], left_out=left_out
    )
    return ClipDataset(
        found.entries,
        found.classes,
        name=f"Sky Time-lapse, {subset}, {split}",
        broken=found.broken,
        left_out=left_out,
        counts=_counts(found, parts),
        **clips,
    )


# Long videos, short videos that were cut out of them, and clips of 32 frames that these divide into.
SIZES = {"sky_train": (997, 2_392, 35_383), "sky_test": (111, 225, 2_815)}


def _counts(found: FoundVideos, parts: tuple[str, ...]) -> list[Count]:
    counts = []
    for part in parts:
        entries = [entry for entry in found.entries if part in PurePosixPath(entry.path).parts]
        long = {PurePosixPath(entry.path).parent for entry in entries}
        clips = sum(entry.num_frames // 32 for entry in entries)
        numbers = zip((len(long), len(entries), clips), SIZES[part], strict=True)
        units = ("long videos", "short videos", "clips of 32 frames")
        for unit, (here, expected) in zip(units, numbers, strict=True):
            source = "the readme in the archive"
            remark = "broken and very short ones are not counted" if unit != "long videos" else ""
            counts.append(Count(f"{unit} in {part}", here, expected, source, remark))
    return counts
