"""From noise to latents: one function per algorithm, one signature.

``sampler(denoise, noise, alphas_cumprod, draw_noise)``, where

* ``denoise(noisy_latents, timesteps) -> clean latents`` is the model's estimate of the clean sample,
* ``noise`` is ``b c t h w`` from a standard normal distribution,
* ``alphas_cumprod`` is the noise schedule, float64 ``(num_timesteps,)``; its last entry may be 0,
* ``draw_noise(i)`` gives the fresh noise of sampling step ``i``, shaped like ``noise``.

Guidance, parameterization and conditions wrap the denoiser; no sampler knows of them. Every sampler begins at
the schedule's last time, ends with the clean sample, and calls the denoiser only at times of the schedule,
whose own noise levels set the size of its steps. Coefficients are Python numbers: the table is read once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
DrawNoise = Callable[[int], Tensor]
Sampler = Callable[[Denoise, Tensor, Tensor, DrawNoise], Tensor]
Spacing = Literal["log_snr", "time"]

# Below this half-log-SNR latents are noise but for half a per cent, and steps would be wasted: the cosine
# schedule has a third of its range there.
LEAST_HALF_LOG_SNR = -5.1


# ---------------------------------------------------------------- when to call the denoiser


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


def half_log_snr(alphas_cumprod: Tensor) -> Tensor:
    """``log(sqrt(a) / sqrt(1 - a))``, the λ of Lu et al. 2022; -inf where nothing but noise is left."""
    return 0.5 * (alphas_cumprod.log() - torch.log1p(-alphas_cumprod))


def log_snr_timesteps(alphas_cumprod: Tensor, num_sampling_steps: int) -> list[int]:
    """Times from the last to the first whose log-SNR is evenly spaced, as nearly as the schedule allows.

    Raises:
        ValueError: if more steps are asked for than the schedule has, or fewer than one.
    """
    log_snr = half_log_snr(alphas_cumprod.cpu())
    least = max(float(log_snr[-1]), LEAST_HALF_LOG_SNR)
    wanted = torch.linspace(least, float(log_snr[0]), num_sampling_steps, dtype=torch.float64)
    return _nearest_timesteps(log_snr, wanted)


def rho_timesteps(alphas_cumprod: Tensor, num_sampling_steps: int, rho: float) -> list[int]:
    """Times from the last to the first whose ``sigma ** (1 / rho)`` is evenly spaced, as nearly as possible.

    ``sigma = sqrt((1 - a) / a)`` is the noise relative to the signal (Karras et al. 2022, eq. 5).

    Raises:
        ValueError: if more steps are asked for than the schedule has, or fewer than one; or unless rho > 0.
    """
    if rho <= 0.0:
        raise ValueError(f"rho must be positive, got {rho}; Karras et al. use 7")
    log_snr = half_log_snr(alphas_cumprod.cpu())
    least = max(float(log_snr[-1]), LEAST_HALF_LOG_SNR)
    first, end = math.exp(-least / rho), math.exp(-float(log_snr[0]) / rho)
    wanted = -rho * torch.linspace(first, end, num_sampling_steps, dtype=torch.float64).log()
    return _nearest_timesteps(log_snr, wanted)


def _nearest_timesteps(log_snr: Tensor, wanted: Tensor) -> list[int]:
    """Distinct times whose log-SNR is nearest to what is wanted, the last time of the schedule first.

    Args:
        log_snr: of the schedule, decreasing, ``(num_timesteps,)``.
        wanted: increasing, ``(num_sampling_steps,)``.
    """
    # Every later step needs a time of its own, so neighbours are taken where two would fall together.
    times = sampling_timesteps(len(log_snr), len(wanted))[:1]
    for i, value in enumerate(wanted[1:], start=2):
        nearest = int((log_snr - value).abs().argmin())
        times.append(max(min(nearest, times[-1] - 1), len(wanted) - i))
    return times


@dataclass(frozen=True)
class _Step:
    """From one time to the next: the schedule's alphas_cumprod now and after; 1 after the last step."""

    time: int
    now: float
    after: float

    def timesteps(self, latents: Tensor) -> Tensor:
        """The time for each sample of a batch, int64 ``b``."""
        return torch.full((len(latents),), self.time, dtype=torch.int64, device=latents.device)

    @property
    def size(self) -> float:
        """The step in half-log-SNR, infinite from pure noise and to the clean sample."""
        if self.now == 0.0 or self.after == 1.0:
            return math.inf
        return 0.5 * math.log(self.after * (1.0 - self.now) / (self.now * (1.0 - self.after)))


