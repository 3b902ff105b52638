"""``run.json``: what a run was made with, and how far it has come."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..data.storage import read_json, write_json

PACKAGES = ("torch", "accelerate", "hydra-core", "einops", "lpips", "av", "safetensors")


class RunRecord:
    """Keeps ``run.json`` of a run folder: one entry for each time that the run was started.

    Args:
        folder: of the run.
        config: resolved, plain.
        data_fingerprint: of the training data's content.
        batch_size: clips of a step.
        num_processes: that train together.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        *,
        data_fingerprint: str,
        batch_size: int,
        num_processes: int,
    ) -> None:
        self.path = folder / "run.json"
        self.batch_size = batch_size
        before = read_json(self.path)
        told = before.get("starts") if isinstance(before, dict) else None
        starts = [start for start in told if isinstance(start, dict)] if isinstance(told, list) else []
        #: Of the data at the last start; None for the first.
        self.former_fingerprint: str | None = starts[-1].get("data_fingerprint") if starts else None
        text = json.dumps(config, sort_keys=True, default=str)
        self.content: dict[str, Any] = {
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "data_fingerprint": data_fingerprint,
            "step": 0,
            "clips_seen": 0,
            "seconds": 0.0,
            "starts": [
                *starts,
                {
                    "at": now(),
                    "command": sys.argv,
                    "processes": num_processes,
                    "data_fingerprint": data_fingerprint,
                    **machine(),
                },
            ],
        }

    def update(self, step: int, seconds: float) -> None:
        """Writes how far the run has come: steps, clips seen, seconds of training over all starts."""
        progress = {"step": step, "clips_seen": step * self.batch_size, "seconds": seconds}
        write_json(self.path, self.content | progress)


def now() -> str:
    """The date and time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """Versions, code and hardware."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": versions,
        "git_commit": git_commit(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": gpus,
    }


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with ``+changes`` if it was edited; or None."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip() or None
