"""Asked to stop (Ctrl-C, a scheduler's signal), a run finishes its step, saves, and says so."""

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
"""What people and schedulers send; the user signals are what Slurm's ``--signal`` is told to send."""


class Interrupted(RuntimeError):
    """The run stopped because it was asked to; nothing is lost."""


class MeasuringStopped(BaseException):
    """What is being measured is given up, since the run was asked to stop; it can be measured again.

    Not an ordinary error, so that nobody takes it for damage of a clip, say.
    """


class StopRequests:
    """Listens for signals while a run is at work.

    While ``at_once`` holds, as before the first step and after the last state is saved, a signal raises at
    once. Otherwise it is noted, for the loop to finish its step; a second Ctrl-C raises at once all the same.
    What is computed within :meth:`giving_up` is given up, as it may take longer than launchers wait.
    Processes of one run get a signal at different steps: they agree by the maximum of a flag, reduced with
    every step and, on a GPU, read two steps later, so that no step waits for it.
    """

    def __init__(self) -> None:
        self.at_once = True
        self._gives_up = False
        self.received: int | None = None
        self.name = "another process"
        self._previous: dict[int, Any] = {}
        self._flags: deque[tuple[torch.Tensor, Any]] = deque()
        self._held = ExitStack()

    def until_the_end(self, resource: AbstractContextManager[Any]) -> None:
        """Enters something that is left when the run ends, however it ends."""
        self._held.enter_context(resource)

    def __enter__(self) -> Self:
        """Starts listening; only the main thread may, and elsewhere nothing is changed."""
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops listening. What had listened before (a launcher that requeues the job) gets its turn."""
        self._held.close()
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        before = self._previous.get(self.received or 0)
        if isinstance(error, Interrupted) and self.received != signal.SIGINT and callable(before):
            before(self.received, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = number
        self.name = signal.Signals(number).name
        if number == signal.SIGINT and (again or self.at_once):
            raise KeyboardInterrupt
        if self.at_once:
            raise Interrupted(f"stopped by {self.name}, with nothing to save; the same command goes on")
        self.give_up()

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """Within it a request that has come, or comes, raises MeasuringStopped.

        For what this process computes alone, and what can be computed again: nothing may be written in it.
        """
        self._gives_up = True
        try:
            self.give_up()
            yield
        finally:
            self._gives_up = False

    def give_up(self) -> None:
        """Raises MeasuringStopped within :meth:`giving_up` if a request has come, which wasn't heeded yet."""
        if self._gives_up and self.received is not None:
            self._gives_up = False  # once is enough
            raise MeasuringStopped

    def agreed(self, accelerator: Accelerator, *, now: bool = False) -> bool:
        """Whether all processes stop after this step; to be asked after each step by all of them.

        With ``now``, which must be the same for all, they wait for each other, and all requests count that
        have come till then.
        """
        wanted = self.received is not None
        if accelerator.num_processes == 1:
            return wanted
        flag = torch.tensor(float(wanted), device=accelerator.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if now or flag.device.type != "cuda":
            return bool(flag)
        copied = flag.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._flags.append((copied, event))
        if len(self._flags) < 3:
            return False
        copied, event = self._flags.popleft()
        event.synchronize()
        return bool(copied)
