"""Every golden case is reproduced, and each comparison notices when its formula is perturbed."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.diffusion import noise_schedule
from src.diffusion.parameterization import Parameterization
from src.interop import official, official_sampling
from src.metrics import features, frechet, kernel
from src.models import autoencoder, layers, unet
from src.training.ema import Ema
from tests.parity import computing
from tests.parity.computing import COMPUTING, compared_sets
from tests.parity.conftest import Case, relative_error

# Of the tensor's maximum.
NETWORK, LOSS, SAMPLING, TABLE, DISTANCE = 1e-4, 1e-4, 1e-3, 1e-6, 1e-6
# The original's distance is computed in float32, and so is ours by its rule; singular covariances, where it
# takes roots of rounding noise, cost it a digit.
FLOAT32_DISTANCE, FLOAT32_SINGULAR = 1e-5, 1e-4

SAMPLED = r"ddim\.(eta|noguid|cfg).*|ddpm.*|ar\..*|interp\..*"


def tolerance(case: Case, name: str) -> float:
    """How far an output may be off, relative to its maximum."""
    if case.name == "schedule":
        # float32 exponentials of two processors differ in the last digit, their phases a thousandfold.
        return NETWORK if "embedding" in name else TABLE
    if case.name == "fvd_kvd":
        if name.startswith("fd_") and not name.endswith("_f64"):
            return FLOAT32_SINGULAR if "rankdef" in name else FLOAT32_DISTANCE
        return DISTANCE
    if re.fullmatch(SAMPLED, name):
        return SAMPLING
    return LOSS if re.search(r"loss|grad", name) else NETWORK


def excess(case: Case, name: str, expected: Tensor, actual: Tensor) -> float:
    """The error of an output in units of its tolerance; whole numbers must be equal."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual.to(expected.dtype), expected) else math.inf
    allowed = tolerance(case, name)
    if case.name == "fvd_kvd" and expected.ndim == 0:
        allowed *= expected.abs().item()
        # What the distance is a small difference of, stored in float32.
        x, y = compared_sets(case, name.split("_")[1])
        if name.startswith("kvd"):
            allowed += 1e-8 * (((x @ y.T) / x.shape[1] + 1) ** 3).abs().mean().item()
        elif torch.equal(x, y):
            # Of equal sets the distance is nothing; what remains is the rounding of the traces in float32.
            allowed, expected = 1e-6 * 2 * x.var(0).sum().item(), torch.zeros_like(expected)
        return abs(actual.item() - expected.item()) / allowed
    # A gradient that vanishes (a bias right before its normalization) is the rounding of the whole one.
    floor = 1e-3 * case.outputs.get("grad.global_norm", torch.zeros(())).item() if "grad." in name else 0.0
    return relative_error(actual, expected, floor) / allowed


@torch.no_grad()
def errors(case: Case) -> dict[str, float]:
    """The error of every output of a case, in units of its tolerance."""
    compute = COMPUTING[case.name](case)
    expected = case.outputs
    if case.name == "ema":
        expected = expected | {f"state.{key}": tensor for key, tensor in case.state.items()}
    assert expected, "the case holds no outputs"
    with torch.set_grad_enabled(case.name == "ae_loss"):
        found = {name: excess(case, name, tensor, compute(name)) for name, tensor in expected.items()}
    print({name: f"{error:.1e}" for name, error in found.items()})
    return found


def assert_reproduced(case: Case) -> None:
    """Every output of the case within its tolerance."""
    wrong = {name: error for name, error in errors(case).items() if not error <= 1}
    assert not wrong, f"errors in units of the tolerance: {wrong}"


@pytest.mark.parametrize("name", COMPUTING)
def test_the_original_is_reproduced(golden: Callable[[str], Case], name: str) -> None:
    assert_reproduced(golden(name))


def test_text_to_video_is_refused_by_name(golden: Callable[[str], Case]) -> None:
    """The one case that can't be reproduced, since there is no text here."""
    case = golden("unet_crossattn")
    with pytest.raises(ValueError, match="text-to-video variant isn't supported"):
        official.unet_from_official(case.state, case.config)


