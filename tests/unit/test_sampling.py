"""Which frames make up a clip: rates, short videos, crops, several clips from one opening."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.clips import ClipDataset, Sampling, VideoEntry, find_videos
from src.data.transforms import Resize
from src.data.video import VideoError, write_video


@pytest.fixture(autouse=True)
def own_cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path_factory.mktemp("cache_home")))


def numbered(path: Path, num_frames: int, fps: float, size: tuple[int, int] = (16, 16)) -> Path:
    """A video whose frame k is grey of level 8 k."""
    grey = 8 * np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    write_video(path, np.broadcast_to(grey, (num_frames, *size, 3)).copy(), fps)
    return path


def dataset(root: Path, **changes: Any) -> ClipDataset:
    found = find_videos(root, strict=False)
    settings = {"num_frames": 4, "frame_stride": 1, "resolution": 16} | changes
    return ClipDataset(found.entries, found.classes, **settings)


def numbers(item: dict[str, Any]) -> list[int]:
    """Which frames of a numbered video an item holds."""
    return (item["frames"].float().mean((1, 2, 3)) / 8).round().int().tolist()


@pytest.mark.parametrize("cached", [False, True])
def test_a_rate_takes_what_is_on_the_screen_amid_each_tick(tmp_path: Path, cached: bool) -> None:
    """Of 24 frames at 12 per second: at 4 per second every third, from the middle; at 24 each twice."""
    numbered(tmp_path / "videos/a.mp4", 24, 12)
    cache = tmp_path / "cache" if cached else None
    slow = dataset(tmp_path / "videos", fps=4, num_frames=8, cache=cache)
    assert slow.fps == 4 and numbers(slow[0]) == [1, 4, 7, 10, 13, 16, 19, 22]
    fast = dataset(tmp_path / "videos", fps=24, num_frames=48, cache=cache)
    assert numbers(fast[0]) == [k // 2 for k in range(48)]
    assert "1 slower than dataset.fps" in fast.summary()
    # 5 per second: tick k is shown from k/5 s, its middle at frame 2.4 (k + 1/2).
    uneven = dataset(tmp_path / "videos", fps=5, num_frames=10, cache=cache)
    assert numbers(uneven[0]) == [int(2.4 * (k + 0.5)) for k in range(10)]
    with pytest.raises(ValueError, match=r"needs 11, and the longest of them, .*a.mp4, has 10"):
        dataset(tmp_path / "videos", fps=5, num_frames=11)


def test_a_rate_and_time_stamps_agree(shared: Any) -> None:
    """A file of variable rate, read by its time stamps, against the table of its frames' times."""
    from src.data.video import iterate_frames

    path = shared("odd_clips/variable_frame_rate.mp4")
    (entry,) = find_videos(path.parent, strict=False, names=[path.name]).entries
    assert entry.variable_rate
    data = ClipDataset([entry], (), num_frames=6, frame_stride=1, resolution=(32, 32), fps=7.0)
    resize = Resize((32, 32))
    ticks = [resize(frame) for frame in iterate_frames(path, at_fps=7.0)]
    assert abs(len(ticks) - data.sampling.num_ticks(entry)) == 0
    item = data[3]["frames"].numpy()
    starts = [s for s in range(len(ticks) - 5) if np.array_equal(item, np.stack(ticks[s : s + 6]))]
    assert len(starts) == 1


def test_the_distance_of_frames_is_told_once() -> None:
    with pytest.raises(ValueError, match=r"told twice, by dataset.fps=8 and dataset.frame_stride=2"):
        Sampling(4, 2, fps=8)
    with pytest.raises(ValueError, match="positive rate"):
        Sampling(4, 1, fps=-1)
    with pytest.raises(ValueError, match="unknown short_videos 'stretch'; choose one of: skip, pad, loop"):
        Sampling(4, 1, short_videos="stretch")


@pytest.mark.parametrize("cached", [False, True])
def test_short_videos_stand_still_or_begin_again(tmp_path: Path, cached: bool) -> None:
    numbered(tmp_path / "videos/short.mp4", 5, 8)
    cache = tmp_path / "cache" if cached else None
    long = {"num_frames": 4, "frame_stride": 2, "cache": cache}  # of 7 frames
    padded = dataset(tmp_path / "videos", short_videos="pad", **long)
    assert numbers(padded[0]) == numbers(padded.held_out(0)) == [0, 2, 4, 4]
    assert "1 padded (short.mp4: 5 frames)" in padded.summary()
    looped = dataset(tmp_path / "videos", short_videos="loop", strict=True, **long)
    assert numbers(looped[7]) == [0, 2, 4, 1] and "1 looped" in looped.summary()
    with pytest.raises(ValueError, match=r"dataset.short_videos=pad or loop"):
        dataset(tmp_path / "videos", **long)


def test_one_frame_is_enough_for_a_clip_that_stands_still(tmp_path: Path) -> None:
    numbered(tmp_path / "one.mp4", 1, 8)
    assert numbers(dataset(tmp_path, short_videos="pad")[0]) == [0, 0, 0, 0]


