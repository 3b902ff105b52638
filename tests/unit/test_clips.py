import json
import os
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from src.data import clips as clips_module
from src.data.clips import INDEX_FORMAT, ClipDataset, VideoEntry, find_videos, list_videos
from src.data.sampler import PositionSampler, batches
from src.data.storage import atomic_path, read_json, write_json
from src.data.transforms import Frames, Resize
from src.data.video import VideoError, encode_preview, read_clip, write_video

Shared = Callable[[str], Path]


@pytest.fixture(autouse=True)
def own_cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("cache_home")
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(home))
    return home


def ramp(num_frames: int, base: int = 0) -> Frames:
    """Frames whose level tells their index (6 levels apart), darker on the left."""
    frames = np.zeros((num_frames, 16, 16, 3), np.uint8)
    for t in range(num_frames):
        frames[t, :, 8:] = base + 6 * t
    return frames


def index_of(frame: Any) -> int:
    return round(float(np.asarray(frame)[:, 9:].mean()) / 6)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with three videos each of 40 frames, one of 5 frames, one that isn't a video."""
    root = tmp_path / "videos"
    for name in ("a/1.mp4", "a/2.mp4", "a/10.mp4", "b/c/1.mp4", "b/c/2.mp4", "b/c/3.mp4"):
        write_video(root / name, ramp(40), 8)
    write_video(root / "a/short.mp4", ramp(5), 8)
    (root / "a/broken.mp4").write_text("nothing")
    (root / "a/notes.txt").write_text("nothing")
    (root / "a/.hidden.mp4").write_text("nothing")
    return root


def dataset(root: Path, **changes: Any) -> ClipDataset:
    found = find_videos(root, strict=False)
    arguments: dict[str, Any] = {
        "num_frames": 8,
        "frame_stride": 2,
        "resolution": 16,
        "crop": "center_crop",
        "horizontal_flip": False,
        "seed": 0,
        "cache": None,
        "strict": False,
        "name": "test videos",
        "broken": found.broken,
    }
    return ClipDataset(found.entries, found.classes, **(arguments | changes))


def test_videos_are_found_in_natural_order(root: Path) -> None:
    images = root / "d" / "walk"
    images.mkdir(parents=True)
    for t in range(9):
        Image.fromarray(ramp(1)[0]).save(images / f"{t}.png")
    (root / "d" / "loop").symlink_to(root, target_is_directory=True)
    assert list_videos(root) == [
        *("a/1.mp4", "a/2.mp4", "a/10.mp4", "a/broken.mp4", "a/short.mp4"),
        *("b/c/1.mp4", "b/c/2.mp4", "b/c/3.mp4", "d/walk"),
    ]
    found = find_videos(root, strict=False)
    assert found.classes == ("a", "b/c", "d")
    assert [entry.label for entry in found.entries] == [0, 0, 0, 0, 1, 1, 1, 2]
    assert [entry.num_frames for entry in found.entries] == [40, 40, 40, 5, 40, 40, 40, 9]
    assert {entry.fps for entry in found.entries[:7]} == {8.0}
    assert [Path(error.path).name for error in found.broken] == ["broken.mp4"]
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        find_videos(root, strict=True)