def _steps(alphas_cumprod: Tensor, times: list[int]) -> list[_Step]:
    """The steps through some times and on to the clean sample."""
    table = alphas_cumprod.tolist()
    signal = [table[time] for time in times] + [1.0]
    return [_Step(*step) for step in zip(times, signal[:-1], signal[1:], strict=True)]


# ---------------------------------------------------------------- how to go from one time to the next


def _advance(
    latents: Tensor, sample: Tensor, step: _Step, eta: float, draw_noise: Callable[[], Tensor]
) -> Tensor:
    """Latents at the next time for an estimate of the clean sample (Song et al. 2021, eq. 12).

    ``eta=0`` keeps the noise that the estimate implies: the exact flow for a constant estimate, hence the
    first-order step of DPM-Solver++ (Lu et al. 2022b, eq. 9). ``eta=1`` draws from the posterior
    ``q(x_s | x_t, x_0)`` (Ho et al. 2020, eqs. 6 and 7), the first-order step of SDE-DPM-Solver++.

    Args:
        latents: ``b c t h w`` at the step's time.
        sample: the estimate, ``b c t h w``.
        step: whence and whither.
        eta: share of the posterior's standard deviation that is drawn afresh, from 0 to 1.
        draw_noise: gives fresh noise; called only if some is needed.
    """
    spread = eta * math.sqrt((1.0 - step.after) / (1.0 - step.now) * (1.0 - step.now / step.after))
    of_latents = math.sqrt(max(1.0 - step.after - spread**2, 0.0) / (1.0 - step.now))
    of_sample = math.sqrt(step.after) - math.sqrt(step.now) * of_latents
    latents = of_sample * sample + of_latents * latents
    return latents + spread * draw_noise() if spread > 0.0 else latents


# ---------------------------------------------------------------- the samplers


