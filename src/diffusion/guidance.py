"""Classifier-free guidance, as a wrapper around any denoiser."""

import torch
from torch import Tensor

from .conditioning import Condition, Denoiser


def guided(denoiser: Denoiser, guidance_scale: float, interval: tuple[int, int] | None = None) -> Denoiser:
    """A denoiser pushed away from its unconditional prediction: ``uncond + scale (cond - uncond)``.

    Ho and Salimans 2022, eq. 6, whose ``(1 + w) cond - w uncond`` is ``guidance_scale = 1 + w``;
    LVDM's unconditional guidance (section 3.4) is the same with given frames as the condition.
    A scale of 1 is the denoiser itself, at no extra cost; otherwise both predictions are made in one
    batched call.

    Args:
        denoiser: to be guided.
        guidance_scale: 1 means off.
        interval: of diffusion times in which guidance works, both ends included (Kynkäänniemi et al. 2024);
            None for all. Outside it nothing extra is computed. All timesteps of a call must be equal.

    Raises:
        ValueError: for an interval that ends before it begins.
    """
    if interval is not None and not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"a guidance interval is [first, last] diffusion time, got {list(interval)}")
    if guidance_scale == 1.0:
        return denoiser

    def denoise(noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        if interval is not None and not interval[0] <= int(timesteps[0]) <= interval[1]:
            return denoiser(noisy_latents, timesteps, condition)
        both = condition.joined(condition.dropped())
        prediction = denoiser(torch.cat([noisy_latents] * 2), torch.cat([timesteps] * 2), both)
        conditional, unconditional = prediction.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoise
