import colorsys
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data import synthetic as synthetic_module
from src.data.clips import ClipDataset
from src.data.folder import folder
from src.data.sprites import CLASSES, COLOURS, Clouds, Scene, Sprite, render_scene
from src.data.synthetic import render, scene, synthetic
from src.data.transforms import Frames
from src.data.video import VideoError, probe, read_clip


@pytest.fixture(autouse=True)
def own_cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path_factory.mktemp("cache_home")))


def make(root: Path, **changes: Any) -> ClipDataset:
    arguments: dict[str, Any] = {
        "split": "train",
        "num_videos": 12,
        "num_test_videos": 6,
        "num_frames_per_video": 20,
        "video_fps": 8,
        "scene_seed": 0,
        "num_frames": 16,
        "frame_stride": 1,
        "resolution": 32,
        "horizontal_flip": False,
        "seed": 0,
        "cache": None,
        "strict": True,
    }
    return synthetic(str(root), **(arguments | changes))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.mp4")}


def centre_of(frame: Frames, shape: str) -> tuple[float, float] | None:
    """Find a shape by its colour: its centroid in picture heights."""
    distance = np.abs(frame.astype(int) - COLOURS[shape]).sum(-1)
    y, x = np.nonzero(distance < 110)
    return (float(x.mean() + 0.5) / len(frame), float(y.mean() + 0.5) / len(frame)) if len(x) > 8 else None


@pytest.mark.parametrize("index", [0, 1, 6, 7, 12, 13])
def test_shapes_are_where_the_known_motion_says(index: int) -> None:
    what = scene(0, "train", index, aspect=1.0)
    frames = render(0, "train", index, 60, 128)
    sprite = what.sprites[0]
    assert sprite.shape == CLASSES[index % 6]
    x, y = sprite.path(np.arange(60.0), aspect=1.0)
    for t in range(60):
        found = centre_of(frames[t], sprite.shape)
        assert found is not None
        assert abs(found[0] - x[t]) < 0.02 and abs(found[1] - y[t]) < 0.02


def test_motion_is_straight_and_mirrored_inside_the_picture() -> None:
    sprite = Sprite("disc", x=0.5, y=0.3, velocity_x=0.03, velocity_y=-0.05, radius=0.2, depth=1.0)
    times = np.arange(0.0, 200.0)
    x, y = sprite.path(times, aspect=2.0)
    assert x[5] == pytest.approx(0.65) and y[2] == pytest.approx(0.2)
    # 0.3 − 4·0.05 would be 0.1; mirrored at 0.2 it is 0.3.
    assert y[4] == pytest.approx(0.3)
    assert x.min() >= 0.2 - 1e-6 and x.max() <= 1.8 + 1e-6 and y.min() >= 0.2 - 1e-6 and y.max() <= 0.8 + 1e-6
    np.testing.assert_allclose(np.abs(np.diff(x)).max(), 0.03, atol=1e-6)
    inside = (np.abs(x[1:] - 1) < 0.7) & (np.abs(x[:-1] - 1) < 0.7)
    np.testing.assert_allclose(np.abs(np.diff(x))[inside], 0.03, atol=1e-6)


def test_what_is_in_front_hides_what_is_behind() -> None:
    clouds = Clouds(0.0, 0.7, 0.01, 0.0, 0.0)
    front = Sprite("disc", 0.5, 0.5, 0.0, 0.0, 0.15, depth=1.0)
    moon = Sprite("moon", 0.5, 0.5, 0.0, 0.0, 0.25, depth=1.2)
    for order in ((front, moon), (moon, front)):
        (frames,) = render_scene(Scene(3, order, clouds), 1, (64, 64))
        assert np.abs(frames[0, 32, 32].astype(int) - COLOURS["disc"]).max() < 25
        assert np.abs(frames[0, 32, 45].astype(int) - COLOURS["moon"]).max() < 25
    (alone,) = render_scene(Scene(0, (front,), clouds), 1, (64, 64))
    assert np.abs(alone[0, 32, 45].astype(int) - COLOURS["moon"]).max() > 60


def test_edges_are_soft() -> None:
    clouds = Clouds(0.0, 0.7, 0.01, 0.0, 0.0)
    levels = []
    for shift in np.linspace(0, 1 / 32, 9):
        disc = Sprite("disc", 0.5 + float(shift), 0.5, 0.0, 0.0, 0.18, depth=1.0)
        (frames,) = render_scene(Scene(0, (disc,), clouds), 1, (32, 32))
        levels.append(int(frames[0, 16, 22, 0]))
    # The red of a pixel at the rim changes a little with every fraction of a pixel.
    assert len(set(levels)) == 9 and levels == sorted(levels)


