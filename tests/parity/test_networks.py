"""The networks give the released code's numbers from the released code's weights."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional as F

from src.interop.official import (
    OfficialCompatibility,
    autoencoder_from_official,
    autoencoder_names,
    autoencoder_to_official,
    discriminator_from_official,
    discriminator_to_official,
    unet_blocks,
    unet_from_official,
    unet_names,
    unet_to_official,
)
from src.models import layers
from src.models.attention import AttentionBlock
from src.models.autoencoder import Autoencoder3d
from src.models.unet import UNet3d

AUTOENCODERS = ["ae_small", "ae_official"]
UNETS = ["unet_factorized", "unet_plain", "unet_conv3d", "unet_framecond"]


def autoencoder_outputs(autoencoder: Autoencoder3d, case: Any) -> dict[str, Callable[[], Tensor]]:
    """How each output of an autoencoder's case is computed."""
    video, noise = case.inputs["x"], case.inputs["noise"]
    posterior = autoencoder.encode(video)
    features = autoencoder.encoder(video)
    sample = posterior.sample(noise)
    normal = Normal(posterior.mean, posterior.std)
    return {
        "encoder_h": lambda: features,
        "moments": lambda: autoencoder.to_moments(features),
        "mean": lambda: posterior.mean,
        "logvar": lambda: posterior.logvar,
        "std": lambda: posterior.std,
        "z_sample": lambda: sample,
        "kl_per_sample": posterior.kl,
        # The original sums its divergence and likelihood over three of the four axes.
        "kl_raw": lambda: torch.distributions.kl_divergence(normal, Normal(0.0, 1.0)).sum((1, 2, 3)),
        "nll_raw": lambda: -normal.log_prob(sample).sum((1, 2, 3)),
        "rec_mode": lambda: autoencoder.decode(posterior.mean),
        "rec_sample": lambda: autoencoder(video, noise)[0],
        "state_checksum": lambda: torch.stack(
            [total(case.state), total({k: v.abs() for k, v in case.state.items()})]
        ),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder(golden, name):
    case = golden(name)
    autoencoder = autoencoder_from_official(case.state, case.config)
    case.check(autoencoder_outputs(autoencoder, case))


@torch.no_grad()
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_goes_back_with_doubled_keys(golden, name):
    case = golden(name)
    back = autoencoder_to_official(autoencoder_from_official(case.state, case.config))
    assert_same(back, case.state | {twin: case.state[key] for twin, key in case.aliases.items()})


@torch.no_grad()
def test_autoencoder_parity_notices_where_the_padding_goes(golden, monkeypatch):
    case = golden("ae_small")
    right = layers.same_padding

    def mirrored(kernel_size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
        pads = right(kernel_size, stride)
        return tuple(pads[i ^ 1] for i in range(len(pads)))

    monkeypatch.setattr(layers, "same_padding", mirrored)
    autoencoder = autoencoder_from_official(case.state, case.config)
    with pytest.raises(AssertionError):
        case.check(autoencoder_outputs(autoencoder, case))


@torch.no_grad()
def test_discriminator(golden):
    case = golden("disc")
    frames = case.inputs["frames"]
    network = discriminator_from_official(case.state, case.config)
    assert_same(discriminator_to_official(network), case.state)
    in_evaluation = network.eval()(frames)
    in_training = network.train()(frames)
    after = discriminator_to_official(network)
    computed = {f"after_train.{key}": partial(after.__getitem__, key) for key in after}
    case.check(computed | {"logits_eval": lambda: in_evaluation, "logits_train": lambda: in_training})


def unet_outputs(unet: UNet3d, case: Any) -> dict[str, Callable[[], Tensor]]:
    """How each output of a U-Net's case is computed."""
    given = case.inputs
    blocks = {theirs: unet.get_submodule(ours) for ours, theirs in unet_blocks(unet)}

    def block(kind: str) -> Any:
        found = re.search(rf"{kind} block '([\w.]+)'", case.notes)
        assert found, f"the notes don't name the {kind} block"
        return blocks[found[1]]

    def call(x: str = "x", t: str = "t", **told: Tensor) -> Tensor:
        if not unet.mask_channel:
            return unet(given[x], given[t], **told)
        return unet(given[x][:, :-1], given[t], mask=given[x][:, -1:], **told)

    def level_by_frame() -> Tensor:
        marked = given["mask"][:, 0, :, 0, 0] > 0
        return torch.where(marked, given["s"][:, None], -1)

    return {
        "y": call,
        "y_other_T": lambda: call("x_other_T", "t_other_T"),
        "y_class": lambda: call(label=given["class"]),
        "y_label": lambda: call(noise_level=given["y"]),
        "y_nolabel": call,
        "y_perframe": lambda: call(frame_noise_level=level_by_frame()),
        "attn_y": lambda: block("attention")(given["attn_x"]),
        "res_y": lambda: block("residual")(given["res_x"], F.silu(given["res_emb"])[:, None]),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_unet(golden, name):
    case = golden(name)
    unet = unet_from_official(case.state, case.config)
    case.check(unet_outputs(unet, case))


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_unet_goes_back(golden, name):
    case = golden(name)
    assert_same(unet_to_official(unet_from_official(case.state, case.config)), case.state)


@torch.no_grad()
def test_relative_position_as_released_is_what_the_weights_want(golden):
    case = golden("unet_factorized")
    textbook = OfficialCompatibility(relative_position_as_released=False)
    unet = unet_from_official(case.state, case.config, compatibility=textbook)
    with pytest.raises(AssertionError):
        case.check(unet_outputs(unet, case), tolerance=1e-2)


@torch.no_grad()
def test_unet_parity_notices_a_perturbed_block(golden, monkeypatch):
    case = golden("unet_plain")
    monkeypatch.setattr("src.models.unet.NORM_EPS", 1e-2)
    unet = unet_from_official(case.state, case.config)
    with pytest.raises(AssertionError):
        case.check(unet_outputs(unet, case))


@pytest.mark.parametrize("problem", ["missing", "left over", "of another shape"])
def test_weights_that_dont_fit_are_listed(golden, problem):
    case = golden("unet_conv3d")
    key = "out.2.weight" if problem != "left over" else "out.7.weight"
    state = dict(case.state)
    if problem == "missing":
        del state[key]
    else:
        state[key] = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=rf"{problem} \['{key}"):
        unet_from_official(state, case.config)


def test_an_unknown_setting_is_listed(golden):
    case = golden("unet_conv3d")
    with pytest.raises(ValueError, match="use_temporal_transformer"):
        unet_from_official(case.state, case.config | {"use_temporal_transformer": True})


@torch.no_grad()
def test_networks_inside_a_whole_checkpoint(golden):
    case = golden("ldm_short")
    autoencoder = autoencoder_from_official(case.state, case.config, prefix="first_stage_model.")
    unet = unet_from_official(case.state, case.config, prefix="model.diffusion_model.")
    noisy, clean = case.outputs["q_sample"], case.outputs["z"]
    scale, shift = case.config["params"]["scale_factor"], case.config["params"]["shift_factor"]
    sample = autoencoder.encode(case.inputs["video"]).sample(case.inputs["posterior_noise"])
    only = {"eps_raw", "z", "decoded"}
    replace(case, outputs={k: v for k, v in case.outputs.items() if k in only}).check(
        {
            "eps_raw": lambda: unet(noisy, case.inputs["t"]),
            "z": lambda: scale * (sample + shift),
            "decoded": lambda: autoencoder.decode(clean / scale - shift),
        }
    )


SHORT = {"in_channels": 4, "max_distance": 4}
LONG = {"in_channels": 4, "mask_channel": True, "num_noise_levels": 251}


@pytest.mark.parametrize(
    ("checkpoint", "settings"),
    [
        ("short_sky", SHORT),
        ("short_ucf", SHORT),
        ("short_taichi", SHORT),
        ("long_pred_sky", LONG | {"max_distance": 4}),
        ("long_interp_sky", LONG | {"max_distance": 5}),
    ],
)
def test_official_unet_has_the_released_keys(official_keys, checkpoint, settings):
    settings = dict(settings)
    attention = partial(AttentionBlock, max_distance=settings.pop("max_distance"))
    with torch.device("meta"):
        unet = UNet3d(
            out_channels=4,
            model_channels=256,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            attention=attention,
            num_heads=4,
            **settings,
        )
    start = "model.diffusion_model."
    expected = {k.removeprefix(start): v for k, v in official_keys(checkpoint).items() if k.startswith(start)}
    assert {name.key: name.shape for name in unet_names(unet).values()} == expected
    assert unet_names(unet).keys() == unet.state_dict().keys()


@pytest.mark.parametrize(
    ("checkpoint", "start"),
    [
        ("videoae_sky", ""),
        ("videoae_ucf", ""),
        ("videoae_taichi", ""),
        ("videoae_ucf_videodata", ""),
        ("short_sky", "first_stage_model."),
    ],
)
def test_official_autoencoder_has_the_released_keys(official_keys, checkpoint, start):
    with torch.device("meta"):
        names = autoencoder_names(Autoencoder3d()).values()
    expected = {
        key.removeprefix(start): shape
        for key, shape in official_keys(checkpoint).items()
        if key.startswith(start) and not key.startswith("loss.")
    }
    ours = {name.key: name.shape for name in names} | {name.twin: name.shape for name in names if name.twin}
    assert ours == expected


def total(state: dict[str, Tensor]) -> Tensor:
    """The sum of all numbers."""
    return torch.stack([weights.double().sum() for weights in state.values()]).sum()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Both hold the same keys, shapes and numbers, bit for bit."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].shape == tensor.shape, key
        assert torch.equal(actual[key], tensor), key
