"""Frames (uint8, as files hold them) to video (float, as networks see it), and back."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Frames = NDArray[np.uint8]


def to_video(frames: Tensor | Frames) -> Tensor:
    """Map frames uint8 ``(b) t h w c`` to a video float32 ``(b) c t h w`` in [-1, 1], on the frames' device.

    The memory stays channels-last: only the axes are renamed.
    """
    frames = frames if isinstance(frames, Tensor) else torch.tensor(frames)
    if frames.dtype != torch.uint8 or frames.ndim not in (4, 5):
        raise ValueError(
            f"frames must be uint8 with axes (b) t h w c, got {frames.dtype} of shape {tuple(frames.shape)}"
        )
    return rearrange(frames.to(torch.float32).div_(127.5).sub_(1), "... t h w c -> ... c t h w")


def to_frames(video: Tensor) -> Frames:
    """Map a video ``(b) c t h w`` in [-1, 1] to frames uint8 ``(b) t h w c``, clamped, rounded to nearest."""
    if video.ndim not in (4, 5):
        raise ValueError(f"a video has axes (b) c t h w, got shape {tuple(video.shape)}")
    levels = video.detach().float().add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8)
    return rearrange(levels, "... c t h w -> ... t h w c").contiguous().cpu().numpy()


def as_size(resolution: Any) -> tuple[int, int]:
    """Read a resolution, one number for a square or (height, width), in pixels."""
    sizes = (resolution, resolution) if isinstance(resolution, int) else resolution
    try:
        height, width = map(operator.index, sizes)
    except (TypeError, ValueError):
        raise ValueError(
            f"dataset.resolution must be one whole number of pixels or [height,width], got {resolution}"
        ) from None
    if min(height, width) < 1:
        raise ValueError(f"a resolution must be at least 1 pixel, got {resolution}")
    return height, width


class Resize:
    """Bring a frame uint8 ``h w c`` to one size, bilinear with antialiasing.

    ``center_crop`` keeps the aspect ratio and takes the largest centred region of the target's shape;
    ``random_crop`` takes a region of that size at another ``place``; ``squash`` stretches the whole frame (as
    the released LVDM data code does for UCF-101 and Taichi-HD).
    """

    MODES = ("center_crop", "random_crop", "squash")

    def __init__(self, resolution: int | tuple[int, int], mode: str = "center_crop") -> None:
        if mode not in self.MODES:
            raise ValueError(f"unknown crop {mode!r}; choose one of: {', '.join(self.MODES)}")
        self.height, self.width = as_size(resolution)
        self.mode = mode

    def at(self, x: float, y: float) -> Callable[[Frames], Frames]:
        """The same with the crop at a share x of the way from left to right, y from top to bottom."""
        return lambda frame: self(frame, (x, y))

    def __call__(self, frame: Frames, place: tuple[float, float] = (0.5, 0.5)) -> Frames:
        """Maps ``h w c`` to the target's size, cropped at a place, each in [0, 1] from the upper left."""
        height, width = frame.shape[:2]
        if (height, width) == (self.height, self.width):
            return frame
        crop_height, crop_width = float(height), float(width)
        if self.mode != "squash":
            scale = min(height / self.height, width / self.width)
            crop_height, crop_width = self.height * scale, self.width * scale
        left, top = (width - crop_width) * place[0], (height - crop_height) * place[1]
        box = (left, top, min(left + crop_width, width), min(top + crop_height, height))
        resized = Image.fromarray(frame).resize((self.width, self.height), Image.Resampling.BILINEAR, box=box)
        return np.asarray(resized)
