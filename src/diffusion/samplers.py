"""From noise to latents: one function per algorithm, one signature.

``sampler(denoise, noise, alphas_cumprod, draw_noise)``, where

* ``denoise(noisy_latents, timesteps) -> clean latents`` is the model's estimate of the clean sample,
* ``noise`` is ``b c t h w`` from a standard normal distribution,
* ``alphas_cumprod`` is the noise schedule, float64 ``(num_timesteps,)``,
* ``draw_noise(i)`` gives the fresh noise of sampling step ``i``, shaped like ``noise``.

Guidance, parameterization and conditions wrap the denoiser; no sampler knows of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
DrawNoise = Callable[[int], Tensor]
Sampler = Callable[[Denoise, Tensor, Tensor, DrawNoise], Tensor]


def sampling_timesteps(num_timesteps: int, num_sampling_steps: int) -> list[int]:
    """Evenly spaced times from the last to the first, both included, in decreasing order.

    Raises:
        ValueError: if more steps are asked for than the schedule has, or fewer than one.
    """
    if not 1 <= num_sampling_steps <= num_timesteps:
        raise ValueError(
            f"num_sampling_steps must be from 1 to the schedule's {num_timesteps}, got {num_sampling_steps}"
        )
    if num_sampling_steps == 1:
        return [num_timesteps - 1]
    times = torch.linspace(num_timesteps - 1, 0, num_sampling_steps, dtype=torch.float64)
    return [int(time) for time in times.round()]


def _steps(alphas_cumprod: Tensor, num_sampling_steps: int) -> list[tuple[int, float, float]]:
    """Triples (time, signal there, signal at the next time); after the last comes the clean sample."""
    times = sampling_timesteps(len(alphas_cumprod), num_sampling_steps)
    signal = [float(alphas_cumprod[time]) for time in times] + [1.0]
    return list(zip(times, signal[:-1], signal[1:], strict=True))


def ddim(
    denoise: Denoise,
    noise: Tensor,
    alphas_cumprod: Tensor,
    draw_noise: DrawNoise,
    *,
    num_sampling_steps: int,
    eta: float,
) -> Tensor:
    """Denoising diffusion implicit model (Song et al. 2021, eq. 12).

    Args:
        num_sampling_steps: calls of the denoiser.
        eta: 0 is deterministic, 1 has the variance of the ancestral sampler.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be between 0 (deterministic) and 1 (ancestral), got {eta}")
    latents = noise
    for i, (time, now, after) in enumerate(_steps(alphas_cumprod, num_sampling_steps)):
        timesteps = torch.full((len(latents),), time, dtype=torch.int64, device=latents.device)
        sample = denoise(latents, timesteps)
        epsilon = (latents - now**0.5 * sample) / (1.0 - now) ** 0.5
        sigma = eta * ((1.0 - after) / (1.0 - now) * (1.0 - now / after)) ** 0.5
        latents = after**0.5 * sample + max(1.0 - after - sigma**2, 0.0) ** 0.5 * epsilon
        if sigma > 0.0:
            latents = latents + sigma * draw_noise(i)
    return latents


def ddpm(
    denoise: Denoise,
    noise: Tensor,
    alphas_cumprod: Tensor,
    draw_noise: DrawNoise,
    *,
    num_sampling_steps: int,
) -> Tensor:
    """Ancestral sampling from the posterior ``q(x_s | x_t, x_0)`` (Ho et al. 2020, eqs. 6 and 7).

    With fewer sampling steps than the schedule has, the posterior between the chosen times is used.

    Args:
        num_sampling_steps: calls of the denoiser; the schedule's length is the original algorithm.
    """
    latents = noise
    for i, (time, now, after) in enumerate(_steps(alphas_cumprod, num_sampling_steps)):
        timesteps = torch.full((len(latents),), time, dtype=torch.int64, device=latents.device)
        sample = denoise(latents, timesteps)
        alpha = now / after
        mean_of_sample = after**0.5 * (1.0 - alpha) / (1.0 - now)
        mean_of_latents = alpha**0.5 * (1.0 - after) / (1.0 - now)
        latents = mean_of_sample * sample + mean_of_latents * latents
        variance = (1.0 - after) / (1.0 - now) * (1.0 - alpha)
        if variance > 0.0:
            latents = latents + variance**0.5 * draw_noise(i)
    return latents
