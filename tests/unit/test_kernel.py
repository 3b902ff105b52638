"""Kernel distance against a direct sum over pairs and against its expectation."""

import itertools

import pytest
import torch

from src.metrics import kernel
from src.metrics.kernel import kernel_distance


def k(x: torch.Tensor, y: torch.Tensor) -> float:
    return (float(x @ y) / len(x) + 1.0) ** 3


def direct(x: torch.Tensor, y: torch.Tensor) -> float:
    within = [sum(k(a, b) for a, b in itertools.permutations(s, 2)) / (len(s) * (len(s) - 1)) for s in (x, y)]
    between = sum(k(a, b) for a, b in itertools.product(x, y)) / (len(x) * len(y))
    return within[0] + within[1] - 2 * between


def draw(num: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows", [1024, 4])
def test_it_is_the_sum_over_pairs_without_the_diagonals(monkeypatch, rows):
    monkeypatch.setattr(kernel, "_ROWS_PER_BLOCK", rows)
    x, y = draw(13, 6, 0), draw(9, 6, 1) * 1.5 + 0.3
    assert kernel_distance(x, y) == pytest.approx(direct(x, y), rel=1e-12)


def test_two_points_each_by_hand():
    # d = 1: within = k(1, 2) = 27 and k(0, 0) = 1, between = 1 throughout.
    assert kernel_distance(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)) == 26.0


def test_it_is_unbiased_where_both_sides_follow_one_law():
    estimates = torch.tensor(
        [kernel_distance(draw(20, 4, 2 * i), draw(15, 4, 2 * i + 1)) for i in range(400)]
    )
    error = estimates.std() / 20
    assert estimates.mean().abs() < 4 * error
    assert estimates.min() < 0


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
        kernel_distance(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="got 3 and 1"):
        kernel_distance(torch.zeros(3, 4), torch.zeros(1, 4))
