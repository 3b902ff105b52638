"""Fréchet distance against closed forms and scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg
import torch

from src.metrics.frechet import GaussianStatistics, frechet_distance, split_half_distance


def features(num: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) @ mixing * scale + shift


def statistics(x: torch.Tensor) -> GaussianStatistics:
    return GaussianStatistics(x.shape[1]).update(x)


def test_mean_and_covariance_are_those_of_numpy_however_they_are_streamed():
    x = features(103, 7, 0, shift=5.0)
    streamed = GaussianStatistics(7)
    for part in x.float().split(10):
        streamed.update(part)
    x = x.float().double().numpy()
    np.testing.assert_allclose(streamed.mean.numpy(), x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance.numpy(), np.cov(x, rowvar=False), rtol=1e-10)
    assert streamed.count == 103


def test_ranks_merge_by_addition():
    x = features(60, 5, 1)
    whole = statistics(x)
    ranks = [statistics(part) for part in (x[:11], x[11:40], x[40:])]
    summed = GaussianStatistics.from_packed(sum(rank.packed() for rank in ranks), 5)
    merged = ranks[0].merge(ranks[1]).merge(ranks[2])
    for other in (summed, merged):
        assert other.count == 60
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.covariance, whole.covariance, rtol=1e-11, atol=1e-11)


def test_one_dimension_has_a_closed_form():
    a, b = features(50, 1, 2, scale=3.0), features(70, 1, 3, scale=0.5, shift=2.0)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected.item(), rel=1e-12)


def test_scaled_sets_have_a_closed_form():
    a = features(400, 20, 4)
    a = a - a.mean(0)
    # Covariances C and 9 C commute: the distance is (3 - 1)² tr C.
    expected = 4 * torch.cov(a.T).trace().item()
    assert frechet_distance(statistics(a), statistics(3 * a)) == pytest.approx(expected, rel=1e-10)


def test_a_shift_costs_its_square_even_where_covariances_are_singular():
    a = features(10, 40, 5)
    shift = torch.linspace(-1, 1, 40, dtype=torch.float64)
    distance = frechet_distance(statistics(a), statistics(a + shift))
    assert distance == pytest.approx(shift.square().sum().item(), rel=1e-10)


@pytest.mark.parametrize(("num_a", "num_b"), [(300, 200), (65, 90)])
def test_it_agrees_with_the_matrix_square_root_of_scipy(num_a, num_b):
    a, b = features(num_a, 64, 6), features(num_b, 64, 7, scale=0.7, shift=0.1)
    x, y = a.numpy(), b.numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-7)


def test_singular_covariances_keep_their_digits():
    # 30 vectors of 200 features: the same computed in the 29-dimensional spaces that they span.
    a, b = features(30, 200, 8), features(30, 200, 9)
    x, y = a - a.mean(0), b - b.mean(0)
    root_trace = torch.linalg.svdvals(x @ y.T).sum() / 29  # F = xᵀ/√29 is a factor of the covariance
    expected = (
        (a.mean(0) - b.mean(0)).square().sum() + (x.square().sum() + y.square().sum()) / 29 - 2 * root_trace
    )
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected.item(), rel=1e-11)


def test_it_is_symmetric_and_zero_for_the_same_set():
    a, b = statistics(features(50, 30, 10)), statistics(features(50, 30, 11))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9 * a.covariance.trace().item())


def test_split_halves_are_disjoint_and_drawn_by_the_generator():
    x = features(41, 6, 12)
    value = split_half_distance(x, torch.Generator().manual_seed(3))
    order = torch.randperm(41, generator=torch.Generator().manual_seed(3))
    assert value == frechet_distance(statistics(x[order[:20]]), statistics(x[order[20:40]]))
    assert value != split_half_distance(x, torch.Generator().manual_seed(4))


def test_what_can_not_be_measured_is_refused():
    one = statistics(features(1, 4, 0))
    with pytest.raises(ValueError, match="at least 2 feature vectors, got 1"):
        frechet_distance(one, one)
    with pytest.raises(ValueError, match="got 4 and 5"):
        frechet_distance(statistics(features(9, 4, 0)), statistics(features(9, 5, 0)))
    with pytest.raises(ValueError, match=r"\(n, 4\), got \(3, 5\)"):
        one.update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="aren't finite"):
        one.update(torch.tensor([[0.0, 1.0, float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="packed statistics of 4 features"):
        GaussianStatistics.from_packed(torch.zeros(5), 4)
    with pytest.raises(ValueError, match="5 features into those of 4"):
        one.merge(GaussianStatistics(5))
