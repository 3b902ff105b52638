"""The loop with a stage of one weight: stopping, skipping, resuming."""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from src.data.sampler import Batch
from src.stages.stage import Modules, Update
from src.training import checkpoint
from src.training.device import make_accelerator
from src.training.ema import Averages, Ema
from src.training.interruption import Interrupted, StopRequests
from src.training.loop import LoopSettings, check_resume, reseed, train
from src.training.numbers import NonFiniteError, Pending
from src.training.record import RunRecord
from src.training.tracker import Tracker


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class OneWeight:
    """Learns to multiply by nothing; the loss is the mean square of weight times clip."""

    exported = "weight"
    measured: tuple[str, ...] = ("weight",)
    higher_is_better: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {"weight": Weight()}
        self.running: dict[str, Tensor] = {}

    def updates(self, modules: Modules, batch: Batch, step: int) -> Iterator[Update]:
        per_clip = modules["weight"](batch.video).square().mean((1, 2, 3, 4))
        early = batch.positions < 6
        pair = torch.stack([(per_clip.detach() * early).sum(), early.sum()])
        yield Update("weight", per_clip.mean(), {"early": pair})

    def preview(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        return {}

    def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
        return {"weight": float(sum(p.sum() for p in modules["weight"].parameters()))}

    def finish(self, modules: Modules, batches: Iterable[Batch]) -> None: ...


def clips(bad_step: int | None = None) -> Callable[[int], Iterator[Batch]]:
    """Two clips a step; those of the bad step hold a NaN."""

    def from_step(step: int) -> Iterator[Batch]:
        while True:
            positions = torch.arange(2 * step, 2 * step + 2)
            video = (1 + positions % 5).float().reshape(2, 1, 1, 1, 1) / 5
            if step == bad_step:
                video = video * torch.nan
            yield Batch(video, torch.full((2,), -1), positions)
            step += 1

    return from_step


def settings_of(**changes: Any) -> LoopSettings:
    values: dict[str, Any] = {
        "num_steps": 12, "warmup_steps": 0, "decay": "constant", "clip_norm": 0.0, "log_every": 5,
        "preview_every": 0, "evaluate_every": 0, "save_every": 0, "snapshot_every": 0,
        "keep_states": 2, "keep_every": 0, "best_metric": None,
        "on_nonfinite": "stop", "max_skipped": 3, "profile": False,
    }  # fmt: skip
    return LoopSettings(**(values | changes))


def keep_step(folder: Path) -> Callable[[str, dict[str, Tensor], int], None]:
    """Exports a model folder that tells no more than its step."""

    def export(name: str, weights: dict[str, Tensor], step: int) -> None:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "step").write_text(str(step))

    return export


def exported_step(folder: Path) -> int | None:
    path = folder / "model" / "step"
    return int(path.read_text()) if path.exists() else None


def run(
    folder: Path,
    batches: Callable[[int], Iterator[Batch]],
    *,
    stage: OneWeight | None = None,
    accelerator: Accelerator | None = None,
    export: Callable[[str, dict[str, Tensor], int], None] | None = None,
    resume: str = "auto",
    batch_size: int = 2,
    averages: Averages | None = None,
    learning_rate: float = 0.1,
    fused: bool = True,
    tensorboard: bool = False,
    held_out: Callable[[], Iterable[Batch]] = list,
    **changes: Any,
) -> OneWeight:
    """Trains one weight, or the stage that is given, in a folder."""
    stage = stage or OneWeight()
    if accelerator is None:
        accelerator, _ = make_accelerator(precision="no", tf32=False, batch_size=2, micro_batch_size=None)
    parameters = stage.modules["weight"].parameters()
    with StopRequests() as requests:
        train(
            stage,
            optimizers={"weight": torch.optim.AdamW(parameters, learning_rate, fused=fused)},
            batches=batches,
            held_out=held_out,
            statistics=list,
            clips_of=lambda step: [f"clip_{2 * step - 2}.mp4", f"clip_{2 * step - 1}.mp4"],
            export=export or keep_step(folder),
            averages=averages or Ema(stage.modules, 0.9),
            settings=settings_of(**changes),
            accelerator=accelerator,
            folder=folder,
            resume=resume,
            batch_size=batch_size,
            model_step=lambda: exported_step(folder),
            tracker=lambda step, measured: Tracker(
                folder, step, 8.0, measured=measured, tensorboard=tensorboard
            ),
            record=lambda step, seconds: None,
            requests=requests,
            seed=0,
        )
    return stage


