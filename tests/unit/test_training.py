"""The loop's parts: learning rate, averages, state on disk."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from src.average import snapshots_of
from src.config import ConfigError
from src.data.storage import atomic_path
from src.models.layers import FrameConv3d
from src.training import checkpoint
from src.training.ema import Ema, PostHocEma, PowerEma, exponent_of, reconstruction_weights
from src.training.learning_rate import learning_rate_factor
from src.training.tracker import Tracker


def test_learning_rate_warms_up_and_falls_like_a_cosine() -> None:
    rates = [learning_rate_factor(step, 100, warmup_steps=10, decay="cosine") for step in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert learning_rate_factor(10**6, 100, warmup_steps=0, decay="constant") == 1.0
    with pytest.raises(ValueError, match="constant or cosine"):
        learning_rate_factor(0, 1, warmup_steps=0, decay="linear")


def test_average_follows_its_recursion() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.register_buffer("seen", torch.zeros(()))
    nn.init.constant_(layer.weight, 1.0)
    ema = Ema({"layer": layer}, 0.3)
    expected = 1.0
    for n in range(1, 30):
        nn.init.constant_(layer.weight, float(n))
        layer.seen.fill_(n)
        ema.update(n)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    average = ema.modules["layer"]
    assert average.weight.item() == pytest.approx(expected, rel=1e-6)
    assert average.seen.item() == 29 and not average.weight.requires_grad


def test_lengths_of_power_averages_are_those_of_their_profiles() -> None:
    """Karras et al. 2024, section 3.1, tell two exponents; the deviation of a profile is also summed."""
    assert exponent_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=5e-3)
    times = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for sigma in (0.02, 0.1, 0.2):
        profile = times ** exponent_of(sigma)
        profile /= profile.sum()
        mean = (profile * times).sum()
        assert ((profile * (times - mean) ** 2).sum().sqrt().item()) == pytest.approx(sigma, rel=1e-4)
    with pytest.raises(ValueError, match=r"between 0 and 0\.28"):
        exponent_of(0.3)


def test_any_average_is_reconstructed_after_training(tmp_path: Path) -> None:
    """Of a random walk, against averages of these lengths that were kept all along."""
    torch.manual_seed(0)
    layer = nn.Linear(50, 1, bias=False)
    kept = PostHocEma({"unet": layer}, [0.05, 0.1])
    truth = {sigma: PowerEma({"unet": layer}, sigma) for sigma in (0.05, 0.07, 0.15)}
    with torch.no_grad():
        for step in range(1, 1001):
            layer.weight.mul_(0.999).add_(0.1 * torch.randn(1, 50) + 0.01)
            for average in (kept, *truth.values()):
                average.update(step)
            if step % 50 == 0:
                kept.snapshot(tmp_path / "averages", step)
    found = snapshots_of(tmp_path, "unet", None)
    assert len(found) == 40 and max(found) == (1000, 0.1)
    for sigma, limit in ((0.05, 1e-3), (0.07, 2e-3), (0.15, 4e-3)):  # half precision alone makes 5e-4
        weights, distance = reconstruction_weights(list(found), 1000, sigma)
        assert distance < (1e-6 if sigma == 0.05 else 0.01)
        parts = [load_file(path)["weight"].double() for path in found.values()]
        made = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        wanted = truth[sigma].modules["unet"].weight.double()
        assert ((made - wanted).norm() / wanted.norm()).item() < limit
    earlier = snapshots_of(tmp_path, "unet", 500)
    assert max(earlier) == (500, 0.1)
    for step in (49, 1001):
        with pytest.raises(ConfigError, match="the snapshots are of steps 50 to 1000"):
            snapshots_of(tmp_path, "unet", step)
    with pytest.raises(FileNotFoundError, match="ema=post_hoc"):
        snapshots_of(tmp_path / "none", "unet", None)


def make_state(step: int) -> checkpoint.State:
    torch.manual_seed(step)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, betas=(0.5, 0.9))
    for _ in range(3):
        net(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
    return checkpoint.State(
        modules={"net": net},
        averages={"net": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))},
        optimizers={"net": optimizer},
        running={"weight": torch.tensor(float(step))},
        progress={"step": step, "seconds": 1.5},
    )


def assert_equal_states(a: checkpoint.State, b: checkpoint.State) -> None:
    for one, other in ((a.modules, b.modules), (a.averages, b.averages)):
        for name in one:
            for (key, x), y in zip(
                one[name].state_dict().items(), other[name].state_dict().values(), strict=True
            ):
                assert torch.equal(x, y), key
    x, y = a.optimizers["net"].state_dict(), b.optimizers["net"].state_dict()
    assert x["state"].keys() == y["state"].keys() and len(x["state"]) == 4
    for parameter, values in x["state"].items():
        for key, value in values.items():
            assert torch.equal(value, y["state"][parameter][key]), key
    assert [{**g, "betas": list(g["betas"])} for g in x["param_groups"]] == [
        {**g, "betas": list(g["betas"])} for g in y["param_groups"]
    ]
    assert a.running == b.running and a.progress == b.progress


def test_state_comes_back_bit_for_bit_and_old_ones_go(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, make_state(step), keep=2)
    assert [path.name for path in checkpoint.list_states(tmp_path)] == ["step_000000020", "step_000000030"]
    loaded = make_state(99)
    assert checkpoint.load_latest(tmp_path, loaded)
    assert_equal_states(loaded, make_state(30))


def test_fused_moments_come_back_in_their_weights_layout(tmp_path: Path) -> None:
    def started() -> checkpoint.State:
        torch.manual_seed(0)
        net = FrameConv3d(3, 4)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
        return checkpoint.State({"net": net}, {}, {"net": optimizer}, {}, {"step": 1})

    def step(state: checkpoint.State) -> None:
        x = torch.randn(1, 3, 2, 5, 5, generator=torch.Generator().manual_seed(1))
        state.optimizers["net"].zero_grad()
        state.modules["net"](x).square().sum().backward()
        state.optimizers["net"].step()

    straight = started()
    step(straight)
    checkpoint.save(tmp_path, straight, keep=1)
    resumed = started()
    assert checkpoint.load_latest(tmp_path, resumed)
    for state in (straight, resumed):
        step(state)
    assert torch.equal(resumed.modules["net"].weight, straight.modules["net"].weight)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "json"])
def test_a_damaged_state_is_reported_and_the_one_before_it_used(damage: str, tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, make_state(step), keep=3)
    newest = tmp_path / "step_000000020"
    victim = newest / ("state.json" if damage == "json" else "modules.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    elif damage == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[: len(content) // 2])
    told: list[str] = []
    loaded = make_state(99)
    assert checkpoint.load_latest(tmp_path, loaded, report=told.append)
    assert_equal_states(loaded, make_state(10))
    assert "step_000000020" in told[0] and not newest.exists()


def link_to(copy: Path, state: Path) -> None:
    copy.symlink_to(state)


@pytest.mark.parametrize("make", [shutil.copytree, link_to, os.replace])
def test_a_state_of_another_step_than_its_name_tells_isnt_used(
    make: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    for step in (3, 9):
        checkpoint.save(tmp_path, make_state(step), keep=3)
    old, new = (tmp_path / f"step_{step:09d}" for step in (3, 20))
    make(new, old) if make is link_to else make(old, new)
    told: list[str] = []
    loaded = make_state(99)
    assert checkpoint.load_latest(tmp_path, loaded, report=told.append)
    assert_equal_states(loaded, make_state(9))
    assert "step_000000020 holds step 3, as a copy" in told[0] and "set aside as misnamed_1" in told[0]
    assert [path.name for path in checkpoint.list_states(tmp_path)][-1] == "step_000000009"
    assert (tmp_path / "misnamed_1/state.json").exists(), "nothing is lost"


def test_only_the_state_that_was_just_saved_gets_more_progress(tmp_path: Path) -> None:
    """Neither a copy of a later name, nor one that has taken the place of the saved state."""
    for step in (3, 9):
        checkpoint.save(tmp_path, make_state(step), keep=3)
    saved, copy = (tmp_path / f"step_{step:09d}" for step in (9, 20))
    shutil.copytree(tmp_path / "step_000000003", copy)
    before = (copy / "state.json").read_bytes()
    state = make_state(9)
    state.progress["best"] = 1.0
    checkpoint.note_progress(tmp_path, state)
    assert (copy / "state.json").read_bytes() == before
    assert json.loads((saved / "state.json").read_text())["progress"]["best"] == 1.0
    shutil.rmtree(saved)
    os.replace(copy, saved)
    checkpoint.note_progress(tmp_path, state)
    assert (saved / "state.json").read_bytes() == before
    checkpoint.save(tmp_path, make_state(12), keep=1)
    shutil.copytree(tmp_path / "step_000000012", copy)
    checkpoint.save(tmp_path, make_state(15), keep=1)
    assert [path.name for path in checkpoint.list_states(tmp_path)] == ["step_000000015", copy.name]


def test_files_and_links_where_states_should_be_do_no_harm(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "elsewhere", make_state(6), keep=1)
    (tmp_path / "state").mkdir()
    (tmp_path / "state/step_000000006").symlink_to(tmp_path / "elsewhere/step_000000006")
    for name in ("step_000000009", ".step_000000003.1.part"):
        (tmp_path / "state" / name).write_text("junk")
    assert checkpoint.load_latest(tmp_path / "state", make_state(99), report=lambda told: None)
    checkpoint.save(tmp_path / "state", make_state(9), keep=1)
    assert os.listdir(tmp_path / "state") == ["step_000000009"]
    assert (tmp_path / "elsewhere/step_000000006/state.json").exists(), "what a link leads to stays"


def test_with_no_sound_state_a_run_doesnt_begin_anew_by_itself(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, make_state(step), keep=2)
        (tmp_path / f"step_{step:09d}" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no state .* is sound .*step_000000020.*step_000000010.*name="):
        checkpoint.load_latest(tmp_path, make_state(1))
    assert len(checkpoint.list_states(tmp_path)) == 2, "what is damaged may be mended by hand"


def test_steps_that_a_killed_run_has_shown_arent_shown_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, shown in ((0, (3, 6)), (0, (3, 6, 9)), (6, (9, 12))):
        tracker = Tracker(tmp_path, step, 8.0, tensorboard=True)
        for at in shown:
            tracker.log(at, {"loss": float(at), "time": 1.0})
        tracker.close()
        time.sleep(1.1)  # event files are named by the second
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6, 9, 12]
    assert "time" not in events.Tags()["scalars"]


def test_no_damage_is_ever_loaded(tmp_path: Path) -> None:
    """Two hundred states that a disk has spoiled, somewhere: the one before is used, whatever it is."""
    import random

    checkpoint.save(tmp_path / "sound", make_state(10), keep=3)
    checkpoint.save(tmp_path / "sound", make_state(20), keep=3)
    draw = random.Random(0)
    for trial in range(200):
        folder = tmp_path / f"trial_{trial}"
        shutil.copytree(tmp_path / "sound", folder)
        victim = draw.choice(sorted((folder / "step_000000020").iterdir()))
        content = bytearray(victim.read_bytes())
        where = draw.randrange(len(content))
        damage = draw.choice(["flip", "cut", "remove", "noise", "empty", "folder", "json", "insert"])
        if damage == "flip":
            content[where] ^= 1 << draw.randrange(8)
        elif damage == "cut":
            del content[where:]
        elif damage == "noise":
            content[where : where + 50] = draw.randbytes(50)
        elif damage == "empty":
            content = bytearray()
        elif damage == "json":
            texts = [b"[]", b"{}", b"null", b'{"sha256": 3}', b'"x"', b"[" * 100_000]
            content = bytearray(draw.choice(texts))
        elif damage == "insert":
            content[where:where] = b" 7"
        victim.unlink()
        if damage == "folder":
            victim.mkdir()
        elif damage != "remove":
            victim.write_bytes(content)
        told: list[str] = []
        loaded = make_state(99)
        assert checkpoint.load_latest(folder, loaded, report=told.append)
        assert_equal_states(loaded, make_state(10))
        assert len(told) == 1 and "step_000000020 is damaged" in told[0], (damage, victim)
        shutil.rmtree(folder)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, make_state(10), keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)  # the last file of a state
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, make_state(20), keep=1)
    assert os.listdir(tmp_path) == ["step_000000010"]


def test_nothing_there_is_not_an_error_but_another_model_is(tmp_path: Path) -> None:
    assert not checkpoint.load_latest(tmp_path / "none", make_state(1))
    checkpoint.save(tmp_path, make_state(10), keep=1)
    other = make_state(1)
    other.modules = {"net": nn.Linear(3, 4)}
    with pytest.raises(ValueError, match="belongs to another model"):
        checkpoint.load_latest(tmp_path, other)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_a_full_disk_refused_is_named(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, 8.0, tensorboard=True)
    tracker._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: can't write .*metrics.jsonl; make room"):
        tracker.log(1, {"loss": 1.0})
    with suppress(OSError):  # it still holds the row
        tracker._file.close()

    def full() -> None:
        raise OSError(28, "No space left on device")

    tracker._file = tracker.path.open("a")
    tracker._writer.flush = full
    with pytest.raises(OSError, match=r"No space left on device: can't write .*tensorboard; make room"):
        tracker.sync()
    wanted = r"can't write .*run.json; make room"
    with pytest.raises(OSError, match=wanted), atomic_path(tmp_path / "run.json"):
        full()


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, 8.0, tensorboard=False)
    for step in (5, 10, 15):
        tracker.log(step, {"loss": float(step)})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')  # killed in the middle of a line
    tracker = Tracker(tmp_path, 10, 8.0, tensorboard=False)
    tracker.log(15, {"loss": 0.5})
    tracker.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(5, 5.0), (10, 10.0), (15, 0.5)]


@pytest.mark.slow
def test_a_really_full_disk_is_an_oserror(tmp_path: Path) -> None:
    """On a small mount of its own; where the test may not mount, it says so."""
    import subprocess

    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        state = make_state(10)
        state.modules = {"net": nn.Linear(200, 200)}
        with pytest.raises(OSError, match=r"can't write|No space"):
            checkpoint.save(tmp_path / "state", state, keep=1)
        assert os.listdir(tmp_path / "state") == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
