"""The smallest run through every room, as a user runs it: the verbs, in a folder of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.data.storage import held
from src.data.video import probe
from src.reporting.runs import load_run

ROOT = Path(__file__).parents[2]


def verb(
    folder: Path, name: str, *arguments: str, check: bool = True, cache: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m src.VERB``; what it writes goes under ``folder``, what it keeps into ``cache``."""
    result = subprocess.run(
        [sys.executable, "-m", f"src.{name}", *arguments],
        cwd=ROOT,
        env=environment(folder) | ({} if cache is None else {"LATENT_VIDEO_CACHE": str(cache)}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check and result.returncode:
        raise AssertionError(
            f"{name} {arguments} ended in {result.returncode}:\n{result.stdout}\n{result.stderr}"
        )
    return result


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HYDRA_FULL_ERROR": "0",
        "LATENT_VIDEO_CACHE": str(folder / "cache_home"),
    }


def at(folder: Path) -> list[str]:
    return [f"runs={folder}/runs", f"dataset.root={folder}/data", f"dataset.cache={folder}/cache"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the tiny experiments of both stages, and of long videos, have been trained."""
    folder = tmp_path_factory.mktemp("tiny")
    verb(folder, "train", "+experiment=tiny_autoencoder", *at(folder))
    verb(folder, "train", "+experiment=tiny", *at(folder))
    verb(folder, "train", "+experiment=tiny_long", *at(folder))
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_both_stages_leave_a_complete_run(home: Path) -> None:
    for name in ("tiny_autoencoder", "tiny"):
        run = home / "runs" / name
        assert (run / "model" / "weights.safetensors").is_file() and (run / "config.yaml").is_file()
        assert list((run / "tensorboard").glob("events*")) and list((run / "previews").glob("*/*.webp"))
        steps = [row["step"] for row in rows(run)]
        assert steps == sorted(steps) and len(steps) >= 6
    losses = [
        row["autoencoder/pixel"] for row in rows(home / "runs/tiny_autoencoder") if "autoencoder/pixel" in row
    ]
    assert losses[-1] < 0.8 * losses[0]
    model = load_file(home / "runs/tiny/model/autoencoder/weights.safetensors")
    assert (model["latent_std"] - 1).abs().max() > 1e-3, "latent statistics were measured"


def test_one_network_learns_both_levels_of_a_long_video(home: Path) -> None:
    from src.model_folder import load_diffusion

    run = home / "runs/tiny_long"
    model = load_diffusion(str(run / "model"))
    assert model.latent_strides == (4, 1) and model.window == (4, 5, 8, 8)
    assert model.masking.prediction > 0 and model.masking.interpolation > 0
    assert load_diffusion(str(home / "runs/tiny/model")).latent_strides == (1,)
    (last,) = (row for row in rows(run) if "held_out/loss" in row)
    by_stride = [last[f"held_out/loss_at_stride_{stride}"] for stride in (4, 1)]
    assert last["held_out/loss"] == pytest.approx(sum(by_stride) / 2)
    losses = [row["unet/loss"] for row in rows(run) if "unet/loss" in row]
    assert losses[-1] < 0.95 * losses[0]


def test_windows_go_on_from_a_state_to_the_same_bits(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny_long"
    shutil.copytree(home / "runs/tiny_long", run)
    autoencoder = home / "runs/tiny_autoencoder"
    shutil.rmtree(run / "state/step_000000030")
    shutil.rmtree(run / "model")
    told = verb(
        tmp_path, "train", "+experiment=tiny_long", *at(home)[1:], f"runs={tmp_path}/runs",
        f"latents={autoencoder}/latents_long", f"autoencoder_from={autoencoder}/model",
    ).stdout  # fmt: skip
    assert "going on after step 15" in told
    for file in ("modules", "averages", "optimizers"):
        a, b = (
            load_file(where / "state/step_000000030" / f"{file}.safetensors")
            for where in (home / "runs/tiny_long", run)
        )
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file


def test_sample_17_is_sample_17_in_any_batch(home: Path) -> None:
    from src.data.video import read_clip

    model = home / "runs/tiny/model"
    verb(
        home, "sample", f"model={model}", "num_samples=3", "first_seed=15", "batch_size=3", f"output={home}/a"
    )
    verb(home, "sample", f"model={model}", "num_samples=1", "first_seed=17", f"output={home}/b")
    a, b = (read_clip(home / name / "sample_000017.mp4", 0, 16).astype(int) for name in "ab")
    other = read_clip(home / "a/sample_000016.mp4", 0, 16).astype(int)
    # Rounding moves a level here and there before encoding, from where on the encoder decides otherwise.
    assert abs(a - b).mean() < 0.2 * abs(a - other).mean()
    check_before_encoding(model)
    description = json.loads((home / "a/samples.json").read_text())
    assert [entry["seed"] for entry in description["samples"]] == [15, 16, 17]
    (shown,) = (samples for samples in load_run(home).sample_sets if samples.name == "a")
    assert (shown.num_frames, shown.guidance_scale) == (16, 1.0) and len(shown.clips) == 3


def check_before_encoding(model: Path) -> None:
    """Sample 17 is the same up to rounding beside others and alone, before anything is encoded."""
    from src.config import build
    from src.model_folder import load_diffusion
    from tests.composing import composed

    sampler = build(composed("sample", "model=x").sampler)
    generator = load_diffusion(str(model)).generator(sampler, guidance_scale=1.0, noise_level=0)
    with torch.no_grad():
        together, alone = (generator.sample_window(seeds, None) for seeds in ([15, 16, 17], [17]))
        videos = generator.decode(together)[2:], generator.decode(alone)
    torch.testing.assert_close(*videos, rtol=0, atol=1e-4)


def test_a_run_is_trained_by_one_at_a_time_and_told_of_changed_data(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs/tiny", tmp_path / "runs/tiny")
    shutil.copytree(home / "runs/tiny_autoencoder", tmp_path / "runs/tiny_autoencoder")
    command = ["+experiment=tiny", f"runs={tmp_path}/runs", *at(home)[1:], "train.num_steps=31"]
    command.append(f"latents={home}/runs/tiny_autoencoder/latents")
    command.append(f"autoencoder_from={home}/runs/tiny_autoencoder/model")
    with held(tmp_path / "runs/tiny/.lock", "held"):
        refused = verb(tmp_path, "train", *command, check=False)
    assert refused.returncode == 2 and "is being trained already" in refused.stderr
    record = json.loads((tmp_path / "runs/tiny/run.json").read_text())
    record["starts"][-1]["data_fingerprint"] = "0" * 64
    (tmp_path / "runs/tiny/run.json").write_text(json.dumps(record))
    leftovers = [tmp_path / "runs/tiny/.run.json.1.part", tmp_path / "runs/tiny/previews/x/.a.webp.1.part"]
    for path in leftovers:  # of processes that were killed
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    told = verb(tmp_path, "train", *command).stderr
    assert not any(path.exists() for path in leftovers)
    assert "have changed since it was last trained (fingerprint 000000000000 ->" in told


def test_long_videos_have_the_length_that_was_asked_for(home: Path) -> None:
    from src.data.video import probe

    model = home / "runs/tiny/model"
    verb(home, "sample", f"model={model}", "num_samples=1", "num_frames=45", f"output={home}/long")
    assert probe(home / "long/sample_000000.mp4").num_frames == 45


def test_evaluation_and_page(home: Path) -> None:
    few = ["protocol=quick", "protocol.num_real=6", "protocol.num_generated=6", "dataset=synthetic_tiny"]
    run = home / "runs/tiny"
    verb(home, "evaluate", f"model={run}/model", *few, *at(home)[1:])
    record = json.loads((run / "evaluation.json").read_text())
    assert "fvd_fast@6" in record["metrics"], "never called FVD"
    assert not any(name in ("fvd", "kvd") for name in record["metrics"])
    assert record["metrics"]["reconstruction_psnr"] > 5 and record["notes"] == []
    assert all((run / video).is_file() for videos in record["videos"].values() for video in videos)
    verb(home, "report", f"runs=[{home}/runs/tiny_autoencoder,{run}]", f"output={home}/page.html")
    page = (home / "page.html").read_text()
    assert "fvd_fast@6" in page and "data:video/mp4" in page
    assert not re.search(r'(src|href)="https?://', page), "the page needs nothing from elsewhere"


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["tiny_autoencoder", "tiny_long"])
def test_killed_and_run_again_gives_the_same_bits(experiment: str, home: Path, tmp_path: Path) -> None:
    """kill -9 at some moment, then the same command: weights, state and logged losses as without the kill."""
    straight = home / "runs" / experiment
    command = [f"+experiment={experiment}", f"name=killed_{experiment}", *at(home), "logger=jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-m", "src.train", *command],
        cwd=ROOT,
        env=environment(home),
        stdout=subprocess.DEVNULL,
    )
    killed = home / "runs" / f"killed_{experiment}"
    deadline = time.monotonic() + 120
    while not list((killed / "state").glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "model").exists(), "killed in the middle"
    output = verb(home, "train", *command).stdout
    assert "going on after step" in output
    for file in ("modules", "averages", "optimizers", "running"):
        last = sorted((straight / "state").glob("step_*"))[-1].name
        a, b = (load_file(run / "state" / last / f"{file}.safetensors") for run in (straight, killed))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), file
    assert (straight / "model/weights.safetensors").read_bytes() == (
        killed / "model/weights.safetensors"
    ).read_bytes()
    without_time = [{k: v for k, v in row.items() if k != "time"} for row in rows(straight)]
    assert without_time == [{k: v for k, v in row.items() if k != "time"} for row in rows(killed)]


def assert_equal_runs(one: Path, other: Path) -> None:
    """The same states, models and rows, bit for bit."""
    last = sorted((one / "state").glob("step_*"))[-1].name
    for file in ("modules", "averages", "optimizers", "running"):
        a, b = (load_file(run / "state" / last / f"{file}.safetensors") for run in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file
    weights = [(run / "model/weights.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]
    a, b = ([{k: v for k, v in row.items() if k != "time"} for row in rows(run)] for run in (one, other))
    assert a == b


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "name"), [("tiny_autoencoder", "SIGINT"), ("tiny", "SIGTERM")])
def test_asked_to_stop_it_saves_and_the_same_command_goes_on(
    experiment: str, name: str, home: Path, tmp_path: Path
) -> None:
    """The signal goes to the whole group, workers included, as from a terminal or from Slurm."""
    data = [e for e in at(home) if not e.startswith("runs=")]
    shutil.copytree(home / "runs/tiny_autoencoder/model", tmp_path / "runs/tiny_autoencoder/model")
    command = [
        f"+experiment={experiment}", "name=stopped", f"runs={tmp_path}/runs", *data, "logger=jsonl",
        "train.num_steps=45", "train.log_every=7", "train.save_every=20", "machine.num_workers=2",
    ]  # fmt: skip
    if experiment == "tiny":
        command += ["latents=null", f"autoencoder_from={tmp_path}/runs/tiny_autoencoder/model"]
    process = subprocess.Popen(
        [sys.executable, "-m", "src.train", *command], cwd=ROOT, env=environment(home),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "step 7/" in line:
            break
    os.killpg(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"stopped by {name} after step" in errors and "Traceback" not in errors
    assert "going on after step" in verb(home, "train", *command, "resume=must").stdout
    verb(home, "train", *command, "name=straight")
    assert_equal_runs(tmp_path / "runs/straight", tmp_path / "runs/stopped")


@pytest.mark.slow
def test_a_preempted_job_saves_and_its_launcher_queues_it_again(home: Path, tmp_path: Path) -> None:
    """With the launcher of machine=slurm, whose local twin needs no cluster."""
    data = [e for e in at(home) if not e.startswith("runs=")]
    process = subprocess.Popen(
        [sys.executable, "-m", "src.train", "-m", "+experiment=tiny_autoencoder", "name=job", *data,
         f"runs={tmp_path}", "hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}/multirun",
         "train.num_steps=500", "train.log_every=10", "logger=jsonl"],
        cwd=ROOT, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    run, deadline = tmp_path / "job", time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    told = subprocess.run(
        ["pgrep", "-f", f"submitit.core._submit {tmp_path}"], capture_output=True, text=True
    )
    os.kill(int(told.stdout.split()[0]), signal.SIGUSR2)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    record = json.loads((run / "run.json").read_text())
    assert len(record["starts"]) == 2 and record["step"] == 500
    assert [row["step"] for row in rows(run) if "autoencoder/loss" in row] == list(range(10, 501, 10))


@pytest.mark.slow
def test_two_processes_make_and_measure_the_same(home: Path) -> None:
    """Samples up to the rounding of smaller batches, which video compression can enlarge; numbers exactly."""
    from src.data.video import read_clip

    model = f"model={home}/runs/tiny/model"
    data = ["dataset=synthetic_tiny", *at(home)[1:], "protocol=quick", "batch_size=2", "num_replicates=20"]
    few = ["protocol.num_real=6", "protocol.num_generated=5", "num_reconstructed=5"]
    for name, threads, launcher in (
        ("one", "2", []),
        ("two", "1", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    ):
        for arguments in (
            ["src.sample", model, "num_samples=5", f"output={home}/by_{name}"],
            ["src.evaluate", model, *data, *few, f"output={home}/by_{name}/evaluation.json"],
        ):
            result = subprocess.run(
                [sys.executable, *launcher, "-m", *arguments],
                cwd=ROOT, capture_output=True, text=True, timeout=300,
                env=environment(home)
                | {"LATENT_VIDEO_CACHE": f"{home}/cache_of_{name}"}
                | ({"OMP_NUM_THREADS": threads} if "evaluate" in arguments[0] else {}),
            )  # fmt: skip
            assert result.returncode == 0, result.stderr
    one, two = home / "by_one", home / "by_two"
    for i in range(5):
        a, b = (read_clip(folder / f"sample_{i:06d}.mp4", 0, 16).astype(int) for folder in (one, two))
        other = read_clip(one / f"sample_{(i + 1) % 5:06d}.mp4", 0, 16).astype(int)
        assert abs(a - b).mean() < 0.02 * abs(a - other).mean()
    a, b = (json.loads((folder / "evaluation.json").read_text()) for folder in (one, two))
    assert "fvd_fast@6vs5" in a["metrics"] and "rfvd_fast@5" in a["metrics"]
    del a["created"], b["created"]
    assert a == b


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["tiny_autoencoder", "tiny_long"])
def test_two_processes_and_accumulation_change_rounding_only(experiment: str, home: Path) -> None:
    straight = home / "runs" / experiment
    common = [f"+experiment={experiment}", *at(home), "logger=jsonl"]
    verb(home, "train", *common, "name=accumulated", "train.micro_batch_size=2")
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node=2", "-m", "src.train",
         *common, "name=two_processes"],
        cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    expected = {row["step"]: row for row in rows(straight)}
    for name in ("accumulated", "two_processes"):
        for row in rows(home / "runs" / name)[:2]:
            for key, value in row.items():
                if key.endswith(("loss", "pixel", "gradient_norm")):
                    assert value == pytest.approx(expected[row["step"]][key], rel=1e-4, abs=1e-6), (
                        name,
                        row["step"],
                        key,
                    )
        for path in (home / "runs" / name).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        (home / "runs" / name / "config.yaml").unlink()


BAD = [
    (["train", "+experiment=nonsense"], "Available options in 'experiment'[\\s\\S]*tiny"),
    (["train", "+experimnt=tiny"], "Did you mean experiment"),
    (
        ["train", "+experiment=ucf101_autoencoder", "dataset.root=nowhere"],
        "UCF-101[\\s\\S]*src.prepare dataset=ucf101",
    ),
    (["train", "+experiment=ucf101", "dataset.root=nowhere"], "UCF-101[\\s\\S]*src.prepare dataset=ucf101"),
    (["train", "+experiment=tiny", "autoencoder.folder=nowhere"], "no model at nowhere[\\s\\S]*src.train"),
    (["train", "+experiment=tiny_autoencoder", "dataset.resolution=30"], "multiple of 4; use 28 or 32"),
    (["train", "+experiment=tiny_autoencoder", "dataset.num_frames=80"], "too short"),
    (["train", "+experiment=tiny_autoencoder", "train.micro_batch_size=3"], "must divide"),
    (
        ["train", "+experiment=tiny_long", "latent_strides=[1,4]"],
        r"largest first, got \[1, 4\]; use \[4, 1\]",
    ),
    (["train", "+experiment=tiny_long", "latent_strides=[17]"], "1 of the clip's 17 .*dataset.num_frames=72"),
    (["train", "+experiment=tiny_long", "latent_strides=[16,1]"], "2 of 2 .* smaller latent_strides"),
    (["train", "+experiment=tiny_long", "latent_strides=[]"], "whole numbers of at least 1"),
    (["sample", "model=conf"], "expected config.yaml and weights.safetensors"),
    (["evaluate"], "either model="),
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments, message", BAD, ids=[" ".join(arguments)[:60] for arguments, _ in BAD])
def test_bad_input_ends_in_one_clear_message(arguments: list[str], message: str, home: Path) -> None:
    extra = at(home) if arguments[0] == "train" else []
    extra = [e for e in extra if not any(a.startswith(e.split("=")[0]) for a in arguments)]
    result = verb(home, arguments[0], *arguments[1:], *extra, check=False)
    assert result.returncode != 0
    text = result.stdout + result.stderr
    assert re.search(message, text), text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_multirun_gives_each_cell_its_folder(home: Path) -> None:
    few = ["train.num_steps=2", "logger=jsonl", f"hydra.sweep.dir={home}/multirun"]
    verb(home, "train", "-m", "+experiment=tiny", "seed=0,1", "name=cells", *few, *at(home))
    cells = [home / "runs" / f"cells-seed={seed}" for seed in (0, 1)]
    weights = [(cell / "model/weights.safetensors").read_bytes() for cell in cells]
    assert weights[0] != weights[1]


@pytest.mark.slow
def test_a_failed_cell_ends_no_other_and_finished_ones_are_skipped(home: Path) -> None:
    few = ["train.num_steps=2", "logger=jsonl", f"hydra.sweep.dir={home}/multirun", "name=some"]
    command = ["-m", "+experiment=tiny", "unet.num_heads=3,2,4", *few, *at(home)]
    first = verb(home, "train", *command, check=False)
    assert first.returncode != 0 and "Traceback" not in first.stderr
    assert "can't be split into 3 heads" in first.stderr
    cells = [home / "runs" / f"some-unet.num_heads={count}" for count in (2, 4)]
    before = [(cell / "model/weights.safetensors").stat().st_mtime_ns for cell in cells]
    again = verb(home, "train", *command, check=False)
    assert again.stdout.count("is finished after 2 steps") == 2
    assert [(cell / "model/weights.safetensors").stat().st_mtime_ns for cell in cells] == before


@pytest.mark.slow
def test_a_full_disk_in_training_is_one_clear_message(home: Path, tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        result = verb(
            home, "train", "+experiment=tiny_autoencoder", *at(home)[1:], f"runs={tmp_path}", check=False
        )
        assert (
            result.returncode == 2 and "No space left" in result.stderr and "Traceback" not in result.stderr
        )
        assert not list(tmp_path.glob("*/state/.step*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_is_one_clear_message(home: Path, tmp_path: Path) -> None:
    data = [e for e in at(home) if not e.startswith("runs=")]
    states = tmp_path / "runs/locked/state"
    process = subprocess.Popen(
        [sys.executable, "-m", "src.train", "+experiment=tiny_autoencoder", "name=locked", *data,
         f"runs={tmp_path}/runs", "train.num_steps=100000", "train.save_every=20", "logger=jsonl"],
        cwd=ROOT, env=environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(states.glob("step_*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        if subprocess.run(["mount", "--bind", str(states), str(states)]).returncode:
            pytest.skip("mounting needs root")
        subprocess.run(["mount", "-o", "remount,ro,bind", str(states)], check=True)
        kept = {path.name for path in states.glob("step_*")}
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and "Read-only file system" in errors and "Traceback" not in errors
        assert kept <= {path.name for path in states.glob("step_*")}
    finally:
        process.kill()
        subprocess.run(["umount", str(states)], stderr=subprocess.DEVNULL)
    again = verb(home, "train", "+experiment=tiny_autoencoder", "name=locked", *data, f"runs={tmp_path}/runs",
                 "train.num_steps=1", "logger=jsonl", "train.save_every=20", "resume=must")  # fmt: skip
    assert "going on after step" in again.stdout


@pytest.mark.slow
def test_made_videos_are_measured_the_same_twice(home: Path, tmp_path: Path) -> None:
    """Also where nothing is known from the first time; and what it writes isn't taken for samples then."""
    verb(home, "sample", f"model={home}/runs/tiny/model", "num_samples=8", f"output={home}/made")
    arguments = [
        f"videos={home}/made", "dataset=synthetic_tiny", *at(home)[1:], "dataset.num_frames=16",
        "dataset.resolution=32", "dataset.frame_stride=1", "protocol=quick", "protocol.num_real=5",
        "protocol.num_generated=6", "protocol.seeds=[0,1]", "num_replicates=20",
    ]  # fmt: skip
    records, sentences = [], []
    for cache in ("first", "first", "second"):
        told = verb(home, "evaluate", *arguments, cache=tmp_path / cache)
        sentences.append(told.stdout.splitlines()[-20:])
        records.append(json.loads((home / "made_evaluation/evaluation.json").read_text()))
        created = records[-1].pop("created")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", created)
    assert records[0] == records[1] == records[2] and sentences[0] == sentences[1] == sentences[2]
    told = records[0]["uncertainty"]["fvd_fast@5vs6"]
    assert len(set(told["by_seed"].values())) == 2 and told["floor"] > 0
    assert records[0]["comparison"]["features"]["weights_sha256"]
    assert sum(1 for _ in (home / "made_evaluation/evaluation/nearest.csv").open()) == 7


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_and_ends_in_the_same(home: Path, tmp_path: Path) -> None:
    arguments = [
        f"model={home}/runs/tiny/model", "dataset=synthetic_tiny", *at(home)[1:], "protocol=quick",
        "protocol.num_real=12", "protocol.num_generated=4", "batch_size=2", "num_replicates=0",
        "dataset.resolution=16", "num_reconstructed=0",
    ]  # fmt: skip
    verb(home, "evaluate", *arguments, f"output={tmp_path}/straight/e.json", cache=tmp_path / "straight")
    process = subprocess.Popen(
        [sys.executable, "-m", "src.evaluate", *arguments, f"output={tmp_path}/killed/e.json"],
        cwd=ROOT,
        env=environment(home) | {"LATENT_VIDEO_CACHE": str(tmp_path / "killed")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while (
        not list((tmp_path / "killed/features").glob("*.parts/*.safetensors")) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed/features").glob("*.parts/*")}
    assert parts and not (tmp_path / "killed/e.json").exists(), "killed in the middle"
    verb(home, "evaluate", *arguments, f"output={tmp_path}/killed/e.json", cache=tmp_path / "killed")
    straight, killed = (
        json.loads((tmp_path / name / "e.json").read_text()) for name in ("straight", "killed")
    )
    del straight["created"], killed["created"]
    assert straight == killed
    sizes = {name: probe(tmp_path / f"straight/e/{name}_00.mp4") for name in ("real", "generated")}
    assert all((info.height, info.width) == (16, 16) for info in sizes.values()), "made for another size"


@pytest.mark.slow
def test_twenty_steps_of_the_default_are_nearer_to_a_thousand_than_fifty_of_ddim(
    home: Path, tmp_path: Path
) -> None:
    """On a network that was trained until it denoises, from the same start noises."""
    from functools import partial

    from src.diffusion import samplers
    from src.model_folder import load_diffusion
    from src.sample import labels_of

    run = tmp_path / "runs"
    shutil.copytree(home / "runs/tiny_autoencoder", run / "tiny_autoencoder")
    data = [f"dataset.root={home}/data", f"dataset.cache={home}/cache", f"runs={run}"]
    verb(tmp_path, "train", "+experiment=tiny", *data, "train.num_steps=300", "name=longer",
         f"autoencoder_from={run}/tiny_autoencoder/model")  # fmt: skip
    model = load_diffusion(str(run / "longer/model"))
    seeds = range(8)

    def latents(sampler: samplers.Sampler) -> torch.Tensor:
        generator = model.generator(sampler, guidance_scale=1.0, noise_level=0)
        return generator.sample_window(seeds, labels_of(model, seeds, None))

    truth = latents(partial(samplers.ddim, num_sampling_steps=1000, eta=0.0))
    few = latents(partial(samplers.dpm_solver, num_sampling_steps=20, spacing="log_snr"))
    more = latents(partial(samplers.ddim, num_sampling_steps=50, eta=0.0))
    assert (few - truth).square().mean() < (more - truth).square().mean()
