"""Videos in a folder as an endless stream of training clips."""

import hashlib
import json
import math
import os
import shutil
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path, PurePath
from typing import Any, Self, TypedDict, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from .choice import ClipPlace, start_of
from .counts import Count, named, refuse_left_out
from .sampler import EndlessOrder, clip_generator
from .storage import cache_home, exclusive, read_json, read_json_lines, write_json
from .transforms import Frames, Resize
from .video import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Packed,
    VideoError,
    VideoPath,
    is_animated,
    iterate_frames,
    natural_key,
    probe,
    read_frames,
    sha256_of,
)

# Of what is remembered of each video between starts.
INDEX_FORMAT = 5
# A file that breaks in mid-training is replaced by another; after so many in a row something else is wrong.
NUM_ATTEMPTS = 20

_A = TypeVar("_A")
_B = TypeVar("_B")


@dataclass(frozen=True)
class VideoEntry:
    """One video of a data set: its file or folder of images, its class (−1: none), what probing it told.

    A video inside an archive is ``packed``, and ``path`` only names it.
    """

    path: str
    label: int
    num_frames: int
    fps: float
    variable_rate: bool = False
    num_bytes: int = 0
    seek_points: tuple[tuple[int, int], ...] = ()
    sha256: str = ""
    size: tuple[int, int] | None = None
    packed: Packed | None = None

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_frames / self.fps


class ClipOptions(TypedDict):
    """What every data set is told of its clips, and hands on to `ClipDataset`."""

    num_frames: int
    frame_stride: int
    fps: float | None
    resolution: int | tuple[int, int]
    crop: str
    horizontal_flip: bool
    short_videos: str
    clips_per_opening: int
    seed: int
    cache: str | None
    strict: bool


SHORT_VIDEOS = ("skip", "pad", "loop")


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video make up a clip.

    A video is a row of *ticks*: its frames or, with ``fps``, what is on the screen in the middle of each tick
    of that rate. A clip takes ``num_frames`` of them, ``frame_stride`` apart. Of a video with too few,
    ``short_videos`` says what becomes: ``skip``, ``pad`` (its last tick stands still) or ``loop`` (it begins
    again).

    Raises ValueError on numbers or words that can't be.
    """

    num_frames: int
    frame_stride: int
    fps: float | None = None
    short_videos: str = "skip"

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.frame_stride < 1:
            raise ValueError(
                "num_frames and frame_stride must be at least 1, got "
                f"num_frames={self.num_frames}, frame_stride={self.frame_stride}"
            )
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"dataset.fps must be a positive rate or null, got {self.fps}")
        if self.fps is not None and self.frame_stride != 1:
            raise ValueError(
                f"the distance of frames is told twice, by dataset.fps={self.fps:g} and "
                f"dataset.frame_stride={self.frame_stride}; use frame_stride=1, or fps=null"
            )
        if self.short_videos not in SHORT_VIDEOS:
            raise ValueError(
                f"unknown short_videos {self.short_videos!r}; choose one of: {', '.join(SHORT_VIDEOS)}"
            )

    @classmethod
    def of(cls, clips: ClipOptions) -> Self:
        """The part of the options that is about frames."""
        return cls(clips["num_frames"], clips["frame_stride"], clips["fps"], clips["short_videos"])

    @property
    def span(self) -> int:
        """Ticks from a clip's first to its last."""
        return (self.num_frames - 1) * self.frame_stride + 1

    def num_ticks(self, entry: VideoEntry) -> int:
        """How long a video is."""
        if self.fps is None:
            return entry.num_frames
        # Half a tick too little is none; the bit below it keeps rounding errors from asking for one too many.
        return max(1, math.ceil(entry.duration * self.fps - 0.5 - 1e-6))

    def is_short(self, entry: VideoEntry) -> bool:
        """Whether a video has fewer ticks than a clip."""
        return self.num_ticks(entry) < self.span

    def skips(self, entry: VideoEntry) -> bool:
        """Whether a video is left out for being short."""
        return self.short_videos == "skip" and self.is_short(entry)

    def start(self, entry: VideoEntry, where: float) -> int:
        """The first tick of a clip at a share of the way, in [0, 1), from the earliest place to the last."""
        return int(where * (max(0, self.num_ticks(entry) - self.span) + 1))

    def ticks(self, entry: VideoEntry, start: int) -> list[int]:
        """The ticks of a clip that begins at one."""
        length = self.num_ticks(entry)
        wanted = range(start, start + self.span, self.frame_stride)
        return [tick % length if self.short_videos == "loop" else min(tick, length - 1) for tick in wanted]

    def rate_of(self, entry: VideoEntry) -> float | None:
        """The rate at which ticks are to be read by the file's time stamps; None if they can be counted."""
        if entry.variable_rate:
            return self.fps or entry.fps
        return None

    def frame_at(self, entry: VideoEntry, tick: int) -> int:
        """The number by which a tick is read: that of a frame, where frames are counted."""
        if self.fps is None or entry.variable_rate:
            return tick
        return min(int((tick + 0.5) * entry.fps / self.fps), entry.num_frames - 1)


