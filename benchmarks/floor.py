"""What real videos score against other real ones, by their number: `python -m benchmarks.floor`.

I3D features of the embedded data set are taken once (features of other data: --root, any folder of videos);
then pairs of disjoint sets of N videos are compared, and their mean distance stands beside the law of 1/N
through the largest N. It is what `fvd_fast@N` has to be read against.
"""

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from src.config import CONF, build
from src.data.choice import order_of_videos
from src.evaluation.comparing import chosen_clips
from src.evaluation.measuring import Measuring
from src.metrics.features import load_extractor
from src.metrics.frechet import GaussianStatistics, frechet_distance
from src.metrics.uncertainty import convert_floor
from src.training.share import Share


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=int, default=512)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--root", help="a folder of videos; without it the embedded data set")
    parser.add_argument("--output", type=Path, help="JSON file, for example benchmarks/results/floor.json")
    options = parser.parse_args()
    name = "synthetic" if options.root is None else "folder"
    overrides = [f"dataset={name}", f"dataset.resolution={options.resolution}", "model=x"]
    overrides += ["dataset.num_frames=16", "dataset.frame_stride=1", "dataset.cache=null"]
    if options.root is not None:
        overrides += [f"dataset.root='{options.root}'", "dataset.test_fraction=0"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("evaluate", overrides=overrides).dataset
    dataset = build(node, split="train", seed=0)
    extractor = load_extractor("i3d", resize="squash")
    count = min(options.videos, len(dataset))
    items = order_of_videos([0] * len(dataset), "shuffled", 0)[:count]
    clips = chosen_clips(dataset, items, "random", 0, "real", dataset.fingerprint)
    features = Measuring(Share(), 16, torch.device("cpu")).clips(clips, extractor, None)["features"]

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        sides = [GaussianStatistics(features.shape[1]).update(side) for side in (a, b)]
        return frechet_distance(sides[0], sides[1])

    rows: list[dict[str, Any]] = []
    size = count // 2
    largest = distance(features[:size], features[size : 2 * size])
    while size >= 16:
        pairs = [
            distance(features[begin : begin + size], features[begin + size : begin + 2 * size])
            for begin in range(0, count - 2 * size + 1, 2 * size)
        ]
        law = convert_floor(largest, (count // 2, count // 2), (size, size))
        rows.append({"videos": size, "floor": sum(pairs) / len(pairs), "pairs": len(pairs), "law": law})
        size //= 2
    record = {
        "command": "python -m benchmarks.floor",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "options": {"videos": count, "resolution": options.resolution, "data": name},
        "fingerprint": dataset.fingerprint,
        "rows": rows,
    }
    print(f"{'N':>6} {'floor':>10} {'of pairs':>9} {'by 1/N':>10}")
    for row in rows:
        print(f"{row['videos']:6} {row['floor']:10.1f} {row['pairs']:9} {row['law']:10.1f}")
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
