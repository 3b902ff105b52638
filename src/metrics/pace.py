"""At which stride videos seem to have been taken, by how fast their frames become different."""

from __future__ import annotations

from functools import cache

import torch
from einops import rearrange, reduce
from torch import Tensor

# Lags at which frames are compared: those that strides of 1 to 4 have in common, three of each.
LAGS = (1, 2, 3, 4, 6, 8, 9, 12)
STRIDES = (2, 3, 4)
_LAGS_OF_EACH = 3
_SIZE = 64  # pixels of a side that are looked at
_STILL = 0.1  # grey levels below which motion is noise

# In natural logarithms of motion: deviations of level, slope and curvature (over the binary logarithm of the
# lag) and of single lags. Those of a good model's mean from the real one, and those of real clips of one
# kind, which count like so many clips that were seen before.
_OF_MODELS = (0.25, 0.08, 0.03, 0.01)
_OF_CLIPS, _SEEN_BEFORE = (0.7, 0.15, 0.08, 0.02), 20
_LEAST_EVIDENCE = 1.25
_NUM_DEALS, _CHANCE = 100, 0.02


def pace(frames: Tensor) -> Tensor:
    """How different frames are, the further apart they stand: uint8 ``b t h w c`` → ``b lags``.

    The logarithm of the mean absolute difference at each of `LAGS`; NaN where a clip is too short for one.
    """
    step = max(1, min(frames.shape[2:4]) // _SIZE)
    values = frames[:, :, ::step, ::step].float()
    told = torch.full((len(frames), len(LAGS)), torch.nan, device=frames.device)
    for column, lag in enumerate(LAGS):
        if lag < values.shape[1]:
            difference = reduce((values[:, lag:] - values[:, :-lag]).abs(), "b t h w c -> b", "mean")
            told[:, column] = (difference + _STILL).log()
    return told


def other_stride(real: Tensor, generated: Tensor) -> float | None:
    """By which factor the strides of two sets of clips seem to differ; None if nothing speaks for it.

    Clips at s times the stride differ after k frames as much as others after s k, for every k. A factor is
    told if the means of the sets fit it clearly better than the same stride, allowing for what models get
    wrong, and if the same clips, dealt at random into two sets, hardly ever look so.

    Args:
        real, generated: what `pace` gives of each clip, ``n lags`` and ``m lags``.

    Returns:
        About 2, 3 or 4 if the generated clips have the larger stride, 1/2, 1/3 or 1/4 if the real ones have;
        which of them can be off by one or two.
    """
    real, generated = real.double(), generated.double()
    evidence = _evidence(real, generated)
    if not evidence or max(evidence.values()) < _LEAST_EVIDENCE:
        return None
    factor = max(evidence, key=lambda one: evidence[one])
    both, generator = torch.cat([real, generated]), torch.Generator().manual_seed(0)
    as_much = 1
    for _ in range(_NUM_DEALS):
        dealt = both[torch.randperm(len(both), generator=generator)]
        as_much += max(_evidence(dealt[: len(real)], dealt[len(real) :]).values()) >= evidence[factor]
    return factor if as_much <= _CHANCE * (_NUM_DEALS + 1) else None


def _evidence(real: Tensor, generated: Tensor) -> dict[float, float]:
    """Logarithm of how much likelier the generated means are at other strides than at the same."""
    longest = max((lag for lag, value in zip(LAGS, real[0], strict=True) if not value.isnan()), default=0)
    found = {}
    for stride in STRIDES:
        count = min(longest // stride, _LAGS_OF_EACH)
        if count < 2:
            continue
        near = [LAGS.index(lag) for lag in range(1, count + 1)]
        far = [LAGS.index(stride * lag) for lag in range(1, count + 1)]
        for factor, at, other in ((float(stride), near, far), (1 / stride, far, near)):
            same = _log_likelihood(generated[:, at], real[:, at])
            found[factor] = _log_likelihood(generated[:, at], real[:, other]) - same
    return found


def _log_likelihood(generated: Tensor, real: Tensor) -> float:
    """Of the mean of some clips' curves, if they were to move like others: ``n k``, ``m k``."""
    count = real.shape[1]
    means = [side.mean(0) for side in (real, generated)]
    around = torch.cat([side - mean for side, mean in zip((real, generated), means, strict=True)])
    scatter = around.T @ around + _SEEN_BEFORE * _covariance(count, _OF_CLIPS)
    scatter = scatter / (len(around) - 2 + _SEEN_BEFORE) * (1 / len(real) + 1 / len(generated))
    covariance, off = scatter + _covariance(count, _OF_MODELS), means[1] - means[0]
    return -0.5 * float(off @ torch.linalg.solve(covariance, off) + torch.logdet(covariance))


@cache
def _covariance(count: int, deviations: tuple[float, float, float, float]) -> Tensor:
    """Of curves whose level, slope, curvature and single lags scatter: ``k k``."""
    lags = torch.arange(1, count + 1, dtype=torch.float64).log2()
    parts = torch.stack([lags**power * deviation for power, deviation in enumerate(deviations[:3])])
    squares = torch.diag(torch.full((count,), deviations[3] ** 2, dtype=torch.float64))
    return rearrange(parts, "p k -> k p") @ parts + squares
