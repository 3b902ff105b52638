"""The kernel distance between two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_PER_BLOCK = 1024


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the cubic kernel k(x, y) = (x·y / d + 1)³.

    Bińkowski et al. 2018 (arXiv 1801.01401), eq. (4) with the kernel of their section 4; on I3D logits this
    is the KVD. One estimate over all pairs, in float64; being unbiased it may fall below zero.

    Args:
        x: features `(n, d)` of one set, n ≥ 2.
        y: features `(m, d)` of the other, m ≥ 2.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features must have shapes (n, d) and (m, d), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"the kernel distance needs at least 2 videos on each side, got {n} and {m}")
    x, y = x.detach().to("cpu", torch.float64), y.detach().to("cpu", torch.float64)
    within_x = (_kernel_sum(x, x) - _cubic(x.square().sum(1), x.shape[1]).sum()) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _cubic(y.square().sum(1), y.shape[1]).sum()) / (m * (m - 1))
    between = _kernel_sum(x, y) / (n * m)
    return (within_x + within_y - 2 * between).item()


def _cubic(inner: Tensor, dim: int) -> Tensor:
    return (inner / dim + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the kernel over all pairs, in blocks of rows: memory grows with n, not n²."""
    return torch.stack([_cubic(rows @ y.T, x.shape[1]).sum() for rows in x.split(_ROWS_PER_BLOCK)]).sum()
