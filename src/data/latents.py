"""Encoded clips on disk: the normalised posterior of each, so that the diffusion stage needs no encoder."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from .sampler import EndlessOrder, LatentBatch
from .storage import atomic_path, exclusive, read_json, save_tensors, write_json

FORMAT = 2

# What must agree between the latents on disk and who writes or reads them: the autoencoder's hash, the data's
# fingerprint, stride, resolution and whatever else the caller cares for. JSON values only.
Metadata = Mapping[str, str | int | float | bool | Sequence[Any] | None]


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


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"can't write latents to {folder}: {error}. What is finished stays: make room there and give the "
            "same command again, or choose another folder"
        ) from error


@contextmanager
def writing_alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: another program that wants to write the same latents waits for these.

    Raises OSError if the folder can't be written to.
    """
    with ExitStack() as held:
        with _writing(folder):
            held.enter_context(exclusive(folder / ".lock"))
        yield


def _check_shape(content: Any, path: Path, kinds: Mapping[str, type]) -> None:
    """Refuses JSON that isn't a dictionary with these kinds of values; ValueError."""
    if not isinstance(content, dict) or not all(
        isinstance(content.get(k), kind) for k, kind in kinds.items()
    ):
        raise ValueError(
            f"{path} is damaged: expected a dictionary with {', '.join(kinds)}. Copy it again, or delete the "
            "folder to encode anew"
        )


def _is_whole(path: Path, num_clips: int) -> bool:
    """Whether a shard is there with all its bytes."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.get_slice("mean").get_shape()[0] == num_clips)
    except (OSError, SafetensorError):
        return False


class LatentWriter:
    """Write the posteriors of ``num_clips`` clips into safetensors shards of ``clips_per_shard`` clips.

    Each shard appears whole, in any order and from any process. ``index.json`` is written last: a folder
    without it isn't finished, and a writer with the same metadata goes on with the shards that are missing,
    in the size with which the folder was begun.

    Raises ValueError if the folder holds latents of something else, naming what differs, and OSError if it
    can't be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        metadata: Metadata,
        *,
        num_clips: int,
        clips_per_shard: int,
    ) -> None:
        if num_clips < 1 or clips_per_shard < 1:
            raise ValueError(
                f"num_clips and clips_per_shard must be at least 1, got {num_clips}, {clips_per_shard}"
            )
        self.folder = Path(folder)
        self.metadata = dict(metadata)
        self.num_clips = num_clips
        started = read_json(self.folder / "started.json")
        if started is None:
            if any(self.folder.glob("*.safetensors")):
                # Whose shards these are nobody can tell.
                raise ValueError(
                    f"{self.folder} holds safetensors files and no started.json, so it isn't known what they "
                    "are of. Delete the folder to encode anew, or choose another: latents=FOLDER"
                )
            started = {"format": FORMAT, "metadata": self.metadata, "clips_per_shard": clips_per_shard}
            with _writing(self.folder):
                write_json(self.folder / "started.json", started)
        else:
            kinds = {"format": int, "metadata": dict, "clips_per_shard": int}
            _check_shape(started, self.folder / "started.json", kinds)
            _refuse_mismatch(self.folder, {"format": started["format"]}, {"format": FORMAT})
            _refuse_mismatch(self.folder, started["metadata"], self.metadata)
        self.clips_per_shard = int(started["clips_per_shard"])

    @property
    def num_shards(self) -> int:
        """How many shards the whole will have."""
        return -(-self.num_clips // self.clips_per_shard)

    def clips_of(self, shard: int) -> range:
        """The numbers of a shard's clips."""
        begin = shard * self.clips_per_shard
        return range(begin, min(begin + self.clips_per_shard, self.num_clips))

    def is_written(self, shard: int) -> bool:
        """Whether a shard has got its name, which it gets when it is whole."""
        return (self.folder / _shard_name(shard)).exists()

    def missing(self) -> list[int]:
        """The shards that aren't on the disk or, after a loss of power perhaps, not whole."""
        return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]

    def write(self, shard: int, mean: Tensor, std: Tensor, label: Tensor) -> None:
        """Write a shard: its clips' normalised posterior mean, deviation ``b c t h w``, label int64 ``b``.

        A label of −1 stands for none.
        """
        if mean.ndim != 5 or mean.shape != std.shape or label.shape != mean.shape[:1]:
            raise ValueError(
                "expected mean and std b c t h w and label b, got "
                f"{tuple(mean.shape)}, {tuple(std.shape)}, {tuple(label.shape)}"
            )
        if len(mean) != len(self.clips_of(shard)):
            raise ValueError(f"shard {shard} is of {len(self.clips_of(shard))} clips, got {len(mean)}")
        tensors = {"mean": mean.detach(), "std": std.detach(), "label": label}
        with _writing(self.folder), atomic_path(self.folder / _shard_name(shard)) as part:
            save_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)

    def finish(self) -> None:
        """Write the index that completes the folder; ValueError if shards are missing."""
        missing = self.missing()
        if missing:
            raise ValueError(
                f"{len(missing)} of {self.num_shards} shards are missing in {self.folder}: {missing[:10]}"
            )
        counts = [len(self.clips_of(shard)) for shard in range(self.num_shards)]
        with _writing(self.folder):
            write_json(
                self.folder / "index.json", {"format": FORMAT, "metadata": self.metadata, "shards": counts}
            )

    def remove_leftovers(self) -> None:
        """Delete what a writer that was killed had begun; no other may be at work."""
        for part in self.folder.glob(".*.part"):
            part.unlink(missing_ok=True)

    def _is_whole(self, shard: int) -> bool:
        return _is_whole(self.folder / _shard_name(shard), len(self.clips_of(shard)))


