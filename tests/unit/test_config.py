"""The door: what is refused, and what can be built."""

import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from src.config import (
    ConfigError,
    EmaSettings,
    TrainConfig,
    TrainSettings,
    _meant,
    build,
    check,
    claim_run_folder,
    difference,
    run_folder,
    typed,
)
from tests.composing import composed


@pytest.mark.parametrize(
    "override, message",
    [
        ("+experimnt=tiny", "experimnt.*Did you mean experiment"),
        ("+train.nmu_steps=3", "train.nmu_steps.*Did you mean train.num_steps"),
        ("+unet.model_chanels=3", "unet.model_chanels.*Did you mean unet.model_channels"),
        ("unet.model_channels=wide", "unet.model_channels must be int, got 'wide'"),
        ("train.num_steps=many", "train.*num_steps"),
        ("stage.loss=l3", "stage.loss=l3 is unknown; choose one of l2, l1"),
        ("name=???", "no value for name"),
        ("class_conditional=nah", "class_conditional must be bool or null, got 'nah'"),
        ("unet._target_=.models.unet.Unet", "can't be found"),
    ],
)
def test_what_cannot_be_meant_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(composed("train", "+experiment=tiny", override), TrainConfig)


@pytest.mark.parametrize(
    "override, meant",
    [
        ("train.num_stepss=4", "Did you mean train.num_steps"),
        ("attenton=joint", "Did you mean attention"),
        ("name=a=b", """quoted twice: 'name="a=b"'"""),
        ("attention=null", "attention is a group of options; leave it away"),
        ("seed=3", ""),
    ],
)
def test_what_hydra_refuses_is_explained(override: str, meant: str) -> None:
    hint = _meant("train", ["-m", "+experiment=tiny", override])
    assert meant in hint and bool(meant) == bool(hint)


def test_plumbing_is_typed() -> None:
    settings = typed(composed("train", "+experiment=tiny", "train.num_steps=7"), "train", TrainSettings)
    assert isinstance(settings, TrainSettings) and settings.num_steps == 7


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.clip_norm=nan", r"train\.clip_norm must be a finite number of at least 0, got nan"),
        ("train.clip_norm=inf", r"train\.clip_norm must be a finite number of at least 0, got inf"),
        ("train.save_every=-1", r"train\.save_every must be a finite number of at least 0, got -1"),
        ("train.num_steps=0", r"train\.num_steps must be a finite number of at least 1, got 0"),
        ("ema.snapshot_every=-3", r"ema\.snapshot_every must be at least 0 \(never\), got -3"),
    ],
)
def test_numbers_that_cant_be_meant_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(composed("train", "+experiment=tiny", override), TrainConfig)


def test_a_half_life_is_a_positive_number_of_clips() -> None:
    for half_life in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="a finite half-life above 0"):
            EmaSettings(None, half_life, None, 0).per_step(8)


def test_dots_mean_this_package() -> None:
    table = build(
        {"_target_": ".diffusion.noise_schedule.linear", "num_timesteps": 5, "beta_start": 0.1}, beta_end=0.2
    )
    assert table.shape == (5,)
    assert build({"_target_": "torch.nn.Linear", "in_features": 2}, out_features=3).weight.shape == (3, 2)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        ".data.video.os.system",
        ".models.unet.torch.load",
        ".metrics.i3d_weights.install_i3d",
        "src.models.unet.UNet3d",
    ],
)
def test_a_model_folder_builds_only_our_models(target: str, tmp_path: Path) -> None:
    flag = tmp_path / "executed"
    node = {"_target_": target, "command": f"touch {flag}"}
    with pytest.raises(ConfigError):
        build(node, trusted=False)
    nested = {"_target_": ".models.unet.UNet3d", "attention": node}
    with pytest.raises(ConfigError):
        build(nested, trusted=False)
    assert not flag.exists()


def test_live_objects_arrive_as_they_are() -> None:
    """Hydra would turn a dataclass into a dictionary, and copy modules."""
    from src.diffusion.parameterization import Parameterization

    process = Parameterization(torch.tensor([0.9, 0.5]), "v")
    partial = build({"_target_": "builtins.dict", "_partial_": True}, process=process)
    assert partial()["process"] is process


def test_differences_name_keys_old_and_new_but_not_harmless_ones() -> None:
    old = {"seed": 0, "train": {"num_steps": 10, "batch_size": 4}, "machine": {"precision": "no"}}
    new = {
        "seed": 1,
        "train": {"num_steps": 20, "batch_size": 4, "decay": "cosine"},
        "machine": {"precision": "bf16"},
    }
    assert difference(old, new) == ["  seed: 0 -> 1", "  train.decay: (none) -> cosine"]


def test_a_run_folder_keeps_its_config(tmp_path: Path) -> None:
    cfg = composed("train", "+experiment=tiny")
    claim_run_folder(cfg, tmp_path)
    (tmp_path / "state").mkdir()
    claim_run_folder(composed("train", "+experiment=tiny", "train.num_steps=99"), tmp_path)
    assert OmegaConf.load(tmp_path / "config.yaml").train.num_steps == 99
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.0015 -> 0.1[\s\S]*name="):
        claim_run_folder(composed("train", "+experiment=tiny", "optimizer.lr=0.1"), tmp_path)


def test_only_what_is_swept_is_behind_a_cells_name() -> None:
    from src.config import _swept_keys

    line = ["-m", "+experiment=tiny", "seed=0,1", "unet.model_channels=choice(16,32)", "train.num_steps=5"]
    assert _swept_keys(line) == ["seed", "unet.model_channels"]


@pytest.mark.parametrize(
    "content", [b"a: [1", b"\x00\xff\xfe", b"a: !!python/object:os.system x", b"", b"- 1"]
)
def test_a_damaged_config_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml (is damaged|holds no config).*; bring it back"):
        claim_run_folder(composed("train", "+experiment=tiny"), tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == content


@pytest.mark.parametrize("name", ["", ".", "../x", "a/../../b", "/abs", "./"])
def test_a_name_that_is_no_folder_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a folder under"):
        run_folder(composed("train", "+experiment=tiny", f"name='{name}'"))


@pytest.mark.parametrize("dataset", ["ucf101", "sky", "taichi", "folder", "shards"])
def test_options_of_clips_are_checked_at_the_door(dataset: str) -> None:
    """They are typed as a whole, and refused one by one."""
    common = ["train", "+experiment=tiny", f"dataset={dataset}", "dataset.root=x"]
    check(composed(*common, "dataset.short_videos=pad"), TrainConfig)
    for wrong, message in {
        "+dataset.short_video=pad": r"dataset\.short_video\b.*short_videos",
        "dataset.num_frames=many": r"dataset\.num_frames must be int",
        "dataset.fps=fast": r"dataset\.fps must be",
        "dataset.strict=3": r"dataset\.strict must be bool",
    }.items():
        with pytest.raises(ConfigError, match=message):
            check(composed(*common, wrong), TrainConfig)
