"""Bootstrap and floors against what simulation with known Gaussians gives."""

import functools
import json

import pytest
import torch

from src.metrics.frechet import GaussianStatistics, frechet_distance, resampled_frechet_distances
from src.metrics.kernel import kernel_distance, resampled_kernel_distances
from src.metrics.uncertainty import bootstrap, convert_floor, extrapolated_floor, kernel_floor


def frechet(x: torch.Tensor, y: torch.Tensor) -> float:
    dim = x.shape[-1]
    return frechet_distance(*(GaussianStatistics(dim).update(side.reshape(-1, dim)) for side in (x, y)))


def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
    return kernel_distance(x.flatten(0, -2), y.flatten(0, -2))


DISTANCES = {
    "frechet": (frechet, resampled_frechet_distances),
    "kernel": (kernel, resampled_kernel_distances),
}
DIM, NUM_X, NUM_Y = 10, 150, 100


def pair(seed: int, per_video: int | None = None, shift: float = 0.8) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of Gaussian features apart by `shift`; the vectors of one video resemble each other."""
    generator = torch.Generator().manual_seed(seed)

    def side(num: int) -> torch.Tensor:
        x = torch.randn(num, DIM, generator=generator, dtype=torch.float64)
        if per_video is None:
            return x
        return x[:, None] + 0.5 * torch.randn(num, per_video, DIM, generator=generator, dtype=torch.float64)

    return side(NUM_X), side(NUM_Y) + shift


@functools.cache
def sampled(name: str, per_video: int | None) -> torch.Tensor:
    """The distance of 500 independent pairs of sets."""
    distance = DISTANCES[name][0]
    return torch.tensor([distance(*pair(seed, per_video)) for seed in range(500)])


@pytest.mark.parametrize("per_video", [None, 4])
@pytest.mark.parametrize("name", DISTANCES)
def test_the_interval_is_as_wide_as_the_distance_scatters(name, per_video):
    truth = sampled(name, per_video)
    wide = (truth.quantile(0.975) - truth.quantile(0.025)).item()
    found = [
        bootstrap(*pair(1000 + seed, per_video), DISTANCES[name][1], num_replicates=100, seed=seed)
        for seed in range(20)
    ]
    # Within 15 %, on average over sets; drawing frames in place of videos would halve it.
    widths = torch.tensor([u.interval[1] - u.interval[0] for u in found])
    assert widths.mean().item() == pytest.approx(wide, rel=0.15)
    deviations = torch.tensor([u.deviation for u in found])
    assert deviations.mean().item() == pytest.approx(truth.std().item(), rel=0.15)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_interval_covers_the_expected_distance_in_95_of_100_cases(name):
    expected = sampled(name, None).mean().item()
    found = [
        bootstrap(*pair(2000 + seed), DISTANCES[name][1], num_replicates=100, seed=seed) for seed in range(60)
    ]
    covered = sum(u.interval[0] <= expected <= u.interval[1] for u in found)
    assert covered >= 52  # of 60 by chance, 57 expected: fewer come in 1 of 300 runs


@pytest.mark.parametrize("name", DISTANCES)
def test_between_sets_of_one_law_the_interval_is_wide_and_not_narrow(name):
    distance, resampled = DISTANCES[name]
    truth = torch.tensor([distance(*pair(seed, shift=0.0)) for seed in range(300)])
    found = [
        bootstrap(*pair(1000 + seed, shift=0.0), resampled, num_replicates=100, seed=seed)
        for seed in range(20)
    ]
    deviation = torch.tensor([u.deviation for u in found]).mean().item()
    assert truth.std().item() < deviation < 3 * truth.std().item()


def test_replicates_are_biased_upwards_and_centred():
    """Uncentred percentiles would miss the estimate itself."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(100, 80, generator=generator, dtype=torch.float64) for _ in range(2))
    found = bootstrap(x, y, num_replicates=50, seed=0)
    assert found.estimate == pytest.approx(frechet(x, y), rel=1e-9)
    assert found.bias > 5 * found.deviation
    assert found.interval[0] < found.estimate < found.interval[1]
    assert sum(found.interval) / 2 == pytest.approx(found.estimate, abs=found.deviation)


def test_the_draws_are_those_of_the_seed():
    x, y = pair(0)
    first = bootstrap(x, y, num_replicates=30, seed=5)
    assert bootstrap(x, y, num_replicates=30, seed=5) == first
    assert bootstrap(x, y, num_replicates=30, seed=6) != first
    written = json.loads(json.dumps(first.to_dict()))
    assert written["interval"] == list(first.interval)
    assert written["num_replicates"] == 30


