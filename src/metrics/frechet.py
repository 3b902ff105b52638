"""The Fréchet distance between two sets of features, each summarised as a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor


class GaussianStatistics:
    """Mean and unbiased covariance of a stream of feature vectors, accumulated in float64.

    What is kept are plain sums, so that two accumulators merge by addition: over batches with `update`, over
    objects with `merge`, over processes by all-reducing `packed()` with SUM.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> GaussianStatistics:
        """Add feature vectors `(n, dim)`; ValueError for another shape or values not finite."""
        features = _checked_features(features, self.dim)
        self.count += len(features)
        self._sum += features.sum(0)
        self._outer += features.T @ features
        return self

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        """Add all that another accumulator has seen."""
        if other.dim != self.dim:
            raise ValueError(f"can't merge statistics of {other.dim} features into those of {self.dim}")
        self.count += other.count
        self._sum += other._sum
        self._outer += other._outer
        return self

    def packed(self) -> Tensor:
        """All sums as one float64 vector of `1 + dim + dim²` numbers, which may be added across processes."""
        count = torch.tensor([self.count], dtype=torch.float64)
        return torch.cat([count, self._sum, self._outer.flatten()])

    @classmethod
    def from_packed(cls, packed: Tensor, dim: int) -> GaussianStatistics:
        """The accumulator whose `packed()` (or the sum of several) is given."""
        if packed.shape != (1 + dim + dim * dim,):
            raise ValueError(
                f"packed statistics of {dim} features have shape ({1 + dim + dim * dim},), "
                f"got {tuple(packed.shape)}"
            )
        packed = packed.detach().to("cpu", torch.float64)
        statistics = cls(dim)
        statistics.count = round(packed[0].item())
        statistics._sum = packed[1 : 1 + dim].clone()
        statistics._outer = packed[1 + dim :].reshape(dim, dim).clone()
        return statistics

    @property
    def mean(self) -> Tensor:
        """The sample mean, float64 `(dim,)`."""
        self._require(1)
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased sample covariance (divisor n - 1), float64 `(dim, dim)`."""
        self._require(2)
        mean = self.mean
        covariance = (self._outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return (covariance + covariance.T) / 2

    def _require(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"statistics need at least {least} feature vectors, got {self.count}")


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Squared Fréchet distance |μ₁-μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½) between two Gaussians.

    Heusel et al. 2017 (arXiv 1706.08500), eq. (6); on I3D logits of videos it is the FVD of Unterthiner et
    al. 2018 (arXiv 1812.01717). In float64 throughout: the trace of the root is the sum of the singular
    values of Σ₁^½ Σ₂^½, whose factors come from symmetric eigendecompositions, so that singular covariances
    (fewer vectors than features) lose no digits to the root of an eigenvalue that is zero but for rounding.
    """
    if a.dim != b.dim:
        raise ValueError(f"both sides must have the same features, got {a.dim} and {b.dim} numbers per video")
    covariance_a, covariance_b = a.covariance, b.covariance
    root_trace = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    distance = (a.mean - b.mean).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * root_trace
    # Equal Gaussians may end a rounding error below zero.
    return max(distance.item(), 0.0)


def split_half_distance(features: Tensor, generator: torch.Generator) -> float:
    """Fréchet distance between two random halves of one set `(n, d)`: what "no difference" scores.

    It falls as 1/n, so it is an upper bound for the floor of the whole set's own n.
    """
    half = len(features) // 2
    order = torch.randperm(len(features), generator=generator)
    dim = features.shape[1]
    first = GaussianStatistics(dim).update(features[order[:half]])
    second = GaussianStatistics(dim).update(features[order[half : 2 * half]])
    return frechet_distance(first, second)


def _factor(covariance: Tensor) -> Tensor:
    """A matrix F `(d, r)` with F Fᵀ = covariance, r its numerical rank."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    kept = values > noise
    return vectors[:, kept] * values[kept].sqrt()


def _checked_features(features: Tensor, dim: int) -> Tensor:
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features must have shape (n, {dim}), got {tuple(features.shape)}")
    features = features.detach().to("cpu", torch.float64)
    if not features.isfinite().all():
        raise ValueError("features hold values that aren't finite; the videos or the network are broken")
    return features
