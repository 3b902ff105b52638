"""Finished pieces of a long job, on the disk, so that it goes on after an interruption."""

from contextlib import suppress
from pathlib import Path

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
        """The tensor of that name, on the CPU, if it is there."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            return load_tensors(path)["piece"]
        except (OSError, ValueError, KeyError):
            return None

    def put(self, name: str, piece: Tensor) -> None:
        """Keeps a tensor; raises OSError if the disk refuses it."""
        with atomic_path(self._path(name), durable=False) as part:
            save_tensors({"piece": piece.detach().cpu().contiguous()}, part)

    def remove(self) -> None:
        """Removes all pieces."""
        with suppress(OSError):
            remove(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
