"""Models of the released LVDM code, by its names for weights and its keyword arguments, as ours and back.

Source of the names: the key lists of the released checkpoints (`ae_sky`, `ae_taichi`, `short_sky`,
`short_taichi`) and of the configurations that were published without weights.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..diffusion import noise_schedule
from ..diffusion.conditioning import FrameMasking
from ..diffusion.parameterization import Parameterization, PredictionType
from ..models.attention import AttentionBlock, AttentionView
from ..models.autoencoder import Autoencoder3d
from ..models.discriminator import PatchDiscriminator
from ..models.layers import FrameGroupNorm, GroupNorm
from ..models.unet import UNet3d
from .official_configs import (
    Config,
    Schedule,
    autoencoder_arguments,
    discriminator_arguments,
    masking_from_official,
    params_of,
    refuse_inexpressible,
    refuse_unknown_kind,
    schedule_arguments,
    unet_arguments,
    window_from_official,
)
from .official_names import (
    Names,
    autoencoder_names,
    discriminator_names,
    export,
    listed,
    load,
    refuse_misfit,
    unet_names,
)

UNET_PREFIX = "model.diffusion_model."
AVERAGE_PREFIX = "model_ema."
AUTOENCODER_PREFIX = "first_stage_model."
AVERAGE_COUNTERS = (AVERAGE_PREFIX + "decay", AVERAGE_PREFIX + "num_updates")


@dataclass(frozen=True)
class OfficialCompatibility:
    """Which faults of the released code are reproduced; all of them, unless said otherwise.

    Args:
        relative_position_as_released: the relative logit uses the key's query vector, the opposite distance
            and the fourth root of the head's width. Released weights were trained with it.
        ddim_table_as_released: DDIM visits the times 1, 1 + c, 1 + 2c, … and ends at time 0 instead of at the
            clean sample, so that a little noise remains.
        latents_overwritten: the conditional call of the network overwrites the sampler's own latents at the
            given frames, so that the update and the unconditional call see the given latents.
        unconditional_without_level: unconditional calls are told no noise level, which training never showed.
        every_frame_marked: when a video is extended, the mask says that every frame is given.
        gaps_skipped: interpolation fills only about a third of the gaps and drops the later key latents.
        frames_truncated: pixels are cut to whole numbers instead of rounded.
    """

    relative_position_as_released: bool = True
    ddim_table_as_released: bool = True
    latents_overwritten: bool = True
    unconditional_without_level: bool = True
    every_frame_marked: bool = True
    gaps_skipped: bool = True
    frames_truncated: bool = True


@dataclass(frozen=True)
class OfficialLatentDiffusion:
    """What a released latent diffusion checkpoint holds, as our objects.

    Args:
        unet: the denoising network, with the weights that were chosen: averaged or raw.
        autoencoder: of its latents, their moments set from the config; None if the checkpoint has none.
        schedule: name and arguments of a function of `diffusion.noise_schedule`.
        prediction_type: what the network predicts.
        masking: which frames were given in training.
        window: latent shape (c, t, h, w) of a training clip.
        averaged: whether `unet` holds averaged weights; None if the checkpoint has no averages at all.
        others: the network's other weights (raw ones if `unet` is averaged) by official key, kept as they are
            for the way back; empty if they aren't known.
        compatibility: the faults to reproduce.
    """

    unet: UNet3d
    autoencoder: Autoencoder3d | None
    schedule: Schedule
    prediction_type: PredictionType
    masking: FrameMasking
    window: tuple[int, int, int, int]
    averaged: bool | None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    compatibility: OfficialCompatibility = OfficialCompatibility()

    @property
    def parameterization(self) -> Parameterization:
        """The schedule, and what the network predicts."""
        return parameterization(self.schedule, self.prediction_type)


def parameterization(schedule: Schedule, prediction_type: PredictionType) -> Parameterization:
    """A schedule, by name and arguments of a function of `diffusion.noise_schedule`, and a prediction."""
    function, arguments = schedule
    return Parameterization(getattr(noise_schedule, function)(**arguments), prediction_type)


# From official


def autoencoder_from_official(state: Mapping[str, Tensor], config: Config, prefix: str = "") -> Autoencoder3d:
    """The released video autoencoder, in evaluation mode.

    Args:
        state: weights by official key; those of its training loss (`loss.*`) and the doubled ones may be
            there or not.
        config: its keyword arguments: flat (`n_hiddens`, `downsample`, `z_channels`, `embed_dim`), as the
            `params` of an autoencoder's config, or inside a latent diffusion's config. There `scale_factor`
            and `shift_factor` give the moments of the latents; without them they are 0 and 1.
        prefix: what stands before each key, such as `first_stage_model.`; other keys are not looked at.

    Raises:
        ValueError: if the config says what we can't build, or a key is left over or missing or has another
            shape.
    """
    with torch.device("meta"):  # every weight is in the state: none is allocated only to be overwritten
        autoencoder = Autoencoder3d(**autoencoder_arguments(config))
    autoencoder.latent_mean, autoencoder.latent_std = latent_moments(config, autoencoder.latent_channels)
    load(autoencoder, autoencoder_names(autoencoder), state, prefix, ignored="loss.")
    return autoencoder.eval()


def unet_from_official(
    state: Mapping[str, Tensor],
    config: Config,
    prefix: str = "",
    compatibility: OfficialCompatibility = OfficialCompatibility(),
) -> UNet3d:
    """The released U-Net, unconditional or for prediction and interpolation, in evaluation mode.

    Args:
        state: weights by official key.
        config: its keyword arguments, as they are, as `params`, or inside a latent diffusion's config. One
            input channel more than output channels means that the last one is the mask of given frames, and
            that `num_classes` counts noise levels; otherwise it counts classes.
        prefix: what stands before each key, such as `model.diffusion_model.`; other keys are not looked at.
        compatibility: the faults to reproduce.

    Raises:
        ValueError: if the config says what we can't build, or a key is left over or missing or has another
            shape.
    """
    unet = blank_unet(config, compatibility)
    load(unet, unet_names(unet), state, prefix)
    return unet.eval()


def latent_diffusion_from_official(
    state: Mapping[str, Tensor],
    config: Config,
    use_ema: bool = True,
    compatibility: OfficialCompatibility = OfficialCompatibility(),
) -> OfficialLatentDiffusion:
    """A whole released checkpoint: U-Net, autoencoder, schedule, scale and shift of the latents.

    Args:
        state: the checkpoint's `state_dict`. The schedule's tables must be those of the config; a state of
            parameters alone lacks all buffers. Only a state without any `first_stage_model.*` may lack the
            autoencoder.
        config: `{target, params}` as in the released configuration files (or such a file's `model`).
        use_ema: whether the U-Net gets the averaged weights. A model whose config says `use_ema: false` has
            none, and gets the raw ones.
        compatibility: the faults to reproduce.

    Raises:
        ValueError: if the config says what we can't build, or a key is left over or missing or has another
            shape, or the tables are of another schedule.
    """
    params = params_of(config)
    refuse_unknown_kind(params)
    schedule = schedule_arguments(params)
    prediction_type: PredictionType = "sample" if params.get("parameterization", "eps") == "x0" else "epsilon"
    unet = blank_unet(config, compatibility)
    names = unet_names(unet)
    doubles = average_keys(names)
    has_averages = any(key.startswith(AVERAGE_PREFIX) for key in state)
    tables = schedule_tables(parameterization(schedule, prediction_type).alphas_cumprod)
    # A state of nothing but parameters has neither tables nor counters.
    buffers = (*tables, *AVERAGE_COUNTERS)
    counted = AVERAGE_COUNTERS if any(key in state for key in buffers) else ()
    if use_ema and not has_averages and params.get("use_ema", True):
        raise ValueError(
            "the averaged weights (model_ema.*) are missing: take the raw ones with use_ema=false, or "
            "let the config say use_ema: false if the model was trained without averages"
        )
    if has_averages:
        expected = {*doubles.values(), *counted}
        missing = sorted(expected - state.keys())
        extra = sorted(key for key in state if key.startswith(AVERAGE_PREFIX) and key not in expected)
        if missing or extra:
            raise ValueError(
                f"the averaged weights don't fit the config: missing {listed(missing)}, "
                f"left over {listed(extra)}"
            )
    averaged = use_ema if has_averages else None
    refuse_misfit(names, state, UNET_PREFIX)
    chosen = {raw: state[double if averaged else raw] for raw, double in doubles.items()}
    taken = set(doubles.values() if averaged else doubles)
    ours = (UNET_PREFIX, AVERAGE_PREFIX)
    others = {key: tensor for key, tensor in state.items() if key.startswith(ours) and key not in taken}
    load(unet, names, chosen, UNET_PREFIX)

    autoencoder = None
    if any(key.startswith(AUTOENCODER_PREFIX) for key in state):
        autoencoder = autoencoder_from_official(state, config, AUTOENCODER_PREFIX)
    refuse_other_tables(state, tables)
    return OfficialLatentDiffusion(
        unet=unet.eval(),
        autoencoder=autoencoder,
        schedule=schedule,
        prediction_type=prediction_type,
        masking=masking_from_official(params),
        window=window_from_official(params),
        averaged=averaged,
        others=others,
        compatibility=compatibility,
    )


def discriminator_from_official(
    state: Mapping[str, Tensor], config: Config, prefix: str = ""
) -> PatchDiscriminator:
    """The released patch discriminator, with batch normalization.

    `config` holds `input_nc`, `ndf` and `n_layers`, or `disc_ndf` and `disc_n_layers` as in the loss that
    owns it; `prefix` is then `loss.discriminator.`. Raises ValueError as its siblings do.
    """
    discriminator = PatchDiscriminator(**discriminator_arguments(config))
    load(discriminator, discriminator_names(discriminator), state, prefix)
    return discriminator


# To official


def to_official(
    model: Autoencoder3d | UNet3d | PatchDiscriminator | OfficialLatentDiffusion, prefix: str = ""
) -> dict[str, Tensor]:
    """A model's weights by official key, doubled keys included; the way back from `…_from_official`.

    A whole latent diffusion model gives all of a released checkpoint: tables of the schedule, raw and
    averaged weights (equal, if the model knows only one of them), and the autoencoder. An autoencoder's
    latent moments have no key; they belong into the config, as `scale_factor` = 1/deviation and
    `shift_factor` = -mean.

    Raises:
        ValueError: if the released code has no such model, naming what it can't express.
    """
    if isinstance(model, OfficialLatentDiffusion):
        return latent_diffusion_to_official(model, prefix)
    if isinstance(model, Autoencoder3d):
        refuse_inexpressible(autoencoder_differences(model))
        return export(model, autoencoder_names(model), prefix)
    if isinstance(model, UNet3d):
        refuse_inexpressible(unet_differences(model))
        return export(model, unet_names(model), prefix)
    if isinstance(model, PatchDiscriminator):
        return export(model, discriminator_names(model), prefix)
    raise TypeError(f"the released code knows no {type(model).__name__}")


def latent_diffusion_to_official(model: OfficialLatentDiffusion, prefix: str) -> dict[str, Tensor]:
    """A whole checkpoint's `state_dict`."""
    raw = to_official(model.unet, UNET_PREFIX)
    state: dict[str, Tensor] = {**schedule_tables(model.parameterization.alphas_cumprod), **raw}
    if model.averaged is not None:
        doubles = average_keys(unet_names(model.unet))
        state |= {doubles[key]: tensor for key, tensor in raw.items()}
        decay, updates = AVERAGE_COUNTERS
        state |= {decay: torch.tensor(0.9999), updates: torch.tensor(0, dtype=torch.int32)}
    state |= model.others
    if model.autoencoder is not None:
        state |= to_official(model.autoencoder, AUTOENCODER_PREFIX)
    return {prefix + key: tensor for key, tensor in state.items()}


def unet_differences(unet: UNet3d) -> list[str]:
    """What the released code can't express about a U-Net."""
    found = [
        f"normalization in {module.num_groups} groups instead of 32 (unet.norm_groups)"
        for module in unet.modules()
        if isinstance(module, GroupNorm) and module.num_groups != 32
    ][:1]
    if unet.num_noise_levels and unet.num_classes:
        found.append("noise levels and classes in one network")
    if unet.num_strides:
        found.append("several latent strides in one network")
    for module in unet.modules():
        if isinstance(module, AttentionBlock) and [view.tokens.spans_time for view in views(module)] != [
            False,
            True,
        ]:
            found.append("attention that isn't factorized into space and then time (attention=factorized)")
            break
    if any(
        view.relative is not None and not view.relative.as_released
        for module in unet.modules()
        if isinstance(module, AttentionBlock)
        for view in views(module)
    ):
        found.append(
            "relative position by the textbook (unet.attention.relative_position_as_released=true trains "
            "a network that the released code computes alike)"
        )
    return found


def views(block: AttentionBlock) -> list[AttentionView]:
    """The views of an attention block."""
    return [view for view in block.views if isinstance(view, AttentionView)]


def autoencoder_differences(autoencoder: Autoencoder3d) -> list[str]:
    """What the released code can't express about an autoencoder."""
    found = []
    if any(isinstance(module, FrameGroupNorm) for module in autoencoder.modules()):
        found.append("normalization frame by frame (autoencoder.norm=frame)")
    if any(isinstance(m, GroupNorm) and m.num_groups != 32 for m in autoencoder.modules()):
        found.append("normalization in other than 32 groups (autoencoder.norm_groups)")
    if autoencoder.patch_size != (1, 1, 1):
        found.append(f"a stem of patches {autoencoder.patch_size} (autoencoder.patch_size)")
    blocks = {
        side: {len(stage) - 1 for stage in getattr(autoencoder, side).stages}
        for side in ("encoder", "decoder")
    }
    if blocks != {"encoder": {1}, "decoder": {2}}:
        found.append("other than one residual block per encoder stage and two per decoder stage")
    return found


# Parts


def blank_unet(config: Config, compatibility: OfficialCompatibility) -> UNet3d:
    """The U-Net of a config, without memory for its weights (on the meta device)."""
    arguments = unet_arguments(config, compatibility.relative_position_as_released)
    attention: Callable[..., AttentionBlock] = partial(AttentionBlock, **arguments.pop("attention"))
    with torch.device("meta"):
        return UNet3d(**arguments, attention=attention)


def average_keys(names: Names) -> dict[str, str]:
    """For each raw key of the U-Net in a checkpoint the key of its average, which has lost its dots."""
    start = UNET_PREFIX.removeprefix("model.")
    return {
        UNET_PREFIX + name.key: AVERAGE_PREFIX + (start + name.key).replace(".", "")
        for name in names.values()
    }


def latent_moments(config: Config, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of raw latents, each `c`, from `z = scale_factor (raw + shift_factor)`."""
    params = params_of(config)
    mean, std = 0.0 - params.get("shift_factor", 0.0), 1 / params.get("scale_factor", 1.0)
    return torch.full((channels,), float(mean)), torch.full((channels,), float(std))


def latent_scale(autoencoder: Autoencoder3d) -> dict[str, float]:
    """`scale_factor` and `shift_factor` of an autoencoder, one number each for all channels.

    Raises ValueError if its channels have different moments; see `fold_moments`.
    """
    mean, std = autoencoder.latent_mean, autoencoder.latent_std
    if bool((mean != mean[0]).any() or (std != std[0]).any()):
        refuse_inexpressible(["latent moments that differ between channels (fold_moments removes them)"])
    return {"scale_factor": 1 / float(std[0]), "shift_factor": 0.0 - float(mean[0])}


@torch.no_grad()
def fold_moments(autoencoder: Autoencoder3d) -> Autoencoder3d:
    """The same autoencoder with its latents' moments worked into the 1×1×1 convolutions at its waist.

    Its raw latents are the normalized latents of the given one, so that mean 0 and deviation 1 remain.
    """
    folded = copy.deepcopy(autoencoder)
    mean, std = autoencoder.latent_mean.double(), autoencoder.latent_std.double()
    into, back = folded.to_moments, folded.from_latents
    assert into.bias is not None and back.bias is not None
    c = len(mean)
    into.weight[:c] = into.weight[:c] / std.reshape(-1, 1, 1, 1, 1)
    into.bias[:c] = (into.bias[:c] - mean) / std
    into.bias[c:] = into.bias[c:] - 2 * std.log()
    back.bias += (back.weight.double() * mean.reshape(1, -1, 1, 1, 1)).sum((1, 2, 3, 4))
    back.weight *= std.reshape(1, -1, 1, 1, 1)
    folded.latent_mean.zero_()
    folded.latent_std.fill_(1.0)
    return folded


def schedule_tables(alphas_cumprod: Tensor) -> dict[str, Tensor]:
    """The twelve tables that a released checkpoint stores of its schedule, float32 `(num_timesteps,)`.

    Source: Ho et al. 2020, eqs. 4 and 7; logarithms of variances below 1e-20 are clipped there.
    """
    alphas_cumprod = alphas_cumprod.double()
    before = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / before
    variance = betas * (1 - before) / (1 - alphas_cumprod)
    tables = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas_cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - alphas_cumprod),
    }
    return {name: table.float() for name, table in tables.items()}


def refuse_other_tables(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a state holds tables that aren't those of the config, or keys without a place."""
    parts = (UNET_PREFIX, AVERAGE_PREFIX, AUTOENCODER_PREFIX)
    extra = sorted(key for key in state if not key.startswith(parts) and key not in expected)
    found = {key: state[key] for key in expected if key in state}
    missing = sorted(expected.keys() - found.keys()) if found else []
    if extra or missing:
        raise ValueError(
            f"the checkpoint doesn't fit the config: missing {listed(missing)}, left over {listed(extra)}"
        )
    for key, table in found.items():
        # A checkpoint in half precision has rounded its tables, too.
        rounding = torch.finfo(table.dtype) if table.is_floating_point() else torch.finfo(torch.float32)
        rtol, atol = max(1e-5, rounding.eps), max(1e-7, rounding.tiny)
        if table.shape != expected[key].shape or not torch.allclose(
            table.float(), expected[key].to(table.dtype).float(), rtol=rtol, atol=atol
        ):
            raise ValueError(
                f"the checkpoint's table {key} isn't that of its config's schedule; give the config that it "
                "was trained with (beta_schedule, timesteps, linear_start, linear_end)"
            )
