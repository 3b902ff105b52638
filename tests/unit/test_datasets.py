import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src.data.clips import ClipDataset
from src.data.folder import folder, split_by_name
from src.data.shards import shards, write_shards
from src.data.sky import sky
from src.data.taichi import taichi
from src.data.ucf101 import class_of, ucf101
from src.data.video import VideoError, write_video
from src.prepare import index_rows

Shared = Callable[[str], Path]

COMMON: dict[str, Any] = {
    "num_frames": 8,
    "frame_stride": 1,
    "resolution": 16,
    "fps": None,
    "crop": "center_crop",
    "horizontal_flip": False,
    "short_videos": "skip",
    "clips_per_opening": 1,
    "seed": 0,
    "cache": None,
    "strict": False,
}
OWN: dict[Callable[..., ClipDataset], dict[str, Any]] = {
    folder: {"test_fraction": 0.25},
    ucf101: {"subset": "all"},
    sky: {"subset": "split"},
    taichi: {"subset": "all"},
}


@pytest.fixture(autouse=True)
def own_cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path_factory.mktemp("cache_home")))


def make(
    factory: Callable[..., ClipDataset], root: Path | str | None, split: str, **more: Any
) -> ClipDataset:
    return factory(None if root is None else str(root), split=split, **(COMMON | OWN[factory] | more))


def add_video(path: Path, num_frames: int = 10) -> None:
    write_video(path, np.full((num_frames, 16, 16, 3), 90, np.uint8), 25)


def add_images(path: Path, num_frames: int = 10) -> None:
    path.mkdir(parents=True)
    for t in range(num_frames):
        Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(path / f"{t:05d}.jpg")


def names(data: ClipDataset, root: Path) -> list[str]:
    return [Path(entry.path).relative_to(root).as_posix() for entry in data.entries]


@pytest.mark.parametrize("factory", OWN)
def test_missing_data_says_what_to_put_where_and_what_to_run(
    factory: Callable[..., ClipDataset], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "readme.txt").write_text("")
    file = tmp_path / "file"
    file.write_text("")
    archive = {
        ucf101: ("UCF101.rar", "6.9 GB", "UCF-101/ApplyEyeMakeup/"),
        sky: ("sky_timelapse.zip", "29 GB", "sky_train/<video>/<clip>/"),
        taichi: ("taichi-metadata.csv", "80 GB", "train/*.mp4"),
        folder: ("mp4, avi", "frame images", "dataset.root=PATH"),
    }[factory]
    for root, reason in [
        (None, "dataset.root is not set"),
        (tmp_path / "nowhere", f"there is no folder {tmp_path / 'nowhere'}"),
        (file, f"{file} is not a folder"),
        (empty, f"the folder {empty} holds no videos"),
    ]:
        with pytest.raises(FileNotFoundError) as caught:
            make(factory, root, "train")
        message = str(caught.value)
        assert reason in message
        assert f"python -m src.prepare dataset={factory.__name__} dataset.root=" in message
        assert all(part in message for part in archive)


@pytest.mark.parametrize("factory", OWN)
def test_unknown_choices_are_refused_with_the_choices(
    factory: Callable[..., ClipDataset], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="unknown split 'val'; choose one of: train, test, all"):
        make(factory, tmp_path, "val")
    if factory is not folder:
        with pytest.raises(ValueError, match=r"unknown subset 'some'.*choose one of: .*all"):
            make(factory, tmp_path, "train", subset="some")


# Any folder.


def test_a_folder_is_split_by_name(tmp_path: Path) -> None:
    for k in range(8):
        add_video(tmp_path / f"{'ab'[k % 2]}/{k}.mp4")
    train, test, whole = (make(folder, tmp_path, split) for split in ("train", "test", "all"))
    assert len(test) == 2 and len(train) == 6 and len(whole) == 8
    assert sorted(names(train, tmp_path) + names(test, tmp_path)) == sorted(names(whole, tmp_path))
    assert train.classes == test.classes == ("a", "b")
    assert all(entry.label == "ab".index(Path(entry.path).parent.name) for entry in whole.entries)
    assert str(tmp_path) in whole.summary()


