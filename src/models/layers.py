"""Layers that the networks share: same-size 3-D convolutions, convolutions inside frames, normalization."""

from collections.abc import Callable
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Size3d = tuple[int, int, int]
Layer = TypeVar("Layer", bound=nn.Module)


def upcast(x: Tensor) -> Tensor:
    """The tensor in at least single precision, for sums that half precision would spoil."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def zero_initialized(layer: Layer) -> Layer:
    """The layer with all parameters at zero, so that the residual branch that it ends begins as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group normalization over `b c *`, its statistics in at least single precision (Wu & He 2018).

    Raises ValueError if the channels don't divide into the groups.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"{num_channels} channels can't be split into {num_groups} normalization groups; choose a "
                f"number of groups that divides {num_channels}, or widths that are multiples of {num_groups}"
            )
        super().__init__(num_groups, num_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes `b c *`; the type and the memory layout stay."""
        if x.dtype == self.weight.dtype:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)
        weight, bias = upcast(self.weight), upcast(self.bias)
        return F.group_norm(upcast(x), self.num_groups, weight, bias, self.eps).to(x.dtype)


class FrameGroupNorm(GroupNorm):
    """Group normalization of a video with each frame's own statistics, so that it can be cut in time."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes `b c t h w`."""
        if torch.compiler.is_compiling():
            # The compiler of some versions of PyTorch fails at frames folded into the batch.
            groups = upcast(x).unflatten(1, (self.num_groups, -1))
            variance, mean = torch.var_mean(groups, dim=(2, 4, 5), keepdim=True, correction=0)
            normal = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
            weight, bias = (upcast(p).view(-1, 1, 1, 1) for p in (self.weight, self.bias))
            return torch.addcmul(bias, normal, weight).to(x.dtype)
        frames = super().forward(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])


