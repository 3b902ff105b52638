"""Each fault of the released code is a field of `OfficialCompatibility`: there with it, gone without."""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from src.diffusion.conditioning import Condition, GivenFrames, denoiser_of
from src.diffusion.guidance import guided
from src.diffusion.samplers import ddim
from src.interop.official import (
    OfficialCompatibility,
    OfficialLatentDiffusion,
    latent_diffusion_from_official,
    unet_from_official,
)
from src.interop.official_names import unet_blocks
from src.interop.official_sampling import (
    Given,
    OfficialSampler,
    fill_gaps,
    given_frames,
    guidance_scale_of,
    last,
    to_frames,
)
from tests.parity.conftest import Case, relative_error

Golden = Callable[[str], Case]
TOLERANCE = 1e-3
TEXTBOOK = OfficialCompatibility(**{field.name: False for field in fields(OfficialCompatibility)})


def without(model: OfficialLatentDiffusion, *faults: str) -> OfficialLatentDiffusion:
    """The model with some faults mended."""
    mended = replace(model.compatibility, **dict.fromkeys(faults, False))
    return replace(model, compatibility=mended)


def prediction(case: Case) -> tuple[OfficialLatentDiffusion, Given]:
    model = latent_diffusion_from_official(case.whole_state, case.config, use_ema=False)
    where = list(range(case.inputs["prev"].shape[2]))
    level = case.config["sampling"]["level"]
    return model, given_frames(
        model, case.inputs["prev"], where, case.inputs["cond_noise"], level, case.inputs["x_T"].shape[2]
    )


def recorded_guidance(case: Case) -> tuple[str, float]:
    """A recording with guidance, by name, and its scale; a weight of exactly 1 turns guidance off."""
    sampling = case.config["sampling"]
    form = "cfg_original" if sampling["cfg_original_scale"] != 1.0 else "cfg_standard"
    released = "cfg_original" if form == "cfg_original" else None
    return f"ddim.{form}", guidance_scale_of(released, sampling[f"{form}_scale"])


def guided_ddim(case: Case, model: OfficialLatentDiffusion, given: Given) -> Tensor:
    sampling = case.config["sampling"]
    sampler = OfficialSampler(model, recorded_guidance(case)[1])
    return last(sampler.ddim(case.inputs["x_T"], num_sampling_steps=sampling["S"], given=given))


@torch.no_grad()
def test_relative_position(golden: Golden) -> None:
    """Released weights want the transposed, differently scaled logit; the textbook's is far away."""
    case = golden("unet_factorized")
    outputs = []
    for compatibility in (OfficialCompatibility(), TEXTBOOK):
        unet = unet_from_official(case.state, case.config, compatibility=compatibility)
        (name,) = re.findall(r"attention block '([\w.]+)'", case.notes)
        block = {theirs: ours for ours, theirs in unet_blocks(unet)}[name]
        outputs.append(unet.get_submodule(block)(case.inputs["attn_x"]))
    assert relative_error(outputs[0], case.outputs["attn_y"]) <= 1e-4
    assert relative_error(outputs[1], case.outputs["attn_y"]) > 0.05


@torch.no_grad()
def test_ddim_table(golden: Golden) -> None:
    """Without it the released model is sampled as any other."""
    case = golden("ldm_short")
    model = latent_diffusion_from_official(case.whole_state, case.config, use_ema=False)
    noise = case.inputs["x_T"]
    as_released = last(OfficialSampler(model).ddim(noise, num_sampling_steps=10))
    mended = last(
        OfficialSampler(without(model, "ddim_table_as_released")).ddim(noise, num_sampling_steps=10)
    )
    textbook = our_ddim(model, noise, Condition(), 1.0, 10)
    assert relative_error(as_released, textbook) > TOLERANCE
    assert relative_error(mended, textbook) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("fault", ["latents_overwritten", "unconditional_without_level"])
