"""Fetch and check what other verbs need: ``python -m src.prepare dataset=ucf101``, ``… weights=i3d``."""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from .config import ConfigError, PrepareConfig, build, verb

if TYPE_CHECKING:
    from .data.clips import ClipDataset

COLUMNS = (
    "video", "split", "status", "class", "label", "frames", "fps", "variable_rate", "seconds", "height",
    "width", "bytes", "seek_points", "sha256",
)  # fmt: skip


@verb("prepare", PrepareConfig)
def main(cfg: DictConfig) -> None:
    """Installs weights, or reads a data set once so that training starts at once."""
    if cfg.weights is None and cfg.get("dataset") is None:
        raise ConfigError("nothing to prepare: give dataset=NAME or weights=i3d")
    if cfg.weights is not None:
        if cfg.weights != "i3d":
            raise ConfigError(f"unknown weights={cfg.weights}; known: i3d")
        from .metrics.i3d_weights import install_i3d

        print(f"I3D weights: {install_i3d()}")
    if cfg.get("dataset") is not None:
        prepare_dataset(cfg)


def prepare_dataset(cfg: DictConfig) -> None:
    """Reads every video, says what there is beside what there should be, and writes the index.

    Raises:
        ValueError: with ``dataset.strict``, if a published data set isn't complete.
    """
    from .data.shards import write_shards
    from .data.storage import atomic_path, cache_home

    if cfg.index and Path(cfg.index).is_dir():
        raise ConfigError(f"index={cfg.index} is a folder; give the name of a file, as index=videos.csv")
    datasets = {split: build(cfg.dataset, split=split, seed=0) for split in ("train", "test")}
    whole = build(cfg.dataset, split="all", seed=0, cache=None)
    for split, dataset in datasets.items():
        print(f"{split}: {dataset.summary()}")
    for count in whole.counts:
        print(f"  {count}")
    differing = [count for count in whole.counts if not count.complete]
    if differing and cfg.dataset.get("strict"):
        raise ValueError(
            f"{whole.name} isn't complete ({'; '.join(map(str, differing))}); complete it, or use "
            "dataset.strict=false to go on with what there is"
        )
    title = re.sub(r"\W+", "_", str(cfg.dataset._target_).rsplit(".", 1)[-1])
    index = Path(cfg.index) if cfg.index else cache_home() / "index" / f"{title}_{whole.fingerprint[:12]}.csv"
    with (
        atomic_path(index) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(index_rows(whole, datasets))
    print(f"index: {index} (fingerprint {whole.fingerprint})")
    if cfg.shards is not None:
        written = write_shards(whole, datasets, Path(cfg.shards), videos_per_shard=cfg.videos_per_shard)
        print(f"shards: {cfg.shards} ({written} written now, {len(whole.readable):,} videos)")


def index_rows(whole: "ClipDataset", splits: "dict[str, ClipDataset]") -> Iterator[dict[str, object]]:
    """A row for each video, readable or not: what it is and which splits it is in."""
    members = {name: {entry.path for entry in split.entries} for name, split in splits.items()}
    usable = {entry.path for entry in whole.entries}
    paths = [*(entry.path for entry in whole.readable), *whole.broken, *whole.left_out]
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    rows: dict[str, dict[str, object]] = {}
    for entry in whole.readable:
        inside = [name for name, paths in members.items() if entry.path in paths]
        height, width = entry.size or whole.resolution
        rows[entry.path] = {
            "split": "+".join(inside),
            "status": "ok" if entry.path in usable else "too short",
            "class": whole.classes[entry.label] if entry.label >= 0 else "",
            "label": entry.label,
            "frames": entry.num_frames,
            "fps": f"{entry.fps:.6g}",
            "variable_rate": entry.variable_rate,
            "seconds": f"{entry.duration:.3f}",
            "height": height,
            "width": width,
            "bytes": entry.num_bytes,
            "seek_points": " ".join(str(frame) for frame, _ in entry.seek_points),
            "sha256": entry.sha256,
        }
    for path, reason in whole.broken.items():
        rows[path] = {"status": f"broken: {reason}"}
    for path, reason in whole.left_out.items():
        rows[path] = {"status": f"left out: {reason}"}
    for path, row in sorted(rows.items()):
        yield {"video": os.path.relpath(path, root)} | row


if __name__ == "__main__":
    main()
