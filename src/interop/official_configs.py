"""Configs of the released LVDM code, its keyword arguments, as our constructors' arguments and back."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..diffusion.conditioning import FrameMasking
from ..diffusion.parameterization import PredictionType
from ..models.attention import AttentionBlock
from ..models.autoencoder import Autoencoder3d
from ..models.unet import UNet3d

Config = Mapping[str, Any]

Schedule = tuple[str, dict[str, Any]]
"""Name and arguments of a function of `diffusion.noise_schedule`."""


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
    expect(
        params,
        encoder_type="3d",
        scale_by_std=False,
        v_posterior=0.0,
        learn_logvar=False,
        given_betas=None,
        concat_mask_on_input=True,
    )
    if params.get("parameterization", "eps") not in ("eps", "x0"):
        raise ValueError(f"parameterization must be eps or x0, not {params['parameterization']!r}")
    if isinstance(params.get("cond_stage_config"), Mapping):
        raise ValueError(
            "this model is conditioned on text or classes by a network of its own (cond_stage_config); "
            "the text-to-video variant isn't supported"
        )


def schedule_arguments(config: Config) -> Schedule:
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


def window_from_official(params: Config) -> tuple[int, int, int, int]:
    """Latent shape (c, t, h, w) of a training clip.

    Its length is `video_length`, or that of the attention's tables if the config doesn't say it.
    """
    unet = params_of(params["unet_config"])
    length = params.get("video_length") or unet.get("temporal_length")
    size = params.get("image_size", unet.get("image_size"))
    if not length or size is None:
        raise ValueError("the config tells neither image_size nor video_length (or temporal_length)")
    h, w = (size, size) if isinstance(size, int) else size
    return params.get("channels", unet["out_channels"]), int(length), int(h), int(w)


# The released code takes every fourth latent frame whenever a stride is set.
OFFICIAL_STRIDE = 4


def strides_from_official(params: Config) -> list[int]:
    """Distances between the latent frames that the network sees, from `latent_frame_strde` (its spelling)."""
    return [OFFICIAL_STRIDE] if params.get("latent_frame_strde") else [1]


def masking_from_official(params: Config) -> FrameMasking:
    """Which frames training gave, from `p_pred`, `p_interp`, `n_prevs` and `max_noise_level`."""
    prediction, interpolation = params.get("p_pred") or 0.0, params.get("p_interp") or 0.0
    return FrameMasking(
        prediction=float(prediction),
        interpolation=float(interpolation),
        interpolation_stride=params.get("interp_frame_stride") or None,
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
        "in_channels": flat.get("in_channels", flat.get("image_channel", 3)),
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
# Kinds that exist in the original's signature, of which we have the one that was released.
UNET_ONLY_KIND: dict[str, Any] = {
    "dims": 3,
    "use_fp16": False,
    "use_temporal_transformer": False,
    "context_dim": None,
    "nonlinearity_type": "silu",
}
# Without effect on what the kind that we have computes; `padding_t` has a check of its own.
UNET_IRRELEVANT = {
    "image_size",
    "legacy",
    "padding_t",
    "num_heads_upsample",
    "transformer_depth",
    "ST_transformer_module",
    "ST_transformer_class",
    "recipe_seed",
    "recipe_gain",
    "state_shapes",
}
UNET_REQUIRED = {"in_channels", "out_channels", "model_channels", "attention_resolutions", "num_res_blocks"}


def unet_arguments(config: Config, relative_position_as_released: bool) -> dict[str, Any]:
    """Our constructor's arguments for the original's U-Net config, of any of its shapes.

    Plain values only; `attention` holds the arguments of its `AttentionBlock`.
    """
    params = params_of(config, "unet_config")
    unknown = sorted(
        params.keys() - UNET_DEFAULTS.keys() - UNET_ONLY_KIND.keys() - UNET_IRRELEVANT - UNET_REQUIRED
    )
    missing = sorted(UNET_REQUIRED - params.keys())
    if unknown or missing:
        raise ValueError(
            f"not a U-Net config that can be converted: unknown keys {unknown}, missing keys {missing} "
            "(the text-to-video variant isn't supported)"
        )
    if params.get("use_temporal_transformer") or params.get("context_dim") is not None:
        raise ValueError("a U-Net with transformer blocks: the text-to-video variant isn't supported")
    expect(params, **UNET_ONLY_KIND)
    said = UNET_DEFAULTS | dict(params)
    if said.get("padding_t", said["kernel_size_t"] // 2) != said["kernel_size_t"] // 2:
        raise ValueError(
            f"kernel_size_t={said['kernel_size_t']} with padding_t={said['padding_t']} changes the length"
        )
    if said["cond_aug_mode"] not in (None, "time_embed"):
        raise ValueError(f"cond_aug_mode must be time_embed or absent, not {said['cond_aug_mode']!r}")
    told_mask = said["in_channels"] == said["out_channels"] + 1
    rows = said["num_classes"] or 0
    by_count = said["num_head_channels"] == -1  # a width, where there is one, wins over a count
    if by_count and said["num_heads"] == -1:
        raise ValueError("either num_heads or num_head_channels must be set")
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
            "relative_position_as_released": relative_position_as_released,
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


def official_schedule(schedule: Schedule) -> dict[str, Any] | None:
    """The original's keyword arguments for one of our noise schedules; None if it has none for it."""
    function, ours = schedule
    schedules: dict[str, Callable[[], dict[str, Any]]] = {
        "linear": lambda: {"linear_start": ours["beta_start"], "linear_end": ours["beta_end"]},
        "cosine": lambda: {"beta_schedule": "cosine", "cosine_s": ours["offset"]},
        "power": lambda: {
            "beta_schedule": {1.0: "sqrt_linear", 0.5: "sqrt"}.get(ours["exponent"]),
            "linear_start": ours["start"],
            "linear_end": ours["end"],
        },
    }
    if function not in schedules:
        return None
    told = {"timesteps": ours["num_timesteps"]} | schedules[function]()
    if told.get("beta_schedule", "linear") is None:
        return None
    same = schedule_arguments(told) == (function, {k: v for k, v in ours.items() if v is not False})
    return told if same else None


