"""Any folder of videos: nested folders are classes, a folder of frame images is a video."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from .clips import ClipDataset, ClipOptions, Sampling, find_videos, list_videos

SPLITS = ("train", "test", "all")

HINT = """\
Put videos there (mp4, avi, mkv, webm, …) or folders of frame images (jpg, png, …), in sub-folders by class if
there are classes. Or point to another folder, and check it:
    python -m src.prepare dataset=folder dataset.root=PATH"""


def check_split(split: str) -> None:
    """Refuse a split that isn't one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")


def require_videos(
    root: str | None, title: str, hint: str, left_out: dict[str, str] | None = None
) -> list[str]:
    """List the videos under a data set's root by their relative paths; the hint says how to get some.

    ``left_out`` is told of what isn't read, see `list_videos`.

    Raises FileNotFoundError if there are none.
    """
    if root is None:
        reason = "dataset.root is not set"
    elif not Path(root).exists():
        reason = f"there is no folder {root}"
    elif not Path(root).is_dir():
        reason = f"{root} is not a folder"
    else:
        names = list_videos(root, left_out)
        if names:
            return names
        reason = f"the folder {root} holds no videos"
    raise FileNotFoundError(f"no {title}: {reason}.\n{hint}")


def left_outside(root: str, names: Sequence[str], parts: Sequence[str]) -> dict[str, str]:
    """Tell of videos that are left out because they lie outside of a data set's parts.

    What lies right under the root stands for all below it.
    """
    told = {}
    for name, count in Counter(name.split("/", 1)[0] for name in names).items():
        path = Path(root, name)
        held = f" with {count:,} video{'s' if count > 1 else ''}" if path.is_dir() else ""
        told[str(path)] = f"outside of the folders {' and '.join(parts)}{held}"
    return told


def split_by_name(names: list[str], test_fraction: float, split: str) -> list[str]:
    """Pick the videos of a split by a hash of their names.

    So it is the same on any machine, and new files hardly move it. The test split has ``test_fraction`` of
    the videos, but at least one; with a fraction of 0 nothing is kept apart,
    and the test split is the whole set.
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction must be in [0, 1), got {test_fraction}")
    if split == "all" or (split == "test" and test_fraction == 0):
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
    **clips: Unpack[ClipOptions],
) -> ClipDataset:
    """Clips of all videos under ``root``; the folder that a video lies in is its class.

    If there are videos in its folders ``train`` and in ``test`` (in small letters or capitals), these are the
    splits, and what else ``root`` holds is left out; if not, ``test_fraction`` of the usable videos, chosen
    by a hash of their names, is kept for testing.

    Raises FileNotFoundError if there are no videos, ValueError if none is long enough.
    """
    check_split(split)
    left_out: dict[str, str] = {}
    names = require_videos(root, "videos", HINT, left_out)

    def split_of(name: str) -> str:
        return name.split("/", 1)[0].casefold()

    has_splits = {"train", "test"} <= {split_of(name) for name in names}
    if has_splits:
        outside = [name for name in names if split_of(name) not in ("train", "test")]
        left_out |= left_outside(str(root), outside, ("train", "test"))
        names = [name for name in names if split_of(name) in ("train", "test")]
    # The classes are those of the whole folder, so that a label means the same in every split.
    found = find_videos(
        str(root),
        names=names,
        class_of=lambda name: "/".join(name.split("/")[1 if has_splits else 0 : -1]),
        strict=clips["strict"],
        left_out=left_out,
    )
    if has_splits:
        chosen = [name for name in names if split in ("all", split_of(name))]
    else:
        # Only videos that can be used are divided: a broken one must not be all that a split gets.
        sampling = Sampling.of(clips)
        long_enough = {entry.path for entry in found.entries if not sampling.skips(entry)}
        usable = [name for name in names if str(Path(str(root)) / name) in long_enough]
        kept = split_by_name(usable, test_fraction, split)
        if usable and not kept:
            raise ValueError(
                f"the split {split!r} of {root} is empty: the folder holds {len(usable)} videos of "
                f"{sampling.span} frames or more, and dataset.test_fraction is {test_fraction:g}. Change it "
                "or add videos"
            )
        elsewhere = set(usable) - set(kept)
        chosen = [name for name in names if name not in elsewhere]  # unusable ones are told in every split
    found = found.only(chosen)
    return ClipDataset(
        found.entries,
        found.classes,
        name=f"{root}, {split}",
        broken=found.broken,
        left_out=left_out,
        **clips,
    )