def same_padding(kernel_size: Size3d, stride: Size3d) -> tuple[int, ...]:
    """The padding (w front, w back, h front, …) under which a convolution divides a size by its stride.

    An odd total gives the front one more, as in the released LVDM code.
    """
    pads: list[int] = []
    for k, s in zip(reversed(kernel_size), reversed(stride), strict=True):
        total = k - s
        pads += [total // 2 + total % 2, total // 2]
    return tuple(pads)


def pad_replicate(x: Tensor, pads: tuple[int, ...]) -> Tensor:
    """Repeats the border of `b c t h w` outwards."""
    return F.pad(x, pads, mode="replicate") if any(pads) else x


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


class SameConv3d(nn.Conv3d):
    """A 3-D convolution that repeats the border and divides each size by its stride."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: Size3d = (1, 1, 1)
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.pads = same_padding((kernel_size,) * 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b c t h w` to `b c t/s h/s w/s`.

        PyTorch gives a single small clip on a CPU to a kernel that takes eight times as long as the one for
        several (16 channels of 50 frames of 18×18 on an AMD EPYC: 7.2 and 0.9 ms); the latter is called here.
        """
        x = pad_replicate(x, self.pads)
        if _takes_onednn(x, self.weight) and len(x) == 1:
            result: Tensor = torch.ops.aten.mkldnn_convolution(
                x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
            )
            return result
        return super().forward(x)


class SameConvTranspose3d(nn.ConvTranspose3d):
    """A transposed 3-D convolution that repeats the border and multiplies each size by its stride."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: Size3d) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size - 1)
        self.pads = same_padding((kernel_size,) * 3, stride)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps `b c t h w` to `b c t·s h·s w·s`."""
        return super().forward(pad_replicate(x, self.pads), output_size)


class FrameConv3d(nn.Conv2d):
    """A 3×3 convolution inside each frame of `b c t h w`, optionally of stride 2: a (1,3,3) convolution.

    It is computed as a 2-D convolution of the frames: the same numbers as the 3-D one's, without the slow and
    (in bfloat16, on some versions of cuDNN) faulty kernels of the latter. The weight `d c 3 3` is that of a
    Conv2d, in memory as `d 3 3 c`: the layout that kernels for channels_last want, else each pass copies it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1)
        self.weight = nn.Parameter(self.weight.detach().contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b c t h w` to `b c t h/s w/s`; channels_last_3d stays so."""
        return unfold_frames(self.convolve(fold_frames(x)), x.shape[0])

    def convolve(self, frames: Tensor) -> Tensor:
        """Maps frames `n c h w` to `n d h/s w/s`.

        On a CPU, where a wide weight meets few positions, the convolution's kernel spends its time on
        rearranging the weight, and a product of patches is faster. Measured on two cores, forward and
        backward, convolution and product, on an Intel Xeon: 1024 to 1024 channels at 4 frames of 4×4, 71 and
        22 ms; 768 to 768 at 4 frames of 8×8, 30 and 26. On an AMD EPYC: 1792 to 1024 at 4×4, 54 and 43 ms;
        768 to 768 at 8×8, 24 and 45. A weight that isn't in memory as `d 3 3 c` costs more with either.
        """
        positions = frames.shape[0] * frames.shape[2] * frames.shape[3] // (self.stride[0] * self.stride[1])
        if not frames.is_cpu or 8 * positions > self.out_channels:
            return super().forward(frames)
        padded = F.pad(frames.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        patches = padded.unfold(1, 3, self.stride[0]).unfold(2, 3, self.stride[1])
        patches = rearrange(patches, "n h w c i j -> n h w (i j c)")
        weight = rearrange(self.weight, "d c i j -> d (i j c)")
        return F.linear(patches, weight, self.bias).permute(0, 3, 1, 2)


def fold_frames(x: Tensor) -> Tensor:
    """`b c t h w -> (b t) c h w`: a view if the memory is channels_last_3d."""
    return rearrange(x, "b c t h w -> (b t) c h w")


def unfold_frames(x: Tensor, batch: int) -> Tensor:
    """`(b t) c h w -> b c t h w`: a view that is channels_last_3d if the frames were channels_last."""
    return rearrange(x, "(b t) c h w -> b c t h w", b=batch)


def unet_conv(temporal_kernel: int) -> Callable[..., nn.Module]:
    """The constructor of a U-Net's 3-wide convolutions: inside frames (1) or across three of them (3)."""
    if temporal_kernel == 1:
        return FrameConv3d
    if temporal_kernel == 3:
        return VideoConv3d
    raise ValueError(f"temporal_kernel must be 1 (inside frames) or 3 (joint), not {temporal_kernel}")


class VideoConv3d(nn.Conv3d):
    """A 3×3×3 convolution of `b c t h w` padded with zeros, optionally of stride 2 in space."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, (1, stride, stride), padding=1)


# From so many rows and weights on, a CPU's convolution kernel is worth its call.
MANY_ROWS, MANY_WEIGHTS = 256, 2**16


class Linear(nn.Linear):
    """A linear layer over the last axis of `* c`.

    On a CPU a large one is computed by the kernel of a 1×1 convolution, which knows wider vectors than some
    matrix libraries use. Measured on two cores of an AMD EPYC, forward and backward, linear and convolution:
    1024 rows of 512 to 1536 channels, 23.5 and 11.2 ms; 64 rows of 1024 to 1024, 2.4 and 3.0.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps `* c` to `* d`."""
        rows = x.numel() // self.in_features
        if not x.is_cpu or rows < MANY_ROWS or self.weight.numel() < MANY_WEIGHTS:
            return super().forward(x)
        column = x.reshape(1, rows, 1, self.in_features).permute(0, 3, 1, 2)
        product = F.conv2d(column, self.weight[:, :, None, None], self.bias)
        return product.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


class PointConv3d(Linear):
    """A 1×1×1 convolution, computed as a matrix product (without copies in channels_last_3d)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b c t h w` to `b d t h w`."""
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def channels_last(x: Tensor) -> Tensor:
    """`b c t h w` in memory as `b t h w c`, which makes folding the frames into the batch a free view."""
    return x.contiguous(memory_format=torch.channels_last_3d)