def rows(folder: Path) -> list[dict[str, float]]:
    parsed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in parsed]


def weight_of(stage: OneWeight) -> float:
    return stage.modules["weight"].weight.item()  # type: ignore[union-attr, operator]


def test_pairs_are_ratios_of_totals() -> None:
    pending = Pending(1, False, 0, lambda step: [])
    for step, (total, count) in enumerate([(3.0, 2.0), (0.0, 0.0), (5.0, 2.0)], start=1):
        pair = torch.tensor([total, count])
        pending.add(step, "m", {"loss": torch.tensor(float(step)), "part": pair, "none": pair * 0})
    assert pending.read(lambda x: x) == {"m/loss": 2.0, "m/part": 2.0}
    assert pending.read(lambda x: x) == {}


def test_how_steps_were_split_doesnt_show_in_a_row() -> None:
    """A row whose first step was one micro-batch of each of two processes, the second four of one."""
    two = Pending(2, False, 0, lambda step: [])
    two.add(1, "m", {"loss": torch.tensor(1.0), "part": torch.tensor([1.5, 1.0])})  # means of both
    two.collect(lambda x: x)
    one = Pending(1, False, 0, lambda step: [])
    one.totals = two.totals
    for loss in (3.0, 5.0, 7.0, 5.0):
        one.add(2, "m", {"loss": torch.tensor(loss), "part": torch.tensor([loss, 1.0])})
    assert one.read(lambda x: x) == {"m/loss": (1.0 + 5.0) / 2, "m/part": (3.0 + 20.0) / (2.0 + 4.0)}


def test_a_number_that_isnt_finite_names_step_and_clips(tmp_path: Path) -> None:
    wanted = r"weight/loss became nan in step 8 \(clips of clip_14.mp4, clip_15.mp4\)"
    with pytest.raises(NonFiniteError, match=wanted):
        run(tmp_path, clips(bad_step=7), save_every=6)
    assert [path.name for path in checkpoint.list_states(tmp_path / "state")] == ["step_000000006"]


def test_a_skipped_step_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    def without_step_7(step: int) -> Iterator[Batch]:
        for number, batch in enumerate(clips()(step), start=step):
            if number != 7:
                yield batch

    skipped = run(tmp_path / "a", clips(bad_step=7), on_nonfinite="skip")
    straight = run(tmp_path / "b", without_step_7, num_steps=11)
    assert weight_of(skipped) == weight_of(straight)
    assert [row.get("skipped_steps") for row in rows(tmp_path / "a")[:3]] == [None, 1.0, 1.0]

    def always(step: int) -> Iterator[Batch]:
        for batch in clips()(step):
            yield Batch(batch.video * torch.nan, batch.label, batch.positions)

    with pytest.raises(NonFiniteError, match=r"5 steps were skipped, more than train\.max_skipped=3"):
        run(tmp_path / "c", always, on_nonfinite="skip")
    with pytest.raises(ValueError, match="only fused optimizers"):
        run(tmp_path / "d", clips(), fused=False, on_nonfinite="skip")


