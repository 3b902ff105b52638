"""Writes the compact set of golden cases that stays with the project: `python -m tests.parity.compact`.

Cases that are small are the original's own recordings. Of the others the weights would be too large: theirs
are made by the recipe, and the outputs are computed by this project, once its code has reproduced the
original's recordings (this is checked first). They hold later versions to that day's numbers.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from src.interop.official import AVERAGE_COUNTERS, schedule_tables
from tests.parity.computing import COMPUTING
from tests.parity.conftest import COMPACT, Case, golden_folder, read_case, weights_by_recipe
from tests.parity.test_golden import assert_reproduced

RECORDED = (
    "schedule",
    "ae_official",
    "lpips",
    "unet_plain",
    "unet_crossattn",
    "ema",
    "fvd_kvd",
    "i3d",
)
# At which times the original's recordings were made, where their JSON doesn't tell.
TIMES = {"ldm_pred": {"one_call_t": 501, "ddpm_one_step_t": 300}}
SEED = 20231
# Of these the first clip is enough.
ONE_CLIP = ("ae_loss", "ldm_short")


def with_recipe(case: Case) -> Case:
    """The case with weights by the recipe, without outputs."""
    doubles = {
        f"{key.removesuffix('.conv.weight')}.weight": key
        for key in case.state
        if key.endswith(".conv.weight")
    }
    buffers = {*schedule_tables(torch.tensor([0.5])), *AVERAGE_COUNTERS}
    shapes = {
        key: list(tensor.shape)
        for key, tensor in case.state.items()
        if key not in buffers and key not in doubles
    }
    aliases = {twin: key for twin, key in doubles.items() if twin in case.state} | case.aliases
    inputs = {k: v[:1] if case.name in ONE_CLIP else v for k, v in case.inputs.items()}
    state = weights_by_recipe(shapes, SEED, 1.0)
    return replace(case, state=state, inputs=inputs, outputs={}, aliases=aliases)


@torch.no_grad()
def computed(case: Case, names: list[str]) -> dict[str, Tensor]:
    """All outputs; some are computed from others."""
    compute = COMPUTING[case.name](case)
    left = list(names)
    while left:
        done = []
        for name in left:
            try:
                with torch.set_grad_enabled(case.name == "ae_loss"):
                    case.outputs[name] = compute(name).detach().clone().contiguous()
            except KeyError:
                continue
            done.append(name)
        assert done, f"{case.name}: {left} can't be computed"
        left = [name for name in left if name not in done]
    return case.outputs


def described(case: Case, source: dict[str, Any]) -> dict[str, Any]:
    """The JSON beside a case's tensors."""
    tensors = {f"in.{k}": v for k, v in case.inputs.items()} | {
        f"out.{k}": v for k, v in case.outputs.items()
    }
    return source | {
        "tensors": {key: [str(v.dtype).removeprefix("torch."), list(v.shape)] for key, v in tensors.items()}
    }


def main() -> None:
    """Writes the set."""
    source = golden_folder()
    assert source != COMPACT, "the original's recordings are needed"
    COMPACT.mkdir(exist_ok=True)
    for name in COMPUTING:
        case = read_case(source, name)
        assert_reproduced(case)
        told = json.loads((source / f"{name}.json").read_text())
        if name in RECORDED:
            shutil.copyfile(source / f"{name}.safetensors", COMPACT / f"{name}.safetensors")
            write_json(COMPACT / f"{name}.json", told)
            continue
        made = with_recipe(case)
        if name in TIMES:
            made.config["sampling"] |= TIMES[name]
        computed(made, list(case.outputs))
        shapes = {key: list(tensor.shape) for key, tensor in made.state.items()}
        told["config"] = made.config | {"recipe_seed": SEED, "recipe_gain": 1.0, "state_shapes": shapes}
        told["alias_keys"] = made.aliases
        told["provenance"] = "computed by this project with weights by the recipe"
        tensors = {f"in.{k}": v.contiguous() for k, v in made.inputs.items()}
        tensors |= {f"out.{k}": v for k, v in made.outputs.items()}
        save_file(tensors, COMPACT / f"{name}.safetensors")
        write_json(COMPACT / f"{name}.json", described(made, told))
    for name in ("unet_crossattn",):
        shutil.copyfile(source / f"{name}.safetensors", COMPACT / f"{name}.safetensors")
        write_json(COMPACT / f"{name}.json", json.loads((source / f"{name}.json").read_text()))
    (COMPACT / "official_keys").mkdir(exist_ok=True)
    for path in sorted((source / "official_keys").glob("*.json")):
        write_json(COMPACT / "official_keys" / path.name, json.loads(path.read_text()))
    total = sum(path.stat().st_size for path in COMPACT.rglob("*") if path.is_file())
    print(f"{total / 2**20:.2f} MiB: {COMPACT}")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
