"""Steps of the diffusion stage from pixels and from latents: `python -m benchmarks.latents`.

The demo's network and autoencoder (untrained: the numbers don't matter) on the embedded data set. Each way of
getting batches is asked in turn for some steps, in an order that is drawn anew in each round; printed are
medians of steps a second, and of the ratios to the steps from pixels of the same round. Everything is loaded
in the training process, so that all ways have the same cores. Encoding itself is timed once.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from src.config import CONF, build
from src.data.sampler import Batch, LatentBatch, PositionSampler, batches
from src.encode import encode
from src.model_folder import DataRecord, save_autoencoder
from src.train import stage_of
from src.training.device import make_accelerator
from src.training.share import Share

LOADING: dict[str, Any] = {"num_workers": 0, "pin_memory": False, "prefetch_factor": 2}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of each way in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--unet", default="small", choices=("tiny", "small"))
    parser.add_argument("--output", type=Path, help="JSON file, for example benchmarks/results/latents.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        record = measure(Path(name), options)
    print(json.dumps(record, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


def composed(*overrides: str) -> Any:
    """A training config."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The record of one run in a folder of its own."""
    node = {**composed("+experiment=demo_autoencoder").autoencoder}
    data = DataRecord("synthetic", "", 16, 1, [32, 32], 8.0, [])
    save_autoencoder(folder / "autoencoder", build(node).state_dict(), node=node, data=data, step=0)
    cfg = composed(
        "+experiment=demo", f"unet={options.unet}", f"autoencoder_from={folder}/autoencoder",
        f"dataset.root={folder}/data", f"dataset.cache={folder}/cache",
        f"dataset.num_videos={options.videos}", "dataset.num_test_videos=1",
    )  # fmt: skip
    cached = build(cfg.dataset, split="train", seed=0)
    decoded = build({**cfg.dataset, "cache": None}, split="train", seed=0)
    accelerator, _ = make_accelerator(
        precision="no", tf32=False, batch_size=options.batch_size, micro_batch_size=None
    )
    stage, _ = stage_of(cfg, cached, accelerator)
    network = stage.modules["unet"]
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    began = time.perf_counter()
    latents = encode(
        cached, f"{folder}/autoencoder", folder / "latents", clips_per_video=2, batch_size=16, order_seed=0,
        device=accelerator.device, loading=LOADING, share=Share(),
    )  # fmt: skip
    encoding = time.perf_counter() - began
    sampler = PositionSampler(global_batch_size=options.batch_size, micro_batch_size=options.batch_size)

    def loaded(dataset: Any) -> Iterator[Batch | LatentBatch]:
        return batches(dataset, sampler, device=accelerator.device, **LOADING)

    ways: dict[str, Iterator[Batch | LatentBatch]] = {
        "pixels, decoded": loaded(decoded),
        "pixels, cached": loaded(cached),
        "latents, loaded": loaded(latents),
        "latents, in memory": latents.on_device(accelerator.device).batches(sampler),
    }

    def steps_per_second(source: Iterator[Batch | LatentBatch]) -> float:
        began = time.perf_counter()
        for step in range(options.steps):
            for update in stage.updates(stage.modules, next(source), step):
                accelerator.backward(update.loss)
                optimizer.step()
                optimizer.zero_grad()
        return options.steps / (time.perf_counter() - began)

    draw = random.Random(0)
    rounds: list[dict[str, float]] = []
    for _ in range(options.rounds + 1):
        names = list(ways)
        draw.shuffle(names)
        rounds.append({name: steps_per_second(ways[name]) for name in names})
    rounds = rounds[1:]  # the first warms up
    return {
        "command": "python -m benchmarks.latents",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "device": str(accelerator.device),
        },
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "clips": "16 frames of 32x32",
        "steps_per_second": {
            name: round(statistics.median(row[name] for row in rounds), 3) for name in ways
        },
        "times_the_steps_from_cached_pixels": {
            name: round(statistics.median(row[name] / row["pixels, cached"] for row in rounds), 3)
            for name in ways
        },
        "encoded_clips_per_second": round(len(latents) / encoding, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