def test_a_folder_with_train_and_test_is_taken_so(tmp_path: Path) -> None:
    for name in ("train/x/1.mp4", "train/y/2.mp4", "test/y/3.mp4"):
        add_video(tmp_path / name)
    train, test = make(folder, tmp_path, "train"), make(folder, tmp_path, "test")
    assert names(train, tmp_path) == ["train/x/1.mp4", "train/y/2.mp4"]
    assert names(test, tmp_path) == ["test/y/3.mp4"]
    assert train.classes == test.classes == ("x", "y") and test.entries[0].label == 1
    assert len(make(folder, tmp_path, "all")) == 3


@pytest.mark.parametrize("capitals", [False, True])
def test_what_lies_beside_train_and_test_is_left_out_and_told(tmp_path: Path, capitals: bool) -> None:
    train_name, test_name = ("Train", "TEST") if capitals else ("train", "test")
    for name in (f"{train_name}/x/1.mp4", f"{train_name}/y/2.mp4", f"{test_name}/y/3.mp4"):
        add_video(tmp_path / name)
    for name in ("val/x/4.mp4", "val/x/5.mp4", "6.mp4"):
        add_video(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "cover.jpg")
    train, test, whole = (make(folder, tmp_path, split) for split in ("train", "test", "all"))
    assert names(train, tmp_path) == [f"{train_name}/x/1.mp4", f"{train_name}/y/2.mp4"]
    assert names(test, tmp_path) == [f"{test_name}/y/3.mp4"]
    assert train.classes == test.classes == ("x", "y") and len(whole) == 3
    for data in (train, test, whole):
        assert data.left_out == {
            str(tmp_path / "cover.jpg"): "an image beside videos",
            str(tmp_path / "6.mp4"): "outside of the folders train and test",
            str(tmp_path / "val"): "outside of the folders train and test with 2 videos",
        }
        assert "3 left out (cover.jpg: an image beside videos, " in data.summary()
    rows = {str(row["video"]): row["status"] for row in index_rows(whole, {"train": train, "test": test})}
    assert rows["val"] == "left out: outside of the folders train and test with 2 videos"
    assert len(rows) == 6
    with pytest.raises(ValueError, match=r"3 left out \(.*cover\.jpg: an image beside videos.*strict=false"):
        make(folder, tmp_path, "train", strict=True)


def test_images_beside_videos_are_no_video_and_told(tmp_path: Path) -> None:
    """Neither in the root, nor in a folder of frames with a preview, whose frames the preview stands for."""
    add_video(tmp_path / "a/1.mp4")
    add_images(tmp_path / "walk")
    add_video(tmp_path / "walk/preview.mp4")
    add_images(tmp_path / "run/one")
    Image.new("RGB", (8, 8)).save(tmp_path / "cover.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "run/thumb.png")
    data = make(folder, tmp_path, "all")
    assert names(data, tmp_path) == ["a/1.mp4", "run/one", "walk/preview.mp4"]
    assert data.left_out == {
        str(tmp_path / "cover.png"): "an image beside videos",
        str(tmp_path / "run/thumb.png"): "an image beside videos",
        str(tmp_path / "walk/00000.jpg"): "an image beside videos, as are 9 more there",
    }


@pytest.mark.parametrize("link", ["test", "zest"])
def test_a_link_to_a_folder_beside_it_doesnt_take_its_name(tmp_path: Path, link: str) -> None:
    add_video(tmp_path / "root/train/a/1.mp4")
    add_video(tmp_path / "elsewhere/2.mp4")
    (tmp_path / "root" / link).symlink_to("train", target_is_directory=True)
    (tmp_path / "root/apart").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "root/train/loop").symlink_to("..", target_is_directory=True)
    data = make(folder, tmp_path / "root", "all")
    assert names(data, tmp_path / "root") == ["apart/2.mp4", "train/a/1.mp4"]
    assert data.left_out == {str(tmp_path / "root" / link): "it links to train, which is read by that name"}


def test_splits_hardly_move_with_new_files() -> None:
    files = [f"{k}.mp4" for k in range(200)]
    before = set(split_by_name(files, 0.1, "test"))
    after = set(split_by_name(files + [f"new{k}.mp4" for k in range(20)], 0.1, "test"))
    assert len(before) == 20 and len(after) == 22
    assert len(before & after) >= 15
    assert split_by_name(["one.mp4"], 0.1, "test") == ["one.mp4"]
    assert split_by_name(files, 0.0, "test") == files and split_by_name(files, 0.0, "train") == files
    with pytest.raises(ValueError, match=r"got 1\.5"):
        split_by_name(files, 1.5, "train")


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    add_video(tmp_path / "1.mp4")
    with pytest.raises(ValueError, match=r"the split 'train' of .* is empty.*test_fraction is 0.1"):
        make(folder, tmp_path, "train", test_fraction=0.1)


