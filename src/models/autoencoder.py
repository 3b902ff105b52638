"""The video autoencoder: clips to latents that are smaller in time and space, and back."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import (
    FrameGroupNorm,
    GroupNorm,
    SameConv3d,
    SameConvTranspose3d,
    Size3d,
    channels_last,
    upcast,
)

# Beyond these bounds the variance or its inverse leaves the range of single precision.
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class Posterior:
    """The Gaussian that the encoder gives for each latent number; mean and log-variance `b c t h w`."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """The standard deviation `b c t h w`."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """The reparametrized sample, mean + std · noise (Kingma & Welling 2014)."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence to the standard normal, summed over each clip's latents: `b`."""
        kl = 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)
        return kl.flatten(1).sum(1)


class LatentSpace(nn.Module):
    """What every autoencoder owns beside its network: the size and the moments of its latents.

    `latent_mean` and `latent_std` (`c`) are measured once, when the autoencoder has been trained, over
    posterior samples of training clips. Normalized latents are what diffusion sees.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, in_channels: int, latent_channels: int, downsample: Size3d) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.downsample = downsample
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def encode(self, video: Tensor) -> Posterior:
        """The posterior of the raw latents of a video `b c t h w`."""
        raise NotImplementedError

    def decode(self, raw_latents: Tensor) -> Tensor:
        """The video `b c t h w` of raw latents."""
        raise NotImplementedError

    @property
    def decoding_context(self) -> int | None:
        """How many latent frames on either side take part in the decoding of one; None if all do."""
        raise NotImplementedError

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The shape (c, t, h, w) of the latents of such a clip; ValueError if the clip can't be divided."""
        sizes = {"num_frames": num_frames, "height": height, "width": width}
        complaints = []
        for (name, size), factor in zip(sizes.items(), self.downsample, strict=True):
            if size < 1 or size % factor:
                below, above = size // factor * factor, (size // factor + 1) * factor
                nearest = f"{below} or {above}" if below >= factor else f"{above}"
                complaints.append(f"{name}={size} must be a multiple of {factor}; use {nearest}")
        if complaints:
            raise ValueError(
                f"the autoencoder divides (t, h, w) by {self.downsample}: " + "; ".join(complaints)
            )
        t, h, w = (size // factor for size, factor in zip(sizes.values(), self.downsample, strict=True))
        return self.latent_channels, t, h, w

    def normalize(self, raw_latents: Tensor) -> Tensor:
        """Raw latents `b c t h w` (what the encoder gives) to zero mean and unit deviation per channel."""
        return (raw_latents - self.latent_mean.view(-1, 1, 1, 1)) / self.latent_std.view(-1, 1, 1, 1)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalized latents `b c t h w` to raw ones (what the decoder takes)."""
        return latents * self.latent_std.view(-1, 1, 1, 1) + self.latent_mean.view(-1, 1, 1, 1)

    def check_video(self, video: Tensor) -> None:
        """Raises ValueError unless the tensor is a video `b c t h w` that can be divided."""
        if video.ndim != 5 or video.shape[1] != self.in_channels:
            raise ValueError(
                f"the autoencoder takes video (b, {self.in_channels}, t, h, w), got {tuple(video.shape)}"
            )
        self.latent_shape(*video.shape[2:])

    def check_latents(self, latents: Tensor) -> None:
        """Raises ValueError unless the tensor has the latents' shape `b c t h w`."""
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"the decoder takes latents (b, {self.latent_channels}, t, h, w), got {tuple(latents.shape)}"
            )


