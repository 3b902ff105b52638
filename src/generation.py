"""From a trained model to videos: one seed per sample, whatever the batch or the number of processes."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from .data.sampler import derive_seed
from .diffusion.conditioning import Condition, GivenFrames, denoiser_of, levels_of_given
from .diffusion.guidance import guided
from .diffusion.long_video import Plan, Window, carry_out
from .diffusion.parameterization import Parameterization
from .diffusion.samplers import Sampler
from .models.autoencoder import LatentSpace
from .models.streaming import decode_stream


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
        guidance_interval: diffusion times, first and last, at which guidance works; None for all.
        strides: latent frames from one frame of a window to the next, those that the model knows.
        noise_level_per_frame: whether the network is told the level at the given frames instead of once.
        keys: what a config calls the scale, the interval and the noise level; for messages.
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
    guidance_interval: tuple[int, int] | None = None
    strides: tuple[int, ...] = (1,)
    noise_level_per_frame: bool = False
    keys: tuple[str, str, str] = ("guidance.scale", "guidance.interval", "noise_level")

    def __post_init__(self) -> None:
        times = self.times()  # what the sampler can't do with this schedule is found before anything is made
        guided(denoiser_of(self.unet), self.guidance_scale, self.guidance_interval)
        scale_key, interval_key, level_key = self.keys
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0.0):
            raise ValueError(
                f"{scale_key} must be a number of at least 0, got {self.guidance_scale}; 1 means no guidance"
            )
        if self.guidance_interval is not None and not any(map(self._guides_at, times)):
            first, end = self.guidance_interval
            distance = {step: max(first - step, step - end) for step in times}
            nearest = sorted(sorted(distance, key=distance.__getitem__)[:8], reverse=True)
            raise ValueError(
                f"{interval_key}={[first, end]} holds none of the diffusion times of this sampler's "
                f"{len(distance)} step(s), so guidance would never work; the nearest are "
                f"{', '.join(map(str, nearest))}. Widen the interval, take more steps, or use null for all "
                f"times (0 to {self.parameterization.num_timesteps - 1})"
            )
        if self.guidance_scale != 1.0 and not (self.gives_frames or self.has_labels):
            raise ValueError(
                f"{scale_key}={self.guidance_scale} has nothing to guide: this model was trained without "
                "classes and without given frames; use guidance=none"
            )
        if not 0 <= self.noise_level < max(self.max_noise_level, 1):
            known = (
                f"levels from 0 to {self.max_noise_level - 1}"
                if self.max_noise_level
                else "clean latents (0)"
            )
            raise ValueError(
                f"{level_key}={self.noise_level} was never seen in training: the model knows {known}"
            )

    def times(self) -> list[int]:
        """The diffusion time of each call of the network, in the sampler's order."""
        times, tiny = list[int](), torch.zeros(1, 1, 1, 1, 1)

        def note(latents: Tensor, timesteps: Tensor) -> Tensor:
            times.append(int(timesteps[0]))
            return latents

        self.sampler(note, tiny, self.parameterization.alphas_cumprod.cpu(), lambda _: tiny)
        return times

    def _guides_at(self, time: int) -> bool:
        """Whether a time lies in the guidance interval."""
        return self.guidance_interval is None or (
            self.guidance_interval[0] <= time <= self.guidance_interval[1]
        )

    @property
    def num_calls(self) -> int:
        """How often the sampler asks for a denoised window."""
        return len(self.times())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.unet.parameters()).device

    def seconds_of_call(self, rows: int, stride: int) -> float:
        """How long the network takes for so many windows at once, measured; the mean over all steps.

        A guided step has twice as many rows.
        """
        if self.guidance_scale == 1.0:
            return self._measured(rows, stride)
        times = self.times()
        share = sum(map(self._guides_at, times)) / len(times)
        plain = self._measured(rows, stride) if share < 1.0 else 0.0
        return share * self._measured(2 * rows, stride) + (1.0 - share) * plain

    @torch.no_grad()
    def _measured(self, rows: int, stride: int) -> float:
        """Seconds of one call of the network."""
        device = self.device
        times = torch.zeros(rows, dtype=torch.int64, device=device)
        given = {"mask": torch.zeros(rows, 1, *self.window[1:], device=device)} if self.gives_frames else {}
        told = {"stride": times + self.strides.index(stride)} if len(self.strides) > 1 else {}
        seconds = []
        for _ in range(2):  # the first call is slower than the others
            began = time.perf_counter()
            self.unet(torch.zeros(rows, *self.window, device=device), times, **given, **told)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        return seconds[-1]

    def networks(self) -> list[nn.Module]:
        """What is called over and over: the U-Net and, unless there is nothing to decode, the decoder."""
        decoder = getattr(self.autoencoder, "decoder", None)
        return [self.unet] if decoder is None else [self.unet, decoder]

    @torch.no_grad()
    def sample_window(
        self,
        seeds: Sequence[int],
        labels: Tensor | None,
        *,
        numbers: Sequence[int] | None = None,
        level: int = 0,
        stride: int | None = None,
        given: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One window of latents for each seed.

        Args:
            seeds: one a row.
            labels: int64 ``b``, or None.
            numbers: which window of a long video each row is; takes part in the random numbers. None for 0.
            level: of a long video's plan; takes part in the random numbers.
            stride: latent frames from one frame of the window to the next; None for the smallest known.
            given: latents ``b c t h w``, read where the mask is 1; None if nothing is given.
            mask: 1 at given frames, else 0; of a shape that expands to ``b 1 t h w``.

        Returns:
            Latents ``b c t h w``; given frames come back unchanged.

        Raises:
            ValueError: for what the model never saw in training.
        """
        device = self.device
        numbers = [0] * len(seeds) if numbers is None else numbers
        where = "sampling" if level == 0 else f"sampling level {level}"

        def draw(purpose: str) -> Tensor:
            noise = [
                torch.randn(self.window, generator=_generator(seed, number, f"{where} {purpose}"))
                for seed, number in zip(seeds, numbers, strict=True)
            ]
            return torch.stack(noise).to(device)

        stride = min(self.strides) if stride is None else stride
        if stride not in self.strides:
            raise ValueError(
                f"the model was trained on latent frames {' or '.join(map(str, self.strides))} apart, not on "
                f"frames {stride} apart"
            )
        if given is not None and not self.gives_frames:
            raise ValueError(
                "this model was trained without given frames and can't continue a video; train it with "
                "conditioning=prediction"
            )
        frames = None
        if self.gives_frames:
            shape = (len(seeds), 1, *self.window[1:])
            clean = torch.zeros(len(seeds), *self.window, device=device) if given is None else given
            mask = torch.zeros(shape, device=device) if mask is None else mask.expand(shape)
            told = torch.full((len(seeds),), -1, dtype=torch.int64, device=device)
            perturbed = clean
            if self.max_noise_level > 0:
                told = torch.full_like(told, self.noise_level)
                perturbed = self.parameterization.add_noise(clean, draw("perturbation"), told)
                if self.noise_level_per_frame:
                    told = levels_of_given(told[:, None], mask)
            frames = GivenFrames(perturbed, mask, told)
        label = None
        if self.has_labels:
            label = torch.full((len(seeds),), -1, dtype=torch.int64) if labels is None else labels
            label = label.to(device)
        told_stride = None
        if len(self.strides) > 1:
            told_stride = torch.full((len(seeds),), self.strides.index(stride), device=device)
        condition = Condition(frames, label, told_stride)
        # Without anything given both halves of guidance would be the same prediction.
        informed = given is not None or (label is not None and bool((label >= 0).any()))
        scale = self.guidance_scale if informed else 1.0
        denoiser = guided(denoiser_of(self.unet), scale, self.guidance_interval)

        def denoise(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            prediction = denoiser(noisy_latents, timesteps, condition).float()
            return self.parameterization.to_sample(prediction, noisy_latents, timesteps)

        latents = self.sampler(
            denoise, draw("initial"), self.parameterization.alphas_cumprod, lambda i: draw(f"step {i}")
        )
        if given is not None and mask is not None:
            latents = torch.where(mask > 0, given, latents)
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Video ``b c t h w`` in [-1, 1] of normalised latents."""
        return self.autoencoder.decode(self.autoencoder.denormalize(latents)).clamp(-1.0, 1.0)


class Finished(Protocol):
    """Windows that were made before, so that an interrupted job goes on from the last one."""

    def get(self, seed: int, window: Window) -> Tensor | None:
        """Latents ``c t h w`` of one sample's window, if they are there."""

    def put(self, seed: int, window: Window, latents: Tensor) -> None:
        """Keeps latents ``c t h w``."""


@dataclass(frozen=True)
class LongVideoGenerator:
    """Videos of any length: a plan, and who makes the windows of each of its levels.

    Args:
        plan: in latent frames.
        levels: a generator for each level of the plan, all with one autoencoder.
        trained_window: latent frames of a clip that the autoencoder was trained on.
        decoding_window: latent frames that are decoded at once; None chooses.
        finished: windows that needn't be made again; None keeps none.
        progress: called with the number of windows made, times samples.
    """

    plan: Plan
    levels: Sequence[VideoGenerator]
    trained_window: int
    decoding_window: int | None = None
    finished: Finished | None = None
    progress: Callable[[int], object] = field(default=lambda count: None)

    @property
    def factor(self) -> int:
        """Video frames of a latent frame."""
        return self.levels[0].autoencoder.downsample[0]

    @property
    def decoding(self) -> tuple[int, int, bool]:
        """Latent frames decoded at once, those that two windows share, and whether they are cross-faded."""
        context = self.levels[0].autoencoder.decoding_context
        if context is None:
            window = self.decoding_window or self.trained_window
            return window, window // 2, True
        # Of each window all but the context is new: at least half of it.
        window = self.decoding_window or 2 * context + max(self.trained_window, 2 * context)
        return max(window, 2 * context + 1), 2 * context, False

    def latents(
        self,
        seeds: Sequence[int],
        labels: Tensor | None,
        *,
        batch_size: int,
        known: Mapping[int, Tensor] | None = None,
        loops: bool = False,
        backward: bool = False,
    ) -> Iterator[Tensor]:
        """Pieces ``b c t h w`` of the video's latents in the plan's order; see :func:`carry_out`.

        Args:
            seeds: one a sample.
            labels: int64 ``b``, or None.
            batch_size: windows made at once, over all samples.
            known: latents ``b c h w`` by position.
            loops: see :func:`carry_out`.
            backward: see :func:`carry_out`.
        """

        def sample(windows: Sequence[Window], given: Tensor | None, mask: Tensor | None) -> Tensor:
            level = windows[0].level
            made: dict[int, Tensor] = {}
            for i, window in enumerate(windows):
                kept = [self.finished.get(seed, window) if self.finished else None for seed in seeds]
                shape = self.levels[level].window
                whole = [latents for latents in kept if latents is not None and latents.shape == shape]
                if len(whole) == len(seeds):
                    made[i] = torch.stack(whole).to(self.levels[0].device)
            todo = [i for i in range(len(windows)) if i not in made]
            if todo:
                stride = self.plan.levels[level].stride
                rows = self.levels[level].sample_window(
                    list(seeds) * len(todo),
                    None if labels is None else labels.repeat(len(todo)),
                    numbers=[windows[i].number for i in todo for _ in seeds],
                    level=level,
                    stride=stride,
                    given=None if given is None else given[todo].flatten(0, 1),
                    mask=None
                    if mask is None
                    else mask[todo].expand(-1, len(seeds), -1, -1, -1, -1).flatten(0, 1),
                )
                for i, latents in zip(todo, rows.unflatten(0, (len(todo), len(seeds))), strict=True):
                    made[i] = latents
                    for seed, one in zip(seeds, latents, strict=True):
                        if self.finished is not None:
                            self.finished.put(seed, windows[i], one)
            self.progress(len(windows) * len(seeds))
            return torch.stack([made[i] for i in range(len(windows))])

        yield from carry_out(
            self.plan,
            sample,
            known=known,
            at_once=max(batch_size // len(seeds), 1),
            loops=loops,
            backward=backward,
        )

    def decode(
        self, pieces: Iterable[Tensor], *, before: Tensor | None = None, after: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Video ``b c t h w`` in [-1, 1] of latents that arrive in pieces, in pieces.

        Args:
            pieces: latents ``b c t h w`` in order of time.
            before: latents ``b c t h w`` ahead of them, which are seen but not part of the video.
            after: the same behind them.
        """
        window, overlap, fade = self.decoding
        parts: list[Iterable[Tensor]] = [
            [] if before is None else [before],
            pieces,
            [] if after is None else [after],
        ]
        video = decode_stream(
            self.levels[0].decode,
            chain.from_iterable(parts),
            factor=self.factor,
            window=window,
            overlap=overlap,
            fade=fade,
        )
        ends = [0 if latents is None else latents.shape[2] * self.factor for latents in (before, after)]
        yield from without_ends(video, *ends)

    def loop(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Video of latents whose last frame is followed by their first; it begins a little behind that one.

        Each of its frames is decoded with what comes before and after it, around the loop.
        """
        margin = max(self.decoding[1], 1)
        start: list[Tensor] = []

        def around() -> Iterator[Tensor]:
            for piece in pieces:
                if sum(latents.shape[2] for latents in start) < 2 * margin:
                    start.append(piece)
                yield piece
            first = torch.cat(start, dim=2)
            times = -(-2 * margin // first.shape[2])
            yield torch.cat([first] * times, dim=2)[:, :, : 2 * margin]

        yield from without_ends(self.decode(around()), margin * self.factor, margin * self.factor)


def without_ends(pieces: Iterable[Tensor], first: int, last: int) -> Iterator[Tensor]:
    """Pieces of a video ``b c t h w`` without its first and last frames."""
    held: Tensor | None = None
    for piece in pieces:
        dropped = min(first, piece.shape[2])
        first -= dropped
        held = piece[:, :, dropped:] if held is None else torch.cat([held, piece[:, :, dropped:]], dim=2)
        if held.shape[2] > last:
            ready = held.shape[2] - last
            yield held[:, :, :ready]
            held = held[:, :, ready:]


def _generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """The random numbers of one purpose in one window of one sample."""
    return torch.Generator().manual_seed(derive_seed(seed, index, f"sampling {purpose}"))