def test_the_sky_drifts_and_gains_detail_with_resolution() -> None:
    clouds = Clouds(angle=0.0, length=0.7, drift=0.7 / 32, phase=0.2, bend_phase=0.3)
    (frames,) = render_scene(Scene(0, (), clouds), 33, (32, 32))
    # After a whole wave length the one wave of small pictures is back, and meanwhile it was elsewhere.
    assert np.abs(frames[32].astype(int) - frames[0]).max() <= 1
    assert np.abs(frames[16].astype(int) - frames[0]).max() > 40
    assert len(clouds.waves(32)) == 1 and len(clouds.waves(256)) > 2


def test_each_video_may_have_its_own_sky_which_stays() -> None:
    plain, varied = (scene(0, "train", 5, 1.0, varied_sky) for varied_sky in (False, True))
    assert plain.sky is None and varied.sky is not None
    assert (varied.sprites, varied.clouds, varied.label) == (plain.sprites, plain.clouds, plain.label)
    corners = []
    for index in range(8):
        sky = scene(0, "train", index, 1.0, varied_sky=True).sky
        assert sky is not None and 0.45 <= sky.hue <= 0.9 and 0.5 <= sky.brightness <= 1.25
        top, bottom = (np.array(colour) for colour in sky.colours())
        for colour, (saturation, value), turn in ((top, (0.75, 0.59), 0), (bottom, (0.22, 0.78), 0.05)):
            hue, s, v = colorsys.rgb_to_hsv(*(colour / 255))
            assert (hue, s, v) == pytest.approx(
                (sky.hue + turn, saturation, value * sky.brightness), abs=1e-5
            )
        frames = render(0, "train", index, 64, 32, varied_sky=True).astype(float)
        # Where clouds are thinnest the sky's own colour shows: from the first to the last frame the same.
        darkest = frames.reshape(4, 16, -1, 3).min((1, 2))
        assert np.abs(darkest - darkest.mean(0)).max() < 25
        corners.append(tuple(top.round()))
    assert len(set(corners)) == 8


def test_long_and_large_videos_come_in_chunks() -> None:
    what = scene(0, "train", 4, aspect=1.5)
    whole = np.concatenate(list(render_scene(what, 50, (32, 48))))
    parts = list(render_scene(what, 50, (32, 48), chunk=7 * 32 * 48))
    assert [len(part) for part in parts] == [7] * 7 + [1]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert whole.shape == (50, 32, 48, 3)


def test_files_hold_what_was_drawn(tmp_path: Path) -> None:
    data = make(tmp_path)
    for index, entry in enumerate(data.entries[:6]):
        info = probe(entry.path)
        assert (info.num_frames, info.fps, info.height, info.width) == (20, 8.0, 32, 32)
        drawn = render(0, "train", index, 20, 32)
        error = (read_clip(entry.path, 0, 20).astype(float) - drawn) / 127.5
        assert 10 * np.log10(4 / np.mean(error**2)) > 27  # 4:2:0 softens coloured edges
        assert entry.label == index % 6


def test_what_comes_out_is_a_data_set_with_six_classes(tmp_path: Path) -> None:
    data, test = make(tmp_path), make(tmp_path, split="test")
    assert len(data) == 12 and len(test) == 6 and len(make(tmp_path, split="all")) == 18
    assert data.classes == CLASSES and len(CLASSES) == 6
    assert sorted(entry.label for entry in data.entries) == sorted(list(range(6)) * 2)
    assert data.fps == 8 and data.resolution == (32, 32)
    assert data[0]["frames"].shape == (16, 32, 32, 3)
    assert data.fingerprint != test.fingerprint
    assert not {entry.path for entry in data.entries} & {entry.path for entry in test.entries}
    assert data.summary().startswith("synthetic: 12 videos, 6 classes, 32x32")


def test_the_folder_reader_sees_the_same_videos(tmp_path: Path) -> None:
    data = make(tmp_path)
    (made,) = (path for path in tmp_path.iterdir() if path.is_dir())
    seen = folder(
        str(made),
        split="train",
        test_fraction=0.1,
        num_frames=16,
        frame_stride=1,
        fps=None,
        resolution=32,
        crop="center_crop",
        horizontal_flip=False,
        short_videos="skip",
        clips_per_opening=1,
        seed=0,
        cache=None,
        strict=True,
    )
    assert sorted(seen.classes) == sorted(CLASSES)
    assert {(e.path, e.num_frames, e.fps) for e in seen.entries} == {
        (e.path, e.num_frames, e.fps) for e in data.entries
    }
    by_path = {entry.path: data.classes[entry.label] for entry in data.entries}
    assert all(by_path[entry.path] == seen.classes[entry.label] for entry in seen.entries)


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(tmp_path / name, scene_seed=seed)
    a, b, c = (list(files(tmp_path / name).values()) for name in "abc")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(set(a)) == len(a) == 18 and not set(a) & set(c)
    assert sorted(a) == sorted(b)


def test_a_video_depends_on_seed_split_and_index_only(tmp_path: Path) -> None:
    make(tmp_path / "few", num_videos=3, num_test_videos=2)
    make(tmp_path / "many")
    few, many = files(tmp_path / "few"), files(tmp_path / "many")
    assert len(few) == 5 and few.items() <= many.items()
    train, test = scene(0, "train", 0, 1.0), scene(0, "test", 0, 1.0)
    assert train.label == test.label == 0 and train.sprites != test.sprites