class ResBlock3d(nn.Module):
    """Two normalized 3×3×3 convolutions on top of the identity."""

    def __init__(self, channels: int, norm: "NormFactory") -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = SameConv3d(channels, channels, 3)
        self.norm2 = norm(channels)
        self.conv2 = SameConv3d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b c t h w` to itself."""
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


@dataclass(frozen=True)
class NormFactory:
    """How the autoencoder normalizes: over what, and in how many groups or groups of what width."""

    scope: Literal["clip", "frame"]
    groups: int | None
    channels_per_group: int | None

    def __post_init__(self) -> None:
        if self.scope not in ("clip", "frame"):
            raise ValueError(
                f"norm must be clip (statistics over t, h, w) or frame (over h, w), not {self.scope!r}"
            )
        if (self.groups is None) == (self.channels_per_group is None):
            raise ValueError(
                "exactly one of norm_groups and channels_per_group must be given, got "
                f"norm_groups={self.groups} and channels_per_group={self.channels_per_group}; set one to null"
            )

    def __call__(self, channels: int) -> GroupNorm:
        """A normalization of so many channels."""
        groups = self.groups or channels // (self.channels_per_group or 1)
        return {"clip": GroupNorm, "frame": FrameGroupNorm}[self.scope](groups, channels, eps=1e-6)


def stage_strides(downsample: Size3d, patch_size: Size3d) -> list[Size3d]:
    """The strides of each stage: an axis is halved in as many of the first stages as its factor asks.

    (4, 8, 8) gives (2, 2, 2), (2, 2, 2), (1, 2, 2). Raises ValueError if a factor isn't the patch size times
    a power of two.
    """
    halvings = []
    for axis, factor, patch in zip("thw", downsample, patch_size, strict=True):
        rest = factor / patch
        if rest < 1 or not math.log2(rest).is_integer():
            raise ValueError(
                f"downsample={downsample} must be patch_size={patch_size} times a power of two per axis; "
                f"on {axis} {factor}/{patch} isn't one"
            )
        halvings.append(int(math.log2(rest)))
    if max(halvings) == 0:
        raise ValueError(
            f"downsample={downsample} equals patch_size={patch_size}: nothing is left for strided stages; "
            "make the patch smaller on one axis at least"
        )
    return [
        (1 + (stage < halvings[0]), 1 + (stage < halvings[1]), 1 + (stage < halvings[2]))
        for stage in range(max(halvings))
    ]


class Encoder3d(nn.Module):
    """Strided convolutions with residual blocks, doubling the width as the size halves."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        strides: list[Size3d],
        blocks: int,
        norm: NormFactory,
    ) -> None:
        super().__init__()
        self.conv_in = SameConv3d(in_channels, hidden_channels, 3)
        self.stages = nn.ModuleList()
        channels = hidden_channels
        for stride in strides:
            down = SameConv3d(channels, 2 * channels, 4, stride)
            channels *= 2
            self.stages.append(nn.Sequential(down, *[ResBlock3d(channels, norm) for _ in range(blocks)]))
        self.norm_out = norm(channels)
        self.conv_out = SameConv3d(channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b c t h w` to features of the latents' size."""
        h = self.conv_in(x)
        for stage in self.stages:
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder3d(nn.Module):
    """Transposed convolutions with residual blocks, halving the width as the size doubles."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        strides: list[Size3d],
        blocks: int,
        norm: NormFactory,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        channels = in_channels
        for i, stride in enumerate(strides):
            width = hidden_channels * 2 ** (len(strides) - i)
            up = SameConvTranspose3d(channels, width, 4, stride)
            channels = width
            self.stages.append(nn.Sequential(up, *[ResBlock3d(channels, norm) for _ in range(blocks)]))
        self.conv_out = SameConv3d(channels, out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """Maps latents to `b c t h w`."""
        h = z
        for stage in self.stages:
            h = stage(h)
        return self.conv_out(h)


class Autoencoder3d(LatentSpace):
    """The 3-D convolutional variational autoencoder of LVDM (He et al. 2022, section 3.1).

    `downsample` is the total factor on (t, h, w); `patch_size` of it is taken by moving pixels into channels
    (a cheap stem for small machines; the paper has none), the rest by strided stages. `norm` says over what
    the groups' statistics run: `clip` over t, h, w (the paper), `frame` over h, w alone, which lets long
    latents be decoded in chunks without seams. The groups are counted by `norm_groups` or sized by
    `channels_per_group`. `z_channels` is the width between the network and the 1×1×1 convolutions at its
    waist (as the latents by default); `initial_logvar` is the posterior's log-variance at the start of
    training. Raises ValueError on sizes that can't be.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        hidden_channels: int = 32,
        latent_channels: int = 4,
        z_channels: int | None = None,
        downsample: Size3d = (4, 8, 8),
        encoder_blocks: int = 1,
        decoder_blocks: int = 2,
        patch_size: Size3d = (1, 1, 1),
        norm: Literal["clip", "frame"] = "clip",
        norm_groups: int | None = 32,
        channels_per_group: int | None = None,
        initial_logvar: float = 0.0,
    ) -> None:
        pt, ph, pw = patch_size
        super().__init__(in_channels, latent_channels, (downsample[0], downsample[1], downsample[2]))
        self.patch_size = (pt, ph, pw)
        self.norm = norm
        z_channels = latent_channels if z_channels is None else z_channels
        strides = stage_strides(self.downsample, self.patch_size)
        normalization = NormFactory(norm, norm_groups, channels_per_group)
        patch_channels = in_channels * pt * ph * pw

        self.encoder = Encoder3d(
            patch_channels, hidden_channels, 2 * z_channels, strides, encoder_blocks, normalization
        )
        self.to_moments = SameConv3d(2 * z_channels, 2 * latent_channels, 1)
        self.from_latents = SameConv3d(latent_channels, z_channels, 1)
        self.decoder = Decoder3d(
            z_channels, hidden_channels, patch_channels, strides, decoder_blocks, normalization
        )
        with torch.no_grad():
            assert self.to_moments.bias is not None
            self.to_moments.bias[latent_channels:] = initial_logvar

    def encode(self, video: Tensor) -> Posterior:
        """The posterior of the raw latents of a video in [-1, 1]; ValueError if its size doesn't divide."""
        self.check_video(video)
        pt, ph, pw = self.patch_size
        patches = rearrange(video, "b c (t pt) (h ph) (w pw) -> b (c pt ph pw) t h w", pt=pt, ph=ph, pw=pw)
        moments = upcast(self.to_moments(self.encoder(channels_last(patches))))
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def decode(self, raw_latents: Tensor) -> Tensor:
        """The video `b c t h w` of raw latents; nothing bounds it to [-1, 1]."""
        self.check_latents(raw_latents)
        pt, ph, pw = self.patch_size
        patches = upcast(self.decoder(self.from_latents(channels_last(raw_latents))))
        return rearrange(patches, "b (c pt ph pw) t h w -> b c (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw)

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """The reconstruction from a posterior sample, and the posterior; noise has the latents' shape."""
        posterior = self.encode(video)
        return self.decode(posterior.sample(noise)), posterior

    @property
    def decoding_context(self) -> int | None:
        """How many latent frames on either side take part in the decoding of one; None if all do.

        With `norm=clip` the statistics of normalization span the whole clip.
        """
        if self.norm == "clip":
            return None
        first, last = 0, self.downsample[0] // self.patch_size[0] - 1
        for layer in reversed(list(self.decoder.modules())):
            if isinstance(layer, SameConv3d):
                reach = layer.kernel_size[0] // 2
                first, last = first - reach, last + reach
            elif isinstance(layer, SameConvTranspose3d):
                stride, front = layer.stride[0], layer.pads[-2]
                first = -(-first // stride) - front
                last = (last + layer.kernel_size[0] - 1) // stride - front
        return max(-first, last)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, at which the adversarial loss is balanced."""
        return self.decoder.conv_out.weight


class IdentityAutoencoder3d(LatentSpace):
    """No compression at all: diffusion in pixel space (Ho et al. 2022) through the same interface."""

    def __init__(self, *, in_channels: int = 3) -> None:
        super().__init__(in_channels, in_channels, (1, 1, 1))

    @property
    def decoding_context(self) -> int | None:
        """None is needed: frames are decoded one by one."""
        return 0

    def encode(self, video: Tensor) -> Posterior:
        """The video itself, without deviation."""
        self.check_video(video)
        return Posterior(video, torch.full_like(video, -math.inf))

    def decode(self, raw_latents: Tensor) -> Tensor:
        """The latents themselves."""
        self.check_latents(raw_latents)
        return raw_latents

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """The video, and its posterior without deviation."""
        posterior = self.encode(video)
        return self.decode(posterior.sample(noise)), posterior