class Measuring(OneWeight):
    """Is asked to stop in the middle of one of the things that are measured at step 6, which takes long."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.step = where, 0

    def updates(self, modules: Modules, batch: Batch, step: int) -> Iterator[Update]:
        self.step = step + 1
        if self.where == "step" and self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        yield from super().updates(modules, batch, step)

    def take_long(self, where: str) -> None:
        if self.where == where and self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    def preview(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        self.take_long("preview")
        return {"clip": batch.video.expand(-1, 3, 2, 8, 8)}

    def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
        for _ in batches:
            self.take_long("evaluate")
        assert self.step != 6 or self.where != "step", "asked before, it isn't begun"
        return super().evaluate(modules, batches)

    def finish(self, modules: Modules, batches: Iterable[Batch]) -> None:
        self.take_long("finish")


@pytest.mark.parametrize("save_every", [0, 3])
@pytest.mark.parametrize("where", ["step", "preview", "evaluate", "finish"])
def test_asked_to_stop_while_measuring_it_saves_at_once_and_measures_again(
    where: str, save_every: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "evaluate_every": 3, "preview_every": 6, "best_metric": "weight", "log_every": 4,
        "save_every": save_every, "held_out": lambda: itertools.islice(clips()(0), 2),
    }  # fmt: skip
    straight, exports = run(tmp_path / "b", clips(), stage=Measuring("nowhere"), **settings), []
    export = keep_step(tmp_path / "a")

    def noted(name: str, weights: dict[str, Tensor], step: int) -> None:
        exports.append((name, step))
        export(name, weights, step)

    began = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 6 of 12"):
        run(tmp_path / "a", clips(), stage=Measuring(where), export=noted, **settings)
    assert time.monotonic() - began < 20
    assert checkpoint.list_states(tmp_path / "a/state")[-1].name == "step_000000006"
    assert exports == [("model_best", 3)], "what was given up left no trace"
    if where != "step":  # and asked once more, as it measures again
        again = Measuring(where)
        again.step = 6
        with pytest.raises(Interrupted, match="stopped by SIGTERM after step 6 of 12"):
            run(tmp_path / "a", clips(), stage=again, export=noted, **settings)
        assert exports == [("model_best", 3)]
    resumed = run(tmp_path / "a", clips(), stage=Measuring("nowhere"), export=noted, **settings)
    assert weight_of(resumed) == weight_of(straight)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert len(rows(tmp_path / "b")) == (10 if save_every else 7)
    told = [json.loads((tmp_path / name / "state/step_000000012/state.json").read_text()) for name in "ab"]
    assert told[0]["progress"]["best"] == told[1]["progress"]["best"]
    assert ("model_best", 6) in exports
    assert {path.name for path in (tmp_path / "a/previews").iterdir()} == {"step_000000006", "step_000000012"}


def test_what_was_measured_isnt_measured_again(tmp_path: Path) -> None:
    """Killed after the looks of a step whose state was saved before them."""
    looked: list[int] = []

    class Watched(OneWeight):
        def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
            looked.append(1)
            return super().evaluate(modules, batches)

    def killed(step: int) -> Iterator[Batch]:
        for at, batch in enumerate(clips()(step), start=step):
            if at == 7:
                raise KeyboardInterrupt
            yield batch

    settings: dict[str, Any] = {"evaluate_every": 6, "save_every": 6, "log_every": 2}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", killed, stage=Watched(), **settings)
    run(tmp_path / "a", clips(), stage=Watched(), **settings)
    assert len(looked) == 2
    run(tmp_path / "b", clips(), **settings)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(number: int, tmp_path: Path) -> None:
    """Also its rows: the stop falls between two of them."""

    def interrupted(step: int) -> Iterator[Batch]:
        for at, batch in enumerate(clips()(step), start=step):
            if at == 7:
                os.kill(os.getpid(), number)
            yield batch

    called: list[int] = []
    before = signal.signal(number, lambda received, _: called.append(received))
    try:
        with pytest.raises(Interrupted, match=f"stopped by {signal.Signals(number).name} after step 8 of 12"):
            run(tmp_path / "a", interrupted)
        # Who listened before gets its turn after the save (a launcher that requeues), except for Ctrl-C.
        assert called == ([] if number == signal.SIGINT else [number])
        assert [path.name for path in checkpoint.list_states(tmp_path / "a/state")] == ["step_000000008"]
        resumed = run(tmp_path / "a", clips(), resume="must")
    finally:
        signal.signal(number, before)
    straight = run(tmp_path / "b", clips())
    assert weight_of(resumed) == weight_of(straight)
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(rows(tmp_path / "b")) == 4


def test_a_second_ctrl_c_stops_at_once() -> None:
    accelerator, _ = make_accelerator(precision="no", tf32=False, batch_size=2, micro_batch_size=None)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequests() as requests:
        requests.at_once = False
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.agreed(accelerator)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_where_nothing_is_to_be_saved_a_signal_stops_at_once() -> None:
    with pytest.raises(Interrupted, match="SIGTERM, with nothing to save"), StopRequests():
        os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_after_the_last_step_a_run_only_has_to_be_finished(tmp_path: Path) -> None:
    class Stopped(OneWeight):
        def finish(self, modules: Modules, batches: Iterable[Batch]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def none_left(step: int) -> Iterator[Batch]:
        raise AssertionError("nothing is left to train")
        yield

    with pytest.raises(Interrupted, match="nothing to save"):
        run(tmp_path, clips(), stage=Stopped())
    assert [path.name for path in checkpoint.list_states(tmp_path / "state")] == ["step_000000012"]
    assert not (tmp_path / "model").exists()
    run(tmp_path, none_left)
    assert (tmp_path / "model").exists() and len(rows(tmp_path)) == 4


def test_whether_to_resume_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume=must, but .* holds no state"):
        run(tmp_path, clips(), resume="must")
    check_resume("never", tmp_path)
    (tmp_path / "state/step_000000003").mkdir(parents=True)
    check_resume("must", tmp_path)
    with pytest.raises(ValueError, match=r"resume=never, but .* holds a run"):
        check_resume("never", tmp_path)
    with pytest.raises(ValueError, match="choose one of auto, must, never"):
        check_resume("maybe", tmp_path)  # type: ignore[arg-type]


def test_states_of_every_nth_step_stay(tmp_path: Path) -> None:
    run(tmp_path, clips(), save_every=2, keep_states=1, keep_every=4)
    names = [path.name for path in checkpoint.list_states(tmp_path / "state")]
    assert names == ["step_000000004", "step_000000008", "step_000000012"]


def test_the_best_model_is_kept(tmp_path: Path) -> None:
    """At steps 3, 6, 9 and the end the score is 3, 1, 2 and 0.5; lower is better, then higher."""
    exports: list[tuple[str, int]] = []

    class Measured(OneWeight):
        measured = ("score",)

        def __init__(self) -> None:
            super().__init__()
            self.scores = iter([3.0, 1.0, 2.0, 0.5])

        def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
            return {"score": next(self.scores)}

    def export(name: str, weights: dict[str, Tensor], step: int) -> None:
        exports.append((name, step))

    for higher, wanted in (((), [3, 6, 11]), (("score",), [3])):
        stage = Measured()
        stage.higher_is_better = higher
        exports.clear()
        changes = {"evaluate_every": 3, "best_metric": "score", "num_steps": 11}
        run(tmp_path / str(higher), clips(), stage=stage, export=export, **changes)
        assert [step for name, step in exports if name == "model_best"] == wanted
    # Found before the first step.
    with pytest.raises(ValueError, match=r"best_metric=psnr isn't measured; choose one of weight"):
        run(tmp_path / "other", clips(), best_metric="psnr")
    assert not (tmp_path / "other").exists()


def test_a_best_value_of_another_metric_counts_no_more(tmp_path: Path) -> None:
    class Two(OneWeight):
        measured = ("low", "high")
        higher_is_better = ("high",)

        def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
            return {"low": 0.5, "high": 0.25}

    exports: list[tuple[str, int]] = []

    def export(name: str, weights: dict[str, Tensor], step: int) -> None:
        exports.append((name, step))

    for metric, steps in (("low", 3), ("high", 6)):
        run(tmp_path, clips(), stage=Two(), export=export, best_metric=metric, num_steps=steps)
    assert [step for name, step in exports if name == "model_best"] == [3, 6]


def test_an_extended_run_that_ends_while_finishing_gets_its_own_model(tmp_path: Path) -> None:
    """The model of a shorter run that lies there isn't taken for the longer one's."""
    run(tmp_path, clips(), num_steps=6)

    class Killed(OneWeight):
        def finish(self, modules: Modules, batches: Iterable[Batch]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, clips(), stage=Killed(), num_steps=12)
    assert exported_step(tmp_path) == 6
    run(tmp_path, clips(), num_steps=12)
    assert exported_step(tmp_path) == 12


def test_killed_while_measuring_at_the_end_a_run_measures_again(tmp_path: Path) -> None:
    """Rows, scalars and the best model are those of a run that nothing has stopped."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def killed(name: str, weights: dict[str, Tensor], step: int) -> None:
        raise KeyboardInterrupt

    settings: dict[str, Any] = {"num_steps": 10, "best_metric": "weight", "tensorboard": True}
    run(tmp_path / "straight", clips(), **settings)
    with pytest.raises(KeyboardInterrupt):  # in the export of the best model, after the row was written
        run(tmp_path / "stopped", clips(), export=killed, **settings)
    assert "held_out/weight" in rows(tmp_path / "stopped")[-1]
    for _ in range(2):
        run(tmp_path / "stopped", clips(), **settings)
    told = []
    for name in ("straight", "stopped"):
        assert (tmp_path / name / "model_best/step").read_text() == "10"
        events = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        scalars = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not tag.startswith("speed")
        }
        plain = [{key: value for key, value in row.items() if key != "time"} for row in rows(tmp_path / name)]
        told.append((scalars, plain))
    assert told[0] == told[1]