def rendering(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record which files are written from now on."""
    written: list[Path] = []

    class Recording(synthetic_module.VideoWriter):
        def close(self) -> None:
            super().close()
            written.append(self.path)

    monkeypatch.setattr(synthetic_module, "VideoWriter", Recording)
    return written


def test_only_what_is_missing_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path)
    before = files(tmp_path)
    written = rendering(monkeypatch)
    assert make(tmp_path).fingerprint == first.fingerprint
    assert written == []
    assert len(make(tmp_path, num_videos=14)) == 14
    assert [path.name for path in sorted(written)] == ["000012.mp4", "000013.mp4"]
    # One was deleted, one was overwritten by somebody.
    Path(first.entries[3].path).unlink()
    Path(first.entries[5].path).write_bytes(b"nothing")
    written.clear()
    make(tmp_path)
    assert sorted(map(str, written)) == sorted([first.entries[3].path, first.entries[5].path])
    assert before.items() <= files(tmp_path).items()


def test_an_interrupted_rendering_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "whole")
    with monkeypatch.context() as patched:
        written = rendering(patched)
        original = synthetic_module.render_scene

        def stop_after_five(*arguments: Any) -> Any:
            if len(written) >= 5:
                raise KeyboardInterrupt
            return original(*arguments)

        patched.setattr(synthetic_module, "render_scene", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "again")
    left = len(files(tmp_path / "again"))
    assert 5 <= left < 18
    written = rendering(monkeypatch)
    make(tmp_path / "again")
    assert len(written) == 18 - left
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.part"))


def test_changed_parameters_never_mix(tmp_path: Path) -> None:
    kinds = [{}, {"resolution": 16}, {"scene_seed": 1}, {"num_frames_per_video": 24}, {"video_fps": 10}]
    made = [make(tmp_path, num_videos=2, num_test_videos=1, **kind) for kind in kinds]
    folders = {Path(data.entries[0].path).parents[2] for data in made}
    assert len(folders) == len(kinds)
    for data, kind in zip(made, kinds, strict=True):
        info = probe(data.entries[0].path)
        assert info.height == kind.get("resolution", 32) and info.fps == kind.get("video_fps", 8)
        assert info.num_frames == kind.get("num_frames_per_video", 20)


def test_the_manifest_tells_classes_parameters_and_motion(tmp_path: Path) -> None:
    data = make(tmp_path)
    made = Path(data.entries[0].path).parents[2]
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["classes"] == list(CLASSES)
    assert manifest["parameters"]["num_frames"] == 20 and manifest["parameters"]["fps"] == 8
    assert set(manifest["videos"]) == {str(path.relative_to(made)) for path in made.rglob("*.mp4")}
    name = "train/square_and_moon/000004.mp4"
    told = manifest["videos"][name]
    assert told["class"] == "square_and_moon" and told["num_bytes"] == (made / name).stat().st_size
    square, moon = (Sprite(**sprite) for sprite in told["sprites"])
    assert (square.shape, moon.shape) == ("square", "moon") and moon.depth > square.depth
    assert (square, moon) == scene(0, "train", 4, 1.0).sprites
    x, y = square.path(np.arange(20.0), aspect=1.0)
    found = centre_of(read_clip(made / name, 7, 1)[0], "square")
    assert found is not None and abs(found[0] - x[7]) < 0.04 and abs(found[1] - y[7]) < 0.04


def test_a_varied_sky_is_another_folder_and_told_in_its_manifest(tmp_path: Path) -> None:
    make(tmp_path), make(tmp_path, varied_sky=True)
    told = {
        bool(manifest["parameters"].get("varied_sky")): manifest["videos"]["train/disc/000000.mp4"]
        for manifest in (json.loads(path.read_text()) for path in tmp_path.glob("*/manifest.json"))
    }
    assert set(told) == {False, True}
    assert "sky" not in told[False] and set(told[True]["sky"]) == {"hue", "brightness"}
    assert told[True]["sprites"] == told[False]["sprites"]


@pytest.mark.parametrize("resolution", [(48, 32), (33, 33), 64])
def test_any_size(tmp_path: Path, resolution: Any) -> None:
    data = make(tmp_path, num_videos=6, num_test_videos=1, resolution=resolution)
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    assert data[0]["frames"].shape == (16, height, width, 3)


def test_numbers_that_make_no_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="above 0; got 0, 6, 20, 8"):
        make(tmp_path, num_videos=0)
    with pytest.raises(ValueError, match="choose one of: train, test, all"):
        make(tmp_path, split="validation")
    with pytest.raises(ValueError, match=r"12 of 12 videos.*num_frames"):
        make(tmp_path, num_frames=21)


def test_an_unwritable_root_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, VideoError), match="file"):
        make(tmp_path / "file")
