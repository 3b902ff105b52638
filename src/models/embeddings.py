"""Numbers as vectors: sinusoids of the diffusion time, rows of tables for labels and noise levels."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoidal_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal position encoding `b -> b width`, [cos | sin], of frequencies 10000^(-k/half).

    Source: Vaswani et al. 2017, section 3.5, in the order of DDPM's successors; an odd width ends in a zero.
    Computed in at least single precision.
    """
    half = width // 2
    dtype = torch.float64 if timesteps.dtype == torch.float64 else torch.float32
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(steps * (-math.log(10000.0) / half)).to(dtype)
    angles = timesteps.to(dtype)[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class OptionalEmbedding(nn.Embedding):
    """Rows of a table for the indices `b`; the index -1 stands for "not told" and gives zeros."""

    def forward(self, index: Tensor) -> Tensor:
        """Maps int64 `b` to `b width`."""
        return super().forward(index.clamp(min=0)) * (index >= 0)[:, None]