@pytest.mark.slow
def test_events_of_a_killed_run_are_those_of_a_straight_one(tmp_path: Path) -> None:
    """Killed between states, before it measures, while it does, and after that; speeds count, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    places = ("nowhere", "updates", "finish", "evaluate", "export")
    for place in places[1:]:
        process = multiprocessing.get_context("spawn").Process(
            target=run_and_die, args=(tmp_path / place, place)
        )
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    told = {}
    for place in places:
        run_and_die(tmp_path / place, "nowhere")
        assert exported_step(tmp_path / place) == 12
        events = EventAccumulator(str(tmp_path / place / "tensorboard"), {"images": 0}).Reload()
        told[place] = {
            tag: [(e.step, 0.0 if tag.startswith("speed") else e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        } | {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert told["nowhere"]["clip"] == [4, 8, 12] and len(told["nowhere"]["speed/clips_per_second"]) == 5
    for place in places:
        assert told[place] == told["nowhere"], place


def run_and_die(folder: Path, place: str) -> None:
    """A whole run, whose process is killed at a certain place of it."""

    def die(at: str) -> None:
        if place == at:
            os.kill(os.getpid(), signal.SIGKILL)

    class Dying(Measuring):
        def updates(self, modules: Modules, batch: Batch, step: int) -> Iterator[Update]:
            if step == 9:
                die("updates")
            yield from super().updates(modules, batch, step)

        def take_long(self, where: str) -> None:
            if self.step == 12:
                die(where)

    def export(name: str, weights: dict[str, Tensor], step: int) -> None:
        die("export")
        keep_step(folder)(name, weights, step)

    run(
        folder, clips(), stage=Dying("nowhere"), export=export, tensorboard=True, preview_every=4,
        evaluate_every=6, save_every=4, log_every=5, held_out=lambda: itertools.islice(clips()(0), 2),
    )  # fmt: skip


def test_nothing_is_measured_or_kept_of_weights_that_arent_finite(tmp_path: Path) -> None:
    """A number of step 2 that isn't finite is found at the evaluation of step 3, not at the row of step 5."""
    evaluated = []

    class Watched(OneWeight):
        def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
            evaluated.append(1)
            return super().evaluate(modules, batches)

    with pytest.raises(NonFiniteError, match="step 2"):
        run(tmp_path, clips(bad_step=1), stage=Watched(), evaluate_every=3, best_metric="weight")
    assert not evaluated and not (tmp_path / "model_best").exists()

    class Broken(OneWeight):
        def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
            return {"weight": float("nan")}

    with pytest.raises(NonFiniteError, match="on held-out clips weight became nan after step 3"):
        run(tmp_path / "other", clips(), stage=Broken(), evaluate_every=3, best_metric="weight")
    with pytest.raises(NonFiniteError, match=r"remove .*step_000000003 to go on from the state before it"):
        run(tmp_path / "saved", clips(), stage=Broken(), evaluate_every=3, save_every=3)
    assert all("NaN" not in line for line in (tmp_path / "other/metrics.jsonl").read_text().splitlines())


