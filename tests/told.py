"""A network that remembers what it was told, and the process that it stands in."""

import torch
from torch import Tensor, nn

from src.diffusion import noise_schedule
from src.diffusion.parameterization import Parameterization

PROCESS = Parameterization(noise_schedule.linear(1000, 0.0015, 0.0155), "epsilon")


class Told(nn.Module):
    """Predicts zero and remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.told: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor, timesteps: Tensor, **told: Tensor) -> Tensor:
        self.told.append({"x": x, "timesteps": timesteps, **told})
        return self.weight * x
