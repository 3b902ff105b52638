"""Videos that any program has made, in whatever form they lie there."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data.given import given_videos
from src.data.video import write_video

GEOMETRY = {"num_frames": 4, "frame_stride": 2, "resolution": (32, 32), "crop": "center_crop"}


def frames(seed: int, length: int = 9) -> np.ndarray:
    """Smooth pictures that change, so that coding hardly touches them."""
    t, y, x = np.meshgrid(np.arange(length), np.arange(32), np.arange(32), indexing="ij")
    grey = 128 + 60 * np.sin((x + 2 * y + 3 * t) / 12 + seed)
    return np.repeat(grey[..., None], 3, -1).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "made"
    made.mkdir()
    write_video(made / "video 0.mp4", frames(0), 8.0)
    return made


def close(clip: object, expected: np.ndarray, tolerance: float = 3.0) -> None:
    assert np.abs(np.asarray(clip, dtype=float) - expected).mean() < tolerance


def test_a_folder_a_file_a_list_and_a_pattern_are_the_same_videos(folder):
    for seed in (1, 2):
        write_video(folder / f"video {seed}.mp4", frames(seed), 8.0)
    whole = given_videos(str(folder), **GEOMETRY)
    listed = given_videos([str(folder / f"video {seed}.mp4") for seed in range(3)], **GEOMETRY)
    pattern = given_videos(f"{folder}/*.mp4", **GEOMETRY)
    for given in (whole, listed, pattern):
        assert len(given) == 3
        for seed in range(3):
            close(given.clip(seed, "first")["frames"], frames(seed)[0:8:2])
    shutil.copytree(folder, folder.parent / "more")
    assert len(given_videos([str(folder), str(folder.parent / "more")], **GEOMETRY)) == 6
    one = given_videos(str(folder / "video 2.mp4"), **GEOMETRY)
    assert len(one) == 1
    close(one.clip(0, "first")["frames"], frames(2)[0:8:2])


def test_gif_and_frame_folders_count_too(folder):
    pictures = [Image.fromarray(frame) for frame in frames(5)]
    pictures[0].save(folder / "video 5.gif", save_all=True, append_images=pictures[1:], duration=125)
    (folder / "video 7").mkdir()
    for number, frame in enumerate(frames(7)):
        Image.fromarray(frame).save(folder / "video 7" / f"{number}.png")
    (folder / "samples.json").write_text("{}")
    given = given_videos(str(folder), **GEOMETRY)
    assert len(given) == 3
    close(given.clip(1, "first")["frames"], frames(5)[0:8:2], 6.0)  # 256 colours
    np.testing.assert_array_equal(given.clip(2, "first")["frames"], frames(7)[0:8:2])


def test_arrays_alone_in_a_folder_are_clips_of_the_same_videos(tmp_path):
    whole = np.stack([frames(seed, 24) for seed in range(3)])
    for position in range(3):
        np.savez(tmp_path / f"clips_{position}.npz", whole[:, 8 * position : 8 * position + 8])
    given = given_videos(str(tmp_path), **GEOMETRY)
    assert len(given) == 3
    np.testing.assert_array_equal(given.clip(1, 12)["frames"], whole[1, 12:20:2])
    apart = given_videos([str(tmp_path / f"clips_{position}.npz") for position in range(3)], **GEOMETRY)
    assert len(apart) == 9


def test_what_cant_be_used_is_left_out_and_named(folder):
    write_video(folder / "short.mp4", frames(1, 5), 8.0)
    (folder / "broken.mp4").write_bytes(b"nothing")
    given = given_videos(str(folder), **GEOMETRY)
    assert len(given) == 1
    assert "short.mp4: 5 frames" in given.summary() and "broken.mp4" in given.summary()


def test_where_all_are_broken_the_option_is_named(folder):
    (folder / "video 0.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none of the 1 videos in videos=.*made can be read; the first: .*"):
        given_videos(str(folder), **GEOMETRY)


def test_what_isnt_there_or_isnt_a_video_is_told(folder):
    np.save(folder / "a.npy", np.zeros((2, 9, 32, 32, 3), np.uint8))
    (folder / "notes.txt").write_text("hello")
    for source, error, message in (
        ("nowhere", FileNotFoundError, "there is no nowhere. Give videos=PATH"),
        (f"{folder}/*.mkv", FileNotFoundError, "nothing fits"),
        ([], FileNotFoundError, "nothing fits an empty list"),
        (str(folder), ValueError, "holds both videos and NumPy files"),
        ([f"{folder}/a.npy", f"{folder}/video 0.mp4"], ValueError, "can't be mixed"),
        (f"{folder}/notes.txt", ValueError, r"notes\.txt isn't a video by its name"),
    ):
        with pytest.raises(error, match=message):
            given_videos(source, **GEOMETRY)
