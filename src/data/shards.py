"""A data set packed into WebDataset tar shards: a few large files in place of many small ones.

A shard holds, for each video, its file (``00000012.avi``) or frame images (``00000012.frame1.jpg``, …) as
they were, and what is known of it (``00000012.json``): other programs read it as WebDataset. Beside the
shards lies ``shards.json``, by which every video is found at once: the data order is the same as from single
files, and a run resumes from shards as exactly.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any, Unpack
from urllib.parse import urlparse

from tqdm import tqdm

from .clips import INDEX_FORMAT, ClipDataset, ClipOptions, Sampling, VideoEntry, stamp_of
from .counts import refuse_left_out
from .folder import check_split, split_by_name
from .sampler import epoch_order
from .storage import atomic_path, cache_home, exclusive, read_json, write_json
from .video import (
    IMAGE_EXTENSIONS,
    NOT_REGULAR,
    VIDEO_EXTENSIONS,
    Packed,
    VideoError,
    image_files,
    natural_key,
    probe,
    sha256_of,
)

FORMAT = 1
INDEX = "shards.json"

HINT = """\
Pack a data set into shards, then train on them, from a folder or from where they were copied to:
    python -m src.prepare dataset=ucf101 dataset.root=PATH shards=FOLDER
    python -m src.train +experiment=ucf101 dataset=shards dataset.root=FOLDER"""

# From one saving of a long indexing to the next, at least; more where saving takes long.
SECONDS_BETWEEN_SAVES = 30

# Shards of a remote data set that are kept at a time, at least as many as the data order mixes.
SHARDS_KEPT = 64


def write_shards(
    whole: ClipDataset, splits: Mapping[str, ClipDataset], folder: Path, *, videos_per_shard: int
) -> int:
    """Pack a data set into ``folder/shard-000000.tar`` and so on, in a shuffled order, and ``shards.json``.

    Readable videos are packed, those too short for a clip as well. Shards are written whole or not at all;
    the same call goes on where an earlier one was interrupted. Equal videos give equal bytes.

    Args:
        whole: all of the data set.
        splits: its splits, by name.
        folder: is made.
        videos_per_shard: at most.

    Returns:
        How many shards were written now.

    Raises:
        ValueError: if the folder holds shards of something else or the videos themselves, if these are packed
            already, or if ``videos_per_shard`` is below 1.
    """
    entries = sorted(whole.readable, key=lambda entry: entry.path)
    if videos_per_shard < 1:
        raise ValueError(f"videos_per_shard must be at least 1, got {videos_per_shard}")
    if any(entry.packed for entry in entries):
        raise ValueError(f"{whole.name} lies in shards already; pack the files that they were made of")
    if any(Path(entry.path).resolve().is_relative_to(folder.resolve()) for entry in entries):
        raise ValueError(f"shards={folder} holds the videos themselves; choose a folder of its own")
    members = {name: {entry.path for entry in split.readable} for name, split in splits.items()}
    splits_of = [[name for name, paths in members.items() if entry.path in paths] for entry in entries]
    title = whole.name.rpartition(",")[0]
    what = {
        "format": FORMAT,
        "title": title,
        "fingerprint": whole.fingerprint,
        "classes": list(whole.classes),
        "videos_per_shard": videos_per_shard,
        "splits": _key(json.dumps(splits_of)),
    }
    found = read_json(folder / INDEX)
    if found is not None:
        _check_index(found, str(folder))
        lines = [f"    {k}: {found.get(k)} -> {value}" for k, value in what.items() if found.get(k) != value]
        if lines:
            raise ValueError(
                f"{folder} holds shards of something else:\n" + "\n".join(lines) + "\nChoose another folder: "
                "shards=FOLDER, or delete it to pack anew"
            )
    index = found or {**what, "complete": False, "shards": []}
    root = os.path.commonpath([os.path.dirname(os.path.abspath(entry.path)) for entry in entries])
    order = epoch_order(len(entries), 0, 0)
    starts = range(0, len(order), videos_per_shard)
    written = 0
    with tqdm(total=len(order), desc="packing videos", unit="video", delay=1, leave=False) as bar:
        for number, start in enumerate(starts):
            chosen = order[start : start + videos_per_shard]
            name = f"shard-{number:06d}.tar"
            known = index["shards"][number] if number < len(index["shards"]) else None
            if known is None or _size(folder / name) != known["num_bytes"]:
                records = [
                    {**_record(entries[i], root), "key": f"{i:08d}", "splits": splits_of[i]} for i in chosen
                ]
                with atomic_path(folder / name) as part:
                    _pack(part, [entries[i] for i in chosen], records)
                    shard = {"url": name, "num_bytes": part.stat().st_size, "videos": records}
                index["shards"][number : number + 1] = [shard]
                write_json(folder / INDEX, index)
                written += 1
            bar.update(len(chosen))
    write_json(folder / INDEX, index | {"complete": True})
    return written


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _record(entry: VideoEntry, root: str) -> dict[str, Any]:
    facts = asdict(replace(entry, packed=None))
    facts["path"] = PurePosixPath(os.path.relpath(entry.path, root)).as_posix()
    return facts


def _pack(path: Path, entries: Sequence[VideoEntry], records: Sequence[dict[str, Any]]) -> None:
    """Write a tar archive, and into the records where their members lie in it."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, content: io.BufferedIOBase, size: int) -> tuple[str, int, int]:
            header = tarfile.TarInfo(name)  # no time, no owner
            header.size = size
            archive.addfile(header, content)
            padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            return name, archive.offset - padded, size

        for entry, record in zip(entries, records, strict=True):
            members = []
            for suffix, file in _files(entry):
                with file.open("rb") as opened:
                    members.append(add(f"{record['key']}{suffix}", opened, file.stat().st_size))
            record["members"] = members
            told = {key: record[key] for key in ("path", "label", "num_frames", "fps", "splits")}
            text = json.dumps(told, sort_keys=True).encode()
            add(f"{record['key']}.json", io.BytesIO(text), len(text))