def ddim(
    denoise: Denoise,
    noise: Tensor,
    alphas_cumprod: Tensor,
    draw_noise: DrawNoise,
    *,
    num_sampling_steps: int,
    eta: float,
) -> Tensor:
    """Denoising diffusion implicit model (Song et al. 2021, eq. 12), at evenly spaced times.

    Args:
        num_sampling_steps: calls of the denoiser.
        eta: 0 is deterministic, 1 has the variance of the ancestral sampler.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be between 0 (deterministic) and 1 (ancestral), got {eta}")
    latents = noise
    times = sampling_timesteps(len(alphas_cumprod), num_sampling_steps)
    for i, step in enumerate(_steps(alphas_cumprod, times)):
        sample = denoise(latents, step.timesteps(latents))
        latents = _advance(latents, sample, step, eta, partial(draw_noise, i))
    return latents


def ddpm(
    denoise: Denoise,
    noise: Tensor,
    alphas_cumprod: Tensor,
    draw_noise: DrawNoise,
    *,
    num_sampling_steps: int,
) -> Tensor:
    """Ancestral sampling from the posterior ``q(x_s | x_t, x_0)`` (Ho et al. 2020, Algorithm 2).

    With fewer sampling steps than the schedule has, the posterior between the chosen times is used.

    Args:
        num_sampling_steps: calls of the denoiser; the schedule's length is the original algorithm.
    """
    return ddim(denoise, noise, alphas_cumprod, draw_noise, num_sampling_steps=num_sampling_steps, eta=1.0)


def dpm_solver(
    denoise: Denoise,
    noise: Tensor,
    alphas_cumprod: Tensor,
    draw_noise: DrawNoise,
    *,
    num_sampling_steps: int,
    spacing: Spacing,
) -> Tensor:
    """DPM-Solver++(2M), a second-order multistep solver of the probability flow.

    Source: Lu et al. 2022b (arXiv 2211.01095), Algorithm 2. The first step, and the last one to the clean
    sample, are of first order.

    Args:
        num_sampling_steps: calls of the denoiser.
        spacing: times evenly spaced in ``log_snr`` or in ``time``.
    """
    return _multistep(denoise, noise, alphas_cumprod, draw_noise, num_sampling_steps, spacing, eta=0.0)


def dpm_solver_sde(
    denoise: Denoise,
    noise: Tensor,
    alphas_cumprod: Tensor,
    draw_noise: DrawNoise,
    *,
    num_sampling_steps: int,
    spacing: Spacing,
) -> Tensor:
    """SDE-DPM-Solver++(2M), the multistep solver of the diffusion's reverse equation.

    Source: Lu et al. 2022b (arXiv 2211.01095), section 5 and appendix B.

    Args:
        num_sampling_steps: calls of the denoiser.
        spacing: times evenly spaced in ``log_snr`` or in ``time``.
    """
    return _multistep(denoise, noise, alphas_cumprod, draw_noise, num_sampling_steps, spacing, eta=1.0)


def _multistep(
    denoise: Denoise,
    noise: Tensor,
    alphas_cumprod: Tensor,
    draw_noise: DrawNoise,
    num_sampling_steps: int,
    spacing: Spacing,
    eta: float,
) -> Tensor:
    """First-order steps whose estimate is extrapolated to the step's middle from the two last calls.

    With ``r = h_before / h``, sizes in half-log-SNR, the estimate is ``D = x_i + (x_i - x_(i-1)) / (2 r)``
    (Lu et al. 2022b, Algorithm 2). A step out of pure noise is infinitely long, so the one after it has
    ``D = x_i``.
    """
    if spacing not in get_args(Spacing):
        raise ValueError(f"unknown spacing {spacing!r}; choose one of {', '.join(get_args(Spacing))}")
    times = (
        log_snr_timesteps(alphas_cumprod, num_sampling_steps)
        if spacing == "log_snr"
        else sampling_timesteps(len(alphas_cumprod), num_sampling_steps)
    )
    latents = noise
    before: tuple[Tensor, float] | None = None
    for i, step in enumerate(_steps(alphas_cumprod, times)):
        sample = denoise(latents, step.timesteps(latents))
        estimate = sample
        if before is not None and math.isfinite(step.size):
            estimate = sample + step.size / (2.0 * before[1]) * (sample - before[0])
        latents = _advance(latents, estimate, step, eta, partial(draw_noise, i))
        before = (sample, step.size)
    return latents


def heun(
    denoise: Denoise,
    noise: Tensor,
    alphas_cumprod: Tensor,
    draw_noise: DrawNoise,
    *,
    num_sampling_steps: int,
    rho: float,
) -> Tensor:
    """Heun's second-order method in the noise level (Karras et al. 2022, Algorithm 1), without churn.

    With ``x / sqrt(a)`` for the latents and ``sigma = sqrt((1 - a) / a)`` for the time, the flow is
    ``dx/dsigma = (x - sample) / sigma``. The last step, to the clean sample, is Euler's, and so is a step out
    of pure noise.

    Args:
        num_sampling_steps: noise levels that are visited; each but the last costs two calls of the denoiser,
            so there are ``2 num_sampling_steps - 1`` calls (one less from pure noise).
        rho: how strongly noise levels are crowded towards the clean end; 7 in the paper.
    """
    latents = noise
    times = rho_timesteps(alphas_cumprod, num_sampling_steps, rho)
    steps = _steps(alphas_cumprod, times)
    for i, step in enumerate(steps):
        sample = denoise(latents, step.timesteps(latents))
        euler = _advance(latents, sample, step, 0.0, partial(draw_noise, i))
        if not math.isfinite(step.size):
            latents = euler
            continue
        ahead = denoise(euler, steps[i + 1].timesteps(euler))
        # The mean of both slopes, in latents: Euler's step plus half of what the second slope adds.
        now, after = (math.sqrt((1.0 - a) / a) for a in (step.now, step.after))
        slope_difference = (ahead - sample) * (-1.0 / after)
        latents = euler + 0.5 * (after - now) * math.sqrt(step.after) * slope_difference
    return latents
