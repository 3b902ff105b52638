"""From videos to the feature vectors in which sets of videos are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from . import i3d, i3d_weights, inception, r3d_18, videomae
from .precision import full_precision
from .weight_files import state_sha256

I3D_SIZE = i3d.SIZE


# ---- resizing ----


@dataclass(frozen=True)
class Resize:
    """A rule by which frames get the square size that a network takes.

    Args:
        description: of the rule, one sentence for people.
        function: `(b c t h w)` in [-1, 1] and a size → `(b c t size size)`.
    """

    description: str
    function: Callable[[Tensor, int], Tensor]

    def __call__(self, video: Tensor, size: int) -> Tensor:
        if video.ndim != 5 or not video.is_floating_point():
            raise ValueError(
                f"videos are float (b, c, t, h, w) in [-1, 1], got {video.dtype} of {tuple(video.shape)}"
            )
        if video.shape[-2:] == (size, size):
            return video
        return self.function(video, size)


def resize_frames(video: Tensor, size: int) -> Tensor:
    """Every frame brought to `size`×`size` bilinearly with half-pixel centres, whatever its aspect.

    `(b c t h w)` → `(b c t size size)`; no antialiasing. It is the preprocessing of LVDM and TATS, who
    resize in [0, 255] before scaling to [-1, 1]: the same up to rounding, because both steps are affine.
    """
    return RESIZES["squash"](video, size)


def _interpolate(video: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """Bilinear, half-pixel centres: `(b c t h w)` → `(b c t *size)`."""
    frames = rearrange(video, "b c t h w -> (b t) c h w")
    frames = F.interpolate(frames, size=size, mode="bilinear", align_corners=False, antialias=antialias)
    return rearrange(frames, "(b t) c h w -> b c t h w", t=video.shape[2])


def _squash(video: Tensor, size: int) -> Tensor:
    return _interpolate(video, (size, size))


def _squash_antialias(video: Tensor, size: int) -> Tensor:
    return _interpolate(video, (size, size), antialias=True)


def _squash_tf1(video: Tensor, size: int) -> Tensor:
    """TensorFlow 1's `tf.image.resize_bilinear`: pixel i of the result lies at i · in / out of the source.

    That is computed in float32, as there; beyond the last pixel of the source it is repeated.
    """
    for axis in (-1, -2):
        length = video.shape[axis]
        at = torch.arange(size, dtype=torch.float32) * (length / size)
        before = at.long()
        after = (before + 1).clamp(max=length - 1)
        weight = (at - before).to(video)
        if axis == -2:
            weight = rearrange(weight, "h -> h 1")
        low = video.index_select(axis, before.to(video.device))
        video = low + (video.index_select(axis, after.to(video.device)) - low) * weight
    return video


def _crop(video: Tensor, size: int) -> Tensor:
    """VideoGPT's rule, with its rounding: the other side becomes ⌈side · scale⌉ in floating point.

    The scale is `size` over the shorter side; the crop begins at (side − size) // 2. In floating point the
    product may lie a little above the integer that it should be, and then the side is one longer.
    """
    height, width = video.shape[-2:]
    scale = size / min(height, width)
    if height < width:
        height, width = size, math.ceil(width * scale)
    else:
        height, width = math.ceil(height * scale), size
    video = _interpolate(video, (height, width))
    top, left = (height - size) // 2, (width - size) // 2
    return video[..., top : top + size, left : left + size]


RESIZES = {
    "squash": Resize(
        "Every frame is squashed to a square, bilinear with half-pixel centres and without antialiasing.",
        _squash,
    ),
    "squash_antialias": Resize(
        "Every frame is squashed to a square, bilinear with half-pixel centres and with antialiasing.",
        _squash_antialias,
    ),
    "squash_tf1": Resize(
        "Every frame is squashed to a square as TensorFlow 1 does by default: bilinear between the pixels at "
        "i·in/out, without half-pixel centres and antialiasing.",
        _squash_tf1,
    ),
    "crop": Resize(
        "Every frame's shorter side is brought to the size, bilinear with half-pixel centres and without "
        "antialiasing, and then the square in the centre is cut out.",
        _crop,
    ),
}


# ---- extractors ----


@dataclass(frozen=True)
class ExtractorKind:
    """A known network.

    Args:
        description: what it looks at, one sentence for people.
        load: its trained weights from a file, or from where they are kept without one.
        size: of the frames that it takes.
        dim: numbers in its feature vector.
        min_frames: that a clip must have.
        frame_multiple: the number of frames must be a multiple of this.
        per_frame: whether it looks at single frames: features `(b t d)` instead of `(b d)`.
    """

    description: str
    load: Callable[[str | Path | None], nn.Module]
    size: int
    dim: int
    min_frames: int
    frame_multiple: int = 1
    per_frame: bool = False


EXTRACTORS = {
    "i3d": ExtractorKind(
        "The 400 logits of I3D, trained on Kinetics-400: the features of the Fréchet video distance.",
        i3d_weights.load_i3d,
        size=i3d.SIZE,
        dim=i3d.NUM_CLASSES,
        min_frames=i3d.MIN_FRAMES,
    ),
    "r3d_18": ExtractorKind(
        "The 512 numbers before the classifier of the 3D residual network R3D-18, trained on Kinetics-400.",
        r3d_18.load_r3d_18,
        size=r3d_18.SIZE,
        dim=r3d_18.DIM,
        min_frames=r3d_18.MIN_FRAMES,
    ),
    "videomae": ExtractorKind(
        "The 1408 numbers before the classifier of VideoMAE V2 ViT-g, fine-tuned on Something-Something v2: "
        "the features of the content-debiased Fréchet video distance.",
        videomae.load_videomae,
        size=videomae.SIZE,
        dim=videomae.DIM,
        min_frames=videomae.NUM_FRAMES,
        frame_multiple=videomae.TUBELET,
    ),
    "inception": ExtractorKind(
        "The 2048 numbers before the classifier of Inception-v3, trained on ImageNet, of each single frame: "
        "the features of the Fréchet inception distance.",
        inception.load_inception,
        size=inception.SIZE,
        dim=inception.DIM,
        min_frames=1,
        per_frame=True,
    ),
}


class FeatureExtractor:
    """From videos of any size to feature vectors: `(b 3 t h w)` in [-1, 1] → float32 `(b d)`.

    Extractors that look at single frames give `(b t d)`. Computed without gradients and in true float32,
    whatever autocast or TF32 surrounds it, and on a clip's own: neighbours in the batch don't matter.

    Attributes:
        name: of the network, a key of `EXTRACTORS`.
        resize: the name of the rule by which frames get its size, a key of `RESIZES`.
        dim: numbers in a feature vector.
        min_frames: that a clip must have.
        per_frame: whether the features are `(b t d)`.
        weights_sha256: digest of the weights' names, types, shapes and bytes as loaded.
    """

    def __init__(
        self, network: nn.Module, kind: ExtractorKind, *, name: str, resize: str, device: str | torch.device
    ) -> None:
        self.name, self.resize = name, resize
        self.dim, self.min_frames, self.per_frame = kind.dim, kind.min_frames, kind.per_frame
        self.weights_sha256 = state_sha256(network)
        self._kind = kind
        self._device = torch.device(device)
        self._network = network.to(self._device)

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Features of a batch, on the device of the network.

        Raises:
            ValueError: for anything but float videos with three colours, for none, and for too few frames.
        """
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise ValueError(
                f"{self.name} takes float videos (b, 3, t, h, w) in [-1, 1], got {video.dtype} of "
                f"{tuple(video.shape)}"
            )
        frames, multiple = video.shape[2], self._kind.frame_multiple
        if frames < self.min_frames:
            raise ValueError(
                f"{self.name} needs at least {self.min_frames} frames, got {frames}; use longer clips"
            )
        if frames % multiple:
            raise ValueError(
                f"{self.name} takes a number of frames that is a multiple of {multiple}, got {frames}; use "
                f"clips of {frames - frames % multiple}"
            )
        with full_precision(self._device):
            return _in_chunks(self._network, video.to(self._device), self._kind.size, self.resize)


