"""Videos in NumPy files against NumPy's own reading of them."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from src.data.arrays import ArrayFile, ArrayVideos

GEOMETRY = {"num_frames": 4, "frame_stride": 1, "resolution": (6, 8), "crop": "center_crop"}


def videos(num: int = 5, length: int = 7, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, length, 6, 8, channels), np.uint8)


def saved(path: Path, array: np.ndarray, how: str) -> Path:
    if how == "npy":
        np.save(path.with_suffix(".npy"), array)
        return path.with_suffix(".npy")
    writer = np.savez if how == "npz" else np.savez_compressed
    writer(path.with_suffix(".npz"), array, labels=np.arange(len(array)))
    return path.with_suffix(".npz")


@pytest.mark.parametrize("how", ["npy", "npz", "compressed"])
def test_clips_are_numpys_in_any_order(tmp_path, how):
    array = videos()
    given = ArrayVideos([[saved(tmp_path / "a", array, how)]], **GEOMETRY)
    assert len(given) == 5
    for index in (0, 3, 1, 4, 4, 0):
        for where, start in (("first", 0), ("middle", 1), (3, 3)):
            item = given.clip(index, where)
            np.testing.assert_array_equal(item["frames"].numpy(), array[index, start : start + 4])
    strided = ArrayVideos([[saved(tmp_path / "a", array, how)]], **GEOMETRY | {"frame_stride": 2})
    np.testing.assert_array_equal(strided.clip(2, "first")["frames"].numpy(), array[2, 0:7:2])


def test_files_of_a_row_follow_each_other_in_time(tmp_path):
    parts = [videos(3, 4, seed=seed) for seed in range(3)]
    paths = [saved(tmp_path / f"clip_{i}", part, "npz") for i, part in enumerate(parts)]
    given = ArrayVideos([paths], **GEOMETRY)
    whole = np.concatenate(parts, axis=1)
    assert (len(given), given.shortest) == (3, 12)
    for start in range(9):
        np.testing.assert_array_equal(given.clip(1, start)["frames"].numpy(), whole[1, start : start + 4])
    more = ArrayVideos([[path] for path in paths], **GEOMETRY)
    assert len(more) == 9
    np.testing.assert_array_equal(more.clip(7, "first")["frames"].numpy(), parts[2][1])
    with pytest.raises(IndexError):
        more.clip(9, "first")


def test_grey_videos_get_three_colours(tmp_path):
    array = videos(channels=1)
    given = ArrayVideos([[saved(tmp_path / "a", array, "npy")]], **GEOMETRY)
    np.testing.assert_array_equal(given.clip(0, "first")["frames"].numpy(), array[0, :4].repeat(3, -1))


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    a, b, c = (
        ArrayVideos([[saved(tmp_path / name, videos(seed=seed), "npy")]], **GEOMETRY).fingerprint
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert a == b != c


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (videos().astype(np.float32) / 255, r"float32 \(5, 7, 6, 8, 3\).*values in \[0, 1\] by \(x \* 255\)"),
        (videos().transpose(0, 4, 1, 2, 3).copy(), r"array.transpose\(0, 2, 3, 4, 1\)"),
        (videos().transpose(0, 1, 4, 2, 3).copy(), r"array.transpose\(0, 1, 3, 4, 2\)"),
        (videos()[0], r"uint8 \(7, 6, 8, 3\), expected uint8 with axes \(n, t, h, w, c\)"),
        (videos(channels=4), r"\(5, 7, 6, 8, 4\), expected"),
        (np.zeros((0, 7, 6, 8, 3), np.uint8), "expected uint8 with axes"),
        (np.asfortranarray(videos()), "Fortran"),
        (videos(length=3), "have 3 frames, a clip of 4 frames at stride 1 needs 4"),
    ],
    ids=["float", "ncthw", "ntchw", "one video", "alpha", "empty", "fortran", "short"],
)
def test_another_form_is_refused_with_the_way_out(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        ArrayVideos([[tmp_path / "a.npy"]], **GEOMETRY)


def test_the_way_out_leads_out(tmp_path):
    """The transposition that the message names gives what is expected."""
    array = videos()
    np.save(tmp_path / "a.npy", np.ascontiguousarray(array.transpose(0, 4, 1, 2, 3).transpose(0, 2, 3, 4, 1)))
    np.testing.assert_array_equal(ArrayFile(tmp_path / "a.npy").video(2), array[2])


def test_damaged_and_foreign_files_are_named(tmp_path):
    (tmp_path / "html.npz").write_text("<html>quota exceeded</html>")
    (tmp_path / "html.npy").write_text("<html>quota exceeded</html>")
    np.savez(tmp_path / "two.npz", videos(), videos())
    np.savez(tmp_path / "none.npz", labels=np.arange(3))
    cut = saved(tmp_path / "cut", videos(), "npy")
    cut.write_bytes(cut.read_bytes()[:-1])
    for name, message in (
        ("html.npz", "html.npz is damaged, it isn't an npz file"),
        ("html.npy", "html.npy is damaged, it isn't a NumPy array"),
        ("two.npz", r"must hold one array .* it holds arr_0 \(5, 7, 6, 8, 3\), arr_1"),
        ("none.npz", r"it holds labels \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ArrayFile(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"cut.npy is truncated: for 5 videos \(7, 6, 8, 3\) it must hold 5,168"
    ):
        ArrayFile(cut)
    with pytest.raises(ValueError, match=r"the same number of videos, got a\.npy: 5, b\.npy: 4"):
        ArrayVideos(
            [[saved(tmp_path / "a", videos(), "npy"), saved(tmp_path / "b", videos(4), "npy")]], **GEOMETRY
        )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10**9, 7, 6, 8, 3), "is truncated: for 1,000,000,000 videos"),
        ((-5, 7, 6, 8, 3), r"\(-5, 7, 6, 8, 3\), expected uint8"),
        ((5, -7, -6, 8, 3), r"\(5, -7, -6, 8, 3\), expected uint8"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_header_that_claims_what_cant_be_is_refused_at_once(tmp_path, shape, message, packed):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "|u1", "fortran_order": False, "shape": shape})
    content.write(videos().tobytes())
    path = tmp_path / f"a.np{'z' if packed else 'y'}"
    if packed:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", content.getvalue())
    else:
        path.write_bytes(content.getvalue())
    with pytest.raises(ValueError, match=message):
        ArrayVideos([[path]], **GEOMETRY)


@pytest.mark.parametrize("how", ["npz", "compressed"])
def test_a_flipped_byte_is_told_with_the_file(tmp_path, how):
    path = saved(tmp_path / "a", videos(num=40), how)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    damaged = ArrayFile(path)
    with pytest.raises(ValueError, match=r"a\.npz is damaged in or before video \d+ "):
        for index in range(40):
            damaged.video(index)


class Trap:
    """What a planted object looks like: unpickling it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_planted_object_runs_nothing(tmp_path, suffix):
    witness = tmp_path / "witness"
    trap = np.array([Trap(witness)], dtype=object)
    path = tmp_path / f"a{suffix}"
    np.save(path, trap, allow_pickle=True) if suffix == ".npy" else np.savez(path, trap)
    with pytest.raises(ValueError, match=r"expected uint8|must hold one array"):
        ArrayFile(path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(trap))
    assert witness.exists(), "the trap works where something unpickles it"
