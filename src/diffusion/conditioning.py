"""What a sample is conditioned on: given frames, and a class."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class GivenFrames:
    """Frames whose latents are given.

    Args:
        latents: ``b c t h w``, already perturbed to ``noise_level``; read only where the mask is 1.
        mask: ``b 1 t h w``, 1 at given frames, 0 elsewhere.
        noise_level: int64 ``b``, the schedule index to which the given latents were noised
            (conditional latent perturbation); -1 where no level is told. Or int64 ``b t``, a level for each
            frame, -1 at frames that aren't given.
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
        stride: int64 ``b``, which of the model's strides lies between latent frames, as an index; -1 where it
            isn't told; None for a model of one stride.
    """

    frames: GivenFrames | None = None
    label: Tensor | None = None
    stride: Tensor | None = None

    def dropped(self) -> "Condition":
        """The unconditional twin that guidance needs: nothing given, no class; level and stride stay."""
        frames = self.frames
        if frames is not None:
            level = frames.noise_level
            if level.ndim == 2:  # no frame is given that could have one
                level = torch.full_like(level, -1)
            frames = replace(frames, mask=torch.zeros_like(frames.mask), noise_level=level)
        label = None if self.label is None else torch.full_like(self.label, -1)
        return Condition(frames, label, self.stride)

    def joined(self, other: "Condition") -> "Condition":
        """Both conditions as one batch, this one first."""
        frames, label, stride = None, None, None
        if self.frames is not None and other.frames is not None:
            frames = GivenFrames(
                torch.cat([self.frames.latents, other.frames.latents]),
                torch.cat([self.frames.mask, other.frames.mask]),
                torch.cat([self.frames.noise_level, other.frames.noise_level]),
            )
        if self.label is not None and other.label is not None:
            label = torch.cat([self.label, other.label])
        if self.stride is not None and other.stride is not None:
            stride = torch.cat([self.stride, other.stride])
        return Condition(frames, label, stride)


Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]


def denoiser_of(network: Callable[..., Tensor]) -> Denoiser:
    """A denoiser made of a network, with given latents put in the place of noisy ones.

    The network is called as ``network(noisy_latents, timesteps, mask=…, noise_level=…, label=…)``, with
    ``frame_noise_level=…`` where frames have levels of their own and ``stride=…`` where there are several;
    LVDM feeds the condition by replacement and a mask channel (paper, section 3.4).
    """

    def denoise(noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        frames = condition.frames
        told: dict[str, Tensor | None] = {"mask": None, "noise_level": None, "label": condition.label}
        if frames is not None:
            noisy_latents = torch.where(frames.mask > 0, frames.latents, noisy_latents)
            per_frame = frames.noise_level.ndim == 2
            told |= {
                "mask": frames.mask,
                "frame_noise_level" if per_frame else "noise_level": frames.noise_level,
            }
        if condition.stride is not None:
            told["stride"] = condition.stride
        return network(noisy_latents, timesteps, **told)

    return denoise


def levels_of_given(levels: Tensor, mask: Tensor) -> Tensor:
    """Noise levels ``b t`` as the network is told them: -1 at frames that aren't given (``b 1 t h w``)."""
    return torch.where(mask[:, 0, :, 0, 0] > 0, levels, -1)