@dataclass(frozen=True)
class FoundVideos:
    """What lies under a folder: readable videos sorted by name, their classes, the broken ones."""

    root: Path
    entries: tuple[VideoEntry, ...]
    classes: tuple[str, ...]
    broken: tuple[VideoError, ...]

    def only(self, names: Iterable[str]) -> Self:
        """Keep the videos of these relative paths, and all classes."""
        paths = {str(self.root / name) for name in names}
        return replace(
            self,
            entries=tuple(entry for entry in self.entries if entry.path in paths),
            broken=tuple(error for error in self.broken if error.path in paths),
        )


def in_parallel(function: Callable[[_A], _B], arguments: Sequence[_A], description: str) -> Iterator[_B]:
    """Map over videos in threads, in order, with a progress bar (coding doesn't hold Python's lock)."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        results = pool.map(function, arguments)
        # Nothing is shown for what takes less than a second.
        yield from tqdm(
            results, description, len(arguments), unit="video", delay=1, mininterval=0.5, leave=False
        )
    finally:
        pool.shutdown(cancel_futures=True)  # who interrupts waits only for what is at work


def walk(
    root: str | os.PathLike[str], left_out: dict[str, str] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each folder under a root (which is the first), the sub-folders and the files in it, as ``os.walk``.

    Hidden names are passed over. Links are followed, but each folder comes once, and by its own name where it
    has one under the root; ``left_out`` is told of the links that lead to it as well.
    """
    seen: dict[str, str] = {}
    tops = [os.fspath(root)]
    while tops:
        links = []
        for top in tops:
            for folder, subfolders, names in os.walk(top):
                real = os.path.realpath(folder)
                if real in seen:
                    subfolders.clear()
                    is_loop = os.path.realpath(os.path.dirname(folder)).startswith(os.path.join(real, ""))
                    if folder == top and not is_loop and left_out is not None:
                        name = os.path.relpath(seen[real], root)
                        left_out[folder] = f"it links to {name}, which is read by that name"
                    continue
                seen[real] = folder
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                yield folder, subfolders, [name for name in names if not name.startswith(".")]
                paths = [os.path.join(folder, name) for name in subfolders]
                links += [path for path in paths if os.path.islink(path)]
        tops = sorted(links)


