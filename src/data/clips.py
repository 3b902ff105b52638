"""Videos in a folder as an endless stream of training clips."""

import hashlib
import os
import shutil
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from .sampler import EndlessOrder, clip_generator
from .storage import cache_home, exclusive, read_json, write_json
from .transforms import Frames, Resize
from .video import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    VideoError,
    iterate_frames,
    natural_key,
    probe,
    read_clip,
)

# Of what is remembered of each video between starts.
INDEX_FORMAT = 2
# Of those that are skipped, so many are named.
NUM_NAMED = 3
# A file that breaks in mid-training is replaced by another; after so many in a row something else is wrong.
NUM_ATTEMPTS = 20

_A = TypeVar("_A")
_B = TypeVar("_B")


@dataclass(frozen=True)
class VideoEntry:
    """One video of a data set: its file or folder of images, its class (−1: none), what probing it told."""

    path: str
    label: int
    num_frames: int
    fps: float
    variable_rate: bool = False
    num_bytes: int = 0
    seek_points: tuple[tuple[int, int], ...] = ()


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
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = pool.map(function, arguments)
        # Nothing is shown for what takes less than a second.
        yield from tqdm(
            results, description, len(arguments), unit="video", delay=1, mininterval=0.5, leave=False
        )


def list_videos(root: str | os.PathLike[str]) -> list[str]:
    """List the videos under a folder, by their paths relative to it, in natural order.

    A video is a file with a video's extension, or a folder that holds images and no such file. Hidden names
    are passed over, links followed (once).
    """
    found = []
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".")]
        relative = os.path.relpath(folder, root)
        videos = [name for name in visible if Path(name).suffix.lower() in VIDEO_EXTENSIONS]
        if videos:
            found += [os.path.normpath(os.path.join(relative, name)) for name in videos]
        elif any(Path(name).suffix.lower() in IMAGE_EXTENSIONS for name in visible):
            found.append(relative)
    return sorted((Path(path).as_posix() for path in found), key=natural_key)


def _stamp(path: Path) -> list[int]:
    """What changes when a file (or a folder's listing) does: its size and time of modification."""
    try:
        status = path.stat()
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def _num_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
    return path.stat().st_size


