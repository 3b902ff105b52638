"""Video files: exact frames out of them, and clips into files that every browser plays.

Frames are uint8 ``t h w c`` RGB. Frames are counted in presentation order, by decoding: declared frame counts
and time stamps lie often enough (packed-B AVI, truncated files) that neither is trusted.
"""

import hashlib
import io
import math
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageOps

from .storage import onto_disk, part_of
from .transforms import Frames

# fmt: off
VIDEO_EXTENSIONS = frozenset({
    ".3gp", ".apng", ".asf", ".avi", ".f4v", ".flv", ".gif", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv", ".y4m",
})
IMAGE_EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# fmt: on

# A folder of images states no frame rate.
IMAGES_FPS = 25.0

# Of a frame: a header of a few bytes can claim gigabytes. 8K, which is 7680 x 4320, is below this.
MAX_PIXELS = 2**25

# A file is that file alone: no network, and none of the formats that are lists of other files.
_LISTS = {"concat", "dash", "hls", "image2", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp", "vobsub"}
_LISTS |= {"webm_dash_manifest"}
_OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": ",".join(sorted(av.formats_available - _LISTS)),
    "max_pixels": str(MAX_PIXELS),
}

_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Packed:
    """A video inside an uncompressed tar archive: one video file, or frame images in their order.

    ``members`` are their names, offsets and sizes in bytes.
    """

    archive: str
    members: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        return f"{self.archive}/{self.members[0][0]}"

    def read(self) -> bytes:
        """The bytes of the first member, fewer if the archive is cut short."""
        _, offset, size = self.members[0]
        with open(self.archive, "rb") as file:
            file.seek(offset)
            return file.read(size)


VideoPath = str | os.PathLike[str] | Packed
"""A video file, a folder of frame images, or either inside an archive."""