@dataclass(frozen=True)
class FrameMasking:
    """Random choice, for each training clip, of the latent frames that are given.

    One model thereby learns unconditional generation and several ways to complete a clip (LVDM, section
    3.4). With the probability of each, a clip is used for

    - ``prediction``: its first n latent frames are given, n drawn uniformly from ``num_given``;
    - ``interpolation``: the first and the last, or every n-th;
    - ``backward``: the last n, n as for prediction;
    - ``infilling``: any but none or all of them: a number drawn uniformly, then which;

    and otherwise without any given frame. A kind whose probability is 0 was never trained.

    Args:
        prediction: probability of prediction.
        interpolation: probability of interpolation.
        num_given: the numbers of latent frames that prediction, forward or backward, may give.
        max_noise_level: conditional latent perturbation: the given latents are noised to a schedule
            index drawn uniformly from ``0 … max_noise_level - 1``, which the network is told; 0 keeps
            them clean and tells no level.
        class_dropout: probability that a clip's class is hidden, for classifier-free guidance.
        interpolation_stride: from one given latent frame to the next in interpolation, beginning with the
            first; None gives the first and the last.
        backward: probability of backward prediction.
        infilling: probability of infilling.
        noise_level_per_frame: whether each given frame draws a noise level of its own, which the network is
            told frame by frame; otherwise a clip draws one.

    Raises:
        ValueError: if probabilities are negative or exceed 1 together, or nothing could be given.
    """

    prediction: float
    interpolation: float
    num_given: list[int]
    max_noise_level: int
    class_dropout: float
    interpolation_stride: int | None = None
    backward: float = 0.0
    infilling: float = 0.0
    noise_level_per_frame: bool = False

    def __post_init__(self) -> None:
        probabilities = self._probabilities
        if not (min(probabilities.values()) >= 0 and self.share_given <= 1 + 1e-9):
            raise ValueError(f"probabilities must be at least 0 and sum to at most 1, got {probabilities}")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout is a probability, got {self.class_dropout}")
        if self.max_noise_level < 0:
            raise ValueError(f"max_noise_level must be at least 0, got {self.max_noise_level}")
        if self.noise_level_per_frame and self.max_noise_level == 0:
            raise ValueError(
                "noise_level_per_frame=true needs given frames that are perturbed, got max_noise_level=0; "
                "raise it, or use noise_level_per_frame=false"
            )
        if self.interpolation_stride is not None and self.interpolation_stride < 2:
            raise ValueError(
                f"interpolation_stride must be at least 2 or null, got {self.interpolation_stride}: with 1 "
                "every frame would be given"
            )
        if self._takes_number and (not self.num_given or min(self.num_given) < 1):
            raise ValueError(
                "num_given must list numbers of at least 1 when prediction or backward > 0, got "
                f"{list(self.num_given)}"
            )

    @property
    def _probabilities(self) -> dict[str, float]:
        return {
            "interpolation": self.interpolation,
            "prediction": self.prediction,
            "backward": self.backward,
            "infilling": self.infilling,
        }

    @property
    def _takes_number(self) -> bool:
        return self.prediction > 0 or self.backward > 0

    @property
    def share_given(self) -> float:
        """Probability that a clip is given any frame."""
        return sum(self._probabilities.values())

    @property
    def gives_frames(self) -> bool:
        """Whether any clip is ever given frames, so that the network needs a mask channel."""
        return max(self._probabilities.values()) > 0

    @property
    def is_perturbed(self) -> bool:
        """Whether given frames are noised, so that the network has to be told how much."""
        return self.gives_frames and self.max_noise_level > 0

    def check(self, num_frames: int) -> None:
        """Refuses clips of so few latent frames that all of them could be given.

        Raises:
            ValueError: with the numbers and the remedy.
        """
        most = max(self.num_given) if self._takes_number else 0
        if self.interpolation > 0:
            stride = self.interpolation_stride
            most = max(most, 2 if stride is None else -(-num_frames // stride))
        if self.infilling > 0:
            most = max(most, 1)
        if most >= num_frames:
            raise ValueError(
                f"up to {most} of {num_frames} latent frames would be given and none generated; "
                "train on longer clips or with smaller latent_strides, or lower "
                f"conditioning.num_given={list(self.num_given)}"
            )

    def could_give(self, frames: tuple[int, ...], num_frames: int) -> bool:
        """Whether :meth:`mask` can draw just these given frames, counted from 0, of so many."""
        count = len(frames)
        if count == 0:
            return self.share_given < 1 - 1e-9
        ends: tuple[int, ...] = (0, num_frames - 1)
        if self.interpolation_stride is not None:
            ends = tuple(range(0, num_frames, self.interpolation_stride))
        allowed = count in self.num_given
        return (
            (self.interpolation > 0 and frames == ends)
            or (self.prediction > 0 and allowed and frames == tuple(range(count)))
            or (self.backward > 0 and allowed and frames == tuple(range(num_frames - count, num_frames)))
            or (self.infilling > 0 and count < num_frames)
        )

    def told(self) -> str:
        """Which frames are given in training, for people."""
        numbers = " or ".join(map(str, self.num_given))
        every = self.interpolation_stride
        kinds = {
            f"the first {numbers}": self.prediction > 0,
            f"the last {numbers}": self.backward > 0,
            "the first and the last" if every is None else f"one in {every}": self.interpolation > 0,
            "any": self.infilling > 0,
            "none": self.could_give((), 1),
        }
        return "given were " + "; ".join(kind for kind, trained in kinds.items() if trained)

    def mask(self, num_frames: int, generator: torch.Generator) -> Tensor:
        """The mask of one clip, float32 of shape ``(num_frames,)``: 1 where the frame is given."""
        draw, choice = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        probabilities = self._probabilities
        kind = bisect_right(list(accumulate(probabilities.values())), draw)
        mask = torch.zeros(num_frames)
        match [*probabilities, None][kind]:
            case "interpolation" if self.interpolation_stride is None:
                mask[0] = mask[-1] = 1.0
            case "interpolation":
                mask[:: self.interpolation_stride] = 1.0
            case "prediction":
                mask[: self._number(choice)] = 1.0
            case "backward":
                mask[-self._number(choice) :] = 1.0
            case "infilling":
                number = 1 + int(choice * (num_frames - 1))
                mask[torch.randperm(num_frames, generator=generator)[:number]] = 1.0
        return mask

    def _number(self, choice: float) -> int:
        return self.num_given[int(choice * len(self.num_given))]