def _probe_all(root: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Probe videos, but those known from an earlier time and unchanged only once."""
    index_file = (
        cache_home() / "index" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:32]}.json"
    )
    known = read_json(index_file)
    index: dict[str, dict[str, Any]] = {}
    if known and known.get("format") == INDEX_FORMAT:
        index = known["videos"]

    def one(name: str) -> dict[str, Any]:
        path = root / name
        try:
            return {"stamp": _stamp(path), "num_bytes": _num_bytes(path), "info": asdict(probe(path))}
        except VideoError as error:
            return {"stamp": _stamp(path), "error": error.reason}
        except OSError as error:
            # Permissions and full tables of files pass: it is asked again at the next start.
            return {"stamp": None, "error": error.strerror or str(error)}

    fresh = [name for name in names if name not in index or index[name]["stamp"] != _stamp(root / name)]

    def save() -> None:
        try:
            write_json(index_file, {"format": INDEX_FORMAT, "root": str(root.resolve()), "videos": index})
        except OSError as error:
            warnings.warn(f"can't keep the index of {root} for the next start: {error}", stacklevel=3)

    for count, (name, result) in enumerate(
        zip(fresh, in_parallel(one, fresh, "probing videos"), strict=True), start=1
    ):
        index[name] = result
        if count % 2000 == 0:  # so that an interrupted start goes on from here
            save()
    if fresh:
        save()
    return {name: index[name] for name in names}


def find_videos(
    root: str | os.PathLike[str],
    *,
    strict: bool,
    names: Sequence[str] | None = None,
    class_of: Callable[[str], str] | None = None,
) -> FoundVideos:
    """Find, probe and class the videos under a folder.

    ``names`` (relative paths) restricts it to those videos. ``class_of`` maps a relative path to its class;
    by default that is the folder it lies in, and "" means none. Probing decodes every video from end to end,
    in parallel; what it tells is kept in ``$LATENT_VIDEO_CACHE/index``, so that the next start is quick and
    only changed files are probed again.

    With ``strict``, the first broken video is raised as VideoError.
    """
    root = Path(root)
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
                result["num_bytes"],
                tuple((index, pts) for index, pts in info["seek_points"]),
            )
        )
    if strict and broken:
        raise broken[0]
    return FoundVideos(root, tuple(entries), classes, tuple(broken))


def _named(items: Iterable[str]) -> str:
    listed = list(items)
    more = f", and {len(listed) - NUM_NAMED:,} more" if len(listed) > NUM_NAMED else ""
    return ", ".join(listed[:NUM_NAMED]) + more


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips of ``num_frames`` frames, ``frame_stride`` apart, at random places of the videos, without end.

    ``dataset[position]`` is a dict of ``frames`` (uint8 tensor ``t h w c``), ``label`` and ``position``.
    Epoch ``position // len(dataset)`` visits every video once, in an order, at starts and with flips that are
    functions of (seed, position). Videos of variable frame rate are read by time at their average rate.

    ``cache`` names a folder for the decoded videos at this resolution: one flat file, mapped into memory,
    made on first use, valid as long as files, resolution and crop stay the same. Without it (None) clips are
    decoded on the fly.

    Videos too short for a clip are skipped and told by ``summary()``; one that breaks while being read is
    warned of once and replaced by another, drawn from (seed, position, attempt). With ``strict`` each raises
    instead.

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
        crop: str = "center_crop",
        horizontal_flip: bool = False,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
        strict: bool = False,
        name: str = "videos",
        broken: Sequence[VideoError] = (),
    ) -> None:
        if num_frames < 1 or frame_stride < 1:
            raise ValueError(
                f"num_frames and frame_stride must be at least 1, got {num_frames}, {frame_stride}"
            )
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
        self.span = (num_frames - 1) * frame_stride + 1
        self.too_short = [entry for entry in entries if entry.num_frames < self.span]
        usable = [entry for entry in entries if entry.num_frames >= self.span]
        self._check_length(usable)
        self._offsets: dict[str, int] = {}
        self._cache_file: Path | None = None
        self._pixels: Frames | None = None
        if cache is not None:
            usable = self._open_cache(Path(cache), usable)
        self.entries = tuple(usable)
        self._order = EndlessOrder(len(self.entries), seed)

    def _check_length(self, usable: Sequence[VideoEntry]) -> None:
        needs = f"a clip of {self.num_frames} frames at stride {self.frame_stride} needs {self.span}"
        if self.too_short and (self.strict or not usable):
            longest = max(self.too_short, key=lambda entry: entry.num_frames)
            count = f"{len(self.too_short):,} of {len(usable) + len(self.too_short):,}"
            raise ValueError(
                f"{count} videos of {self.name} are too short: {needs} frames, and the longest of them, "
                f"{longest.path}, has {longest.num_frames}. Use a smaller dataset.num_frames or "
                f"dataset.frame_stride" + (", or dataset.strict=false to skip them" if usable else "")
            )
        if not usable:
            broken = f" ({len(self.broken)} are broken: {self._broken_names()})" if self.broken else ""
            raise ValueError(
                f"there is no readable video in {self.name}{broken}; point dataset.root=PATH to some"
            )

    def __len__(self) -> int:
        """How many usable videos there are: the length of an epoch."""
        return len(self.entries)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self._order.item(position)
        for attempt in range(NUM_ATTEMPTS):
            generator = clip_generator(self.seed, position, f"clip {attempt}")
            where, flip, other = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
            entry = self.entries[index]
            start = int(where * (entry.num_frames - self.span + 1))
            try:
                frames = self._read(entry, start, self.horizontal_flip and flip < 0.5)
            except VideoError as error:
                self._note_broken(error)
                index = int(other * len(self.entries))
                continue
            return {"frames": frames, "label": entry.label, "position": position}
        raise VideoError(
            entry.path, f"{NUM_ATTEMPTS} videos in a row can't be read; is the disk still there?"
        )

    def describe(self, position: int) -> str:
        """Name the video at a position, for messages."""
        return self.entries[self._order.item(position)].path

    def held_out(self, index: int) -> dict[str, Any]:
        """Give the clip from the middle of video ``index``, unflipped; if it is broken, the next video's."""
        for attempt in range(NUM_ATTEMPTS):
            entry = self.entries[(index + attempt) % len(self.entries)]
            try:
                frames = self._read(entry, (entry.num_frames - self.span) // 2, flip=False)
            except VideoError as error:
                self._note_broken(error)
                continue
            return {"frames": frames, "label": entry.label, "position": index}
        raise VideoError(
            entry.path, f"{NUM_ATTEMPTS} videos in a row can't be read; is the disk still there?"
        )

    @property
    def fps(self) -> float:
        """The clips' frame rate: the videos' median rate over the stride."""
        return statistics.median(entry.fps for entry in self.entries) / self.frame_stride

    @property
    def fingerprint(self) -> str:
        """Identify the content by names, sizes and frame counts: equal for a copy at another place."""
        return self._digest(self.entries, [])

    def summary(self) -> str:
        """Say in a line what there is, and what was skipped."""
        height, width = self.resolution
        parts = [f"{len(self):,} video{'s' if len(self) > 1 else ''}"]
        if self.classes:
            parts.append(f"{len(self.classes)} classes")
        parts.append(f"{height}x{width}")
        parts.append(f"clips of {self.num_frames} frames at stride {self.frame_stride} ({self.fps:g} fps)")
        if self.too_short:
            names = _named(f"{Path(e.path).name}: {e.num_frames} frames" for e in self.too_short)
            parts.append(f"{len(self.too_short):,} skipped as too short ({names})")
        if self.broken:
            parts.append(f"{len(self.broken):,} skipped as broken ({self._broken_names()})")
        return f"{self.name}: " + ", ".join(parts)

    def _broken_names(self) -> str:
        return _named(f"{Path(path).name}: {reason}" for path, reason in self.broken.items())

    def _note_broken(self, error: VideoError) -> None:
        if self.strict:
            raise error
        if error.path not in self.broken:
            self.broken[error.path] = error.reason
            warnings.warn(f"{error}; another is taken instead", stacklevel=3)

    def _read(self, entry: VideoEntry, start: int, flip: bool) -> torch.Tensor:
        if self._cache_file is not None:
            if self._pixels is None:
                self._pixels = np.memmap(self._cache_file, np.uint8, mode="r").reshape(
                    -1, *self.resolution, 3
                )
            first = self._offsets[entry.path] + start
            frames = self._pixels[first : first + self.span : self.frame_stride]
        else:
            rate = entry.fps if entry.variable_rate else None
            frames = read_clip(
                entry.path,
                start,
                self.num_frames,
                self.frame_stride,
                at_fps=rate,
                resize=self.resize,
                seek_points=entry.seek_points,
            )
        return torch.from_numpy(np.array(frames[:, :, ::-1] if flip else frames))

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker maps the file itself; pickling the map would copy all of it.
        return self.__dict__ | {"_pixels": None}

    @staticmethod
    def _digest(entries: Sequence[VideoEntry], more: list[Any]) -> str:
        root = os.path.commonpath([os.path.dirname(os.path.abspath(entry.path)) for entry in entries])
        digest = hashlib.sha256(repr(more).encode())
        for entry in entries:
            name = Path(os.path.relpath(entry.path, root)).as_posix()
            digest.update(f"{name}\0{entry.num_bytes}\0{entry.num_frames}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _open_cache(self, folder: Path, entries: Sequence[VideoEntry]) -> list[VideoEntry]:
        """Find or make the cache; returns the entries that it holds, which are all but those found broken."""
        height, width = self.resolution
        stamps = [_stamp(Path(entry.path)) for entry in entries]
        key = self._digest(entries, [self.resolution, self.resize.mode, stamps])[:24]
        stem = f"{height}x{width}-{self.resize.mode}-{key}"
        pixels, index = folder / f"{stem}.uint8", folder / f"{stem}.json"
        counts = [entry.num_frames for entry in entries]
        offsets = list(accumulate(counts, initial=0))
        num_bytes = offsets.pop() * height * width * 3
        with exclusive(folder / f".{stem}.lock"):
            told = read_json(index)
            if told is None or not pixels.is_file() or pixels.stat().st_size != num_bytes:
                told = self._fill_cache(pixels, entries, offsets, num_bytes)
                write_json(index, told)
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
                f"the cache of {self.name} needs {num_bytes / 1e6:,.0f} MB, and {pixels.parent} has "
                f"{free / 1e6:,.0f} MB free. Use another: dataset.cache=PATH, or none: dataset.cache=null"
            )
        frame_bytes = self.resolution[0] * self.resolution[1] * 3
        part = pixels.with_name(f".{pixels.name}.{os.getpid()}.part")
        # Written by pwrite and not through a map: on a full disk a map ends in a bus error, not in a message.
        file = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        try:
            os.truncate(file, num_bytes)

            def decode(job: tuple[VideoEntry, int]) -> VideoError | None:
                entry, offset = job
                count = 0
                try:
                    rate = entry.fps if entry.variable_rate else None
                    for frame in islice(iterate_frames(entry.path, at_fps=rate), entry.num_frames):
                        os.pwrite(file, self.resize(frame).tobytes(), (offset + count) * frame_bytes)
                        count += 1
                except VideoError as error:
                    return error
                if count < entry.num_frames:
                    return VideoError(
                        entry.path, f"it has {count} frames, and the index says {entry.num_frames}"
                    )
                return None

            jobs = list(zip(entries, offsets, strict=True))
            description = f"caching videos at {self.resolution[0]}x{self.resolution[1]}"
            broken = [error for error in in_parallel(decode, jobs, description) if error is not None]
            os.replace(part, pixels)
        except OSError as error:
            raise OSError(f"can't write the cache of {self.name} to {pixels}: {error}") from error
        finally:
            os.close(file)
            part.unlink(missing_ok=True)
        return {"videos": len(entries), "broken": {error.path: error.reason for error in broken}}
