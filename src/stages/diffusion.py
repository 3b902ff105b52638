"""Learning to denoise latents, with and without given frames (LVDM, sections 3.3 and 3.4)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..data.sampler import Batch, LatentBatch, clip_generator, rand_per_clip, randint_per_clip, randn_per_clip
from ..diffusion.conditioning import Condition, FrameMasking, GivenFrames, denoiser_of, levels_of_given
from ..diffusion.objective import denoising_loss
from ..diffusion.parameterization import Parameterization
from ..diffusion.strides import EVERY_FRAME, LatentStrides
from ..generation import VideoGenerator
from ..models.autoencoder import LatentSpace
from .stage import Modules, Update

LossWeighting = Callable[[Parameterization], Tensor]
"""Weights of the loss at each time, ``(num_timesteps,)``, for a schedule and what is predicted."""


# The schedule is split into so many parts whose losses are told apart.
NUM_BINS = 4


class DiffusionStage:
    """Denoising of latents of a frozen autoencoder.

    A clip's loss is that of :func:`denoising_loss`; timestep, noise, posterior sample, stride, mask and
    perturbation are pure functions of the seed and the clip's position.

    Args:
        unet: predicts from ``(noisy_latents, timesteps, mask=, noise_level=, label=)``, and from ``stride=``
            where there are several.
        autoencoder: frozen; gives latents and their statistics.
        parameterization: the schedule and what the network predicts.
        masking: which frames are given in training, and how they are perturbed.
        loss: ``l2`` (Ho et al. 2020, eq. 14) or ``l1`` (the released code).
        loss_weighting: how much each time's loss counts, see ``diffusion.loss_weighting``.
        given_frames_in_loss: whether given frames, too, are to be denoised from the level to which they were
            perturbed (the released code); otherwise they take no part in the loss.
        has_labels: whether the network is told classes.
        generator: makes a :class:`VideoGenerator` of a network, for previews.
        seed: of all training noise.
        latent_strides: distances between the latent frames that the network sees; each clip draws one.

    Raises:
        ValueError: for an unknown loss, or for given frames in the loss where none is perturbed.
    """

    exported = "unet"
    measured: tuple[str, ...]
    higher_is_better: tuple[str, ...] = ()

    def __init__(
        self,
        unet: nn.Module,
        *,
        autoencoder: LatentSpace,
        parameterization: Parameterization,
        masking: FrameMasking,
        loss: Literal["l2", "l1"],
        loss_weighting: LossWeighting,
        given_frames_in_loss: bool,
        has_labels: bool,
        generator: Callable[[nn.Module], VideoGenerator],
        seed: int,
        latent_strides: LatentStrides = EVERY_FRAME,
    ) -> None:
        if loss not in ("l2", "l1"):
            raise ValueError(f"unknown loss {loss!r}; choose l2 or l1")
        if given_frames_in_loss and not masking.is_perturbed:
            raise ValueError(
                "given_frames_in_loss=true needs given frames that are perturbed, since clean ones leave "
                f"nothing to predict; got max_noise_level={masking.max_noise_level} and frames given to "
                f"{masking.share_given:.0%} of the clips. Use "
                "conditioning=prediction, interpolation or any, or stage.given_frames_in_loss=false"
            )
        self.modules: dict[str, nn.Module] = {"unet": unet}
        self.times = [int(parameterization.num_timesteps * part) for part in (0.125, 0.375, 0.625, 0.875)]
        self.latent_strides = latent_strides
        by_stride = [f"loss_at_stride_{stride}" for stride in latent_strides.strides]
        self.measured = (
            "loss",
            *(f"loss_at_{time}" for time in self.times),
            *(by_stride if latent_strides.are_told else ()),
        )
        self.running: dict[str, Tensor] = {}
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.parameterization = parameterization
        self.masking = masking
        self.error: Callable[[Tensor], Tensor] = torch.square if loss == "l2" else torch.abs
        self.weights = loss_weighting(parameterization)
        self.given_frames_in_loss = given_frames_in_loss
        self.has_labels = has_labels
        self.generator = generator
        self.seed = seed

    @torch.no_grad()
    def latents(self, batch: Batch | LatentBatch) -> Tensor:
        """Normalised latents ``b c t h w``, a fresh sample of each clip's posterior."""
        positions = batch.positions
        if isinstance(batch, LatentBatch):
            noise = randn_per_clip(batch.mean.shape[1:], self.seed, positions, "posterior", batch.mean.device)
            return batch.mean + batch.std * noise
        posterior = self.autoencoder.encode(batch.video)
        noise = randn_per_clip(
            posterior.mean.shape[1:], self.seed, positions, "posterior", posterior.mean.device
        )
        return self.autoencoder.normalize(posterior.sample(noise))

    def windows(
        self, latents: Tensor, positions: Tensor, index: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the network sees of the latents of whole clips ``b c t h w``.

        Args:
            latents: of whole clips.
            positions: int64 ``b``.
            index: of the stride; None draws one for each clip, all alike.

        Returns:
            Windows ``b c t h w``, and the indices of their strides, int64 ``b``, None where there is one.
        """
        strides = self.latent_strides
        if not strides.are_told:
            return strides.cut(latents, 0), None
        windows, indices = [], []
        for clip, position in zip(latents, positions.tolist(), strict=True):
            generator = clip_generator(self.seed, position, "stride")
            drawn = int(torch.randint(len(strides.strides), (), generator=generator))
            chosen = drawn if index is None else index
            starts = strides.num_starts(latents.shape[2], chosen)
            start = int(torch.randint(starts, (), generator=generator))
            windows.append(strides.cut(clip, chosen, start))
            indices.append(chosen)
        return torch.stack(windows), torch.tensor(indices, device=latents.device)

    def _condition(
        self, latents: Tensor, batch: Batch | LatentBatch, stride: Tensor | None
    ) -> tuple[Condition, Tensor | None]:
        """Which frames are given, perturbed as conditional latent perturbation says, and which class.

        Returns:
            The condition, and the noise ``b c t h w`` by which given latents are perturbed, None without.
        """
        device, positions = latents.device, batch.positions
        frames = label = perturbation = None
        if self.masking.gives_frames:
            masks = [
                self.masking.mask(latents.shape[2], clip_generator(self.seed, position, "mask"))
                for position in positions.tolist()
            ]
            mask = torch.stack(masks).to(device)[:, None, :, None, None]
            mask = mask.expand(-1, -1, -1, *latents.shape[3:])
            level = torch.full((len(latents),), -1, dtype=torch.int64, device=device)
            given = latents
            if self.masking.is_perturbed:
                per_frame = self.masking.noise_level_per_frame
                shape, most = latents.shape[2:3] if per_frame else (), self.masking.max_noise_level
                level = randint_per_clip(0, most, shape, self.seed, positions, "noise level", device)
                perturbation = randn_per_clip(latents.shape[1:], self.seed, positions, "perturbation", device)
                given = self.parameterization.add_noise(latents, perturbation, level)
                level = levels_of_given(level, mask) if per_frame else level
            frames = GivenFrames(given, mask, level)
        if self.has_labels:
            draw = rand_per_clip((), self.seed, positions, "class dropout", device)
            label = torch.where(draw >= self.masking.class_dropout, batch.label.to(device), -1)
        return Condition(frames, label, stride), perturbation

    def updates(self, modules: Modules, batch: Batch | LatentBatch, step: int) -> Iterator[Update]:
        """The denoising loss of one micro-batch."""
        latents, stride = self.windows(self.latents(batch), batch.positions)
        timesteps = randint_per_clip(
            0, self.parameterization.num_timesteps, (), self.seed, batch.positions, "timestep", latents.device
        )
        noise = randn_per_clip(latents.shape[1:], self.seed, batch.positions, "noise", latents.device)
        condition, perturbation = self._condition(latents, batch, stride)
        loss = denoising_loss(
            denoiser_of(modules["unet"]),
            self.parameterization,
            latents,
            noise,
            timesteps,
            condition,
            error=self.error,
            weights=self.weights,
            given_noise=perturbation if self.given_frames_in_loss else None,
        )
        yield Update("unet", loss.mean(), self.by_time(loss.detach(), timesteps))

    def by_time(self, losses: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """Sum and count of clips' losses in each quarter of the schedule, as pairs."""
        num = self.parameterization.num_timesteps
        quarters = torch.arange(NUM_BINS, device=timesteps.device)[:, None] == timesteps * NUM_BINS // num
        pairs = torch.stack([(quarters * losses).sum(1), quarters.sum(1)], dim=1)
        edges = [num * i // NUM_BINS for i in range(NUM_BINS + 1)]
        return {f"loss_at/{edges[i]:04d}-{edges[i + 1] - 1:04d}": pairs[i] for i in range(NUM_BINS)}

    @torch.no_grad()
    def preview(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        """Samples of fixed seeds, so that pictures of different steps can be compared."""
        generator = self.generator(modules["unet"])
        labels = batch.label if self.has_labels else None
        latents = generator.sample_window(range(len(batch.video)), labels)
        return {"samples": generator.decode(latents)}

    @torch.no_grad()
    def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
        """Denoising loss on held-out clips at four fixed times, with nothing given, and means.

        Where there are several strides, each clip is seen at all of them.
        """
        strides = self.latent_strides.strides
        sums, count = torch.zeros(len(strides), len(self.times), dtype=torch.float64), 0
        for batch in batches:
            latents = self.latents(batch)
            for index in range(len(strides)):
                sums[index] += self._held_out_losses(modules["unet"], latents, batch, index)
            count += len(latents)
        means = sums / max(count, 1)
        by_time, by_stride = means.mean(0).tolist(), means.mean(1).tolist()
        return dict(zip(self.measured, [sum(by_time) / len(by_time), *by_time, *by_stride], strict=False))

    def _held_out_losses(self, unet: nn.Module, clips: Tensor, batch: Batch, index: int) -> Tensor:
        """The sum over clips of the loss at each fixed time, at one stride."""
        latents, stride = self.windows(clips, batch.positions, index)
        condition = self._condition(latents, batch, stride)[0].dropped()
        if self.has_labels:
            condition = replace(condition, label=batch.label.to(latents.device))
        sums = []
        for i, time in enumerate(self.times):
            noise = randn_per_clip(
                latents.shape[1:], self.seed, batch.positions, f"evaluation {i}", latents.device
            )
            timesteps = torch.full((len(latents),), time, dtype=torch.int64, device=latents.device)
            losses = denoising_loss(
                denoiser_of(unet),
                self.parameterization,
                latents,
                noise,
                timesteps,
                condition,
                error=self.error,
            )
            sums.append(losses.double().sum().cpu())
        return torch.stack(sums)

    def finish(self, modules: Modules, batches: Iterable[Batch]) -> None:
        """Nothing remains: the autoencoder brought its latent statistics."""
