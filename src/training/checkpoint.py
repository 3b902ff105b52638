"""Training state on disk: everything that a resume needs, written atomically, read without running code."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.storage import atomic_folder, load_tensors, remove, save_tensors, write_json
from .sharding import spread_like, whole, whole_weights

# Copies that somebody has put beside the states don't count.
STATE_NAME = re.compile(r"step_\d{9}")
FILES = ("modules.safetensors", "averages.safetensors", "optimizers.safetensors", "running.safetensors")


@dataclass
class State:
    """What is saved: references, not copies.

    Args:
        modules: unwrapped trained modules.
        averages: their moving averages, empty without EMA.
        optimizers: one a module.
        running: small tensors of the stage.
        progress: JSON values; at least ``step``.
    """

    modules: Mapping[str, nn.Module]
    averages: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    running: dict[str, Tensor]
    progress: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, state: State, keep: int, keep_every: int = 0, write: bool = True) -> Path:
    """Writes the state as ``folder/step_XXXXXXXXX`` and removes all but the last ``keep`` states.

    States of steps that are a multiple of ``keep_every`` stay, too (0: none). Without ``write`` a process
    only hands over its parts of sharded tensors, which all must do.

    The folder appears under its name only when all its files are on the disk; an interruption at any
    moment leaves the earlier states as they were.

    Raises:
        OSError: if the disk is full or read-only; nothing that was there is lost.
    """
    target = path_of(folder, state.progress["step"])
    optimizers, groups = _flatten_optimizers(state.optimizers)
    running = {name: value.contiguous() for name, value in state.running.items()}
    contents = (_flatten_modules(state.modules), _flatten_modules(state.averages), optimizers, running)
    files = dict(zip(FILES, contents, strict=True))
    if not write:
        return target
    with atomic_folder(target) as part:
        for name, tensors in files.items():
            save_tensors(tensors, part / name)
        description = {
            "progress": state.progress,
            "optimizers": groups,
            "sha256": {name: _hash(part / name) for name in files},
        }
        write_json(part / "state.json", description | {"checksum": _checksum(description)})
    prune(folder, state.progress["step"], keep, keep_every)
    return target


def prune(folder: Path, step: int, keep: int, keep_every: int = 0) -> None:
    """Removes all but the last ``keep`` states up to a step's, and those of multiples of ``keep_every``."""
    newest = path_of(folder, step).name
    for old in [path for path in list_states(folder) if path.name <= newest][:-keep]:
        if not (keep_every and step_of(old) % keep_every == 0):
            remove(old)


def note_progress(folder: Path, state: State) -> None:
    """Writes the progress anew into the state of the same step, whose tensors stay as they are.

    Only for a state that the caller has just saved; another one of that name stays as it is.
    """
    path = path_of(folder, state.progress["step"]) / "state.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    if path.parent.is_symlink() or description["progress"]["step"] != state.progress["step"]:
        return
    description["progress"] = state.progress
    del description["checksum"]
    write_json(path, description | {"checksum": _checksum(description)})


def path_of(folder: Path, step: int) -> Path:
    """Where the state of a step lies, if it was saved."""
    return folder / f"step_{step:09d}"


def step_of(path: Path) -> int:
    """The step that a state's name tells."""
    return int(path.name.removeprefix("step_"))


def list_states(folder: Path) -> list[Path]:
    """Complete states, the oldest first."""
    named = (path for path in folder.glob("step_*") if STATE_NAME.fullmatch(path.name))
    return sorted(path for path in named if path.is_dir())


