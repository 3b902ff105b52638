"""The three prediction types say the same thing."""

import pytest
import torch

from src.diffusion import noise_schedule
from src.diffusion.parameterization import Parameterization

TABLE = noise_schedule.linear(1000, 0.0015, 0.0155)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "sample"])
def test_the_exact_prediction_gives_back_sample_and_noise(prediction_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sample, noise = (torch.randn(4, 2, 3, 5, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 10, 500, 999])
    process = Parameterization(TABLE, prediction_type)
    noisy = process.add_noise(sample, noise, timesteps)
    prediction = process.target(sample, noise, timesteps)
    torch.testing.assert_close(process.to_sample(prediction, noisy, timesteps), sample, rtol=0, atol=1e-10)
    torch.testing.assert_close(process.to_noise(prediction, noisy, timesteps), noise, rtol=0, atol=1e-10)


def test_noisy_latents_have_the_variance_of_the_schedule() -> None:
    process = Parameterization(TABLE, "epsilon")
    ones = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    time = torch.tensor([321])
    assert process.add_noise(ones, 0 * ones, time).item() ** 2 == pytest.approx(TABLE[321].item(), rel=1e-12)
    assert process.add_noise(0 * ones, ones, time).item() ** 2 == pytest.approx(
        1 - TABLE[321].item(), rel=1e-12
    )


def test_an_unknown_type_and_a_growing_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"epsilon.*v.*sample"):
        Parameterization(TABLE, "x0")
    with pytest.raises(ValueError, match="decreasing"):
        Parameterization(TABLE.flip(0), "v")
