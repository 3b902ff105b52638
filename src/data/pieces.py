"""Finished pieces of a long job, on the disk, so that it goes on after an interruption."""

import hashlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .storage import atomic_path, load_tensors, remove, save_tensors


class Pieces:
    """Tensors by name in a folder of their own; what is damaged there counts as missing.

    Args:
        folder: made when the first piece comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, on the CPU, if it is there as it was put, and finite."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            kept = load_tensors(path)
            piece, checksum = kept["piece"], kept["checksum"]
        except (OSError, ValueError, KeyError):
            return None
        if not torch.equal(checksum, _checksum(piece)) or not piece.isfinite().all():
            return None
        return piece

    def put(self, name: str, piece: Tensor) -> None:
        """Keeps a tensor; raises OSError if the disk refuses it."""
        with atomic_path(self._path(name), durable=False) as part:
            piece = piece.detach().cpu().contiguous()
            save_tensors({"piece": piece, "checksum": _checksum(piece)}, part)

    def remove(self) -> None:
        """Removes all pieces."""
        with suppress(OSError):
            remove(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _checksum(piece: Tensor) -> Tensor:
    """SHA-256 of a tensor's type, shape and bytes, uint8 ``32``."""
    digest = hashlib.sha256(f"{piece.dtype} {tuple(piece.shape)}".encode())
    digest.update(piece.flatten().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
