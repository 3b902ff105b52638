"""Moving averages of weights, kept as modules that can be used as they are."""

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.storage import atomic_folder, save_tensors
from .sharding import local, whole_weights


class Ema:
    """Averages of modules: after each optimizer step, ``average += (1 - d) (weights - average)``.

    The decay warms up as ``d = min(decay, (1 + n) / (10 + n))`` after n updates, so that early averages
    forget the initial weights.

    Args:
        modules: unwrapped modules to follow, by name.
        decay: final decay per optimizer step, in [0, 1).

    Raises:
        ValueError: if the decay is out of range.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema.decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.modules = {
            name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in modules.items()
        }
        self._followed = modules

    @property
    def saved(self) -> dict[str, nn.Module]:
        """All that a resume needs, by name."""
        return self.modules

    @cached_property
    def _tensors(self) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Averages, the weights that they follow, and pairs of buffers.

        Listed once, at the first update: walking through modules in every step takes longer than the
        arithmetic. Of sharded modules each process lists its parts.
        """
        averages = [local(p) for module in self.modules.values() for p in module.parameters()]
        weights = [local(p) for module in self._followed.values() for p in module.parameters()]
        buffers = [
            pair
            for name, module in self._followed.items()
            for pair in zip(self.modules[name].buffers(), module.buffers(), strict=True)
        ]
        return averages, weights, buffers

    def decay_at(self, num_updates: int) -> float:
        """Decay of the update with this number, counted from 1."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates))

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Moves the averages towards the modules; buffers are copied."""
        averages, weights, buffers = self._tensors
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay_at(num_updates))
        for average, buffer in buffers:
            average.copy_(buffer)

    def snapshot(self, folder: Path, step: int, write: bool = True) -> None:
        """Nothing can be made of it later."""


class PowerEma(Ema):
    """Averages in which step τ of t weighs as ``τ^γ``: their length grows with training.

    Args:
        modules: unwrapped modules to follow, by name.
        sigma_rel: the relative length, the deviation of the weights' profile as a share of t; below 0.28.

    Source: Karras et al. 2024, eqs. 2 and 123 to 127.

    Raises:
        ValueError: if there is no profile of that length.
    """

    def __init__(self, modules: Mapping[str, nn.Module], sigma_rel: float) -> None:
        super().__init__(modules, 0.0)
        self.exponent = exponent_of(sigma_rel)

    def decay_at(self, num_updates: int) -> float:
        """Decay of the update with this number, counted from 1."""
        return float((1.0 - 1.0 / num_updates) ** (self.exponent + 1.0))


class PostHocEma:
    """Power-function averages of several lengths, of which any other can be reconstructed after training.

    The first of them is what previews and the model folder use.

    Args:
        modules: unwrapped modules to follow, by name.
        sigmas_rel: relative lengths, for example 0.05 and 0.1.
    """

    def __init__(self, modules: Mapping[str, nn.Module], sigmas_rel: list[float]) -> None:
        self.tracks = {sigma: PowerEma(modules, sigma) for sigma in sigmas_rel}
        if len(self.tracks) < 2:
            raise ValueError(f"ema.sigma_rel must hold at least two different lengths, got {sigmas_rel}")
        self.modules = self.tracks[sigmas_rel[0]].modules

    @property
    def saved(self) -> dict[str, nn.Module]:
        """All that a resume needs, by name."""
        return {
            f"{name}@{sigma:g}": module
            for sigma, track in self.tracks.items()
            for name, module in track.modules.items()
        }

    def update(self, num_updates: int) -> None:
        """Moves all averages towards the modules."""
        for track in self.tracks.values():
            track.update(num_updates)

    def snapshot(self, folder: Path, step: int, write: bool = True) -> None:
        """Writes the averages, in half precision, to ``folder/step_…/MODULE@LENGTH.safetensors``.

        Without ``write`` a process only hands over its parts of sharded ones.
        """
        halved = {name: whole_weights(module, halve=True) for name, module in self.saved.items()}
        if not write:
            return
        with atomic_folder(folder / f"step_{step:09d}") as part:
            for name, weights in halved.items():
                save_tensors(weights, part / f"{name}.safetensors")


Averages = Ema | PostHocEma


def exponent_of(sigma_rel: float) -> float:
    """The exponent γ of the profile of a relative length (Karras et al. 2024, eq. 126).

    Raises:
        ValueError: if there is none above -1/2, from where on profiles can be compared.
    """
    # sigma_rel² = (γ + 1) / ((γ + 2)² (γ + 3)), which falls with γ from 0.289 at 0.
    if not 0.0 < sigma_rel < 0.28:
        raise ValueError(f"a relative length of averages must be between 0 and 0.28, got {sigma_rel}")
    low, high = 0.0, 1.0
    while relative_length(high) > sigma_rel:
        high *= 2.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if relative_length(middle) > sigma_rel else (low, middle)
    return 0.5 * (low + high)


def relative_length(exponent: float) -> float:
    """Deviation of the profile ``τ^γ`` over [0, 1]."""
    return math.sqrt((exponent + 1.0) / ((exponent + 2.0) ** 2 * (exponent + 3.0)))


def inner_product(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Of two profiles, each (t, γ): ``∫ p p'`` with ``p(τ) = (γ + 1) τ^γ / t^(γ + 1)`` up to t."""
    (t, a), (u, b) = one, other
    shared = min(t, u)
    # In logarithms: powers of steps overflow.
    logs = (a + b + 1.0) * math.log(shared) - (a + 1.0) * math.log(t) - (b + 1.0) * math.log(u)
    return (a + 1.0) * (b + 1.0) / (a + b + 1.0) * math.exp(logs)


def reconstruction_weights(
    snapshots: list[tuple[int, float]], step: int, sigma_rel: float
) -> tuple[Tensor, float]:
    """How much each snapshot (its step, its relative length) counts in an average that wasn't kept.

    Returns:
        Weights float64 ``(n,)``, and the distance of the profile that they make from the wanted one, relative
        to the norm of the latter.

    Source: Karras et al. 2024, section 3.2: least squares between profiles.
    """
    profiles = [(float(t), exponent_of(sigma)) for t, sigma in snapshots]
    wanted = (float(step), exponent_of(sigma_rel))
    gram = torch.tensor([[inner_product(a, b) for b in profiles] for a in profiles], dtype=torch.float64)
    target = torch.tensor([inner_product(a, wanted) for a in profiles], dtype=torch.float64)
    # Profiles of neighbouring snapshots are alike: a minimum-norm solution stays tame.
    scale = gram.diagonal().rsqrt()
    scaled = torch.linalg.lstsq(
        scale[:, None] * gram * scale, (scale * target)[:, None], rcond=1e-12, driver="gelsd"
    ).solution[:, 0]
    weights = scale * scaled
    norm = inner_product(wanted, wanted)
    squared = norm - 2.0 * float(weights @ target) + float(weights @ gram @ weights)
    return weights, math.sqrt(max(squared, 0.0) / norm)
