"""Plain statistics of videos and sets of videos: what drifts, what collapses, what is copied."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

_ROWS_PER_BLOCK = 1024
# -60 dB of the range, in grey levels.
FREEZE_THRESHOLD = 0.255


def contrast(video: Tensor) -> Tensor:
    """Standard deviation of the pixels of each frame: `(b c t h w)` in [-1, 1] → `(b t)`.

    Grey mush has little. Taken over colours and positions together, so pixels are in units of [-1, 1].
    """
    _check_video(video)
    # By hand, for a library's deviation takes several times as long on a CPU.
    video = video.float()
    around = video - reduce(video, "b c t h w -> b 1 t 1 1", "mean")
    return reduce(around.square(), "b c t h w -> b t", "mean").sqrt()


def motion_energy(video: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames: `(b c t h w)` in [-1, 1] → `(b t-1)`."""
    _check_video(video)
    if video.shape[2] < 2:
        raise ValueError(f"motion needs at least 2 frames, got {video.shape[2]}")
    return reduce(video.float().diff(dim=2).abs(), "b c t h w -> b t", "mean")


def saturation(video: Tensor) -> Tensor:
    """Mean spread between the strongest and the weakest colour of a pixel: `(b c t h w)` → `(b t)` in [0, 1].

    0 is grey, 1 pure colours. Sampling that runs away shows here first.
    """
    _check_video(video)
    spread = video.float().amax(1) - video.float().amin(1)
    return reduce(spread, "b t h w -> b t", "mean") / 2


def clipped_fraction(video: Tensor, margin: float = 1 / 255) -> Tensor:
    """Fraction of values at the ends of the range (within `margin`): `(b c t h w)` → `(b t)`."""
    _check_video(video)
    return reduce((video.abs() >= 1 - margin).float(), "b c t h w -> b t", "mean")


def sharpness(video: Tensor) -> Tensor:
    """Variance of the Laplacian of each frame's grey values: `(b c t h w)` in [-1, 1] → `(b t)`.

    A measure of focus: Pech-Pacheco et al. 2000 (LAPV in the comparison of Pertuz et al. 2013), with the
    kernel of four neighbours, inside the frame; grey is the mean of the colours. Blur lowers it; so does
    fading, since it grows with the square of the contrast.
    """
    _check_video(video)
    if min(video.shape[-2:]) < 3:
        raise ValueError(f"sharpness needs frames of 3×3 or more, got {list(video.shape[-2:])}")
    grey = video.float().mean(1)
    centre = grey[..., 1:-1, 1:-1]
    vertical = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1]
    horizontal = grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    return rearrange(vertical + horizontal - 4 * centre, "b t h w -> b t (h w)").var(-1, correction=0)


def frozen(video: Tensor, threshold: float = FREEZE_THRESHOLD) -> Tensor:
    """1 where a frame repeats the one before, else 0: `(b c t h w)` in [-1, 1] → `(b t-1)`.

    Args:
        video: at least 2 frames.
        threshold: mean absolute difference, in grey levels of 255, below which it does. By default that of
            ffmpeg's filter `freezedetect`, -60 dB.
    """
    return (motion_energy(video) * (255 / 2) < threshold).float()


def pixel_features(video: Tensor, size: tuple[int, int, int] = (4, 8, 8)) -> Tensor:
    """A video averaged down to `size` (t, h, w), as one vector: `(b c t h w)` → `(b, c·t·h·w)`.

    A feature space without a network. Distances in it are scaled to root-mean-square pixel differences.
    """
    _check_video(video)
    small = F.adaptive_avg_pool3d(video.float(), size)
    return rearrange(small, "b c t h w -> b (c t h w)") / (small[0].numel() ** 0.5)


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance over all pairs of rows of `(n, d)`; near zero when samples collapse."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"pairwise distances need features (n, d) with n >= 2, got {tuple(features.shape)}")
    features = features.detach().double()
    total = sum(_distances(rows, features).sum().item() for rows in features.split(_ROWS_PER_BLOCK))
    return total / (len(features) * (len(features) - 1))


@dataclass(frozen=True)
class Nearest:
    """The nearest candidates of every query, in order: `indices` int64, `distances` float64, `(n, k)`."""

    indices: Tensor
    distances: Tensor


def nearest(queries: Tensor, candidates: Iterable[Tensor], k: int = 1) -> Nearest:
    """The `k` nearest candidates of every query by Euclidean distance, over a stream of candidates.

    Args:
        queries: features `(n, d)`.
        candidates: batches of features `(m_i, d)`; indices count through them in order.
        k: how many to keep; raises ValueError if the stream holds fewer.
    """
    queries = queries.detach().double()
    distances = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    seen = 0
    for batch in candidates:
        batch = batch.detach().to(queries)
        new = torch.arange(seen, seen + len(batch), device=queries.device).expand(len(queries), -1)
        distances = torch.cat([distances, _distances(queries, batch)], 1)
        indices = torch.cat([indices, new], 1)
        # A stable sort keeps the earlier of two equally near candidates, whatever the batches.
        distances, order = distances.sort(dim=1, stable=True)
        distances, indices = distances[:, :k], indices.gather(1, order)[:, :k]
        seen += len(batch)
    if seen < k:
        raise ValueError(f"asked for the {k} nearest candidates, got only {seen}")
    return Nearest(indices=indices, distances=distances)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # By differences: the shortcut through inner products turns the distance of a copy into rounding noise.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _check_video(video: Tensor) -> None:
    if video.ndim != 5:
        raise ValueError(f"a batch of videos must have shape (b, c, t, h, w), got {tuple(video.shape)}")
