"""How much each time's loss counts: float64 tables ``(num_timesteps,)`` for a parameterization.

Which errors matter is said once, for errors of the clean sample; a network that predicts something else has
its own squared error weighed so that the loss is the same one. With ``snr = a / (1 - a)``, where ``a`` is
``alphas_cumprod``, the squared error of ``epsilon`` is ``snr`` times, that of ``v`` is ``snr + 1`` times that
of ``sample`` (Salimans and Ho 2022, section 4). With ``loss=l1`` the tables apply as they are, and this
equality doesn't hold.

Where the last time is pure noise, these weights are 0 there: nothing but the mean could be learned.
"""

import torch
from torch import Tensor

from .parameterization import Parameterization


def _snr(parameterization: Parameterization) -> Tensor:
    alphas = parameterization.alphas_cumprod
    return alphas / (1.0 - alphas)


def _of_own_error(weights: Tensor, parameterization: Parameterization) -> Tensor:
    """Weights of the prediction's own squared error, from those of the clean sample's."""
    snr = _snr(parameterization)
    return (
        weights
        / {"sample": torch.ones_like(snr), "epsilon": snr, "v": snr + 1.0}[parameterization.prediction_type]
    )


def none(parameterization: Parameterization) -> Tensor:
    """All times alike, whatever is predicted (Ho et al. 2020, eq. 14)."""
    return torch.ones_like(parameterization.alphas_cumprod)


def min_snr(parameterization: Parameterization, *, gamma: float) -> Tensor:
    """Min-SNR-γ (Hang et al. 2023, section 3.4): ``min(snr, gamma)`` on the clean sample's squared error.

    That is ``min(snr, gamma) / snr`` on epsilon's and ``min(snr, gamma) / (snr + 1)`` on v's.

    Args:
        parameterization: the schedule and what is predicted.
        gamma: signal-to-noise ratio above which weights no longer grow; 5 in the paper.

    Raises:
        ValueError: unless gamma is positive.
    """
    if not gamma > 0.0:
        raise ValueError(f"loss_weighting.gamma must be positive, got {gamma}; the paper uses 5")
    return _of_own_error(_snr(parameterization).clamp(max=gamma), parameterization)


def sigmoid(parameterization: Parameterization, *, bias: float) -> Tensor:
    """Sigmoid weighting: ``sigmoid(bias - log snr)`` on epsilon's squared error (Kingma and Gao 2023).

    On the clean sample's that is ``exp(bias) sigmoid(log snr - bias)`` (Hoogeboom et al. 2024).

    Args:
        parameterization: the schedule and what is predicted.
        bias: log signal-to-noise ratio above which errors fade out.
    """
    snr = _snr(parameterization)
    return _of_own_error(snr * torch.sigmoid(bias - snr.log()), parameterization)
