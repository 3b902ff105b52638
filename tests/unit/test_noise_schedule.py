"""Schedules against their published formulas, and against the golden tables."""

import math

import pytest
import torch

from src.diffusion import noise_schedule

TABLES = {
    "linear": noise_schedule.linear(1000, 0.0015, 0.0155),
    "cosine": noise_schedule.cosine(1000, 0.008, 0.999),
}


def test_linear_is_linear_in_the_square_root_of_the_variance() -> None:
    table = noise_schedule.linear(1000, 0.0015, 0.0155)
    betas = 1 - table[1:] / table[:-1]
    expected = [
        (math.sqrt(0.0015) + k / 999 * (math.sqrt(0.0155) - math.sqrt(0.0015))) ** 2 for k in range(1, 1000)
    ]
    assert table.dtype == torch.float64
    assert table[0].item() == pytest.approx(1 - 0.0015, rel=1e-12)
    torch.testing.assert_close(betas, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_cosine_follows_the_squared_cosine_until_the_clip() -> None:
    table = noise_schedule.cosine(1000, 0.008, 0.999)

    def signal(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 17, 500, 998):  # the last entry is clipped
        assert table[t].item() == pytest.approx(signal(t + 1) / signal(0), rel=1e-9)
    assert table[999].item() == pytest.approx(table[998].item() * 0.001, rel=1e-9)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_power_gives_the_variances_it_says(exponent: float) -> None:
    table = noise_schedule.power(100, 0.001, 0.04, exponent)
    before = torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    expected = [(0.001 + k / 99 * 0.039) ** exponent for k in range(100)]
    torch.testing.assert_close(1 - table / before, torch.tensor(expected).double(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="exponent"):
        noise_schedule.power(100, 0.04, 0.001, exponent)


@pytest.mark.parametrize("start, end", [(0.0, 0.01), (0.02, 0.01), (0.1, 1.0)])
def test_impossible_variances_are_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="beta_start"):
        noise_schedule.linear(10, start, end)


@pytest.mark.parametrize("table", [TABLES["linear"], TABLES["cosine"]], ids=["linear", "cosine"])
def test_zero_terminal_snr_keeps_the_first_and_ends_in_noise(table: torch.Tensor) -> None:
    rescaled = noise_schedule.rescale_to_zero_terminal_snr(table)
    assert rescaled[-1] == 0 and rescaled[0].item() == pytest.approx(table[0].item(), rel=1e-12)
    # Shifted and scaled: differences of the square roots keep their ratios.
    before, after = table.sqrt().diff(), rescaled.sqrt().diff()
    torch.testing.assert_close(after / after[0], before / before[0], rtol=1e-6, atol=0)


def test_zero_terminal_snr_agrees_with_another_library() -> None:
    from src.metrics.reconstruction import declare_torchvision_operators

    declare_torchvision_operators()
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    table = TABLES["linear"]
    betas = 1 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    ours = noise_schedule.rescale_to_zero_terminal_snr(table)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