def test_clips_in_a_row_come_from_one_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clips are the same one by one and together, and together each video is read once."""
    from src.data import clips

    for name in "abc":
        numbered(tmp_path / f"{name}.mp4", 20, 8)
    data = dataset(tmp_path, clips_per_opening=4)
    alone = [data[position] for position in range(24)]
    opened: list[str] = []

    def counted(path: str, *arguments: Any, **more: Any) -> Any:
        opened.append(path)
        return read(path, *arguments, **more)

    read = clips.read_frames
    monkeypatch.setattr(clips, "read_frames", counted)
    together = data.__getitems__(list(range(24)))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one["frames"], other["frames"]) and one["position"] == other["position"]
    assert len(opened) == 6 and sorted(opened[:3]) == sorted(opened[3:]) == sorted(set(opened))
    assert [data.describe(position) for position in range(0, 24, 4)] == opened
    assert len({tuple(numbers(item)) for item in together[:4]}) > 1
    # Parts of a visit, as smaller batches make them, are the same clips.
    parts = data.__getitems__([5, 6]) + data.__getitems__([7])
    assert all(torch.equal(part["frames"], together[5 + i]["frames"]) for i, part in enumerate(parts))
    with pytest.raises(ValueError, match="clips_per_opening must be at least 1"):
        dataset(tmp_path, clips_per_opening=0)


def test_a_file_that_breaks_is_replaced_clip_by_clip(tmp_path: Path) -> None:
    for name in "abcd":
        numbered(tmp_path / f"{name}.mp4", 20, 8)
    data = dataset(tmp_path, clips_per_opening=2)
    broken = data.describe(0)
    Path(broken).write_bytes(b"no video any more")
    with pytest.warns(UserWarning, match="another is taken instead"):
        together = data.__getitems__([0, 1])
    alone = [dataset_item for dataset_item in (data[0], data[1])]
    assert [item["position"] for item in together] == [0, 1]
    assert all(torch.equal(a["frames"], b["frames"]) for a, b in zip(alone, together, strict=True))


def test_a_random_crop_takes_every_place_and_stays_for_a_clip(tmp_path: Path) -> None:
    """Columns of a wide video are numbered; a crop of a third of it begins at any of them."""
    width = 96
    ramp = np.broadcast_to(2 * np.arange(width, dtype=np.uint8)[None, None, :, None], (6, 32, width, 3))
    folder = tmp_path / "videos/ramp"
    folder.mkdir(parents=True)
    for t, frame in enumerate(ramp):
        Image.fromarray(np.ascontiguousarray(frame)).save(folder / f"{t}.png")
    data = dataset(tmp_path / "videos", resolution=32, crop="random_crop", num_frames=3)
    lefts = []
    for position in range(60):
        frames = data[position]["frames"].float()
        assert torch.equal(frames, frames[:1].expand_as(frames))
        lefts.append(frames[0, 0, 0, 0].item() / 2)
    assert min(lefts) < 6 and max(lefts) > 58 and len(set(lefts)) > 30
    assert 28 < float(np.mean(lefts)) < 36  # uniform over 0 to 64; its deviation here is 2.4
    assert data.held_out(0)["frames"][0, 0, 0, 0].item() == 64  # from the middle
    # Clips of one visit are cropped each at its own place.
    visited = dataset(
        tmp_path / "videos", resolution=32, crop="random_crop", num_frames=3, clips_per_opening=4
    )
    for one, other in zip(
        visited.__getitems__([0, 1, 2, 3]), map(visited.__getitem__, range(4)), strict=True
    ):
        assert torch.equal(one["frames"], other["frames"])
    again = dataset(tmp_path / "videos", resolution=32, crop="random_crop", num_frames=3)
    assert torch.equal(again[7]["frames"], data[7]["frames"])
    with pytest.raises(ValueError, match="holds one crop of each"):
        dataset(tmp_path / "videos", resolution=32, crop="random_crop", num_frames=3, cache=tmp_path / "c")


def test_an_image_that_is_cut_short_is_found_before_training(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        folder = tmp_path / name
        folder.mkdir()
        for t in range(5):
            noise = np.random.default_rng(t).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{t}.jpg")
    whole = (tmp_path / "bad/3.jpg").read_bytes()
    (tmp_path / "bad/3.jpg").write_bytes(whole[: len(whole) // 2])
    found = find_videos(tmp_path, strict=False)
    assert [Path(entry.path).name for entry in found.entries] == ["good"]
    assert found.broken[0].path.endswith("bad") and "3.jpg: image file is truncated" in found.broken[0].reason
    with pytest.raises(VideoError, match=r"3\.jpg"):
        find_videos(tmp_path, strict=True)


def test_an_image_that_changes_in_place_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "video"
    folder.mkdir()
    for t in range(5):
        Image.new("RGB", (16, 16), (t, 0, 0)).save(folder / f"{t}.bmp")
    before = dataset(tmp_path).fingerprint
    size = (folder / "2.bmp").stat().st_size
    Image.new("RGB", (16, 16), (200, 0, 0)).save(folder / "2.bmp")
    assert (folder / "2.bmp").stat().st_size == size
    assert dataset(tmp_path).fingerprint != before


def test_durations_and_ticks() -> None:
    entry = VideoEntry("a", -1, 30, 29.97)
    assert Sampling(1, 1, fps=10).num_ticks(entry) == 10
    assert Sampling(1, 1).num_ticks(entry) == 30 and Sampling(1, 1, fps=0.01).num_ticks(entry) == 1


@pytest.mark.parametrize("clips_per_opening", [1, 3])
def test_a_video_is_found_in_every_epoch(tmp_path: Path, clips_per_opening: int) -> None:
    for name in "abcde":
        numbered(tmp_path / f"{name}.mp4", 8, 8)
    data = dataset(tmp_path, clips_per_opening=clips_per_opening)
    for epoch in range(3):
        positions = [data.position(index, epoch) for index in range(5)]
        assert [data.describe(at) for at in positions] == [entry.path for entry in data.entries]
        assert all(at // (5 * clips_per_opening) == epoch for at in positions)
