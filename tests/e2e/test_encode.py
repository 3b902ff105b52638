"""Clips encoded once, and what is learned from them, against clips that are encoded anew in every step."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src import encode as encoding
from src.config import build
from src.data import sampler, storage
from src.data.clips import ClipDataset
from src.data.latents import LatentDataset
from src.data.sampler import collate, epoch_order, to_batch
from src.encode import encode
from src.model_folder import DataRecord, load_autoencoder, save_autoencoder
from src.train import run, stage_of
from src.training.device import make_accelerator
from src.training.interruption import StopRequests
from src.training.share import Share
from tests.composing import composed

ROOT = Path(__file__).parents[2]
IN_THIS_PROCESS = {"num_workers": 0, "pin_memory": False, "prefetch_factor": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained autoencoder, whose latents have moments to be normalised."""
    folder = tmp_path_factory.mktemp("encode")
    autoencoder_folder(folder / "autoencoder", seed=0)
    return folder


def autoencoder_folder(folder: Path, seed: int, **options: Any) -> None:
    """An untrained autoencoder of the tiny experiment, with options of its own."""
    cfg = composed("train", "+experiment=tiny_autoencoder")
    node: dict[str, Any] = {**cfg.autoencoder, **options}
    torch.manual_seed(seed)
    network = build(node)
    draw = torch.Generator().manual_seed(seed)
    network.latent_mean.normal_(generator=draw)
    network.latent_std.uniform_(0.5, 2.0, generator=draw)
    data = DataRecord("synthetic", "", 8, 1, [32, 32], 8.0, [])
    save_autoencoder(folder, network.state_dict(), node=node, data=data, step=0)


def data_of(home: Path, seed: int = 0, **options: Any) -> ClipDataset:
    """Six videos of 20 frames, in clips of 16."""
    told = {
        "root": f"{home}/data", "cache": f"{home}/cache", "num_videos": 6, "num_test_videos": 2,
        "num_frames_per_video": 20, "num_frames": 16, "horizontal_flip": True,
    } | options  # fmt: skip
    cfg = composed("train", "name=x", *(f"dataset.{key}={value}" for key, value in told.items()))
    return build(cfg.dataset, split="train", seed=seed)