def _shard_name(number: int) -> str:
    return f"{number:05d}.safetensors"


class LatentDataset(Dataset[dict[str, Any]]):
    """Encoded clips, without end.

    ``dataset[position]`` is a dict of ``mean`` and ``std`` (float32 ``c t h w``), ``label`` and ``position``.
    The order is that of ``ClipDataset``: epoch ``position // len(dataset)``, a permutation fixed by (seed,
    epoch). Shards are opened when they are first read, in each process its own.

    ``expected`` is what the latents must be of. Raises FileNotFoundError if the folder holds none or isn't
    finished, ValueError if they are of something else, and where a damaged shard is read.
    """

    def __init__(self, folder: str | Path, expected: Metadata, *, seed: int) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json")
        if index is None:
            started = (self.folder / "started.json").exists()
            state = "are not finished" if started else "are not there"
            raise FileNotFoundError(
                f"the latents in {self.folder} {state} (no index.json). Encode them:\n"
                "    python -m src.encode +experiment=NAME\nThe same command goes on where it stopped."
            )
        kinds = {"format": int, "metadata": dict, "shards": list}
        _check_shape(index, self.folder / "index.json", kinds)
        _refuse_mismatch(self.folder, {"format": index["format"]}, {"format": FORMAT})
        _refuse_mismatch(self.folder, index["metadata"], expected)
        self.metadata: dict[str, Any] = index["metadata"]
        self.seed = seed
        self._begins: list[int] = list(accumulate(index["shards"], initial=0))
        self._order = EndlessOrder(self._begins[-1], seed)
        self._open: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """How many clips were encoded: the length of an epoch."""
        return self._order.num_items

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """The shape (c, t, h, w) of a clip's latents."""
        _, c, t, h, w = self._shard(0)["mean"].shape
        return c, t, h, w

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self._clip(self._order.item(position)) | {"position": position}

    def missing(self) -> list[int]:
        """The shards that aren't there any more, or not whole."""
        counts = [end - begin for begin, end in pairwise(self._begins)]
        return [k for k, count in enumerate(counts) if not _is_whole(self.folder / _shard_name(k), count)]

    def describe(self, position: int) -> str:
        """Name the clip at a position, for messages."""
        return f"latents {self._order.item(position)} of {self.folder}"

    def held_out(self, index: int) -> dict[str, Any]:
        """Give clip ``index`` in the order of encoding."""
        return self._clip(index) | {"position": index}

    def on_device(self, device: torch.device | str) -> "ResidentLatents":
        """Read all clips to a device; ValueError if they are larger than its free memory."""
        first = self._shard(0)
        num_bytes = len(self) * sum(tensor[0].numel() * tensor.element_size() for tensor in first.values())
        free = _free_memory(torch.device(device))
        if num_bytes > free:
            raise ValueError(
                f"the latents in {self.folder} take {num_bytes / 1e9:.3g} GB, and {device} has "
                f"{free / 1e9:.3g} GB free; use latents_on_device=false"
            )
        whole = {
            name: torch.empty((len(self), *tensor.shape[1:]), dtype=tensor.dtype, device=device)
            for name, tensor in first.items()
        }
        for number, (begin, end) in enumerate(pairwise(self._begins)):
            for name, tensor in self._shard(number).items():
                whole[name][begin:end].copy_(tensor)
        return ResidentLatents(whole["mean"], whole["std"], whole["label"], self._order)

    def _shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, which lie in the file: only what is read of them comes into memory."""
        if number not in self._open:
            path = self.folder / _shard_name(number)
            num_clips = self._begins[number + 1] - self._begins[number]
            try:
                # Whole tensors that are indexed here: each slice that is asked for leaks some bytes.
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in ("mean", "std", "label")}
                if {len(tensor) for tensor in tensors.values()} != {num_clips}:
                    raise ValueError(f"it is not of {num_clips} clips")
            except (OSError, SafetensorError, ValueError) as error:
                raise ValueError(
                    f"the latents in {path} can't be read ({error}). Encode again, which makes what is "
                    "missing or damaged and leaves the rest:\n    python -m src.encode +experiment=NAME"
                ) from error
            self._open[number] = tensors
        return self._open[number]

    def _clip(self, index: int) -> dict[str, Any]:
        number = bisect_right(self._begins, index) - 1
        shard, place = self._shard(number), index - self._begins[number]
        return {
            "mean": shard["mean"][place].to(torch.float32, copy=True),
            "std": shard["std"][place].to(torch.float32, copy=True),
            "label": int(shard["label"][place]),
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


class ResidentLatents:
    """All encoded clips on one device, as they are on disk; see :meth:`LatentDataset.on_device`."""

    def __init__(self, mean: Tensor, std: Tensor, label: Tensor, order: EndlessOrder) -> None:
        self._mean, self._std, self._label = mean, std, label
        self._order = order

    def batches(self, sampler: Iterable[list[int]]) -> Iterator[LatentBatch]:
        """Give the batches that ``sampler.batches`` would load of the same positions, bit for bit."""
        for positions in sampler:
            items = torch.tensor([self._order.item(position) for position in positions])
            items = items.to(self._label.device, non_blocking=True)
            yield LatentBatch(
                self._mean[items].float(),
                self._std[items].float(),
                self._label[items],
                torch.tensor(positions),
            )


def _free_memory(device: torch.device) -> float:
    """Bytes that can still be had; infinite where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(available)
