"""The 3D residual network R3D-18, trained on Kinetics-400, as torchvision has it.

Tran et al. 2018 (arXiv 1711.11248).
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from .torchvision_import import declare_torchvision_operators
from .weight_files import load_into, required

FILE = "r3d_18-b3b3357e.pth"
SIZE = 112
DIM = 512
MIN_FRAMES = 8  # time is halved three times
_NUM_CLASSES = 400
# Of the frames in [0, 1] that it was trained on, published with the weights.
_MEAN = (0.43216, 0.394666, 0.37645)
_DEVIATION = (0.22803, 0.22145, 0.216989)


class R3d18(nn.Module):
    """`(b 3 t 112 112)` in [-1, 1] → the mean over time and place before the classifier, `(b 512)`."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        declare_torchvision_operators()
        from torchvision.models.video import r3d_18

        self.network = r3d_18(weights=None, num_classes=_NUM_CLASSES)
        self.register_buffer("mean", rearrange(torch.tensor(_MEAN), "c -> c 1 1 1"), persistent=False)
        self.register_buffer(
            "deviation", rearrange(torch.tensor(_DEVIATION), "c -> c 1 1 1"), persistent=False
        )
        self.requires_grad_(False).eval()

    def forward(self, video: Tensor) -> Tensor:
        x = ((video + 1) / 2 - self.mean) / self.deviation
        x = self.network.stem(x)
        for layer in (self.network.layer1, self.network.layer2, self.network.layer3, self.network.layer4):
            x = layer(x)
        return x.mean((2, 3, 4))


def load_r3d_18(path: str | Path | None = None) -> R3d18:
    """The network with its trained weights, on the CPU.

    Args:
        path: torchvision's file of them.

    Raises:
        FileNotFoundError: without the file, saying where to get it.
        ValueError: if the file holds something else.
    """
    path = required(path, "r3d_18", f"https://download.pytorch.org/models/{FILE}")
    network = R3d18()
    load_into(network.network, path, f"torchvision's r3d_18 ({FILE})")
    return network
