"""Encode clips once, for the training of a diffusion model: ``python -m src.encode model=… output=…``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from .config import ConfigError, EncodeConfig, MachineSettings, build, typed, verb

# Which clips are encoded doesn't depend on a run's seed: runs of several seeds share the latents.
ENCODING_SEED = 0

if TYPE_CHECKING:
    import torch

    from .data.clips import ClipDataset
    from .data.latents import LatentDataset


@verb("encode", EncodeConfig)
def main(cfg: DictConfig) -> None:
    """Writes the normalised posteriors of random clips of each training video."""
    from .evaluate import clip_geometry
    from .model_folder import autoencoder_config, data_record
    from .training.device import pick_device

    typed(cfg, "machine", MachineSettings)
    _, config = autoencoder_config(cfg.model)
    dataset = build(clip_geometry(cfg.dataset, data_record(config)), split="train", seed=ENCODING_SEED)
    print(dataset.summary())
    latents = encode(
        dataset,
        cfg.model,
        Path(cfg.output),
        clips_per_video=cfg.clips_per_video,
        batch_size=cfg.batch_size,
        order_seed=ENCODING_SEED,
        device=pick_device(),
    )
    print(f"{len(latents):,} clips of latents {latents.latent_shape}: {cfg.output}")


def encode(
    dataset: "ClipDataset",
    autoencoder_folder: str,
    folder: Path,
    *,
    clips_per_video: int,
    batch_size: int,
    order_seed: int,
    device: "torch.device",
) -> "LatentDataset":
    """Encodes what isn't encoded yet, and opens the result in the order of ``order_seed``.

    Raises:
        ValueError: if the folder holds latents of other data or of another autoencoder.
    """
    import torch
    from tqdm import tqdm

    from .data.latents import LatentDataset, LatentWriter
    from .data.sampler import Batch, collate, to_batch
    from .model_folder import autoencoder_config, fingerprint, load_autoencoder

    if clips_per_video < 1:
        raise ConfigError(f"clips_per_video must be at least 1, got {clips_per_video}")
    path, _ = autoencoder_config(autoencoder_folder)
    metadata: dict[str, Any] = {
        "autoencoder_sha256": fingerprint(path),
        "dataset_fingerprint": dataset.fingerprint,
        "num_frames": dataset.num_frames,
        "frame_stride": dataset.frame_stride,
        "resolution": list(dataset.resolution),
        "horizontal_flip": dataset.horizontal_flip,
        "crop": dataset.resize.mode,
        "clips_per_video": clips_per_video,
        "dataset_seed": dataset.seed,
    }
    if not (folder / "index.json").exists():
        autoencoder = load_autoencoder(autoencoder_folder).to(device)
        total = len(dataset) * clips_per_video
        with LatentWriter(folder, metadata) as writer, torch.no_grad():
            done = writer.num_written
            with tqdm(total=total, initial=done, unit="clip", desc="encoding") as bar:
                for start in range(done, total, batch_size):
                    items = [dataset[position] for position in range(start, min(start + batch_size, total))]
                    batch = to_batch(collate(items), device)
                    assert isinstance(batch, Batch)
                    posterior = autoencoder.encode(batch.video)
                    scale = autoencoder.latent_std.view(-1, 1, 1, 1)
                    writer.write(autoencoder.normalize(posterior.mean), posterior.std / scale, batch.label)
                    bar.update(len(items))
    return LatentDataset(folder, metadata, seed=order_seed)


if __name__ == "__main__":
    main()
