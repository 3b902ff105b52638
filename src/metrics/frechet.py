"""The Fréchet distance between two sets of features, each summarised as a Gaussian."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Arithmetic = Literal["float64", "float32_svd"]

# Singular values below it are left as they are where the compatible rule takes roots.
FLOAT32_SVD_LEAST = 1e-10


class GaussianStatistics:
    """Mean and covariance of a stream of feature vectors, accumulated in float64.

    What is kept are plain sums: memory doesn't grow with the number of vectors.

    Args:
        dim: numbers in a vector.
        biased: whether the covariance's divisor is n instead of n - 1.
    """

    def __init__(self, dim: int, *, biased: bool = False) -> None:
        self.dim, self.biased = dim, biased
        self.count = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor, counts: Tensor | None = None) -> GaussianStatistics:
        """Add feature vectors `(n, dim)`, each as often as `counts` says; without it, once.

        Args:
            features: `(n, dim)`, finite, or ValueError.
            counts: whole numbers `(n,)`, 0 or more.
        """
        features = _checked_features(features, self.dim)
        if counts is None:
            self.count += len(features)
            self._sum += features.sum(0)
            self._outer += features.T @ features
            return self
        counts = _checked_counts(counts, len(features))
        weighted = features * counts[:, None]
        self.count += round(counts.sum().item())
        self._sum += weighted.sum(0)
        self._outer += weighted.T @ features
        return self

    @property
    def mean(self) -> Tensor:
        """The sample mean, float64 `(dim,)`."""
        self._require(1)
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """The sample covariance (divisor n - 1, or n if `biased`), float64 `(dim, dim)`."""
        self._require(2)
        mean = self.mean
        covariance = (self._outer - self.count * torch.outer(mean, mean)) / (self.count - (not self.biased))
        return (covariance + covariance.T) / 2

    def _require(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"statistics need at least {least} feature vectors, got {self.count}")


def frechet_distance(
    a: GaussianStatistics, b: GaussianStatistics, arithmetic: Arithmetic = "float64"
) -> float:
    """Squared Fréchet distance |μ₁-μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½) between two Gaussians.

    Heusel et al. 2017 (arXiv 1706.08500), eq. (6); on I3D logits of videos it is the FVD of Unterthiner et
    al. 2018 (arXiv 1812.01717).

    Args:
        a: statistics of one set.
        b: statistics of the other, of as many features.
        arithmetic: "float64" throughout: the trace of the root is the sum of the singular values of
            Σ₁^½ Σ₂^½, whose factors come from symmetric eigendecompositions, so that singular covariances
            (fewer vectors than features) lose no digits to the root of an eigenvalue that is zero but for
            rounding. "float32_svd" is the rule of the code of TATS, LVDM and DIGAN, for numbers that shall
            compare with theirs: see `_root_trace_float32`. It may end below zero. Where the variances of the
            features span many orders, small distances are off by tens of percent, in either direction, and
            differently with another linear algebra library.
    """
    if a.dim != b.dim:
        raise ValueError(f"both sides must have the same features, got {a.dim} and {b.dim} numbers per video")
    if arithmetic not in get_args(Arithmetic):
        choices = ", ".join(get_args(Arithmetic))
        raise ValueError(f"unknown arithmetic {arithmetic!r} of the Fréchet distance; choices: {choices}")
    if arithmetic == "float32_svd":
        mean_a, mean_b = a.mean.float(), b.mean.float()
        covariance_a, covariance_b = a.covariance.float(), b.covariance.float()
        traces = (covariance_a + covariance_b).trace()
        root_trace = _root_trace_float32(covariance_a, covariance_b)
        return (traces - 2 * root_trace + (mean_a - mean_b).square().sum()).item()
    covariance_a, covariance_b = a.covariance, b.covariance
    root_trace = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    distance = (a.mean - b.mean).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * root_trace
    # Equal Gaussians may end a rounding error below zero.
    return max(distance.item(), 0.0)


def resampled_frechet_distances(x: Tensor, y: Tensor, counts_x: Tensor, counts_y: Tensor) -> Tensor:
    """Fréchet distances in float64 of many weightings of the same two sets, for `uncertainty.bootstrap`.

    Args:
        x: features of one side `(n, d)`, or `(n, t, d)` for t vectors of each video.
        y: of the other, `(m, d)` or `(m, t, d)`.
        counts_x: how often each video of x is taken in every weighting, whole numbers `(r, n)`.
        counts_y: the same of y, `(r, m)`.

    Returns:
        Distances, float64 `(r,)`.
    """

    def statistics(features: Tensor, counts: Tensor) -> GaussianStatistics:
        per_video = features.shape[1] if features.ndim == 3 else 1
        vectors = features.flatten(0, -2)
        return GaussianStatistics(vectors.shape[1]).update(vectors, counts.repeat_interleave(per_video))

    x, y = x.detach().to("cpu", torch.float64), y.detach().to("cpu", torch.float64)
    distances = [
        frechet_distance(statistics(x, of_x), statistics(y, of_y))
        for of_x, of_y in zip(counts_x, counts_y, strict=True)
    ]
    return torch.tensor(distances, dtype=torch.float64)


def _factor(covariance: Tensor) -> Tensor:
    """A matrix F `(d, r)` with F Fᵀ = covariance, r its numerical rank."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    kept = values > noise
    return vectors[:, kept] * values[kept].sqrt()


def _root_trace_float32(covariance_a: Tensor, covariance_b: Tensor) -> Tensor:
    """tr (Σ₁^½ Σ₂ Σ₁^½)^½ by singular value decompositions in float32, as TATS, LVDM and DIGAN take it.

    From tensorflow-gan's `trace_sqrt_product`: a singular value below 1e-10 stays what it is instead of
    being rooted. The statistics are rounded to float32 here, while the originals accumulate in it.
    """

    def root(matrix: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(matrix)
        values = torch.where(values < FLOAT32_SVD_LEAST, values, values.sqrt())
        return left @ torch.diag(values) @ right

    root_a = root(covariance_a)
    return root(root_a @ (covariance_b @ root_a)).trace()


def _checked_counts(counts: Tensor, num: int) -> Tensor:
    if counts.shape != (num,):
        raise ValueError(
            f"counts must say how often each of {num} vectors is taken, got {tuple(counts.shape)}"
        )
    counts = counts.detach().to("cpu", torch.float64)
    if not ((counts >= 0) & (counts == counts.round())).all():
        raise ValueError(
            "counts must be whole numbers of 0 or more; weights that are fractions aren't counts"
        )
    return counts


def _checked_features(features: Tensor, dim: int) -> Tensor:
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features must have shape (n, {dim}), got {tuple(features.shape)}")
    features = features.detach().to("cpu", torch.float64)
    if not features.isfinite().all():
        raise ValueError("features hold values that aren't finite; the videos or the network are broken")
    return features