def load_extractor(
    name: str, *, resize: str, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """A trained network under the interface that all share.

    Args:
        name: one of `EXTRACTORS`.
        resize: one of `RESIZES`.
        weights: the file of its trained weights; only `i3d` can do without, from the cache folder or the
            installed package.

    Raises:
        ValueError: for an unknown name, or a file that doesn't hold the weights.
        FileNotFoundError: if there are no weights, saying which to get and from where.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"unknown feature extractor {name!r}; choices: {', '.join(EXTRACTORS)}")
    if resize not in RESIZES:
        raise ValueError(f"unknown rule of resizing {resize!r}; choices: {', '.join(RESIZES)}")
    kind = EXTRACTORS[name]
    return FeatureExtractor(kind.load(weights), kind, name=name, resize=resize, device=device)


@torch.no_grad()
def i3d_features(network: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
    """I3D logits of videos of any size: `(b 3 t h w)` in [-1, 1] → `(b 400)`.

    Args:
        network: what `metrics.i3d_weights.load_i3d` gives.
        video: at least 9 frames.
    """
    return _in_chunks(network, video, I3D_SIZE, "squash")


def _in_chunks(network: Callable[[Tensor], Tensor], video: Tensor, size: int, resize: str) -> Tensor:
    """Features of a batch, of so many clips at a time as suit the device.

    An incomplete chunk is filled up with its last clip: torch takes other convolutions for other numbers of
    clips, and a clip's features shall not depend on how many come with it.
    """
    if len(video) == 0:
        raise ValueError("there were no videos to take features of")
    # On a CPU two clips at a time are fastest.
    chunk = 2 if video.device.type == "cpu" else 4
    features = []
    for part in video.split(chunk):
        missing = chunk - len(part)
        filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
        features.append(network(RESIZES[resize](filled.float(), size))[: len(part)])
    return torch.cat(features)
