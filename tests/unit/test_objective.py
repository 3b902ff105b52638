"""The training loss against what can be computed by hand."""

import pytest
import torch
from torch import Tensor

from src.diffusion import noise_schedule
from src.diffusion.conditioning import Condition, GivenFrames
from src.diffusion.objective import denoising_loss
from src.diffusion.parameterization import Parameterization

TABLE = noise_schedule.linear(1000, 0.0015, 0.0155)
TIMES = torch.tensor([0, 400, 999])
LEVELS = torch.tensor([3, 100, 249])


def randn(seed: int) -> Tensor:
    return torch.randn(3, 2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def given(latents: Tensor) -> Condition:
    """One given frame in the first clip, two in the second, none in the third."""
    mask = torch.zeros(3, 1, 4, 5, 5, dtype=torch.float64)
    mask[0, :, :1] = mask[1, :, :2] = 1
    return Condition(GivenFrames(latents, mask, LEVELS))


def zero(noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    return torch.zeros_like(noisy_latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("error", [torch.square, torch.abs])
def test_given_frames_take_no_part_in_the_mean(prediction_type: str, error) -> None:
    process = Parameterization(TABLE, prediction_type)
    latents, noise = randn(0), randn(1)
    loss = denoising_loss(zero, process, latents, noise, TIMES, given(latents), error=error)
    target = process.target(latents, noise, TIMES)
    by_hand = [error(clip[:, n:]).mean() for clip, n in zip(target, (1, 2, 0), strict=True)]
    torch.testing.assert_close(loss, torch.stack(by_hand))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "sample"])
def test_given_noise_keeps_given_frames_with_the_target_of_their_own_level(prediction_type: str) -> None:
    process = Parameterization(TABLE, prediction_type)
    latents, noise, given_noise = randn(0), randn(1), randn(2)
    condition = given(process.add_noise(latents, given_noise, LEVELS))
    loss = denoising_loss(
        zero, process, latents, noise, TIMES, condition, error=torch.abs, given_noise=given_noise
    )
    a = TABLE[LEVELS].reshape(-1, 1, 1, 1, 1)
    own = {
        "epsilon": given_noise,
        "sample": latents,
        "v": a.sqrt() * given_noise - (1 - a).sqrt() * latents,
    }[prediction_type]
    mask = condition.frames.mask
    target = process.target(latents, noise, TIMES) * (1 - mask) + own * mask
    torch.testing.assert_close(loss, target.abs().mean(dim=(1, 2, 3, 4)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "sample"])
def test_frames_with_levels_of_their_own_are_denoised_each_from_its_own(prediction_type: str) -> None:
    process = Parameterization(TABLE, prediction_type)
    latents, noise, given_noise = randn(0), randn(1), randn(2)
    levels = torch.tensor([[7, -1, -1, 200], [-1, 0, -1, -1], [-1, -1, -1, -1]])
    mask = (levels >= 0).double()[:, None, :, None, None].expand(-1, 1, -1, 5, 5)
    perturbed = process.add_noise(latents, given_noise, levels.clamp(min=0))
    loss = denoising_loss(
        zero, process, latents, noise, TIMES, Condition(GivenFrames(perturbed, mask, levels)),
        error=torch.square, given_noise=given_noise,
    )  # fmt: skip
    target = process.target(latents, noise, TIMES).clone()
    for clip, frame in ((0, 0), (0, 3), (1, 1)):
        x, e, a = latents[clip, :, frame], given_noise[clip, :, frame], TABLE[levels[clip, frame]]
        torch.testing.assert_close(perturbed[clip, :, frame], a.sqrt() * x + (1 - a).sqrt() * e)
        own = {"epsilon": e, "sample": x, "v": a.sqrt() * e - (1 - a).sqrt() * x}
        target[clip, :, frame] = own[prediction_type]
    torch.testing.assert_close(loss, target.square().mean(dim=(1, 2, 3, 4)))


def test_the_exact_prediction_costs_nothing() -> None:
    process = Parameterization(TABLE, "v")
    latents, noise = randn(0), randn(1)
    loss = denoising_loss(
        lambda x, t, c: process.target(latents, noise, t),
        process, latents, noise, TIMES, Condition(), error=torch.square,
    )  # fmt: skip
    assert loss.tolist() == [0, 0, 0]


def test_weights_multiply_each_clips_loss_by_its_times() -> None:
    process = Parameterization(TABLE, "epsilon")
    latents, noise = randn(0), randn(1)
    weights = torch.arange(1000, dtype=torch.float64)
    plain = denoising_loss(zero, process, latents, noise, TIMES, Condition(), error=torch.square)
    weighted = denoising_loss(
        zero, process, latents, noise, TIMES, Condition(), error=torch.square, weights=weights
    )
    torch.testing.assert_close(weighted, plain * TIMES)


def test_given_noise_without_given_frames_is_refused() -> None:
    process = Parameterization(TABLE, "epsilon")
    with pytest.raises(ValueError, match="given frames"):
        denoising_loss(
            zero, process, randn(0), randn(1), TIMES, Condition(), error=torch.abs, given_noise=randn(2)
        )
