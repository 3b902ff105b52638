"""Our U-Net beside diffusers' at equal parameters, in one run: `python -m benchmarks.unet`.

Each network lives in a process of its own, so that its peak memory is its own; the two are asked in turn, so
that a busy machine slows both. Printed are medians, and the median of the ratios of neighbouring repetitions.
The other is `UNet3DConditionModel`: residual blocks of spatial and temporal convolutions, spatial attention
with cross-attention (here to a single token of zeros), temporal attention without relative position. Its
widths are the multiples of 32 that come nearest to our number of parameters. Memory freed is kept by both
processes (`keep_freed_memory`). The first repetition of each pass isn't counted.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

# Before torch is imported: threads that wait in a busy loop would disturb the other process.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from torch import Tensor, nn

from src.metrics.reconstruction import declare_torchvision_operators
from src.models.attention import AttentionBlock, View
from src.models.unet import UNet3d
from src.training.device import keep_freed_memory

SIZES = {
    # Channels, multiples a level, residual blocks a level, attention's downsamplings, latents b c t h w.
    "small": (96, (1, 2, 4), 2, (2, 4), (4, 4, 4, 16, 16)),
    "official": (256, (1, 2, 3, 4), 3, (2, 4, 8), (1, 4, 4, 32, 32)),
}
VIEWS: dict[str, tuple[View, ...]] = {"factorized": ("spatial", "temporal"), "joint": ("joint",)}
NUM_HEADS = 4
TEXT_CHANNELS = 32
TOLERANCE = 0.03


def ours(size: str, attention: str) -> UNet3d:
    """Our network, with attention in the given views."""
    channels, mult, blocks, downsamples, _ = SIZES[size]
    return UNet3d(
        in_channels=4,
        out_channels=4,
        model_channels=channels,
        channel_mult=mult,
        num_res_blocks=blocks,
        attention_downsamples=downsamples,
        num_heads=NUM_HEADS,
        attention=partial(AttentionBlock, views=VIEWS[attention]),
    )


@cache
def peer() -> Callable[..., Any]:
    """The other network's constructor; diffusers imports torchvision, which may need help."""
    declare_torchvision_operators()
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel


def diffusers_unet(size: str, widths: tuple[int, ...]) -> nn.Module:
    """The other network, of the same levels, blocks and heads, with the given widths."""
    _, _, blocks, downsamples, _ = SIZES[size]
    attends = [2**level in downsamples for level in range(len(widths))]
    return peer()(
        down_block_types=tuple("CrossAttnDownBlock3D" if a else "DownBlock3D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock3D" if a else "UpBlock3D" for a in reversed(attends)),
        block_out_channels=widths,
        layers_per_block=blocks,
        cross_attention_dim=TEXT_CHANNELS,
        attention_head_dim=NUM_HEADS,
    )


def count(network: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def equal_widths(size: str, wanted: int) -> tuple[int, ...]:
    """Multiples of 32, nearly in our ratios, at which the other network has nearest to `wanted` parameters.

    Raises:
        ValueError: if none comes within the tolerance.
    """
    _, mult, _, _, _ = SIZES[size]

    def of(widths: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return count(diffusers_unet(size, widths))

    base = min((32 * k for k in range(1, 13)), key=lambda b: abs(of(tuple(m * b for m in mult)) - wanted))
    options = [
        tuple(m * base + 32 * step for m, step in zip(mult, steps, strict=True))
        for steps in itertools.product((0,), *[(-1, 0, 1, 2)] * (len(mult) - 1))
    ]
    best = min(options, key=lambda widths: abs(of(widths) - wanted))
    if abs(of(best) / wanted - 1) > TOLERANCE:
        raise ValueError(
            f"widths {best} give {of(best):,} parameters, not within {TOLERANCE:.0%} of {wanted:,}"
        )
    return best


def peak_gib(device: str) -> float:
    """Peak memory so far: of the process on a CPU, of what was allocated on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def work(name: str, options: argparse.Namespace) -> None:
    """Serves one network: reads `forward` or `training`, answers with seconds and peak memory so far."""
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    *_, shape = SIZES[options.size]
    if name == "ours":
        network: nn.Module = ours(options.size, options.attention)
    else:
        with torch.device("meta"):  # or else our weights would count in the other's peak
            wanted = count(ours(options.size, options.attention))
        network = diffusers_unet(options.size, equal_widths(options.size, wanted))
    network.to(options.device)
    x = torch.randn(shape, device=options.device)
    target, timesteps = torch.randn_like(x), torch.full(shape[:1], 500, device=options.device)
    text = torch.zeros(shape[0], 1, TEXT_CHANNELS, device=options.device)
    half = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]

    def predict() -> Tensor:
        with nullcontext() if half is None else torch.autocast(options.device, half):
            return network(x, timesteps, text).sample if name == "diffusers" else network(x, timesteps)

    def forward() -> None:
        with torch.no_grad():
            predict()

    def training() -> None:
        network.zero_grad()
        (predict().float() - target).abs().mean().backward()

    jobs: dict[str, Callable[[], None]] = {"forward": forward, "training": training}
    start = {"parameters": count(network), "peak_gib": peak_gib(options.device)}
    print(json.dumps(start), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        jobs[line.strip()]()
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "peak_gib": peak_gib(options.device)}), flush=True)


def ask(worker: "subprocess.Popen[str]", job: str) -> dict[str, float]:
    """What a worker answers to a job; with an empty one, what it tells at its start."""
    assert worker.stdin is not None and worker.stdout is not None
    if job:
        worker.stdin.write(f"{job}\n")
        worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise RuntimeError(f"a benchmarked process ended with status {worker.wait()}; its message is above")
    return json.loads(answer)


def compare(options: argparse.Namespace) -> dict[str, object]:
    """Medians, ratios and peaks of both networks, with what they were measured on."""
    command = [sys.executable, "-m", "benchmarks.unet", *sys.argv[1:], "--worker"]
    workers = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("ours", "diffusers")
    }
    starts = {name: ask(worker, "") for name, worker in workers.items()}
    results: dict[str, object] = {
        "parameters": {name: int(start["parameters"]) for name, start in starts.items()},
        "loaded_gib": {name: round(start["peak_gib"], 3) for name, start in starts.items()},
    }
    for job in ("forward", "training"):
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for _ in range(options.repeats + 1):
            for name, worker in workers.items():
                answers[name].append(ask(worker, job))
        seconds = {name: [answer["seconds"] for answer in of[1:]] for name, of in answers.items()}
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True)]
        results[job] = {
            "median_seconds": {name: round(statistics.median(of), 4) for name, of in seconds.items()},
            "peak_gib": {name: round(of[-1]["peak_gib"], 3) for name, of in answers.items()},
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    return results


def machine(device: str) -> dict[str, object]:
    """What the figures were measured on."""
    import diffusers

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--attention", choices=VIEWS, default="factorized", help="of ours")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file, for example benchmarks/results/unet.json")
    parser.add_argument("--worker", choices=("ours", "diffusers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options)
    before = machine(options.device)
    results = compare(options)
    *_, shape = SIZES[options.size]
    record = {
        "command": f"python -m benchmarks.unet {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": before,
        "input": shape,
        "options": {name: value for name, value in vars(options).items() if name not in ("worker", "output")},
        **results,
    }
    print(json.dumps(record, indent=1))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
