"""Networks of the released LVDM code, by its names for weights and its keyword arguments, as ours and back.

Source of the names: the key lists of the released checkpoints (`ae_sky`, `ae_taichi`, `short_sky`,
`short_taichi`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.attention import AttentionBlock
from ..models.autoencoder import Autoencoder3d, ResBlock3d
from ..models.discriminator import PatchDiscriminator
from ..models.layers import FrameConv3d, PointConv3d, VideoConv3d
from ..models.unet import ResBlock, UNet3d

Config = Mapping[str, Any]


@dataclass(frozen=True)
class OfficialCompatibility:
    """Which faults of the released code are reproduced, since its weights were trained with them.

    Args: relative_position_as_released: the relative logit uses the key's query vector, the opposite distance
    and the fourth root of the head's width.
    """

    relative_position_as_released: bool = True


@dataclass(frozen=True)
class Name:
    """Where the released code keeps one of our tensors: its key, its shape, and the key's twin if it has one.

    The twin comes from the original's padded convolutions, which register their weight twice.
    """

    key: str
    shape: tuple[int, ...]
    twin: str | None = None


Names = dict[str, Name]


def autoencoder_from_official(state: Mapping[str, Tensor], config: Config, prefix: str = "") -> Autoencoder3d:
    """The released video autoencoder.

    Args: state: weights by official key; those of its training loss (`loss.*`) and the doubled ones may be
    there or not. config: its keyword arguments: flat (`n_hiddens`, `downsample`, `z_channels`, `embed_dim`),
    as the `params` of an autoencoder's config, or inside a latent diffusion's config. prefix: what stands
    before each key, such as `first_stage_model.`; other keys are not looked at.

    Raises: ValueError: if the config says what we can't build, or a key is left over or missing or has
    another shape.
    """
    autoencoder = Autoencoder3d(**autoencoder_arguments(config))
    load(autoencoder, autoencoder_names(autoencoder), state, prefix, ignored="loss.")
    return autoencoder


def autoencoder_to_official(autoencoder: Autoencoder3d, prefix: str = "") -> dict[str, Tensor]:
    """The autoencoder's weights by official key, doubled ones included (latent moments have no key there)."""
    return export(autoencoder, autoencoder_names(autoencoder), prefix)


def unet_from_official(
    state: Mapping[str, Tensor],
    config: Config,
    prefix: str = "",
    compatibility: OfficialCompatibility = OfficialCompatibility(),
) -> UNet3d:
    """The released U-Net: unconditional, or for prediction and interpolation.

    Args: state: weights by official key. config: its keyword arguments, as they are, as `params`, or inside a
    latent diffusion's config. One input channel more than output channels means that the last one is the mask
    of given frames, and that `num_classes` counts noise levels; otherwise it counts classes. prefix: what
    stands before each key, such as `model.diffusion_model.`; other keys are not looked at. compatibility: the
    faults to reproduce.

    Raises: ValueError: if the config says what we can't build, or a key is left over or missing or has
    another shape.
    """
    with torch.device("meta"):  # every weight is in the state: none is allocated only to be overwritten
        unet = UNet3d(**unet_arguments(config, compatibility))
    load(unet, unet_names(unet), state, prefix)
    return unet


def unet_to_official(unet: UNet3d, prefix: str = "") -> dict[str, Tensor]:
    """The U-Net's weights by official key."""
    return export(unet, unet_names(unet), prefix)


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


def discriminator_to_official(discriminator: PatchDiscriminator, prefix: str = "") -> dict[str, Tensor]:
    """The discriminator's weights and running statistics by official key."""
    return export(discriminator, discriminator_names(discriminator), prefix)


# Configs


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
    """Our constructor's arguments for the original's U-Net config, of any of its shapes."""
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
        "attention": partial(
            AttentionBlock,
            views=("spatial", "temporal"),
            relative_position=said["use_relative_position"],
            max_distance=said["temporal_length"] or 1,
            relative_position_as_released=compatibility.relative_position_as_released,
        ),
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


def discriminator_arguments(config: Config) -> dict[str, Any]:
    """Our constructor's arguments for the original's discriminator config."""
    expect(config, leaky_slope=0.2, kernel=4)
    width = config["ndf"] if "ndf" in config else config["disc_ndf"]
    layers = config["n_layers"] if "n_layers" in config else config["disc_n_layers"]
    return {"in_channels": config.get("input_nc", 3), "width": width, "n_layers": layers, "norm": "batch"}


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


