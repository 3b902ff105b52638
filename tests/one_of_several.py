"""One of the processes of a small training run, started by a test: MICRO_BATCH_SIZE FOLDER."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from src.data.sampler import Batch
from src.training.device import make_accelerator
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


def main(micro_batch_size: int, folder: Path) -> None:
    """Trains for five steps and leaves this process's weights in the folder."""
    torch.manual_seed(0)
    stage = OneWeight()
    stage.modules = {"weight": Net()}
    accelerator, micro = make_accelerator(
        precision="no", tf32=False, batch_size=BATCH_SIZE, micro_batch_size=micro_batch_size
    )
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
                yield Batch(torch.stack(draws), torch.full((micro,), -1), positions)
            step += 1

    run(
        folder,
        batches,
        stage=stage,
        accelerator=accelerator,
        export=lambda name, module, step: None,
        batch_size=BATCH_SIZE,
        learning_rate=0.01,
        num_steps=5,
        log_every=1,
        clip_norm=1.0,
    )
    torch.save(stage.modules["weight"].state_dict(), folder / f"rank_{rank}_of_{world}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
