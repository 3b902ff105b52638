"""What a run says while it trains: a bar on a terminal, a line a row in a log file."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm


class Console:
    """Counts steps and time, and shows them.

    Args:
        name: of the run.
        step: from which it goes on.
        num_steps: of the whole run.
        batch_size: clips of a step.
        enabled: whether this process says anything.
    """

    def __init__(self, name: str, step: int, num_steps: int, batch_size: int, *, enabled: bool) -> None:
        self.name = name
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.on_terminal = sys.stdout.isatty()
        self.enabled = enabled
        self.bar = tqdm(
            total=num_steps,
            initial=step,
            unit="step",
            desc=name,
            disable=not (enabled and self.on_terminal),
            file=sys.stdout,
            mininterval=1.0,
        )
        self._first = self._step = step
        self._began = self._since = time.monotonic()
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what only waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()

    def rates(self, step: int) -> dict[str, float]:
        """Speed, share of time spent waiting for data, and memory, since the last call."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        told = {
            "speed/clips_per_second": (step - self._step) * self.batch_size / elapsed,
            "speed/waiting_for_data": min(self._waited / elapsed, 1.0),
            "speed/peak_memory_gib": peak_memory_gib(),
        }
        self._step, self._since, self._waited = step, time.monotonic(), 0.0
        return told

    def show(self, step: int, loss: float) -> None:
        """The loss, beside the bar or in a line of its own."""
        if not self.enabled:
            return
        if self.on_terminal:
            self.bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            return
        per_second = (step - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = tqdm.format_interval((self.num_steps - step) / per_second) if per_second > 0 else "?"
        rate = f"{per_second:.2f} steps/s, {per_second * self.batch_size:.1f} clips/s"
        print(f"{self.name}: step {step}/{self.num_steps}, loss {loss:.4g}, {rate}, {left} left", flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.bar.close()


def peak_memory_gib() -> float:
    """The most memory so far: allocated on the GPU of this process, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform != "darwin" else kib / 2**30