def load_latest(folder: Path, state: State, report: Any = print) -> bool:
    """Fills ``state`` from the newest sound state; says whether there was one.

    A damaged state (a file missing or not matching its checksum) is reported, and removed once an earlier one
    is found to be sound; one of another step than its name tells, as a copy is, is set aside then. The
    remains of one that a killed process was writing are removed.

    Raises:
        ValueError: if a sound state belongs to other modules, or if none is sound.
        OSError: if the newest state can't be read; it stays.
    """
    for part in folder.glob(".step_*.part"):
        whole = folder / part.name.removeprefix(".").removesuffix(".old.part")
        if part.name.endswith(".old.part") and not whole.exists():
            os.replace(part, whole)  # set aside for one of the same step, which never came
        else:
            report(f"{part} was being written when its process ended; it is removed")
            remove(part)
    damaged: list[tuple[Path, Exception]] = []
    for path in reversed(list_states(folder)):
        try:
            description = _read_description(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
            damaged.append((path, error))
            continue
        except OSError as error:
            raise OSError(
                f"can't read the state {path}: {error}. It may be sound, and stays: try again, or move it "
                "away to go on from an earlier one"
            ) from error
        for torn, reason in damaged:
            if isinstance(reason, MisnamedError):
                aside = next(
                    name for i in itertools.count(1) if not (name := torn.with_name(f"misnamed_{i}")).exists()
                )
                report(f"state {torn} {reason}; it is set aside as {aside.name} and {path.name} is used")
                os.replace(torn, aside)
            else:
                report(f"state {torn} is damaged ({reason}); it is removed and {path.name} is used")
                remove(torn)
        _fill_modules(state.modules, load_tensors(path / "modules.safetensors"), path)
        _fill_modules(state.averages, load_tensors(path / "averages.safetensors"), path)
        _fill_optimizers(
            state.optimizers, load_tensors(path / "optimizers.safetensors"), description["optimizers"]
        )
        running = load_tensors(path / "running.safetensors")
        if running.keys() != state.running.keys():
            raise ValueError(f"state {path} holds {sorted(running)}, expected {sorted(state.running)}")
        state.running.update(running)
        state.progress.update(description["progress"])
        return True
    if damaged:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged)
        raise ValueError(
            f"no state in {folder} is sound ({reasons}). Bring one back from a copy, or begin anew: choose "
            "another name=…, or remove the run's folder"
        )
    return False


class MisnamedError(ValueError):
    """A state is of another step than its name tells."""


def _read_description(path: Path) -> dict[str, Any]:
    """What a state's ``state.json`` says; OSError or ValueError if any file isn't as it was written."""
    try:
        description = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("state.json is nested too deeply") from error
    if not isinstance(description, dict):
        raise ValueError("state.json holds no description")
    if description.pop("checksum", None) != _checksum(description):
        raise ValueError("state.json doesn't match its checksum")
    for name in FILES:
        if _hash(path / name) != description["sha256"][name]:
            raise ValueError(f"{name} doesn't match its checksum")
    step = description["progress"]["step"]
    if step != step_of(path):
        raise MisnamedError(f"holds step {step}, as a copy or a renamed one of step_{step:09d} does")
    return description


def _checksum(description: dict[str, Any]) -> str:
    # As it is when it is read back: JSON knows no tuples.
    text = json.dumps(json.loads(json.dumps(description)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten_modules(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in whole_weights(module).items()
    }


def _fill_modules(modules: Mapping[str, nn.Module], tensors: dict[str, Tensor], path: Path) -> None:
    expected = {f"{name}.{key}" for name, module in modules.items() for key in module.state_dict()}
    if expected != tensors.keys():
        raise ValueError(
            f"state {path} belongs to another model: missing {sorted(expected - tensors.keys())[:5]}, "
            f"left over {sorted(tensors.keys() - expected)[:5]}. Choose another name=… for this run"
        )
    for name, module in modules.items():
        module.load_state_dict(
            {key: spread_like(tensors[f"{name}.{key}"], like) for key, like in module.state_dict().items()}
        )


def _flatten_optimizers(
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by ``name/parameter/key``, and what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        state = optimizer.state_dict()
        for parameter, values in state["state"].items():
            for key, value in values.items():
                tensors[f"{name}/{parameter}/{key}"] = (
                    whole(torch.as_tensor(value).detach()).cpu().contiguous()
                )
        rest[name] = state["param_groups"]
    return tensors, rest


def _fill_optimizers(
    optimizers: Mapping[str, torch.optim.Optimizer], tensors: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    for name, optimizer in optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, parameter, field_name = key.split("/")
            if owner == name:
                like = parameters[int(parameter)]
                # Fused optimizers run over memory as it lies: moments must lie as their weights do.
                if value.shape == like.shape:
                    part = spread_like(value, like)
                    value = torch.empty_like(like, dtype=part.dtype, device=part.device).copy_(part)
                state.setdefault(int(parameter), {})[field_name] = value
        optimizer.load_state_dict({"state": state, "param_groups": rest[name]})
