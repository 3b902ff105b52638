"""Numbers of the steps since the last row: kept on the device, read together, checked."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A loss or a gradient was not a finite number."""


class Pending:
    """What the steps since the last row have told.

    A number is a scalar, averaged over steps and processes, or a pair of sum and count, of which the ratio of
    the totals is told (nothing, if nothing was counted).

    Args:
        skips: whether steps with numbers that aren't finite are left out and counted, instead of refused.
        most_skipped: how many of them are too many.
        clips_of: names the clips of a step, counted from 1.
    """

    def __init__(self, skips: bool, most_skipped: int, clips_of: Callable[[int], list[str]]) -> None:
        self.skips = skips
        self.most_skipped = most_skipped
        self.clips_of = clips_of
        self.num_skipped = 0
        self.totals: dict[str, list[float]] = {}
        self._steps: list[tuple[int, str, dict[str, Tensor]]] = []

    def add(self, step: int, module: str, numbers: dict[str, Tensor]) -> None:
        """Takes the numbers of one update, detached, without reading them."""
        self._steps.append((step, module, numbers))

    def read(self, mean_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means by ``module/name``, and forgets what they are of; raises as :meth:`collect` does."""
        self.collect(mean_over_processes)
        means = {name: total / count for name, (total, count) in self.totals.items() if count > 0}
        self.totals = {}
        return means | ({"skipped_steps": float(self.num_skipped)} if means and self.num_skipped else {})

    def collect(self, mean_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Brings the numbers from the device into ``totals``, sums and counts by ``module/name``.

        Raises:
            NonFiniteError: for a number that isn't finite, unless such steps are skipped; or for too many.
        """
        if not self._steps:
            return
        flat = [value.float().flatten() for _, _, numbers in self._steps for value in numbers.values()]
        values = mean_over_processes(torch.cat(flat)).tolist()
        where = 0
        wrong: dict[int, str] = {}
        for step, module, numbers in self._steps:
            told = {}
            for name, value in numbers.items():
                told[f"{module}/{name}"] = values[where : where + value.numel()]
                where += value.numel()
            bad = [name for name, parts in told.items() if not all(map(math.isfinite, parts))]
            if bad:
                wrong.setdefault(step, f"{bad[0]} became {told[bad[0]][0]} in step {step}")
                continue
            for name, parts in told.items():
                total = self.totals.setdefault(name, [0.0, 0.0])
                total[0] += parts[0]
                total[1] += parts[1] if len(parts) > 1 else 1.0
        self._steps.clear()
        if wrong and not self.skips:
            step, what = next(iter(wrong.items()))
            raise NonFiniteError(f"{what}{self._of_clips(step)}; the last saved state is untouched. {REMEDY}")
        self.num_skipped += len(wrong)
        if self.num_skipped > self.most_skipped:
            step, what = list(wrong.items())[-1]
            raise NonFiniteError(
                f"{self.num_skipped} steps were skipped, more than train.max_skipped={self.most_skipped}; "
                f"the last: {what}{self._of_clips(step)}. {REMEDY}"
            )

    def _of_clips(self, step: int) -> str:
        clips = self.clips_of(step)
        more = f", and {len(clips) - 8} more" if len(clips) > 8 else ""
        return f" (clips of {', '.join(clips[:8])}{more})" if clips else ""


REMEDY = (
    "Try a lower optimizer.lr, train.clip_norm=1, machine.precision=no, or train.on_nonfinite=skip to leave "
    "such steps out"
)