# ---- each comparison can fail ----


def thousandth_more(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its result a thousandth too large."""

    def perturbed(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        if isinstance(result, tuple):
            return tuple(1.001 * part for part in result)
        return 1.001 * result

    return perturbed


class Sloppy(Ema):
    """Averages that forget a little too fast."""

    def decay_at(self, num_updates: int) -> float:
        return 0.999 * super().decay_at(num_updates)


PERTURBATIONS: dict[str, tuple[Any, str, Any]] = {
    "schedule": (noise_schedule, "_cumulate", thousandth_more(noise_schedule._cumulate)),
    "ae_small": (autoencoder, "LOGVAR_RANGE", (-0.01, 0.01)),
    "ae_official": (layers, "pad_replicate", lambda x, pads: nn.functional.pad(x, pads)),
    "ae_loss": (
        computing.AutoencoderStage,
        "_adaptive_weight",
        thousandth_more(computing.AutoencoderStage._adaptive_weight),
    ),
    "disc": (nn.functional, "leaky_relu", lambda x, _: torch.where(x > 0, x, 0.19 * x)),
    "lpips": (
        computing,
        "perceptual_distance",
        lambda *a, **k: thousandth_more_module(a, k),
    ),
    "unet_factorized": (unet, "NORM_EPS", 1e-2),
    "unet_plain": (unet, "NORM_EPS", 1e-2),
    "unet_conv3d": (unet, "NORM_EPS", 1e-2),
    "unet_framecond": (unet, "sinusoidal_embedding", thousandth_more(unet.sinusoidal_embedding)),
    "ldm_short": (Parameterization, "coefficients", thousandth_more(Parameterization.coefficients)),
    "ldm_pred": (official_sampling, "ddim_tables", thousandth_more(official_sampling.ddim_tables)),
    "ldm_interp": (official_sampling, "ddim_tables", thousandth_more(official_sampling.ddim_tables)),
    "ema": (computing, "Ema", Sloppy),
    "fvd_kvd": (computing, "frechet_distance", thousandth_more(frechet.frechet_distance)),
    "i3d": (computing, "ORIGINAL_EPS", 1e-3),
}


def thousandth_more_module(arguments: Any, keywords: Any) -> nn.Module:
    """The perceptual distance with heads that weigh a thousandth more."""
    from src.metrics.reconstruction import perceptual_distance

    network = perceptual_distance(*arguments, **keywords)
    network.heads.register_load_state_dict_post_hook(
        lambda module, _: [p.data.mul_(1.001) for p in module.parameters()] and None
    )
    return network


@pytest.mark.parametrize("name", COMPUTING)
def test_a_perturbed_formula_is_noticed(
    golden: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    owner, attribute, perturbed = PERTURBATIONS[name]
    monkeypatch.setattr(owner, attribute, perturbed)
    assert max(errors(golden(name)).values()) > 1


@pytest.mark.parametrize("perturbed", ["kernel_distance", "resize_frames", "statistics"])
def test_each_metric_is_compared(
    golden: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, perturbed: str
) -> None:
    original = {
        "kernel_distance": kernel.kernel_distance,
        "resize_frames": features.resize_frames,
        "statistics": computing.statistics,
    }[perturbed]
    if perturbed == "statistics":
        monkeypatch.setattr(computing, perturbed, lambda x: original(1.001 * x))
    else:
        monkeypatch.setattr(computing, perturbed, thousandth_more(original))
    assert max(errors(golden("fvd_kvd")).values()) > 1


def test_where_the_padding_goes_is_noticed(
    golden: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An axis that isn't strided is padded by one more in front (ae_small has one)."""
    right = layers.same_padding

    def mirrored(kernel_size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
        pads = right(kernel_size, stride)  # type: ignore[arg-type]
        return tuple(pads[i ^ 1] for i in range(len(pads)))

    monkeypatch.setattr(layers, "same_padding", mirrored)
    assert max(errors(golden("ae_small")).values()) > 1
