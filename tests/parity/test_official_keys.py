"""Full models, as `conf/` composes them, have exactly the released checkpoints' keys, shapes and sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from src.config import build
from src.diffusion.conditioning import FrameMasking
from src.interop import official, official_configs
from src.interop.official import OfficialLatentDiffusion, to_official
from src.model_folder import masking_of
from src.models.autoencoder import Autoencoder3d
from src.train import unet_node
from tests.composing import composed

Keys = Callable[[str], dict[str, tuple[int, ...]]]

# What makes a model as released: its weights want the relative position that the released code computes.
AS_RELEASED = "unet.attention.relative_position_as_released=true"
LONG = ["+experiment=sky", AS_RELEASED, "conditioning=prediction"]
MODELS = {
    "short_sky": (["+experiment=sky", AS_RELEASED, "unet.attention.max_distance=4"], 548_904_580),
    "short_ucf": (["+experiment=ucf101", AS_RELEASED, "unet.attention.max_distance=4"], 548_904_580),
    "short_taichi": (["+experiment=taichi", AS_RELEASED, "unet.attention.max_distance=4"], 548_904_580),
    "long_pred_sky": ([*LONG, "unet.attention.max_distance=4"], 549_163_908),
    "long_interp_sky": ([*LONG, "conditioning=interpolation", "unet.attention.max_distance=5"], 549_181_060),
}


def composed_autoencoder(experiment: str) -> Autoencoder3d:
    with torch.device("meta"):
        autoencoder = build(composed("train", f"+experiment={experiment}_autoencoder").autoencoder)
    assert isinstance(autoencoder, Autoencoder3d)
    return autoencoder


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_has_the_released_keys_and_size(official_keys: Keys, name: str) -> None:
    overrides, size = MODELS[name]
    cfg = composed("train", *overrides, "autoencoder_from=x")
    experiment = overrides[0].removeprefix("+experiment=")
    autoencoder = composed_autoencoder(experiment)
    window = autoencoder.latent_shape(cfg.dataset.num_frames, 256, 256)
    masking: FrameMasking = masking_of(plain(cfg.conditioning))
    with torch.device("meta"):
        unet = build(unet_node(plain(cfg.unet), window, masking, num_classes=0))
    assert sum(parameter.numel() for parameter in unet.parameters()) == size
    schedule = plain(cfg.noise_schedule)
    model = OfficialLatentDiffusion(
        unet=unet,
        autoencoder=autoencoder,
        schedule=(schedule.pop("_target_").rsplit(".", 1)[-1], schedule),
        prediction_type=cfg.prediction_type,
        masking=masking,
        window=window,
        averaged=True,
    )
    assert shapes(to_official(model)) == official_keys(name)


@pytest.mark.parametrize("name", ["videoae_sky", "videoae_ucf", "videoae_taichi", "videoae_ucf_videodata"])
def test_the_autoencoder_has_the_released_keys_and_size(official_keys: Keys, name: str) -> None:
    experiment = {"sky": "sky", "ucf": "ucf101", "taichi": "taichi"}[name.split("_")[1]]
    autoencoder = composed_autoencoder(experiment)
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 19_446_759
    expected = {key: shape for key, shape in official_keys(name).items() if not key.startswith("loss.")}
    assert shapes(to_official(autoencoder)) == expected


def test_the_discriminator_has_the_released_keys_and_size(official_keys: Keys) -> None:
    cfg = composed("train", "+experiment=sky_autoencoder", "discriminator.norm=batch")
    with torch.device("meta"):
        discriminator = build(cfg.discriminator)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    start = "loss.discriminator."
    expected = {key: shape for key, shape in official_keys("videoae_sky").items() if key.startswith(start)}
    assert shapes(to_official(discriminator, start)) == expected


PRESETS = {
    "short_sky": "short_sky",
    "short_ucf": "short_ucf",
    "short_taichi": "short_taichi",
    "prediction_sky": "long_pred_sky",
    "interpolation_sky": "long_interp_sky",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_describes_the_released_model(official_keys: Keys, preset: str) -> None:
    config = plain(composed("convert", f"preset={preset}", "checkpoint=x", "output=y").preset.model)
    unet = official.blank_unet(config, official.OfficialCompatibility())
    expected = official_keys(PRESETS[preset])
    start = official.UNET_PREFIX
    assert shapes(to_official(unet, start)) == {k: v for k, v in expected.items() if k.startswith(start)}
    with torch.device("meta"):
        autoencoder = Autoencoder3d(**official_configs.autoencoder_arguments(config))
    start = official.AUTOENCODER_PREFIX
    assert shapes(to_official(autoencoder, start)) == {
        k: v for k, v in expected.items() if k.startswith(start)
    }
    assert official_configs.window_from_official(config["params"]) == (
        4,
        5 if "interpolation" in preset else 4,
        32,
        32,
    )


@pytest.mark.parametrize("preset", ["ae_sky", "ae_ucf", "ae_taichi"])
def test_a_preset_describes_the_released_autoencoder(official_keys: Keys, preset: str) -> None:
    config = plain(composed("convert", f"preset={preset}", "checkpoint=x", "output=y").preset.model)
    with torch.device("meta"):
        autoencoder = Autoencoder3d(**official_configs.autoencoder_arguments(config))
    expected = official_keys(f"videoae_{preset.removeprefix('ae_')}")
    assert shapes(to_official(autoencoder)) == {
        key: shape for key, shape in expected.items() if not key.startswith("loss.")
    }


def plain(node: Any) -> dict[str, Any]:
    found = OmegaConf.to_container(node, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}
