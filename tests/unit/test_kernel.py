"""Kernel distance against a direct sum over pairs and against its expectation."""

import itertools
import statistics

import pytest
import torch

from src.metrics import kernel
from src.metrics.kernel import kernel_distance, kernel_distance_subsets, resampled_kernel_distances


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


@pytest.mark.parametrize("rows", [1024, 4])
@pytest.mark.parametrize("per_video", [None, 2])
def test_resampled_distances_are_the_sums_over_repeated_videos(monkeypatch, rows, per_video):
    monkeypatch.setattr(kernel, "_ROWS_PER_BLOCK", rows)
    x, y = draw(9 * (per_video or 1), 5, 0), draw(7 * (per_video or 1), 5, 1) * 1.5
    if per_video:
        x, y = x.reshape(9, per_video, 5), y.reshape(7, per_video, 5)
    generator = torch.Generator().manual_seed(2)
    counts_x, counts_y = (torch.randint(0, 4, (3, num), generator=generator) for num in (9, 7))
    found = resampled_kernel_distances(x, y, counts_x, counts_y)
    for i in range(3):
        taken = [
            side.repeat_interleave(counts, 0).flatten(0, -2)
            for side, counts in ((x, counts_x[i]), (y, counts_y[i]))
        ]
        assert found[i].item() == pytest.approx(direct(*taken), rel=1e-10)


def test_subsets_are_drawn_without_replacement_and_averaged():
    x, y = draw(12, 4, 0), draw(9, 4, 1) + 0.4
    found = kernel_distance_subsets(x, y, num_subsets=6, subset_size=5, seed=3)
    generator = torch.Generator().manual_seed(3)
    of_x = [x[torch.randperm(12, generator=generator)[:5]] for _ in range(6)]
    of_y = [y[torch.randperm(9, generator=generator)[:5]] for _ in range(6)]
    estimates = [direct(a, b) for a, b in zip(of_x, of_y, strict=True)]
    assert found.mean == pytest.approx(statistics.mean(estimates), rel=1e-11)
    assert found.deviation == pytest.approx(statistics.pstdev(estimates), rel=1e-9)
    assert (found.num_subsets, found.subset_size) == (6, 5)
    assert kernel_distance_subsets(x, y, 6, 5, seed=3) == found
    assert kernel_distance_subsets(x, y, 6, 5, seed=4) != found


def test_a_subset_of_everything_is_the_whole_estimate():
    x, y = draw(20, 4, 0), draw(20, 4, 1) + 0.4
    found = kernel_distance_subsets(x, y, num_subsets=3, subset_size=20, seed=0)
    assert found.mean == pytest.approx(kernel_distance(x, y), rel=1e-11)
    assert found.deviation < 1e-11


def test_the_mean_over_subsets_is_unbiased():
    x, y = draw(40, 4, 0), draw(50, 4, 1) + 0.4
    found = kernel_distance_subsets(x, y, num_subsets=4000, subset_size=10, seed=0)
    # Subsets of fixed sets average to the estimate of these sets.
    assert abs(found.mean - kernel_distance(x, y)) < 4 * found.deviation / 4000**0.5


def test_subsets_larger_than_the_sets_are_refused():
    with pytest.raises(ValueError, match=r"of 2 to 12 videos can be drawn of 30 and 12, .*subset_size=13"):
        kernel_distance_subsets(draw(30, 4, 0), draw(12, 4, 1), subset_size=13, seed=0)
    with pytest.raises(ValueError, match="num_subsets=0"):
        kernel_distance_subsets(draw(30, 4, 0), draw(12, 4, 1), num_subsets=0, subset_size=5, seed=0)


def test_wrong_counts_are_refused():
    x, y = draw(5, 4, 0), draw(6, 4, 1)
    with pytest.raises(ValueError, match=r"r × 5 and r × 6, got \(2, 4\) and \(2, 6\)"):
        resampled_kernel_distances(x, y, torch.ones(2, 4), torch.ones(2, 6))
    with pytest.raises(ValueError, match="at least 2 vectors"):
        resampled_kernel_distances(x, y, torch.eye(5), torch.ones(5, 6))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
        kernel_distance(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="got 3 and 1"):
        kernel_distance(torch.zeros(3, 4), torch.zeros(1, 4))
