"""What a measured distance is worth: its spread over samples, and what it would be without a difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .frechet import resampled_frechet_distances
from .kernel import resampled_kernel_distances

# (x, y, counts_x, counts_y) -> distances `(r,)`: of the sets in which every video is taken so many times.
ResampledDistances = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_CONFIDENCE = 0.95
LEAST_REPLICATES = 20


@dataclass(frozen=True)
class Uncertainty:
    """How far a distance may be off because other videos might have been drawn.

    Attributes:
        estimate: the distance of the sets as they are.
        deviation: standard deviation of the replicates.
        interval: 95 % interval around the estimate.
        bias: mean of the replicates minus the estimate, which the interval is freed of.
        num_replicates: how many there were.
    """

    estimate: float
    deviation: float
    interval: tuple[float, float]
    bias: float
    num_replicates: int

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return {**asdict(self), "interval": list(self.interval)}


def bootstrap(
    x: Tensor,
    y: Tensor,
    distances: ResampledDistances = resampled_frechet_distances,
    *,
    num_replicates: int = 200,
    seed: int,
) -> Uncertainty:
    """Standard deviation and 95 % interval of a distance, by drawing videos with replacement on both sides.

    The bootstrap of Efron 1979, percentiles of the replicates. These are **centred on the estimate**: a draw
    with replacement holds only 63 % of the videos, some of them more than once, so that both a Fréchet and a
    kernel distance come out larger than that of the sets themselves, by about as much again as the sets' own
    finite-sample bias. Taken as they are, percentiles may not even contain the estimate. What the interval
    tells is how the estimate scatters at this number of videos; its finite-sample bias is no scatter and
    isn't removed: compare it with `real_floor`.

    Valid where the two laws differ. As they approach each other the distance becomes quadratic in the
    difference, and the bootstrap overestimates its spread (for the kernel distance: Arcones and Giné 1992):
    it is then wide, not narrow. Fréchet distances of Gaussians with 400 features: 1.4 times too wide with
    2,048 videos at 3 times the floor, twice with 512 at 1.5 times, 3 times at the floor itself. Kernel
    distances of the same sets: within 15 % on average.

    Args:
        x: features of one side `(n, d)`, or `(n, t, d)` for t vectors of each of n videos; videos are drawn,
            and a video brings all its vectors.
        y: of the other, `(m, d)` or `(m, t, d)`.
        distances: `resampled_frechet_distances` or `resampled_kernel_distances`.
        num_replicates: how many draws, at least 20 for percentiles.
        seed: of the draws.
    """
    if x.ndim not in (2, 3) or x.ndim != y.ndim or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            "features must have shapes (n, d) and (m, d), or (n, t, d) and (m, t, d), "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if num_replicates < LEAST_REPLICATES:
        raise ValueError(
            f"percentiles need at least {LEAST_REPLICATES} replicates, got num_replicates={num_replicates}"
        )
    generator = torch.Generator().manual_seed(seed)
    counts_x, counts_y = (_drawn_with_replacement(len(side), num_replicates, generator) for side in (x, y))
    as_they_are = [torch.ones(1, len(side), dtype=torch.int64) for side in (x, y)]
    estimate = distances(x, y, *as_they_are).item()
    replicates = distances(x, y, counts_x, counts_y)
    centred = replicates - replicates.mean()
    tail = (1 - _CONFIDENCE) / 2
    low, high = centred.quantile(torch.tensor([tail, 1 - tail], dtype=centred.dtype)).tolist()
    return Uncertainty(
        estimate=estimate,
        deviation=replicates.std().item(),
        interval=(estimate + low, estimate + high),
        bias=(replicates.mean() - estimate).item(),
        num_replicates=num_replicates,
    )


def convert_floor(floor: float, measured: tuple[int, int], wanted: tuple[int, int]) -> float:
    """A finite-sample floor measured with some numbers of videos, at other numbers.

    floor(n', m') = floor(n, m) · (1/n' + 1/m') / (1/n + 1/m): both the difference of two sample means and
    that of two sample covariances have a variance that is proportional to 1/n + 1/m, and the Fréchet
    distance of nearly equal Gaussians is quadratic in them. To first order: with fewer videos than features
    it falls more slowly (by 1.6 to 1.8 instead of 2 at each doubling, for I3D: `benchmarks/floor.py`), see
    `extrapolated_floor`. The
    spread of the kernel distance around 0 follows it, too.

    Args:
        floor: the distance between real videos and others.
        measured: how many there were on either side.
        wanted: how many the distance has that the floor is to be set beside.
    """
    for name, (n, m) in (("measured", measured), ("wanted", wanted)):
        if min(n, m) < 1:
            raise ValueError(f"a floor needs videos on both sides, got {name}=({n}, {m})")
    return floor * (1 / wanted[0] + 1 / wanted[1]) / (1 / measured[0] + 1 / measured[1])


def extrapolated_floor(measured: Sequence[tuple[int, float]], wanted: tuple[int, int]) -> float:
    """The finite-sample floor of the Fréchet distance at numbers of videos that can't be measured.

    Between parts of n/2 and of n videos the floor falls as a power of n, which is 1 for more videos than
    features and less for fewer; it is taken to go on so. On I3D features one doubling beyond what was
    measured is met within 20 % (the law of 1/n: within 40 %).

    Args:
        measured: videos on each side, and the mean distance of real parts of that size, the smaller size
            first; with one size the power is 1.
        wanted: numbers of videos on either side of the distance that the floor is to be set beside.
    """
    size, floor = measured[-1]
    power = 1.0
    if len(measured) > 1 and min(floor, measured[0][1]) > 0:
        smaller, above = measured[0]
        power = min(max(math.log(above / floor) / math.log(size / smaller), 0.0), 1.0)
    of_each = 2 / (1 / wanted[0] + 1 / wanted[1])
    return floor * (size / of_each) ** power


def kernel_floor(
    real: Tensor,
    wanted: tuple[int, int],
    *,
    num_splits: int = 100,
    quantile: float = 0.95,
    seed: int,
) -> float:
    """The kernel distance that real videos exceed by chance in 5 of 100 cases.

    Its expectation between sets of one law is 0 for any number of videos, so its floor is a quantile: of
    random halves of the real videos, brought to other numbers by `convert_floor`.

    Args:
        real: features of real videos `(n, d)`, n ≥ 4.
        wanted: numbers of videos on either side of the distance that the floor is to be set beside.
        num_splits: how many random halves.
        quantile: share of the halves that stay below the floor.
        seed: of the splits.
    """
    if real.ndim != 2 or len(real) < 4:
        raise ValueError(f"two halves need features (n, d) with n >= 4, got {tuple(real.shape)}")
    half = len(real) // 2
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(len(real), generator=generator) for _ in range(num_splits)])
    first, second = (
        torch.zeros(num_splits, len(real)).scatter_(1, part, 1.0)
        for part in (orders[:, :half], orders[:, half : 2 * half])
    )
    distances = resampled_kernel_distances(real, real, first, second)
    return convert_floor(distances.quantile(quantile).item(), (half, half), wanted)


def _drawn_with_replacement(num: int, times: int, generator: torch.Generator) -> Tensor:
    """How often each of `num` videos came in `num` draws, int64 `(times, num)`."""
    drawn = torch.randint(num, (times, num), generator=generator)
    return torch.stack([row.bincount(minlength=num) for row in drawn])
