"""Weights against their published formulas, and one loss in three forms."""

from functools import partial

import pytest
import torch

from src.diffusion import loss_weighting, noise_schedule
from src.diffusion.conditioning import Condition
from src.diffusion.objective import denoising_loss
from src.diffusion.parameterization import Parameterization

TABLE = noise_schedule.linear(1000, 0.0015, 0.0155)
SNR = TABLE / (1 - TABLE)
MIN_SNR = partial(loss_weighting.min_snr, gamma=5.0)
SIGMOID = partial(loss_weighting.sigmoid, bias=1.5)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [("epsilon", SNR.clamp(max=5) / SNR), ("v", SNR.clamp(max=5) / (SNR + 1)), ("sample", SNR.clamp(max=5))],
)
def test_min_snr_is_the_papers_for_each_prediction(prediction_type: str, expected: torch.Tensor) -> None:
    weights = MIN_SNR(Parameterization(TABLE, prediction_type))  # type: ignore[arg-type]
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


def test_sigmoid_is_the_papers_for_noise_and_for_the_sample() -> None:
    """sigmoid(b - λ) on the noise's error is e^b sigmoid(λ - b) on the sample's, λ the log SNR."""
    of_noise = SIGMOID(Parameterization(TABLE, "epsilon"))
    torch.testing.assert_close(of_noise, torch.sigmoid(1.5 - SNR.log()), rtol=1e-9, atol=0)
    of_sample = SIGMOID(Parameterization(TABLE, "sample"))
    expected = torch.exp(torch.tensor(1.5).double()) * torch.sigmoid(SNR.log() - 1.5)
    torch.testing.assert_close(of_sample, expected, rtol=1e-9, atol=0)


def test_without_weighting_all_times_are_alike() -> None:
    assert loss_weighting.none(Parameterization(TABLE, "v")).eq(1).all()


@pytest.mark.parametrize("weighting", [MIN_SNR, SIGMOID], ids=["min_snr", "sigmoid"])
def test_it_is_one_loss_whatever_is_predicted(weighting) -> None:
    """An estimate of the sample, told as noise or as v, costs the same."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, estimate = (
        torch.randn(6, 2, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    timesteps = torch.tensor([0, 5, 100, 400, 700, 999])
    losses = []
    for prediction_type in ("epsilon", "v", "sample"):
        process = Parameterization(TABLE, prediction_type)  # type: ignore[arg-type]

        def denoiser(noisy, times, condition, process=process):
            signal, spread = process.coefficients(times, noisy)
            told_noise = (noisy - signal * estimate) / spread
            return process.target(estimate, told_noise, times)

        losses.append(
            denoising_loss(
                denoiser,
                process,
                latents,
                noise,
                timesteps,
                Condition(),
                error=torch.square,
                weights=weighting(process),
            )
        )
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-8, atol=0)
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-8, atol=0)


def test_pure_noise_weighs_nothing_and_is_finite() -> None:
    table = noise_schedule.rescale_to_zero_terminal_snr(TABLE)
    for weighting in (MIN_SNR, SIGMOID):
        weights = weighting(Parameterization(table, "v"))
        assert weights.isfinite().all() and weights[-1] == 0


def test_an_impossible_gamma_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma must be positive"):
        loss_weighting.min_snr(Parameterization(TABLE, "v"), gamma=0.0)
