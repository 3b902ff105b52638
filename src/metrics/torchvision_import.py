"""Importing torchvision where its compiled operators don't fit the build of torch."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch


@functools.cache
def declare_torchvision_operators() -> None:
    """Make torchvision importable where its compiled operators don't fit the build of torch.

    The usual case is a wheel made for CUDA beside a CPU build: importing it fails, because it describes
    operators that don't exist. Nothing here uses them, so their schemas suffice. Call it before the first
    import of torchvision.
    """
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        for library in Path(folder).glob("_C*"):
            try:
                torch.ops.load_library(library)
            except OSError:
                continue
            return
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        _TORCHVISION.define(schema)


# Definitions live as long as this object.
_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
