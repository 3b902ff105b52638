"""Samplers against a law whose exact denoiser is known: a Gaussian in every coordinate."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from src.diffusion import noise_schedule, samplers

TABLE = noise_schedule.cosine(1000, 0.008, 0.999)
MEAN, VARIANCE = 0.7, 0.3


def exact(noisy: Tensor, timesteps: Tensor) -> Tensor:
    """E[x | x_t] for x ~ N(MEAN, VARIANCE)."""
    alpha = TABLE[timesteps].reshape(-1, 1, 1, 1, 1)
    gain = VARIANCE * alpha.sqrt() / (VARIANCE * alpha + 1 - alpha)
    return MEAN + gain * (noisy - alpha.sqrt() * MEAN)


def draws(seed: int, count: int):
    def draw(i: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + i + 1)
        return torch.randn(count, 1, 1, 1, 1, dtype=torch.float64, generator=generator)

    return draw


@pytest.mark.parametrize(
    "sampler",
    [
        partial(samplers.ddim, num_sampling_steps=250, eta=0.0),
        partial(samplers.ddim, num_sampling_steps=250, eta=1.0),
        partial(samplers.ddpm, num_sampling_steps=250),
        partial(samplers.ddpm, num_sampling_steps=1000),
    ],
)
def test_the_known_law_is_reached(sampler: samplers.Sampler) -> None:
    count = 50_000
    draw = draws(3, count)
    samples = sampler(exact, draw(-1), TABLE, draw)
    # Standard errors are 0.0025 of the mean and 0.0019 of the variance; discretization adds at most 0.01.
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert samples.var().item() == pytest.approx(VARIANCE, abs=0.012)


def test_ddim_solves_the_ode_with_first_order_convergence() -> None:
    """The probability flow maps N(0, 1) affinely to the law; the error halves with the step."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    start = TABLE[-1]
    spread = (VARIANCE * start + 1 - start).sqrt()
    truth = MEAN + VARIANCE**0.5 * (noise - start.sqrt() * MEAN) / spread
    errors = []
    for steps in (50, 100, 200):
        got = samplers.ddim(exact, noise, TABLE, draws(0, 9), num_sampling_steps=steps, eta=0.0)
        errors.append((got - truth).abs().max().item())
    assert errors[-1] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert 1.6 < coarse / fine < 2.5


def test_ddpm_is_ddim_with_full_variance() -> None:
    draw = draws(5, 16)
    full = samplers.ddim(exact, draw(-1), TABLE, draw, num_sampling_steps=20, eta=1.0)
    ancestral = samplers.ddpm(exact, draw(-1), TABLE, draw, num_sampling_steps=20)
    torch.testing.assert_close(full, ancestral, rtol=0, atol=1e-9)


def test_timesteps_span_the_schedule() -> None:
    assert samplers.sampling_timesteps(1000, 1000) == list(range(999, -1, -1))
    assert samplers.sampling_timesteps(1000, 3) == [999, 500, 0]
    assert samplers.sampling_timesteps(1000, 1) == [999]
    with pytest.raises(ValueError, match="1000"):
        samplers.sampling_timesteps(1000, 1001)
