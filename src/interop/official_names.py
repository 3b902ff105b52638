"""Where the released LVDM code keeps each tensor of our networks: its keys, its shapes, and its doubles."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.attention import AttentionBlock
from ..models.autoencoder import Autoencoder3d, ResBlock3d
from ..models.discriminator import PatchDiscriminator
from ..models.layers import FrameConv3d, PointConv3d, VideoConv3d
from ..models.unet import ResBlock, UNet3d


@dataclass(frozen=True)
class Name:
    """Where the released code keeps one of our tensors: its key, its shape, and the key's twin if it has one.

    The twin comes from the original's padded convolutions, which register their weight twice.
    """

    key: str
    shape: tuple[int, ...]
    twin: str | None = None


Names = dict[str, Name]


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
    """Fills the network with copies of official weights, in single precision whatever the file's was.

    Raises ValueError as `refuse_misfit` does.
    """
    refuse_misfit(names, state, prefix, ignored)
    ours = network.state_dict()
    weights = {
        mine: state[prefix + name.key].reshape(ours[mine].shape).to(ours[mine].dtype, copy=True)
        for mine, name in names.items()
    }
    # What is ours alone (an autoencoder's latent moments) keeps its value.
    network.load_state_dict({k: v for k, v in ours.items() if k not in names} | weights, assign=True)


def refuse_misfit(names: Names, state: Mapping[str, Tensor], prefix: str, ignored: str | None = None) -> None:
    """Raises ValueError unless each tensor finds its place and each place its tensor.

    The message lists the keys that are missing, left over or of another shape, and doubled keys that don't
    agree. Keys that begin with the prefix and then with `ignored` may be left over.
    """
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    wanted = {name.key: name for name in names.values()}
    twins = {name.twin: name.key for name in names.values() if name.twin is not None}
    missing = sorted(wanted.keys() - found.keys())
    extra = sorted(
        key
        for key in found.keys() - wanted.keys() - twins.keys()
        if ignored is None or not key.startswith(ignored)
    )
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {name.shape}"
        for key, name in wanted.items()
        if key in found and tuple(found[key].shape) != name.shape
    ]
    doubled = [(twin, key) for twin, key in twins.items() if twin in found and key in found]
    torn = [twin for twin, key in doubled if differ(found[twin], found[key])]
    if missing or extra or shapes or torn:
        raise ValueError(
            f"the weights under prefix {prefix!r} don't fit the config: missing {listed(missing)}, "
            f"left over {listed(extra)}, of another shape {listed(shapes)}, "
            f"unlike the tensor that they double {listed(torn)}"
        )


def listed(keys: Sequence[str], most: int = 20) -> str:
    """Keys for a message; of a very long list the beginning and the number."""
    if len(keys) <= most:
        return str(list(keys))
    return f"{str(list(keys[:most]))[:-1]}, …] ({len(keys)} in all)"


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ, without reading those that share their memory."""
    shared = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return one.shape != other.shape or not (shared or torch.equal(one, other))


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
