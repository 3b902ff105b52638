"""The training loop: any stage, any number of processes, one integer of progress."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.profiler import profile, schedule

from ..data.sampler import Batch, LatentBatch, derive_seed
from ..stages.stage import Stage
from . import checkpoint
from .console import Console
from .ema import Averages
from .interruption import Interrupted, MeasuringStopped, StopRequests
from .learning_rate import learning_rate_factor
from .numbers import REMEDY, UNTOUCHED, NonFiniteError, Pending
from .sharding import is_sharded, whole, whole_weights
from .tracker import Tracker

Resume = Literal["auto", "must", "never"]


@dataclass
class LoopSettings:
    """How long to train and what to do how often; all counts are optimizer steps, 0 means never.

    Args:
        num_steps: length of the run.
        warmup_steps: over which the learning rate grows linearly.
        decay: ``constant`` or ``cosine``.
        clip_norm: largest norm of a module's gradient; 0 for no clipping.
        log_every: rows of numbers.
        preview_every: videos to look at.
        evaluate_every: numbers on held-out clips.
        save_every: training state.
        snapshot_every: averages from which others can be reconstructed, if they are of that kind.
        keep_states: how many of the last states stay.
        keep_every: states of these steps stay, too.
        best_metric: number on held-out clips whose best model gets a folder of its own; None for none.
        on_nonfinite: ``stop`` at a number that isn't finite, or ``skip`` the step and count it.
        max_skipped: how many steps may be skipped.
        profile: whether a few steps are traced for TensorBoard or Perfetto.
    """

    num_steps: int
    warmup_steps: int
    decay: Literal["constant", "cosine"]
    clip_norm: float
    log_every: int
    preview_every: int
    evaluate_every: int
    save_every: int
    snapshot_every: int
    keep_states: int
    keep_every: int
    best_metric: str | None
    on_nonfinite: Literal["stop", "skip"]
    max_skipped: int
    profile: bool

    def __post_init__(self) -> None:
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"unknown train.on_nonfinite {self.on_nonfinite!r}; choose stop or skip")


def every(step: int, period: int) -> bool:
    """Whether something periodic is due after this step."""
    return period > 0 and step % period == 0


def looks_after(step: int, settings: LoopSettings) -> list[str]:
    """Which looks at held-out clips are due after a step: both after the last one."""
    periods = {"preview": settings.preview_every, "evaluate": settings.evaluate_every}
    return [name for name, period in periods.items() if step == settings.num_steps or every(step, period)]


def train(
    stage: Stage,
    *,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batches: Callable[[int], Iterator[Batch | LatentBatch]],
    held_out: Callable[[], Iterable[Batch]],
    statistics: Callable[[], Iterable[Batch]],
    clips_of: Callable[[int], list[str]],
    export: Callable[[str, dict[str, Tensor], int], None],
    averages: Averages | None,
    settings: LoopSettings,
    accelerator: Accelerator,
    folder: Path,
    resume: Resume,
    batch_size: int,
    model_step: Callable[[], int | None],
    tracker: Callable[[int, bool], Tracker],
    record: Callable[[int, float], None],
    requests: StopRequests,
    seed: int,
) -> None:
    """Trains a stage, or goes on with it where its folder's last state stopped.

    Args:
        stage: what is learned.
        optimizers: one for each of the stage's modules, under the same names.
        batches: micro-batches of this process from a given step on, endless.
        held_out: clips that aren't trained on, for previews and numbers.
        statistics: training clips for what the stage measures at its end.
        clips_of: names the clips of a step, counted from 1, for messages.
        export: writes a model folder (``model``, ``model_best``) of weights at a step; called on the main
            process.
        averages: moving averages of the stage's modules, for previews, numbers and the model folder; None
            for none.
        settings: lengths and periods.
        accelerator: devices, precision, gradient accumulation.
        folder: of the run.
        resume: whether to go on from the folder's last state: ``auto`` (if there is one), ``must`` or
            ``never``.
        batch_size: clips of one step, over all processes.
        model_step: tells of which step the model folder is that is there; None without one.
        tracker: makes what numbers and videos are handed to, from a step on, and whether that step has been
            measured on held-out clips; called on the main process.
        record: told step and seconds of training at the start and whenever a state is saved; called on the
            main process.
        requests: to stop; it listens already.
        seed: of everything that is random.

    Raises:
        NonFiniteError: if a loss or gradient isn't finite; states saved before stay.
        Interrupted: if a signal asked to stop; the state of the last step is saved.
        ValueError: if ``resume`` and what is in the folder contradict each other.
    """

    def mean_over_processes(values: Tensor) -> Tensor:
        return accelerator.reduce(values, reduction="mean") if accelerator.num_processes > 1 else values

    check_resume(resume, folder)
    if settings.best_metric is not None and settings.best_metric not in stage.measured:
        raise ValueError(
            f"train.best_metric={settings.best_metric} isn't measured; choose one of "
            f"{', '.join(stage.measured)}"
        )
    # What is trained, and its averages.
    bare = stage.modules
    for module in bare.values():
        module.to(accelerator.device).train()
    shown = averages.modules if averages is not None else bare
    # Sharded modules exchange gradients themselves, and compute only where all processes take part.
    sharded = any(is_sharded(module) for module in bare.values())
    modules = {
        name: module if is_sharded(module) else accelerator.prepare(module) for name, module in bare.items()
    }

    # Where a former run of the same command stopped.
    state = checkpoint.State(
        modules=bare,
        averages=averages.saved if averages is not None else {},
        optimizers=optimizers,
        running=stage.running,
        progress={"step": 0, "seconds": 0.0, "skipped": 0, "pending": {}},
    )
    with accelerator.main_process_first():  # which removes damaged states before the others look
        resumed = checkpoint.load_latest(folder / "state", state, report=accelerator.print)
        if resumed and accelerator.is_main_process:  # a kill may have come between a save and this
            checkpoint.prune(
                folder / "state", state.progress["step"], settings.keep_states, settings.keep_every
            )
    if resume == "must" and not resumed:
        raise ValueError(f"resume=must, but {folder} holds no state to go on from; use resume=auto to begin")
    scaler = accelerator.scaler
    if scaler is not None and "scaler" in state.progress:
        scaler.load_state_dict(state.progress["scaler"])
    if resumed:
        accelerator.print(f"going on after step {state.progress['step']} of {folder}")
    stage.running = state.running
    step, seconds_before = state.progress["step"], state.progress["seconds"]
    at_the_end_already = step >= settings.num_steps
    if at_the_end_already and model_step() == step:
        accelerator.print(f"{folder} is finished after {step} steps; a larger train.num_steps goes on")
        return
    prepared = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    parameters = {name: list(module.parameters()) for name, module in bare.items()}
    peak_rates = {
        name: [group.get("peak_lr", group["lr"]) for group in optimizer.param_groups]
        for name, optimizer in optimizers.items()
    }
    for name, optimizer in optimizers.items():
        for group, peak in zip(optimizer.param_groups, peak_rates[name], strict=True):
            group["peak_lr"] = peak
    skips = settings.on_nonfinite == "skip"
    if skips and scaler is None and not all(o.defaults.get("fused") for o in optimizers.values()):
        raise ValueError(
            "train.on_nonfinite=skip leaves out a step on the device, which only fused optimizers can; use "
            "optimizer.fused=true, or train.on_nonfinite=stop"
        )

    main = accelerator.is_main_process
    # Looks that a former start has not come to, or not finished.
    owed = looks_after(step, settings) if resumed else []
    if set(owed) <= set(state.progress.get("looked", [])):
        owed = []
    tracks = tracker(step, not owed) if main else None
    speed = state.progress.get("speed", {})
    if tracks is not None and owed and speed.get("step") == step:  # the rows don't tell it
        tracks.chart(step, speed["numbers"])
    if main:
        record(step, seconds_before)
    pending = Pending(accelerator.num_processes, skips, settings.max_skipped, clips_of)
    pending.num_skipped, pending.totals = state.progress["skipped"], state.progress["pending"]
    console = Console(folder.name, step, settings.num_steps, batch_size, enabled=main)
    began = time.monotonic()

    def seconds() -> float:
        return round(seconds_before + time.monotonic() - began, 3)

    def log() -> None:
        numbers = pending.read(mean_over_processes)
        if tracks is not None and numbers:
            rates = {
                f"learning_rate/{name}": optimizer.param_groups[0]["lr"]
                for name, optimizer in optimizers.items()
            }
            tracks.log(step, {"time": seconds(), **numbers, **rates})
            speed = console.rates(step)
            tracks.chart(step, speed)
            state.progress["speed"] = {"step": step, "numbers": speed}
            console.show(step, next(iter(numbers.values())))

    def look(due: list[str]) -> bool:
        """Previews and numbers on held-out clips; False if a request to stop came before they were done."""
        if tracks is None and not sharded:
            return True
        for module in bare.values():
            module.eval()
        try:
            if "preview" in due:
                preview()
            if "evaluate" in due:
                evaluate()
        except MeasuringStopped:
            return False
        finally:
            for module in bare.values():
                module.train()
        state.progress["looked"] = due
        return True

    def note_looks() -> None:
        """So that a later start doesn't look again after a step whose state was saved before."""
        if tracks is not None:
            tracks.sync()
            checkpoint.note_progress(folder / "state", state)

    def measuring() -> AbstractContextManager[None]:
        # Of sharded modules no process may leave the others alone: they ask each other between batches.
        return nullcontext() if sharded else requests.giving_up()

    def until_asked_to_stop(measured: Iterable[Batch]) -> Iterator[Batch]:
        for batch in measured:
            requests.give_up()
            if sharded and requests.agreed(accelerator, now=True):
                raise MeasuringStopped
            yield batch

    def preview() -> None:
        with measuring():
            batch = next(until_asked_to_stop(held_out()), None)
            videos = {} if batch is None else stage.preview(shown, _first_clips(batch, 8))
        if tracks is not None:
            tracks.videos(step, videos)

    def evaluate() -> None:
        with measuring():
            numbers = stage.evaluate(shown, until_asked_to_stop(held_out()))
        wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
        if wrong:
            saved = checkpoint.path_of(folder / "state", step)
            raise NonFiniteError(
                f"on held-out clips {' and '.join(wrong)} became {numbers[wrong[0]]} after step {step}; "
                + (f"remove {saved} to go on from the state before it" if saved.exists() else UNTOUCHED)
                + f". {REMEDY}"
            )
        if tracks is not None:
            tracks.log(step, {"time": seconds()} | {f"held_out/{name}": x for name, x in numbers.items()})
        if sharded:  # all must come to the same decision
            numbers = broadcast_object_list([numbers])[0]
        keep_best(numbers)

    def keep_best(numbers: Mapping[str, float]) -> None:
        name = settings.best_metric
        if name is None:
            return
        best = state.progress.get("best")
        if best is not None and best["metric"] != name:
            accelerator.print(f"the best {best['metric']} counts no more; train.best_metric is now {name}")
            best = None
        value = numbers[name]
        if best is not None:
            better = value > best["value"] if name in stage.higher_is_better else value < best["value"]
        if best is None or better:
            with measuring():
                stage.finish(shown, until_asked_to_stop(statistics()))
            write_model("model_best")
            state.progress["best"] = {"metric": name, "value": value}  # it is there only now

    def write_model(name: str) -> None:
        weights = whole_weights(shown[stage.exported]) if main or sharded else {}
        if main:
            export(name, weights, step)

    def save() -> None:
        # What processes have summed apart is averaged, which is what the next step would do with it.
        running = {
            name: mean_over_processes(value) if value.is_floating_point() else value
            for name, value in stage.running.items()
        }
        if main:
            state.running = running
            state.progress |= {
                "step": step,
                "seconds": seconds(),
                "skipped": pending.num_skipped,
                "pending": pending.totals,
            }
            if scaler is not None:
                state.progress["scaler"] = scaler.state_dict()
        write_state()
        if main:
            record(step, seconds())
        accelerator.wait_for_everyone()

    def write_state() -> None:
        if tracks is not None:
            tracks.sync()  # rows up to a state are on the disk before it
        if main or sharded:
            checkpoint.save(folder / "state", state, settings.keep_states, settings.keep_every, write=main)

    def stop() -> NoReturn:
        console.close()
        if tracks is not None:
            tracks.close()
        raise Interrupted(
            f"stopped by {requests.name} after step {step} of {settings.num_steps}, which is saved "
            f"in {folder}; the same command goes on"
        )

    def snapshot() -> None:
        if averages is not None and (main or sharded):
            averages.snapshot(folder / "averages", step, write=main)

    source = batches(step)
    requests.at_once = False
    if owed and not at_the_end_already:
        look(owed)
        if requests.agreed(accelerator, now=True):
            stop()
    with _profiler(settings.profile and main, folder) as profiler:
        while step < settings.num_steps:
            # Each step starts from its own random state, so that dropout survives a resume, too.
            reseed(
                derive_seed(seed, step * accelerator.num_processes + accelerator.process_index, "step"),
                accelerator.device,
            )
            factor = learning_rate_factor(
                step, settings.num_steps, warmup_steps=settings.warmup_steps, decay=settings.decay
            )
            for name, optimizer in optimizers.items():
                for group, peak in zip(optimizer.param_groups, peak_rates[name], strict=True):
                    group["lr"] = peak * factor

            synchronized = False
            while not synchronized:
                with accelerator.accumulate(*modules.values()):
                    with console.waiting():
                        batch = next(source)
                    for update in stage.updates(modules, batch, step):
                        accelerator.backward(update.loss)
                        numbers = {"loss": update.loss.detach(), **update.metrics}
                        if accelerator.sync_gradients:
                            largest = settings.clip_norm if settings.clip_norm > 0 else math.inf
                            norm = accelerator.clip_grad_norm_(parameters[update.name], largest)
                            norm = None if norm is None else whole(norm)
                            # With fp16 a norm may overflow: that step is skipped and the loss scale falls.
                            if norm is not None and scaler is None:
                                numbers["gradient_norm"] = norm.detach()
                                if skips:  # which a fused optimizer heeds without telling the host
                                    optimizers[update.name].found_inf = 1.0 - norm.isfinite().float()  # type: ignore[attr-defined]
                        prepared[update.name].step()
                        prepared[update.name].zero_grad()
                        pending.add(step + 1, update.name, numbers)
                    synchronized = accelerator.sync_gradients
            step += 1
            if averages is not None:
                averages.update(step)
            console.advance()
            if profiler is not None:
                profiler.step()

            if every(step, settings.log_every):
                log()
            due = looks_after(step, settings)
            snaps = averages is not None and every(step, settings.snapshot_every)
            if due or snaps:  # which nothing but sound weights deserve
                pending.collect(mean_over_processes)
            if snaps:
                snapshot()
            if step == settings.num_steps:
                break
            state.progress["looked"] = []
            saved = every(step, settings.save_every)
            if saved:  # before the looks, which may take long
                log()
                save()
            if due and look(due) and saved:
                note_looks()
            if requests.agreed(accelerator, now=bool(due)):
                if not saved:  # the numbers since the last row go into the state, so that rows don't change
                    pending.collect(mean_over_processes)
                    save()
                stop()

    log()
    console.close()
    if not at_the_end_already:
        state.progress["looked"], owed = [], looks_after(step, settings)
        save()
    requests.at_once = True  # what remains can be done again
    if requests.received is not None:
        raise Interrupted(f"stopped by {requests.name} after the last step; the same command does the rest")
    for module in bare.values():
        module.eval()
    stage.finish(shown, statistics())
    if owed and look(owed) and not at_the_end_already:
        note_looks()
    if settings.snapshot_every:
        snapshot()
    write_model("model")
    accelerator.wait_for_everyone()
    if tracks is not None:
        tracks.finish()