def test_an_animated_webp_is_a_video_and_a_still_one_a_frame(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/moving.webp").write_bytes(encode_preview(ramp(6), 8))
    (tmp_path / "frames").mkdir()
    for t in range(4):
        Image.fromarray(ramp(5)[t]).save(tmp_path / f"frames/{t}.webp")
    found = find_videos(tmp_path, strict=True)
    assert [(Path(e.path).name, e.num_frames) for e in found.entries] == [("moving.webp", 6), ("frames", 4)]


@pytest.mark.parametrize(
    ("extension", "format_", "codec"),
    [
        *((".nut", "nut", "mpeg4"), (".vob", "vob", "mpeg2video"), (".asf", "asf", "wmv2")),
        *(
            (".y4m", "yuv4mpegpipe", "wrapped_avframe"),
            (".mxf", "mxf", "mpeg2video"),
            (".f4v", "mp4", "h264"),
        ),
        *((".mpe", "mpeg", "mpeg1video"), (".qt", "mov", "mpeg4"), (".m2v", "mpeg2video", "mpeg2video")),
    ],
)
def test_files_of_rarer_kinds_are_found_and_read(
    tmp_path: Path, extension: str, format_: str, codec: str
) -> None:
    path = tmp_path / f"a/x{extension.upper()}"
    path.parent.mkdir()
    with av.open(str(path), "w", format=format_) as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for level in range(10):
            picture = np.full((48, 64, 3), 20 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    (entry,) = find_videos(tmp_path, strict=True).entries
    assert entry.num_frames == 10 and entry.size == (48, 64)
    assert read_clip(path, 9, 1).mean() == pytest.approx(180, abs=6)


def test_two_kinds_of_one_frame_are_no_two_frames(tmp_path: Path) -> None:
    (tmp_path / "walk").mkdir()
    for t in range(4):
        for kind in ("jpg", "png"):
            Image.fromarray(ramp(5)[t]).save(tmp_path / f"walk/{t}.{kind}")
    (error,) = find_videos(tmp_path, strict=False).broken
    assert error.reason == "two of its images have one name, 0.jpg and 0.png; keep one kind"


def test_files_right_under_the_root_have_no_class(tmp_path: Path) -> None:
    write_video(tmp_path / "1.mp4", ramp(8), 8)
    found = find_videos(tmp_path, strict=True)
    assert found.classes == () and found.entries[0].label == -1
    assert list_videos(tmp_path) == ["1.mp4"]


def test_probing_is_done_once_per_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_videos(root, strict=False)
    probed: list[str] = []

    def count(path: Path) -> Any:
        probed.append(path.name)
        return original(path)

    original = clips_module.probe
    monkeypatch.setattr(clips_module, "probe", count)
    assert find_videos(root, strict=False).entries == first.entries
    assert probed == []
    write_video(root / "a/2.mp4", ramp(17), 8)
    write_video(root / "a/broken.mp4", ramp(17), 8)
    again = find_videos(root, strict=False)
    assert sorted(probed) == ["2.mp4", "broken.mp4"]
    assert {e.num_frames for e in again.entries if e.path.endswith(("2.mp4", "broken.mp4"))} == {17, 40}
    assert again.broken == ()


def test_a_damaged_index_is_made_anew(root: Path, own_cache_home: Path) -> None:
    first = find_videos(root, strict=False)
    (file,) = (own_cache_home / "index").glob("*.json")
    file.write_text("{")
    assert find_videos(root, strict=False).entries == first.entries
    assert json.loads(file.read_text())["format"] == INDEX_FORMAT


@pytest.mark.parametrize(
    "content", ["[]", '{"format": %d}', '{"format": %d, "videos": {"a/1.mp4": {"info": {}}, "a/2.mp4": {}}}']
)
def test_an_index_of_another_shape_is_made_anew(root: Path, own_cache_home: Path, content: str) -> None:
    first = find_videos(root, strict=False)
    (file,) = (own_cache_home / "index").glob("*.json")
    file.write_text(content.replace("%d", str(INDEX_FORMAT)))
    assert find_videos(root, strict=False).entries == first.entries


def test_an_interrupted_probing_loses_nothing_that_was_told(
    root: Path, own_cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even in a process that has no time to save: each video is on the disk once it is known."""
    probed: list[str] = []

    def fifth_interrupts(path: Path) -> Any:
        if len(probed) == 4:
            raise KeyboardInterrupt
        probed.append(path.name)
        return original(path)

    original = clips_module.probe
    with monkeypatch.context() as patch:
        patch.setattr(clips_module, "probe", fifth_interrupts)
        patch.setattr(clips_module.os, "cpu_count", lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            find_videos(root, strict=False)
    (journal,) = (own_cache_home / "index").glob("*.jsonl")
    with journal.open("a") as file:
        file.write('["b/c/3.mp4", {"stam')
    first = list(probed)
    monkeypatch.setattr(clips_module, "probe", lambda path: probed.append(path.name) or original(path))
    assert len(find_videos(root, strict=False).entries) == 7
    assert len(first) == 4 and len(probed) == 8
    assert not journal.exists()
    find_videos(root, strict=False)
    assert len(probed) == 8


def test_a_file_replaced_by_one_of_its_size_and_date_is_probed_again(root: Path) -> None:
    """In a folder of frames as well, where an older file takes the place of one of several."""
    images = root / "walk"
    images.mkdir()
    for t in range(3):
        Image.fromarray(ramp(2)[1]).save(images / f"{t}.bmp")
    other = root.parent / "other.bmp"
    Image.fromarray(ramp(9)[8]).save(other)
    os.utime(other, (1e9, 1e9))
    before = {Path(entry.path).name: entry.sha256 for entry in find_videos(root, strict=False).entries}
    assert other.stat().st_size == (images / "1.bmp").stat().st_size
    os.replace(other, images / "1.bmp")
    video = root / "a/10.mp4"
    status, content = video.stat(), bytearray(video.read_bytes())
    content[-1] ^= 1
    video.write_bytes(content)
    os.utime(video, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = {Path(entry.path).name: entry.sha256 for entry in find_videos(root, strict=False).entries}
    assert {name for name in before if before[name] != after[name]} == {"walk", "10.mp4"}


def test_what_never_ends_is_named_and_not_read(root: Path) -> None:
    os.mkfifo(root / "a/pipe.mp4")
    (root / "a/zeros.avi").symlink_to("/dev/zero")
    (root / "walk").mkdir()
    os.mkfifo(root / "walk/1.jpg")
    found = find_videos(root, strict=False)
    reasons = {Path(error.path).name: error.reason for error in found.broken}
    assert set(reasons) == {"broken.mp4", "pipe.mp4", "zeros.avi", "walk"}
    assert all("no regular file" in reasons[name] for name in ("pipe.mp4", "zeros.avi", "walk"))
    with pytest.raises(VideoError, match="no regular file"):
        read_clip(root / "a/pipe.mp4", 0, 1)


def test_an_index_that_cannot_be_kept_is_only_a_warning(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="can't keep the index"):
        assert len(find_videos(root, strict=False).entries) == 7


def test_summary_counts_and_names_what_is_skipped(root: Path) -> None:
    data = dataset(root)
    assert len(data) == 6
    summary = data.summary()
    assert summary.startswith(
        "test videos: 6 videos, 2 classes, 16x16, clips of 8 frames at stride 2 (4 fps)"
    )
    assert "1 skipped as too short (short.mp4: 5 frames)" in summary
    assert "1 skipped as broken (broken.mp4: " in summary


def test_many_skipped_are_counted_and_a_few_named(tmp_path: Path) -> None:
    entries = [VideoEntry(f"/v/{k}.mp4", -1, 4 if k else 40, 8.0) for k in range(9)]
    data = ClipDataset(entries, (), num_frames=8, frame_stride=1, resolution=16)
    assert (
        "8 skipped as too short (1.mp4: 4 frames, 2.mp4: 4 frames, 3.mp4: 4 frames, and 5 more)"
        in data.summary()
    )


def test_clips_are_the_files_frames_at_random_places(root: Path) -> None:
    data = dataset(root)
    starts = []
    for position in range(60):
        item = data[position]
        frames = item["frames"]
        assert frames.dtype == torch.uint8 and frames.shape == (8, 16, 16, 3)
        assert item["position"] == position and item["label"] in (0, 1)
        indices = [index_of(frame) for frame in frames]
        assert indices == [indices[0] + 2 * k for k in range(8)]
        starts.append(indices[0])
    assert min(starts) == 0 and max(starts) == 25 and len(set(starts)) > 15


def test_an_item_depends_on_seed_and_position_only(root: Path) -> None:
    data, same, other = dataset(root), dataset(root), dataset(root, seed=1)
    for position in (41, 3, 17, 3):
        assert torch.equal(data[position]["frames"], same[position]["frames"])
    assert any(not torch.equal(data[p]["frames"], other[p]["frames"]) for p in range(6))
    with pytest.raises(IndexError, match="-1"):
        data[-1]


def test_every_epoch_visits_every_video(root: Path) -> None:
    data = dataset(root)
    for epoch in range(3):
        labels = [data[6 * epoch + k]["label"] for k in range(6)]
        assert sorted(labels) == [0, 0, 0, 1, 1, 1]


def test_flips_are_half_and_whole_clips(root: Path) -> None:
    data = dataset(root, horizontal_flip=True)
    flipped = 0
    for position in range(60):
        frames = data[position]["frames"].float()
        left, right = frames[-1, :, :7].mean(), frames[-1, :, 9:].mean()
        flipped += bool(left > right)
        last = frames[1:] if left > right else frames[1:].flip(2)
        assert (last[:, :, 9:].mean() - last[:, :, :7].mean()) < 0
    assert 15 <= flipped <= 45


def test_held_out_clips_are_centred_and_unflipped(root: Path) -> None:
    data = dataset(root, horizontal_flip=True)
    for index in range(6):
        item = data.held_out(index)
        assert index_of(item["frames"][0]) == (40 - 15) // 2
        assert item["position"] == index and item["label"] == data.entries[index].label


def test_variable_rate_is_read_by_time(shared: Shared) -> None:
    path = shared("odd_clips/variable_frame_rate.mp4")
    (entry,) = find_videos(path.parent, strict=True, names=[path.name]).entries
    assert entry.variable_rate
    data = ClipDataset([entry], (), num_frames=entry.num_frames, frame_stride=1, resolution=32)
    by_time = read_clip(path, 0, entry.num_frames, at_fps=entry.fps, resize=Resize(32))
    np.testing.assert_array_equal(data[0]["frames"].numpy(), by_time)
    assert not np.array_equal(by_time, read_clip(path, 0, entry.num_frames, resize=Resize(32)))


def test_fps_and_fingerprint_tell_the_content(root: Path, tmp_path: Path) -> None:
    data = dataset(root)
    assert data.fps == 4
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    assert dataset(moved).fingerprint == data.fingerprint
    (moved / "a/1.mp4").rename(moved / "a/one.mp4")
    renamed = dataset(moved).fingerprint
    assert renamed != data.fingerprint
    write_video(moved / "a/one.mp4", ramp(39), 8)
    assert dataset(moved).fingerprint not in (renamed, data.fingerprint)


# The cache of decoded videos.


def test_the_cache_changes_nothing_but_the_time(root: Path, tmp_path: Path) -> None:
    plain = dataset(root, resolution=(12, 8), horizontal_flip=True)
    cached = dataset(root, resolution=(12, 8), horizontal_flip=True, cache=tmp_path / "cache")
    for position in range(20):
        a, b = plain[position], cached[position]
        assert a["label"] == b["label"] and torch.equal(a["frames"], b["frames"])
    assert torch.equal(plain.held_out(2)["frames"], cached.held_out(2)["frames"])
    assert plain.fingerprint == cached.fingerprint


def test_the_cache_is_made_once_and_anew_when_something_changed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    original = ClipDataset._fill_cache

    def count(self: ClipDataset, *arguments: Any) -> Any:
        nonlocal made
        made += 1
        return original(self, *arguments)

    monkeypatch.setattr(ClipDataset, "_fill_cache", count)
    cache = tmp_path / "cache"
    dataset(root, cache=cache)
    dataset(root, cache=cache, seed=5, num_frames=4, horizontal_flip=True)
    assert made == 1
    dataset(root, cache=cache, resolution=8)
    dataset(root, cache=cache, resolution=8, crop="squash")
    assert made == 3
    # The same content with another date, then another content.
    data = (root / "a/1.mp4").read_bytes()
    (root / "a/1.mp4").write_bytes(data)
    dataset(root, cache=cache)
    assert made == 3
    write_video(root / "a/1.mp4", ramp(40, base=2), 8)
    dataset(root, cache=cache)
    assert made == 4
    # A file cut short by a full disk or a kill.
    for file in cache.glob("*.uint8"):
        os.truncate(file, 100)
    assert index_of(dataset(root, cache=cache).held_out(0)["frames"][0]) == 12
    assert made == 5
    assert not list(cache.glob(".*.part"))


def test_a_cached_clip_takes_a_fraction_of_a_millisecond(root: Path, tmp_path: Path) -> None:
    data = dataset(root, cache=tmp_path / "cache", resolution=32, num_frames=16, frame_stride=1)
    data[0]
    times = []
    for position in range(300):
        begin = time.perf_counter()
        data[position]
        times.append(time.perf_counter() - begin)
    assert np.median(times) < 0.3e-3


def test_the_cache_refuses_a_disk_without_room(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1_000_000 - 1

    monkeypatch.setattr(clips_module.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match=r"needs 3 MB, and .*cache has 1 MB free.*dataset\.cache=null"):
        dataset(root, cache=tmp_path / "cache", resolution=64)


def test_what_a_killed_process_left_of_a_cache_is_removed(root: Path, tmp_path: Path) -> None:
    """Of this cache; another one may be in the making."""
    cache = tmp_path / "cache"
    dataset(root, cache=cache)
    (pixels,) = cache.glob("*.uint8")
    leftover, other = (cache / f".{name}.123.part" for name in (pixels.name, "other.uint8"))
    for begun in (leftover, other):
        begun.touch()
        os.truncate(begun, 1 << 40)  # sparse, as they are
    dataset(root, cache=cache)
    assert not leftover.exists() and other.exists()


def test_a_cache_that_cannot_be_kept_is_one_clear_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file/below", Path("/proc/nothing")):
        with pytest.raises(OSError, match=rf"can't keep the cache of test videos in {folder}: .*cache=null"):
            dataset(root, cache=folder)


def test_a_cached_data_set_travels_to_workers(root: Path, tmp_path: Path) -> None:
    data = dataset(root, cache=tmp_path / "cache")
    expected = [data[position]["frames"] for position in range(8)]
    assert len(pickle.dumps(data)) < 20_000
    sampler = PositionSampler(global_batch_size=4, micro_batch_size=4, num_steps=2)
    found = list(batches(data, sampler, num_workers=2, device="cpu"))
    for batch, begin in zip(found, (0, 4), strict=True):
        levels = ((batch.video + 1) * 127.5).round().to(torch.uint8)  # type: ignore[union-attr]
        assert torch.equal(levels.permute(0, 2, 3, 4, 1), torch.stack(expected[begin : begin + 4]))


# Files that break after they were found.


def break_two(root: Path) -> None:
    for name in ("a/1.mp4", "b/c/2.mp4"):
        (root / name).write_bytes(b"gone")


def test_a_file_that_breaks_is_replaced_and_told_once(root: Path) -> None:
    data, twin = dataset(root), dataset(root)
    break_two(root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        items = [data[position] for position in range(18)]
    assert len([w for w in caught if "another is taken instead" in str(w.message)]) == 2
    assert sorted(Path(path).name for path in data.broken) == ["1.mp4", "2.mp4", "broken.mp4"]
    assert "3 skipped as broken" in data.summary()
    # The choice doesn't depend on what was read before: ranks and a resumed run agree.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position in (17, 4, 9):
            assert torch.equal(twin[position]["frames"], items[position]["frames"])
        assert index_of(data.held_out(0)["frames"][0]) == 12


def test_a_clip_that_breaks_leaves_those_of_the_same_visit(root: Path) -> None:
    """A file that has become shorter: clips from its rest are the same, loaded alone or together."""
    data = dataset(root, clips_per_opening=4)
    for number in (1, 2, 10):
        write_video(root / f"a/{number}.mp4", ramp(26), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        visits = [range(first, first + 4) for first in range(0, 48, 4)]
        together = [item for visit in visits for item in data.__getitems__(visit)]
        alone = [data[position] for position in range(48)]
    assert len(data.broken) == 4
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one["frames"], other["frames"]) and one["label"] == other["label"]


def test_strict_raises_instead(root: Path) -> None:
    found = find_videos(root, strict=False)
    good = [entry for entry in found.entries if entry.num_frames == 40]
    data = ClipDataset(good, found.classes, num_frames=8, frame_stride=1, resolution=16, strict=True)
    break_two(root)
    with pytest.raises(VideoError, match=r"1\.mp4|2\.mp4"):
        for position in range(6):
            data[position]
    with pytest.raises(ValueError, match=r"1 of 7 videos.*short\.mp4, has 5.*dataset\.strict=false"):
        ClipDataset(found.entries, (), num_frames=8, frame_stride=1, resolution=16, strict=True)


def test_a_file_that_breaks_before_the_cache_is_made_is_left_out(root: Path, tmp_path: Path) -> None:
    found = find_videos(root, strict=False)
    break_two(root)
    options: dict[str, Any] = {"num_frames": 8, "frame_stride": 1, "resolution": 16, "cache": tmp_path / "c"}
    with pytest.warns(UserWarning, match="another is taken"):
        data = ClipDataset(found.entries, found.classes, **options)
    assert len(data) == 4
    with pytest.warns(UserWarning, match="another is taken"):
        again = ClipDataset(found.entries, found.classes, **options)
    assert again.entries == data.entries


def test_when_nothing_can_be_read_it_ends(root: Path) -> None:
    data = dataset(root)
    for path in root.rglob("*.mp4"):
        path.unlink()
    with pytest.warns(UserWarning), pytest.raises(VideoError, match="20 videos in a row"):
        data[0]


def test_all_too_short_is_an_error_with_the_numbers(root: Path) -> None:
    with pytest.raises(
        ValueError, match=r"7 of 7 videos.*16 frames at stride 4 needs 61.*has 40.*num_frames"
    ):
        dataset(root, num_frames=16, frame_stride=4)
    with pytest.raises(ValueError, match=r"no readable video in test videos.*dataset\.root"):
        ClipDataset([], (), num_frames=8, frame_stride=1, resolution=16, name="test videos")
    with pytest.raises(ValueError, match="at least 1"):
        dataset(root, frame_stride=0)


# Files that appear whole or not at all.


def test_atomic_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with pytest.raises(RuntimeError), atomic_path(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    write_json(path, {"ü": [1, 2]})
    assert read_json(path) == {"ü": [1, 2]} and list(path.parent.iterdir()) == [path]
    path.write_text("{")
    assert read_json(path) is None and read_json(tmp_path / "nowhere") is None
