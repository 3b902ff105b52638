"""The Inception-v3 network of the Fréchet inception distance, which looks at single frames.

Szegedy et al. 2016 (arXiv 1512.00567) in the form that Heusel et al. 2017 (arXiv 1706.08500) took for the
distance: TensorFlow's model of 2015-12-05 with 1008 classes. It differs from torchvision's in its pooling:
averages don't count the padding, and the last block takes the maximum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from .torchvision_import import declare_torchvision_operators
from .weight_files import load_into, required

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SIZE = 299
DIM = 2048
_NUM_CLASSES = 1008


class InceptionV3(nn.Module):
    """`(b 3 t 299 299)` in [-1, 1] → what comes before the classifier, of each frame, `(b t 2048)`."""

    def __init__(self) -> None:
        super().__init__()
        declare_torchvision_operators()
        from torchvision.models import inception_v3

        self.network = inception_v3(
            weights=None, num_classes=_NUM_CLASSES, aux_logits=False, init_weights=False
        )
        self.requires_grad_(False).eval()

    def forward(self, video: Tensor) -> Tensor:
        net: Any = self.network
        x = rearrange(video, "b c t h w -> (b t) c h w")
        x = _through(x, net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3)
        x = F.max_pool2d(x, 3, stride=2)
        x = _through(x, net.Conv2d_3b_1x1, net.Conv2d_4a_3x3)
        x = F.max_pool2d(x, 3, stride=2)
        for block in (net.Mixed_5b, net.Mixed_5c, net.Mixed_5d):
            x = _block_35(block, x)
        x = net.Mixed_6a(x)
        for block in (net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e):
            x = _block_17(block, x)
        x = net.Mixed_7a(x)
        x = _block_8(net.Mixed_7b, x, _average(x))
        x = _block_8(net.Mixed_7c, x, F.max_pool2d(x, 3, stride=1, padding=1))
        return reduce(x, "(b t) d h w -> b t d", "mean", b=len(video))


def _through(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _average(x: Tensor) -> Tensor:
    """The mean of each pixel's 3×3 neighbourhood, of those that exist, as TensorFlow computes it."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _block_35(block: Any, x: Tensor) -> Tensor:
    """The blocks on the 35×35 grid, on torchvision's `InceptionA`."""
    branches = [
        block.branch1x1(x),
        _through(x, block.branch5x5_1, block.branch5x5_2),
        _through(x, block.branch3x3dbl_1, block.branch3x3dbl_2, block.branch3x3dbl_3),
        block.branch_pool(_average(x)),
    ]
    return torch.cat(branches, 1)


def _block_17(block: Any, x: Tensor) -> Tensor:
    """The blocks on the 17×17 grid, on torchvision's `InceptionC`."""
    doubled = [getattr(block, f"branch7x7dbl_{i}") for i in range(1, 6)]
    branches = [
        block.branch1x1(x),
        _through(x, block.branch7x7_1, block.branch7x7_2, block.branch7x7_3),
        _through(x, *doubled),
        block.branch_pool(_average(x)),
    ]
    return torch.cat(branches, 1)


def _block_8(block: Any, x: Tensor, pooled: Tensor) -> Tensor:
    """The blocks on the 8×8 grid, on torchvision's `InceptionE`."""
    single = block.branch3x3_1(x)
    double = _through(x, block.branch3x3dbl_1, block.branch3x3dbl_2)
    branches = [
        block.branch1x1(x),
        block.branch3x3_2a(single),
        block.branch3x3_2b(single),
        block.branch3x3dbl_3a(double),
        block.branch3x3dbl_3b(double),
        block.branch_pool(pooled),
    ]
    return torch.cat(branches, 1)


def load_inception(path: str | Path | None = None) -> InceptionV3:
    """The network with its trained weights, on the CPU.

    Args:
        path: pytorch-fid's file of them.

    Raises:
        FileNotFoundError: without the file, saying where to get it.
        ValueError: if the file holds something else.
    """
    path = required(path, "the FID's Inception-v3", URL)
    network = InceptionV3()
    load_into(network.network, path, f"the FID's Inception-v3 ({FILE})")
    return network