class VideoError(RuntimeError):
    """A video can't be read; the message names its path and what is wrong with it."""

    def __init__(self, path: VideoPath, reason: str) -> None:
        super().__init__(path, reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"can't read the video {self.path}: {self.reason}"


NOT_REGULAR = "it is no regular file, but a pipe, a device or the like"


def refuse_special(path: VideoPath) -> None:
    """Refuses pipes, devices and what else could be read for ever or never ends; VideoError."""
    file = path.archive if isinstance(path, Packed) else path
    if os.path.exists(file) and not os.path.isfile(file):
        raise VideoError(path, NOT_REGULAR)


@dataclass(frozen=True)
class VideoInfo:
    """What decoding a video from end to end shows, after its rotation is applied.

    ``fps`` is the average rate. ``variable_rate`` says that the frames are not evenly spaced in time, so
    that showing the file at its average rate repeats and drops frames (see ``read_clip``); there are
    ``num_frames`` ticks of that rate in any case. A folder of images counts as 25 frames per second.
    ``seek_points`` are frames, with their time stamps, from which decoding was seen to give the same pixels
    as from the beginning.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    variable_rate: bool = False
    seek_points: tuple[tuple[int, int], ...] = ()


class _TimedFrame(Protocol):
    """A frame that is turned into pixels only if it is wanted; times in seconds, None if not told."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def time(self) -> float | None: ...
    @property
    def duration(self) -> float | None: ...
    @property
    def pts(self) -> int | None: ...
    @property
    def is_key(self) -> bool: ...
    def to_rgb(self) -> Frames: ...
    def digest(self) -> int:
        """A checksum of the pixels as they were decoded."""
        ...


def probe(path: VideoPath) -> VideoInfo:
    """Count a video's frames by decoding all of them, and measure its size and rate.

    Raises VideoError if there is no frame to be had.
    """
    if is_images(path):
        images = image_files(path)
        try:
            height, width = _read_image(images[0]).shape[:2]
            for image in images[1:]:
                _check_image(image)
        except VideoError as error:
            raise VideoError(path, f"{Path(error.path).name}: {error.reason}") from error
        return VideoInfo(len(images), IMAGES_FPS, height, width)
    size: tuple[int, int] | None = None
    times: list[float | None] = []
    duration: float | None = None
    # From the first frame on that one might start from, what each frame looks like.
    candidates: list[tuple[int, int]] = []
    digests: dict[int, tuple[int | None, int]] = {}
    damaged: list[str] = []
    for index, frame in enumerate(_decode(path, damaged=damaged)):
        size = size or frame.size
        times.append(frame.time)
        duration = frame.duration
        last = candidates[-1][0] if candidates else 0
        if frame.is_key and frame.pts is not None and index - last >= LEAST_SEEK:
            candidates.append((index, frame.pts))
        if candidates:
            digests[index] = (frame.pts, frame.digest())
    assert size is not None  # _decode raises if there is no frame
    fps, variable_rate = _frame_rate(path, times, duration)
    points: tuple[tuple[int, int], ...] = ()
    if not damaged and _increasing(times):
        points = _verified(path, candidates, digests, len(times))
    return VideoInfo(len(times), fps, *size, variable_rate, points)


def count_frames(path: VideoPath) -> int:
    """How many frames can be decoded, without turning them into pixels; 0 if none can."""
    if is_images(path):
        return len(image_files(path))
    count = 0
    with suppress(VideoError):
        for _ in _decode(path):
            count += 1
    return count


def declared_frames(path: VideoPath) -> int | None:
    """How many frames a file says that it has, if it can be read and says so; some count a few too many."""
    if is_images(path) or Path(str(path)).suffix.lower() == ".webp":
        return None
    try:
        with _opened(path) as container:
            return _video_stream(path, container).frames or None
    except (VideoError, av.error.FFmpegError, OSError, UnicodeError):
        return None


# Frames that a seek must save to be worth it, and how many of a file's key frames may be unfit before none is
# trusted.
LEAST_SEEK = 12
MOST_UNFIT = 3


def _verified(
    path: VideoPath,
    candidates: Sequence[tuple[int, int]],
    digests: dict[int, tuple[int | None, int]],
    num_frames: int,
) -> tuple[tuple[int, int], ...]:
    """Those key frames from which decoding gives what it gave from the beginning, up to the next of them."""
    kept: list[tuple[int, int]] = []
    unfit = 0
    stop = num_frames
    for first, pts in reversed(candidates):
        index = first
        try:
            for frame in _from_point(path, pts):
                if index == stop or (frame.pts, frame.digest()) != digests[index]:
                    break
                index += 1
        except VideoError:
            index = -1
        if index == stop:
            kept.append((first, pts))
            stop = first
        else:
            unfit += 1
            if unfit > MOST_UNFIT:
                return ()
    return tuple(reversed(kept))


def _from_point(path: VideoPath, pts: int) -> Iterator[_TimedFrame]:
    """The frames from a time stamp on; raises VideoError if none has it."""
    started = False
    for frame in _decode(path, seek_to=pts):
        started = started or frame.pts == pts
        if started:
            yield frame
        elif frame.pts is not None and frame.pts > pts:
            break
    if not started:
        raise VideoError(path, f"no frame of time stamp {pts} comes after seeking to it; has it changed?")


def read_clip(
    path: VideoPath,
    start: int,
    num_frames: int,
    frame_stride: int = 1,
    *,
    at_fps: float | None = None,
    resize: Callable[[Frames], Frames] | None = None,
    seek_points: Sequence[tuple[int, int]] = (),
) -> Frames:
    """Read ``num_frames`` frames, ``frame_stride`` apart, from frame ``start`` on: uint8 ``t h w c``, RGB.

    As ``read_frames``, of which it is the case that all but few need.
    """
    if start < 0 or num_frames < 1 or frame_stride < 1:
        raise ValueError(
            f"a clip needs start >= 0, num_frames >= 1 and frame_stride >= 1; got {start=}, {num_frames=}, "
            f"{frame_stride=}"
        )
    wanted = range(start, start + num_frames * frame_stride, frame_stride)
    return read_frames(path, wanted, at_fps=at_fps, resize=resize, seek_points=seek_points)


def read_frames(
    path: VideoPath,
    wanted: Sequence[int],
    *,
    at_fps: float | None = None,
    resize: Callable[[Frames], Frames] | None = None,
    seek_points: Sequence[tuple[int, int]] = (),
) -> Frames:
    """Read the ``wanted`` frames, whose numbers increase: uint8 ``t h w c``, RGB.

    Frame k is the k-th in presentation order. With ``at_fps``, for files of variable rate (or to change the
    rate), time rules instead: frame k is the one on the screen in the middle of the k-th tick of that rate,
    by the file's time stamps. Rotation metadata is applied, a transparency channel is dropped, pixels that
    are not square stay so. ``resize`` is applied frame by frame: a clip is never held in full size.
    ``seek_points``, as ``probe`` has found them, spare decoding from the beginning, and across gaps.

    Raises VideoError if the file can't be read or has too few frames.
    """
    if not wanted or wanted[0] < 0 or any(a >= b for a, b in pairwise(wanted)):
        raise ValueError(f"frame numbers must increase from 0 or more, got {list(wanted)}")
    frames: list[Frames] = []
    count = 0
    if is_images(path):
        images = image_files(path)
        count = len(images)
        for frame in map(_read_image, [images[index] for index in wanted if index < count]):
            frames.append(resize(frame) if resize else frame)
    else:
        for first, pts, numbers in _passes(wanted, seek_points if at_fps is None else ()):
            decoded = _decode(path) if pts is None else _from_point(path, pts)
            timely = decoded if at_fps is None else _at_rate(path, decoded, at_fps)
            found = 0
            for count, timed in enumerate(timely, start=first + 1):
                if count - 1 == numbers[found]:
                    rgb = timed.to_rgb()
                    frames.append(resize(rgb) if resize else rgb)
                    found += 1
                    if found == len(numbers):
                        break
            if found < len(numbers):
                break
    if len(frames) < len(wanted):
        raise VideoError(path, f"it has {count} frames, and frames {wanted[0]} to {wanted[-1]} are asked for")
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError(path, "its frames are of several sizes; resize them")
    return np.stack(frames)


def _passes(
    wanted: Sequence[int], seek_points: Sequence[tuple[int, int]]
) -> list[tuple[int, int | None, list[int]]]:
    """How to get at frames: from which (and its time stamp) to decode, for which of them."""
    passes: list[tuple[int, int | None, list[int]]] = []
    beginnings = [first for first, _ in seek_points]
    for number in wanted:
        nearest = bisect_right(beginnings, number) - 1
        first, pts = seek_points[nearest] if nearest >= 0 else (0, None)
        if passes and first < passes[-1][2][-1] + 1 + LEAST_SEEK:  # decoding goes on to there anyway
            passes[-1][2].append(number)
        else:
            passes.append((first, pts, [number]))
    return passes


def iterate_frames(path: VideoPath, *, at_fps: float | None = None) -> Iterator[Frames]:
    """Yield a video's frames one after the other, uint8 ``h w c``; ``at_fps`` as in ``read_clip``."""
    if is_images(path):
        yield from map(_read_image, image_files(path))
        return
    decoded = _decode(path)
    for frame in decoded if at_fps is None else _at_rate(path, decoded, at_fps):
        yield frame.to_rgb()


def _decode(
    path: VideoPath, *, seek_to: int | None = None, damaged: list[str] | None = None
) -> Iterator[_TimedFrame]:
    """Decode a file in presentation order; raises VideoError if not even one frame comes out.

    As in ffmpeg's own tool, a damaged packet costs its own frames and the rest goes on; ``damaged`` has been
    told of it when all is decoded. With ``seek_to`` it begins at the last key frame that isn't after this
    time stamp.
    """
    if Path(str(path)).suffix.lower() == ".webp":  # FFmpeg's demuxer doesn't know the animated kind
        yield from _decode_webp(path)
        return
    found = False
    reasons: list[str] = []
    try:
        with _opened(path) as container:
            stream = _video_stream(path, container)
            if stream.codec_context is None:
                raise VideoError(path, "no decoder knows its codec")
            # Loader workers are many; each decodes with one thread.
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": _OPEN_OPTIONS["max_pixels"]}
            # One for the file: each builds tables that cost more than a small frame.
            reformatter = VideoReformatter()
            if seek_to is not None:
                container.seek(seek_to, stream=stream)
            for packet in _packets(container, stream):
                try:
                    decoded = packet.decode()
                except av.error.FFmpegError as error:
                    too_large = f", as with frames of more than {MAX_PIXELS:,} pixels"
                    reason = error.strerror or "no frame in it can be decoded"
                    reasons.append(reason + too_large * isinstance(error, av.error.ArgumentError))
                    continue
                for frame in decoded:
                    if not found:
                        orientation = _orientation(frame)
                        found = True
                    yield _DecodedFrame(frame, orientation, reformatter)
    except (av.error.FFmpegError, OSError, UnicodeError) as error:
        missing = "there is no such file" if isinstance(error, FileNotFoundError) else None
        reasons.append(missing or getattr(error, "strerror", None) or str(error))
    if damaged is not None:
        damaged += reasons
    if not found:
        raise VideoError(path, reasons[0] if reasons else "no frame in it can be decoded")


def _packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Give a stream's packets; PyAV's own iterator, left before its end and not closed, is never freed."""
    with closing(cast(Generator[av.Packet, None, None], container.demux(stream))) as packets:
        yield from packets


def _opened(path: VideoPath) -> InputContainer:
    refuse_special(path)
    if isinstance(path, Packed):
        _, offset, size = path.members[0]
        # FFmpeg's own way into a part of a file.
        url = f"subfile,,start,{offset},end,{offset + size},,:file:{path.archive}"
        return av.open(url, options=_OPEN_OPTIONS | {"protocol_whitelist": "subfile,file"})
    # "file:" keeps a name like "concat:x" or "-x" from being anything but a file's name.
    return av.open(f"file:{os.fspath(path)}", options=_OPEN_OPTIONS)


def _video_stream(path: VideoPath, container: InputContainer) -> av.VideoStream:
    """The one that ffmpeg takes of several: no cover picture; of the default ones, the largest."""
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        raise VideoError(path, "there is no video stream in it")

    def rank(stream: av.VideoStream) -> tuple[bool, int]:
        context = stream.codec_context  # None where no decoder knows its codec
        area = 0 if context is None else context.width * context.height
        return bool(stream.disposition & stream.disposition.default), area

    return max(streams, key=rank)


class _DecodedFrame:
    """A frame as it came out of the decoder; most are only counted, so all else waits to be asked for."""

    __slots__ = ("_frame", "_orientation", "_reformatter")

    def __init__(
        self, frame: av.VideoFrame, orientation: tuple[bool, bool, bool], reformatter: VideoReformatter
    ) -> None:
        self._frame = frame
        self._orientation = orientation
        self._reformatter = reformatter

    @property
    def size(self) -> tuple[int, int]:
        height, width = self._frame.height, self._frame.width
        return (width, height) if self._orientation[0] else (height, width)

    @property
    def time(self) -> float | None:
        return self._seconds(self._frame.pts)

    @property
    def duration(self) -> float | None:
        return self._seconds(self._frame.duration or None)

    @property
    def pts(self) -> int | None:
        return self._frame.pts

    @property
    def is_key(self) -> bool:
        return bool(self._frame.key_frame)

    def digest(self) -> int:
        return _digest(self._frame)

    def to_rgb(self) -> Frames:
        frame = self._frame
        transposed, flip_y, flip_x = self._orientation
        # As ffmpeg's own tool does it. It tells only where chroma isn't that of common 8-bit formats.
        converted = self._reformatter.reformat(
            frame, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1
        )
        plane = converted.planes[0]
        if plane.line_size > 0:  # to_ndarray does the same, but takes longer than decoding a small frame
            levels: Frames = np.frombuffer(memoryview(plane), np.uint8, count=frame.height * plane.line_size)
            rgb = levels.reshape(frame.height, plane.line_size)[:, : frame.width * 3]
            rgb = rgb.reshape(frame.height, frame.width, 3)
        else:
            rgb = converted.to_ndarray().astype(np.uint8, copy=False)
        if transposed:
            rgb = rgb.transpose(1, 0, 2)
        rgb = rgb[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
        return rgb.copy()  # the plane's memory goes with the frame

    def _seconds(self, ticks: int | None) -> float | None:
        base = self._frame.time_base
        return None if ticks is None or base is None else float(ticks * base)


def _digest(frame: av.VideoFrame) -> int:
    """A checksum of a frame's visible pixels as they were decoded."""
    total = 0
    for index, plane in enumerate(frame.planes):
        # A row is padded with what happened to be there; packed formats hold several components in a plane.
        parts = [part for part in frame.format.components if part.plane == index]
        length = sum(part.width * -(-part.bits // 8) for part in parts)
        if len(frame.planes) == 1:
            length = -(-plane.width * frame.format.padded_bits_per_pixel // 8)
        rows = np.frombuffer(memoryview(plane), np.uint8)
        rows = rows[: plane.height * abs(plane.line_size)].reshape(plane.height, abs(plane.line_size))
        total = zlib.crc32(rows[:, :length].tobytes(), total)
    return total


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Tell how to show a frame upright: whether to transpose, then flip vertically, then horizontally.

    The display matrix maps a stored (x, y), y down, to (a·x + c·y, b·x + d·y). It is taken from a file's
    first frame, and there from a tiny copy: whoever looks at a frame's side data keeps its pixels in memory
    until the garbage collector passes.
    """
    tiny = VideoReformatter().reformat(
        frame, width=16, height=16, format="gray", interpolation=Interpolation.POINT, threads=1
    )
    matrix = tiny.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(cast(bytes, matrix), dtype=np.int32)[:5].astype(float)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, bool(d < 0), bool(a < 0)
    return True, bool(b < 0), bool(c < 0)


@dataclass(frozen=True)
class _Picture:
    """A frame of an animated picture, which comes as pixels."""

    pixels: Frames
    time: float | None
    duration: float | None
    pts: int | None = None
    is_key: bool = False

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.pixels.shape[:2]
        return height, width

    def to_rgb(self) -> Frames:
        return self.pixels

    def digest(self) -> int:
        return zlib.crc32(self.pixels.tobytes())


def _decode_webp(path: VideoPath) -> Iterator[_TimedFrame]:
    found = False
    try:
        with Image.open(_for_pillow(path)) as image:
            _check_size(image)
            time = 0.0
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                pixels = np.asarray(image.convert("RGB"))  # which is what reads this frame's duration, too
                duration = image.info.get("duration", 0) / 1000
                found = True
                yield _Picture(pixels, time, duration)
                time += duration
    except _PILLOW_ERRORS as error:
        if not found:  # else it ends where the damage begins, as a video does
            raise VideoError(path, str(error)) from error


def _increasing(times: Sequence[float | None]) -> bool:
    return all(
        before is not None and after is not None and before < after for before, after in pairwise(times)
    )


def _frame_rate(
    path: VideoPath, times: Sequence[float | None], last_duration: float | None
) -> tuple[float, bool]:
    """Give the average frame rate, and whether the frames stand unevenly in time."""
    declared = _declared_rate(path)
    first, last = times[0], times[-1]
    if len(times) < 2 or first is None or last is None or not _increasing(times):
        return declared or IMAGES_FPS, False
    mean = (last - first) / (len(times) - 1)
    longest = max((b - a for a, b in pairwise(times) if a is not None and b is not None), default=mean)
    span = last - first + min(last_duration or mean, longest)
    even = all(abs(t - first - k * mean) < 0.25 * mean for k, t in enumerate(times) if t is not None)
    if even:
        # The declared rate is the exact one, if the stamps agree with it.
        agrees = declared is not None and abs(declared * mean - 1) < 0.02
        return (declared if declared is not None and agrees else 1 / mean), False
    return len(times) / span, True


def _declared_rate(path: VideoPath) -> float | None:
    if Path(str(path)).suffix.lower() == ".webp":
        return None
    with _opened(path) as container:
        rate = _video_stream(path, container).average_rate
    return float(rate) if rate else None


def _at_rate(path: VideoPath, frames: Iterable[_TimedFrame], fps: float) -> Iterator[_TimedFrame]:
    """Repeat and drop frames such that one comes per tick of ``fps``: the one on the screen amid the tick.

    The last frame stays for its own duration, but not longer than any before it (some files state minutes),
    or where the file doesn't tell, for the average one.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"at_fps must be a positive number, got {fps}")
    ticks = 0
    count = 0
    start = shown_since = longest = 0.0
    shown: _TimedFrame | None = None
    for frame in frames:
        if frame.time is None or (shown is not None and frame.time <= shown_since):
            raise VideoError(path, "its time stamps don't increase, so it can't be read by time")
        if shown is None:
            start = frame.time
        else:
            longest = max(longest, frame.time - shown_since)
        while shown is not None and start + (ticks + 0.5) / fps < frame.time:
            yield shown
            ticks += 1
        shown, shown_since, count = frame, frame.time, count + 1
    if shown is None:
        return
    duration = shown.duration or ((shown_since - start) / (count - 1) if count > 1 else 1 / fps)
    if count > 1:
        duration = min(duration, longest)
    for _ in range(ticks, max(1, round((shown_since + duration - start) * fps))):
        yield shown


def natural_key(name: str) -> list[tuple[int, str]]:
    """Order names as people count: frame2 before frame10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def is_animated(path: str | os.PathLike[str]) -> bool:
    """Whether a WebP file says that it has several frames."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            head = file.read(21)
    except OSError:
        return False
    # A flag of the extended format.
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20:] and head[20] & 2)


def is_images(path: VideoPath) -> bool:
    """Whether a video is a row of frame images."""
    if isinstance(path, Packed):
        suffix = Path(path.members[0][0]).suffix.lower()
        return suffix in IMAGE_EXTENSIONS and (suffix != ".webp" or len(path.members) > 1)
    return os.path.isdir(path)


def image_files(path: VideoPath) -> list[VideoPath]:
    """The images of a video that is a row of them, as people count.

    Raises VideoError if there are none, or two of one name and of different kinds.
    """
    if isinstance(path, Packed):
        _refuse_twins(path, [name for name, _, _ in path.members])
        return [Packed(path.archive, (member,)) for member in path.members]
    try:
        names = os.listdir(path)
    except OSError as error:
        raise VideoError(path, error.strerror or str(error)) from error
    images = [
        name for name in names if Path(name).suffix.lower() in IMAGE_EXTENSIONS and not name.startswith(".")
    ]
    if not images:
        raise VideoError(path, "the folder holds no images")
    _refuse_twins(path, images)
    return [Path(path, name) for name in sorted(images, key=natural_key)]


def _refuse_twins(path: VideoPath, names: Sequence[str]) -> None:
    """Refuses 1.jpg beside 1.png: they are no two frames."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            raise VideoError(path, f"two of its images have one name, {other} and {name}; keep one kind")


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it claims {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read")


def _for_pillow(path: VideoPath) -> str | os.PathLike[str] | io.BytesIO:
    refuse_special(path)
    return io.BytesIO(path.read()) if isinstance(path, Packed) else path


def sha256_of(path: VideoPath) -> str:
    """SHA-256 of a video file, or of the names and contents of a video's frame images.

    It is the same inside an archive and outside. Raises OSError if they can't be read, VideoError if they are
    no regular files.
    """

    def of_one(file: VideoPath) -> "hashlib._Hash":
        refuse_special(file)
        if isinstance(file, Packed):
            return hashlib.sha256(file.read())
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256")

    if not is_images(path):
        return of_one(path).hexdigest()
    digest = hashlib.sha256()
    for image in image_files(path):
        name = Path(str(image)).name
        if isinstance(image, Packed):  # where a name begins with that of its video
            name = name.partition(".")[2]
        digest.update(f"{name}\0".encode(errors="surrogateescape"))
        digest.update(of_one(image).digest())
    return digest.hexdigest()


def _read_image(path: VideoPath) -> Frames:
    try:
        with Image.open(_for_pillow(path)) as image:
            _check_size(image)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits: Pillow would clip, not scale
                levels = np.asarray(upright).astype(np.float64) / 257
                upright = Image.fromarray(np.clip(levels.round(), 0, 255).astype(np.uint8))
            return np.array(upright.convert("RGB"))
    except _PILLOW_ERRORS as error:
        raise VideoError(path, str(error) or type(error).__name__) from error


def _check_image(path: VideoPath) -> None:
    """Decodes an image, a JPEG at an eighth of its size, which is as strict and several times as fast."""
    try:
        with Image.open(_for_pillow(path)) as image:
            _check_size(image)
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except _PILLOW_ERRORS as error:
        raise VideoError(path, str(error) or type(error).__name__) from error


class VideoWriter:
    """Write frames to an H.264 mp4 that every browser plays, as they come.

    4:2:0 with BT.601 colour, tagged, and the index in front. Odd heights and widths, which 4:2:0 can't hold,
    grow by one row or column that repeats the last. The file appears under its name only when it is complete
    and on the disk; after an error there is none. Equal frames give equal bytes on one version of the
    encoder.

    ``crf`` is x264's quality, 0 (lossless but for colour) to 51; a key frame comes every
    ``keyframe_interval`` frames; ``preset`` is x264's trade of time for size. Without ``durable`` a power cut
    may damage a file that had its name already.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float,
        *,
        crf: int = 16,
        keyframe_interval: int = 24,
        preset: str = "medium",
        durable: bool = True,
    ) -> None:
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a positive number, got {fps}")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = part_of(self.path)
        self._durable = durable
        self._shape: tuple[int, ...] | None = None
        self._count = 0
        self._reformatter = VideoReformatter()
        self._container = av.open(f"file:{self._part}", "w", format="mp4", options={"movflags": "+faststart"})
        rate = Fraction(fps).limit_denominator(1001)
        self._time_base = 1 / rate
        options = {
            "crf": str(crf),
            "g": str(keyframe_interval),
            "preset": preset,
            # x264's AVX-512 macroblock tree gives now these, now those bytes for small pictures.
            "x264-params": "cpu-independent=1",
        }
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

    def write(self, frames: Frames) -> None:
        """Append frames, uint8 ``t h w c`` RGB, all of one size.

        Raises ValueError for anything else, OSError if the disk is full.
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 t h w 3, got {frames.dtype} of shape {frames.shape}")
        if self._shape is None:
            self._start(frames.shape[1:])
        if frames.shape[1:] != self._shape:
            raise ValueError(f"frames must all be h w c = {self._shape}, got {frames.shape[1:]}")
        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            yuv = self._reformatter.reformat(
                rgb,
                format="yuv420p",
                src_color_range="JPEG",
                dst_color_range="MPEG",
                dst_colorspace=Colorspace.SMPTE170M,
                interpolation=Interpolation.BICUBIC,
                threads=1,
            )
            yuv.pts = self._count
            yuv.time_base = self._time_base
            self._count += 1
            self._encode(yuv)

    def close(self) -> None:
        """Finish the file and put it under its name; raises ValueError if nothing was written."""
        if self._count == 0:
            self._discard()
            raise ValueError(f"no frames were written to {self.path}")
        try:
            self._encode(None)
            self._container.close()
            if self._durable:
                onto_disk(self._part)
            os.replace(self._part, self.path)
        except BaseException:
            self._discard()
            raise

    def _start(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        stream = self._stream
        stream.height = shape[0] + shape[0] % 2
        stream.width = shape[1] + shape[1] % 2
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        # One thread: several make the bytes depend on the machine.
        context.thread_count = 1
        # BT.601 is what readers that ignore tags assume for small pictures; primaries and curve are sRGB's.
        context.colorspace = 6
        context.color_range = 1
        context.color_primaries = 1
        context.color_trc = 1

    def _encode(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def _discard(self) -> None:
        try:
            self._container.close()
        except (av.error.FFmpegError, OSError):
            pass  # the file is thrown away
        finally:
            self._part.unlink(missing_ok=True)


def write_video(path: str | os.PathLike[str], frames: Frames, fps: float) -> None:
    """Write a clip, uint8 ``t h w c``, to an H.264 mp4 (see ``VideoWriter``)."""
    with VideoWriter(path, fps) as writer:
        writer.write(frames)


def _scaled(frame: Frames, height: int | None) -> Image.Image:
    image = Image.fromarray(frame)
    if height is None or height == image.height:
        return image
    width = max(1, round(image.width * height / image.height))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encode_preview(frames: Frames, fps: float, height: int | None = None) -> bytes:
    """Encode a clip, uint8 ``t h w c``, as an endless animated WebP; ``height`` scales it."""
    images = [_scaled(frame, height) for frame in frames]
    # Whole milliseconds, such that the sum doesn't drift.
    stamps = [round(index * 1000 / fps) for index in range(len(images) + 1)]
    durations = [end - begin for begin, end in pairwise(stamps)]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=images[1:],
        duration=durations,
        loop=0,
        quality=85,
        minimize_size=False,
    )
    return buffer.getvalue()


def contact_sheet(videos: Sequence[Frames], num_columns: int, height: int | None = None) -> bytes:
    """Lay clips out as a PNG: one clip per row, ``num_columns`` of its frames from left to right.

    The frames are evenly spaced, first and last included; of fewer frames than columns each comes once.
    ``height`` scales each frame.
    """
    rows: list[list[Image.Image]] = []
    for frames in videos:
        count = min(num_columns, len(frames))
        picks = [round(k * (len(frames) - 1) / max(1, count - 1)) for k in range(count)]
        rows.append([_scaled(frames[pick], height) for pick in picks])
    if not rows:
        raise ValueError("a contact sheet needs at least one clip")
    gap = 2
    cell_width = max(image.width for row in rows for image in row) + gap
    cell_height = max(image.height for row in rows for image in row) + gap
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * cell_width + gap, len(rows) * cell_height + gap), (24, 24, 24))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (gap + x * cell_width, gap + y * cell_height))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
