"""Models of the released LVDM code, by its names for weights and its keyword arguments, as ours and back.

Source of the names: the key lists of the released checkpoints (`ae_sky`, `ae_taichi`, `short_sky`,
`short_taichi`) and of the configurations that were published without weights.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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
from .official_names import (
    Names,
    autoencoder_names,
    discriminator_names,
    export,
    load,
    refuse_misfit,
    unet_names,
)

Config = Mapping[str, Any]

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
    schedule: tuple[str, dict[str, Any]]
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


def parameterization(
    schedule: tuple[str, dict[str, Any]], prediction_type: PredictionType
) -> Parameterization:
    """A schedule, by name and arguments of a function of `diffusion.noise_schedule`, and a prediction."""
    function, arguments = schedule
    return Parameterization(getattr(noise_schedule, function)(**arguments), prediction_type)


# From official


def autoencoder_from_official(state: Mapping[str, Tensor], config: Config, prefix: str = "") -> Autoencoder3d:
    """The released video autoencoder.

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
    return autoencoder


def unet_from_official(
    state: Mapping[str, Tensor],
    config: Config,
    prefix: str = "",
    compatibility: OfficialCompatibility = OfficialCompatibility(),
) -> UNet3d:
    """The released U-Net: unconditional, or for prediction and interpolation.

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
    return unet


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
    if has_averages or params.get("use_ema", True):
        expected = {*doubles.values(), *counted}
        missing = sorted(expected - state.keys())
        extra = sorted(key for key in state if key.startswith(AVERAGE_PREFIX) and key not in expected)
        if missing or extra:
            raise ValueError(
                f"the averaged weights don't fit the config: missing {missing}, left over {extra} "
                "(a model trained without averages says use_ema: false in its config)"
            )
        has_averages = True
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
        unet=unet,
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


def refuse_inexpressible(differences: list[str]) -> None:
    """Raises ValueError unless the list is empty."""
    if differences:
        raise ValueError("the released code can't express this model: " + "; ".join(differences))


# The schedule


def schedule_arguments(config: Config) -> tuple[str, dict[str, Any]]:
    """Name and arguments of our noise schedule for the original's `beta_schedule`, `linear_start`, ….

    Raises ValueError for a kind that the original doesn't have, listing what it has.
    """
    kind = config.get("beta_schedule", "linear")
    steps = config.get("timesteps", 1000)
    start, end = config.get("linear_start", 1e-4), config.get("linear_end", 2e-2)
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "linear": ("linear", {"num_timesteps": steps, "beta_start": start, "beta_end": end}),
        "cosine": (
            "cosine",
            {"num_timesteps": steps, "offset": config.get("cosine_s", 8e-3), "max_beta": 0.999},
        ),
        "sqrt_linear": ("power", {"num_timesteps": steps, "start": start, "end": end, "exponent": 1.0}),
        "sqrt": ("power", {"num_timesteps": steps, "start": start, "end": end, "exponent": 0.5}),
    }
    if kind not in kinds:
        raise ValueError(f"beta_schedule must be one of {', '.join(kinds)}, not {kind!r}")
    return kinds[kind]


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
        raise ValueError(f"the checkpoint doesn't fit the config: missing {missing}, left over {extra}")
    for key, table in found.items():
        if table.shape != expected[key].shape or not torch.allclose(
            table.float(), expected[key], rtol=1e-5, atol=1e-7
        ):
            raise ValueError(
                f"the checkpoint's table {key} isn't that of its config's schedule; give the config that it "
                "was trained with (beta_schedule, timesteps, linear_start, linear_end)"
            )


# Configs


def params_of(config: Config, inside: str | None = None) -> Config:
    """The keyword arguments in a config: itself, its `params`, or those `inside` its `params`."""
    params = config.get("params", config)
    if inside is not None and inside in params:
        return params_of(params[inside])
    return params


def expect(config: Config, **values: object) -> None:
    """Raises ValueError if the config sets one of these keys to another value."""
    for key, value in values.items():
        if key in config and config[key] != value:
            raise ValueError(f"{key} must be {value!r}, the only kind that was released, not {config[key]!r}")


def refuse_unknown_kind(params: Config) -> None:
    """Raises ValueError for a latent diffusion model that we can't build."""
    if "unet_config" not in params or "first_stage_config" not in params:
        raise ValueError(
            "not the config of a latent diffusion model: expected {target, params} with unet_config and "
            f"first_stage_config among the params, got {sorted(params)}"
        )
    expect(params, encoder_type="3d", scale_by_std=False, v_posterior=0.0, learn_logvar=False)
    if params.get("parameterization", "eps") not in ("eps", "x0"):
        raise ValueError(f"parameterization must be eps or x0, not {params['parameterization']!r}")
    if isinstance(params.get("cond_stage_config"), Mapping):
        raise ValueError(
            "this model is conditioned on text or classes by a network of its own (cond_stage_config); "
            "the text-to-video variant isn't supported"
        )


