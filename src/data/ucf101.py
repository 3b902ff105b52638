"""UCF-101: 13,320 videos of 101 human actions, 320x240 at 25 frames per second (Soomro et al., 2012)."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Unpack

from .clips import ClipDataset, ClipOptions, find_videos
from .counts import Count, named, refuse_twice
from .folder import check_split, require_videos

SUBSETS = ("all", "split1", "split2", "split3")

HINT = """\
From the page "UCF101 - Action Recognition Data Set" of the University of Central Florida's Center for
Research in Computer Vision (https://www.crcv.ucf.edu/data/UCF101.php) take UCF101.rar (about 6.9 GB), and for
the official splits UCF101TrainTestSplits-RecognitionTask.zip (about 0.1 MB). Unpack both into one folder:
    ROOT/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi …     (or all .avi files flat)
    ROOT/ucfTrainTestlist/trainlist01.txt testlist01.txt …
Frame folders named v_<Class>_gXX_cYY work as well. Then check and prepare it:
    python -m src.prepare dataset=ucf101 dataset.root=ROOT"""

_NAME = re.compile(r"v_([A-Za-z]+)_.+")


def class_of(name: str) -> str:
    """Read the class from a video's name, v_<Class>_gXX_cYY; "" if it isn't named so."""
    match = _NAME.fullmatch(PurePosixPath(name).name)
    return match.group(1) if match else ""


SOURCE = "Soomro et al. 2012"
# Videos for training and for testing in the three official splits.
SPLIT_SIZES = {"1": (9_537, 3_783), "2": (9_586, 3_734), "3": (9_624, 3_696)}


def _list_folders(root: str) -> Iterator[Path]:
    """Where the lists may lie: in the root or up to two folders deep, but not where frames of a video are."""
    folders = [Path(root)]
    for _ in range(3):
        yield from folders
        folders = sorted(
            Path(entry.path)
            for folder in folders
            for entry in os.scandir(folder)
            if entry.is_dir() and not class_of(entry.name)
        )


def _official_list(root: str, kind: str, number: str) -> set[str] | None:
    """Read the names (without extension) in trainlist01.txt or its kin, from under the root; None without."""
    file_name = f"{kind}list0{number}.txt"
    found = next((path for folder in _list_folders(root) if (path := folder / file_name).is_file()), None)
    if found is None:
        return None
    lines = found.read_text(encoding="utf-8").splitlines()
    return {PurePosixPath(line.split()[0]).stem for line in lines if line.strip()}


def ucf101(
    root: str | None,
    *,
    split: str,
    subset: str,
    **clips: Unpack[ClipOptions],
) -> ClipDataset:
    """Clips of UCF-101, labelled by action (in the order of the names, as in the official classInd.txt).

    With ``subset`` "all", as in the LVDM paper, every split is the whole set; with "split1" to "split3"
    training and testing follow the official lists of the recognition task (9,537 and 3,783 videos in the
    first).

    Raises FileNotFoundError, which tells where to get it, if it isn't there.
    """
    check_split(split)
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset {subset!r} of UCF-101; choose one of: {', '.join(SUBSETS)}")
    names = [name for name in require_videos(root, "UCF-101", HINT) if class_of(name)]
    if not names:
        raise FileNotFoundError(f"no UCF-101: no video under {root} is named v_<Class>_gXX_cYY.\n{HINT}")
    refuse_twice(names, str(root))
    chosen = names
    if subset != "all" and split != "all":
        listed = _official_list(str(root), split, subset[-1])
        if listed is None:
            raise FileNotFoundError(
                f"no {split}list0{subset[-1]}.txt under {root}.\n{HINT}\nOr use dataset.subset=all."
            )
        chosen = [name for name in names if PurePosixPath(name).stem in listed]
        if not chosen:
            raise ValueError(
                f"none of the {len(names)} videos under {root} is in the official list of {subset}, {split}; "
                "use dataset.subset=all, or complete the videos"
            )
    found = find_videos(str(root), names=names, class_of=class_of, strict=clips["strict"]).only(chosen)
    return ClipDataset(
        found.entries,
        found.classes,
        name=f"UCF-101, {subset}, {split}",
        broken=found.broken,
        counts=_counts(str(root), names),
        **clips,
    )


def _counts(root: str, names: list[str]) -> list[Count]:
    """The whole data set, and each official split whose lists are there."""
    here = {PurePosixPath(name).stem for name in names}
    lists = {
        (kind, number): _official_list(root, kind, number)
        for number in SPLIT_SIZES
        for kind in ("train", "test")
    }
    known = (lists["train", "1"] or set()) | (lists["test", "1"] or set())
    missing = f"missing {named(sorted(known - here))}" if known - here else ""
    counts = [
        Count("videos", len(names), 13_320, SOURCE, missing),
        Count("classes", len({class_of(name) for name in names}), 101, SOURCE),
    ]
    for (kind, number), listed in lists.items():
        if listed is not None:
            expected = SPLIT_SIZES[number][kind == "test"]
            what = f"{kind}ing videos of split {number}"
            remark = f"missing {named(sorted(listed - here))}" if listed - here else ""
            counts.append(
                Count(what, len(listed & here), expected, f"official {kind}list0{number}.txt", remark)
            )
    return counts