def test_broken_files_are_counted_in_their_split_and_strict_raises(tmp_path: Path) -> None:
    for name in ("train/1.mp4", "test/2.mp4"):
        add_video(tmp_path / name)
    (tmp_path / "train/bad.mp4").write_bytes(b"bad")
    assert "1 skipped as broken (bad.mp4: " in make(folder, tmp_path, "train").summary()
    assert "skipped" not in make(folder, tmp_path, "test").summary()
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        make(folder, tmp_path, "train", strict=True)


def test_folders_of_frames_are_videos(tmp_path: Path) -> None:
    add_images(tmp_path / "walk" / "one")
    add_images(tmp_path / "walk" / "two", 12)
    data = make(folder, tmp_path, "all")
    assert names(data, tmp_path) == ["walk/one", "walk/two"]
    assert data.classes == ("walk",) and [entry.num_frames for entry in data.entries] == [10, 12]


def test_names_that_are_not_utf8_are_just_names(tmp_path: Path) -> None:
    """They come back from the index and from shards as they were."""
    root = tmp_path / os.fsdecode(b"d\xe9j\xe0")
    names_here = [os.fsdecode(b"caf\xe9.mp4"), "plain.mp4"]
    for name in names_here:
        add_video(root / "a" / name)
    add_images(root / "a" / os.fsdecode(b"frames\xe9"))
    for _ in range(2):  # probed, and from the index
        data = make(folder, root, "all")
        assert {Path(entry.path).name for entry in data.entries} == {*names_here, os.fsdecode(b"frames\xe9")}
    assert write_shards(data, {"train": data}, tmp_path / "packed", videos_per_shard=2) == 2
    packed = shards(str(tmp_path / "packed"), split="all", test_fraction=0.0, **COMMON)
    assert [entry.path for entry in packed.entries] == [Path(name).name for name in names(data, root)]
    assert packed.fingerprint == data.fingerprint and len(packed[0]["frames"]) == 8


# UCF-101.


def test_classes_come_from_the_names() -> None:
    assert class_of("UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi") == "ApplyEyeMakeup"
    assert class_of("v_YoYo_g25_c05.avi") == "YoYo" and class_of("train/v_TaiChi_g01_c01") == "TaiChi"
    assert class_of("holiday.avi") == "" and class_of("v_TaiChi/1.avi") == ""


@pytest.mark.parametrize("nested", [True, False])
def test_ucf101_nested_or_flat_with_official_lists(tmp_path: Path, nested: bool) -> None:
    videos = [f"v_{c}_g{g:02d}_c01" for c in ("Hammering", "HammerThrow", "HandStandPushups") for g in (1, 8)]
    for name in videos:
        add_video(tmp_path / "UCF-101" / (name.split("_")[1] if nested else "") / f"{name}.avi")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    for kind, group in (("train", "g08"), ("test", "g01")):
        lines = [f"{n.split('_')[1]}/{n}.avi{' 3' if kind == 'train' else ''}" for n in videos if group in n]
        (lists / f"{kind}list02.txt").write_text("\r\n".join(lines) + "\r\n")
    whole = make(ucf101, tmp_path, "train")
    assert len(whole) == 6 and len(make(ucf101, tmp_path, "test")) == 6
    # The official order of these, which capital letters before small ones would change.
    assert whole.classes == ("Hammering", "HammerThrow", "HandStandPushups")
    train, test = (make(ucf101, tmp_path, split, subset="split2") for split in ("train", "test"))
    assert [Path(entry.path).stem.split("_")[2] for entry in train.entries] == ["g08"] * 3
    assert [Path(entry.path).stem.split("_")[2] for entry in test.entries] == ["g01"] * 3
    assert train.classes == test.classes == whole.classes
    assert all(whole.classes[e.label] == Path(e.path).stem.split("_")[1] for e in train.entries)
    with pytest.raises(
        FileNotFoundError, match=r"trainlist01\.txt under(.|\n)*TrainTestSplits(.|\n)*subset=all"
    ):
        make(ucf101, tmp_path, "train", subset="split1")


