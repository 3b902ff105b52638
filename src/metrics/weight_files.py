"""Files of trained weights, read without running code."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .torchscript import is_torchscript, read_torchscript

FileKind = Literal["safetensors", "torchscript", "torch", "pickle"]

# How torch.save began before it wrote zip archives: its magic number as a pickled integer.
_OLD_TORCH_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")


def file_kind(path: Path) -> FileKind:
    """What a file of weights is, by its content, whatever its name.

    Raises:
        ValueError: if it is none of them, saying what it seems to be.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    if start[4:9] == b"\0\0\0\0{":  # looked at first: the header's length before it may begin like the others
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return "torchscript" if is_torchscript(path) else "torch"
    if start.startswith(_OLD_TORCH_START):
        return "torch"
    if start.startswith(b"\x80"):
        return "pickle"
    if not start:
        seems = "it is empty"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        seems = "it is a web page; the download must have been answered by one"
    elif start.startswith(b"version https://git-lfs"):
        seems = "it is only a pointer of Git LFS; fetch the file itself (git lfs pull)"
    else:
        seems = f"it begins with {start[:8]!r}"
    raise ValueError(f"{path} is no file of weights: {seems}. Get the file again")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file of weights by their names, on the CPU.

    Read are `.safetensors`, what `torch.save` wrote (a state dict, or one under `state_dict`, `model` or
    `module`), and TorchScript archives, of which only the tensors are looked at.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, of another kind, or would have to run code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    kind = file_kind(path)
    if kind == "torchscript":
        return read_torchscript(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except (
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"can't read weights from {path}: it is truncated, or holds more than tensors ({reason}). "
            "Get the file again"
        ) from error
    return _state_of(loaded, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"can't read weights from {path}: {error}. Get the file again") from error


def _state_of(loaded: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what torch.load gave; objects beside it, such as the epoch, are left out."""
    while isinstance(loaded, dict) and not any(isinstance(value, Tensor) for value in loaded.values()):
        inner = next((loaded[key] for key in _STATE_KEYS if isinstance(loaded.get(key), dict)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, dict) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(
            f"{path} holds no state dict, but {type(loaded).__name__}; expected names and tensors"
        )
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def required(path: str | Path | None, what: str, url: str) -> Path:
    """The file of weights that was named.

    Raises:
        FileNotFoundError: if none was, or it isn't there, saying where to get it.
    """
    if path is not None and Path(path).is_file():
        return Path(path)
    raise FileNotFoundError(
        f"no weights of {what}{f' at {path}' if path else ''}. On a machine with a network run\n"
        f"    wget {url}\n"
        "and point to the file: weights=PATH"
    )


def load_into(network: nn.Module, path: Path, what: str) -> None:
    """Loads a file of weights into the network that it must fit; see `check_state`."""
    state = read_state(path)
    check_state(state, network, path, what)
    network.load_state_dict(state)


def check_state(state: Mapping[str, Tensor], network: nn.Module, path: str | Path, what: str) -> None:
    """Raises ValueError unless the tensors are those of the network by name and shape.

    Args:
        what: the network for people, such as `r3d_18 of torchvision`.
    """
    expected = network.state_dict()
    missing = sorted(expected.keys() - state.keys())
    surplus = sorted(state.keys() - expected.keys())
    misshapen = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = [("lacks", missing), ("has also", surplus), ("misshapen:", misshapen)]
    told = "; ".join(f"{fault} {_some(names)}" for fault, names in faults if names)
    if told:
        raise ValueError(f"{path} doesn't hold the weights of {what}: {told}")


def _some(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def state_sha256(network: nn.Module) -> str:
    """A digest of a network's weights: of their names, types, shapes and bytes, in the order of the names.

    It doesn't depend on the file that they came from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