def list_videos(root: str | os.PathLike[str], left_out: dict[str, str] | None = None) -> list[str]:
    """List the videos under a folder, by their paths relative to it, in natural order.

    A video is a file with a video's extension or an animated WebP, or a folder that holds images and no
    video, nor one in its sub-folders. Hidden names are passed over, links followed (once). ``left_out`` is
    told, path by path, what else isn't read and why: images beside videos, second names of a folder.
    """
    found = []
    images: dict[str, list[str]] = {}
    # Folders that hold videos, in whatever depth.
    holders: set[PurePath] = set()
    for folder, _, names in walk(root, left_out):
        relative = PurePath(os.path.relpath(folder, root))
        pictures = [name for name in names if Path(name).suffix.lower() in IMAGE_EXTENSIONS]
        videos = [name for name in names if Path(name).suffix.lower() in VIDEO_EXTENSIONS]
        animated = {
            name for name in pictures if name[-5:].lower() == ".webp" and is_animated(Path(folder, name))
        }
        if animated:
            pictures = [name for name in pictures if name not in animated]
            videos += animated
        found += [relative / name for name in videos]
        if videos:
            holders.update((relative, *relative.parents))
        if pictures:
            images[os.fspath(relative)] = sorted(pictures, key=natural_key)
    for name in sorted(images, key=lambda name: -len(PurePath(name).parts)):
        folder_of_images = PurePath(name)
        if folder_of_images not in holders:
            found.append(folder_of_images)
            holders.update(folder_of_images.parents)
        elif left_out is not None:
            more = f", as are {len(images[name]) - 1:,} more there" if len(images[name]) > 1 else ""
            left_out[str(Path(root, name, images[name][0]))] = f"an image beside videos{more}"
    return sorted((path.as_posix() for path in found), key=natural_key)


