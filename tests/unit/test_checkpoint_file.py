"""Reading other people's checkpoints: everything that Lightning puts into one, and nothing is run."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from src.interop.checkpoint_file import read_checkpoint, write_checkpoint


class SomeCallback:
    """A class as Lightning 1.4 uses one for a key."""


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 3, generator=generator)
    return {
        "a.weight": shared,
        "a.conv.weight": shared,
        "transposed": torch.randn(5, 6, generator=generator).t(),
        "part": torch.randn(10, generator=generator)[2:7],
        "half": torch.randn(3, generator=generator).half(),
        "count": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.randn(2, generator=generator)),
    }


def lightning(state: Any) -> dict[str, Any]:
    """A checkpoint with all that one may hold beside its weights."""
    return {
        "state_dict": OrderedDict(state),
        "global_step": 1234,
        "epoch": 3,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {SomeCallback: {"best_model_score": torch.tensor(0.5), "path": Path("/somewhere")}},
        "hyper_parameters": OmegaConf.create({"lr": 1e-4, "nested": {"list": [1, {"deep": "${lr}"}]}}),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}],
        "random": np.random.RandomState(0).get_state(),
        "score": np.float64(0.25),
        "set": {frozenset([1]), 2},
        "seen": SomeCallback(),
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor), key


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_lightning_checkpoint_is_read(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(lightning(weights()), path, _use_new_zipfile_serialization=zipped)
    state, step = read_checkpoint(path)
    assert_same(state, weights())
    assert step == 1234


def test_a_bare_state_dict_and_safetensors_are_read(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "bare.pt")
    assert_same(read_checkpoint(tmp_path / "bare.pt")[0], weights())
    alone = {key: tensor.detach().clone().contiguous() for key, tensor in weights().items()}
    save_file(alone, tmp_path / "model.safetensors")
    assert_same(read_checkpoint(tmp_path / "model.safetensors")[0], alone)


class Trap:
    """What runs a command when it is unpickled the ordinary way."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


class HiddenTrap(Trap):
    """One that fetches its command through getattr and eval."""

    def __reduce__(self) -> Any:
        return eval, (f"__import__('pathlib').Path({str(self.proof)!r}).touch()",)


class NestedTrap(Trap):
    """One inside the bytes of a tensor's storage, which torch itself would load with everything allowed."""

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (pickle.dumps(Trap(self.proof)),)


@pytest.mark.parametrize("trap", [Trap, HiddenTrap, NestedTrap])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_booby_trap_beside_the_weights_does_nothing(tmp_path: Path, trap: type[Trap], zipped: bool) -> None:
    proof, path = tmp_path / "proof", tmp_path / "model.ckpt"
    content = lightning(weights()) | {"callbacks": [trap(proof)], trap(proof): 1}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(path)[0], weights())
    assert not proof.exists()
    # The trap is a real one.
    pickle.loads(pickle.dumps(Trap(proof)))
    assert proof.exists()


@pytest.mark.parametrize("trap", [Trap, HiddenTrap, NestedTrap])
def test_a_booby_trap_among_the_weights_is_refused(tmp_path: Path, trap: type[Trap]) -> None:
    proof, path = tmp_path / "proof", tmp_path / "model.ckpt"
    torch.save(lightning(weights() | {"bad.weight": trap(proof)}), path)
    with pytest.raises(ValueError, match=r"aren't.*bad\.weight"):
        read_checkpoint(path)
    assert not proof.exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        read_checkpoint(tmp_path / "nothing.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        read_checkpoint(tmp_path / "text.ckpt")
    torch.save(lightning(weights()), tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-400])
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        read_checkpoint(tmp_path / "cut.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(tmp_path / "list.ckpt")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        archive.writestr("program/constants.pkl", b"")
    with pytest.raises(ValueError, match="TorchScript"):
        read_checkpoint(tmp_path / "program.pt")


def test_what_is_written_is_read_by_torch_without_trust(tmp_path: Path) -> None:
    write_checkpoint(weights(), tmp_path / "out.ckpt", step=9)
    content = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert_same(content["state_dict"], weights())
    assert content["global_step"] == 9
    shared = content["state_dict"]
    assert shared["a.weight"].data_ptr() == shared["a.conv.weight"].data_ptr()
    assert [file.name for file in tmp_path.iterdir()] == ["out.ckpt"]
