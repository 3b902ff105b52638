"""Each published data set from its layout to a number, as a user would."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.e2e.test_tiny import verb
from tests.layouts import LAYOUTS

PREPARED = {
    "ucf101": (
        "8 videos, 2 classes",
        ["videos: 8 of 13,320", "classes: 2 of 101", "training videos of split 1: 6"],
    ),
    "ucf101_frames": ("8 videos, 2 classes", ["videos: 8 of 13,320"]),
    "sky": (
        "train: Sky Time-lapse, split, train: 6 videos",
        [
            "1 skipped as too short",
            "long videos in sky_train: 3 of 997",
            "short videos in sky_train: 7 of 2,392",
        ],
    ),
    "taichi": ("7 videos", ["videos in train: 5 of 3,049", "videos in test: 2 of 285"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_prepared_trained_encoded_and_measured(
    layout: str, shared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = layout.removesuffix("_frames")
    root = tmp_path / "data root"
    LAYOUTS[layout](shared("clips").parent, root)
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path / "cache_home"))
    data = [f"dataset={name}", f"dataset.root={root}"]

    told = verb(tmp_path, "prepare", *data, f"index={tmp_path}/index.csv")
    summary, lines = PREPARED[layout]
    assert summary in told.stdout and all(line in told.stdout for line in lines), told.stdout
    index = list(csv.DictReader((tmp_path / "index.csv").open()))
    assert len(index) == {"sky": 9, "taichi": 7}.get(name, 8)
    assert all(len(row["sha256"]) == 64 and int(row["frames"]) >= 5 for row in index)
    assert [row["status"] for row in index].count("too short") == (name == "sky")

    rate = ["dataset.fps=20"] if name == "taichi" else []
    small = [
        *data,
        *rate,
        "dataset.resolution=32",
        f"dataset.cache={tmp_path}/cache",
        f"runs={tmp_path}/runs",
    ]
    steps = [
        "train.num_steps=6",
        "train.save_every=0",
        "train.num_statistics_clips=4",
        "train.num_held_out=2",
    ]
    verb(tmp_path, "train", "+experiment=tiny_autoencoder", *small, *steps)
    autoencoder = f"{tmp_path}/runs/tiny_autoencoder/model"
    classes = f"class_conditional={'true' if name == 'ucf101' else 'false'}"
    verb(tmp_path, "encode", f"model={autoencoder}", f"output={tmp_path}/latents", *small[:-1])
    verb(
        tmp_path, "train", "+experiment=tiny", *small, *steps, classes,
        f"latents={tmp_path}/runs/tiny_autoencoder/latents",
    )  # fmt: skip
    model = f"{tmp_path}/runs/tiny/model"
    verb(
        tmp_path, "evaluate", f"model={model}", *data, "protocol=quick", "protocol.num_real=4",
        "protocol.num_generated=4", "protocol.features=null",
    )  # fmt: skip
    scores = json.loads((tmp_path / "runs/tiny/evaluation.json").read_text())
    record = yaml.safe_load((tmp_path / "runs/tiny/model/config.yaml").read_text())["data"]
    assert record["target_fps"] == (20 if rate else None)  # which the evaluation follows
    assert scores["comparison"]["fingerprint"] == record["fingerprint"] and not any(
        "differs" in note for note in scores["notes"]
    )
    assert scores["metrics"]["contrast_real"] > 0


@pytest.mark.slow
def test_a_second_look_touches_only_what_has_changed(
    shared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path / "cache_home"))
    root = tmp_path / "data"
    LAYOUTS["taichi"](shared("clips").parent, root)
    arguments = ["dataset=taichi", f"dataset.root={root}"]
    fingerprints = []
    for change in (None, None, "content"):
        if change:
            first, second = sorted(root.rglob("*.mp4"))[:2]
            shutil.copyfile(second, first)
        told = verb(tmp_path, "prepare", *arguments, f"index={tmp_path}/index.csv").stdout
        fingerprints.append(told.rpartition("fingerprint ")[2])
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    packing = [f"shards={tmp_path}/shards", "videos_per_shard=3"]
    told = verb(tmp_path, "prepare", *arguments, f"index={tmp_path}/index.csv", *packing).stdout
    assert "(3 written now, 7 videos)" in told and len(list((tmp_path / "shards").glob("*.tar"))) == 3
    packed = ["dataset=shards", f"dataset.root={tmp_path}/shards", f"index={tmp_path}/packed.csv"]
    assert fingerprints[2].split(")")[0] in verb(tmp_path, "prepare", *packed).stdout
    assert (tmp_path / "packed.csv").read_text() == (tmp_path / "index.csv").read_text()
    refused = verb(tmp_path, "prepare", *packed, f"index={tmp_path}", check=False)
    assert refused.returncode == 2 and f"index={tmp_path} is a folder" in refused.stderr
    refused = verb(tmp_path, "prepare", *packed, f"shards={tmp_path}/again", check=False)
    assert refused.returncode == 2 and "lies in shards already" in refused.stderr