def stamp_of(path: Path) -> list[int | str]:
    """What changes when a file does, or one in a folder: the size in bytes, and a digest of sizes and times.

    The time of change tells a file that was replaced by another of its size and its time of modification.
    """
    try:
        files = [("", path.stat())]
        if path.is_dir():
            files = [(entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file()]
    except OSError:
        return [0, ""]
    rows = sorted((name, told.st_size, told.st_mtime_ns, told.st_ctime_ns) for name, told in files)
    return [sum(told.st_size for _, told in files), hashlib.sha256(repr(rows).encode()).hexdigest()[:32]]


def _probe_all(root: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Probe videos, but those known from an earlier time and unchanged only once.

    What is told of a video is added to a journal at once, so that an interrupted start goes on from there,
    and in the end all goes into the index.
    """
    key = hashlib.sha256(str(root.resolve()).encode(errors="surrogateescape")).hexdigest()[:32]
    index_file = cache_home() / "index" / f"{key}.json"
    journal_file = index_file.with_name(f"{key}.{INDEX_FORMAT}.jsonl")
    known = read_json(index_file)
    index: dict[str, dict[str, Any]] = {}
    if isinstance(known, dict) and known.get("format") == INDEX_FORMAT and "videos" in known:
        index = known["videos"]
    journal = read_json_lines(journal_file)
    index |= dict(journal)

    def is_known(name: str) -> bool:
        told = index.get(name, {})
        complete = "error" in told or {"info", "sha256"} <= told.keys()
        return complete and told.get("stamp") == stamp_of(root / name)

    fresh = [name for name in names if not is_known(name)]
    if not fresh and not journal:
        return {name: index[name] for name in names}
    lines: int | None = None
    try:
        index_file.parent.mkdir(parents=True, exist_ok=True)
        lines = os.open(journal_file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        os.write(lines, b"\n")  # after a line that was cut off
    except OSError:
        pass  # it is said in the end

    def one(name: str) -> dict[str, Any]:
        path = root / name
        result: dict[str, Any] = {"stamp": stamp_of(path)}
        try:
            result |= {"sha256": sha256_of(path), "info": asdict(probe(path))}
        except VideoError as error:
            result |= {"error": error.reason}
        except OSError as error:
            # Permissions and full tables of files pass: it is asked again at the next start.
            result = {"stamp": None, "error": error.strerror or str(error)}
        if lines is not None:
            with suppress(OSError):
                os.write(lines, json.dumps([name, result]).encode() + b"\n")
        return result

    try:
        index.update(zip(fresh, in_parallel(one, fresh, "probing videos"), strict=True))
    finally:
        if lines is not None:
            os.close(lines)
    try:
        write_json(index_file, {"format": INDEX_FORMAT, "root": str(root.resolve()), "videos": index})
        journal_file.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"can't keep the index of {root} for the next start: {error}", stacklevel=3)
    return {name: index[name] for name in names}


def find_videos(
    root: str | os.PathLike[str],
    *,
    strict: bool,
    names: Sequence[str] | None = None,
    class_of: Callable[[str], str] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> FoundVideos:
    """Find, probe and class the videos under a folder.

    ``names`` (relative paths) restricts it to those videos. ``class_of`` maps a relative path to its class;
    by default that is the folder it lies in, and "" means none. Probing decodes every video from end to end,
    in parallel; what it tells is kept in ``$LATENT_VIDEO_CACHE/index``, so that the next start is quick and
    only changed files are probed again.

    With ``strict``, the first broken video is raised as VideoError, and before that a ValueError if there are
    paths that were ``left_out`` of the names.
    """
    root = Path(root)
    if strict:
        refuse_left_out(left_out or {})
    names = list_videos(root) if names is None else names
    class_of = class_of or (lambda name: "" if "/" not in name else name.rpartition("/")[0])
    probed = _probe_all(root, names)
    # Small and capital letters sort alike, as in UCF-101's official order.
    classes = tuple(
        sorted({class_of(name) for name in names} - {""}, key=lambda name: natural_key(name.casefold()))
    )
    labels = {name: label for label, name in enumerate(classes)} | {"": -1}
    entries = []
    broken = []
    for name, result in probed.items():
        path = str(root / name)
        if "error" in result:
            broken.append(VideoError(path, result["error"]))
            continue
        info = result["info"]
        entries.append(
            VideoEntry(
                path,
                labels[class_of(name)],
                info["num_frames"],
                info["fps"],
                info["variable_rate"],
                result["stamp"][0],
                tuple((index, pts) for index, pts in info["seek_points"]),
                result["sha256"],
                (info["height"], info["width"]),
            )
        )
    if strict and broken:
        raise broken[0]
    return FoundVideos(root, tuple(entries), classes, tuple(broken))


@dataclass(frozen=True)
class _Place:
    """Where a clip is taken: its first tick, whether it is mirrored, where it is cropped."""

    start: int
    flip: bool
    x: float = 0.5
    y: float = 0.5


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips of ``num_frames`` frames, ``frame_stride`` apart, at random places of the videos, without end.

    ``dataset[position]`` is a dict of ``frames`` (uint8 tensor ``t h w c``), ``label`` and ``position``.
    Epoch ``position // len(dataset)`` visits every video once, in an order, at starts and with flips that are
    functions of (seed, position). Videos of variable frame rate are read by time at their average rate.
    ``frame_stride`` counts frames; ``fps`` (with a stride of 1) asks for a rate instead, whatever the files'.

    ``fetch`` turns the archive of a packed video, where that is a URL, into a file; the data order then takes
    a few archives at a time.

    With ``clips_per_opening`` k, k positions in a row take the same video: those of them that are loaded
    together are read in one pass, which is cheaper where files have few key frames.

    ``cache`` names a folder for the decoded videos at this resolution: one flat file, mapped into memory,
    made on first use, valid as long as files, resolution and crop stay the same. Without it (None) clips are
    decoded on the fly.

    Videos too short for a clip are skipped (or padded, or looped, see ``Sampling``) and told by
    ``summary()``; one that breaks while being read is warned of once and replaced by another, drawn from
    (seed, position, attempt). With ``strict`` each raises instead. ``left_out`` are paths that weren't taken
    for videos of the set, and why, for the summary.

    Raises ValueError if no video is long enough.
    """

    def __init__(
        self,
        entries: Sequence[VideoEntry],
        classes: Sequence[str],
        *,
        num_frames: int,
        frame_stride: int,
        resolution: int | tuple[int, int],
        fps: float | None = None,
        crop: str = "center_crop",
        horizontal_flip: bool = False,
        short_videos: str = "skip",
        clips_per_opening: int = 1,
        fetch: Callable[[str], str] | None = None,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
        strict: bool = False,
        name: str = "videos",
        broken: Sequence[VideoError] = (),
        left_out: Mapping[str, str] | None = None,
        counts: Sequence[Count] = (),
    ) -> None:
        if clips_per_opening < 1:
            raise ValueError(f"clips_per_opening must be at least 1, got {clips_per_opening}")
        if cache is not None and crop == "random_crop":
            raise ValueError(
                "a cache of decoded videos holds one crop of each; use dataset.cache=null with "
                "dataset.crop=random_crop, or another crop"
            )
        self.sampling = Sampling(num_frames, frame_stride, fps, short_videos)
        self.clips_per_opening = clips_per_opening
        self.counts = tuple(counts)
        self.name = name
        self.classes = tuple(classes)
        self.num_frames = num_frames
        self.frame_stride = frame_stride
        self.resize = Resize(resolution, crop)
        self.resolution = (self.resize.height, self.resize.width)
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        self.strict = strict
        self.broken: dict[str, str] = {error.path: error.reason for error in broken}
        self.left_out = dict(left_out or {})
        self.too_short = [entry for entry in entries if self.sampling.is_short(entry)]
        usable = [entry for entry in entries if not self.sampling.skips(entry)]
        self._check_length(usable)
        self._offsets: dict[str, int] = {}
        self._fetch = fetch
        self._cache_file: Path | None = None
        self._pixels: Frames | None = None
        if cache is not None:
            usable = self._open_cache(Path(cache), usable)
        self.entries = tuple(usable)
        groups = None if fetch is None else [e.packed.archive if e.packed else "" for e in self.entries]
        self._order = EndlessOrder(len(self.entries), seed, groups)

    def _check_length(self, usable: Sequence[VideoEntry]) -> None:
        needs = f"a clip of {self.num_frames} frames {self._pace()} needs {self.sampling.span}"
        skipped = self.too_short and self.sampling.short_videos == "skip"
        if skipped and (self.strict or not usable):
            longest = max(self.too_short, key=lambda entry: entry.num_frames)
            count = f"{len(self.too_short):,} of {len(usable) + len(self.too_short):,}"
            raise ValueError(
                f"{count} videos of {self.name} are too short: {needs}, and the longest of them, "
                f"{longest.path}, has {self.sampling.num_ticks(longest)}. Use a smaller dataset.num_frames "
                "or dataset.frame_stride, or dataset.short_videos=pad or loop"
                + (", or dataset.strict=false to skip them" if usable else "")
            )
        if not usable:
            broken = f" ({len(self.broken)} are broken: {self._broken_names()})" if self.broken else ""
            raise ValueError(
                f"there is no readable video in {self.name}{broken}; point dataset.root=PATH to some"
            )

    @property
    def readable(self) -> list[VideoEntry]:
        """The usable videos and those that are too short."""
        return list({entry.path: entry for entry in (*self.entries, *self.too_short)}.values())

    def __len__(self) -> int:
        """How many usable videos there are: the length of an epoch."""
        return len(self.entries)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """The clips at some positions; those of one visit to a video are read in one pass."""
        visits = groupby(positions, key=lambda position: position // self.clips_per_opening)
        return [clip for visit, members in visits for clip in self._visit(visit, list(members))]

    def _visit(self, visit: int, positions: Sequence[int]) -> list[dict[str, Any]]:
        entry = self.entries[self._order.item(visit)]
        places = [self._place(entry, position) for position in positions]
        try:
            clips = self._read(entry, places)
        except VideoError as error:
            if len(positions) > 1:  # what becomes of a clip doesn't depend on those loaded beside it
                return [clip for position in positions for clip in self._visit(visit, [position])]
            self._note_broken(error)
            return [self._replaced(position) for position in positions]
        labelled = zip(clips, positions, strict=True)
        return [{"frames": frames, "label": entry.label, "position": at} for frames, at in labelled]

    def _place(self, entry: VideoEntry, position: int, attempt: int = 0) -> "_Place":
        generator = clip_generator(self.seed, position, f"clip {attempt}")
        where, flip, _, x, y = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        place = _Place(self.sampling.start(entry, where), self.horizontal_flip and flip < 0.5)
        return replace(place, x=x, y=y) if self.resize.mode == "random_crop" else place

    def _replaced(self, position: int) -> dict[str, Any]:
        """A clip of another video, which is a function of (seed, position, attempt)."""
        for attempt in range(1, NUM_ATTEMPTS):
            generator = clip_generator(self.seed, position, f"clip {attempt - 1}")
            other = torch.rand(3, generator=generator, dtype=torch.float64).tolist()[2]
            entry = self.entries[int(other * len(self.entries))]
            try:
                (frames,) = self._read(entry, [self._place(entry, position, attempt)])
            except VideoError as error:
                self._note_broken(error)
                continue
            return {"frames": frames, "label": entry.label, "position": position}
        raise VideoError(
            entry.path, f"{NUM_ATTEMPTS} videos in a row can't be read; is the disk still there?"
        )

    def describe(self, position: int) -> str:
        """Name the video at a position, for messages."""
        return self.entries[self._order.item(position // self.clips_per_opening)].path

    def position(self, index: int, epoch: int) -> int:
        """The first position in an epoch at which a clip of video ``index`` stands."""
        return self._order.position(index, epoch) * self.clips_per_opening

    def held_out(self, index: int) -> dict[str, Any]:
        """Give the clip from the middle of video ``index``, unflipped; if it is broken, the next video's."""
        return self.clip(index, "middle")

    def clip(self, index: int, where: ClipPlace, seed: int = 0) -> dict[str, Any]:
        """Give one clip of video ``index``, see `clips`; if the video is broken, the next one's."""
        return self.clips(index, [where], seed)[0]

    def clips(self, index: int, places: Sequence[ClipPlace], seed: int = 0) -> list[dict[str, Any]]:
        """Give clips of video ``index`` in one pass over it, unflipped and cropped in the middle.

        Each is the first, the middle one, one from a place drawn from (seed, index), or the one that begins
        at a tick. If the video is broken, the next one's.
        """
        for attempt in range(NUM_ATTEMPTS):
            number = (index + attempt) % len(self.entries)
            entry = self.entries[number]
            room = max(0, self.sampling.num_ticks(entry) - self.sampling.span)
            chosen = [_Place(start_of(where, room, seed, number), flip=False) for where in places]
            try:
                clips = self._read(entry, chosen)
            except VideoError as error:
                self._note_broken(error)
                continue
            return [{"frames": frames, "label": entry.label, "position": index} for frames in clips]
        raise VideoError(
            entry.path, f"{NUM_ATTEMPTS} videos in a row can't be read; is the disk still there?"
        )

    def length(self, index: int) -> int:
        """Ticks of a video."""
        return self.sampling.num_ticks(self.entries[index])

    @property
    def fps(self) -> float:
        """The clips' frame rate: the one asked for, or the videos' median rate over the stride."""
        if self.sampling.fps is not None:
            return self.sampling.fps
        return statistics.median(entry.fps for entry in self.entries) / self.frame_stride

    @property
    def names(self) -> list[str]:
        """Paths of the usable videos, relative to the folder that holds them all."""
        root = os.path.commonpath([os.path.dirname(os.path.abspath(entry.path)) for entry in self.entries])
        return [Path(os.path.relpath(entry.path, root)).as_posix() for entry in self.entries]

    @property
    def fingerprint(self) -> str:
        """Identify the content by names, files' contents and frame counts: equal for a copy elsewhere."""
        return self._digest(self.entries, [])

    def summary(self) -> str:
        """Say in a line what there is, and what was skipped."""
        height, width = self.resolution
        parts = [f"{len(self):,} video{'s' if len(self) > 1 else ''}"]
        if self.classes:
            parts.append(f"{len(self.classes)} classes")
        parts.append(f"{height}x{width}")
        parts.append(f"clips of {self.num_frames} frames {self._pace()} ({self.fps:g} fps)")
        if self.too_short:
            names = named(f"{Path(e.path).name}: {e.num_frames} frames" for e in self.too_short)
            fate = {"skip": "skipped as too short", "pad": "padded", "loop": "looped"}
            parts.append(f"{len(self.too_short):,} {fate[self.sampling.short_videos]} ({names})")
        slower = sum(entry.fps < 0.99 * (self.sampling.fps or 0) for entry in self.entries)
        if slower:
            parts.append(f"{slower:,} slower than dataset.fps, whose frames are repeated")
        if self.broken:
            parts.append(f"{len(self.broken):,} skipped as broken ({self._broken_names()})")
        if self.left_out:
            names = named(f"{Path(path).name}: {reason}" for path, reason in self.left_out.items())
            parts.append(f"{len(self.left_out):,} left out ({names})")
        return f"{self.name}: " + ", ".join(parts)

    def _pace(self) -> str:
        fps = self.sampling.fps
        return f"at stride {self.frame_stride}" if fps is None else f"at {fps:g} frames per second"

    def _broken_names(self) -> str:
        return named(f"{Path(path).name}: {reason}" for path, reason in self.broken.items())

    def _note_broken(self, error: VideoError) -> None:
        if self.strict:
            raise error
        if error.path not in self.broken:
            self.broken[error.path] = error.reason
            warnings.warn(f"{error}; another is taken instead", stacklevel=3)

    def _read(self, entry: VideoEntry, places: Sequence["_Place"]) -> list[torch.Tensor]:
        """Clips of one video, from one pass over it unless each is cropped elsewhere."""
        if len(places) > 1 and self.resize.mode == "random_crop":
            return [clip for place in places for clip in self._read(entry, [place])]
        rows = [self.sampling.ticks(entry, place.start) for place in places]
        if self._cache_file is not None:
            if self._pixels is None:
                self._pixels = np.memmap(self._cache_file, np.uint8, mode="r").reshape(
                    -1, *self.resolution, 3
                )
            first = self._offsets[entry.path]
            clips = [self._pixels[[first + tick for tick in ticks]] for ticks in rows]
        else:
            numbers = [[self.sampling.frame_at(entry, tick) for tick in ticks] for ticks in rows]
            wanted = sorted({number for row in numbers for number in row})
            frames = read_frames(
                self._source(entry),
                wanted,
                at_fps=self.sampling.rate_of(entry),
                resize=self.resize.at(places[0].x, places[0].y),
                seek_points=entry.seek_points,
            )
            row_of = {number: row for row, number in enumerate(wanted)}
            clips = [frames[[row_of[number] for number in row]] for row in numbers]
        return [
            torch.from_numpy(np.ascontiguousarray(clip[:, :, ::-1]) if place.flip else clip)
            for clip, place in zip(clips, places, strict=True)
        ]

    def _source(self, entry: VideoEntry) -> VideoPath:
        if entry.packed is None:
            return entry.path
        if self._fetch is None:
            return entry.packed
        return replace(entry.packed, archive=self._fetch(entry.packed.archive))

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker maps the file itself; pickling the map would copy all of it.
        return self.__dict__ | {"_pixels": None}

    @staticmethod
    def _digest(entries: Sequence[VideoEntry], more: list[Any]) -> str:
        root = os.path.commonpath([os.path.dirname(os.path.abspath(entry.path)) for entry in entries])
        digest = hashlib.sha256(repr(more).encode())
        for entry in entries:
            name = Path(os.path.relpath(entry.path, root)).as_posix()
            content = entry.sha256 or entry.num_bytes
            digest.update(f"{name}\0{content}\0{entry.num_frames}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _open_cache(self, folder: Path, entries: Sequence[VideoEntry]) -> list[VideoEntry]:
        """Find or make the cache; returns the entries that it holds, which are all but those found broken."""
        height, width = self.resolution
        what = [INDEX_FORMAT, self.resolution, self.resize.mode, self.sampling.fps]
        key = self._digest(entries, what)[:24]
        stem = f"{height}x{width}-{self.resize.mode}-{key}"
        pixels, index = folder / f"{stem}.uint8", folder / f"{stem}.json"
        counts = [self.sampling.num_ticks(entry) for entry in entries]
        offsets = list(accumulate(counts, initial=0))
        num_bytes = offsets.pop() * height * width * 3
        try:
            with exclusive(folder / f".{stem}.lock") as is_held:
                if is_held:  # what a process that was killed had begun
                    for leftover in folder.glob(f".{pixels.name}.*.part"):
                        leftover.unlink(missing_ok=True)
                told = read_json(index)
                whole = pixels.is_file() and pixels.stat().st_size == num_bytes
                if not whole or not isinstance(told, dict) or "broken" not in told:
                    told = self._fill_cache(pixels, entries, offsets, num_bytes)
                    write_json(index, told)
        except OSError as error:
            raise OSError(
                f"can't keep the cache of {self.name} in {folder}: {error}. Use another folder: "
                "dataset.cache=PATH, or none: dataset.cache=null"
            ) from error
        for path, reason in told["broken"].items():
            self._note_broken(VideoError(path, reason))
        self._cache_file = pixels
        self._offsets = {entry.path: offset for entry, offset in zip(entries, offsets, strict=True)}
        kept = [entry for entry in entries if entry.path not in told["broken"]]
        self._check_length(kept)
        return kept

    def _fill_cache(
        self, pixels: Path, entries: Sequence[VideoEntry], offsets: Sequence[int], num_bytes: int
    ) -> dict[str, Any]:
        free = shutil.disk_usage(pixels.parent).free
        if num_bytes > free:
            raise OSError(
                f"it needs {num_bytes / 1e6:,.0f} MB, and {pixels.parent} has {free / 1e6:,.0f} MB free"
            )
        frame_bytes = self.resolution[0] * self.resolution[1] * 3
        part = pixels.with_name(f".{pixels.name}.{os.getpid()}.part")
        # Written by pwrite and not through a map: on a full disk a map ends in a bus error, not in a message.
        file = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        try:
            os.truncate(file, num_bytes)

            def decode(job: tuple[VideoEntry, int]) -> VideoError | None:
                entry, offset = job
                expected = self.sampling.num_ticks(entry)
                tick = 0
                try:
                    numbered = enumerate(
                        iterate_frames(self._source(entry), at_fps=self.sampling.rate_of(entry))
                    )
                    for number, frame in numbered:
                        resized = None
                        while tick < expected and self.sampling.frame_at(entry, tick) == number:
                            resized = self.resize(frame).tobytes() if resized is None else resized
                            os.pwrite(file, resized, (offset + tick) * frame_bytes)
                            tick += 1
                        if tick == expected:
                            return None
                except VideoError as error:
                    return error
                return VideoError(entry.path, f"it ends after {tick} of the {expected} frames in the index")

            jobs = list(zip(entries, offsets, strict=True))
            description = f"caching videos at {self.resolution[0]}x{self.resolution[1]}"
            broken = [error for error in in_parallel(decode, jobs, description) if error is not None]
            os.replace(part, pixels)
        finally:
            os.close(file)
            part.unlink(missing_ok=True)
        return {"videos": len(entries), "broken": {error.path: error.reason for error in broken}}