def test_only_states_by_their_name_count(tmp_path: Path) -> None:
    """A copy beside them neither wins over newer states nor stops the removal of old ones."""
    run(tmp_path, clips(), num_steps=6)
    state = tmp_path / "state"
    for copy in ("step_old", "step_000000006.bak"):
        shutil.copytree(state / "step_000000006", state / copy)
    shutil.copytree(state / "step_000000006", state / ".step_000000009.77.part")
    run(tmp_path, clips(), num_steps=12, save_every=2, keep_every=4)
    assert [path.name for path in checkpoint.list_states(state)] == [
        "step_000000008", "step_000000010", "step_000000012"
    ]  # fmt: skip
    assert (state / "step_old").exists() and not list(state.glob(".step*"))


def test_killed_before_old_states_were_removed_they_are_removed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = checkpoint.prune

    def killed(folder: Path, step: int, *rest: int) -> None:
        if step == 12:
            raise KeyboardInterrupt
        prune(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "prune", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, clips(), save_every=4, keep_states=1)
    monkeypatch.setattr(checkpoint, "prune", prune)
    assert len(checkpoint.list_states(tmp_path / "state")) == 2
    run(tmp_path, clips(), save_every=4, keep_states=1)
    assert [path.name for path in checkpoint.list_states(tmp_path / "state")] == ["step_000000012"]