def test_a_replicate_draws_as_many_videos_as_there_are():
    seen = []

    def distances(x, y, counts_x, counts_y):
        seen.append((counts_x, counts_y))
        return torch.arange(float(len(counts_x)), dtype=torch.float64)

    x, y = torch.zeros(2000, 3, 4), torch.zeros(500, 3, 4)
    bootstrap(x, y, distances, num_replicates=20, seed=0)
    (ones_x, ones_y), (counts_x, counts_y) = seen
    assert (ones_x == 1).all() and (ones_y == 1).all()
    assert (counts_x.sum(1) == 2000).all() and (counts_y.sum(1) == 500).all()
    # 1 - 1/e of the videos are drawn at all.
    assert (counts_x > 0).double().mean().item() == pytest.approx(0.632, abs=0.01)


# ---- floors ----


def law(num: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.5
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize(("n", "m"), [(800, 800), (800, 100), (150, 600)])
def test_a_floor_converts_to_other_numbers_as_simulated(n, m):
    dim, trials = 20, 60

    def floor(num_x: int, num_y: int) -> float:
        distances = [frechet(law(num_x, dim, 2 * i), law(num_y, dim, 2 * i + 1)) for i in range(trials)]
        return sum(distances) / trials

    # Second order in 1/n is left out by the law: within 6 % here, together with the simulation's own error.
    assert convert_floor(floor(300, 200), (300, 200), (n, m)) == pytest.approx(floor(n, m), rel=0.06)


def test_a_floor_goes_on_by_the_power_that_was_measured():
    measured = [(12, 990.0), (24, 990.0 / 2**0.6)]
    assert extrapolated_floor(measured, (48, 48)) == pytest.approx(990.0 / 4**0.6)
    assert extrapolated_floor(measured, (24, 24)) == pytest.approx(990.0 / 2**0.6)
    # Of unequal sides the harmonic mean counts, as in the law of 1/n.
    assert extrapolated_floor(measured, (40, 120)) == pytest.approx(extrapolated_floor(measured, (60, 60)))
    assert extrapolated_floor(measured[1:], (48, 48)) == pytest.approx(
        convert_floor(measured[1][1], (24, 24), (48, 48))
    )
    assert extrapolated_floor([(12, 1000.0), (24, 300.0)], (48, 48)) == 150.0, "never faster than 1/n"


def test_with_fewer_videos_than_features_the_floor_is_met_better_than_by_the_law_of_1_over_n():
    dim, scale = 100, torch.arange(1, 101, dtype=torch.float64) ** -0.5

    def floor(size: int, draws: int = 6) -> float:
        found = []
        for seed in range(draws):
            draw = torch.Generator().manual_seed(100 * size + seed)
            x, y = (torch.randn(size, dim, generator=draw, dtype=torch.float64) * scale for _ in range(2))
            found.append(frechet(x, y))
        return sum(found) / draws

    by_size = [(size, floor(size)) for size in (12, 24, 48)]
    truth = by_size[2][1]
    assert extrapolated_floor(by_size[:2], (48, 48)) == pytest.approx(truth, rel=0.2)
    assert convert_floor(by_size[1][1], (24, 24), (48, 48)) < 0.85 * truth


def test_the_kernel_floor_is_passed_by_chance_alone_in_5_of_100_cases():
    """It is measured with halves of 150 and wanted for 60 against 200."""
    floor = kernel_floor(law(300, 10, 0), (60, 200), num_splits=400, seed=0)
    distances = torch.tensor(
        [kernel_distance(law(60, 10, 2 * i + 1), law(200, 10, 2 * i + 2)) for i in range(400)]
    )
    # The quantile of the halves has an error of its own.
    assert (distances > floor).double().mean().item() == pytest.approx(0.05, abs=0.03)


def test_halves_of_the_kernel_floor_are_disjoint():
    x = law(4, 3, 0)
    floor = kernel_floor(x, (2, 2), num_splits=50, quantile=1.0, seed=0)
    halves = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    assert floor == pytest.approx(max(kernel_distance(x[[*a]], x[[*b]]) for a, b in halves), rel=1e-9)


def test_what_can_not_be_measured_is_refused():
    x = torch.zeros(10, 4)
    with pytest.raises(ValueError, match=r"\(10, 4\) and \(10, 5\)"):
        bootstrap(x, torch.zeros(10, 5), seed=0)
    with pytest.raises(ValueError, match=r"\(10, 4\) and \(10, 1, 4\)"):
        bootstrap(x, x[:, None], seed=0)
    with pytest.raises(ValueError, match="num_replicates=10"):
        bootstrap(x, x, num_replicates=10, seed=0)
    with pytest.raises(ValueError, match=r"wanted=\(0, 5\)"):
        convert_floor(1.0, (5, 5), (0, 5))
    with pytest.raises(ValueError, match="n >= 4"):
        kernel_floor(x[:3], (5, 5), seed=0)
