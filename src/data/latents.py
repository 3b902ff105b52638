"""Encoded clips on disk: the normalised posterior of each, so that the diffusion stage needs no encoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from .sampler import EndlessOrder
from .storage import atomic_path, read_json, save_tensors, write_json

FORMAT = 1

# What must agree between the latents on disk and who writes or reads them: the autoencoder's hash, the data's
# fingerprint, stride, resolution and whatever else the caller cares for. JSON values only.
Metadata = Mapping[str, str | int | float | bool | Sequence[int] | None]


def _refuse_mismatch(folder: Path, found: Metadata, expected: Metadata) -> None:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    keys = [key for key in {**found, **expected} if plain(found.get(key)) != plain(expected.get(key))]
    if keys:
        changes = "\n".join(f"    {key}: {found.get(key)} -> {expected.get(key)}" for key in keys)
        raise ValueError(
            f"the latents in {folder} are of something else:\n{changes}\n"
            "Delete the folder to encode anew, or choose another: latents=FOLDER"
        )


class LatentWriter:
    """Write the posteriors of clips, batch by batch, into safetensors shards of ``clips_per_shard`` clips.

    Each shard appears whole, and ``index.json`` is written last: a folder without it isn't finished, and a
    writer with the same metadata goes on where the last one stopped, at clip ``num_written``.

    Raises ValueError if the folder holds latents of something else, naming what differs.
    """

    def __init__(self, folder: str | Path, metadata: Metadata, *, clips_per_shard: int = 4096) -> None:
        self.folder = Path(folder)
        self.metadata = dict(metadata)
        self.clips_per_shard = clips_per_shard
        self._mean: list[Tensor] = []
        self._std: list[Tensor] = []
        self._label: list[Tensor] = []
        started = read_json(self.folder / "started.json")
        if started is None:
            write_json(
                self.folder / "started.json", {"format": FORMAT, "metadata": self.metadata, "shards": []}
            )
            self._shards: list[int] = []
        else:
            _refuse_mismatch(self.folder, started["metadata"], self.metadata)
            self._shards = started["shards"]

    @property
    def num_written(self) -> int:
        """How many clips are safe on disk."""
        return sum(self._shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def write(self, mean: Tensor, std: Tensor, label: Tensor) -> None:
        """Append clips: normalised posterior mean, deviation ``b c t h w``, label int64 ``b`` (−1: none)."""
        if mean.ndim != 5 or mean.shape != std.shape or label.shape != mean.shape[:1]:
            raise ValueError(
                "expected mean and std b c t h w and label b, got "
                f"{tuple(mean.shape)}, {tuple(std.shape)}, {tuple(label.shape)}"
            )
        self._mean += mean.detach().cpu().unbind()
        self._std += std.detach().cpu().unbind()
        self._label += label.cpu().unbind()
        while len(self._mean) >= self.clips_per_shard:
            self._flush(self.clips_per_shard)

    def close(self) -> None:
        """Write what is left and the index that completes the folder; ValueError if there are no clips."""
        if self._mean:
            self._flush(len(self._mean))
        if not self._shards:
            raise ValueError(f"no latents were written to {self.folder}")
        write_json(
            self.folder / "index.json",
            {"format": FORMAT, "metadata": self.metadata, "shards": self._shards},
        )

    def _flush(self, count: int) -> None:
        tensors = {
            "mean": torch.stack(self._mean[:count]).contiguous(),
            "std": torch.stack(self._std[:count]).contiguous(),
            "label": torch.stack(self._label[:count]),
        }
        shard = self.folder / _shard_name(len(self._shards))
        try:
            with atomic_path(shard) as part:
                save_tensors(tensors, part)
        except SafetensorError as error:
            raise OSError(f"can't write the latents to {shard}: {error}") from error
        self._shards.append(count)
        write_json(
            self.folder / "started.json",
            {"format": FORMAT, "metadata": self.metadata, "shards": self._shards},
        )
        del self._mean[:count], self._std[:count], self._label[:count]


def _shard_name(number: int) -> str:
    return f"{number:05d}.safetensors"


class LatentDataset(Dataset[dict[str, Any]]):
    """Encoded clips, without end.

    ``dataset[position]`` is a dict of ``mean`` and ``std`` (float32 ``c t h w``), ``label`` and ``position``.
        The order is that of ``ClipDataset``: epoch ``position // len(dataset)``, a permutation fixed by
        (seed,
    epoch). Shards are opened when they are first read, in each process its own.

    ``expected`` is what the latents must be of. Raises FileNotFoundError if the folder holds none or isn't
    finished, ValueError if they are of something else.
    """

    def __init__(self, folder: str | Path, expected: Metadata, *, seed: int) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json")
        if index is None or index.get("format") != FORMAT:
            started = (self.folder / "started.json").exists()
            state = "are not finished" if started else "are not there"
            raise FileNotFoundError(
                f"the latents in {self.folder} {state} (no index.json). Encode them:\n"
                "    python -m src.encode +experiment=NAME\nThe same command goes on where it stopped."
            )
        _refuse_mismatch(self.folder, index["metadata"], expected)
        self.metadata: dict[str, Any] = index["metadata"]
        self.seed = seed
        self._shards: list[int] = index["shards"]
        self._order = EndlessOrder(sum(self._shards), seed)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        """How many clips were encoded: the length of an epoch."""
        return self._order.num_items

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """The shape (c, t, h, w) of a clip's latents."""
        _, c, t, h, w = self._shard(0).get_slice("mean").get_shape()
        return c, t, h, w

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self._clip(self._order.item(position)) | {"position": position}

    def describe(self, position: int) -> str:
        """Name the clip at a position, for messages."""
        return f"latents {self._order.item(position)} of {self.folder}"

    def held_out(self, index: int) -> dict[str, Any]:
        """Give clip ``index`` in the order of encoding."""
        return self._clip(index) | {"position": index}

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = safe_open(self.folder / _shard_name(number), framework="pt")
        return self._open[number]

    def _clip(self, index: int) -> dict[str, Any]:
        number = 0
        while index >= self._shards[number]:
            index -= self._shards[number]
            number += 1
        shard = self._shard(number)
        return {
            "mean": shard.get_slice("mean")[index].float(),
            "std": shard.get_slice("std")[index].float(),
            "label": int(shard.get_slice("label")[index : index + 1]),
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}
