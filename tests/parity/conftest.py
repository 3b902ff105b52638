"""Golden vectors: random weights, inputs, and what the released code makes of them.

They are taken from `GOLDEN_DIR` if it is set, else from the reference material beside the project, else from
the compact set in this folder.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SHARED = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[3] / "shared"))
COMPACT = Path(__file__).parent / "golden"


def golden_folder() -> Path:
    """Where the cases are."""
    if "GOLDEN_DIR" in os.environ:
        return Path(os.environ["GOLDEN_DIR"])
    beside = SHARED / "reference/golden"
    return beside if beside.is_dir() else COMPACT


@dataclass(frozen=True)
class Case:
    """One golden case; `inputs` and `outputs` are named without their `in.` and `out.`."""

    name: str
    config: dict[str, Any]
    notes: str
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    aliases: dict[str, str]

    @property
    def whole_state(self) -> dict[str, Tensor]:
        """The weights with those keys that were left out because they double others."""
        return self.state | {twin: self.state[key] for twin, key in self.aliases.items()}


Compute = Callable[[str], Tensor]


class Unknown(Exception):
    """An output for which no computation is known."""


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest deviation, relative to the expected tensor's maximum, or to `floor` if that is more.

    Infinite if the shapes differ.
    """
    if actual.shape != expected.shape:
        return math.inf
    largest = max(expected.abs().max().double().item(), floor)
    deviation = (actual.detach().double() - expected.double()).abs().max().item()
    if math.isnan(deviation):
        return math.inf
    return deviation / largest if largest else deviation


def recipe_stream(seed: int) -> np.random.Generator:
    """The stream of numbers of which a recipe makes tensors."""
    return np.random.Generator(np.random.PCG64(seed))


def weights_by_recipe(shapes: dict[str, list[int]], seed: int, gain: float) -> dict[str, Tensor]:
    """The weights of cases that store none: one stream of normal numbers over the sorted keys."""
    stream = recipe_stream(seed)
    state = {}
    for key, shape in sorted(shapes.items()):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        normal = stream.standard_normal(shape)
        if key.endswith("running_var"):
            values = 1 + 0.25 * np.abs(normal)
        elif key.endswith("running_mean") or (len(shape) < 2 and key.endswith("bias")):
            values = 0.1 * normal
        elif len(shape) < 2:
            values = 1 + 0.1 * normal
        else:
            values = gain * normal / math.sqrt(math.prod(shape[1:]))
        state[key] = torch.from_numpy(np.array(values, dtype=np.float32))
    return state


def read_case(folder: Path, name: str) -> Case:
    """Reads a case; the test fails, it isn't skipped, if a file is missing."""
    for path in (folder / f"{name}.json", folder / f"{name}.safetensors"):
        if not path.is_file():
            pytest.fail(f"no golden case {name}: {path} is missing (set GOLDEN_DIR)")
    told = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")

    def named(start: str) -> dict[str, Tensor]:
        return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}

    config, state = told["config"], named("state.")
    if not state and "state_shapes" in config:
        state = weights_by_recipe(
            config["state_shapes"], config["recipe_seed"], config.get("recipe_gain", 1.0)
        )
    case = Case(name, config, told["notes"], state, named("in."), named("out."), told.get("alias_keys", {}))
    listed = {key.split(".", 1)[1] for key in told["tensors"] if key.startswith("out.")}
    assert listed == case.outputs.keys(), f"{name}: the tensors aren't those that {name}.json lists"
    return case


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Case]:
    """Reads a case by name."""
    return lambda name: read_case(golden_folder(), name)


@pytest.fixture(scope="session")
def official_keys() -> Callable[[str], dict[str, tuple[int, ...]]]:
    """Reads the keys and shapes of a released checkpoint."""

    def read(name: str) -> dict[str, tuple[int, ...]]:
        for folder in (golden_folder(), SHARED / "reference/golden", COMPACT):
            path = folder / "official_keys" / f"{name}.keys.json"
            if path.is_file():
                told = json.loads(path.read_text())
                return {k: tuple(v["shape"] if isinstance(v, dict) else v) for k, v in told.items()}
        pytest.fail(f"no key list {name}.keys.json in {golden_folder()}/official_keys")

    return read
