"""The training loop: any stage, any number of processes, one integer of progress."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from ..data.sampler import Batch, LatentBatch, derive_seed
from ..stages.stage import Stage
from . import checkpoint
from .ema import Ema
from .learning_rate import learning_rate_factor
from .tracker import Tracker


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
        save_every: training state, and the model folder with it.
        keep_states: how many of the last states stay.
    """

    num_steps: int
    warmup_steps: int
    decay: Literal["constant", "cosine"]
    clip_norm: float
    log_every: int
    preview_every: int
    evaluate_every: int
    save_every: int
    keep_states: int


def every(step: int, period: int) -> bool:
    """Whether something periodic is due after this step."""
    return period > 0 and step % period == 0


class NonFiniteError(RuntimeError):
    """A loss or a gradient was not a finite number."""


class _Pending:
    """Numbers of the steps since the last row; they stay on the device until they are read together."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, str, dict[str, Tensor]]] = []

    def add(self, step: int, module: str, numbers: dict[str, Tensor]) -> None:
        self.steps.append((step, module, numbers))

    def read(self, mean_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means by name over the steps, the processes and the micro-batches; refuses non-finite ones."""
        if not self.steps:
            return {}
        values = mean_over_processes(
            torch.stack([value.float() for _, _, numbers in self.steps for value in numbers.values()])
        ).tolist()
        sums: dict[str, list[float]] = {}
        where = iter(values)
        for step, module, numbers in self.steps:
            for name in numbers:
                value = next(where)
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"{module}/{name} became {value} in step {step}; the last saved state is untouched. "
                        "Try a lower optimizer.lr, train.clip_norm=1, or machine.precision=no"
                    )
                sums.setdefault(f"{module}/{name}", []).append(value)
        self.steps.clear()
        return {name: sum(parts) / len(parts) for name, parts in sums.items()}


def train(
    stage: Stage,
    *,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batches: Callable[[int], Iterator[Batch | LatentBatch]],
    held_out: Callable[[], Iterable[Batch]],
    statistics: Callable[[], Iterable[Batch]],
    export: Callable[[nn.Module, int], None],
    ema_decay: float | None,
    settings: LoopSettings,
    accelerator: Accelerator,
    folder: Path,
    fps: float,
    tensorboard: bool,
    seed: int,
) -> None:
    """Trains a stage, or goes on with it where its folder's last state stopped.

    Args:
        stage: what is learned.
        optimizers: one for each of the stage's modules, under the same names.
        batches: micro-batches of this process from a given step on, endless.
        held_out: clips that aren't trained on, for previews and numbers.
        statistics: training clips for what the stage measures at its end.
        export: writes the model folder of a module at a step; called on the main process.
        ema_decay: of the moving averages that previews, numbers and the model folder use; None for none.
        settings: lengths and periods.
        accelerator: devices, precision, gradient accumulation.
        folder: of the run.
        fps: at which previews play.
        tensorboard: whether to write TensorBoard files.
        seed: of everything that is random.

    Raises:
        NonFiniteError: if a loss or gradient isn't finite; states saved before stay.
    """

    def mean_over_processes(values: Tensor) -> Tensor:
        return accelerator.reduce(values, reduction="mean") if accelerator.num_processes > 1 else values

    # What is trained, and its averages.
    bare = stage.modules
    for module in bare.values():
        module.to(accelerator.device).train()
    # The averages are copied first: preparing for mixed precision patches a module's forward in place.
    ema = Ema(bare, ema_decay) if ema_decay is not None else None
    modules = {name: accelerator.prepare(module) for name, module in bare.items()}
    shown = ema.modules if ema is not None else bare

    # Where a former run of the same command stopped.
    state = checkpoint.State(
        modules=bare,
        averages=ema.modules if ema is not None else {},
        optimizers=optimizers,
        running=stage.running,
        progress={"step": 0, "seconds": 0.0},
    )
    with accelerator.main_process_first():  # which removes damaged states before the others look
        resumed = checkpoint.load_latest(folder / "state", state, report=accelerator.print)
    scaler = accelerator.scaler
    if scaler is not None and "scaler" in state.progress:
        scaler.load_state_dict(state.progress["scaler"])
    if resumed:
        accelerator.print(f"going on after step {state.progress['step']} of {folder}")
    stage.running = state.running
    step, seconds_before = state.progress["step"], state.progress["seconds"]
    at_the_end_already = step >= settings.num_steps
    if at_the_end_already and (folder / "model").exists():
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

    main = accelerator.is_main_process
    tracker = Tracker(folder, step, fps, tensorboard) if main else None
    pending = _Pending()
    bar = tqdm(
        total=settings.num_steps,
        initial=step,
        unit="step",
        desc=folder.name,
        disable=not main,
        file=sys.stdout,
        mininterval=1.0,
    )
    began = time.monotonic()

    def seconds() -> float:
        return round(seconds_before + time.monotonic() - began, 3)

    def log() -> None:
        numbers = pending.read(mean_over_processes)
        if tracker is not None and numbers:
            tracker.log(step, {"time": seconds(), **numbers})
            loss = next(iter(numbers.values()))
            bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)

    def look(preview: bool, evaluate: bool) -> None:
        if tracker is None:
            return
        for module in bare.values():
            module.eval()
        if preview:
            batch = next(iter(held_out()), None)
            if batch is not None:
                tracker.videos(step, stage.preview(shown, _first_clips(batch, 8)))
        if evaluate:
            numbers = stage.evaluate(shown, held_out())
            tracker.log(step, {"time": seconds()} | {f"held_out/{name}": x for name, x in numbers.items()})
        for module in bare.values():
            module.train()

    def save() -> None:
        # What processes have summed apart is averaged, which is what the next step would do with it.
        running = {
            name: mean_over_processes(value) if value.is_floating_point() else value
            for name, value in stage.running.items()
        }
        if main:
            state.running = running
            state.progress = {"step": step, "seconds": seconds()}
            if scaler is not None:
                state.progress["scaler"] = scaler.state_dict()
            checkpoint.save(folder / "state", state, settings.keep_states)
        accelerator.wait_for_everyone()

    source = batches(step)
    while step < settings.num_steps:
        # Each step starts from its own random state, so that dropout survives a resume, too.
        torch.manual_seed(
            derive_seed(seed, step * accelerator.num_processes + accelerator.process_index, "step")
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
                for update in stage.updates(modules, next(source), step):
                    accelerator.backward(update.loss)
                    numbers = {"loss": update.loss.detach(), **update.metrics}
                    if accelerator.sync_gradients:
                        largest = settings.clip_norm if settings.clip_norm > 0 else math.inf
                        norm = accelerator.clip_grad_norm_(parameters[update.name], largest)
                        # With fp16 a norm may overflow: that step is skipped and the loss scale falls.
                        if norm is not None and scaler is None:
                            numbers["gradient_norm"] = norm.detach()
                    prepared[update.name].step()
                    prepared[update.name].zero_grad()
                    pending.add(step + 1, update.name, numbers)
                synchronized = accelerator.sync_gradients
        step += 1
        if ema is not None:
            ema.update(step)
        bar.update()

        if every(step, settings.log_every):
            log()
        if every(step, settings.preview_every) or every(step, settings.evaluate_every):
            look(every(step, settings.preview_every), every(step, settings.evaluate_every))
        if every(step, settings.save_every) and step < settings.num_steps:
            log()
            save()

    log()
    bar.close()
    for module in bare.values():
        module.eval()
    stage.finish(shown, statistics())
    if not at_the_end_already:  # or else the numbers of the last step are there
        look(preview=True, evaluate=True)
    save()
    if main:
        export(shown[stage.exported], step)
    accelerator.wait_for_everyone()
    if tracker is not None:
        tracker.close()


def _first_clips(batch: Batch, count: int) -> Batch:
    return Batch(batch.video[:count], batch.label[:count], batch.positions[:count])
