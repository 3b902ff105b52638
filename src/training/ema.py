"""Exponential moving averages of weights, kept as modules that can be used as they are."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
        # Listed once: walking through modules in every step takes longer than the arithmetic.
        self._averages: list[Tensor] = [p for module in self.modules.values() for p in module.parameters()]
        self._weights: list[Tensor] = [p for module in modules.values() for p in module.parameters()]
        self._buffers = [
            pair
            for name, module in modules.items()
            for pair in zip(self.modules[name].buffers(), module.buffers(), strict=True)
        ]

    def decay_at(self, num_updates: int) -> float:
        """Decay of the update with this number, counted from 1."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates))

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Moves the averages towards the modules; buffers are copied."""
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - self.decay_at(num_updates))
        for average, buffer in self._buffers:
            average.copy_(buffer)