def _files(entry: VideoEntry) -> Iterator[tuple[str, Path]]:
    """The files of a video, each with what its name in an archive ends in."""
    path = Path(entry.path)
    if not path.is_dir():
        yield path.suffix.lower(), path
        return
    for image in image_files(path):
        file = Path(str(image))
        yield f".{file.name}", file


def is_remote(root: str) -> bool:
    """Whether a root is the URL of an object store or web server, not a folder."""
    return len(urlparse(root).scheme) > 1


def _open_remote(url: str) -> Any:
    try:
        from webdataset.gopen import gopen
    except ImportError as error:
        raise ModuleNotFoundError(
            f"reading {url} needs the package webdataset: pip install -e '.[shards]'"
        ) from error
    return gopen(url)


def _download(url: str, path: Path) -> None:
    """Copy what a URL gives into a file, whole or not at all; raises OSError."""
    try:
        with atomic_path(path) as part, _open_remote(url) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (OSError, ValueError) as error:
        raise OSError(f"can't fetch {url}: {error}") from error


class ShardCache:
    """Fetches remote shards when they are needed, and keeps the last of them on the disk.

    Args:
        root: URL of the folder with the shards.
        sizes: bytes of each shard, by its name.
        folder: where copies lie.
    """

    def __init__(self, root: str, sizes: Mapping[str, int], folder: Path) -> None:
        self.root = root.rstrip("/")
        self.sizes = dict(sizes)
        self.folder = folder

    def __call__(self, name: str) -> str:
        """A file with the shard's content.

        Raises:
            VideoError: if it can't be fetched, or is not as large as the index says.
        """
        path = self.folder / name
        if _size(path) != self.sizes[name]:
            with exclusive(self.folder / f".{name}.lock"):
                if _size(path) != self.sizes[name]:
                    try:
                        _download(f"{self.root}/{name}", path)
                    except OSError as error:
                        raise VideoError(name, str(error)) from error
                    if _size(path) != self.sizes[name]:
                        raise VideoError(
                            name, f"it has {_size(path)} bytes, and {INDEX} says {self.sizes[name]}"
                        )
            self._forget_old(path)
        os.utime(path)
        return str(path)

    def _forget_old(self, newest: Path) -> None:
        copies = []
        for path in self.folder.glob("*.tar"):
            try:
                copies.append((path.stat().st_mtime_ns, path))
            except FileNotFoundError:  # another process was faster
                continue
        for _, path in sorted(copies)[:-SHARDS_KEPT]:
            if path != newest:
                path.unlink(missing_ok=True)


