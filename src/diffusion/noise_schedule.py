"""How much signal is left at each diffusion time: tables of the cumulative product of alphas.

Each schedule returns ``alphas_cumprod``, float64 of shape ``(num_timesteps,)``, the only table
that is stored: everything else (betas, posterior variances, signal-to-noise ratios) follows from it.
"""

import math

import torch
from torch import Tensor


def _cumulate(betas: Tensor) -> Tensor:
    return torch.cumprod(1.0 - betas, dim=0)


def linear(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Noise variances whose square roots grow linearly, the schedule that latent diffusion calls linear.

    LVDM uses ``beta_start=0.0015, beta_end=0.0155`` over 1000 steps (its configuration files;
    Rombach et al. 2022 introduced the square root).

    Returns:
        ``alphas_cumprod``, float64, shape ``(num_timesteps,)``.

    Raises:
        ValueError: unless ``0 < beta_start <= beta_end < 1`` and there are at least two timesteps.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(
            f"expected 0 < beta_start <= beta_end < 1, got beta_start={beta_start}, beta_end={beta_end}"
        )
    roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps, dtype=torch.float64)
    return _cumulate(roots**2)


def power(num_timesteps: int, start: float, end: float, exponent: float) -> Tensor:
    """Noise variances that are a power of numbers growing linearly, ``linspace(start, end) ** exponent``.

    An exponent of 1 gives variances that grow linearly themselves, as in DDPM (Ho et al. 2020, section 4:
    from 0.0001 to 0.02 over 1000 steps).

    Returns:
        ``alphas_cumprod``, float64, shape ``(num_timesteps,)``.

    Raises:
        ValueError: unless there are at least two timesteps and all variances lie between 0 and 1.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")
    if not 0.0 < start <= end < 1.0 or exponent <= 0.0:
        raise ValueError(
            f"expected 0 < start <= end < 1 and exponent > 0, got start={start}, end={end}, {exponent=}"
        )
    return _cumulate(torch.linspace(start, end, num_timesteps, dtype=torch.float64) ** exponent)


def cosine(num_timesteps: int, offset: float, max_beta: float) -> Tensor:
    """Signal that falls like a squared cosine (Nichol and Dhariwal 2021, eq. 17).

    Args:
        num_timesteps: length of the table.
        offset: their ``s``, which keeps the first steps from being too small; 0.008 in the paper.
        max_beta: their clip of the single-step variance near the end; 0.999 in the paper.

    Returns:
        ``alphas_cumprod``, float64, shape ``(num_timesteps,)``.

    Raises:
        ValueError: if a parameter is out of range.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")
    if offset < 0.0 or not 0.0 < max_beta < 1.0:
        raise ValueError(f"expected offset >= 0 and 0 < max_beta < 1, got {offset} and {max_beta}")
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    signal = torch.cos((time + offset) / (1.0 + offset) * math.pi / 2.0) ** 2
    betas = (1.0 - signal[1:] / signal[:-1]).clamp(max=max_beta)
    return _cumulate(betas)


def rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The same schedule with a last time of pure noise (Lin et al. 2024, Algorithm 1).

    The signal's coefficient is shifted, so that the last is 0, and scaled, so that the first stays. Pure
    noise doesn't tell the noise from the sample: the network must predict ``v`` or ``sample``.

    Args:
        alphas_cumprod: another schedule, float64 ``(num_timesteps,)``.

    Returns:
        ``alphas_cumprod``, float64, shape ``(num_timesteps,)``, with 0 as its last entry.
    """
    signal = alphas_cumprod.sqrt()
    return ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