def test_a_state_that_was_set_aside_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames of a folder that replaces another, the older one is there."""
    run(tmp_path, clips(), num_steps=6)
    state = tmp_path / "state"
    os.replace(state / "step_000000006", state / ".step_000000006.old.part")
    (state / ".step_000000006.99.part").mkdir()

    def none_left(step: int) -> Iterator[Batch]:
        raise AssertionError("nothing is left to train")
        yield

    run(tmp_path, none_left, num_steps=6)
    assert [path.name for path in state.iterdir()] == ["step_000000006"]


def test_a_passing_error_of_the_disk_removes_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, clips(), num_steps=6, save_every=3)
    hashed = checkpoint._hash

    def stale(path: Path) -> str:
        if "step_000000006" in str(path):
            raise OSError(116, "Stale file handle")
        return hashed(path)

    monkeypatch.setattr(checkpoint, "_hash", stale)
    with pytest.raises(
        OSError, match=r"can't read the state .*Stale file handle.* It may be sound, and stays"
    ):
        run(tmp_path, clips(), num_steps=8)
    monkeypatch.setattr(checkpoint, "_hash", hashed)
    assert len(checkpoint.list_states(tmp_path / "state")) == 2


def test_lines_that_no_run_has_written_are_passed_over(tmp_path: Path) -> None:
    run(tmp_path, clips(), num_steps=6)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'5\nnull\n{"loss": 1}\n\xff\xfe\n{"step": 6, "loss')
    before = rows_of(tmp_path / "metrics.jsonl")
    run(tmp_path, clips(), num_steps=8)
    assert rows_of(tmp_path / "metrics.jsonl")[: len(before)] == before


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows among the lines of a file."""
    told = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            told.append(row)
    return told