def reseed(seed: int, device: torch.device) -> None:
    """Seeds the generators of the CPU and of a GPU.

    Without a GPU `torch.manual_seed` would keep a note, with a stack trace, for when one is first used: in
    every step, so that memory grows.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def check_resume(resume: Resume, folder: Path) -> None:
    """Raises ValueError if a run must go on but there is none, or must not and there is one."""
    if resume not in get_args(Resume):
        raise ValueError(f"unknown resume {resume!r}; choose one of {', '.join(get_args(Resume))}")
    states = checkpoint.list_states(folder / "state")
    if resume == "never" and states:
        raise ValueError(
            f"resume=never, but {folder} holds a run ({states[-1].name}); choose another name=…, remove the "
            "folder, or use resume=auto to go on with it"
        )


@contextmanager
def _profiler(enabled: bool, folder: Path) -> Iterator["profile | None"]:
    """Traces three steps after ten, into ``profile/trace.json`` (Perfetto, or TensorBoard's plug-in)."""
    if not enabled:
        yield None
        return

    def write(profiler: profile) -> None:
        (folder / "profile").mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "profile" / "trace.json"))

    plan = schedule(wait=8, warmup=2, active=3, repeat=1)
    with profile(schedule=plan, on_trace_ready=write, profile_memory=True) as profiler:
        yield profiler


def _first_clips(batch: Batch, count: int) -> Batch:
    return Batch(batch.video[:count], batch.label[:count], batch.positions[:count])
