"""What the training loop costs beside a bare Accelerate loop: `python -m benchmarks.loop`.

Both train the same module of one weight on data that is there already, so that nothing but the loop remains.
They run in this process, in turn; printed are medians of the milliseconds of a step and of their differences,
without rows of numbers and with one every 50 steps.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.data.sampler import Batch, LatentBatch
from src.stages.stage import Modules, Update
from src.training.device import make_accelerator
from src.training.interruption import StopRequests
from src.training.loop import LoopSettings, train
from src.training.tracker import Tracker


class OneWeight:
    """A stage whose only module is one weight."""

    exported = "weight"
    measured: tuple[str, ...] = ()
    higher_is_better: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {"weight": nn.Linear(1, 1, bias=False)}
        self.running: dict[str, Tensor] = {}

    def updates(self, modules: Modules, batch: Batch | LatentBatch, step: int) -> Iterator[Update]:
        """The mean of the weight times the clip."""
        assert isinstance(batch, Batch)
        yield Update("weight", modules["weight"](batch.video).mean(), {})

    def preview(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        """Nothing to look at."""
        return {}

    def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
        """Nothing to measure."""
        return {}

    def finish(self, modules: Modules, batches: Iterable[Batch]) -> None:
        """Nothing remains."""


BATCH = Batch(torch.ones(2, 1), torch.zeros(2), torch.arange(2))


def bare(num_steps: int) -> float:
    """Milliseconds of a step of a loop with nothing but what Accelerate's own examples have."""
    module = OneWeight().modules["weight"]
    accelerator, _ = make_accelerator(precision="no", tf32=False, batch_size=2, micro_batch_size=None)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module, optimizer = accelerator.prepare(module, optimizer)
    began = time.perf_counter()
    for _ in range(num_steps):
        with accelerator.accumulate(module):
            loss = module(BATCH.video).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return 1e3 * (time.perf_counter() - began) / num_steps


def measure(num_steps: int, repeats: int) -> dict[str, Any]:
    """The record of so many rounds of so many steps in each way."""
    rows = [(bare(num_steps), ours(num_steps, 0), ours(num_steps, 50)) for _ in range(repeats)]
    return {
        "command": "python -m benchmarks.loop",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "milliseconds_a_step": {
            "bare": round(statistics.median(row[0] for row in rows), 4),
            "ours": round(statistics.median(row[1] for row in rows), 4),
            "ours_logging_every_50": round(statistics.median(row[2] for row in rows), 4),
        },
        "ours_more_than_bare": round(statistics.median(row[1] - row[0] for row in rows), 4),
        "logging_more": round(statistics.median(row[2] - row[1] for row in rows), 4),
    }


def ours(num_steps: int, log_every: int) -> float:
    """Milliseconds of a step of the project's loop, without its start and end."""
    stage = OneWeight()
    times: list[float] = []

    def batches(step: int) -> Iterator[Batch]:
        while True:
            times.append(time.perf_counter())
            yield BATCH

    accelerator, _ = make_accelerator(precision="no", tf32=False, batch_size=2, micro_batch_size=None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(
            stage,
            optimizers={"weight": torch.optim.AdamW(stage.modules["weight"].parameters(), fused=True)},
            batches=batches,
            held_out=list,
            statistics=list,
            clips_of=lambda step: [],
            export=lambda name, module, step: None,
            averages=None,
            settings=LoopSettings(
                num_steps=num_steps,
                warmup_steps=0,
                decay="constant",
                clip_norm=1.0,
                log_every=log_every,
                preview_every=0,
                evaluate_every=0,
                save_every=0,
                snapshot_every=0,
                keep_states=1,
                keep_every=0,
                best_metric=None,
                on_nonfinite="stop",
                max_skipped=0,
                profile=False,
            ),
            accelerator=accelerator,
            folder=folder,
            resume="auto",
            batch_size=2,
            model_step=lambda: None,
            tracker=lambda step, measured: Tracker(folder, step, 8.0, measured=measured, tensorboard=True),
            record=lambda step, seconds: None,
            requests=StopRequests(),
            seed=0,
        )
    return 1e3 * (times[-1] - times[0]) / (len(times) - 1)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file, for example benchmarks/results/loop.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = measure(options.steps, options.repeats)
    print(json.dumps(record, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