def latent_moments(config: Config, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of raw latents, each `c`, from `z = scale_factor (raw + shift_factor)`."""
    params = params_of(config)
    mean, std = 0.0 - params.get("shift_factor", 0.0), 1 / params.get("scale_factor", 1.0)
    return torch.full((channels,), float(mean)), torch.full((channels,), float(std))


def window_from_official(params: Config) -> tuple[int, int, int, int]:
    """Latent shape (c, t, h, w) of a training clip; the length is that of the attention."""
    unet = params_of(params["unet_config"])
    length = unet.get("temporal_length") or params.get("video_length")
    size = params.get("image_size", unet.get("image_size"))
    if not length or size is None:
        raise ValueError("the config tells neither image_size nor video_length (or temporal_length)")
    h, w = (size, size) if isinstance(size, int) else size
    return params.get("channels", unet["out_channels"]), int(length), int(h), int(w)


def masking_from_official(params: Config) -> FrameMasking:
    """Which frames training gave, from `p_pred`, `p_interp`, `n_prevs` and `max_noise_level`."""
    prediction, interpolation = params.get("p_pred") or 0.0, params.get("p_interp") or 0.0
    if params.get("interp_frame_stride"):
        raise ValueError("interpolation between every n-th frame (interp_frame_stride) isn't supported")
    return FrameMasking(
        prediction=float(prediction),
        interpolation=float(interpolation),
        num_given=list(params.get("n_prevs") or []),
        max_noise_level=int(params.get("max_noise_level") or 0) if params.get("noisy_cond") else 0,
        class_dropout=0.0,
    )


def autoencoder_arguments(config: Config) -> dict[str, Any]:
    """Our constructor's arguments for the original's autoencoder config, of any of its three shapes."""
    params = params_of(config, "first_stage_config")
    if "ddconfig" in params:
        details = params["ddconfig"]
        encoder, decoder = params_of(details["encoder"]), params_of(details["decoder"])
        if list(encoder["downsample"]) != list(decoder["upsample"]):
            raise ValueError(
                f"encoder divides by {encoder['downsample']}, decoder multiplies by {decoder['upsample']}"
            )
        for side in (encoder, decoder):
            expect(side, norm_type="group", padding_type="replicate")
        flat = {
            "n_hiddens": encoder["n_hiddens"],
            "downsample": encoder["downsample"],
            "z_channels": details["z_channels"],
            "embed_dim": params["embed_dim"],
            "in_channels": encoder.get("image_channel", 3),
        }
        expect(
            decoder,
            n_hiddens=flat["n_hiddens"],
            z_channels=flat["z_channels"],
            image_channel=flat["in_channels"],
        )
    else:
        expect(params, padding="replicate")
        flat = dict(params)
    missing = sorted({"n_hiddens", "downsample", "z_channels", "embed_dim"} - flat.keys())
    if missing:
        raise ValueError(f"not an autoencoder's config: missing {missing}, got {sorted(flat)}")
    t, h, w = flat["downsample"]
    return {
        "in_channels": flat.get("in_channels", 3),
        "hidden_channels": flat["n_hiddens"],
        "latent_channels": flat["embed_dim"],
        "z_channels": flat["z_channels"],
        "downsample": (t, h, w),
        "norm_groups": flat.get("norm_groups", 32),
    }


# What the original's U-Net takes if its config doesn't say.
UNET_DEFAULTS: dict[str, Any] = {
    "channel_mult": (1, 2, 4, 8),
    "conv_resample": True,
    "num_classes": None,
    "use_checkpoint": False,
    "num_heads": -1,
    "num_head_channels": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "dropout": 0.0,
    "kernel_size_t": 1,
    "temporal_length": None,
    "use_relative_position": False,
    "cond_aug_mode": None,
}
# Said by the shipped configs, without effect on what is computed.
UNET_IRRELEVANT = {"image_size", "legacy", "padding_t", "recipe_seed", "recipe_gain", "state_shapes"}
UNET_REQUIRED = {"in_channels", "out_channels", "model_channels", "attention_resolutions", "num_res_blocks"}


def unet_arguments(config: Config, compatibility: OfficialCompatibility) -> dict[str, Any]:
    """Our constructor's arguments for the original's U-Net config, of any of its shapes.

    Plain values only; `attention` holds the arguments of its `AttentionBlock`.
    """
    params = params_of(config, "unet_config")
    unknown = sorted(params.keys() - UNET_DEFAULTS.keys() - UNET_IRRELEVANT - UNET_REQUIRED)
    missing = sorted(UNET_REQUIRED - params.keys())
    if unknown or missing:
        raise ValueError(
            f"not a U-Net config that can be converted: unknown keys {unknown}, missing keys {missing} "
            "(the text-to-video variant isn't supported)"
        )
    said = UNET_DEFAULTS | dict(params)
    if said.get("padding_t", said["kernel_size_t"] // 2) != said["kernel_size_t"] // 2:
        raise ValueError(
            f"kernel_size_t={said['kernel_size_t']} with padding_t={said['padding_t']} changes the length"
        )
    if said["cond_aug_mode"] not in (None, "time_embed"):
        raise ValueError(f"cond_aug_mode must be time_embed or absent, not {said['cond_aug_mode']!r}")
    told_mask = said["in_channels"] == said["out_channels"] + 1
    rows = said["num_classes"] or 0
    by_count = said["num_heads"] != -1
    resampling_alone = "conv" if said["conv_resample"] else "pool"
    return {
        "in_channels": said["in_channels"] - told_mask,
        "out_channels": said["out_channels"],
        "model_channels": said["model_channels"],
        "channel_mult": tuple(said["channel_mult"]),
        "num_res_blocks": said["num_res_blocks"],
        "attention_downsamples": tuple(said["attention_resolutions"]),
        "attention": {
            "views": ("spatial", "temporal"),
            "relative_position": said["use_relative_position"],
            "max_distance": said["temporal_length"] or 1,
            "relative_position_as_released": compatibility.relative_position_as_released,
        },
        "num_heads": said["num_heads"] if by_count else None,
        "head_channels": None if by_count else said["num_head_channels"],
        "scale_shift_norm": said["use_scale_shift_norm"],
        "temporal_kernel": said["kernel_size_t"],
        "resampling": "residual" if said["resblock_updown"] else resampling_alone,
        "mask_channel": told_mask,
        "num_noise_levels": rows if told_mask else 0,
        "num_classes": 0 if told_mask else rows,
        "frame_noise_embedding": said["cond_aug_mode"] == "time_embed",
        "dropout": said["dropout"],
        "checkpoint": said["use_checkpoint"],
    }


def unet_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The original's keyword arguments for those of a `UNet3d`; the way back from `unet_arguments`."""
    ours = defaults_of(UNet3d) | dict(arguments)
    attention = defaults_of(AttentionBlock) | dict(ours["attention"])
    return {
        "image_size": 32,
        "in_channels": ours["in_channels"] + ours["mask_channel"],
        "out_channels": ours["out_channels"],
        "model_channels": ours["model_channels"],
        "attention_resolutions": list(ours["attention_downsamples"]),
        "num_res_blocks": ours["num_res_blocks"],
        "channel_mult": list(ours["channel_mult"]),
        "num_heads": -1 if ours["num_heads"] is None else ours["num_heads"],
        "num_head_channels": -1 if ours["head_channels"] is None else ours["head_channels"],
        "kernel_size_t": ours["temporal_kernel"],
        "padding_t": ours["temporal_kernel"] // 2,
        "temporal_length": attention["max_distance"],
        "use_relative_position": attention["relative_position"],
        "use_scale_shift_norm": ours["scale_shift_norm"],
        "resblock_updown": ours["resampling"] == "residual",
        "conv_resample": ours["resampling"] != "pool",
        "num_classes": (ours["num_noise_levels"] or ours["num_classes"]) or None,
        "cond_aug_mode": "time_embed" if ours["frame_noise_embedding"] else None,
        "dropout": ours["dropout"],
        "use_checkpoint": ours["checkpoint"],
    }


def autoencoder_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The original's `params` for the keyword arguments of an `Autoencoder3d`."""
    ours = defaults_of(Autoencoder3d) | dict(arguments)
    z_channels = ours["latent_channels"] if ours["z_channels"] is None else ours["z_channels"]
    common = {
        "n_hiddens": ours["hidden_channels"],
        "z_channels": z_channels,
        "image_channel": ours["in_channels"],
        "norm_type": "group",
    }
    size = list(ours["downsample"])
    encoder = common | {"downsample": size, "padding_type": "replicate", "double_z": True}
    return {
        "embed_dim": ours["latent_channels"],
        "ddconfig": {
            "double_z": True,
            "z_channels": z_channels,
            "encoder": {"params": encoder},
            "decoder": {"params": common | {"upsample": size}},
        },
    }


def latent_diffusion_config(
    model: OfficialLatentDiffusion, unet: Mapping[str, Any], autoencoder: Mapping[str, Any]
) -> dict[str, Any]:
    """The original's `{params}` of a model, given the keyword arguments of its `UNet3d` and `Autoencoder3d`.

    Raises:
        ValueError: if the released code can't express the schedule, the prediction or the latents' moments.
    """
    function, ours = model.schedule
    schedules: dict[str, Callable[[], dict[str, Any]]] = {
        "linear": lambda: {"linear_start": ours["beta_start"], "linear_end": ours["beta_end"]},
        "cosine": lambda: {"beta_schedule": "cosine", "cosine_s": ours["offset"]},
        "power": lambda: {
            "beta_schedule": {1.0: "sqrt_linear", 0.5: "sqrt"}[ours["exponent"]],
            "linear_start": ours["start"],
            "linear_end": ours["end"],
        },
    }
    told = {"timesteps": ours["num_timesteps"]} | schedules[function]() if function in schedules else {}
    if not told or schedule_arguments(told) != (function, {k: v for k, v in ours.items() if v is not False}):
        refuse_inexpressible([f"the noise schedule {function} with {ours}"])
    if model.prediction_type == "v":
        refuse_inexpressible(["prediction_type=v (epsilon and sample can be expressed)"])
    if model.autoencoder is None:
        refuse_inexpressible(["a model without an autoencoder"])
        raise AssertionError
    c, t, h, w = model.window
    masking = model.masking
    conditioning = {
        "conditioning_key": "concat-adm-mask",
        "noisy_cond": masking.max_noise_level > 0,
        "max_noise_level": masking.max_noise_level,
        "rand_temporal_mask": True,
        "p_interp": masking.interpolation,
        "p_pred": masking.prediction,
        "n_prevs": list(masking.num_given),
    }
    return {
        "params": told
        | {
            "parameterization": "x0" if model.prediction_type == "sample" else "eps",
            "image_size": [h, w],
            "video_length": t,
            "channels": c,
            "encoder_type": "3d",
            "use_ema": model.averaged is not None,
            "unet_config": {"params": unet_config(unet)},
            "first_stage_config": {"params": autoencoder_config(autoencoder)},
        }
        | latent_scale(model.autoencoder)
        | (conditioning if masking.gives_frames else {})
    }


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


def defaults_of(maker: Callable[..., object]) -> dict[str, Any]:
    """The arguments that a constructor takes if they aren't given."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(maker).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def blank_unet(config: Config, compatibility: OfficialCompatibility) -> UNet3d:
    """The U-Net of a config, without memory for its weights (on the meta device)."""
    arguments = unet_arguments(config, compatibility)
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


def discriminator_arguments(config: Config) -> dict[str, Any]:
    """Our constructor's arguments for the original's discriminator config."""
    expect(config, leaky_slope=0.2, kernel=4)
    width = config["ndf"] if "ndf" in config else config["disc_ndf"]
    layers = config["n_layers"] if "n_layers" in config else config["disc_n_layers"]
    return {"in_channels": config.get("input_nc", 3), "width": width, "n_layers": layers, "norm": "batch"}
