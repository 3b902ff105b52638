"""The protocol between what is learned (a stage) and how learning proceeds (the loop)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..data.sampler import Batch, LatentBatch

Modules = Mapping[str, nn.Module]


@dataclass
class Update:
    """One loss to be spent by the loop.

    Args:
        name: the trained module that the loss is for; only its optimizer steps.
        loss: scalar, the mean over clips.
        metrics: worth logging, detached and still on the device: scalars, whose means over steps are told, or
            pairs of sum and count, whose ratio is.
    """

    name: str
    loss: Tensor
    metrics: dict[str, Tensor]


class Stage(Protocol):
    """What is learned.

    The modules that each method is given are the trained ones as the loop has wrapped them, or their
    exponential moving averages; a stage never keeps its own reference for calls that need gradients.
    """

    modules: dict[str, nn.Module]
    """Trained modules by name, each with an optimizer of its own."""

    exported: str
    """Name of the module that a model folder holds."""

    measured: tuple[str, ...]
    """Names of the numbers that `evaluate` gives."""

    higher_is_better: tuple[str, ...]
    """Of the numbers that `evaluate` gives; of all others less is better."""

    running: dict[str, Tensor]
    """Small tensors that must survive a resume, beside the modules."""

    def updates(self, modules: Modules, batch: Batch | LatentBatch, step: int) -> Iterator[Update]:
        """Losses of one micro-batch, one after the other; the loop steps in between."""
        ...

    def preview(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        """Videos worth looking at, ``b c t h w`` in [-1, 1], by title."""
        ...

    def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
        """Numbers on held-out clips."""
        ...

    def finish(self, modules: Modules, batches: Iterable[Batch]) -> None:
        """What remains to be measured on training clips once the weights stand."""
        ...
