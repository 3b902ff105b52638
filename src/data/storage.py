"""Files that several processes share: they appear whole or not at all, and are made once."""

import errno
import glob
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def cache_home() -> Path:
    """The folder for what can be computed again: ``$LATENT_VIDEO_CACHE``, else ``~/.cache/latent_video``."""
    return Path(os.environ.get("LATENT_VIDEO_CACHE") or Path.home() / ".cache" / "latent_video")


@contextmanager
def named_if_full(path: Path) -> Iterator[None]:
    """Let an error of a full or read-only disk name what was being written, which the system doesn't tell."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or error.filename is not None:
            raise
        raise OSError(
            error.errno, f"{error.strerror}: can't write {path}; make room there, or choose another folder"
        ) from error


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a path to write to; what is there at the end gets the name ``path``, after an error it is gone.

    It has the name only once it is on the disk, unless what is written needn't be ``durable``: when the
    machine loses power, such a file may be damaged. What killed processes had written for the same path goes,
    after an hour: others may be writing it now, some of them on other machines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError):
            if _is_abandoned(leftover, path.name):
                leftover.unlink()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with named_if_full(path):
            yield part
            if durable:
                onto_disk(part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def onto_disk(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with path.open("rb") as written:
        os.fsync(written.fileno())


ABANDONED_AFTER = 3600.0  # seconds


def _is_abandoned(part: Path, name: str) -> bool:
    """Whether nobody writes this part of a file any more, as far as can be told."""
    writer = part.name.removeprefix(f".{name}.").removesuffix(".part")
    if sys.platform == "win32" or not writer.isdigit():
        return False
    if time.time() - part.stat().st_mtime < ABANDONED_AFTER:
        return False
    return _is_gone(int(writer))


def _is_gone(process: int) -> bool:
    """Whether this machine runs no process of that number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it is another user's
        return False
    return False


def part_of(path: Path) -> Path:
    """Where this process writes a file that may take hours; ``remove_abandoned`` knows whose it is."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")


def remove_abandoned(folder: Path, name: str) -> None:
    """Remove what processes that are gone were writing for files whose names match a pattern, by ``part_of``.

    Only those of this machine: of others it can't be told whether they still run.
    """
    for part in folder.glob(f".{name}.{glob.escape(platform.node())}.*.part"):
        writer = part.name.split(".")[-2]
        if sys.platform != "win32" and writer.isdigit() and _is_gone(int(writer)):
            with suppress(OSError):
                part.unlink()


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove what killed processes were writing into folders that are nobody else's now."""
    for folder in folders:
        for part in folder.glob(".*.part"):
            if part.is_file():  # folders are cleared when they are made again
                part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill; at the end its files are on the disk and it takes the place of ``path``.

    After an error it is gone, and what was at ``path`` stays. So are leftovers of a process that was killed;
    what one had set aside when it was killed comes back to its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".{path.name}.old.part")
    if old.exists() and not path.exists():
        os.replace(old, path)
    _clear(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                onto_disk(file)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
        with suppress(OSError):  # so that the name, too, is on the disk; some systems can't open a folder
            handle = os.open(path.parent, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    finally:
        _clear(path)


def _clear(path: Path) -> None:
    """Remove what was being written, or was set aside, for a folder."""
    for leftover in path.parent.glob(f".{path.name}.*.part"):
        with suppress(OSError):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one piece; names of files that aren't UTF-8 are escaped, and read as they were."""
    text = json.dumps(content, ensure_ascii=False, indent=1)
    with atomic_path(path) as part:
        part.write_bytes(text.encode(errors="backslashreplace"))


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; what the disk refuses (full, read-only) is an OSError, as for other files."""
    path.touch()
    mode = path.stat().st_mode  # that of any new file here; the library would let nobody else read it
    try:
        save_file(tensors, path)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"can't write {path}: {error}; make room or choose another folder") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; ValueError if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or make it again") from error


def read_json(path: Path) -> Any | None:
    """Read JSON that only speeds things up: None if it isn't there or isn't JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def parse_json(path: Path, remedy: str) -> Any:
    """Read JSON that is needed; ValueError, which tells the file and a remedy, if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it isn't JSON ({error}); {remedy}") from error


def read_json_lines(path: Path) -> list[Any]:
    """Read a file of lines of JSON that only speeds things up, but those that were cut off; [] without it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


@contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file ``path`` while this process works; nobody waits for it.

    Raises:
        ValueError: if another process holds it, which the message ``busy`` tells, and who it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        if sys.platform != "win32":
            import fcntl

            # A lock that children don't inherit: it ends with this process, however that ends.
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise ValueError(f"{busy} ({file.read().strip() or 'another process'})") from error
            except OSError:  # some network file systems know no locks
                pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold the lock file ``path``; other processes of this machine that want it wait.

    Gives whether it is held: some network file systems know no locks. Then the work may be done twice, which
    does no harm.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        is_held = False
        if sys.platform != "win32":
            import fcntl

            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                is_held = True
        yield is_held
