"""Train a stage: ``python -m src.train +experiment=ucf101``. The same command resumes."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from .config import (
    ConfigError,
    EmaSettings,
    LoggerSettings,
    MachineSettings,
    TrainConfig,
    TrainSettings,
    build,
    claim_run_folder,
    flat,
    run_folder,
    typed,
    verb,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from .data.clips import ClipDataset
    from .data.latents import ResidentLatents
    from .diffusion.conditioning import FrameMasking
    from .model_folder import DataRecord, Weights
    from .stages.stage import Stage
    from .training.ema import Averages
    from .training.interruption import StopRequests


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain Python."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@verb("train", TrainConfig)
def main(cfg: DictConfig) -> None:
    """Builds what the config names and hands it to the loop."""
    from .data.sampler import explained
    from .training.interruption import StopRequests

    try:
        with StopRequests() as requests:
            run(cfg, requests)
    except RuntimeError as error:
        meant = explained(error)
        if meant is error:
            raise
        raise meant from error


def run(cfg: DictConfig, requests: "StopRequests") -> None:
    """Trains what the config describes, until a request to stop or the end."""
    import torch

    from .data.sampler import Batch, LatentBatch, PositionSampler, batches, held_out_batches
    from .data.storage import held, remove_leftovers
    from .model_folder import step_of
    from .training.device import compile_in_place, make_accelerator
    from .training.loop import LoopSettings, train
    from .training.record import RunRecord
    from .training.tracker import Tracker

    settings: TrainSettings = typed(cfg, "train", TrainSettings)
    machine: MachineSettings = typed(cfg, "machine", MachineSettings)
    logger: LoggerSettings = typed(cfg, "logger", LoggerSettings)
    ema: EmaSettings = typed(cfg, "ema", EmaSettings)
    folder = run_folder(cfg)

    # Everything that can be wrong is found before the first step. A missing autoencoder is seen before much
    # data is read; missing data, which is told as fast, comes first.
    root = cfg.dataset.get("root")
    if cfg.autoencoder.get("folder") is not None and root is not None and Path(root).exists():
        from .model_folder import autoencoder_config

        autoencoder_config(cfg.autoencoder.folder)
    accelerator, micro_batch_size = make_accelerator(
        precision=machine.precision,
        tf32=machine.tf32,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
    )
    if accelerator.is_main_process:
        busy = f"{folder} is being trained already; wait for that run, stop it, or choose another name=…"
        requests.until_the_end(held(folder / ".lock", busy))
        remove_leftovers([folder, *folder.glob("previews/*")])
    with accelerator.main_process_first():
        dataset = build(cfg.dataset, split="train", seed=cfg.seed)
        held_out = build(cfg.dataset, split="test", seed=cfg.seed)
    accelerator.print(dataset.summary())
    torch.manual_seed(cfg.seed)
    stage, save_model = stage_of(cfg, dataset, accelerator)
    if machine.fsdp:
        check_shardable(stage, accelerator)
    if accelerator.is_main_process:
        claim_run_folder(cfg, folder)
    accelerator.wait_for_everyone()

    source: Any = dataset
    resident: ResidentLatents | None = None
    if cfg.get("latents") is not None:
        from .encode import ENCODING_SEED, encode
        from .training.share import Share

        source = encode(
            build(cfg.dataset, split="train", seed=ENCODING_SEED),
            cfg.autoencoder.folder,
            Path(cfg.latents),
            clips_per_video=cfg.clips_per_video,
            batch_size=min(settings.batch_size, settings.micro_batch_size or 16, 16),
            order_seed=cfg.seed,
            device=accelerator.device,
            loading=machine.loading,
            share=Share(),
        )
        if cfg.latents_on_device:
            resident = source.on_device(accelerator.device)
    elif cfg.get("latents_on_device"):
        raise ConfigError("latents_on_device=true needs latents=FOLDER, where clips are encoded once")

    def sampler(start_step: int, num_steps: int | None = None, everything: bool = False) -> PositionSampler:
        return PositionSampler(
            global_batch_size=settings.batch_size,
            micro_batch_size=settings.batch_size if everything else micro_batch_size,
            start_step=start_step,
            num_steps=num_steps,
            rank=0 if everything else accelerator.process_index,
            world_size=1 if everything else accelerator.num_processes,
        )

    def training_batches(start_step: int) -> Iterator[Batch | LatentBatch]:
        if resident is not None:
            return resident.batches(sampler(start_step))
        return batches(source, sampler(start_step), device=accelerator.device, **machine.loading)

    def statistics() -> Iterator[Any]:
        steps = -(-settings.num_statistics_clips // settings.batch_size)
        return batches(dataset, sampler(0, steps, everything=True), num_workers=0, device=accelerator.device)

    def held_out_clips() -> Iterator[Any]:
        return held_out_batches(
            held_out,
            batch_size=min(settings.batch_size, settings.micro_batch_size or 16, 16),
            num_clips=settings.num_held_out,
            device=accelerator.device,
        )

    def clips_of(step: int) -> list[str]:
        first = (step - 1) * settings.batch_size
        return [source.describe(position) for position in range(first, first + settings.batch_size)]

    for module in stage.modules.values():
        module.to(accelerator.device)
    if machine.compile:
        compile_in_place(stage.modules.values())
    averages = averages_of(ema, settings.batch_size, stage.modules)
    if machine.fsdp:
        shard_stage(stage, averages, accelerator)
    optimizers = {
        name: build(cfg.optimizer)([p for p in module.parameters() if p.requires_grad])
        for name, module in stage.modules.items()
    }
    count = sum(p.numel() for module in stage.modules.values() for p in module.parameters())
    accelerator.print(
        f"{folder}: {count:,} parameters in {' and '.join(stage.modules)}, {settings.batch_size} clips/step "
        f"({accelerator.num_processes} process(es) x {accelerator.gradient_accumulation_steps} micro-batches "
        f"of {micro_batch_size}), {accelerator.device}, precision {accelerator.mixed_precision}"
    )
    record = RunRecord(
        folder,
        _plain(cfg),
        data_fingerprint=dataset.fingerprint,
        batch_size=settings.batch_size,
        num_processes=accelerator.num_processes,
    )
    if record.former_fingerprint not in (None, dataset.fingerprint) and accelerator.is_main_process:
        warnings.warn(
            f"the data of {folder} have changed since it was last trained (fingerprint "
            f"{str(record.former_fingerprint)[:12]} -> {dataset.fingerprint[:12]}): it goes on, but with "
            "other clips than it would have seen",
            stacklevel=2,
        )
    train(
        stage,
        optimizers=optimizers,
        batches=training_batches,
        held_out=held_out_clips,
        statistics=statistics,
        export=lambda name, weights, step: save_model(folder / name, weights, step),
        averages=averages,
        clips_of=clips_of,
        settings=LoopSettings(
            snapshot_every=ema.snapshot_every if ema.sigma_rel else 0,
            **{
                name: getattr(settings, name)
                for name in LoopSettings.__dataclass_fields__
                if name != "snapshot_every"
            },
        ),
        accelerator=accelerator,
        folder=folder,
        resume=cfg.resume,
        batch_size=settings.batch_size,
        model_step=lambda: step_of(folder / "model"),
        tracker=lambda step, measured: Tracker(
            folder,
            step,
            dataset.fps,
            measured=measured,
            tensorboard=logger.tensorboard,
            wandb=logger.wandb,
            settings=flat(_plain(cfg)),
        ),
        record=record.update,
        requests=requests,
        seed=cfg.seed,
    )
    accelerator.print(f"model: {folder / 'model'}")


def averages_of(
    settings: EmaSettings, batch_size: int, modules: "Mapping[str, nn.Module]"
) -> "Averages | None":
    """The moving averages of modules that the ``ema`` node describes, if any."""
    from .training.ema import Ema, PostHocEma

    decay = settings.per_step(batch_size)
    if settings.sigma_rel is not None:
        return PostHocEma(modules, settings.sigma_rel)
    return None if decay is None else Ema(modules, decay)


def shard_stage(stage: "Stage", averages: "Averages | None", accelerator: "Accelerator") -> None:
    """Spreads what a stage trains, and its averages, over the processes."""
    from .training.sharding import shard

    for module in stage.modules.values():
        shard(module, accelerator, trained=True)
    for module in averages.saved.values() if averages is not None else ():
        shard(module, accelerator, trained=False)


def check_shardable(stage: "Stage", accelerator: "Accelerator") -> None:
    """Raises ConfigError or ValueError where ``machine.fsdp`` can't be.

    A stage that looks into single weights, as the adversarial autoencoder does, can't be sharded.
    """
    from .stages.diffusion import DiffusionStage
    from .training.sharding import check_sharding

    check_sharding(accelerator)
    if not isinstance(stage, DiffusionStage):
        raise ConfigError(
            "machine.fsdp=true shards the diffusion model; an autoencoder is small enough for one GPU, and "
            "its losses are balanced at a single weight. Use machine.fsdp=false"
        )


SaveModel = Callable[[Path, "Weights", int], None]


def stage_of(
    cfg: DictConfig, dataset: "ClipDataset", accelerator: "Accelerator"
) -> tuple["Stage", SaveModel]:
    """The stage that a config describes, and what writes its model folder."""
    from .model_folder import DataRecord

    data = DataRecord(
        name=dataset.name,
        fingerprint=dataset.fingerprint,
        num_frames=dataset.num_frames,
        frame_stride=dataset.frame_stride,
        resolution=list(dataset.resolution),
        fps=dataset.fps,
        classes=list(dataset.classes),
        target_fps=dataset.sampling.fps,
    )
    kind = str(cfg.stage._target_).rsplit(".", 1)[-1]
    if kind == "DiffusionStage":
        return _diffusion_stage(cfg, data, accelerator)
    return _autoencoder_stage(cfg, data, accelerator)


def unet_node(
    node: dict[str, Any],
    window: tuple[int, int, int, int],
    masking: "FrameMasking",
    num_classes: int,
    num_strides: int = 1,
) -> dict[str, Any]:
    """The U-Net's node with what objects can tell: channels, and what the network is told beside the time.

    The table of noise levels has a row more than there are levels, as the released networks' has.
    """
    per_frame = masking.is_perturbed and masking.noise_level_per_frame
    told: dict[str, Any] = {"num_strides": num_strides} if num_strides > 1 else {}
    told |= {"frame_noise_embedding": True} if per_frame else {}
    return (
        node
        | told
        | {
            "in_channels": window[0],
            "out_channels": window[0],
            "mask_channel": masking.gives_frames,
            "num_noise_levels": masking.max_noise_level + 1 if masking.is_perturbed and not per_frame else 0,
            "num_classes": num_classes,
        }
    )


def _autoencoder_stage(
    cfg: DictConfig, data: "DataRecord", accelerator: "Accelerator"
) -> tuple["Stage", SaveModel]:
    from .model_folder import save_autoencoder, start_from

    autoencoder = build(cfg.autoencoder)
    node = _plain(cfg)["autoencoder"]
    if cfg.start_from is not None:
        start_from(cfg.start_from, autoencoder, node, "autoencoder")
    autoencoder.latent_shape(data.num_frames, *data.resolution)  # refuses sizes that it can't divide
    perceptual = None if cfg.perceptual is None else build(cfg.perceptual).to(accelerator.device)
    stage = build(
        cfg.stage,
        autoencoder=autoencoder,
        discriminator=None if cfg.discriminator is None else build(cfg.discriminator),
        perceptual=perceptual,
        seed=cfg.seed,
        mean_over_processes=lambda values: (
            accelerator.reduce(values, reduction="mean") if accelerator.num_processes > 1 else values
        ),
    )

    def save_model(folder: Path, weights: "Weights", step: int) -> None:
        save_autoencoder(folder, weights, node=node, data=data, step=step)

    return stage, save_model


def _diffusion_stage(
    cfg: DictConfig, data: "DataRecord", accelerator: "Accelerator"
) -> tuple["Stage", SaveModel]:
    from .diffusion.parameterization import Parameterization
    from .diffusion.strides import LatentStrides
    from .generation import VideoGenerator
    from .model_folder import masking_of, save_diffusion, start_from
    from .models.unet import UNet3d

    autoencoder = build(cfg.autoencoder).to(accelerator.device)
    c, num_latents, h, w = autoencoder.latent_shape(data.num_frames, *data.resolution)
    plain = _plain(cfg)
    listed = plain["latent_strides"]
    latent_strides = LatentStrides(tuple(listed if isinstance(listed, list) else [listed]))
    latent_strides.check(num_latents, autoencoder.downsample[0])
    window = (c, latent_strides.window(num_latents), h, w)
    masking = masking_of(plain["conditioning"])
    if masking.gives_frames:
        masking.check(window[1])
    num_classes = len(data.classes) if cfg.class_conditional else 0
    if cfg.class_conditional and num_classes < 2:
        raise ConfigError(
            f"class_conditional=true needs a data set with classes, got {data.name} with {num_classes}; "
            "put each class into a folder of its own, or use class_conditional=false"
        )
    num_strides = len(latent_strides.strides)
    node = unet_node(plain["unet"], window, masking, num_classes, num_strides)
    parameterization = Parameterization(build(cfg.noise_schedule), cfg.prediction_type).to(accelerator.device)
    sampler = build(cfg.sampler)

    def generator(unet: "nn.Module") -> VideoGenerator:
        return VideoGenerator(
            autoencoder=autoencoder,
            unet=unet,
            parameterization=parameterization,
            sampler=sampler,
            guidance_scale=1.0,
            window=window,
            gives_frames=masking.gives_frames,
            has_labels=num_classes > 0,
            max_noise_level=masking.max_noise_level if masking.gives_frames else 0,
            noise_level=0,
            strides=latent_strides.strides,
            noise_level_per_frame=masking.noise_level_per_frame,
        )

    unet = build(node)
    if isinstance(unet, UNet3d) and any(size % unet.size_multiple for size in window[2:]):
        h, w = window[2:]
        factor = [size * unet.size_multiple for size in autoencoder.downsample[1:]]
        raise ConfigError(
            f"dataset.resolution={data.resolution} gives latents of {h}x{w}, which the U-Net can't "
            f"halve often enough; use multiples of {factor[0]}x{factor[1]}, or a shorter unet.channel_mult"
        )
    if cfg.start_from is not None:
        process = {key: plain[key] for key in ("noise_schedule", "prediction_type")}
        folder = cfg.autoencoder.get("folder")
        changes = start_from(cfg.start_from, unet, node, "unet", folder, process)
        if changes:
            accelerator.print("note: trained otherwise before (there -> here):", *changes, sep="\n")
    stage = build(
        cfg.stage,
        unet=unet,
        autoencoder=autoencoder,
        parameterization=parameterization,
        masking=masking,
        loss_weighting=build(cfg.loss_weighting),
        has_labels=num_classes > 0,
        generator=generator,
        seed=cfg.seed,
        latent_strides=latent_strides,
    )
    config = {
        "unet": node,
        "noise_schedule": plain["noise_schedule"],
        "prediction_type": plain["prediction_type"],
        "conditioning": plain["conditioning"],
        "class_conditional": num_classes > 0,
        "window": list(window),
        "latent_strides": list(latent_strides.strides),
    }

    def save_model(folder: Path, weights: "Weights", step: int) -> None:
        save_diffusion(
            folder,
            weights,
            autoencoder=autoencoder.state_dict(),
            autoencoder_node=plain["autoencoder"],
            config=config,
            data=data,
            step=step,
        )

    return stage, save_model


def as_program() -> None:
    """Runs the verb and ends with its status."""
    status: int = 0
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        status = end.code
    if "torch" in sys.modules:
        from .training.device import leave

        leave(status)
    sys.exit(status)


if __name__ == "__main__":
    as_program()
