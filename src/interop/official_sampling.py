"""Sampling as the released LVDM scripts do it, with those of their faults that the compatibility names.

For weights that were trained by the released code, where its very numbers are wanted. Everything else samples
with `diffusion.samplers` and `generation`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..diffusion.samplers import sampling_timesteps
from .official import OfficialLatentDiffusion

DrawNoise = Callable[[int], Tensor]
"""Fresh noise of a sampling step, shaped like the latents."""

DrawShape = Callable[[tuple[int, ...]], Tensor]
"""The next noise of a given shape, in the order of the released scripts."""

GuidanceForm = Literal["cfg", "cfg_original", "cfg_ours"]


@dataclass(frozen=True)
class Given:
    """Frames that are given to a window.

    Args:
        latents: `b c t h w`, noised to the level; read where `frames` is 1.
        frames: `b 1 t h w`, 1 where the network's input is replaced by the given latents.
        told: `b 1 t h w`, the mask that the network is told.
        level: int64 `b`, the noise level that the network is told.
    """

    latents: Tensor
    frames: Tensor
    told: Tensor
    level: Tensor


def guidance_scale_of(form: GuidanceForm | None, weight: float) -> float:
    """The scale of `uncond + scale (cond - uncond)` for one of the released forms of guidance.

    None and `cfg` are that form itself, `cfg_original` is the paper's `(1 + w) cond - w uncond`, `cfg_ours`
    is `cond + w (uncond - cond)`. A weight of exactly 1 turns guidance off, whatever the form.
    """
    if weight == 1.0:
        return 1.0
    return {None: weight, "cfg": weight, "cfg_original": 1.0 + weight, "cfg_ours": 1.0 - weight}[form]


def ddim_timesteps(
    num_timesteps: int, num_sampling_steps: int, spacing: Literal["uniform", "quad"] = "uniform"
) -> list[int]:
    """The times that the released DDIM visits, increasing: 1, 1 + c, 1 + 2c, … with c = T // S.

    There can be more of them than were asked for. Raises ValueError where the released code leaves its table
    (`T` itself is hit).
    """
    if not 1 <= num_sampling_steps <= num_timesteps:
        raise ValueError(f"num_sampling_steps must be from 1 to {num_timesteps}, got {num_sampling_steps}")
    if spacing == "quad":
        roots = torch.linspace(0, (num_timesteps * 0.8) ** 0.5, num_sampling_steps, dtype=torch.float64)
        times = [int(root**2) + 1 for root in roots.tolist()]
    else:
        times = [time + 1 for time in range(0, num_timesteps, num_timesteps // num_sampling_steps)]
    if times[-1] >= num_timesteps:
        raise ValueError(
            f"{num_sampling_steps} steps make the released DDIM ask for time {times[-1]} of a schedule of "
            f"{num_timesteps}; it crashes there. Choose another number of steps"
        )
    return times


def ddim_tables(alphas_cumprod: Tensor, timesteps: list[int], eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Signal at each of the times, signal at the time before, noise added in between; float64 each.

    Source: Song et al. 2021, eqs. 12 and 16. Before the first time comes time 0, not the clean sample.
    """
    alphas = alphas_cumprod.double()[timesteps]
    before = torch.cat([alphas_cumprod[:1].double(), alphas[:-1]])
    sigmas = eta * ((1 - before) / (1 - alphas) * (1 - alphas / before)).sqrt()
    return alphas, before, sigmas


