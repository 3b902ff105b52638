"""Fréchet distance against closed forms and scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg
import torch

from src.metrics.frechet import (
    GaussianStatistics,
    frechet_distance,
    resampled_frechet_distances,
)


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
    biased = GaussianStatistics(7, biased=True).update(torch.from_numpy(x))
    np.testing.assert_allclose(biased.covariance.numpy(), np.cov(x, rowvar=False, ddof=0), rtol=1e-10)


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


def test_counts_are_repetitions():
    x = features(30, 5, 13)
    counts = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(0))
    counted = GaussianStatistics(5).update(x, counts)
    repeated = statistics(x.repeat_interleave(counts, 0))
    assert counted.count == repeated.count == counts.sum()
    torch.testing.assert_close(counted.mean, repeated.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(counted.covariance, repeated.covariance, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("per_video", [None, 3])
def test_resampled_distances_are_those_of_repeated_videos(per_video):
    x, y = features(12 * (per_video or 1), 4, 14), features(9 * (per_video or 1), 4, 15)
    if per_video:
        x, y = x.reshape(12, per_video, 4), y.reshape(9, per_video, 4)
    generator = torch.Generator().manual_seed(1)
    counts_x, counts_y = (torch.randint(0, 3, (5, num), generator=generator) for num in (12, 9))
    found = resampled_frechet_distances(x, y, counts_x, counts_y)
    expected = [
        frechet_distance(
            *(
                statistics(side.repeat_interleave(counts, 0).flatten(0, -2))
                for side, counts in ((x, counts_x[i]), (y, counts_y[i]))
            )
        )
        for i in range(5)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


# ---- the rule of TATS, LVDM and DIGAN ----


def numpy_float32_svd(x: np.ndarray, y: np.ndarray) -> float:
    """The rule written in numpy, from the features on, with another library's decompositions."""

    def root(matrix):
        left, values, right = np.linalg.svd(matrix)
        assert values.dtype == np.float32
        return (left * np.where(values < 1e-10, values, np.sqrt(values))) @ right

    x, y = x.astype(np.float32), y.astype(np.float32)
    cov_x, cov_y = (np.cov(side, rowvar=False, dtype=np.float32) for side in (x, y))
    root_x = root(cov_x)
    root_trace = np.trace(root(root_x @ (cov_y @ root_x)))
    return float(np.trace(cov_x + cov_y) - 2 * root_trace + ((x.mean(0) - y.mean(0)) ** 2).sum())


def spectrum(num: int, power: float, seed: int) -> torch.Tensor:
    """Draws of 400 features whose variances fall as k^-power and sum to 1000."""
    generator = torch.Generator().manual_seed(seed)
    variances = torch.arange(1, 401, dtype=torch.float64) ** -power
    variances *= 1000 / variances.sum()
    return torch.randn(num, 400, generator=generator, dtype=torch.float64) * variances.sqrt()


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_float32_rule_is_numpys(power):
    # On steeper spectra two libraries' decompositions in float32 give different distances.
    x, y = spectrum(1000, power, 0), spectrum(1000, power, 1)
    found = frechet_distance(statistics(x), statistics(y), "float32_svd")
    # Of the sum of traces, 2,000, float32 keeps five digits.
    assert found == pytest.approx(numpy_float32_svd(x.numpy(), y.numpy()), abs=1e-2)
    assert found != frechet_distance(statistics(x), statistics(y))


def test_the_float32_rule_takes_no_roots_below_its_threshold():
    # All variances are about 1e-12: unrooted, they leave the traces of equal sets standing.
    x = statistics(1e-6 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    expected = 2 * x.covariance.trace().item()
    assert frechet_distance(x, x, "float32_svd") == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(x, x) < 1e-9 * expected


def test_what_can_not_be_measured_is_refused():
    one = statistics(features(1, 4, 0))
    with pytest.raises(ValueError, match="at least 2 feature vectors, got 1"):
        frechet_distance(one, one)
    with pytest.raises(ValueError, match="got 4 and 5"):
        frechet_distance(statistics(features(9, 4, 0)), statistics(features(9, 5, 0)))
    with pytest.raises(ValueError, match=r"unknown arithmetic 'float16'.*float64, float32_svd"):
        frechet_distance(one, one, "float16")
    with pytest.raises(ValueError, match=r"each of 3 vectors is taken, got \(2,\)"):
        one.update(torch.zeros(3, 4), torch.ones(2))
    with pytest.raises(ValueError, match="whole numbers of 0 or more"):
        one.update(torch.zeros(2, 4), torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match=r"\(n, 4\), got \(3, 5\)"):
        one.update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="aren't finite"):
        one.update(torch.tensor([[0.0, 1.0, float("nan"), 0.0]]))
