"""Samples of two kinds never share a folder; what is damaged is told or made again."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from src.config import ConfigError
from src.data.video import write_video
from src.request import warn_if_cut_short
from src.sample import is_complete, recipe, refuse_other_samples
from tests.composing import composed


def noise(num_frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, 32, 32, 3), dtype=np.uint8)


def cut_to_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_sample_that_lacks_frames_is_not_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sample_000000.mp4"
    assert not is_complete(path, 40)
    write_video(path, noise(40), 8)
    assert is_complete(path, 40)
    assert not capsys.readouterr().out
    assert not is_complete(path, 41)
    cut_to_half(path)
    assert not is_complete(path, 40)
    told = capsys.readouterr().out.splitlines()
    assert "40 of 41 frames" in told[0] and f"{path} is damaged" in told[1] and "made again" in told[1]
    path.write_bytes(b"")
    assert not is_complete(path, 40)
    assert "0 of 40 frames" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", '{"made_by": ', "[]", '{"made_by": 3}'])
def test_a_damaged_list_of_samples_is_told_with_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"samples\.json is damaged.*remove it and run the same command again"
    ):
        refuse_other_samples(tmp_path, {})


def test_a_given_video_that_is_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "given.mp4"
    write_video(path, noise(60), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_cut_short(path)
    cut_to_half(path)
    with pytest.warns(UserWarning, match=r"given\.mp4 says that it has 60 frames, and [23]\d of them can be"):
        warn_if_cut_short(path)


def test_a_folder_of_other_samples_is_refused(tmp_path: Path) -> None:
    cfg = composed("sample", "model=m")
    made_by = recipe(cfg, "abc", 16)
    refuse_other_samples(tmp_path, made_by)
    refuse_other_samples(tmp_path / "none", made_by)
    (tmp_path / "samples.json").write_text(json.dumps({"made_by": made_by}))
    refuse_other_samples(tmp_path, recipe(composed("sample", "model=m", "num_samples=3"), "abc", 16))
    with pytest.raises(ConfigError, match=r"weights_sha256: abc -> def[\s\S]*output="):
        refuse_other_samples(tmp_path, recipe(cfg, "def", 16))
    other = recipe(composed("sample", "model=m", "sampler=ddim", "guidance=lvdm"), "abc", 16)
    with pytest.raises(ConfigError, match=r"guidance.scale: 1.0 -> [\s\S]*sampler._target_"):
        refuse_other_samples(tmp_path, other)