@dataclass(frozen=True)
class OfficialSampler:
    """Windows of latents by a released model.

    Args:
        model: U-Net, schedule and the faults to reproduce.
        guidance_scale: of `uncond + scale (cond - uncond)`; see :func:`guidance_scale_of`.
    """

    model: OfficialLatentDiffusion
    guidance_scale: float = 1.0

    @torch.no_grad()
    def predict(
        self, latents: Tensor, timesteps: Tensor, given: Given | None, level: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The latents as a call of the network leaves them, and its guided prediction, each `b c t h w`.

        `level` is told where nothing is given, unless the released code would tell none.
        """
        unet, compatibility = self.model.unet, self.model.compatibility
        silent = compatibility.unconditional_without_level
        if given is None:
            told = None if silent or level is None else torch.full_like(timesteps, level)
            return latents, unet(latents, timesteps, noise_level=told)
        shown = torch.where(given.frames > 0, given.latents, latents)
        conditional = unet(shown, timesteps, mask=given.told, noise_level=given.level)
        if compatibility.latents_overwritten:
            latents = shown
        if self.guidance_scale == 1.0:
            return latents, conditional
        unconditional = unet(latents, timesteps, noise_level=None if silent else given.level)
        return latents, unconditional + self.guidance_scale * (conditional - unconditional)

    def ddim(
        self,
        noise: Tensor,
        *,
        num_sampling_steps: int,
        eta: float = 0.0,
        draw_noise: DrawNoise | None = None,
        given: Given | None = None,
        level: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents after each step of DDIM and the clean sample that the step foresaw, each `b c t h w`."""
        process = self.model.parameterization
        if self.model.compatibility.ddim_table_as_released:
            times = ddim_timesteps(process.num_timesteps, num_sampling_steps)
            _, before, sigmas = ddim_tables(process.alphas_cumprod, times, eta)
        else:
            times = sampling_timesteps(process.num_timesteps, num_sampling_steps)[::-1]
            _, before, sigmas = ddim_tables(process.alphas_cumprod, times, eta)
            before[0], sigmas[0] = 1.0, 0.0
        latents = noise
        for i in reversed(range(len(times))):
            timesteps = torch.full((len(latents),), times[i], device=latents.device)
            latents, prediction = self.predict(latents, timesteps, given, level)
            sample = process.to_sample(prediction, latents, timesteps)
            epsilon = process.to_noise(prediction, latents, timesteps)
            towards = max(1.0 - float(before[i]) - float(sigmas[i]) ** 2, 0.0) ** 0.5
            latents = float(before[i]) ** 0.5 * sample + towards * epsilon
            if eta > 0:
                assert draw_noise is not None, "eta > 0 needs draw_noise"
                latents = latents + float(sigmas[i]) * draw_noise(len(times) - 1 - i)
            yield latents, sample

    def ddpm(
        self,
        noise: Tensor,
        *,
        num_last_steps: int,
        draw_noise: DrawNoise,
        given: Given | None = None,
        level: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents after each of the last ancestral steps and the clean sample that the step foresaw.

        All steps are `num_last_steps=num_timesteps` (Ho et al. 2020, eqs. 6 and 7).
        """
        process = self.model.parameterization
        latents = noise
        for i, time in enumerate(reversed(range(num_last_steps))):
            timesteps = torch.full((len(latents),), time, device=latents.device)
            latents, prediction = self.predict(latents, timesteps, given, level)
            sample = process.to_sample(prediction, latents, timesteps)
            now = float(process.alphas_cumprod[time])
            after = float(process.alphas_cumprod[time - 1]) if time > 0 else 1.0
            beta = 1.0 - now / after
            mean = after**0.5 * beta / (1.0 - now) * sample
            mean = mean + (now / after) ** 0.5 * (1.0 - after) / (1.0 - now) * latents
            spread = (beta * (1.0 - after) / (1.0 - now)) ** 0.5
            latents = mean + spread * draw_noise(i) if time > 0 else mean
            yield latents, sample


def last(steps: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """The latents after the last step."""
    for latents, _ in steps:
        result = latents
    return result


def given_frames(
    model: OfficialLatentDiffusion,
    latents: Tensor,
    where: list[int],
    noise: Tensor,
    level: int,
    num_frames: int | None = None,
) -> Given:
    """Given latents `b c n h w` at these n frames of a window, noised to the level (`noise` has their shape).

    The window has `num_frames` latent frames, or as many as the model was trained with. Conditional latent
    perturbation, He et al. 2022, section 3.4.
    """
    t = model.window[1] if num_frames is None else num_frames
    b, c, _, h, w = latents.shape
    levels = torch.full((b,), level, device=latents.device)
    window = latents.new_zeros(b, c, t, h, w)
    window[:, :, where] = model.parameterization.add_noise(latents, noise, levels)
    frames = latents.new_zeros(b, 1, t, h, w)
    frames[:, :, where] = 1.0
    return Given(window, frames, frames, levels)


def extend_by_autoregression(
    sampler: OfficialSampler,
    draw: DrawShape,
    *,
    shape: tuple[int, int, int, int, int],
    num_extensions: int,
    num_given: int,
    noise_level: int,
    num_sampling_steps: int,
    eta: float = 0.0,
) -> Tensor:
    """Latents `b c t h w` of a first window and so many extensions, each given the last frames so far.

    `draw` is asked for the start noise of the first window, then in turn for the perturbation of the given
    frames and the start noise of each extension (and for the noise of steps, if `eta` > 0).
    """
    model = sampler.model

    def window(sampler: OfficialSampler, given: Given | None) -> Tensor:
        steps = sampler.ddim(
            draw(shape),
            num_sampling_steps=num_sampling_steps,
            eta=eta,
            draw_noise=lambda _: draw(shape),
            given=given,
            level=noise_level,
        )
        return last(steps)

    # Nothing is given to the first window: both halves of guidance would be the same.
    video = window(OfficialSampler(model), None)
    for _ in range(num_extensions):
        tail = video[:, :, -num_given:]
        noise = draw(tuple(tail.shape))
        given = given_frames(model, tail, list(range(num_given)), noise, noise_level, shape[2])
        if model.compatibility.every_frame_marked:
            given = replace(given, told=torch.ones_like(given.told))
        video = torch.cat([video, window(sampler, given)[:, :, num_given:]], dim=2)
    return video


def fill_gaps(
    sampler: OfficialSampler,
    keys: Tensor,
    draw: DrawShape,
    *,
    noise_level: int,
    num_sampling_steps: int,
    eta: float = 0.0,
    num_frames: int | None = None,
) -> Tensor:
    """Latents between key latents `b c k h w`: each key, what is made after it, and the last right key.

    `draw` is asked in turn for the perturbation of the two keys and the start noise of each gap, whose window
    has `num_frames` latent frames, or as many as the model was trained with.
    """
    model = sampler.model
    b, c, k, h, w = keys.shape
    t = model.window[1] if num_frames is None else num_frames
    num_gaps = len(range(0, k - 3, 3)) if model.compatibility.gaps_skipped else k - 1
    pieces = []
    for gap in range(num_gaps):
        ends = keys[:, :, gap : gap + 2]
        given = given_frames(model, ends, [0, t - 1], draw(tuple(ends.shape)), noise_level, t)
        shape = (b, c, t, h, w)
        steps = sampler.ddim(
            draw(shape),
            num_sampling_steps=num_sampling_steps,
            eta=eta,
            given=given,
            draw_noise=lambda _: draw((b, c, t, h, w)),
        )
        pieces += [ends[:, :, :1], last(steps)[:, :, 1:-1]]
    return torch.cat([*pieces, keys[:, :, num_gaps : num_gaps + 1]], dim=2)


@torch.no_grad()
def decode(model: OfficialLatentDiffusion, latents: Tensor, chunk: int | None = None) -> Tensor:
    """Video `b c t h w` of normalized latents, decoded whole or in chunks of so many latent frames.

    Chunks know nothing of each other: seams show. Raises ValueError if the checkpoint had no autoencoder.
    """
    if model.autoencoder is None:
        raise ValueError("the checkpoint holds no autoencoder (first_stage_model.*) to decode with")
    raw = model.autoencoder.denormalize(latents)
    pieces = [raw] if chunk is None else raw.split(chunk, dim=2)
    return torch.cat([model.autoencoder.decode(piece) for piece in pieces], dim=2)


def to_frames(model: OfficialLatentDiffusion, video: Tensor) -> Tensor:
    """Frames uint8 `b t h w c` of a video `b c t h w`."""
    levels = ((video + 1.0) * 127.5).clamp(0.0, 255.0)
    if not model.compatibility.frames_truncated:
        levels = levels.round()
    return levels.to(torch.uint8).permute(0, 2, 3, 4, 1)
