"""What training minimises: the error of a prediction at a random time, for each clip."""

from collections.abc import Callable

import torch
from torch import Tensor

from .conditioning import Condition, Denoiser
from .parameterization import Parameterization


def denoising_loss(
    denoiser: Denoiser,
    parameterization: Parameterization,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    condition: Condition,
    *,
    error: Callable[[Tensor], Tensor],
    weights: Tensor | None = None,
    given_noise: Tensor | None = None,
) -> Tensor:
    """Mean error of each clip's prediction (Ho et al. 2020, eq. 14, for any prediction type).

    Frames that are given take no part in a clip's mean, unless ``given_noise`` is told: then they are to be
    denoised from their own noise level, as in the released LVDM code, and the mean is over all frames.

    Args:
        denoiser: ``(noisy_latents, timesteps, condition) -> prediction``.
        parameterization: the schedule and what is predicted.
        latents: clean, ``b c t h w``.
        noise: standard normal, ``b c t h w``.
        timesteps: int64 ``b``.
        condition: what the denoiser is told.
        error: of each element of ``prediction - target``: ``torch.square`` or ``torch.abs``.
        weights: of each time's loss, float64 ``(num_timesteps,)``; None weighs all alike.
        given_noise: ``b c t h w``, by which the given latents were perturbed to the condition's noise level
            (of at least 0 in every clip, or at every given frame).

    Returns:
        One loss a clip, shape ``b``.

    Raises:
        ValueError: for ``given_noise`` without given frames.
    """
    frames = condition.frames
    target = parameterization.target(latents, noise, timesteps)
    if given_noise is not None:
        if frames is None:
            raise ValueError("given_noise needs given frames, got a condition without frames")
        given_target = parameterization.target(latents, given_noise, frames.noise_level.clamp(min=0))
        target = torch.where(frames.mask > 0, given_target, target)
    prediction = denoiser(parameterization.add_noise(latents, noise, timesteps), timesteps, condition)
    errors = error(prediction.to(target.dtype) - target).mean(dim=1, keepdim=True)
    if frames is None or given_noise is not None:
        loss = errors.flatten(1).mean(1)
    else:
        free = 1.0 - frames.mask
        loss = (errors * free).flatten(1).sum(1) / free.flatten(1).sum(1)
    if weights is None:
        return loss
    return loss * weights.to(timesteps.device)[timesteps].to(loss.dtype)
