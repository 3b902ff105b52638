"""Shards against the single files that they were packed from, against webdataset itself, and over HTTP."""

import functools
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.data import shards as module
from src.data.clips import ClipDataset
from src.data.folder import folder
from src.data.sampler import GROUPS_AT_ONCE, epoch_order
from src.data.shards import shards, write_shards
from src.data.video import VideoError, write_video

COMMON: dict[str, Any] = {
    "test_fraction": 0.25, "num_frames": 4, "frame_stride": 2, "fps": None, "resolution": 16,
    "crop": "center_crop", "horizontal_flip": True, "short_videos": "skip", "clips_per_opening": 1, "seed": 3,
    "cache": None, "strict": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path_factory.mktemp("cache_home")))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two classes of mp4 files and a third of frame images, one file too short and one broken."""
    root = tmp_path / "videos"
    draw = np.random.default_rng(0)
    for kind in ("one", "two"):
        for number in range(5):
            frames = draw.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
            write_video(root / kind / f"clip {number}.mp4", frames, 8)
    for number in range(3):
        images = root / "three" / f"images{number}"
        images.mkdir(parents=True)
        for t in range(11):
            frame = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(frame).save(images / f"frame.{t}.png")
    write_video(root / "two/short.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)
    (root / "two/broken.mp4").write_bytes(b"no video")
    return root


def pack(root: Path, target: Path, videos_per_shard: int = 4, **changes: Any) -> int:
    whole, train, test = (
        folder(str(root), split=split, **(COMMON | changes)) for split in ("all", "train", "test")
    )
    return write_shards(whole, {"train": train, "test": test}, target, videos_per_shard=videos_per_shard)


def same(one: ClipDataset, other: ClipDataset, positions: range = range(40)) -> None:
    for position in positions:
        a, b = one[position], other[position]
        assert torch.equal(a["frames"], b["frames"]) and a["label"] == b["label"]


@pytest.mark.parametrize("changes", [{}, {"fps": 3.0, "frame_stride": 1}, {"short_videos": "loop"}])
def test_shards_give_the_same_clips_in_the_same_order(
    videos: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert pack(videos, tmp_path / "packed", **changes) == 4
    for split in ("train", "test", "all"):
        plain = folder(str(videos), split=split, **(COMMON | changes))
        packed = shards(str(tmp_path / "packed"), split=split, **(COMMON | changes))
        assert len(plain) == len(packed) and plain.classes == packed.classes
        assert plain.fingerprint == packed.fingerprint
        same(plain, packed)
        cached = shards(
            str(tmp_path / "packed"), split=split, **(COMMON | changes | {"cache": tmp_path / "c"})
        )
        same(plain, cached)


def test_other_programs_read_them(videos: Path, tmp_path: Path) -> None:
    """The library's own reader finds every file, byte for byte, beside its label."""
    import webdataset

    pack(videos, tmp_path / "packed")
    names = sorted(str(path) for path in (tmp_path / "packed").glob("*.tar"))
    samples = list(webdataset.WebDataset(names, shardshuffle=False))
    assert len(samples) == 14 and len({sample["__key__"] for sample in samples}) == 14
    for sample in samples:
        told = json.loads(sample["json"])
        original = videos / told["path"]
        if original.is_dir():
            for image in original.iterdir():
                assert sample[image.name.lower()] == image.read_bytes()
        else:
            assert sample["mp4"] == original.read_bytes()


def test_webp_frames_are_packed_as_frames(tmp_path: Path) -> None:
    images = tmp_path / "videos/walk"
    images.mkdir(parents=True)
    for t in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * t, np.uint8)).save(images / f"{t}.webp", lossless=True)
    settings = COMMON | {"test_fraction": 0.0}
    plain = folder(str(tmp_path / "videos"), split="all", **settings)
    write_shards(plain, {"train": plain}, tmp_path / "packed", videos_per_shard=2)
    same(plain, shards(str(tmp_path / "packed"), split="all", **settings), range(4))


