"""Numbers of the steps since the last row: kept on the device, read together, checked."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A loss or a gradient was not a finite number."""


class Pending:
    """What the steps since the last row have told.

    A number is a scalar, averaged over micro-batches and processes and then over steps, or a pair of sum and
    count, of which the ratio of the totals is told (nothing, if nothing was counted). So a row doesn't depend
    on how its steps were split.

    Args:
        num_processes: that have a share of each step.
        skips: whether steps with numbers that aren't finite are left out and counted, instead of refused.
        most_skipped: how many of them are too many.
        clips_of: names the clips of a step, counted from 1.
    """

    def __init__(
        self, num_processes: int, skips: bool, most_skipped: int, clips_of: Callable[[int], list[str]]
    ) -> None:
        self.num_processes = num_processes
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
        told: dict[tuple[int, str], list[list[float]]] = {}
        for step, module, numbers in self._steps:
            for name, value in numbers.items():
                parts = values[where : where + value.numel()]
                where += value.numel()
                told.setdefault((step, f"{module}/{name}"), []).append(parts)
                if not all(map(math.isfinite, parts)):
                    wrong.setdefault(step, f"{module}/{name} became {parts[0]} in step {step}")
        self._steps.clear()
        for (step, name), micro_batches in told.items():
            if step in wrong:
                continue
            total = self.totals.setdefault(name, [0.0, 0.0])
            if len(micro_batches[0]) > 1:
                total[0] += self.num_processes * sum(parts[0] for parts in micro_batches)
                total[1] += self.num_processes * sum(parts[1] for parts in micro_batches)
            else:
                total[0] += sum(parts[0] for parts in micro_batches) / len(micro_batches)
                total[1] += 1.0
        if wrong and not self.skips:
            step, what = next(iter(wrong.items()))
            raise NonFiniteError(f"{what}{self._of_clips(step)}; {UNTOUCHED}. {REMEDY}")
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


UNTOUCHED = "the last saved state is untouched"
REMEDY = (
    "Try a lower optimizer.lr, train.clip_norm=1, machine.precision=no, or train.on_nonfinite=skip to leave "
    "such steps out"
)