def test_ucf101_as_frame_folders(tmp_path: Path) -> None:
    add_images(tmp_path / "train" / "v_YoYo_g01_c01")
    add_images(tmp_path / "test" / "v_TaiChi_g01_c01")
    data = make(ucf101, tmp_path, "train")
    assert data.classes == ("TaiChi", "YoYo") and len(data) == 2


def test_ucf101_takes_capitals_and_tells_what_is_not_named_so(tmp_path: Path) -> None:
    root = tmp_path / "deep/er/still"
    for name in ("V_YOYO_G01_C01.AVI", "v_YoYo_g02_c01.avi", "v_YoYo_g03_c01 (copy).avi", "foo.mp4"):
        add_video(root / "UCF-101/YoYo" / Path(name).with_suffix(".mp4"))
        (root / "UCF-101/YoYo" / Path(name).with_suffix(".mp4")).rename(root / "UCF-101/YoYo" / name)
    lists = root / "lists/of/splits"
    lists.mkdir(parents=True)
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi 1\nYoYo/v_YoYo_g04_c01.avi 1\n")
    data = make(ucf101, tmp_path, "train", subset="split1")
    assert [Path(entry.path).name for entry in data.entries] == ["V_YOYO_G01_C01.AVI"]
    assert data.classes == ("YoYo",)
    assert str(data.counts[0]).endswith("missing v_YoYo_g04_c01")
    reason = "not named v_<Class>_gXX_cYY"
    left_out = {Path(path).name: told for path, told in data.left_out.items()}
    assert left_out == {"foo.mp4": reason, "v_YoYo_g03_c01 (copy).avi": reason}
    with pytest.raises(ValueError, match=r"2 left out \(.*foo\.mp4: not named v_<Class>_gXX_cYY"):
        make(ucf101, tmp_path, "train", strict=True)
    (lists / "testlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"testlist01\.txt isn't UTF-8 text"):
        make(ucf101, tmp_path, "train")


def test_ucf101_wants_its_names(tmp_path: Path) -> None:
    add_video(tmp_path / "holiday.mp4")
    with pytest.raises(FileNotFoundError, match=r"named v_<Class>_gXX_cYY(.|\n)*UCF101\.rar"):
        make(ucf101, tmp_path, "train")


def test_the_genuine_ucf101_files(shared: Shared) -> None:
    root = shared("clips/ucf101")
    data = make(ucf101, root, "train", num_frames=16, frame_stride=4, resolution=32)
    assert data.classes == ("ApplyEyeMakeup", "Archery", "CricketShot")
    assert [(entry.num_frames, entry.fps) for entry in data.entries] == [(164, 25.0), (131, 25.0), (79, 25.0)]
    for position in range(6):
        item = data[position]
        assert item["frames"].shape == (16, 32, 32, 3)
        assert item["frames"].float().std() > 10
    assert data.broken == {}


# Sky Time-lapse and Taichi-HD.


def test_sky_as_frames_or_files(tmp_path: Path) -> None:
    add_images(tmp_path / "sky_train" / "video1" / "clip1")
    add_images(tmp_path / "sky_train" / "video1" / "clip2")
    add_video(tmp_path / "sky_train" / "video2.mp4")
    add_images(tmp_path / "sky_test" / "video3" / "clip1", 32)
    train, test = make(sky, tmp_path, "train"), make(sky, tmp_path, "test")
    assert len(train) == 3 and len(test) == 1 and train.classes == ()
    assert {entry.label for entry in train.entries} == {-1} and train[0]["label"] == -1
    assert len(make(sky, tmp_path, "train", subset="all")) == len(make(sky, tmp_path, "all")) == 4
    add_video(tmp_path / "more" / "video4.mp4")
    add_video(tmp_path / "more" / "video5.mp4")
    told = {str(tmp_path / "more"): "outside of the folders sky_train and sky_test with 2 videos"}
    assert make(sky, tmp_path, "train").left_out == make(sky, tmp_path, "all").left_out == told
    (tmp_path / "more" / "video5.mp4").unlink()
    (tmp_path / "more" / "video4.mp4").unlink()
    (tmp_path / "sky_test").rename(tmp_path / "other")
    with pytest.raises(
        FileNotFoundError, match=r"holds 4 videos, but none in sky_test(.|\n)*sky_timelapse\.zip"
    ):
        make(sky, tmp_path, "test")


def test_taichi_as_files_or_frames(tmp_path: Path) -> None:
    add_video(tmp_path / "train" / "a#000010#000100.mp4")
    add_images(tmp_path / "train" / "b#000010#000100.mp4")
    add_video(tmp_path / "test" / "c.mp4")
    assert len(make(taichi, tmp_path, "train")) == 3
    train, test = (make(taichi, tmp_path, split, subset="split") for split in ("train", "test"))
    assert len(train) == 2 and names(test, tmp_path) == ["test/c.mp4"] and train.classes == ()
    (tmp_path / "train").rename(tmp_path / "training")
    with pytest.raises(FileNotFoundError, match=r"none in train\.(.|\n)*taichi-metadata"):
        make(taichi, tmp_path, "train", subset="split")


def test_real_sky_clips_through_the_folder(shared: Shared) -> None:
    root = shared("clips_sky/real")
    train, test = make(folder, root, "train", num_frames=16), make(folder, root, "test", num_frames=16)
    assert len(train) == 36 and len(test) == 12
    assert train[0]["frames"].shape == (16, 16, 16, 3) and train.broken == {}


def test_a_broken_file_is_never_all_that_a_split_gets(tmp_path: Path) -> None:
    """Whatever its name's hash: the splits divide the videos that can be used."""
    from src.data.video import write_video

    for k in range(3):
        write_video(tmp_path / f"good_{k}.mp4", np.zeros((8, 16, 16, 3), np.uint8), 8)
    for k in range(30):
        (tmp_path / f"broken_{k}.mp4").write_bytes(b"no video")
    common = COMMON | {"test_fraction": 0.1, "num_frames": 4}
    parts = [folder(str(tmp_path), split=split, **common) for split in ("train", "test")]
    assert [len(part) for part in parts] == [2, 1]
    assert all(len(part.broken) == 30 for part in parts)


def test_what_is_there_is_counted_beside_the_official_numbers(tmp_path: Path) -> None:
    """Of the lists' six videos one isn't there; one that is there is in no list."""
    for clip in ("A_g01_c01", "A_g08_c01", "B_g01_c01", "B_g08_c01", "B_g09_c01", "C_g99_c01"):
        add_video(tmp_path / "UCF-101" / clip[0] / f"v_{clip}.mp4")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text(
        "A/v_A_g08_c01.avi 1\nB/v_B_g08_c01.avi 2\nB/v_B_g09_c01.avi 2\nB/v_B_g10_c01.avi 2\n"
    )
    (lists / "testlist01.txt").write_text("A/v_A_g01_c01.avi\nB/v_B_g01_c01.avi\n")
    data = make(ucf101, tmp_path, "train", subset="split1")
    assert [str(count) for count in data.counts] == [
        "videos: 6 of 13,320 (Soomro et al. 2012) DIFFERS: missing v_B_g10_c01",
        "classes: 3 of 101 (Soomro et al. 2012) DIFFERS",
        "training videos of split 1: 3 of 9,537 (official trainlist01.txt) DIFFERS: missing v_B_g10_c01",
        "testing videos of split 1: 2 of 3,783 (official testlist01.txt) DIFFERS",
    ]
    assert len(data) == 3


def test_official_numbers_divide_the_whole() -> None:
    from src.data.counts import Count
    from src.data.ucf101 import SPLIT_SIZES

    assert all(sum(sizes) == 13_320 for sizes in SPLIT_SIZES.values())
    assert str(Count("videos", 5, 5, "a paper", "missing x")) == "videos: 5 of 5 (a paper) ok"


def test_a_video_that_lies_there_twice_is_refused(tmp_path: Path) -> None:
    add_video(tmp_path / "UCF-101/A/v_A_g01_c01.mp4")
    add_images(tmp_path / "frames/v_A_g01_c01")
    with pytest.raises(
        ValueError, match=r"holds v_A_g01_c01 twice, as UCF-101/A/v_A_g01_c01.mp4 and as frames/"
    ):
        make(ucf101, tmp_path, "all")


def test_sky_counts_long_and_short_videos_and_clips(tmp_path: Path) -> None:
    for video, clip, length in (("a", "a_1", 64), ("a", "a_2", 40), ("b", "b_1", 10)):
        add_images(tmp_path / "sky_train" / video / clip, length)
    data = make(sky, tmp_path, "train")
    assert [count.found for count in data.counts] == [2, 3, 3]
    assert [count.expected for count in data.counts] == [997, 2_392, 35_383]
