"""What an evaluation refuses before it measures, and what it leaves on the disk."""

import csv
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src.config import ConfigError
from src.evaluate import output_path, shown_folder, write_nearest, write_videos
from src.evaluation.checking import NearestClips
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


def test_names_that_are_no_text_are_written_as_they_are(tmp_path):
    path = os.fsdecode(b"/data/caf\xe9.mp4")
    copies = NearestClips(
        "pixels", torch.tensor([0]), torch.zeros(0), torch.tensor([0.5]), num_candidates=1, of_held_out=None
    )
    training = SimpleNamespace(entries=[SimpleNamespace(path=path)])
    write_nearest(tmp_path / "nearest.csv", copies, training)  # type: ignore[arg-type]
    with Path(tmp_path / "nearest.csv").open(newline="", errors="surrogateescape") as file:
        assert list(csv.reader(file))[1] == ["0", "0.5", path]
