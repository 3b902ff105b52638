"""What the network predicts, and how that turns into a clean sample or into noise."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v", "sample"]


@dataclass(frozen=True)
class Parameterization:
    """A noise schedule together with the quantity that the network predicts.

    With ``a = alphas_cumprod[t]``, noisy latents are ``sqrt(a) x + sqrt(1 - a) noise`` (DDPM, eq. 4);
    ``epsilon`` is the noise, ``sample`` is ``x`` and ``v`` is ``sqrt(a) noise - sqrt(1 - a) x``
    (Salimans and Ho 2022, appendix D).

    Args:
        alphas_cumprod: float64, shape ``(num_timesteps,)``; the last may be 0 (zero terminal SNR).
        prediction_type: ``epsilon``, ``v`` or ``sample``.

    Raises:
        ValueError: for another prediction type, a table that isn't a decreasing sequence in (0, 1), or
            ``epsilon`` where the last time is pure noise.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"unknown prediction_type {self.prediction_type!r}; choose one of {get_args(PredictionType)}"
            )
        table = self.alphas_cumprod
        if (
            table.ndim != 1
            or not bool(((table[:-1] > 0) & (table[:-1] < 1)).all())
            or not bool((table.diff() < 0).all())
            or not bool((table[-1:] >= 0).all())
        ):
            raise ValueError("alphas_cumprod must be one decreasing sequence of numbers between 0 and 1")
        if self.prediction_type == "epsilon" and bool((table[-1:] == 0).any()):
            raise ValueError(
                "prediction_type=epsilon can't be sampled from a schedule whose last time is pure noise "
                "(zero terminal SNR): the noise says nothing of the sample there. Use prediction_type=v or "
                "sample, or another noise_schedule"
            )

    @property
    def num_timesteps(self) -> int:
        """Length of the schedule."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> "Parameterization":
        """The same parameterization with its table on another device."""
        return Parameterization(self.alphas_cumprod.to(device), self.prediction_type)

    def coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise coefficients ``sqrt(a), sqrt(1 - a)``, shaped to multiply ``like``.

        Times are ``b``, or ``b t`` for frames ``b c t h w`` that have their own.
        """
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps]
        if timesteps.ndim == 2:
            alpha = alpha[:, None, :, None, None]
        else:
            alpha = alpha.reshape(-1, *[1] * (like.ndim - 1))
        return alpha.sqrt().to(like.dtype), (1.0 - alpha).sqrt().to(like.dtype)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents at the given times, ``q(x_t | x_0)`` (DDPM, eq. 4)."""
        signal, spread = self.coefficients(timesteps, latents)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict at the given times."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, spread = self.coefficients(timesteps, latents)
        return signal * noise - spread * latents

    def to_sample(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction stands for (DDPM, eq. 15, solved for the clean sample)."""
        if self.prediction_type == "sample":
            return prediction
        signal, spread = self.coefficients(timesteps, noisy_latents)
        if self.prediction_type == "epsilon":
            return (noisy_latents - spread * prediction) / signal
        return signal * noisy_latents - spread * prediction

    def to_noise(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction stands for."""
        if self.prediction_type == "epsilon":
            return prediction
        signal, spread = self.coefficients(timesteps, noisy_latents)
        if self.prediction_type == "sample":
            return (noisy_latents - signal * prediction) / spread
        return spread * noisy_latents + signal * prediction
