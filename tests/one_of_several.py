"""One of the processes of a small run, started by a test: MICRO_BATCH_SIZE FOLDER [STEPS [HOW …]]."""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from src.data.sampler import Batch
from src.stages.stage import Modules
from src.training import sharding
from src.training.device import leave, make_accelerator
from src.training.ema import Ema
from src.training.sharding import shard, whole_weights
from tests.unit.test_loop import OneWeight, run

BATCH_SIZE = 8


class Net(nn.Module):
    """Two layers, so that gradients have something to be rounded in."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``b 3 1 2 2`` to ``b 1 1 1 3``."""
        return self.layers(x).reshape(len(x), 1, 1, 1, 3)


class OneByOne(OneWeight):
    """Looks at all held-out clips before it measures."""

    def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
        """The sum of the weights."""
        for _ in batches:
            pass
        return super().evaluate(modules, batches)


def main(
    micro_batch_size: int,
    folder: Path,
    num_steps: int = 5,
    fsdp: bool = False,
    bad: bool = False,
    slow: bool = False,
) -> None:
    """Trains for some steps and leaves the weights, as this process has them, in the folder.

    With ``bad`` one clip of the third step isn't finite, and the step is skipped. With ``slow`` measuring
    takes a minute, and a file tells that it has begun.
    """
    torch.manual_seed(0)
    stage = OneByOne()
    stage.modules = {"weight": Net()}
    accelerator, micro = make_accelerator(
        precision="no", tf32=False, batch_size=BATCH_SIZE, micro_batch_size=micro_batch_size
    )
    averages = Ema(stage.modules, 0.9)
    if fsdp:
        sharding.SMALLEST_BLOCK = 1
        shard(stage.modules["weight"], accelerator, trained=True)
        shard(averages.modules["weight"], accelerator, trained=False)
    world, rank = accelerator.num_processes, accelerator.process_index

    def batches(step: int) -> Iterator[Batch]:
        share = BATCH_SIZE // world
        while True:
            for begin in range(rank * share, (rank + 1) * share, micro):
                positions = torch.arange(BATCH_SIZE * step + begin, BATCH_SIZE * step + begin + micro)
                draws = [
                    torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(position))
                    for position in positions.tolist()
                ]
                if bad and step == 2 and positions[0] == BATCH_SIZE * step:
                    draws[0] = draws[0] * torch.nan
                video = torch.stack(draws).to(accelerator.device)
                yield Batch(video, torch.full((micro,), -1), positions)
            step += 1

    def held_out() -> Iterator[Batch]:
        for batch in itertools.islice(batches(0), 300 if slow else 3):
            if slow:
                (folder / "measuring").touch()
                time.sleep(0.2)
            yield batch

    run(
        folder,
        batches,
        stage=stage,
        accelerator=accelerator,
        export=lambda name, weights, step: torch.save(weights, folder / f"{name}.pt"),
        batch_size=BATCH_SIZE,
        learning_rate=0.01,
        num_steps=num_steps,
        held_out=held_out,
        evaluate_every=2,
        averages=averages,
        on_nonfinite="skip" if bad else "stop",
        log_every=1,
        clip_norm=1.0,
    )
    torch.save(whole_weights(stage.modules["weight"]), folder / f"rank_{rank}_of_{world}.pt")


if __name__ == "__main__":
    _, micro, folder, *more = sys.argv
    main(
        int(micro),
        Path(folder),
        *map(int, more[:1]),
        fsdp="fsdp" in more,
        bad="bad" in more,
        slow="slow" in more,
    )
    leave(0)