def read_index(root: str) -> tuple[dict[str, Any], Callable[[str], str] | None]:
    """What ``shards.json`` under a folder or URL says, and for a URL what fetches a shard.

    Shards that other programs have written have none: they are indexed once, from a folder.

    Raises:
        FileNotFoundError: if there are no shards; ValueError: if their packing wasn't finished.
    """
    if is_remote(root):
        folder = cache_home() / "shards" / _key(root)
        _download(f"{root.rstrip('/')}/{INDEX}", folder / INDEX)
        index = read_json(folder / INDEX)
        if index is None:
            raise FileNotFoundError(f"no shards: {root}/{INDEX} isn't an index of shards.\n{HINT}")
        _check_index(index, root)
        sizes = {shard["url"]: shard["num_bytes"] for shard in index["shards"]}
        for name in sizes:
            if not re.fullmatch(r"\w[\w.-]*\.tar", name):
                raise ValueError(f"{root}/{INDEX} names a shard {name!r}, which isn't the name of a tar file")
        fetch: Callable[[str], str] | None = ShardCache(root, sizes, folder)
    else:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"no shards: there is no folder {root}.\n{HINT}")
        index, fetch = read_json(Path(root) / INDEX), None
        if index is None:
            index = _index_of_others(Path(root))
        _check_index(index, root)
    if index["format"] != FORMAT:
        raise ValueError(f"{root}/{INDEX} is of format {index.get('format')}, expected {FORMAT}; pack anew")
    if not index["complete"]:
        raise ValueError(
            f"the packing of {root} was interrupted after {len(index['shards'])} shards; run the same "
            "python -m src.prepare … shards=… again, which goes on"
        )
    return index, fetch


def _check_index(index: Any, root: str) -> None:
    """Refuses what isn't an index of shards; ValueError."""
    whole = {"format", "title", "classes", "complete", "shards"}
    if not isinstance(index, dict) or not whole <= index.keys() or not isinstance(index["shards"], list):
        raise ValueError(
            f"{root}/{INDEX} isn't an index of shards: expected {', '.join(sorted(whole))}; copy it again, "
            "or delete it and pack anew"
        )


def _key(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]


def _index_of_others(root: Path) -> dict[str, Any]:
    """Index tar files that another program has written: samples by key, classes by ``.cls`` or ``.json``.

    What is known of an archive is kept as long as its size and times stay the same.
    """
    archives = sorted(path for path in root.rglob("*.tar") if not path.name.startswith("."))
    if not archives:
        raise FileNotFoundError(f"no shards: {root} holds neither {INDEX} nor a .tar file.\n{HINT}")
    kept = cache_home() / "index" / f"shards-{_key(str(root.resolve()))}.json"
    index: dict[str, Any] = {"format": FORMAT, "probed": INDEX_FORMAT, "title": root.name, "complete": True}
    told = read_json(kept)
    known: dict[str, dict[str, Any]] = {}
    urls = [path.relative_to(root).as_posix() for path in archives]
    if isinstance(told, dict) and (told.get("format"), told.get("probed")) == (FORMAT, INDEX_FORMAT):
        known = {shard["url"]: shard for shard in told["shards"] if shard["url"] in set(urls)}
    fresh = 0
    next_save = time.monotonic() + SECONDS_BETWEEN_SAVES

    def save() -> None:
        write_json(kept, index | {"shards": list(known.values())})

    try:
        for url in tqdm(urls, "indexing shards", unit="shard", delay=1, leave=False):
            stamp = stamp_of(root / url)
            if url in known and known[url]["stamp"] == stamp:
                continue
            known[url] = _index_one(root / url, url) | {"stamp": stamp}
            fresh += 1
            if time.monotonic() > next_save:
                begin = time.monotonic()
                save()
                next_save = begin + max(SECONDS_BETWEEN_SAVES, 20 * (time.monotonic() - begin))
    finally:  # an interrupted start goes on from here
        if fresh:
            save()
    shards = [known[url] for url in urls]
    videos = [video for shard in shards for video in shard["videos"]]
    # Numbers in their order, then words: of a class that is told by a number the name is that number.
    classes = sorted({str(video["class"]) for video in videos if video["class"] is not None}, key=_by_number)
    for video in videos:
        video["label"] = -1 if video["class"] is None else classes.index(str(video["class"]))
    broken = {name: reason for shard in shards for name, reason in shard["broken"].items()}
    return index | {"classes": classes, "shards": shards, "broken": broken}


def _index_one(path: Path, url: str) -> dict[str, Any]:
    """What there is in an archive: its videos, and by name and reason what can't be read."""
    videos: list[dict[str, Any]] = []
    shard: dict[str, Any] = {"url": url, "num_bytes": _size(path) or 0, "videos": videos, "broken": {}}
    if not path.is_file():
        shard["broken"][url] = NOT_REGULAR
        return shard
    for name, packed, told in _samples(path, url, shard["broken"]):
        try:
            splits = told.get("splits") or told.get("split")
            words = [splits] if isinstance(splits, str) else splits
            if words is not None and not (
                isinstance(words, list) and all(isinstance(word, str) for word in words)
            ):
                raise VideoError(packed, f"its split is {splits!r}, expected a word or a list of words")
            info = probe(packed)
            videos.append(
                {
                    **{key: getattr(info, key) for key in ("num_frames", "fps", "variable_rate")},
                    "path": f"{url}/{name}",
                    "seek_points": info.seek_points,
                    "size": (info.height, info.width),
                    "sha256": sha256_of(packed),
                    "num_bytes": sum(size for _, _, size in packed.members),
                    "members": packed.members,
                    "splits": words,
                    "class": told.get("class"),
                }
            )
        except VideoError as error:
            shard["broken"][f"{url}/{name}"] = error.reason
    return shard


def _by_number(name: str) -> tuple[bool, int, str]:
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def _samples(path: Path, url: str, broken: dict[str, str]) -> Iterator[tuple[str, Packed, dict[str, Any]]]:
    """The videos of an archive: name, where they lie, and what their side files tell.

    A sample is one video, whose name is its key: a video file, or else its images. Of several video files in
    a sample each is a video, by the name of the file.
    """
    members: dict[str, list[tuple[str, int, int]]] = {}
    told: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                key, _, extension = PurePosixPath(member.name).name.partition(".")
                key = str(PurePosixPath(member.name).parent / key)
                suffix = PurePosixPath(member.name).suffix.lower()
                if suffix in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
                    members.setdefault(key, []).append((member.name, member.offset_data, member.size))
                elif extension in ("json", "cls"):
                    content = archive.extractfile(member)
                    text = content.read().decode(errors="replace") if content else ""
                    side = _parsed(text) if extension == "json" else {"class": text.strip()}
                    told.setdefault(key, {}).update(side)
            end = archive.offset
        damage = _damage_after(path, end)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        damage = str(error)
    if damage:
        broken[url] = f"the archive is damaged: {damage}"
    for key, found in members.items():
        side = told.get(key, {})
        if "class" not in side and side.get("label") is not None:
            side["class"] = str(side["label"])
        files = [part for part in found if PurePosixPath(part[0]).suffix.lower() in VIDEO_EXTENSIONS]
        videos: list[tuple[tuple[str, int, int], ...]] = [(part,) for part in files] or [tuple(found)]
        for video in videos:
            yield key if len(videos) == 1 else video[0][0], Packed(str(path), video), side


