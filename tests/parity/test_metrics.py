"""Features, distances and LPIPS against the golden vectors of the original."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from src.metrics.features import resize_frames
from src.metrics.frechet import GaussianStatistics, frechet_distance
from src.metrics.i3d import I3d, from_pytorch_i3d
from src.metrics.kernel import kernel_distance
from src.metrics.reconstruction import perceptual_distance

ROOT = Path(__file__).parents[2]


def case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Description and tensors of a golden case; one that isn't there fails."""
    shared = Path(os.environ.get("SHARED_DIR", ROOT.parent / "shared"))
    if "GOLDEN_DIR" in os.environ:
        folder = Path(os.environ["GOLDEN_DIR"])
    else:
        folders = [shared / "reference" / "golden", Path(__file__).parent / "golden"]
        folder = next((f for f in folders if (f / f"{name}.json").exists()), folders[0])
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def recipe_state(shapes: dict[str, list[int]], seed: int, gain: float) -> dict[str, torch.Tensor]:
    """Weights by the golden cases' rule: one PCG64 stream, keys in sorted order."""
    generator = np.random.Generator(np.random.PCG64(seed))
    state = {}
    for key in sorted(shapes):
        shape = tuple(shapes[key])
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        noise = generator.standard_normal(shape)
        if key.endswith("running_mean") or (len(shape) <= 1 and key.endswith("bias")):
            values = 0.1 * noise
        elif key.endswith("running_var"):
            values = 1 + 0.25 * np.abs(noise)
        elif len(shape) <= 1:
            values = 1 + 0.1 * noise
        else:
            values = gain * noise / np.sqrt(np.prod(shape[1:]))
        state[key] = torch.from_numpy(np.asarray(values, dtype=np.float32).copy())
    return state


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error.item() <= tolerance


# ---- I3D ----


# The original's copy of I3D normalizes with torch's usual 1e-5 in place of the network's own 1e-3.
ORIGINAL_EPS = 1e-5


def test_i3d_logits_and_pooled_features():
    description, tensors = case("i3d")
    config = description["config"]
    recipe = config["input_recipe"]
    uniform = np.random.Generator(np.random.PCG64(recipe["seed"])).uniform
    video = torch.from_numpy(uniform(recipe["lo"], recipe["hi"], size=recipe["shape"]).astype(np.float32))
    network = I3d()
    state = recipe_state(config["state_shapes"], config["recipe_seed"], config["recipe_gain"])
    network.load_state_dict(from_pytorch_i3d(state, ORIGINAL_EPS))
    pooled = network.pooled(video)
    close(pooled, tensors["out.pooled"], 1e-5)
    close(network.logits(pooled.mean(-1)), tensors["out.logits"], 1e-5)
    close(network(video), tensors["out.logits"], 1e-5)


# ---- distances ----


def statistics(features: torch.Tensor) -> GaussianStatistics:
    return GaussianStatistics(features.shape[1]).update(features)


@pytest.fixture(scope="module")
def distances() -> dict[str, torch.Tensor]:
    return case("fvd_kvd")[1]


@pytest.mark.parametrize(("x", "y", "out"), [("a", "b", "fd_ab"), ("c", "e", "fd_rankdef")])
def test_frechet_distance(distances, x, y, out):
    value = frechet_distance(statistics(distances[f"in.{x}"]), statistics(distances[f"in.{y}"]))
    assert value == pytest.approx(distances[f"out.{out}_f64"].item(), rel=1e-6)
    # The original computes in float32; singular covariances cost it two digits.
    assert value == pytest.approx(distances[f"out.{out}"].item(), rel=1e-2 if "rankdef" in out else 1e-4)


def test_frechet_distance_of_a_set_to_itself(distances):
    a = statistics(distances["in.a"])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    close(a.covariance, distances["out.cov_a"], 1e-5)


@pytest.mark.parametrize(("x", "y", "out"), [("a", "b", "kvd_ab"), ("c", "e", "kvd_rankdef")])
def test_kernel_distance(distances, x, y, out):
    value = kernel_distance(distances[f"in.{x}"], distances[f"in.{y}"])
    expected = distances[f"out.{out}"]
    # Stored in float32: no better than half a unit in its last place can be asked.
    assert value == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)


def test_preprocessing(distances):
    expected = distances["out.preprocess_24"]
    frames = distances["in.video_uint8"]
    video = rearrange(frames, "b t h w c -> b c t h w").float() / 127.5 - 1
    torch.testing.assert_close(resize_frames(video, expected.shape[-1]), expected, rtol=0, atol=2e-6)


# ---- LPIPS ----


def test_lpips():
    description, tensors = case("lpips")
    config = description["config"]
    state = recipe_state(config["state_shapes"], config["recipe_seed"], config["recipe_gain"])
    network = perceptual_distance("vgg", random=True)
    if config["lin_abs"]:
        state = {key: value.abs() if key.startswith("lin") else value for key, value in state.items()}
    network.backbone.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k[:4] == "net."})
    network.heads.load_state_dict({k.removeprefix("lin"): v for k, v in state.items() if k[:3] == "lin"})
    torch.testing.assert_close(network.scaling.shift.flatten(), torch.tensor(config["shift"]))
    torch.testing.assert_close(network.scaling.scale.flatten(), torch.tensor(config["scale"]))
    values = network(tensors["in.a"], tensors["in.b"])
    close(values, tensors["out.value"].flatten(), 1e-5)
    for i, feature in enumerate(network.backbone(network.scaling(tensors["in.a"]))):
        close(feature.abs().mean(), tensors[f"out.feat{i}_mean_abs"], 1e-4)
