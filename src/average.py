"""Another average of a finished run's weights: ``python -m src.average run=… sigma_rel=0.07 output=…``."""

import shutil
from pathlib import Path

from omegaconf import DictConfig

from .config import AverageConfig, ConfigError, verb


@verb("average", AverageConfig)
def main(cfg: DictConfig) -> None:
    """Writes the model folder of a run with an average of another length."""
    import torch

    from .data.storage import atomic_folder, load_tensors, save_tensors
    from .model_folder import read_config
    from .training.ema import reconstruction_weights

    run, output = Path(cfg.run), Path(cfg.output)
    if output.exists():
        raise FileExistsError(f"{output} exists already; choose another output, or remove it first")
    config = read_config(run / "model", remedy="")
    module = "unet" if config["kind"] == "diffusion" else "autoencoder"
    found = snapshots_of(run, module, cfg.step)
    last = max(step for step, _ in found)
    weights, distance = reconstruction_weights(list(found), cfg.step or last, cfg.sigma_rel)

    wanted = load_tensors(run / "model" / "weights.safetensors")
    total = {key: torch.zeros(value.shape, dtype=torch.float64) for key, value in wanted.items()}
    for weight, path in zip(weights.tolist(), found.values(), strict=True):
        for key, value in load_tensors(path).items():
            total[key] += weight * value
    averaged = {
        key: total[key].to(value.dtype) if value.is_floating_point() else value
        for key, value in wanted.items()
    }
    if module == "autoencoder":  # measured for the weights of the model, at the end of its training
        averaged |= {key: wanted[key] for key in ("latent_mean", "latent_std") if key in wanted}
    with atomic_folder(output) as part:
        shutil.copytree(run / "model", part, dirs_exist_ok=True)
        save_tensors(averaged, part / "weights.safetensors")
    print(
        f"of {len(found)} snapshots: a profile {distance:.2%} off that of sigma_rel={cfg.sigma_rel} at step "
        f"{cfg.step or last}: {output}"
    )


def snapshots_of(run: Path, module: str, step: int | None) -> dict[tuple[int, float], Path]:
    """Files of the snapshots up to a step, by step and relative length.

    Raises:
        FileNotFoundError: if there are none.
        ConfigError: if the step is before the first or after the last of them.
    """
    every = {}
    for path in sorted((run / "averages").glob(f"step_*/{module}@*.safetensors")):
        every[int(path.parent.name.removeprefix("step_")), float(path.stem.partition("@")[2])] = path
    if not every:
        raise FileNotFoundError(
            f"no snapshots of averages in {run / 'averages'}; train with ema=post_hoc, which keeps them"
        )
    first, last = (choice(at for at, _ in every) for choice in (min, max))
    if step is not None and not first <= step <= last:
        raise ConfigError(f"step={step}: the snapshots are of steps {first} to {last}; choose a step between")
    return {(at, length): path for (at, length), path in every.items() if step is None or at <= step}


if __name__ == "__main__":
    main()
