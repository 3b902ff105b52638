"""Videos in NumPy files, as other programs' sampling scripts leave them: uint8 ``n t h w c``."""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .choice import ClipPlace, start_of
from .transforms import Frames, Resize

EXTENSIONS = frozenset({".npy", ".npz"})
_AXES = "uint8 with axes (n, t, h, w, c): videos, frames, height, width, 3 colours"


class ArrayFile:
    """The videos of one ``.npy`` or ``.npz`` file, read one at a time; nothing in it is run.

    Raises:
        ValueError: if it holds no uint8 array ``n t h w c``, saying what it holds and how to mend it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._member = self._choose() if path.suffix.lower() == ".npz" else None
        with self._opened() as file:
            self.shape, dtype = self._header(file)
            self._begin = file.tell()
        self._check(dtype)
        self._check_size()
        self._stream: IO[bytes] | None = None
        self._next = 0

    def video(self, index: int) -> Frames:
        """Frames ``t h w c`` of one video; going through them in order is fastest."""
        num_bytes = math.prod(self.shape[1:])
        try:
            if self._stream is None or index < self._next:
                self.close()
                self._stream = self._opened()
                self._stream.read(self._begin)
                self._next = 0
            if self._member is None:
                self._stream.seek(self._begin + index * num_bytes)
            else:
                for _ in range(index - self._next):
                    self._stream.read(num_bytes)
            content = self._stream.read(num_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(
                f"{self.path} is damaged in or before video {index} ({error}); copy or make it again"
            ) from error
        if len(content) != num_bytes:
            raise ValueError(f"{self.path} ends in the middle of video {index}; copy or make it again")
        self._next = index + 1
        frames = np.frombuffer(content, np.uint8).reshape(self.shape[1:])
        return np.repeat(frames, 3, axis=-1) if self.shape[-1] == 1 else frames

    def close(self) -> None:
        """Lets the file go."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": None, "_next": 0}

    def _opened(self) -> IO[bytes]:
        if self._member is None:
            return self.path.open("rb")
        return zipfile.ZipFile(self.path).open(self._member)

    def _choose(self) -> str:
        """The member with videos: the only array with five axes."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".npy")]
                shapes = {}
                for name in names:
                    with archive.open(name) as file:
                        shapes[name] = self._header(file)[0]
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"{self.path} is damaged, it isn't an npz file: {error}") from error
        videos = [name for name, shape in shapes.items() if len(shape) == 5]
        if len(videos) != 1:
            told = ", ".join(f"{name.removesuffix('.npy')} {shape}" for name, shape in shapes.items())
            raise ValueError(f"{self.path} must hold one array {_AXES}; it holds {told or 'none'}")
        return videos[0]

    def _header(self, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else _read_header_2
            shape, fortran, dtype = read(file)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged, it isn't a NumPy array: {error}") from error
        if fortran and len(shape) > 1:
            raise ValueError(
                f"{self.path} lies in Fortran's order of axes; save it with np.save(file, "
                "np.ascontiguousarray(array))"
            )
        return shape, dtype

    def _check(self, dtype: np.dtype[Any]) -> None:
        found = f"{self.path} holds {dtype} {self.shape}, expected {_AXES}"
        if len(self.shape) == 5 and self.shape[-1] not in (1, 3):
            axis = next((axis for axis in (1, 2) if self.shape[axis] in (1, 3)), None)
            order = {1: (0, 2, 3, 4, 1), 2: (0, 1, 3, 4, 2), None: None}[axis]
            raise ValueError(found + (f"; bring them there by array.transpose{order}" if order else ""))
        if len(self.shape) != 5 or min(self.shape) < 1:
            raise ValueError(found)
        if dtype != np.uint8:
            raise ValueError(
                f"{found}. Values in [-1, 1] become 8 bits by ((x + 1) * 127.5).round().clip(0, 255)"
                ".astype('uint8'), values in [0, 1] by (x * 255).round().clip(0, 255).astype('uint8')"
            )

    def _check_size(self) -> None:
        """Raises ValueError unless the file is as long as its header says."""
        expected = self._begin + math.prod(self.shape)
        if self._member is None:
            size = self.path.stat().st_size
        else:
            with zipfile.ZipFile(self.path) as archive:
                size = archive.getinfo(self._member).file_size
        if size < expected:
            raise ValueError(
                f"{self.path} is truncated: for {self.shape[0]:,} videos {self.shape[1:]} it must hold "
                f"{expected:,} bytes, it has {size:,}; copy or make it again"
            )


def _read_header_2(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    return np.lib.format.read_array_header_2_0(file)


class ArrayVideos:
    """Clips of the videos in some files, each at one resolution; see `data.clips.ClipDataset.clip`.

    Args:
        rows: files one after another hold more videos; those inside a row hold the same videos' frames one
            after another, as many videos each.
        num_frames, frame_stride: of a clip.
        resolution, crop: to which its frames are brought, and how.

    Raises:
        ValueError: if files of a row don't fit together, or videos are too short.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Path]],
        *,
        num_frames: int,
        frame_stride: int,
        resolution: int | tuple[int, int],
        crop: str,
    ) -> None:
        self.num_frames, self.frame_stride = num_frames, frame_stride
        self.resize = Resize(resolution, crop)
        self.rows = [[ArrayFile(path) for path in row] for row in rows]
        self.span = (num_frames - 1) * frame_stride + 1
        for row in self.rows:
            if len({file.shape[0] for file in row}) > 1:
                told = ", ".join(f"{file.path.name}: {file.shape[0]}" for file in row)
                raise ValueError(f"files of one folder must hold the same number of videos, got {told}")
            if (length := sum(file.shape[1] for file in row)) < self.span:
                raise ValueError(
                    f"the videos of {row[0].path} have {length} frames, a clip of {num_frames} frames at "
                    f"stride {frame_stride} needs {self.span}; use a smaller dataset.num_frames or "
                    "protocol.generated_stride"
                )
        self.shortest = min(sum(file.shape[1] for file in row) for row in self.rows)

    def __len__(self) -> int:
        """How many videos there are."""
        return sum(row[0].shape[0] for row in self.rows)

    def clip(self, index: int, where: ClipPlace, seed: int = 0) -> dict[str, Any]:
        """One clip of video ``index``: ``frames`` uint8 ``t h w c``, no ``label`` (-1), its ``position``."""
        return self.clips(index, [where], seed)[0]

    def clips(self, index: int, places: Sequence[ClipPlace], seed: int = 0) -> list[dict[str, Any]]:
        """Several clips of one video; each file is read once."""
        row, number = self._find(index)
        length = sum(file.shape[1] for file in row)
        starts = [start_of(where, length - self.span, seed, index) for where in places]
        ticks = [range(start, start + self.span, self.frame_stride) for start in starts]
        wanted = {tick for clip in ticks for tick in clip}
        frames: dict[int, Frames] = {}
        begin = 0
        for file in row:
            inside = [tick for tick in wanted if begin <= tick < begin + file.shape[1]]
            video = file.video(number) if inside else None
            for tick in inside:
                assert video is not None
                frames[tick] = self.resize(video[tick - begin])
            begin += file.shape[1]
        clips = [torch.from_numpy(np.stack([frames[tick] for tick in clip])) for clip in ticks]
        return [{"frames": clip, "label": -1, "position": index} for clip in clips]

    def length(self, index: int) -> int:
        """Frames of a video."""
        return sum(file.shape[1] for file in self._find(index)[0])

    @property
    def fingerprint(self) -> str:
        """Identify the content by that of the files."""
        digest = hashlib.sha256()
        for row in self.rows:
            for file in row:
                with file.path.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
            digest.update(b"|")
        return digest.hexdigest()

    def summary(self) -> str:
        """Say in a line what there is."""
        files = [file for row in self.rows for file in row]
        told = f"{files[0].path.name}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"
        size = "x".join(map(str, files[0].shape[2:4]))
        return f"{told}: {len(self):,} videos of {self.shortest:,} frames, {size}"

    def _find(self, index: int) -> tuple[list[ArrayFile], int]:
        for row in self.rows:
            if index < row[0].shape[0]:
                return row, index
            index -= row[0].shape[0]
        raise IndexError("there is no such video")