# Names


def autoencoder_names(autoencoder: Autoencoder3d) -> Names:
    """The official name of each of our autoencoder's weights."""
    pairs: list[tuple[str, str]] = [
        ("encoder.conv_in", "encoder.conv_first.conv"),
        ("encoder.norm_out", "encoder.final_block.0"),
        ("encoder.conv_out", "encoder.final_block.2.conv"),
        ("to_moments", "quant_conv.conv"),
        ("from_latents", "post_quant_conv.conv"),
        ("decoder.conv_out", "decoder.conv_out.conv"),
    ]
    for side, change in (("encoder", "down.conv"), ("decoder", "up.convt")):
        for i, stage in enumerate(getattr(autoencoder, side).stages):
            ours, theirs = f"{side}.stages.{i}", f"{side}.conv_blocks.{i}"
            pairs.append((f"{ours}.0", f"{theirs}.{change}"))
            blocks = [j for j, layer in enumerate(stage) if isinstance(layer, ResBlock3d)]
            for j in blocks:
                number = "" if side == "encoder" else str(j)
                for k in (1, 2):
                    pairs.append((f"{ours}.{j}.norm{k}", f"{theirs}.res{number}.norm{k}"))
                    pairs.append((f"{ours}.{j}.conv{k}", f"{theirs}.res{number}.conv{k}.conv"))
    names = named(autoencoder, pairs)
    return {ours: with_twin(name) for ours, name in names.items()}


def with_twin(name: Name) -> Name:
    """The name, with the key under which the original's padded convolution registers the weight again."""
    if name.key.endswith(".conv.weight"):
        return Name(name.key, name.shape, name.key.removesuffix(".conv.weight") + ".weight")
    return name


def unet_names(unet: UNet3d) -> Names:
    """The official name of each of our U-Net's weights."""
    pairs = [
        (f"{ours}.{inner}", f"{theirs}.{official_inner}")
        for ours, theirs in unet_blocks(unet)
        for inner, official_inner in block_pairs(unet.get_submodule(ours))
    ]
    for ours, theirs in (("time_embedding", "time_embed"), ("frame_noise_embedding", "time_embed_cond")):
        if getattr(unet, ours) is not None:
            pairs += [(f"{ours}.{i}", f"{theirs}.{i}") for i in (0, 2)]
    for ours in ("noise_level_embedding", "label_embedding"):
        if getattr(unet, ours) is not None:
            pairs.append((ours, "label_emb"))
    pairs += [("conv_in", "input_blocks.0.0"), ("norm_out", "out.0"), ("conv_out", "out.2")]
    return named(unet, pairs)


def unet_blocks(unet: UNet3d) -> Iterator[tuple[str, str]]:
    """Our name and the official one of each residual block, attention block and change of size."""
    for i, step in enumerate(unet.down):
        official = f"input_blocks.{i + 1}"
        if step.block is None:
            yield from resizing(step.resize, f"down.{i}.resize", f"{official}.0", "op")
        else:
            yield f"down.{i}.block", f"{official}.0"
        if step.attention is not None:
            yield f"down.{i}.attention", f"{official}.1"
    yield "middle.0.block", "middle_block.0"
    yield "middle.0.attention", "middle_block.1"
    yield "middle.1.block", "middle_block.2"
    for i, step in enumerate(unet.up):
        official = f"output_blocks.{i}"
        yield f"up.{i}.block", f"{official}.0"
        if step.attention is not None:
            yield f"up.{i}.attention", f"{official}.1"
        if step.resize is not None:
            position = 1 if step.attention is None else 2
            yield from resizing(step.resize, f"up.{i}.resize", f"{official}.{position}", "conv")


def resizing(module: object, ours: str, theirs: str, conv: str) -> Iterator[tuple[str, str]]:
    """The names of a change of size: a residual block, a convolution (repeating first or not), or nothing."""
    if isinstance(module, ResBlock):
        yield ours, theirs
    elif isinstance(module, nn.Sequential):
        yield f"{ours}.1", f"{theirs}.{conv}"
    elif isinstance(module, FrameConv3d | VideoConv3d):
        yield ours, f"{theirs}.{conv}"


