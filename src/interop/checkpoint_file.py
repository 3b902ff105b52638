"""Reading and writing other people's checkpoint files without running what is in them."""

import io
import pickle
import types
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.storage import atomic_path, load_tensors


class Inert:
    """Stands for an object of a class that isn't known: takes whatever it is given, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> "Inert":
        return Inert()

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None:
        """An element of a list."""

    def extend(self, _: Any) -> None:
        """Elements of a list."""

    def add(self, _: Any) -> None:
        """An element of a set."""


# All that a file of tensors needs. Of these none runs anything but the making of a tensor.
_SAFE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


class InertUnpickler(pickle.Unpickler):
    """An unpickler for which every class and function but those of tensors is an inert placeholder."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """What a name in the pickle stands for."""
        if (module_name, global_name) in _SAFE:
            return _SAFE[module_name, global_name]
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if module_name in ("torch", "torch.storage") and global_name.endswith("Storage"):
            return getattr(torch.storage if module_name == "torch.storage" else torch, global_name)
        return type(global_name, (Inert,), {"__module__": f"inert.{module_name}"})


def _load(file: Any, **keywords: Any) -> Any:
    return InertUnpickler(file, **keywords).load()


_inert_pickle = types.ModuleType("inert_pickle")
vars(_inert_pickle).update(
    Unpickler=InertUnpickler, load=_load, loads=lambda data: _load(io.BytesIO(data)), __name__="inert_pickle"
)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int]:
    """The weights in a checkpoint file, on the CPU, and its optimizer step (0 if the file doesn't say).

    It may be a Lightning checkpoint (`state_dict` beside other things), a file that holds nothing but a
    `state_dict`, or safetensors. Nothing in the file is run: outside tensors, every class and function that
    it names becomes an inert placeholder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it isn't a checkpoint, was damaged, or something in its `state_dict` isn't a tensor.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        return load_tensors(path), 0
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError(f"{path} is a TorchScript program; expected a file of weights (torch.save)")
    try:
        content = torch.load(
            path, map_location="cpu", pickle_module=_inert_pickle, weights_only=False, mmap=zipped
        )
    except Exception as error:
        raise ValueError(f"{path} can't be read as a checkpoint: {type(error).__name__}: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state_dict of tensors")
    strange = sorted(
        str(key) for key, value in state.items() if type(value) not in (Tensor, torch.nn.Parameter)
    )
    if strange or not all(isinstance(key, str) for key in state):
        raise ValueError(
            f"{path}: expected nothing but named tensors in its state_dict, but these aren't: {strange[:5]}"
        )
    step = content.get("global_step", 0)
    # A network that several processes trained may have been saved inside its wrapper.
    wrapped = "module." if all(key.startswith("module.") for key in state) else ""
    weights = {key.removeprefix(wrapped): value.detach() for key, value in state.items()}
    return weights, step if type(step) is int else 0


def write_checkpoint(state: Mapping[str, Tensor], path: Path, step: int) -> None:
    """Writes weights as a Lightning checkpoint that the released code reads, whole or not at all.

    Tensors that share their memory go on sharing it in the file.
    """
    content = {"state_dict": OrderedDict(state), "global_step": step, "epoch": 0}
    with atomic_path(path) as part:
        torch.save(content, part)