def encoded(home: Path, folder: Path, dataset: ClipDataset | None = None, **options: Any) -> LatentDataset:
    told: dict[str, Any] = {
        "clips_per_video": 3, "batch_size": 4, "order_seed": 0, "loading": IN_THIS_PROCESS,
    } | options  # fmt: skip
    return encode(
        dataset or data_of(home), str(home / "autoencoder"), folder,
        device=torch.device("cpu"), share=Share(), **told,
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_latent_is_its_clips_posterior_normalised(home: Path, tmp_path: Path) -> None:
    """Three clips of each video, each against its own encoding, normalised by hand."""
    dataset = data_of(home)
    latents = encoded(home, tmp_path)
    assert len(latents) == 18
    autoencoder = load_autoencoder(str(home / "autoencoder"))
    assert (autoencoder.latent_std - 1).abs().min() > 1e-3
    shift, scale = (x.view(1, -1, 1, 1, 1) for x in (autoencoder.latent_mean, autoencoder.latent_std))
    seen = set()
    for epoch in range(3):
        for place, video in enumerate(epoch_order(6, dataset.seed, epoch)):
            clip = dataset[6 * epoch + place]
            with torch.no_grad():
                posterior = autoencoder.encode(to_batch(collate([clip]), "cpu").video)
            found = latents.held_out(6 * epoch + video)
            torch.testing.assert_close(
                found["mean"], ((posterior.mean - shift) / scale)[0], atol=1e-5, rtol=0
            )
            torch.testing.assert_close(found["std"], (posterior.std / scale)[0], atol=1e-5, rtol=0)
            assert found["label"] == clip["label"] == video
            seen.add(clip["frames"].numpy().tobytes())
    assert len(seen) > 12, "the clips of one video start and flip differently"


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_what_was_damaged_after_the_end_is_made_again(home: Path, tmp_path: Path, damage: str) -> None:
    encoded(home, tmp_path)
    before = content(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.unlink() if damage == "deleted" else shard.write_bytes(shard.read_bytes()[:-1])
    encoded(home, tmp_path)
    assert content(tmp_path) == before


def test_the_bytes_dont_depend_on_who_loads_the_clips(home: Path, tmp_path: Path) -> None:
    encoded(home, tmp_path / "here")
    encoded(home, tmp_path / "workers", loading=IN_THIS_PROCESS | {"num_workers": 2})
    assert content(tmp_path / "here") == content(tmp_path / "workers")


def die_at(when: int) -> None:
    """Lets this process die just before (even) or after (odd) its file number ``when // 2`` gets its name."""
    replace, names = os.replace, 0

    def dying(source: Any, target: Any) -> None:
        nonlocal names
        if when == 2 * names:
            os._exit(9)
        replace(source, target)
        if when == 2 * names + 1:
            os._exit(9)
        names += 1

    storage.os.replace = dying  # type: ignore[assignment]


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 4 don't divide shards of 5: those of a second start must be the first's all the same."""
    monkeypatch.setattr(encoding, "CLIPS_PER_SHARD", 5)
    encoded(home, tmp_path / "straight")
    straight = content(tmp_path / "straight")
    assert len([name for name in straight if name.endswith(".safetensors")]) == 4
    for when in range(12):  # of started.json, four shards and index.json
        folder = tmp_path / f"killed_{when}"
        child = os.fork()
        if child == 0:
            die_at(when)
            try:
                encoded(home, folder)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert ("index.json" in content(folder)) == (when == 11)
        encoded(home, folder)
        assert content(folder) == straight


def changed_file(home: Path) -> ClipDataset:
    """The data set after the file of one of its videos got longer."""
    dataset = data_of(home)
    first, *others = dataset.entries
    longer = type(first)(**(vars(first) | {"num_bytes": first.num_bytes + 1}))
    dataset.entries = (longer, *others)
    return dataset


STALE: list[tuple[str, Callable[[Path], dict[str, Any]], str]] = [
    ("clips_per_video", lambda home: {"clips_per_video": 2}, "clips_per_video: 3 -> 2"),
    ("frames", lambda home: {"dataset": data_of(home, num_frames=8)}, "num_frames: 16 -> 8"),
    (
        "stride",
        lambda home: {"dataset": data_of(home, num_frames=8, frame_stride=2)},
        "num_frames: 16 -> 8\n    frame_stride: 1 -> 2",
    ),
    (
        "flip",
        lambda home: {"dataset": data_of(home, horizontal_flip=False)},
        "horizontal_flip: True -> False",
    ),
    ("seed", lambda home: {"dataset": data_of(home, seed=5)}, "dataset_seed: 0 -> 5"),
    ("file", lambda home: {"dataset": changed_file(home)}, r"dataset_fingerprint: \w{64} -> \w{64}"),
    (
        "resolution",
        lambda home: {"dataset": data_of(home, resolution=16)},
        r"dataset_fingerprint: .*\n    resolution: \[32, 32\] -> \[16, 16\]",
    ),
]


@pytest.mark.parametrize("change, told", [row[1:] for row in STALE], ids=[row[0] for row in STALE])
def test_stale_latents_are_refused_with_what_differs(
    change: Callable[[Path], dict[str, Any]], told: str, home: Path, tmp_path: Path
) -> None:
    encoded(home, tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=rf"something else:\n    {told}\nDelete the folder"):
        encoded(home, tmp_path, **change(home))
    assert content(tmp_path) == before
    encoded(home, tmp_path)


def test_latents_of_another_autoencoder_or_crop_are_refused(home: Path, tmp_path: Path) -> None:
    dataset = data_of(home)
    encoded(home, tmp_path)
    autoencoder_folder(tmp_path / "weights", seed=1)
    autoencoder_folder(tmp_path / "norm", seed=0, norm="clip")
    for name, told in (
        ("weights", r"autoencoder_sha256: \w{64} -> \w{64}"),
        ("norm", r"autoencoder\.norm: frame -> clip"),
    ):
        with pytest.raises(ValueError, match=rf"something else:\n    {told}\nDelete"):
            encode(
                dataset, str(tmp_path / name), tmp_path, clips_per_video=3, batch_size=4, order_seed=0,
                device=torch.device("cpu"), loading=IN_THIS_PROCESS, share=Share(),
            )  # fmt: skip
    dataset.resize.mode = "squash"
    with pytest.raises(ValueError, match=r"something else:\n    crop: center_crop -> squash\nDelete"):
        encoded(home, tmp_path, dataset)


@pytest.mark.parametrize("conditioning", ["none", "any"])
def test_the_loss_on_latents_is_the_loss_on_pixels(conditioning: str, home: Path, tmp_path: Path) -> None:
    """The same clips at the same positions: loss and gradients through the real stage and network."""
    dataset = data_of(home)
    latents = encoded(home, tmp_path)
    cfg = composed(
        "train", "+experiment=tiny", f"autoencoder_from={home}/autoencoder",
        f"conditioning={conditioning}", "unet.dropout=0",
    )  # fmt: skip
    accelerator, _ = make_accelerator(precision="no", tf32=False, batch_size=6, micro_batch_size=None)
    torch.manual_seed(0)
    stage, _ = stage_of(cfg, dataset, accelerator)
    draw = torch.Generator().manual_seed(0)
    for parameter in stage.modules["unet"].parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    order = epoch_order(6, dataset.seed, 1)
    rows = {
        "pixels": [dataset[6 + place] for place in range(6)],
        "latents": [latents.held_out(6 + video) | {"position": 6 + i} for i, video in enumerate(order)],
    }
    losses: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for name, items in rows.items():
        (update,) = stage.updates(stage.modules, to_batch(collate(items), "cpu"), 0)
        stage.modules["unet"].zero_grad()
        update.loss.backward()
        losses[name] = update.loss.detach()
        weights = [p.grad.flatten() for p in stage.modules["unet"].parameters() if p.grad is not None]
        gradients[name] = torch.cat(weights)
    torch.testing.assert_close(losses["latents"], losses["pixels"], rtol=1e-5, atol=0)
    difference = (gradients["latents"] - gradients["pixels"]).norm() / gradients["pixels"].norm()
    assert gradients["pixels"].norm() > 1e-3 and difference < 1e-4


def test_a_run_on_latents_is_the_run_on_pixels(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each video is one clip, step by step; held on the device to the last bit, and without workers."""
    loader = sampler.batches
    asked: list[dict[str, Any]] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return loader(*arguments, **options)

    monkeypatch.setattr(sampler, "batches", noted)
    common = [
        "+experiment=tiny", f"runs={tmp_path}", f"autoencoder_from={home}/autoencoder", "logger=jsonl",
        f"dataset.root={home}/data", f"dataset.cache={home}/cache", "dataset.num_videos=24",
        "dataset.num_frames_per_video=16", "clips_per_video=1", "seed=3",
        "train.num_steps=8", "train.log_every=1", "train.batch_size=4", "unet.dropout=0",
    ]  # fmt: skip
    rows = {}
    for name, options in {
        "pixels": ["latents=null", "machine.num_workers=1", "machine.prefetch_factor=5"],
        "latents": [f"latents={tmp_path}/l"],
        "resident": [f"latents={tmp_path}/l", "latents_on_device=true", "machine.num_workers=2"],
    }.items():
        asked.clear()
        with StopRequests() as requests:
            run(composed("train", *common, f"name={name}", *options), requests)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [
            {key: value for key, value in json.loads(line).items() if key != "time"} for line in lines
        ]
        if name == "pixels":
            told = {"num_workers": 1, "prefetch_factor": 5, "pin_memory": False}
            assert any(options.items() >= told.items() for options in asked), "as the config says"
    workers = [options["num_workers"] for options in asked]
    assert 2 not in workers, "where all latents are held nothing has to be loaded"
    assert rows["resident"] == rows["latents"]
    losses = {name: [row["unet/loss"] for row in of if "unet/loss" in row] for name, of in rows.items()}
    assert len(losses["pixels"]) == 8, "more than an epoch of 24 clips"
    assert losses["latents"] == pytest.approx(losses["pixels"], rel=1e-5)


def test_holding_latents_that_arent_asked_for_is_refused(home: Path, tmp_path: Path) -> None:
    cfg = composed(
        "train", "+experiment=tiny", f"runs={tmp_path}", f"autoencoder_from={home}/autoencoder",
        f"dataset.root={home}/data", f"dataset.cache={home}/cache", "latents=null", "latents_on_device=true",
    )  # fmt: skip
    with (
        pytest.raises(ValueError, match="latents_on_device=true needs latents=FOLDER"),
        StopRequests() as stop,
    ):
        run(cfg, stop)


# ---------------------------------------------------------------- as a user runs it


def command(home: Path, output: Path, *options: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [
        sys.executable, *(launcher if processes > 1 else []), "-m", "src.encode", "+experiment=tiny",
        f"autoencoder_from={home}/autoencoder", f"latents={output}", f"dataset.root={home}/tiny",
        f"dataset.cache={home}/cache", "clips_per_video=100", *options,
    ]  # fmt: skip


def start(command: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    """Latents that one process has encoded in one go."""
    shown = start(command(home, home / "straight")).stderr
    assert re.search(r"2400/2400 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+clip/s\]", shown), shown
    return home / "straight"


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 1), (2, 1), (1, 2)])
def test_killed_and_run_again_with_other_processes_gives_the_same_bytes(
    before: int, after: int, straight: Path, home: Path, tmp_path: Path
) -> None:
    """kill -9 to all processes in the middle; then the same command, with as many processes or others."""
    process = subprocess.Popen(
        command(home, tmp_path, processes=before), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "index.json").exists(), "killed in the middle"
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    shown = start(command(home, tmp_path, processes=after))
    assert shown.stdout.count("2,400 clips of latents") == 1
    assert content(tmp_path) == content(straight)
    assert 2 <= len(times) < 10
    assert all((tmp_path / name).stat().st_mtime_ns == t for name, t in times.items()), "encoded once"


@pytest.mark.slow
def test_two_processes_train_on_what_they_have_encoded_together(
    straight: Path, home: Path, tmp_path: Path
) -> None:
    """In a run, too, each clip is encoded once: no process writes the other's shards, or waits for all."""
    arguments = command(home, tmp_path / "latents", f"runs={tmp_path}", "logger=jsonl", processes=2)
    arguments[arguments.index("src.encode")] = "src.train"
    start([*arguments, "train.num_steps=2", "train.batch_size=16"])
    assert content(tmp_path / "latents") == content(straight)


@pytest.mark.slow
def test_a_full_or_read_only_disk_is_one_clear_message_and_loses_nothing(
    straight: Path, home: Path, tmp_path: Path
) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        for options, complaint in (("size=5m", "No space left"), ("ro", "Read-only")):
            subprocess.run(["mount", "-o", f"remount,{options}", str(tmp_path)], check=True)
            result = start(command(home, tmp_path / "l"), check=False)
            assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
            assert re.search(rf"OSError: can't write .*{complaint}", result.stderr), result.stderr
            finished = content(tmp_path / "l").keys()
            assert finished == {"started.json", ".lock", "00000.safetensors", "00001.safetensors"}
        subprocess.run(["mount", "-o", "remount,rw,size=64m", str(tmp_path)], check=True)
        times = [(tmp_path / "l" / f"0000{i}.safetensors").stat().st_mtime_ns for i in (0, 1)]
        start(command(home, tmp_path / "l"))
        assert content(tmp_path / "l") == content(straight)
        assert times == [(tmp_path / "l" / f"0000{i}.safetensors").stat().st_mtime_ns for i in (0, 1)]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_cant_be_encoded_is_one_clear_message(home: Path) -> None:
    for options in (["+experiment=tiny_autoencoder"], ["+experiment=tiny", "autoencoder=identity"]):
        cfg = composed("encode", *options)
        assert cfg.model is None, "no folder of a trained autoencoder"
    result = start([sys.executable, "-m", "src.encode", "+experiment=tiny", "latents=null"], check=False)
    assert result.returncode == 2 and "give the folders of a trained autoencoder and" in result.stderr
