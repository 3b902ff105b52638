"""Long videos as a user makes them, by a network with random weights: lengths, interruptions, memory."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from src.config import ConfigError, SampleConfig, build, check, read_yaml
from src.data.video import probe, read_clip, write_video
from src.diffusion.long_video import Level, Plan
from src.generation import VideoGenerator
from src.model_folder import DataRecord, load_diffusion, masking_of, save_autoencoder, save_diffusion
from src.models.unet import UNet3d
from src.sample import Windows, make_videos
from src.train import unet_node
from src.training.share import Share
from tests.composing import composed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders of `tiny_long`'s networks, and one of key latents only, with random weights."""
    folder = tmp_path_factory.mktemp("long")
    cfg = composed("train", "+experiment=tiny_long")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    autoencoder_cfg = composed("train", "+experiment=tiny_autoencoder")
    node: Any = OmegaConf.to_container(autoencoder_cfg.autoencoder, resolve=True)
    torch.manual_seed(0)
    autoencoder = build(node)
    data = DataRecord("sprites", "0" * 64, 16, 1, [32, 32], 8.0, [])
    save_autoencoder(folder / "autoencoder", autoencoder.state_dict(), node=node, data=data, step=1)
    window = (autoencoder.latent_channels, 5, 8, 8)
    masking = masking_of(plain["conditioning"])
    for name, strides in (("model", [4, 1]), ("keys", [4]), ("dense", [1]), ("sparse", [16])):
        unet_config = unet_node(plain["unet"], window, masking, 0, len(strides))
        unet = build(unet_config)
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        save_diffusion(
            folder / name,
            unet.state_dict(),
            autoencoder=autoencoder.state_dict(),
            autoencoder_node=plain["autoencoder"] | {"folder": str(folder / "autoencoder")},
            config={
                "unet": unet_config,
                "noise_schedule": plain["noise_schedule"],
                "prediction_type": plain["prediction_type"],
                "conditioning": plain["conditioning"],
                "class_conditional": False,
                "window": list(window),
                "latent_strides": strides,
            },
            data=DataRecord("sprites", "0" * 64, 68, 1, [32, 32], 8.0, []),
            step=1,
        )
    return folder


SHORT = ["plan=hierarchical", "num_frames=250", "guidance=lvdm", "noise_level=100"]
LONG = [*SHORT, "num_frames=400", "sampler.num_sampling_steps=4"]
FEW = ["sampler.num_sampling_steps=2", "num_samples=2", "machine=cpu"]


def options(home: Path, *arguments: str) -> list[str]:
    given = [] if any(argument.startswith("model=") for argument in arguments) else [f"model={home}/model"]
    return [*given, *FEW, *arguments]


def command(home: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "src.sample", *options(home, *arguments)]


def sample(home: Path, *arguments: str) -> str:
    """What `python -m src.sample` does, in this process; gives what it prints."""
    printed = io.StringIO()
    cfg = composed("sample", *options(home, *arguments))
    check(cfg, SampleConfig)
    with contextlib.redirect_stdout(printed):
        make_videos(cfg, Path(cfg.output), Share())
    return printed.getvalue()


def frames_of(path: Path) -> Any:
    return read_clip(path, 0, probe(path).num_frames).astype(int)


@pytest.fixture(scope="module")
def hierarchical(home: Path) -> Path:
    sample(
        home,
        "plan=hierarchical",
        "num_frames=250",
        "guidance=lvdm",
        "noise_level=100",
        f"output={home}/straight",
    )
    return home / "straight"


def test_a_hierarchical_video_has_its_length_and_says_how_it_was_made(hierarchical: Path) -> None:
    assert [probe(path).num_frames for path in sorted(hierarchical.glob("*.mp4"))] == [250, 250]
    record = json.loads((hierarchical / "samples.json").read_text())
    assert record["made_by"]["plan"]["kind"] == "hierarchical" and len(record["samples"]) == 2
    assert sorted(path.name for path in hierarchical.iterdir()) == [
        "contact_sheet.png", "sample_000000.mp4", "sample_000001.mp4", "samples.json"
    ]  # fmt: skip
    first, second = (frames_of(hierarchical / f"sample_00000{i}.mp4") for i in range(2))
    assert abs(first - second).mean() > 1


