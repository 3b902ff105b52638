"""From videos to the feature vectors in which sets of videos are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

# A video `(b c t h w)` in [-1, 1] becomes one vector per clip, `(b d)`.
FeatureExtractor = Callable[[Tensor], Tensor]

I3D_SIZE = 224
I3D_RESIZE = "bilinear squash to 224×224 (half-pixel centres, no antialiasing)"


def resize_frames(video: Tensor, size: int) -> Tensor:
    """Every frame brought to `size`×`size` bilinearly with half-pixel centres, whatever its aspect.

    `(b c t h w)` → `(b c t size size)`; no antialiasing. It is the preprocessing of LVDM and TATS, who
    resize in [0, 255] before scaling to [-1, 1]: the same up to rounding, because both steps are affine.
    """
    if video.shape[-2:] == (size, size):
        return video
    num_frames = video.shape[2]
    frames = rearrange(video, "b c t h w -> (b t) c h w")
    frames = F.interpolate(frames, size=(size, size), mode="bilinear", align_corners=False)
    return rearrange(frames, "(b t) c h w -> b c t h w", t=num_frames)


@torch.no_grad()
def i3d_features(network: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
    """I3D logits of videos of any size: `(b 3 t h w)` in [-1, 1] → `(b 400)`.

    Args:
        network: what `metrics.i3d.load_i3d` gives.
        video: at least 9 frames.
    """
    # Clips enlarged at a time: on a CPU two are fastest, for one alone torch takes slower convolutions.
    chunk = 2 if video.device.type == "cpu" else 16
    return torch.cat([network(resize_frames(part.float(), I3D_SIZE)) for part in video.split(chunk)])


def extract(extractor: FeatureExtractor, videos: Iterable[Tensor]) -> Tensor:
    """Features of a stream of batches, stacked on the CPU in order: `(n d)`."""
    features = [extractor(video).detach().cpu() for video in videos]
    if not features:
        raise ValueError("there were no videos to take features of")
    return torch.cat(features)