def block_pairs(block: nn.Module) -> list[tuple[str, str]]:
    """Our names and the official ones of what is inside a block; a single layer is itself."""
    if isinstance(block, ResBlock):
        pairs = [
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("embedding", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
        ]
        return pairs + ([("skip", "skip_connection")] if isinstance(block.skip, PointConv3d) else [])
    if isinstance(block, AttentionBlock):
        pairs = []
        for i, axis in enumerate("st"):
            pairs += [
                (f"views.{i}.norm", f"norm_{axis}"),
                (f"views.{i}.qkv", f"qkv_{axis}"),
                (f"views.{i}.out", f"proj_out_{axis}"),
            ]
        if block.views[1].relative is not None:
            pairs += [
                ("views.1.relative.key", "relative_position_k.embeddings_table"),
                ("views.1.relative.value", "relative_position_v.embeddings_table"),
            ]
        return pairs
    return [("", "")]


def discriminator_names(discriminator: PatchDiscriminator) -> Names:
    """The official name of each of our discriminator's weights and running statistics."""
    pairs = [("conv_in", "main.0")]
    for i in range(len(discriminator.convs)):
        pairs += [(f"convs.{i}", f"main.{2 + 3 * i}"), (f"norms.{i}", f"main.{3 + 3 * i}")]
    pairs.append(("conv_out", f"main.{2 + 3 * len(discriminator.convs)}"))
    return named(discriminator, pairs)


def named(network: nn.Module, pairs: list[tuple[str, str]]) -> Names:
    """Names of single tensors from pairs of names of layers (or tensors), with the official shapes."""
    modules = dict(network.named_modules())
    tensors = network.state_dict()
    names: Names = {}
    for ours, theirs in pairs:
        ours, theirs = ours.rstrip("."), theirs.rstrip(".")
        if ours in tensors:
            names[ours] = Name(theirs, tuple(tensors[ours].shape))
            continue
        for inner, tensor in modules[ours].state_dict().items():
            names[f"{ours}.{inner}"] = Name(f"{theirs}.{inner}", official_shape(modules[ours], ours, tensor))
    return names


def official_shape(layer: nn.Module, name: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape that the original, whose layers are all convolutions, gives to a layer's tensor."""
    shape = tuple(tensor.shape)
    if tensor.ndim < 2:
        return shape
    if isinstance(layer, FrameConv3d):
        return (*shape[:2], 1, *shape[2:])
    if isinstance(layer, PointConv3d):
        return (*shape, 1, 1, 1)
    if name.endswith((".qkv", ".out")):
        return (*shape, 1)
    return shape


# Weights


def load(
    network: nn.Module, names: Names, state: Mapping[str, Tensor], prefix: str, ignored: str | None = None
) -> None:
    """Fills the network from official weights; each tensor must find its place and each place its tensor."""
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    wanted = {name.key: name for name in names.values()}
    twins = {name.twin for name in names.values()}
    missing = sorted(wanted.keys() - found.keys())
    extra = sorted(
        key for key in found.keys() - wanted.keys() - twins if ignored is None or not key.startswith(ignored)
    )
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {name.shape}"
        for key, name in wanted.items()
        if key in found and tuple(found[key].shape) != name.shape
    ]
    if missing or extra or shapes:
        raise ValueError(
            f"the weights under prefix {prefix!r} don't fit the config: "
            f"missing {missing}, left over {extra}, of another shape {shapes}"
        )
    ours = network.state_dict()
    weights = {mine: found[name.key].reshape(ours[mine].shape).clone() for mine, name in names.items()}
    # What is ours alone (an autoencoder's latent moments) keeps its value.
    network.load_state_dict({k: v for k, v in ours.items() if k not in names} | weights, assign=True)


def export(network: nn.Module, names: Names, prefix: str) -> dict[str, Tensor]:
    """The network's weights under their official keys, in the official shapes."""
    ours = network.state_dict()
    exported: dict[str, Tensor] = {}
    for mine, name in names.items():
        tensor = ours[mine].reshape(name.shape)
        exported[prefix + name.key] = tensor
        if name.twin is not None:
            exported[prefix + name.twin] = tensor
    return exported
