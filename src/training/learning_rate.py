"""The learning rate as a pure function of the step."""

import math
from typing import Literal


def learning_rate_factor(
    step: int, num_steps: int, *, warmup_steps: int, decay: Literal["constant", "cosine"]
) -> float:
    """What the peak learning rate is multiplied by in the update that follows ``step`` finished ones.

    Grows linearly over the first ``warmup_steps`` updates; then stays, or falls like half a cosine to
    zero at ``num_steps`` (Loshchilov and Hutter 2017, eq. 5, without restarts).

    Raises:
        ValueError: for an unknown decay.
    """
    if decay not in ("constant", "cosine"):
        raise ValueError(f"unknown decay {decay!r}; choose constant or cosine")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