def test_an_interrupted_packing_goes_on(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(videos, tmp_path / "straight")
    packing, done = module._pack, []

    def third_fails(path: Path, *arguments: Any) -> None:
        if len(done) == 2:
            path.write_bytes(b"half a shard")
            raise OSError(28, "No space left on device")
        done.append(path)
        packing(path, *arguments)

    monkeypatch.setattr(module, "_pack", third_fails)
    with pytest.raises(OSError, match="No space left"):
        pack(videos, tmp_path / "packed")
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        "shard-000000.tar", "shard-000001.tar", "shards.json"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="interrupted after 2 shards; run the same"):
        shards(str(tmp_path / "packed"), split="all", **COMMON)
    monkeypatch.setattr(module, "_pack", packing)
    assert pack(videos, tmp_path / "packed") == 2
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("straight", "packed")
    ]
    assert digests[0] == digests[1]
    assert pack(videos, tmp_path / "packed") == 0
    with pytest.raises(ValueError, match=r"something else:\n    splits: "):  # other videos are for testing
        pack(videos, tmp_path / "packed", test_fraction=0.5)
    with pytest.raises(ValueError, match="holds the videos themselves"):
        pack(videos, videos)
    with pytest.raises(ValueError, match=r"something else:\n    videos_per_shard: 4 -> 5\n"):
        pack(videos, tmp_path / "packed", videos_per_shard=5)


def test_a_shard_that_is_missing_is_named_and_skipped(videos: Path, tmp_path: Path) -> None:
    pack(videos, tmp_path / "packed")
    (tmp_path / "packed/shard-000001.tar").unlink()
    data = shards(str(tmp_path / "packed"), split="all", **COMMON)
    assert len(data) in (9, 10) and "shard-000001.tar isn't there with the " in data.summary()
    assert "4 skipped as broken (" in data.summary(), "each of its videos counts"
    with pytest.raises(VideoError, match=r"shard-000001\.tar"):
        shards(str(tmp_path / "packed"), split="all", **(COMMON | {"strict": True}))


def test_missing_shards_say_how_to_make_them(tmp_path: Path) -> None:
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"python -m src.prepare .* shards=FOLDER"):
            shards(None if root is None else str(root), split="train", **COMMON)


def test_shards_of_others_are_indexed_once(videos: Path, tmp_path: Path) -> None:
    """Written by webdataset's writer: keys, videos, classes by number, by ``.cls`` or ``.json``."""
    import webdataset

    (tmp_path / "others").mkdir()
    files = sorted((videos / "one").glob("*.mp4"))
    with webdataset.TarWriter(str(tmp_path / "others/a.tar")) as writer:
        for number, file in enumerate(files):
            writer.write({"__key__": f"clip{number}", "mp4": file.read_bytes(), "cls": 10 + number % 2})
        writer.write({"__key__": "bad", "mp4": b"no video", "cls": 10})
    with webdataset.TarWriter(str(tmp_path / "others/b.tar")) as writer:
        writer.write({"__key__": "x", "mp4": files[0].read_bytes(), "json": {"label": 9}})
    (tmp_path / "others/c.tar").write_bytes((tmp_path / "others/b.tar").read_bytes()[:700])
    settings = COMMON | {"test_fraction": 0.0, "horizontal_flip": False}
    data = shards(str(tmp_path / "others"), split="all", **settings)
    assert data.classes == ("9", "10", "11") and len(data) == 6
    assert [entry.label for entry in data.entries] == [1, 2, 1, 2, 1, 0]
    assert "bad: Invalid data" in data.summary() and "c.tar: the archive is damaged" in data.summary()
    original = folder(str(videos / "one"), split="all", **settings).held_out(0)["frames"]
    assert torch.equal(data.held_out(0)["frames"], original)
    before = module.probe
    module.probe = None  # type: ignore[assignment]
    try:
        assert len(shards(str(tmp_path / "others"), split="all", **settings)) == 6
    finally:
        module.probe = before


