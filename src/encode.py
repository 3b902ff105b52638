"""Encode clips once, for the training of a diffusion model: ``python -m src.encode +experiment=NAME``."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from .config import ConfigError, EncodeConfig, MachineSettings, build, flat, full_arguments, typed, verb

# Which clips are encoded doesn't depend on a run's seed: runs of several seeds share the latents.
ENCODING_SEED = 0
# A shard is what is lost at most when an encoding is killed, and what its processes share out.
CLIPS_PER_SHARD = 256

if TYPE_CHECKING:
    import torch

    from .data.clips import ClipDataset
    from .data.latents import LatentDataset, LatentWriter
    from .models.autoencoder import LatentSpace
    from .training.share import Share


@verb("encode", EncodeConfig)
def main(cfg: DictConfig) -> None:
    """Writes the normalised posteriors of random clips of each training video."""
    import torch

    from .evaluate import clip_geometry
    from .model_folder import autoencoder_config, data_record
    from .training.device import pick_device
    from .training.share import Share

    machine: MachineSettings = typed(cfg, "machine", MachineSettings)
    if cfg.model is None or cfg.output is None:
        raise ConfigError(
            f"model={cfg.model}, output={cfg.output}: give the folders of a trained autoencoder and of the "
            "latents, or +experiment=NAME of a diffusion model with latents=FOLDER"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = machine.tf32
    _, config = autoencoder_config(cfg.model)
    share = Share()
    with share.first_alone():
        dataset = build(clip_geometry(cfg.dataset, data_record(config)), split="train", seed=ENCODING_SEED)
    if share.rank == 0:
        print(dataset.summary())
    latents = encode(
        dataset,
        cfg.model,
        Path(cfg.output),
        clips_per_video=cfg.clips_per_video,
        batch_size=cfg.batch_size,
        order_seed=ENCODING_SEED,
        device=pick_device(),
        loading=machine.loading,
        share=share,
    )
    if share.rank == 0:
        print(f"{len(latents):,} clips of latents {latents.latent_shape}: {cfg.output}")
    share.close()


def metadata_of(dataset: "ClipDataset", autoencoder_folder: str, clips_per_video: int) -> dict[str, Any]:
    """All that decides what the latents of a data set are, for a reader to be told what differs."""
    from .model_folder import autoencoder_config, fingerprint

    path, config = autoencoder_config(autoencoder_folder)
    return {
        "autoencoder_sha256": fingerprint(path),
        # Equal weights can be computed with in several ways.
        **flat(full_arguments(config["autoencoder"]), "autoencoder"),
        "dataset_fingerprint": dataset.fingerprint,
        "num_frames": dataset.num_frames,
        "frame_stride": dataset.frame_stride,
        "target_fps": dataset.sampling.fps,
        "short_videos": dataset.sampling.short_videos,
        "resolution": list(dataset.resolution),
        "horizontal_flip": dataset.horizontal_flip,
        "crop": dataset.resize.mode,
        "clips_per_video": clips_per_video,
        "dataset_seed": dataset.seed,
    }


def encode(
    dataset: "ClipDataset",
    autoencoder_folder: str,
    folder: Path,
    *,
    clips_per_video: int,
    batch_size: int,
    order_seed: int,
    device: "torch.device",
    loading: dict[str, Any],
    share: "Share",
) -> "LatentDataset":
    """Encodes what isn't encoded yet or is damaged, and opens the result in the order of ``order_seed``.

    Latents number ``k · len(dataset) + i`` are of the clip that item i gets in the data set's epoch k. Items
    thereby stand in their own order, and a run that takes one clip of each meets the same videos at the same
    positions as a run on pixels does.

    The processes take the missing shards in turn. Batches never reach from one shard into the next, so that
    each has the same bytes whoever writes it, and in how many starts.

    Raises:
        ValueError: if the folder holds latents of other data or of another autoencoder.
        OSError: if it can't be written to; the shards that are finished stay.
    """
    from .data.latents import LatentDataset, LatentWriter, writing_alone
    from .model_folder import load_autoencoder

    if clips_per_video < 1 or batch_size < 1:
        raise ConfigError(
            f"clips_per_video and batch_size must be at least 1, got {clips_per_video}, {batch_size}"
        )
    metadata = metadata_of(dataset, autoencoder_folder, clips_per_video)
    sizes = {"num_clips": len(dataset) * clips_per_video, "clips_per_shard": CLIPS_PER_SHARD}

    def is_complete() -> bool:
        try:
            return (folder / "index.json").exists() and not LatentDataset(folder, metadata, seed=0).missing()
        except ValueError:
            return True  # though not of what is asked for, which every process is told below

    def begin() -> list[int] | None:
        """The missing shards; None if the latents are complete. Asked of one process, for all to agree."""
        if is_complete():
            return None
        writer = LatentWriter(folder, metadata, **sizes)
        writer.remove_leftovers()
        return writer.missing()

    complete = share.from_first(is_complete)
    if not complete:
        with writing_alone(folder) if share.rank == 0 else nullcontext():
            missing = share.from_first(begin)
            if missing is not None:
                writer = LatentWriter(folder, metadata, **sizes)
                autoencoder = load_autoencoder(autoencoder_folder).to(device)
                _write_shards(
                    writer,
                    missing,
                    dataset,
                    autoencoder,
                    batch_size,
                    device=device,
                    loading=loading,
                    share=share,
                )
                share.wait()
                if share.rank == 0:
                    writer.finish()
                share.wait()
    return LatentDataset(folder, metadata, seed=order_seed)


def _write_shards(
    writer: "LatentWriter",
    missing: list[int],
    dataset: "ClipDataset",
    autoencoder: "LatentSpace",
    batch_size: int,
    device: "torch.device",
    *,
    loading: dict[str, Any],
    share: "Share",
) -> None:
    """Writes this process's part of the missing shards; the first shows what all have written."""
    import torch
    from tqdm import tqdm

    from .data.sampler import Batch, batches

    def position(number: int) -> int:
        """Where in the data set's order the clip of these latents stands."""
        epoch, item = divmod(number, len(dataset))
        return dataset.position(item, epoch)

    mine = missing[share.rank :: share.world_size]
    others = set(missing) - set(mine)
    plan = {
        shard: [list(numbers[i : i + batch_size]) for i in range(0, len(numbers), batch_size)]
        for shard, numbers in ((shard, writer.clips_of(shard)) for shard in mine)
    }
    loaded = batches(
        dataset,
        [[position(number) for number in batch] for shard in mine for batch in plan[shard]],
        device=device,
        **loading,
    )
    scale = autoencoder.latent_std.view(-1, 1, 1, 1)
    num_missing = sum(len(writer.clips_of(shard)) for shard in missing)
    with (
        # Others' shards come in bursts: the rate is the mean since the start.
        tqdm(
            total=writer.num_clips,
            initial=writer.num_clips - num_missing,
            unit="clip",
            desc="encoding",
            smoothing=0,
            disable=share.rank > 0,
        ) as bar,
        torch.no_grad(),
    ):
        for shard in mine:
            means, deviations, labels = [], [], []
            for _ in plan[shard]:
                batch = next(loaded)
                assert isinstance(batch, Batch)
                posterior = autoencoder.encode(batch.video)
                means.append(autoencoder.normalize(posterior.mean).cpu())
                deviations.append((posterior.std / scale).cpu())
                labels.append(batch.label.cpu())
                bar.update(len(batch.label))
            writer.write(shard, torch.cat(means), torch.cat(deviations), torch.cat(labels))
            written = {other for other in others if writer.is_written(other)}
            others -= written
            bar.update(sum(len(writer.clips_of(other)) for other in written))
        share.wait()
        bar.update(sum(len(writer.clips_of(other)) for other in others))


if __name__ == "__main__":
    main()
