"""The Kinetics-400 I3D network on whose logits videos are compared.

Carreira and Zisserman 2017 (arXiv 1705.07750). Its trained weights come from `metrics.i3d_weights`.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from .precision import full_precision

SIZE = 224
MIN_FRAMES = 9
NUM_CLASSES = 400
# Channels of the inception blocks: plain 1x1x1 | 1x1x1, then 3x3x3 | 1x1x1, then 3x3x3 | after pooling.
WIDTHS = {
    "stage_3": {"b": (64, 96, 128, 16, 32, 32), "c": (128, 128, 192, 32, 96, 64)},
    "stage_4": {
        "b": (192, 96, 208, 16, 48, 64),
        "c": (160, 112, 224, 24, 64, 64),
        "d": (128, 128, 256, 24, 64, 64),
        "e": (112, 144, 288, 32, 64, 64),
        "f": (256, 160, 320, 32, 128, 128),
    },
    "stage_5": {"b": (256, 160, 320, 32, 128, 128), "c": (384, 192, 384, 48, 128, 128)},
}


class SameConv3d(nn.Conv3d):
    """Convolution with TensorFlow's SAME padding, then a rectifier; batch norm lies in its weights."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride)
        self.weight = nn.Parameter(self.weight.contiguous(memory_format=torch.channels_last_3d))

    def forward(self, x: Tensor) -> Tensor:
        """`(b c t h w)` → `(b c t h w)`, in channels_last_3d, where pooling is ten times faster."""
        if self.kernel_size == (1, 1, 1):
            x = F.linear(rearrange(x, "b c t h w -> b t h w c"), self.weight.flatten(1), self.bias)
            return rearrange(x.relu_(), "b t h w c -> b c t h w")
        sizes = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        pads = [same_padding(n, k, s) for n, k, s in sizes]
        if any(before != after for before, after in pads):
            x = F.pad(x, [p for pad in reversed(pads) for p in pad])
            pads = [(0, 0)] * 3
        x = F.conv3d(x, self.weight, self.bias, self.stride, [before for before, _ in pads])
        return x.relu_().contiguous(memory_format=torch.channels_last_3d)


def same_padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis that shall end with ⌈length / stride⌉ values; an odd one goes after."""
    total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


def same_max_pool3d(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Max pooling with TensorFlow's SAME padding.

    A surplus of padding behind the end is what `ceil_mode` means, and nothing is copied.
    """
    sizes = zip(x.shape[2:], kernel, stride, strict=True)
    before = [same_padding(n, k, s)[0] for n, k, s in sizes]
    return F.max_pool3d(x, kernel, stride, padding=before, ceil_mode=True)


class Inception3d(nn.Module):
    """Four views of one input side by side: 1x1x1, two of 3x3x3 behind a bottleneck, one behind pooling."""

    def __init__(self, in_channels: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        plain, wide_in, wide, narrow_in, narrow, pooled = widths
        self.plain = SameConv3d(in_channels, plain, 1)
        self.wide_in, self.wide = SameConv3d(in_channels, wide_in, 1), SameConv3d(wide_in, wide, 3)
        self.narrow_in, self.narrow = SameConv3d(in_channels, narrow_in, 1), SameConv3d(narrow_in, narrow, 3)
        self.pooled = SameConv3d(in_channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The largest of a box, axis by axis: 9 comparisons in place of 27.
        pooled = x
        for along in ((1, 1, 3), (1, 3, 1), (3, 1, 1)):
            pooled = same_max_pool3d(pooled, along, (1, 1, 1))
        branches = [
            self.plain(x),
            self.wide(self.wide_in(x)),
            self.narrow(self.narrow_in(x)),
            self.pooled(pooled),
        ]
        return torch.cat(branches, 1)


class I3d(nn.Module):
    """Inflated Inception-v1: `(b 3 t 224 224)` in [-1, 1] → Kinetics-400 logits, mean over time `(b 400)`.

    For inference only: frozen, without dropout, batch normalization folded into the convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_1a = SameConv3d(3, 64, 7, stride=2)
        self.conv_2b = SameConv3d(64, 64, 1)
        self.conv_2c = SameConv3d(64, 192, 3)
        self.stage_3 = _stage(192, "stage_3")
        self.stage_4 = _stage(480, "stage_4")
        self.stage_5 = _stage(832, "stage_5")
        self.logits = nn.Linear(1024, NUM_CLASSES)
        self.requires_grad_(False).eval()

    def pooled(self, video: Tensor) -> Tensor:
        """What the logits are a linear function of: `(b 3 t 224 224)` → `(b 1024 t')`."""
        self._check(video)
        x = video.contiguous(memory_format=torch.channels_last_3d)
        x = same_max_pool3d(self.conv_1a(x), (1, 3, 3), (1, 2, 2))
        x = same_max_pool3d(self.conv_2c(self.conv_2b(x)), (1, 3, 3), (1, 2, 2))
        x = same_max_pool3d(self.stage_3(x), (3, 3, 3), (2, 2, 2))
        x = same_max_pool3d(self.stage_4(x), (2, 2, 2), (2, 2, 2))
        x = self.stage_5(x)
        return rearrange(F.avg_pool3d(x, (2, 7, 7), stride=1), "b c t 1 1 -> b c t")

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        self._check(video)
        with full_precision(video.device):
            return self.logits(reduce(self.pooled(video.float()), "b c t -> b c", "mean"))

    def _check(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[3:] != (SIZE, SIZE):
            raise ValueError(
                f"I3D takes videos (b, 3, t, {SIZE}, {SIZE}), got {tuple(video.shape)}; "
                "metrics.features.i3d_features resizes"
            )
        if video.shape[2] < MIN_FRAMES:
            raise ValueError(
                f"I3D needs at least {MIN_FRAMES} frames, got {video.shape[2]}; use longer clips"
            )


def _stage(channels: int, name: str) -> nn.Sequential:
    blocks = nn.Sequential()
    for letter, widths in WIDTHS[name].items():
        blocks.add_module(letter, Inception3d(channels, widths))
        channels = sum(widths[i] for i in (0, 2, 4, 5))
    return blocks