def _damage_after(path: Path, end: int) -> str:
    """What is wrong behind the last member of an archive that could be read, which ends at a byte; or "".

    There are zeros, or else the rest would be lost without a word.
    """
    with path.open("rb") as file:
        file.seek(end)
        place = end
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                rest = place + len(chunk) - len(chunk.lstrip(b"\0"))
                size = path.stat().st_size
                return f"what begins at byte {rest:,} of {size:,} is no member of it and isn't read"
            place += len(chunk)
    return "" if place > end else "it breaks off before its end"


def _parsed(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def shards(
    root: str | None,
    *,
    split: str,
    test_fraction: float,
    **clips: Unpack[ClipOptions],
) -> ClipDataset:
    """Clips of a data set in WebDataset tar shards, in a folder or under a URL (then with `webdataset`).

    Splits are those that it was packed with; of the videos that it tells no split of ``test_fraction``,
    chosen by a hash of their names, is kept for testing. Remote shards are fetched when their turn comes, a
    few at a time.

    Raises FileNotFoundError if there are no shards, ValueError if their packing wasn't finished.
    """
    check_split(split)
    if root is None:
        raise FileNotFoundError(f"no shards: dataset.root is not set.\n{HINT}")
    index, fetch = read_index(str(root))
    sampling = Sampling.of(clips)
    videos: list[tuple[VideoEntry, list[str] | None]] = []
    lost: dict[str, str] = {}
    for shard in index["shards"]:
        archive = shard["url"] if fetch is not None else str(Path(root) / shard["url"])
        gone = fetch is None and _size(Path(archive)) != shard["num_bytes"]
        for record in shard["videos"]:
            told = record["splits"]
            splits = None if told is None else [word.casefold() for word in told]
            entry = _entry(record, archive)
            videos.append((entry, splits))
            if gone:
                reason = f"{shard['url']} isn't there with the {shard['num_bytes']:,} bytes of {INDEX}"
                lost[entry.path] = reason
    videos.sort(key=lambda video: natural_key(video[0].path))
    untold = [entry.path for entry, splits in videos if splits is None and not sampling.skips(entry)]
    here = set(split_by_name(untold, test_fraction, split))
    elsewhere = set(untold) - here
    left_out = {}
    chosen = []
    for entry, splits in videos:
        if split == "all" or (entry.path not in elsewhere if splits is None else split in splits):
            chosen.append(entry)
        elif splits and not {"train", "test"} & set(splits):
            left_out[entry.path] = f"of the split {', '.join(splits)}, which is neither train nor test"
    if not chosen:
        raise ValueError(f"the shards in {root} hold no video of the split {split!r}")
    broken = [VideoError(name, reason) for name, reason in index.get("broken", {}).items()]
    broken += [VideoError(entry.path, lost[entry.path]) for entry in chosen if entry.path in lost]
    chosen = [entry for entry in chosen if entry.path not in lost]
    if clips["strict"]:
        refuse_left_out(left_out)
        if broken:
            raise broken[0]
    return ClipDataset(
        chosen,
        index["classes"],
        fetch=fetch,
        name=f"{index['title']}, {split}",
        broken=broken,
        left_out=left_out,
        **clips,
    )


def _entry(record: dict[str, Any], archive: str) -> VideoEntry:
    return VideoEntry(
        path=record["path"],
        label=record["label"],
        num_frames=record["num_frames"],
        fps=record["fps"],
        variable_rate=record["variable_rate"],
        num_bytes=record["num_bytes"],
        seek_points=tuple((frame, pts) for frame, pts in record["seek_points"]),
        sha256=record["sha256"],
        size=tuple(record["size"]) if record["size"] else None,
        packed=Packed(archive, tuple((name, offset, size) for name, offset, size in record["members"])),
    )
