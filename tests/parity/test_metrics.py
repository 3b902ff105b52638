"""Features, distances and LPIPS against the golden vectors of the original."""

import numpy as np
import pytest
import torch
from einops import rearrange

from src.metrics.features import resize_frames
from src.metrics.frechet import GaussianStatistics, frechet_distance
from src.metrics.i3d import I3d, from_pytorch_i3d
from src.metrics.kernel import kernel_distance
from src.metrics.reconstruction import perceptual_distance

# ---- I3D ----


# The original's copy of I3D normalizes with torch's usual 1e-5 in place of the network's own 1e-3.
ORIGINAL_EPS = 1e-5


def test_i3d(golden):
    case = golden("i3d")
    recipe = case.config["input_recipe"]
    uniform = np.random.Generator(np.random.PCG64(recipe["seed"])).uniform
    video = torch.from_numpy(uniform(recipe["lo"], recipe["hi"], size=recipe["shape"]).astype(np.float32))
    network = I3d()
    network.load_state_dict(from_pytorch_i3d(case.state, ORIGINAL_EPS))
    case.check({"logits": lambda: network(video), "pooled": lambda: network.pooled(video)}, tolerance=1e-5)


# ---- distances ----


def statistics(features: torch.Tensor) -> GaussianStatistics:
    return GaussianStatistics(features.shape[1]).update(features)


# Which sets each output compares; `rankdef` has fewer vectors than features.
PAIRS = {"ab": "ab", "aa": "aa", "rankdef": "ce"}


@pytest.mark.parametrize("pair", PAIRS)
def test_frechet_distance(golden, pair):
    case = golden("fvd_kvd")
    x, y = (statistics(case.inputs[name]) for name in PAIRS[pair])
    distance = frechet_distance(x, y)
    if pair == "aa":
        assert distance == pytest.approx(0, abs=1e-6)
    else:
        assert distance == pytest.approx(case.outputs[f"fd_{pair}_f64"].item(), rel=1e-6)
        # The original's own arithmetic is float32; singular covariances cost it two digits more.
        tolerance = 1e-2 if pair == "rankdef" else 1e-4
        assert distance == pytest.approx(case.outputs[f"fd_{pair}"].item(), rel=tolerance)


@pytest.mark.parametrize("pair", ["ab", "rankdef"])
def test_kernel_distance(golden, pair):
    case = golden("fvd_kvd")
    x, y = (case.inputs[name] for name in PAIRS[pair])
    # The distance is a small difference of sums of this size, stored in float32.
    size = (((x @ y.T) / x.shape[1] + 1) ** 3).abs().mean().item()
    expected = case.outputs[f"kvd_{pair}"].item()
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-6, abs=1e-8 * size)


def test_covariance(golden):
    case = golden("fvd_kvd")
    expected = case.outputs["cov_a"]
    actual = statistics(case.inputs["a"]).covariance.float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_preprocessing(golden):
    case = golden("fvd_kvd")
    (expected,) = (tensor for name, tensor in case.outputs.items() if name.startswith("preprocess_"))
    video = rearrange(case.inputs["video_uint8"], "b t h w c -> b c t h w").float() / 127.5 - 1
    torch.testing.assert_close(resize_frames(video, expected.shape[-1]), expected, rtol=0, atol=2e-6)


# ---- LPIPS ----


def test_lpips(golden):
    case = golden("lpips")
    state = case.state
    if case.config["lin_abs"]:
        state = {key: value.abs() if key.startswith("lin") else value for key, value in state.items()}
    network = perceptual_distance("vgg", random=True)
    network.backbone.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k[:4] == "net."})
    network.heads.load_state_dict({k.removeprefix("lin"): v for k, v in state.items() if k[:3] == "lin"})
    for name in ("shift", "scale"):
        assert getattr(network.scaling, name).flatten().tolist() == pytest.approx(case.config[name])
    distances = network(case.inputs["a"], case.inputs["b"])
    features = network.backbone(network.scaling(case.inputs["a"]))
    computed = {f"feat{i}_mean_abs": feature.abs().mean for i, feature in enumerate(features)}
    case.check({"value": lambda: rearrange(distances, "n -> n 1 1 1"), **computed}, tolerance=1e-5)
