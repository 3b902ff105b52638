"""Videos that any program has made, in whatever form they lie there."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from .arrays import EXTENSIONS, ArrayVideos
from .clips import ClipDataset, find_videos
from .folder import require_videos
from .video import VIDEO_EXTENSIONS, natural_key

FORMS = (
    "a folder of videos or of frame folders, video files, a .npz or .npy file, or a folder of such files for "
    "the clips of long videos one after another"
)


def given_videos(
    source: str | Sequence[str],
    *,
    num_frames: int,
    frame_stride: int,
    resolution: tuple[int, int],
    crop: str,
) -> ClipDataset | ArrayVideos:
    """The videos at one or several paths (or behind a pattern with ``*``), as clips of one geometry.

    Videos that are broken or too short are left out; the set's ``summary()`` names them.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if nothing of what is there can be read as videos, or it mixes forms.
    """
    sources = [source] if isinstance(source, str) else list(source)
    paths = [Path(name) for given in sources for name in _expanded(given)]
    hint = f"Give videos=PATH, where PATH is {FORMS}."
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}. {hint}")
    if not paths:
        raise FileNotFoundError(f"nothing fits {', '.join(sources) or 'an empty list'}. {hint}")
    rows = [_arrays(path) for path in paths]
    if any(rows):
        if not all(rows):
            raise ValueError(f"videos and NumPy files can't be mixed: {', '.join(map(str, paths))}. {hint}")
        return ArrayVideos(
            rows, num_frames=num_frames, frame_stride=frame_stride, resolution=resolution, crop=crop
        )
    left_out: dict[str, str] = {}
    if len(paths) == 1 and paths[0].is_dir():
        root = str(paths[0])
        names = require_videos(root, "videos", hint, left_out)
    else:
        known = {*VIDEO_EXTENSIONS, ".webp"}
        unknown = [p for p in paths if not p.is_dir() and p.suffix.lower() not in known]
        if unknown:
            raise ValueError(f"{unknown[0]} isn't a video by its name. {hint}")
        files = []
        for path in paths:
            inside = require_videos(str(path), "videos", hint) if path.is_dir() else ["."]
            files += [path / name for name in inside]
        root = os.path.commonpath([path.absolute().parent for path in files])
        names = [os.path.relpath(path.absolute(), root) for path in files]
    found = find_videos(root, names=names, strict=False, class_of=lambda name: "")
    if not found.entries:
        first = found.broken[0]
        raise ValueError(
            f"none of the {len(names):,} videos in videos={', '.join(sources)} can be read; the first: "
            f"{first}"
        )
    return ClipDataset(
        found.entries,
        found.classes,
        num_frames=num_frames,
        frame_stride=frame_stride,
        resolution=resolution,
        crop=crop,
        name=", ".join(sources),
        broken=found.broken,
        left_out=left_out,
    )


def _expanded(given: str) -> list[str]:
    if os.path.exists(given) or not glob.has_magic(given):
        return [given]
    return sorted(glob.glob(given, recursive=True), key=natural_key)


def _arrays(path: Path) -> list[Path]:
    """The NumPy files that a path is or, as a folder, holds; [] if it is something else."""
    if not path.is_dir():
        return [path] if path.suffix.lower() in EXTENSIONS else []
    inside = [child for child in path.iterdir() if not child.name.startswith(".")]
    arrays = [child for child in inside if child.suffix.lower() in EXTENSIONS]
    if arrays and any(child.suffix.lower() in VIDEO_EXTENSIONS for child in inside):
        raise ValueError(f"{path} holds both videos and NumPy files; give one of the two: videos=[FILE,…]")
    return sorted(arrays, key=lambda child: natural_key(child.name))