def test_guided_prediction(golden: Golden, fault: str) -> None:
    """What the unconditional call of guidance is shown; at scale 0 it is all that remains."""
    case = golden("ldm_pred")
    model, given = prediction(case)
    assert relative_error(guided_ddim(case, model, given), case.outputs[recorded_guidance(case)[0]]) <= 1e-3

    noise = case.inputs["x_T"]
    times = torch.full((len(noise),), model.parameterization.num_timesteps // 3)
    overwritten = torch.where(given.frames > 0, given.latents, noise)
    released = model.unet(overwritten, times)
    mended = {
        "latents_overwritten": model.unet(noise, times),
        "unconditional_without_level": model.unet(overwritten, times, noise_level=given.level),
    }[fault]
    assert not torch.equal(mended, released)
    for sampled, expected in ((model, released), (without(model, fault), mended)):
        assert torch.equal(OfficialSampler(sampled, 0.0).predict(noise, times, given)[1], expected)


@torch.no_grad()
def test_without_any_fault_sampling_is_ours(golden: Golden) -> None:
    """All faults mended, the released sampler is our DDIM with our guidance and our replacement."""
    case = golden("ldm_pred")
    model, given = prediction(case)
    mended = replace(model, compatibility=replace(TEXTBOOK, relative_position_as_released=True))
    sampling = case.config["sampling"]
    scale = recorded_guidance(case)[1]
    condition = Condition(GivenFrames(given.latents, given.frames, given.level))
    ours = our_ddim(model, case.inputs["x_T"], condition, scale, sampling["S"])
    assert relative_error(guided_ddim(case, mended, given), ours) <= 1e-5


def our_ddim(
    model: OfficialLatentDiffusion, noise: Tensor, condition: Condition, scale: float, steps: int
) -> Tensor:
    denoiser, process = guided(denoiser_of(model.unet), scale), model.parameterization

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return process.to_sample(denoiser(noisy, timesteps, condition), noisy, timesteps)

    sampler = partial(ddim, num_sampling_steps=steps, eta=0.0)
    return sampler(denoise, noise, process.alphas_cumprod, lambda _: noise)


def test_every_frame_marked(golden: Golden) -> None:
    """As shipped and with the mask of training, extensions are two different recordings."""
    outputs = golden("ldm_pred").outputs
    assert relative_error(outputs["ar.as_shipped"], outputs["ar.mask_fixed"]) > TOLERANCE
    # test_golden computes either with this field on and off.


@torch.no_grad()
def test_gaps_skipped(golden: Golden) -> None:
    """Mended, every gap between two key latents is filled, the first ones as before."""
    case = golden("ldm_interp")
    model = latent_diffusion_from_official(case.whole_state, case.config)
    told, keys = case.config["sampling"]["interpolate"], case.inputs["base"]
    scale = guidance_scale_of(told["uc_type"], told["uncond_scale"])
    expected = case.outputs["interp.z_as_shipped"]

    names = sorted((n for n in case.inputs if n.startswith("interp.")), key=lambda n: int(n.split(".")[-1]))
    reel = iter([case.inputs[name] for name in names])
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        recorded = next(reel, None)
        return torch.randn(shape, generator=generator) if recorded is None else recorded

    mended = fill_gaps(
        OfficialSampler(without(model, "gaps_skipped"), scale),
        keys,
        draw,
        noise_level=told["sample_cond_noise_level"],
        num_sampling_steps=told["ddim_steps"],
        eta=told["eta"],
        num_frames=case.inputs["x_T"].shape[2],
    )
    between = case.inputs["x_T"].shape[2] - 1
    assert mended.shape[2] == (keys.shape[2] - 1) * between + 1
    assert torch.equal(mended[:, :, ::between], keys)
    shipped = expected.shape[2] - 1
    assert shipped < mended.shape[2] - 1
    assert relative_error(mended[:, :, :shipped], expected[:, :, :shipped]) <= TOLERANCE


def test_frames_truncated(golden: Golden) -> None:
    case = golden("ldm_short")
    model = latent_diffusion_from_official(case.whole_state, case.config)
    video, expected = case.outputs["decoded_sample"], case.outputs["decoded_sample_uint8"]
    assert torch.equal(to_frames(model, video), expected)
    rounded = to_frames(without(model, "frames_truncated"), video)
    assert (rounded.int() - expected.int()).unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("form", "weight", "scale"),
    [(None, 1.5, 1.5), ("cfg", 1.5, 1.5), ("cfg_original", 0.1, 1.1), ("cfg_ours", 0.1, 0.9)]
    + [(form, 1.0, 1.0) for form in (None, "cfg_original", "cfg_ours")],
)
def test_forms_of_guidance(form: str | None, weight: float, scale: float) -> None:
    """Each form, written out for two numbers, is the textbook's with another scale; a weight of 1 is off."""
    cond, uncond = 3.0, -2.0
    written_out = {
        None: uncond + weight * (cond - uncond),
        "cfg": uncond + weight * (cond - uncond),
        "cfg_original": (1 + weight) * cond - weight * uncond,
        "cfg_ours": cond + weight * (uncond - cond),
    }[form]
    expected = cond if weight == 1.0 else written_out
    found = guidance_scale_of(form, weight)  # type: ignore[arg-type]
    assert found == pytest.approx(scale)
    assert uncond + found * (cond - uncond) == pytest.approx(expected)