def test_a_profile_is_written(tmp_path: Path) -> None:
    run(tmp_path, clips(), num_steps=15, profile=True)
    trace = json.loads((tmp_path / "profile/trace.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])


def test_settings_and_last_numbers_are_compared_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    tracker = Tracker(
        tmp_path, 0, 8.0, tensorboard=True, settings={"optimizer.lr": 0.1, "warmup": None, "runs": "x"}
    )
    assert isinstance(tracker._writer, SummaryWriter)
    tracker.log(1, {"held_out/loss": 0.5, "time": 1.0})
    tracker.chart(1, {"speed/clips_per_second": 3.0})
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"held_out/loss", "speed/clips_per_second"} <= set(events.Tags()["scalars"])
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    told = metadata.parse_session_start_info_plugin_data(content).hparams
    assert told["optimizer.lr"].number_value == 0.1 and told["warmup"].string_value == "None"
    assert "runs" not in told
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert "speed" not in (tmp_path / "metrics.jsonl").read_text()


def test_another_service_cant_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            raise ConnectionError("no network")

    fake = types.ModuleType("wandb")
    fake.init = lambda **_: Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = Tracker(tmp_path, 0, 8.0, tensorboard=False, wandb="project")
    with pytest.warns(UserWarning, match="wandb is switched off: ConnectionError: no network"):
        tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 2.0})
    tracker.close()
    assert [row["loss"] for row in rows(tmp_path)] == [1.0, 2.0]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="wandb is switched off"):
        Tracker(tmp_path, 2, 8.0, tensorboard=False, wandb="project").close()


def test_seeding_a_step_takes_no_memory() -> None:
    """torch.manual_seed keeps a note for a GPU that was never used, in every step."""
    kept = len(torch.cuda._queued_calls)
    for seed in range(20):
        reseed(seed, torch.device("cpu"))
    assert len(torch.cuda._queued_calls) == kept
    drawn = torch.rand(3)
    torch.manual_seed(19)
    assert torch.equal(drawn, torch.rand(3))


def test_a_record_knows_all_starts(tmp_path: Path) -> None:
    for step in (5, 9):
        record = RunRecord(tmp_path, {"seed": 0}, data_fingerprint="abc", batch_size=4, num_processes=2)
        record.update(step, 1.5 * step)
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["step"], told["clips_seen"], told["seconds"]) == (9, 36, 13.5)
    assert [start["processes"] for start in told["starts"]] == [2, 2]
    assert record.former_fingerprint == "abc" == told["starts"][0]["data_fingerprint"]
    for damaged in ('{"starts": null}', "[]", "no JSON", '{"starts": [3]}'):
        (tmp_path / "run.json").write_text(damaged)
        again = RunRecord(tmp_path, {}, data_fingerprint="x", batch_size=4, num_processes=1)
        assert again.former_fingerprint is None
    assert told["starts"][0]["packages"]["torch"] == torch.__version__
    assert told["config_sha256"] == hashlib.sha256(b'{"seed": 0}').hexdigest()


