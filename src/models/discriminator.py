"""The patch discriminator of the adversarial autoencoder."""

from typing import Literal

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

KERNEL_SIZE = 4


class PatchDiscriminator(nn.Module):
    """Tells real from reconstructed patches of single frames (PatchGAN, Isola et al. 2017).

    `n_layers` strided convolutions, doubling `width` up to eight times it, then two of stride 1. `norm` is
    `group`, which treats every frame alone and so doesn't depend on the batch, or `batch`, as in the
    original. Weights start at N(0, 0.02).
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        width: int = 64,
        n_layers: int = 3,
        norm: Literal["group", "batch"] = "group",
        norm_groups: int = 8,
    ) -> None:
        super().__init__()
        if norm not in ("group", "batch"):
            raise ValueError(f"norm must be group or batch, not {norm!r}")
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, not {n_layers}")
        self.in_channels = in_channels
        widths = [width * min(2**n, 8) for n in range(n_layers + 1)]
        strides = [2] * n_layers + [1]

        self.conv_in = nn.Conv2d(in_channels, widths[0], KERNEL_SIZE, strides[0], padding=1)
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for before, after, stride in zip(widths[:-1], widths[1:], strides[1:], strict=True):
            self.convs.append(nn.Conv2d(before, after, KERNEL_SIZE, stride, padding=1, bias=False))
            self.norms.append(nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(norm_groups, after))
        self.conv_out = nn.Conv2d(widths[-1], 1, KERNEL_SIZE, 1, padding=1)
        self.min_size = smallest_input([*strides, 1])
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `n 1 h' w'` of frames `n c h w`, or of a video `b c t h w`, frame by frame.

        Raises ValueError if the frames are smaller than one patch.
        """
        frames = rearrange(x, "b c t h w -> (b t) c h w") if x.ndim == 5 else x
        if frames.ndim != 4 or frames.shape[1] != self.in_channels:
            raise ValueError(
                f"the discriminator takes frames (n, {self.in_channels}, h, w) or video "
                f"(b, {self.in_channels}, t, h, w), got {tuple(x.shape)}"
            )
        if min(frames.shape[2:]) < self.min_size:
            raise ValueError(
                f"frames of {tuple(frames.shape[2:])} are too small for the discriminator: "
                f"with n_layers={len(self.convs)} it needs {self.min_size} pixels per side; use fewer layers"
            )
        h = F.leaky_relu(self.conv_in(frames), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.conv_out(h)


def smallest_input(strides: list[int]) -> int:
    """The smallest side that 4-wide convolutions of these strides, each padded by 1, map to one number."""
    size = 1
    for stride in reversed(strides):
        size = (size - 1) * stride + KERNEL_SIZE - 2
    return size


def initialize(module: nn.Module) -> None:
    """Draws weights from N(0, 0.02) and scales from N(1, 0.02), with biases of normalizations at zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
