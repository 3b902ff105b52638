"""UCF-101: 13,320 videos of 101 human actions, 320x240 at 25 frames per second (Soomro et al., 2012)."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Unpack

from .clips import ClipDataset, ClipOptions, find_videos, walk
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

_NAME = re.compile(r"v_([a-z]+)_\w+(\.\w+)?", re.IGNORECASE | re.ASCII)

_LIST = re.compile(r"(train|test)list0[123]\.txt", re.IGNORECASE)


def class_of(name: str) -> str:
    """Read the class from a video's name, v_<Class>_gXX_cYY, in any case; "" if it isn't named so."""
    match = _NAME.fullmatch(PurePosixPath(name).name)
    return match.group(1) if match else ""


SOURCE = "Soomro et al. 2012"
# Videos for training and for testing in the three official splits.
SPLIT_SIZES = {"1": (9_537, 3_783), "2": (9_586, 3_734), "3": (9_624, 3_696)}


def _stem(name: str) -> str:
    """What a video is known by in the lists: its name without folder and extension, in small letters."""
    return PurePosixPath(name).stem.casefold()


def _find_lists(root: str) -> dict[str, Path]:
    """The official lists under the root, by their names in small letters; of several the least deep."""
    found: dict[str, Path] = {}
    for folder, subfolders, names in walk(root):
        subfolders[:] = [name for name in subfolders if not class_of(name)]  # the frames of a video
        for name in sorted(names):
            path = Path(folder, name)
            known = found.setdefault(name.casefold(), path) if _LIST.fullmatch(name) else path
            if len(path.parts) < len(known.parts):
                found[name.casefold()] = path
    return found


def _official_list(lists: Mapping[str, Path], kind: str, number: str) -> dict[str, str] | None:
    """The names in trainlist01.txt or its kin, by what videos are known by; None without."""
    path = lists.get(f"{kind}list0{number}.txt")
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} isn't UTF-8 text ({error.reason} at byte {error.start}); take it from the archive again"
        ) from error
    return {_stem(line.split()[0]): PurePosixPath(line.split()[0]).stem for line in lines if line.strip()}


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
    left_out: dict[str, str] = {}
    listed_names = require_videos(root, "UCF-101", HINT, left_out)
    names = [name for name in listed_names if class_of(name)]
    if not names:
        raise FileNotFoundError(f"no UCF-101: no video under {root} is named v_<Class>_gXX_cYY.\n{HINT}")
    for name in listed_names:
        if not class_of(name):
            left_out[str(Path(str(root), name))] = "not named v_<Class>_gXX_cYY"
    refuse_twice(names, str(root))
    # Of a class that is spelled in several ways the spelling with small letters.
    spelling = {name.casefold(): name for name in sorted(map(class_of, names))}
    lists = _find_lists(str(root))
    chosen = names
    if subset != "all" and split != "all":
        listed = _official_list(lists, split, subset[-1])
        if listed is None:
            raise FileNotFoundError(
                f"no {split}list0{subset[-1]}.txt under {root}.\n{HINT}\nOr use dataset.subset=all."
            )
        chosen = [name for name in names if _stem(name) in listed]
        if not chosen:
            raise ValueError(
                f"none of the {len(names)} videos under {root} is in the official list of {subset}, {split}; "
                "use dataset.subset=all, or complete the videos"
            )
    found = find_videos(
        str(root),
        names=names,
        class_of=lambda name: spelling[class_of(name).casefold()],
        strict=clips["strict"],
        left_out=left_out,
    ).only(chosen)
    return ClipDataset(
        found.entries,
        found.classes,
        name=f"UCF-101, {subset}, {split}",
        broken=found.broken,
        left_out=left_out,
        counts=_counts(lists, names),
        **clips,
    )


def _counts(lists: Mapping[str, Path], names: list[str]) -> list[Count]:
    """The whole data set, and each official split whose lists are there."""
    here = set(map(_stem, names))
    members = {
        (kind, number): _official_list(lists, kind, number)
        for number in SPLIT_SIZES
        for kind in ("train", "test")
    }

    def missing(listed: Mapping[str, str]) -> str:
        absent = sorted(name for stem, name in listed.items() if stem not in here)
        return f"missing {named(absent)}" if absent else ""

    known = (members["train", "1"] or {}) | (members["test", "1"] or {})
    counts = [
        Count("videos", len(names), 13_320, SOURCE, missing(known)),
        Count("classes", len({class_of(name).casefold() for name in names}), 101, SOURCE),
    ]
    for (kind, number), listed in members.items():
        if listed is not None:
            expected = SPLIT_SIZES[number][kind == "test"]
            what = f"{kind}ing videos of split {number}"
            source = f"official {kind}list0{number}.txt"
            counts.append(Count(what, len(here & set(listed)), expected, source, missing(listed)))
    return counts
