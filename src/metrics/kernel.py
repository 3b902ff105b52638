"""The kernel distance between two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_PER_BLOCK = 256


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the cubic kernel k(x, y) = (x·y / d + 1)³.

    Bińkowski et al. 2018 (arXiv 1801.01401), eq. (4) with the kernel of their section 4; on I3D logits this
    is the KVD. One estimate over all pairs, in float64; being unbiased it may fall below zero.

    Args:
        x: features `(n, d)` of one set, n ≥ 2.
        y: features `(m, d)` of the other, m ≥ 2.
    """
    _check_pair(x, y)
    n, m = len(x), len(y)
    x, y = x.detach().to("cpu", torch.float64), y.detach().to("cpu", torch.float64)
    within_x = (_kernel_sum(x, x) - _cubic(x.square().sum(1), x.shape[1]).sum()) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _cubic(y.square().sum(1), y.shape[1]).sum()) / (m * (m - 1))
    between = _kernel_sum(x, y) / (n * m)
    return (within_x + within_y - 2 * between).item()


@dataclass(frozen=True)
class SubsetDistance:
    """A kernel distance over subsets: the estimates' `mean` and their `deviation` (divisor: their number)."""

    mean: float
    deviation: float
    num_subsets: int
    subset_size: int


def kernel_distance_subsets(
    x: Tensor, y: Tensor, num_subsets: int = 100, subset_size: int = 1000, *, seed: int
) -> SubsetDistance:
    """Kernel distance as the mean over random subsets, in the way of the KID.

    Bińkowski et al. 2018 (arXiv 1801.01401), section 4. Each subset is drawn without replacement, and its
    estimate is unbiased; so is the mean. Subsets overlap: their deviation isn't the error of the mean
    (`uncertainty.bootstrap` estimates that of the distance).

    Args:
        x: features `(n, d)` of one set.
        y: features `(m, d)` of the other.
        num_subsets: how many estimates.
        subset_size: videos of each side in an estimate, at least 2. More than there are is an error, not
            silently reduced: the deviation depends on it.
        seed: of the subsets.
    """
    _check_pair(x, y)
    most = min(len(x), len(y))
    if num_subsets < 1 or not 2 <= subset_size <= most:
        raise ValueError(
            f"1 or more subsets of 2 to {most} videos can be drawn of {len(x)} and {len(y)}, "
            f"got {num_subsets=}, {subset_size=}; choose a smaller subset_size or give more videos"
        )
    generator = torch.Generator().manual_seed(seed)

    def subsets(num: int) -> Tensor:
        drawn = [torch.randperm(num, generator=generator)[:subset_size] for _ in range(num_subsets)]
        return torch.zeros(num_subsets, num).scatter_(1, torch.stack(drawn), 1.0)

    estimates = resampled_kernel_distances(x, y, subsets(len(x)), subsets(len(y)))
    return SubsetDistance(
        mean=estimates.mean().item(),
        deviation=estimates.std(correction=0).item(),
        num_subsets=num_subsets,
        subset_size=subset_size,
    )


def resampled_kernel_distances(x: Tensor, y: Tensor, counts_x: Tensor, counts_y: Tensor) -> Tensor:
    """Kernel distances of many samples out of the same two sets; the kernel is evaluated once.

    Args:
        x: features of one side `(n, d)`, or `(n, t, d)` for t vectors of each video.
        y: of the other, `(m, d)` or `(m, t, d)`.
        counts_x: how often each video of x is in every sample, whole numbers `(r, n)`.
        counts_y: the same of y, `(r, m)`.

    Returns:
        Unbiased estimates, float64 `(r,)`, over all pairs but those of a drawn vector with itself. (Two
        draws of one vector are a pair, which makes samples with replacement biased upwards.)
    """
    per_x, per_y = (side.shape[1] if side.ndim == 3 else 1 for side in (x, y))
    x, y = (side.detach().to("cpu", torch.float64).flatten(0, -2) for side in (x, y))
    _check_pair(x, y)
    counts_x, counts_y = counts_x.double(), counts_y.double()
    expected = (len(counts_x), len(x) // per_x), (len(counts_x), len(y) // per_y)
    if (counts_x.shape, counts_y.shape) != expected:
        raise ValueError(
            f"counts must have shapes (r, n) and (r, m), here r × {expected[0][1]} and r × {expected[1][1]}, "
            f"got {tuple(counts_x.shape)} and {tuple(counts_y.shape)}"
        )
    weights_x = counts_x.repeat_interleave(per_x, 1)
    weights_y = counts_y.repeat_interleave(per_y, 1)
    n, m = weights_x.sum(1), weights_y.sum(1)
    if min(n.min(), m.min()) < 2:
        raise ValueError("every sample must hold at least 2 vectors on each side")
    own_x, own_y = (_cubic(side.square().sum(1), side.shape[1]) for side in (x, y))
    within_x = (_weighted_kernel_sums(x, x, weights_x, weights_x) - weights_x @ own_x) / (n * (n - 1))
    within_y = (_weighted_kernel_sums(y, y, weights_y, weights_y) - weights_y @ own_y) / (m * (m - 1))
    between = _weighted_kernel_sums(x, y, weights_x, weights_y) / (n * m)
    return within_x + within_y - 2 * between


def _cubic(inner: Tensor, dim: int) -> Tensor:
    return (inner / dim + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the kernel over all pairs, in blocks of rows: memory grows with n, not n²."""
    return torch.stack([_cubic(rows @ y.T, x.shape[1]).sum() for rows in x.split(_ROWS_PER_BLOCK)]).sum()


def _weighted_kernel_sums(x: Tensor, y: Tensor, weights_x: Tensor, weights_y: Tensor) -> Tensor:
    """Σᵢⱼ aᵢ k(xᵢ, yⱼ) bⱼ for each row a of `weights_x` and b of `weights_y`, `(r,)`; in blocks of rows."""
    sums = torch.zeros(len(weights_x), dtype=torch.float64)
    for rows, weights in zip(x.split(_ROWS_PER_BLOCK), weights_x.split(_ROWS_PER_BLOCK, 1), strict=True):
        sums += (weights * (weights_y @ _cubic(y @ rows.T, x.shape[1]))).sum(1)
    return sums


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features must have shapes (n, d) and (m, d), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if min(len(x), len(y)) < 2:
        raise ValueError(
            f"the kernel distance needs at least 2 videos on each side, got {len(x)} and {len(y)}"
        )