def in_processes(world: int, *arguments: str) -> None:
    """Runs `one_of_several.py` in so many processes."""
    script = Path(__file__).parents[1] / "one_of_several.py"
    root = script.parents[1]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    told = subprocess.run(
        [sys.executable, *(launcher if world > 1 else []), str(script), *arguments],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", [[], ["fsdp"]])
def test_two_gpus_and_one_train_the_same(tmp_path: Path, how: list[str]) -> None:
    for world in (1, 2):
        in_processes(world, "2", str(tmp_path / str(world)), "5", *(how if world > 1 else []))
    one, two = (torch.load(tmp_path / str(world) / "model.pt") for world in (1, 2))
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_sharded_run_is_the_same_run(tmp_path: Path) -> None:
    """Weights, averages and optimizer state of two processes' parts, put together, are those of one process.

    Stopped and taken up again, sharded as before, the bits are the same; a sharded run's state serves a whole
    one, and the other way round.
    """
    for name, world, steps, *how in [
        ("whole", 1, "5"), ("sharded", 2, "5", "fsdp"),
        ("stopped", 2, "3", "fsdp"), ("stopped", 2, "5", "fsdp"),
        ("sharded_then_whole", 2, "3", "fsdp"), ("sharded_then_whole", 1, "5"),
        ("whole_then_sharded", 1, "3"), ("whole_then_sharded", 2, "5", "fsdp"),
        ("whole_skipping", 1, "5", "bad"), ("sharded_skipping", 2, "5", "fsdp", "bad"),
    ]:  # fmt: skip
        in_processes(int(world), "2", str(tmp_path / str(name)), str(steps), *map(str, how))
    contents = {}
    for name in sorted(path.name for path in tmp_path.iterdir()):
        (state,) = checkpoint.list_states(tmp_path / name / "state")[-1:]
        assert state.name == "step_000000005"
        contents[name] = {
            file: load_file(state / file)
            for file in ("modules.safetensors", "averages.safetensors", "optimizers.safetensors")
        } | {"model": torch.load(tmp_path / name / "model.pt")}
    assert contents["whole"]["modules.safetensors"]["weight.layers.1.weight"].shape == (16, 12)
    assert not torch.equal(
        *(contents[name]["model"]["layers.1.bias"] for name in ("whole", "whole_skipping"))
    )
    for name in contents:
        like = "whole_skipping" if "skipping" in name else "whole"
        for file, tensors in contents[like].items():
            for key, value in tensors.items():
                other = contents[name][file][key]
                torch.testing.assert_close(other, value, rtol=0, atol=2e-6)
                if name == "stopped":
                    assert torch.equal(other, contents["sharded"][file][key])


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["fsdp"]])
def test_several_processes_that_measure_stop_together(how: list[str], tmp_path: Path) -> None:
    """The launcher hands the signal on while the first measures, or all do, which would take a minute."""
    script = Path(__file__).parents[1] / "one_of_several.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [sys.executable, *launcher, str(script), "4", str(tmp_path / "a"), "5", *how, "slow"],
        cwd=script.parents[1], env={**os.environ, "PYTHONPATH": str(script.parents[1])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "a/measuring").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 25, "the launcher kills after 30 seconds"
    assert output.count("Interrupted: stopped by SIGTERM after step 2 of 5") == 2, output
    assert [path.name for path in checkpoint.list_states(tmp_path / "a/state")] == ["step_000000002"]
    for name in ("a", "b"):
        in_processes(2, "4", str(tmp_path / name), "5", *how)
    one, other = (torch.load(tmp_path / name / "model.pt") for name in ("a", "b"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.slow
def test_processes_and_micro_batches_change_rounding_only(tmp_path: Path) -> None:
    """After five steps all processes hold the same bits, and all splits the same numbers up to rounding."""
    results: list[dict[str, Tensor]] = []
    for world in (1, 2):
        for micro in (1, 4):
            folder = tmp_path / f"{world}_{micro}"
            in_processes(world, str(micro), str(folder))
            ranks = [torch.load(folder / f"rank_{rank}_of_{world}.pt") for rank in range(world)]
            assert all(torch.equal(ranks[0][key], ranks[-1][key]) for key in ranks[0])
            results.append(ranks[0])
            losses, first = (
                [row["weight/loss"] for row in rows(path) if "weight/loss" in row]
                for path in (folder, tmp_path / "1_1")
            )
            assert len(losses) == 5 and losses == pytest.approx(first, rel=1e-5)
    for other in results[1:]:
        for key, weight in results[0].items():
            torch.testing.assert_close(other[key], weight, rtol=0, atol=2e-6)
