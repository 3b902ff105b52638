"""The tensors of a TorchScript archive, read without running anything that it holds."""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ScriptObject:
    """An object of the archive, whatever its class there: nothing but its attributes."""

    attributes: dict[str, Any]

    def __new__(cls) -> ScriptObject:
        instance = super().__new__(cls)
        instance.attributes = {}
        return instance

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"an object's state must be a dict, got {type(state).__name__}")
        self.attributes = {str(name): value for name, value in state.items()}


class _ScriptUnpickler(pickle.Unpickler):
    """Rebuilds objects as their attributes and tensors from their storages; refuses everything else."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return ScriptObject
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        allowed: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "build_intlist"): _same,
            ("torch.jit._pickle", "build_doublelist"): _same,
            ("torch.jit._pickle", "build_boollist"): _same,
            ("torch.jit._pickle", "build_tensorlist"): _same,
            ("torch.jit._pickle", "restore_type_tag"): _same,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(
                f"the file asks for {module}.{name}; only tensors and inert objects are allowed"
            )
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage as a flat tensor, from its own member of the archive."""
        kind, dtype, key, _device, count = pid
        member = f"{self.root}/data/{key}"
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"expected a reference to a storage, got {pid}")
        if key not in self.storages:
            data = self.archive.read(member)
            if len(data) != count * dtype.itemsize:
                raise pickle.UnpicklingError(
                    f"{member} must hold {count} numbers of type {dtype}, got {len(data)} bytes"
                )
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if data else empty
        return self.storages[key]


def _same(value: Any, *_: Any) -> Any:
    return value


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    if not isinstance(storage, Tensor):
        raise pickle.UnpicklingError(f"expected a tensor's storage, got {type(storage).__name__}")
    if math.prod(size) > storage.numel():
        raise pickle.UnpicklingError(f"a tensor of {tuple(size)} doesn't fit into {storage.numel()} numbers")
    # torch refuses strides and offsets that reach beyond the storage.
    return storage.as_strided(size, stride, offset).contiguous()


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip archive with compiled code, as `torch.jit.save` writes them."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript module under their dotted names, in their order in the file.

    The code in the archive is neither compiled nor run: only its `data.pkl` is read, by an unpickler that
    knows tensors and turns every object into an inert dictionary.

    Raises:
        ValueError: if the file is broken, or asks for anything but tensors and objects of its own.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            roots = [
                name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")
            ]
            if len(roots) != 1:
                raise ValueError(f"it has {len(roots)} files data.pkl, expected one")
            data = [info for info in archive.infolist() if info.filename.startswith(f"{roots[0]}/data")]
            if any(info.compress_type != zipfile.ZIP_STORED for info in data):
                raise ValueError("its data are compressed, which torch doesn't do")
            order = f"{roots[0]}/byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("its numbers aren't little-endian")
            tree = _ScriptUnpickler(archive, roots[0]).load()
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        struct.error,
        EOFError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        ValueError,
        RuntimeError,
    ) as error:
        raise ValueError(f"can't read the weights of the TorchScript file {path}: {error}") from error
    return dict(_tensors(tree, "", ()))


def _tensors(value: object, name: str, parents: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, ScriptObject) and id(value) not in parents:
        for key, child in value.attributes.items():
            yield from _tensors(child, f"{name}.{key}" if name else key, (*parents, id(value)))