def test_what_is_there_is_not_made_again(home: Path, hierarchical: Path) -> None:
    same = [
        "plan=hierarchical",
        "num_frames=250",
        "guidance=lvdm",
        "noise_level=100",
        f"output={hierarchical}",
    ]
    stamp = (hierarchical / "sample_000001.mp4").stat().st_mtime_ns
    (hierarchical / "sample_000000.mp4").unlink()
    told = sample(home, *same)
    assert "(1 of them were there)" in told
    assert (hierarchical / "sample_000001.mp4").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="made in another way"):
        sample(home, *same, "interpolation.guidance_scale=2")


def test_the_plan_is_told_and_drawn_before_anything_is_made(home: Path) -> None:
    told = sample(home, "plan=hierarchical", "num_frames=1024", "dry_run=true", f"output={home}/drawn")
    assert "1,024 frames = 256 latent frames" in told
    assert re.search(r"level 0: 16 windows of 5 latent frames 4 apart.*: 32 calls", told)
    assert re.search(r"level 1: 64 windows .* up to 16 at once: 16 calls", told)
    assert [path.name for path in (home / "drawn").iterdir()] == ["plan.svg"]
    assert b"the first 60 of 80 windows" in (home / "drawn/plan.svg").read_bytes()


@pytest.mark.parametrize("plan", ["hierarchical", "autoregressive"])
def test_the_plan_of_a_billion_frames_is_told_at_once(home: Path, plan: str) -> None:
    began = time.monotonic()
    told = sample(home, f"plan={plan}", "num_frames=1000000000", "dry_run=true", f"output={home}/billion")
    assert "1,000,000,000 frames = 250,000,000 latent frames" in told
    assert time.monotonic() - began < 30  # enumerated, it would be half an hour


@pytest.fixture(scope="module")
def clip(home: Path) -> Path:
    y, x = np.mgrid[:32, :32]
    frames = np.stack([np.stack([4 * x + t, 3 * y + 2 * t, 128 + 0 * x], -1) for t in range(37)])
    write_video(home / "clip.mp4", frames.astype(np.uint8), 8.0)
    return home / "clip.mp4"