def conditioning_differences(masking: FrameMasking, latent_strides: Sequence[int]) -> list[str]:
    """What the released code can't express about given frames and the distance between frames."""
    found = []
    if masking.is_perturbed and masking.noise_level_per_frame:
        found.append("noise levels of single frames (conditioning.noise_level_per_frame)")
    if list(latent_strides) not in ([1], [OFFICIAL_STRIDE]):
        found.append(f"latent_strides={list(latent_strides)} ([1] and [{OFFICIAL_STRIDE}] can be expressed)")
    return found


def process_differences(schedule: Schedule, prediction_type: PredictionType) -> list[str]:
    """What the released code can't express about a schedule and a prediction."""
    found = []
    if official_schedule(schedule) is None:
        found.append(f"the noise schedule {schedule[0]} with {schedule[1]}")
    if prediction_type == "v":
        found.append("prediction_type=v (epsilon and sample can be expressed)")
    return found


def latent_diffusion_config(
    *,
    unet: Mapping[str, Any],
    autoencoder: Mapping[str, Any],
    scale: Mapping[str, float],
    schedule: Schedule,
    prediction_type: PredictionType,
    masking: FrameMasking,
    window: tuple[int, int, int, int],
    averaged: bool,
    latent_strides: Sequence[int] = (1,),
) -> dict[str, Any]:
    """The original's `{params}` of a latent diffusion model.

    Args:
        unet: keyword arguments of its `UNet3d`.
        autoencoder: keyword arguments of its `Autoencoder3d`.
        scale: `scale_factor` and `shift_factor` of its latents.
        schedule: name and arguments of a function of `diffusion.noise_schedule`.
        prediction_type: what the network predicts.
        masking: which frames were given in training.
        window: latent shape (c, t, h, w) of a training clip.
        averaged: whether the checkpoint holds averaged weights.
        latent_strides: distances between the latent frames that the network saw.

    Raises:
        ValueError: if the released code can't express the schedule, the prediction, the conditioning or the
            strides.
    """
    refuse_inexpressible(
        process_differences(schedule, prediction_type) + conditioning_differences(masking, latent_strides)
    )
    told = official_schedule(schedule)
    assert told is not None
    c, t, h, w = window
    conditioning = {
        "conditioning_key": "concat-adm-mask",
        "noisy_cond": masking.max_noise_level > 0,
        "max_noise_level": masking.max_noise_level,
        "rand_temporal_mask": True,
        "p_interp": masking.interpolation,
        "interp_frame_stride": masking.interpolation_stride,
        "p_pred": masking.prediction,
        "n_prevs": list(masking.num_given),
    }
    return {
        "params": told
        | {
            "parameterization": "x0" if prediction_type == "sample" else "eps",
            "image_size": [h, w],
            "video_length": t,
            "channels": c,
            "encoder_type": "3d",
            "use_ema": averaged,
            "unet_config": {"params": unet_config(unet)},
            "first_stage_config": {"params": autoencoder_config(autoencoder)},
        }
        | dict(scale)
        | (conditioning if masking.gives_frames else {})
        | ({} if list(latent_strides) == [1] else {"latent_frame_strde": OFFICIAL_STRIDE})
    }


def defaults_of(maker: Callable[..., object]) -> dict[str, Any]:
    """The arguments that a constructor takes if they aren't given."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(maker).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def discriminator_arguments(config: Config) -> dict[str, Any]:
    """Our constructor's arguments for the original's discriminator config."""
    expect(config, leaky_slope=0.2, kernel=4)
    width = config["ndf"] if "ndf" in config else config["disc_ndf"]
    layers = config["n_layers"] if "n_layers" in config else config["disc_n_layers"]
    return {"in_channels": config.get("input_nc", 3), "width": width, "n_layers": layers, "norm": "batch"}


def refuse_inexpressible(differences: list[str]) -> None:
    """Raises ValueError unless the list is empty."""
    if differences:
        raise ValueError("the released code can't express this model: " + "; ".join(differences))
