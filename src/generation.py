"""From a trained model to videos: one seed per sample, whatever the batch or the number of processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .data.sampler import derive_seed
from .diffusion.conditioning import Condition, GivenFrames, denoiser_of
from .diffusion.guidance import guided
from .diffusion.long_video import autoregressive, leading_mask
from .diffusion.parameterization import Parameterization
from .diffusion.samplers import Sampler
from .models.autoencoder import LatentSpace


def require_finite(video: Tensor) -> Tensor:
    """The video as it came; raises ValueError if it holds anything that isn't a number."""
    if not bool(video.isfinite().all()):
        raise ValueError(
            "the model made values that aren't finite: its weights have diverged, or a half precision "
            "overflowed; use an earlier model"
        )
    return video


@dataclass(frozen=True)
class VideoGenerator:
    """A latent diffusion model, ready to make videos.

    Every random number of a sample comes from its own seed, so sample 17 is sample 17 in any batch and
    on any number of processes, up to the rounding of batched arithmetic.

    Args:
        autoencoder: decodes latents; its latent statistics are used.
        unet: predicts from ``(noisy_latents, timesteps, mask=, noise_level=, label=)``.
        parameterization: the schedule and what the network predicts.
        sampler: the sampling algorithm.
        guidance_scale: of classifier-free guidance; 1 means off.
        window: latent shape ``(c, t, h, w)`` of one window, as in training.
        gives_frames: whether the model was trained with given frames, which long videos need.
        has_labels: whether the model was trained with classes.
        max_noise_level: of conditional latent perturbation in training; 0 if there was none.
        noise_level: to which given latents are noised at sampling; must be below ``max_noise_level``,
            or 0 for clean latents in a model trained without perturbation.
    """

    autoencoder: LatentSpace
    unet: nn.Module
    parameterization: Parameterization
    sampler: Sampler
    guidance_scale: float
    window: tuple[int, int, int, int]
    gives_frames: bool
    has_labels: bool
    max_noise_level: int
    noise_level: int

    def __post_init__(self) -> None:
        # What the sampler can't do with this schedule is found before anything is made.
        table, tiny = self.parameterization.alphas_cumprod, torch.zeros(1, 1, 1, 1, 1)
        self.sampler(lambda latents, _: latents, tiny, table.cpu(), lambda _: tiny)
        if self.guidance_scale != 1.0 and not (self.gives_frames or self.has_labels):
            raise ValueError(
                f"guidance.scale={self.guidance_scale} has nothing to guide: this model was trained without "
                "classes and without given frames; use guidance=none"
            )
        if not 0 <= self.noise_level < max(self.max_noise_level, 1):
            raise ValueError(
                f"noise_level={self.noise_level} was never seen in training: the model knows levels below "
                f"{max(self.max_noise_level, 1)}"
            )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.unet.parameters()).device

    def networks(self) -> list[nn.Module]:
        """What is called over and over: the U-Net and, unless there is nothing to decode, the decoder."""
        decoder = getattr(self.autoencoder, "decoder", None)
        return [self.unet] if decoder is None else [self.unet, decoder]

    @torch.no_grad()
    def sample_window(
        self, seeds: Sequence[int], labels: Tensor | None, index: int = 0, given: Tensor | None = None
    ) -> Tensor:
        """One window of latents for each seed.

        Args:
            seeds: one a sample.
            labels: int64 ``b``, or None.
            index: which window of a long video this is; it takes part in the random numbers.
            given: leading latent frames ``b c n h w`` to continue, or None.

        Returns:
            Latents ``b c t h w``; given frames come back unchanged.
        """
        device = self.device

        def draw(purpose: str) -> Tensor:
            noise = [torch.randn(self.window, generator=_generator(seed, index, purpose)) for seed in seeds]
            return torch.stack(noise).to(device)

        frames, latents_given, mask = None, None, None
        if given is not None and not self.gives_frames:
            raise ValueError(
                "this model was trained without given frames and can't continue a video; train it with "
                "conditioning=prediction"
            )
        if self.gives_frames:
            if given is None:
                given = torch.zeros(len(seeds), self.window[0], 0, *self.window[2:], device=device)
            latents_given, mask = leading_mask(given, self.window[1])
            level = torch.full((len(seeds),), -1, dtype=torch.int64, device=device)
            perturbed = latents_given
            if self.max_noise_level > 0:
                level = torch.full_like(level, self.noise_level)
                perturbed = self.parameterization.add_noise(latents_given, draw("perturbation"), level)
            frames = GivenFrames(perturbed, mask, level)
        label = None
        if self.has_labels:
            label = torch.full((len(seeds),), -1, dtype=torch.int64) if labels is None else labels
            label = label.to(device)
        condition = Condition(frames, label)
        # Without anything given both halves of guidance would be the same prediction.
        informed = (given is not None and given.shape[2] > 0) or (
            label is not None and bool((label >= 0).any())
        )
        denoiser = guided(denoiser_of(self.unet), self.guidance_scale if informed else 1.0)

        def denoise(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            prediction = denoiser(noisy_latents, timesteps, condition).float()
            return self.parameterization.to_sample(prediction, noisy_latents, timesteps)

        latents = self.sampler(
            denoise, draw("initial"), self.parameterization.alphas_cumprod, lambda i: draw(f"step {i}")
        )
        if mask is not None and latents_given is not None:
            latents = torch.where(mask > 0, latents_given, latents)
        return latents

    def long_latents(
        self, seeds: Sequence[int], labels: Tensor | None, num_frames: int, num_given: int
    ) -> Iterator[Tensor]:
        """Windows of a long video's latents, by autoregression; see :func:`autoregressive`."""
        return autoregressive(
            lambda index, given: self.sample_window(seeds, labels, index, given),
            num_frames,
            self.window[1],
            num_given,
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Video ``b c t h w`` in [-1, 1] of normalised latents."""
        return self.autoencoder.decode(self.autoencoder.denormalize(latents)).clamp(-1.0, 1.0)

    def long_video(
        self, seeds: Sequence[int], labels: Tensor | None, num_frames: int, num_given: int
    ) -> Iterator[Tensor]:
        """Pieces of a long video, decoded as they are made; memory doesn't grow with the length.

        Each piece of latents is decoded behind ``num_given`` latent frames of context, and the frames
        decoded twice are cross-faded, since an autoencoder's normalization may span time.

        Args:
            seeds: one a sample.
            labels: int64 ``b``, or None.
            num_frames: video frames in all.
            num_given: latent frames on which each window is conditioned.

        Yields:
            Video ``b c t h w`` in [-1, 1]; together exactly ``num_frames`` frames.
        """
        factor = self.autoencoder.downsample[0]
        context: Tensor | None = None
        held: Tensor | None = None
        left = num_frames
        for latents in self.long_latents(seeds, labels, -(-num_frames // factor), num_given):
            joined = latents if context is None else torch.cat([context, latents], dim=2)
            video = self.decode(joined)
            if held is not None:
                overlap = held.shape[2]
                fade = torch.linspace(0, 1, overlap + 2, device=video.device)[1:-1].reshape(1, 1, -1, 1, 1)
                video = torch.cat(
                    [torch.lerp(held, video[:, :, :overlap], fade), video[:, :, overlap:]], dim=2
                )
            context = joined[:, :, -num_given:]
            overlap = context.shape[2] * factor
            ready, held = video[:, :, :-overlap], video[:, :, -overlap:]
            ready = ready[:, :, :left]
            left -= ready.shape[2]
            if ready.shape[2]:
                yield ready
        if held is not None and left > 0:
            yield held[:, :, :left]


def _generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """The random numbers of one purpose in one window of one sample."""
    return torch.Generator().manual_seed(derive_seed(seed, index, f"sampling {purpose}"))
