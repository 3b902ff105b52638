"""How near few steps come to many, on a trained model: `python -m benchmarks.samplers FOLDER`.

From the same start noises every sampler makes latents; told is their root mean square distance to those of
1,000 steps of DDIM (normalized latents have deviation 1), and how often the network was called. Nothing is
given, classes take turns by seed. Deterministic samplers only: fresh noise leads elsewhere by right.
"""

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from src.diffusion import samplers
from src.diffusion.samplers import Sampler
from src.model_folder import load_diffusion
from src.sample import labels_of

COMPARED: dict[str, Sampler] = {
    "DDIM, 10 steps": partial(samplers.ddim, num_sampling_steps=10, eta=0.0),
    "DDIM, 20 steps": partial(samplers.ddim, num_sampling_steps=20, eta=0.0),
    "DDIM, 50 steps": partial(samplers.ddim, num_sampling_steps=50, eta=0.0),
    "DDIM, 100 steps": partial(samplers.ddim, num_sampling_steps=100, eta=0.0),
    "DPM-Solver++(2M), 10 steps": partial(samplers.dpm_solver, num_sampling_steps=10, spacing="log_snr"),
    "DPM-Solver++(2M), 20 steps": partial(samplers.dpm_solver, num_sampling_steps=20, spacing="log_snr"),
    "DPM-Solver++(2M), 50 steps": partial(samplers.dpm_solver, num_sampling_steps=50, spacing="log_snr"),
    "DPM-Solver++(2M), 20 steps in time": partial(samplers.dpm_solver, num_sampling_steps=20, spacing="time"),
    "Heun, 10 steps": partial(samplers.heun, num_sampling_steps=10, rho=7.0),
    "Heun, 25 steps": partial(samplers.heun, num_sampling_steps=25, rho=7.0),
}
REFERENCE: Sampler = partial(samplers.ddim, num_sampling_steps=1000, eta=0.0)


class Counted(nn.Module):
    """A network that counts its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, *arguments: Tensor, **told: Tensor | None) -> Tensor:
        """What the network says."""
        self.calls += 1
        return self.network(*arguments, **told)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a diffusion model's folder")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--output", type=Path, help="JSON file, for example benchmarks/results/samplers.json")
    options = parser.parse_args()
    model = load_diffusion(str(options.model))
    network = Counted(model.unet)
    model.unet = network
    seeds = list(range(options.num_samples))

    def latents(sampler: Sampler) -> Tensor:
        network.calls = 0
        generator = model.generator(sampler, guidance_scale=1.0, noise_level=0)
        return generator.sample_window(seeds, labels_of(model, seeds, None))

    reference = latents(REFERENCE)
    rows: dict[str, dict[str, float]] = {}
    for name, sampler in COMPARED.items():
        began = time.perf_counter()
        distance = (latents(sampler) - reference).square().flatten(1).mean(1).sqrt()
        rows[name] = {
            "calls": network.calls,
            "mean_distance": round(float(distance.mean()), 4),
            "largest_distance": round(float(distance.max()), 4),
            "seconds": round(time.perf_counter() - began, 2),
        }
        print(f"{name:36} {rows[name]}", flush=True)
    if options.output is not None:
        record = {
            "command": f"python -m benchmarks.samplers {options.model} --num-samples {options.num_samples}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": {"cpu": cpu(), "cores": os.cpu_count(), "torch": torch.__version__},
            "model": {
                "data": model.data.name,
                "step": model.step,
                "predicts": model.parameterization.prediction_type,
            },
            "deviation_of_reference": round(float(reference.std()), 4),
            "distances": rows,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


if __name__ == "__main__":
    main()
