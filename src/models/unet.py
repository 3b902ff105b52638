"""The denoising network: a U-Net over space whose frames meet in attention and in normalization."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from .embeddings import OptionalEmbedding, sinusoidal_embedding
from .layers import (
    GroupNorm,
    PointConv3d,
    channels_last,
    unet_conv,
    upcast,
    zero_initialized,
)

NORM_EPS = 1e-5

Resampling = Literal["conv", "pool", "residual"]


class ResBlock(nn.Module):
    """A residual block of two 3×3 convolutions, told the time embedding before the second one.

    The embedding scales and shifts the second normalization (adaptive group normalization, Dhariwal & Nichol
    2021) or, with `scale_shift_norm` off, is added ahead of it. `resample` changes the size between the first
    normalization and its convolution, and that of the skip connection. The second convolution starts at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        norm_groups: int,
        scale_shift_norm: bool,
        dropout: float,
        temporal_kernel: int,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        conv = unet_conv(temporal_kernel)
        self.scale_shift_norm = scale_shift_norm
        self.norm1 = GroupNorm(norm_groups, in_channels, NORM_EPS)
        self.resample = resample
        self.conv1 = conv(in_channels, out_channels)
        self.embedding = nn.Linear(embedding_channels, (2 if scale_shift_norm else 1) * out_channels)
        self.norm2 = GroupNorm(norm_groups, out_channels, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_initialized(conv(out_channels, out_channels))
        self.skip = PointConv3d(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps `b c t h w` and the activated embedding `b t e` (t may be 1) to `b d t h' w'`."""
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        told = self.embedding(embedding).transpose(1, 2)[..., None, None]
        if self.scale_shift_norm:
            scale, shift = told.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + told)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class AveragePool(nn.Module):
    """Halves height and width of `b c t h w` by averaging."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b c t h w` to `b c t h/2 w/2`."""
        return F.avg_pool3d(x, (1, 2, 2))


class NearestUpsample(nn.Module):
    """Doubles height and width of `b c t h w` by repetition."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b c t h w` to `b c t 2h 2w`."""
        return F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")


class Step(nn.Module):
    """One step of the U-Net: a residual block if any, attention if any, a change of size if any."""

    def __init__(
        self,
        block: ResBlock | None = None,
        attention: nn.Module | None = None,
        resize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.resize = resize

    def forward(self, x: Tensor, embedding: Tensor, recompute: bool) -> Tensor:
        """Maps `b c t h w` to the next activation; `recompute` trades time for the block's memory."""
        if self.block is not None:
            if recompute:
                x = recompute_in_backward(self.block, x, embedding, use_reentrant=False)
            else:
                x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if isinstance(self.resize, ResBlock):
            return self.resize(x, embedding)
        return x if self.resize is None else self.resize(x)


class UNet3d(nn.Module):
    """Predicts noise, v or clean latents from noisy latents: LVDM's U-Net (He et al. 2022, section 3.2).

    Levels have `model_channels * channel_mult` channels and halve height and width from one to the next; time
    is never shortened. Attention, built by `attention(channels=, num_heads=, head_channels=, norm_groups=)`,
    stands after the residual blocks of the levels whose downsampling is listed in `attention_downsamples`,
    and in the middle. Convolutions stay inside frames (`temporal_kernel=1`) or span three (`3`). `resampling`
    is by strided convolution, by pooling and repetition alone, or inside residual blocks.

    What may be told beside the time: `mask_channel` adds an input channel that marks given frames;
    `num_noise_levels` rows say how strongly those were perturbed; `num_classes` rows name the class;
    `num_strides` rows say how far apart frames lie; `frame_noise_embedding` tells the perturbation only at
    the given frames, in the time's place (a route in the released code that no released model took).
    `checkpoint` recomputes residual blocks in the backward pass.

    Raises ValueError on sizes that can't be.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: tuple[int, ...],
        num_res_blocks: int,
        attention_downsamples: tuple[int, ...] = (2, 4, 8),
        attention: Callable[..., nn.Module],
        num_heads: int | None = None,
        head_channels: int | None = None,
        norm_groups: int = 32,
        scale_shift_norm: bool = True,
        temporal_kernel: int = 1,
        resampling: Resampling = "conv",
        mask_channel: bool = False,
        num_noise_levels: int = 0,
        num_classes: int = 0,
        num_strides: int = 0,
        frame_noise_embedding: bool = False,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if not channel_mult or channel_mult[0] != 1:
            raise ValueError(
                f"channel_mult must begin with 1, got {list(channel_mult)}; scale model_channels instead"
            )
        if resampling not in ("conv", "pool", "residual"):
            raise ValueError(f"resampling must be conv, pool or residual, not {resampling!r}")
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.mask_channel = mask_channel
        self.num_noise_levels = num_noise_levels
        self.num_classes = num_classes
        self.num_strides = num_strides
        self.checkpoint = checkpoint
        self.size_multiple = 2 ** (len(channel_mult) - 1)

        conv = unet_conv(temporal_kernel)
        width = 4 * model_channels

        def res_block(before: int, after: int, resample: nn.Module | None = None) -> ResBlock:
            return ResBlock(
                before,
                after,
                width,
                norm_groups=norm_groups,
                scale_shift_norm=scale_shift_norm,
                dropout=dropout,
                temporal_kernel=temporal_kernel,
                resample=resample,
            )

        def attend(channels: int) -> nn.Module:
            return attention(
                channels=channels, num_heads=num_heads, head_channels=head_channels, norm_groups=norm_groups
            )

        def attention_at(rate: int, channels: int) -> nn.Module | None:
            return attend(channels) if rate in attention_downsamples else None

        def downsampler(channels: int) -> nn.Module:
            if resampling == "residual":
                return res_block(channels, channels, AveragePool())
            return conv(channels, channels, stride=2) if resampling == "conv" else AveragePool()

        def upsampler(channels: int) -> nn.Module:
            if resampling == "residual":
                return res_block(channels, channels, NearestUpsample())
            if resampling == "conv":
                return nn.Sequential(NearestUpsample(), conv(channels, channels))
            return NearestUpsample()

        self.time_embedding = time_mlp(model_channels, width)
        self.noise_level_embedding = OptionalEmbedding(num_noise_levels, width) if num_noise_levels else None
        self.label_embedding = OptionalEmbedding(num_classes, width) if num_classes else None
        self.stride_embedding = OptionalEmbedding(num_strides, width) if num_strides else None
        self.frame_noise_embedding = time_mlp(model_channels, width) if frame_noise_embedding else None

        self.conv_in = conv(in_channels + mask_channel, model_channels)
        channels, rate = model_channels, 1
        skips = [channels]

        self.down = nn.ModuleList()
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                block = res_block(channels, mult * model_channels)
                channels = mult * model_channels
                self.down.append(Step(block, attention_at(rate, channels)))
                skips.append(channels)
            if level < len(channel_mult) - 1:
                self.down.append(Step(resize=downsampler(channels)))
                skips.append(channels)
                rate *= 2

        self.middle = nn.ModuleList(
            [Step(res_block(channels, channels), attend(channels)), Step(res_block(channels, channels))]
        )

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                block = res_block(channels + skips.pop(), mult * model_channels)
                channels = mult * model_channels
                last = level > 0 and i == num_res_blocks
                self.up.append(
                    Step(block, attention_at(rate, channels), upsampler(channels) if last else None)
                )
            rate //= 2

        self.norm_out = GroupNorm(norm_groups, channels, NORM_EPS)
        self.conv_out = zero_initialized(conv(channels, out_channels))

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        *,
        mask: Tensor | None = None,
        noise_level: Tensor | None = None,
        label: Tensor | None = None,
        frame_noise_level: Tensor | None = None,
        stride: Tensor | None = None,
    ) -> Tensor:
        """The prediction `b c t h w` for noisy latents `b c t h w` at diffusion times `b`.

        May be None: `mask` (`b 1 t h w`, 1 at given frames; None stands for zeros), `noise_level`, `label`
        and `stride` (int64 `b`, -1 where not told), `frame_noise_level` (int64 `b t`, -1 at frames that
        aren't given).
        Raises ValueError on shapes that don't fit, or on something told that the network has no ear for.
        """
        self.check(noisy_latents, timesteps, mask, noise_level, label, frame_noise_level, stride)
        x = noisy_latents
        if self.mask_channel:
            shown = torch.zeros_like(x[:, :1]) if mask is None else mask.to(x.dtype)
            x = torch.cat([x, shown], dim=1)
        embedding = F.silu(self.embed(timesteps, noise_level, label, frame_noise_level, stride))

        x = self.conv_in(channels_last(x))
        skips = [x]
        recompute = self.checkpoint and torch.is_grad_enabled()
        for step in self.down:
            x = step(x, embedding, recompute)
            skips.append(x)
        for step in self.middle:
            x = step(x, embedding, recompute)
        for step in self.up:
            x = step(torch.cat([x, skips.pop()], dim=1), embedding, recompute)
        return upcast(self.conv_out(F.silu(self.norm_out(x))))

    def embed(
        self,
        timesteps: Tensor,
        noise_level: Tensor | None,
        label: Tensor | None,
        frame_noise_level: Tensor | None,
        stride: Tensor | None = None,
    ) -> Tensor:
        """All that the blocks are told beside the latents, `b t e`; t is 1 if frames are told the same."""
        embedding = self.embed_time(self.time_embedding, timesteps)[:, None]
        if frame_noise_level is not None and self.frame_noise_embedding is not None:
            of_given = self.embed_time(self.frame_noise_embedding, frame_noise_level)
            embedding = torch.where((frame_noise_level >= 0)[..., None], of_given, embedding)
        if noise_level is not None and self.noise_level_embedding is not None:
            embedding = embedding + self.noise_level_embedding(noise_level)[:, None]
        if label is not None and self.label_embedding is not None:
            embedding = embedding + self.label_embedding(label)[:, None]
        if stride is not None and self.stride_embedding is not None:
            embedding = embedding + self.stride_embedding(stride)[:, None]
        return embedding

    def embed_time(self, mlp: nn.Module, times: Tensor) -> Tensor:
        """Diffusion times `…` as vectors `… e`."""
        sinusoids = sinusoidal_embedding(times.flatten(), self.model_channels).to(self.norm_out.weight.dtype)
        return mlp(sinusoids).unflatten(0, times.shape)

    def check(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        mask: Tensor | None,
        noise_level: Tensor | None,
        label: Tensor | None,
        frame_noise_level: Tensor | None,
        stride: Tensor | None,
    ) -> None:
        """Raises ValueError on input that the network can't take, saying what it can."""
        shape = tuple(noisy_latents.shape)
        if len(shape) != 5 or shape[1] != self.in_channels:
            raise ValueError(f"the U-Net takes latents (b, {self.in_channels}, t, h, w), got {shape}")
        b, _, t, h, w = shape
        multiple = self.size_multiple
        if h % multiple or w % multiple:
            below = (h // multiple * multiple, w // multiple * multiple)
            above = (-(-h // multiple) * multiple, -(-w // multiple) * multiple)
            raise ValueError(
                f"the U-Net halves height and width {multiple.bit_length() - 1} times: {h}x{w} latents must "
                f"be multiples of {multiple}; use {f'{below} or ' if min(below) else ''}{above}, "
                "or fewer levels (channel_mult)"
            )
        expect_shape("timesteps", timesteps, (b,))
        if mask is not None:
            if not self.mask_channel:
                raise ValueError(
                    "given frames were told, but the network has no mask_channel; pass mask=None"
                )
            expect_shape("mask", mask, (b, 1, t, h, w))
        if noise_level is not None:
            expect_shape("noise_level", noise_level, (b,))
            # On an accelerator a look at the values would make the host wait in every step.
            readable = not noise_level.is_cuda and not torch.compiler.is_compiling()
            if not self.num_noise_levels and readable and bool((noise_level >= 0).any()):
                raise ValueError(
                    "a noise level was told to a network with num_noise_levels=0; pass -1 or None"
                )
        if label is not None:
            if not self.num_classes:
                raise ValueError("labels were told to a network with num_classes=0; pass label=None")
            expect_shape("label", label, (b,))
        if frame_noise_level is not None:
            if self.frame_noise_embedding is None:
                raise ValueError("frame_noise_level was told to a network without frame_noise_embedding")
            expect_shape("frame_noise_level", frame_noise_level, (b, t))
        if stride is not None:
            if not self.num_strides:
                raise ValueError("strides were told to a network with num_strides=0; pass stride=None")
            expect_shape("stride", stride, (b,))


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def time_mlp(in_channels: int, width: int) -> nn.Sequential:
    """The two-layer network that refines a sinusoidal embedding."""
    return nn.Sequential(nn.Linear(in_channels, width), nn.SiLU(), nn.Linear(width, width))
