"""What an evaluation refuses before it measures, and what it leaves on the disk."""

import csv
import inspect
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.config import ConfigError, build
from src.evaluate import (
    check_request,
    long_samples,
    main,
    output_path,
    shown_folder,
    write_nearest,
    write_videos,
)
from src.evaluation.checking import NearestClips
from src.evaluation.measuring import Measuring
from src.training.share import Share
from tests.composing import composed


def test_videos_of_a_result_lie_in_a_folder_of_its_name(tmp_path):
    clips = torch.zeros(2, 3, 16, 16, 3, dtype=torch.uint8)
    for name in ("evaluation", "stylegan_v"):
        told = write_videos(shown_folder(tmp_path / f"{name}.json"), {"real": clips}, 8.0)
        assert told == {"real": [f"{name}/real_00.mp4", f"{name}/real_01.mp4"]}
        assert all((tmp_path / video).is_file() for video in told["real"])
    assert shown_folder(tmp_path / "stylegan_v.json") == tmp_path / "stylegan_v", "again is allowed"
    assert shown_folder(tmp_path / "result") != tmp_path / "result"


def test_no_result_lies_where_other_things_do(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.yaml").write_text("")
    for output, message in ((tmp_path / "model.json", "holds config.yaml"), (tmp_path, "is a folder; name")):
        with pytest.raises(ConfigError, match=message):
            output_path(composed("evaluate", "videos=x.npz", f"output={output}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["videos=x.npz", "num_replicates=19"],
            "at least 20 replicates, got num_replicates=19; 0 does without",
        ),
        (["videos=x.npz", "num_replicates=-1"], "num_replicates must be at least 0, got -1"),
        (["videos=x.npz", "num_positions=0"], "num_positions must be at least 1, got 0"),
        (["model=x", "seed=-1"], "^seed must be at least 0, got -1"),
        (["model=x", "first_seed=-1"], "first_seed must be at least 0, got -1"),
        (
            ["videos=x.npz", "protocol.features=null", "weights=x.pt"],
            "weights=x.pt are a feature extractor's",
        ),
        (["videos=x.npz", "perceptual=vgg"], "perceptual measures reconstructions: it needs model=FOLDER"),
        (["model=x", "num_positions=2"], "num_positions=2 is for long videos: give videos=FOLDER"),
        (["model=x", "videos=x.npz"], "give either model=FOLDER"),
    ],
)
def test_what_cant_be_is_told_before_anything_is_measured(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_request(composed("evaluate", *overrides))


@pytest.mark.parametrize("option", ["interpolation.noise_level=20", "interpolation.model=x"])
def test_options_of_filling_are_refused_where_nothing_is_filled(option, tmp_path):
    cfg = composed("evaluate", "model=x", "num_frames=64", option)
    with pytest.raises(ConfigError, match=f"{option} has nothing to do in plan=autoregressive"):
        long_samples(cfg, build(cfg.protocol), tmp_path / "evaluation.json", Share())


def test_few_replicates_are_no_matter_without_features():
    check_request(composed("evaluate", "videos=x.npz", "protocol.features=null", "num_replicates=5"))


def test_positions_that_do_not_fit_are_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    np.save(tmp_path / "long.npy", np.zeros((2, 12, 16, 16, 3), np.uint8))
    cfg = composed(
        "evaluate", "dataset=synthetic_tiny", f"videos={tmp_path}/long.npy", f"dataset.root={tmp_path}/data",
        "dataset.num_videos=4", "dataset.num_test_videos=2", "dataset.num_frames=4", "dataset.resolution=16",
        "dataset.cache=null", "protocol.features=null", "num_positions=4",
    )  # fmt: skip
    monkeypatch.setattr(Measuring, "rows", lambda *_: pytest.fail("measured before it was refused"))
    with pytest.raises(ValueError, match="num_positions=4: the shortest video has 12 frames, which hold 3"):
        inspect.unwrap(main)(cfg)


def test_names_that_are_no_text_are_written_as_they_are(tmp_path):
    path = os.fsdecode(b"/data/caf\xe9.mp4")
    copies = NearestClips(
        "pixels", torch.tensor([0]), torch.zeros(0), torch.tensor([0.5]), num_candidates=1, of_held_out=None
    )
    training = SimpleNamespace(entries=[SimpleNamespace(path=path)])
    write_nearest(tmp_path / "nearest.csv", copies, training)  # type: ignore[arg-type]
    with Path(tmp_path / "nearest.csv").open(newline="", errors="surrogateescape") as file:
        assert list(csv.reader(file))[1] == ["0", "0.5", path]