OTHERS = COMMON | {"test_fraction": 0.0, "horizontal_flip": False}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def test_of_a_sample_the_video_is_read_and_not_its_thumbnail(videos: Path, tmp_path: Path) -> None:
    """And of several videos in a sample each."""
    one, two = (videos / f"one/clip {k}.mp4" for k in range(2))
    thumbnail = next((videos / "three/images0").iterdir()).read_bytes()
    members = {
        "a.jpg": thumbnail, "a.mp4": one.read_bytes(), "a.cls": b"7",
        "b.left.mp4": one.read_bytes(), "b.right.mp4": two.read_bytes(), "b.cls": b"8",
        "c.1.png": thumbnail, "c.2.png": thumbnail, "c.3.png": thumbnail, "c.4.png": thumbnail,
    }  # fmt: skip
    write_tar(tmp_path / "others/x.tar", members)
    data = shards(str(tmp_path / "others"), split="all", **(OTHERS | {"frame_stride": 1}))
    assert data.broken == {}
    found = {entry.path: (entry.num_frames, entry.label) for entry in data.entries}
    assert found == {
        "x.tar/a": (12, 0), "x.tar/b.left.mp4": (12, 1), "x.tar/b.right.mp4": (12, 1), "x.tar/c": (4, -1)
    }  # fmt: skip


def test_an_archive_that_loses_its_rest_says_so(videos: Path, tmp_path: Path) -> None:
    """Damaged in the middle, broken off between two members, or two archives in one file."""
    content = (videos / "one/clip 0.mp4").read_bytes()
    write_tar(tmp_path / "whole.tar", {f"{k}.mp4": content for k in range(4)})
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        third = archive.getmembers()[2].offset
    others = tmp_path / "others"
    others.mkdir()
    damaged = whole[:third] + b"\1" * 512 + whole[third + 512 :]
    size = len(whole)
    for name, bytes_, count, reason in [
        (
            "middle",
            damaged,
            2,
            f"what begins at byte {third:,} of {size:,} is no member of it and isn't read",
        ),
        ("cut", whole[:third], 2, "it breaks off before its end"),
        ("two", whole + whole, 4, f"what begins at byte {size:,} of {2 * size:,} is no member of it"),
        ("good", whole, 4, ""),
    ]:
        for file in others.iterdir():
            file.unlink()
        (others / f"{name}.tar").write_bytes(bytes_)
        data = shards(str(others), split="all", **OTHERS)
        assert len(data) == count, name
        assert [f"{name}.tar"] * bool(reason) == list(data.broken)
        if reason:
            assert f"{name}.tar: the archive is damaged: {reason}" in data.summary()
            with pytest.raises(VideoError, match="the archive is damaged"):
                shards(str(others), split="all", **(OTHERS | {"strict": True}))


