"""What a sample is conditioned on: given frames, and a class."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class GivenFrames:
    """Frames whose latents are given.

    Args:
        latents: ``b c t h w``, already perturbed to ``noise_level``; read only where the mask is 1.
        mask: ``b 1 t h w``, 1 at given frames, 0 elsewhere.
        noise_level: int64 ``b``, the schedule index to which the given latents were noised
            (conditional latent perturbation); -1 where no level is told.
    """

    latents: Tensor
    mask: Tensor
    noise_level: Tensor


@dataclass(frozen=True)
class Condition:
    """All that is given to the denoiser beside noisy latents and time.

    Args:
        frames: given frames, or None for a model without frame conditioning.
        label: int64 ``b``, -1 for no class; None for a model without classes.
    """

    frames: GivenFrames | None = None
    label: Tensor | None = None

    def dropped(self) -> "Condition":
        """The unconditional twin that guidance needs: nothing given, no class, noise level as in training."""
        frames = self.frames
        if frames is not None:
            frames = replace(frames, mask=torch.zeros_like(frames.mask))
        label = None if self.label is None else torch.full_like(self.label, -1)
        return Condition(frames, label)

    def joined(self, other: "Condition") -> "Condition":
        """Both conditions as one batch, this one first."""
        frames, label = None, None
        if self.frames is not None and other.frames is not None:
            frames = GivenFrames(
                torch.cat([self.frames.latents, other.frames.latents]),
                torch.cat([self.frames.mask, other.frames.mask]),
                torch.cat([self.frames.noise_level, other.frames.noise_level]),
            )
        if self.label is not None and other.label is not None:
            label = torch.cat([self.label, other.label])
        return Condition(frames, label)


Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]


def denoiser_of(network: Callable[..., Tensor]) -> Denoiser:
    """A denoiser made of a network, with given latents put in the place of noisy ones.

    The network is called as ``network(noisy_latents, timesteps, mask=…, noise_level=…, label=…)``;
    LVDM feeds the condition by replacement and a mask channel (paper, section 3.4).
    """

    def denoise(noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        frames = condition.frames
        if frames is None:
            return network(noisy_latents, timesteps, mask=None, noise_level=None, label=condition.label)
        noisy_latents = torch.where(frames.mask > 0, frames.latents, noisy_latents)
        return network(
            noisy_latents, timesteps, mask=frames.mask, noise_level=frames.noise_level, label=condition.label
        )

    return denoise


@dataclass(frozen=True)
class FrameMasking:
    """Random choice, for each training clip, of the latent frames that are given.

    One model thereby learns unconditional generation, prediction and interpolation
    (LVDM, section 3.4). A clip is used for prediction with probability ``prediction`` (its first n
    latent frames given, n drawn uniformly from ``num_given``), for interpolation with probability
    ``interpolation`` (first and last given, or every n-th), and otherwise without any given frame.

    Args:
        prediction: probability of prediction.
        interpolation: probability of interpolation.
        num_given: the numbers of leading latent frames that prediction may give.
        max_noise_level: conditional latent perturbation: the given latents are noised to a schedule
            index drawn uniformly from ``0 … max_noise_level - 1``, which the network is told; 0 keeps
            them clean and tells no level.
        class_dropout: probability that a clip's class is hidden, for classifier-free guidance.
        interpolation_stride: from one given latent frame to the next in interpolation, beginning with the
            first; None gives the first and the last.

    Raises:
        ValueError: if probabilities are negative or exceed 1 together, or nothing could be given.
    """

    prediction: float
    interpolation: float
    num_given: list[int]
    max_noise_level: int
    class_dropout: float
    interpolation_stride: int | None = None

    def __post_init__(self) -> None:
        probabilities = {"prediction": self.prediction, "interpolation": self.interpolation}
        if not (min(probabilities.values()) >= 0 and sum(probabilities.values()) <= 1):
            raise ValueError(f"probabilities must be at least 0 and sum to at most 1, got {probabilities}")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout is a probability, got {self.class_dropout}")
        if self.max_noise_level < 0:
            raise ValueError(f"max_noise_level must be at least 0, got {self.max_noise_level}")
        if self.interpolation_stride is not None and self.interpolation_stride < 2:
            raise ValueError(
                f"interpolation_stride must be at least 2 or null, got {self.interpolation_stride}: with 1 "
                "every frame would be given"
            )
        if self.prediction > 0 and (not self.num_given or min(self.num_given) < 1):
            raise ValueError(
                f"num_given must list numbers of at least 1 when prediction > 0, got {list(self.num_given)}"
            )

    @property
    def gives_frames(self) -> bool:
        """Whether any clip is ever given frames, so that the network needs a mask channel."""
        return self.prediction > 0 or self.interpolation > 0

    def check(self, num_frames: int) -> None:
        """Refuses clips of so few latent frames that all of them could be given.

        Raises:
            ValueError: with the numbers and the remedy.
        """
        most = max([*self.num_given, 1]) if self.prediction > 0 else 0
        if self.interpolation > 0:
            stride = self.interpolation_stride
            most = max(most, 2 if stride is None else -(-num_frames // stride))
        if most >= num_frames:
            raise ValueError(
                f"up to {most} of {num_frames} latent frames would be given and none generated; "
                f"train on longer clips or lower conditioning.num_given={list(self.num_given)}"
            )

    def mask(self, num_frames: int, generator: torch.Generator) -> Tensor:
        """The mask of one clip, float32 of shape ``(num_frames,)``: 1 where the frame is given."""
        draw, choice = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        mask = torch.zeros(num_frames)
        if draw < self.interpolation:
            if self.interpolation_stride is None:
                mask[0] = mask[-1] = 1.0
            else:
                mask[:: self.interpolation_stride] = 1.0
        elif draw < self.interpolation + self.prediction:
            mask[: self.num_given[int(choice * len(self.num_given))]] = 1.0
        return mask