GIVEN = {
    "forward": (["num_frames=30"], 67, slice(0, 37), slice(0, 37)),
    "forward keys": (["num_frames=64", "plan=hierarchical"], 101, slice(0, 37), slice(0, 37)),
    "backward": (["num_frames=30", "direction=backward"], 67, slice(30, 67), slice(0, 37)),
    "loop": (["num_frames=60", "loop=true", "plan=hierarchical"], 97, slice(0, 37), slice(0, 37)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_given_video_is_part_of_what_is_made(home: Path, clip: Path, name: str) -> None:
    arguments, length, there, given = GIVEN[name]
    folder = home / f"given_{name.replace(' ', '_')}"
    sample(home, f"video={clip}", *arguments, f"output={folder}", "num_samples=1")
    made = frames_of(folder / "sample_000000.mp4")
    assert len(made) == length
    # Encoded twice: what is compared are pictures, not bits.
    assert abs(made[there] - frames_of(clip)[given]).mean() < 4


def test_what_lies_between_two_videos_is_filled(home: Path, clip: Path) -> None:
    sample(home, f"video=[{clip},{clip}]", "num_frames=12", f"output={home}/between", "num_samples=1")
    made = frames_of(home / "between/sample_000000.mp4")
    assert len(made) == 37 + 12 + 37
    for there in (slice(0, 37), slice(49, 86)):
        assert abs(made[there] - frames_of(clip)).mean() < 4


def test_two_networks_are_one_plan(home: Path) -> None:
    two = ["plan=hierarchical", "num_frames=64", f"model={home}/keys", f"interpolation.model={home}/dense"]
    sample(home, *two, f"output={home}/two")
    assert probe(home / "two/sample_000001.mp4").num_frames == 64
    assert "interpolation_sha256" in json.loads((home / "two/samples.json").read_text())["made_by"]


REFUSED = [
    (["plan=flat", "plan.num_given=1"], "doesn't go with plan.kind=flat"),
    (["plan.num_given=5", "num_frames=64"], "num_given must be from 0 to 4"),
    (["direction=backward"], "needs video=FILE"),
    (["video=nowhere.mp4"], "there is no nowhere.mp4"),
    (["loop=true", "num_frames=41"], "must be a multiple of 4"),
    (["loop=true", "num_frames=40", "plan=hierarchical"], "can't be closed by windows"),
    (["guidance=lvdm", "guidance.interval=[9]"], "must be null or"),
    (["guidance=lvdm", "guidance.interval=[5000,9000]"], "guidance.interval=[5000, 9000] holds none"),
    (["guidance=lvdm", "guidance.interval=[300,700]"], "the nearest are 999, 0. Widen the interval"),
    (
        ["plan=hierarchical", "guidance=lvdm", "interpolation.guidance_interval=[300,700]"],
        "interpolation.guidance_interval=[300, 700] holds none",
    ),
    (["guidance.scale=-1"], "guidance.scale must be a number of at least 0, got -1.0"),
    (
        ["plan=hierarchical", "interpolation.guidance_scale=-1"],
        "interpolation.guidance_scale must be a number of at least 0, got -1.0",
    ),
    (["first_seed=-1"], "first_seed must be at least 0, got -1"),
    (["interpolation.noise_level=20"], "interpolation.noise_level=20 has nothing to do in plan=autoregr"),
    (
        ["plan=flat", "interpolation.guidance_scale=2", "interpolation.guidance_interval=[0,9]"],
        "interpolation.guidance_scale=2, interpolation.guidance_interval=[0, 9] have nothing to do in",
    ),
    (["noise_level=300", "plan=hierarchical"], "noise_level=300 was never seen in training"),
    (
        ["interpolation.noise_level=300", "plan=hierarchical"],
        "interpolation.noise_level=300 was never seen in training",
    ),
    (["guidance.scale=nan"], "guidance.scale must be a number, got nan"),
    (["plan=hierarchical", "interpolation.noise_level=[1,2]"], "lists 2 values for 1 level"),
    (["plan=hierarchical", "interpolation.noise_level=1.9"], "interpolation.noise_level must be a whole"),
    (
        ["plan=hierarchical", "interpolation.guidance_scale=abc"],
        "interpolation.guidance_scale must be a number",
    ),
    (["plan=hierarchical", "interpolation.guidance_interval=[0.5,10]"], "guidance_interval must be a whole"),
    (["video=[clip.mp4,null]"], "there is no"),
    (["labels=77", "dry_run=true"], "trained without classes"),
    (["plan=flat", "loop=true"], "use plan=autoregressive or plan=hierarchical"),
    (["interpolation.model=elsewhere"], "has nothing to do in plan=autoregressive"),
    (["decoding_window=0"], "decoding_window must be at least 1"),
    (["model=keys", "num_frames=64"], "makes key latents only (4 latent frames apart)"),
    (
        ["model=keys", "plan=hierarchical", "num_frames=64"],
        "makes key latents only: there is nothing that fills the gaps between them. Give "
        "interpolation.model=FOLDER, a model trained with latent_strides=[1], or train one model on several "
        "strides (latent_strides=[4, 1])",
    ),
    (["model=dense", "plan=hierarchical", "num_frames=64"], "beside it, or use plan=autoregressive"),
    (
        ["model=model", "interpolation.model=sparse", "plan=hierarchical", "num_frames=64"],
        "with [16]: the two seem to be the wrong way round",
    ),
    (
        ["model=dense", "interpolation.model=keys", "plan=hierarchical", "num_frames=64"],
        "with [4]: the two seem to be the wrong way round",
    ),
    (
        ["model=sparse", "interpolation.model=keys", "plan=hierarchical", "num_frames=64"],
        "Give an interpolation.model trained with latent_strides=[1], or with more strides that end in 1",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused_before_anything_is_made(
    home: Path, arguments: list[str], message: str
) -> None:
    arguments = [
        re.sub(r"\bmodel=(model|keys|dense|sparse)$", rf"model={home}/\1", argument) for argument in arguments
    ]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        sample(home, *arguments, f"output={home}/refused")
    assert not (home / "refused").exists()


@pytest.mark.slow
def test_a_killed_job_goes_on_from_the_last_window(home: Path) -> None:
    subprocess.run(
        command(home, *LONG, f"output={home}/whole"), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True, capture_output=True,
    )  # fmt: skip
    folder = home / "killed"
    process = subprocess.Popen(
        command(home, *LONG, f"output={folder}"), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(folder.glob(".unfinished/*/*/*.safetensors"))) < 40 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    windows = sorted(folder.glob(".unfinished/*/*/*.safetensors"))
    assert windows and not list(folder.glob("*.mp4"))
    assert list(folder.glob(".sample_*.part"))
    windows[0].write_bytes(b"torn")
    windows[1].write_bytes(windows[1].read_bytes()[:-64] + bytes(64))
    stamps = {path: path.stat().st_mtime_ns for path in windows[2:]}
    subprocess.run(
        command(home, *LONG, f"output={folder}"), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True, capture_output=True,
    )  # fmt: skip
    for i in range(2):
        name = f"sample_00000{i}.mp4"
        assert (folder / name).read_bytes() == (home / "whole" / name).read_bytes()
    assert stamps and not list(folder.glob(".*"))


def test_a_damaged_sample_is_made_again(home: Path) -> None:
    folder, clean = home / "damaged", home / "undamaged"
    arguments = ["plan=flat", "num_frames=32"]
    sample(home, *arguments, f"output={clean}")
    sample(home, *arguments, f"output={folder}")
    first, second = (folder / f"sample_00000{i}.mp4" for i in range(2))
    stamp = second.stat().st_mtime_ns
    first.write_bytes(first.read_bytes()[:1000])
    told = sample(home, *arguments, f"output={folder}")
    assert f"{first} is damaged" in told and "1 of them were there" in told
    assert second.stat().st_mtime_ns == stamp
    # Alone in its batch, so equal but for rounding.
    assert abs(frames_of(first) - frames_of(clean / first.name)).mean() < 1


def kept_windows(folder: Path) -> list[Path]:
    return sorted(folder.glob(".unfinished/*/*/*.safetensors"))


def test_windows_of_other_options_and_other_samples_are_left_alone(home: Path) -> None:
    """What is kept of an interrupted job is neither taken for another's nor removed by it."""
    folder, clean = home / "left", home / "clean"
    model = load_diffusion(str(home / "model"))
    torch.manual_seed(0)
    kept = Windows(folder / ".unfinished", {"other": "options"})
    for seed in (0, 1):
        for window in Plan((Level(4, 5), Level(1, 5)), 63, 1).windows():
            kept.put(seed, window, torch.randn(model.window))
    before = kept_windows(folder)
    sample(home, *SHORT, f"output={folder}", "num_samples=1")
    assert kept_windows(folder) == before
    sample(home, *SHORT, f"output={clean}", "num_samples=1")
    name = "sample_000000.mp4"
    assert (folder / name).read_bytes() == (clean / name).read_bytes()


def test_a_kept_window_of_another_shape_is_made_again(home: Path) -> None:
    folder, clean = home / "misshapen", home / "well_shaped"
    sample(home, *SHORT, f"output={clean}")
    made_by = json.loads((clean / "samples.json").read_text())["made_by"]
    (window,) = list(Plan((Level(4, 5), Level(1, 5)), 63, 1).windows())[:1]
    Windows(folder / ".unfinished", made_by).put(0, window, torch.zeros(4, 3, 8, 8))
    sample(home, *SHORT, f"output={folder}")
    for name in ("sample_000000.mp4", "sample_000001.mp4"):
        assert (folder / name).read_bytes() == (clean / name).read_bytes()


@pytest.mark.parametrize(
    ("plan", "num_frames", "num_samples", "batch_size"),
    [
        ("hierarchical", 205, 9, 8),
        ("flat", 205, 3, 2),
        ("autoregressive", 50, 3, 2),
        ("hierarchical", 3, 1, 1),
    ],
)
def test_as_many_calls_are_told_as_are_made(
    home: Path, plan: str, num_frames: int, num_samples: int, batch_size: int, tmp_path: Path
) -> None:
    made = 0
    numbers = [f"num_frames={num_frames}", f"num_samples={num_samples}", f"batch_size={batch_size}"]
    with pytest.MonkeyPatch.context() as patch:
        forward = UNet3d.forward

        def counted(self: UNet3d, *arguments: Any, **told: Any) -> torch.Tensor:
            nonlocal made
            made += 1
            return forward(self, *arguments, **told)

        patch.setattr(UNet3d, "forward", counted)
        patch.setattr(VideoGenerator, "seconds_of_call", lambda *_: 0.1)
        told = sample(home, f"plan={plan}", *numbers, f"output={tmp_path}")
    counts = re.findall(r"\n  ([\d,]+) calls, about", told)
    assert [int(count.replace(",", "")) for count in counts] == [made]
    assert len(list(tmp_path.glob("*.mp4"))) == num_samples


@pytest.mark.slow
def test_batch_size_and_processes_change_rounding_only(home: Path) -> None:
    common = [*LONG, "num_samples=4"]
    sample(home, *common, "batch_size=8", f"output={home}/batch_8")
    sample(home, *common, "batch_size=1", f"output={home}/batch_1")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "src.sample",
    ]
    subprocess.run(
        [*launch, f"model={home}/model", *FEW, *common, f"output={home}/two_processes"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    for i in range(4):
        name = f"sample_00000{i}.mp4"
        reference = frames_of(home / "batch_8" / name)
        other = frames_of(home / "batch_8" / f"sample_00000{(i + 1) % 4}.mp4")
        for folder in ("batch_1", "two_processes"):
            # Rounding moves a level here and there, from where on the encoder decides otherwise.
            difference = abs(frames_of(home / folder / name) - reference).mean()
            assert difference < 0.02 * abs(other - reference).mean()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(home: Path) -> None:
    peaks = []
    for num_frames in (256, 4096):
        arguments = [
            "plan=hierarchical",
            f"num_frames={num_frames}",
            "num_samples=1",
            f"output={home}/m{num_frames}",
        ]
        process = subprocess.Popen(
            command(home, *arguments), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        peak = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            found = re.search(r"VmHWM:\s+(\d+)", status)
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.05)
        assert process.wait() == 0
        peaks.append(peak)
    assert probe(home / "m4096/sample_000000.mp4").num_frames == 4096
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sweep", ["hierarchy", "conditional_perturbation", "unconditional_guidance", "given_frames_in_loss"]
)
def test_a_sweep_ends_in_a_report(home: Path, sweep: str, tmp_path: Path) -> None:
    """The sweeps of experiments/ from their files, as small as can be."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LATENT_VIDEO_CACHE": str(tmp_path / "cache")
    }  # fmt: skip
    (tmp_path / "runs").mkdir()
    for trained in ("perturbed", "clean", "all_frames"):
        (tmp_path / f"runs/drift_{trained}_1").symlink_to(home)
    small = [
        "seed=1", "num_frames=128", "num_positions=8", "sampler.num_sampling_steps=1",
        "protocol.num_generated=2", "protocol.num_real=4", "dataset.num_frames_per_video=96",
        "dataset.num_videos=6", "dataset.num_test_videos=2", "dataset.cache=null",
    ]  # fmt: skip

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip

    run("src.evaluate", f"+sweep={sweep}", *small)
    assert f"{sweep}.md" in run("src.report", f"sweep={sweep}", "output=report")
    text = (tmp_path / f"report/{sweep}.md").read_text()
    assert re.search(r"undecided: \d of 3 seeds measured", text) and "not measured" not in text
    cells = json.loads((tmp_path / f"report/{sweep}.json").read_text())
    conditions = read_yaml(ROOT / f"experiments/expected/{sweep}.yaml")["conditions"]
    assert {one["condition"] for one in cells} == set(conditions)
    assert len(list((tmp_path / "report").glob("*.png"))) == len(conditions)
    for one in cells:
        assert len(one["outside"]) == len(one["changed"]) == 8 and one["seed"] == 1
        assert len(one["real_changed"]) == 6, "real videos reach so far"
        assert one["blocks"]["num_frames"] == 64 and one["blocks"]["nearest"][0] > 0
    (first, *_) = (tmp_path / "runs/drift").glob("*/evaluation_samples/samples.json")
    # Another seed of the evaluation is another million of samples.
    assert [one["seed"] for one in json.loads(first.read_text())["samples"]] == [1_100_000, 1_100_001]