def test_archives_may_move_between_folders(videos: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    write_tar(others / "a/x.tar", {"1.mp4": (videos / "one/clip 0.mp4").read_bytes(), "2.mp4": b"no video"})
    write_tar(others / "b/x.tar", {"1.mp4": (videos / "one/clip 1.mp4").read_bytes(), "2.mp4": b"no video"})
    (others / "c").mkdir()
    for moved in ("a", "c"):
        data = shards(str(others), split="all", **OTHERS)
        assert {entry.path for entry in data.entries} == {f"{moved}/x.tar/1", "b/x.tar/1"}
        assert set(data.broken) == {f"{moved}/x.tar/2", "b/x.tar/2"} and len(data[0]["frames"]) == 4
        if moved == "a":
            (others / "a/x.tar").rename(others / "c/x.tar")
    os.mkfifo(others / "pipe.tar")
    assert "no regular file" in shards(str(others), split="all", **OTHERS).broken["pipe.tar"]


def test_only_samples_that_tell_their_split_are_bound_to_it(videos: Path, tmp_path: Path) -> None:
    content = (videos / "one/clip 0.mp4").read_bytes()
    members = {f"{k}.mp4": content for k in range(8)}
    members |= {
        "0.json": b'{"split": "validation"}',
        "1.json": b'{"split": "Test"}',
        "2.json": b'{"splits": 7}',
    }
    write_tar(tmp_path / "others/x.tar", members)
    settings = OTHERS | {"test_fraction": 0.25}
    train, test, whole = (
        shards(str(tmp_path / "others"), split=split, **settings) for split in ("train", "test", "all")
    )
    assert [len(train), len(test), len(whole)] == [4, 2, 7]
    assert "x.tar/1" in {entry.path for entry in test.entries}
    reason = "of the split validation, which is neither train nor test"
    assert train.left_out == test.left_out == {"x.tar/0": reason} and whole.left_out == {}
    assert whole.broken == {"x.tar/2": "its split is 7, expected a word or a list of words"}


@pytest.mark.parametrize("content", ["[]", '{"format": 1}', '{"format": 1, "shards": 3}'])
def test_what_is_no_index_of_shards_is_refused(videos: Path, tmp_path: Path, content: str) -> None:
    target = tmp_path / "packed"
    target.mkdir()
    (target / "shards.json").write_text(content)
    with pytest.raises(ValueError, match=r"shards\.json isn't an index of shards: expected classes"):
        shards(str(target), split="all", **COMMON)
    with pytest.raises(ValueError, match=r"shards\.json isn't an index of shards: expected classes"):
        pack(videos, target)


@pytest.fixture
def served(videos: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server that has the shards: its URL and its folder."""
    pack(videos, tmp_path / "web/packed")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/packed", tmp_path / "web/packed"
        server.shutdown()
        thread.join()


def test_remote_shards_are_fetched_when_their_turn_comes(
    served: tuple[str, Path], videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, web = served
    data = shards(url, split="all", **COMMON)
    plain = folder(str(videos), split="all", **COMMON)
    kept = data._fetch.folder  # type: ignore[union-attr]
    assert not list(kept.glob("*.tar"))
    by_name = {entry.path: position for position, entry in enumerate(data.entries)}
    for entry in plain.entries:
        name = Path(entry.path).relative_to(videos).as_posix()
        mine, other = data.held_out(by_name[name]), plain.held_out(plain.entries.index(entry))
        assert torch.equal(mine["frames"], other["frames"]) and mine["label"] == other["label"]
    assert len(list(kept.glob("*.tar"))) == 4
    # Kept on the disk, they need no server; but only so many are.
    for shard in web.glob("*.tar"):
        shard.unlink()
    assert len(shards(url, split="all", **COMMON)[0]["frames"]) == 4
    monkeypatch.setattr(module, "SHARDS_KEPT", 2)
    data._fetch._forget_old(kept / "shard-000000.tar")  # type: ignore[union-attr]
    assert len(list(kept.glob("*.tar"))) <= 3
    (kept / "shard-000003.tar").unlink(missing_ok=True)
    strict = shards(url, split="all", **(COMMON | {"strict": True, "short_videos": "pad"}))
    with pytest.raises(VideoError, match=r"can't fetch http.*shard-00000"):
        for index in range(len(strict)):
            strict.held_out(index)


def test_a_remote_index_cant_name_files_elsewhere(served: tuple[str, Path]) -> None:
    url, web = served
    index = json.loads((web / "shards.json").read_text())
    index["shards"][0]["url"] = "../../outside.tar"
    (web / "shards.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names a shard '../../outside.tar'"):
        shards(url, split="all", **COMMON)
    with pytest.raises((OSError, FileNotFoundError), match=r"can't fetch http.*nothing/shards.json"):
        shards(f"{url}/nothing", split="all", **COMMON)


def test_the_order_of_remote_items_takes_few_groups_at_a_time() -> None:
    """Every item once an epoch; a window of the order meets at most twice so many groups."""
    groups = [item // 10 for item in range(400)]
    orders = [epoch_order(400, 0, epoch, groups) for epoch in range(2)]
    for order in orders:
        assert sorted(order) == list(range(400))
        for begin in range(0, 400, 10 * GROUPS_AT_ONCE):
            window = {groups[item] for item in order[begin : begin + 10 * GROUPS_AT_ONCE]}
            assert len(window) == GROUPS_AT_ONCE
            assert len({groups[item] for item in order[begin : begin + 10]}) > 2, "they are mixed"
    assert orders[0] != orders[1] and orders[0] == epoch_order(400, 0, 0, groups)


def test_members_lie_where_the_index_says(videos: Path, tmp_path: Path) -> None:
    """Offsets as the standard library's reader finds them."""
    pack(videos, tmp_path / "packed")
    index = json.loads((tmp_path / "packed/shards.json").read_text())
    for shard in index["shards"]:
        with tarfile.open(tmp_path / "packed" / shard["url"]) as archive:
            found = {member.name: (member.offset_data, member.size) for member in archive}
        for video in shard["videos"]:
            for name, offset, size in video["members"]:
                assert found[name] == (offset, size)
