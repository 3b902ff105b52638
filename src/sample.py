"""Make videos with a trained model: ``python -m src.sample model=runs/ucf101/model``."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from .config import (
    ConfigError,
    GuidanceSettings,
    MachineSettings,
    PlanSettings,
    SampleConfig,
    build,
    difference,
    typed,
    verb,
)

if TYPE_CHECKING:
    from torch import Tensor

    from .generation import VideoGenerator
    from .model_folder import DiffusionModel


@verb("sample", SampleConfig)
def main(cfg: DictConfig) -> None:
    """Writes one mp4 a sample, a contact sheet, and a list of seeds and classes."""
    from contextlib import ExitStack

    from tqdm import tqdm

    from .data.transforms import to_frames
    from .data.video import VideoWriter
    from .generation import require_finite
    from .model_folder import fingerprint, load_diffusion
    from .training.device import compile_in_place, pick_device
    from .training.share import Share

    machine: MachineSettings = typed(cfg, "machine", MachineSettings)
    scale = typed(cfg, "guidance", GuidanceSettings).scale
    num_given = typed(cfg, "plan", PlanSettings).num_given
    if cfg.num_samples < 1 or cfg.batch_size < 1:
        raise ConfigError(
            f"num_samples and batch_size must be at least 1, got {cfg.num_samples}, {cfg.batch_size}"
        )
    share = Share()
    model = load_diffusion(cfg.model).to(pick_device())
    generator = model.generator(build(cfg.sampler), guidance_scale=scale, noise_level=cfg.noise_level)
    if machine.compile:
        compile_in_place(generator.networks())
    num_frames = model.data.num_frames if cfg.num_frames is None else cfg.num_frames
    if num_frames < 1:
        raise ConfigError(f"num_frames must be at least 1, got {num_frames}")
    if num_frames > model.data.num_frames and num_given not in model.masking.num_given:
        raise ConfigError(
            f"plan.num_given={num_given}: this model was trained with {list(model.masking.num_given)} given "
            "latent frames. Choose one of these, or train with conditioning=prediction and its num_given"
        )
    folder = Path(cfg.output) if cfg.output else Path(cfg.model).parent / "samples"
    made_by = recipe(cfg, fingerprint(Path(cfg.model)), num_frames)
    if share.rank == 0:  # the others would find what it is about to make
        refuse_other_samples(folder, made_by)
    folder.mkdir(parents=True, exist_ok=True)

    seeds = [cfg.first_seed + i for i in range(cfg.num_samples)]
    names = {seed: folder / f"sample_{seed:06d}.mp4" for seed in seeds}
    batches = [[seeds[i] for i in batch] for batch in share.batches(len(seeds), cfg.batch_size)]
    total = sum(map(len, batches)) * num_frames
    with tqdm(total=total, unit="frame", desc="sampling", disable=share.rank > 0) as bar:
        for batch in batches:
            labels = labels_of(model, batch, cfg.labels)
            with ExitStack() as files:
                writers = [files.enter_context(VideoWriter(names[seed], model.data.fps)) for seed in batch]
                for video in videos(generator, batch, labels, num_frames, num_given):
                    for writer, frames in zip(writers, to_frames(require_finite(video.cpu())), strict=True):
                        writer.write(frames)
                    bar.update(video.shape[0] * video.shape[2])
    share.close()
    if share.rank == 0:
        _describe(cfg, model, folder, made_by, [names[seed] for seed in seeds], seeds)
        print(f"{len(seeds)} videos of {num_frames} frames: {folder}")


def videos(
    generator: "VideoGenerator",
    seeds: Sequence[int],
    labels: "Tensor | None",
    num_frames: int,
    num_given: int,
) -> Iterator["Tensor"]:
    """Pieces of videos ``b c t h w``, one whole piece if they are no longer than the model's window."""
    window = generator.window[1] * generator.autoencoder.downsample[0]
    if num_frames <= window:
        yield generator.decode(generator.sample_window(seeds, labels))[:, :, :num_frames]
    else:
        yield from generator.long_video(seeds, labels, num_frames, num_given)


def labels_of(model: "DiffusionModel", seeds: Sequence[int], choice: Any) -> "Tensor | None":
    """Classes of samples: in turn by seed, or all the one that is chosen.

    Raises:
        ConfigError: if there is no such class, or the model knows none.
    """
    import torch

    classes = model.data.classes
    if not model.class_conditional:
        if choice is not None:
            raise ConfigError(
                f"labels={choice}: this model was trained without classes (class_conditional=false)"
            )
        return None
    if choice is None:
        return torch.tensor([seed % len(classes) for seed in seeds])
    if isinstance(choice, str) and choice in classes:
        choice = classes.index(choice)
    if not isinstance(choice, int) or not 0 <= choice < len(classes):
        named = ", ".join(f"{i} {name}" for i, name in enumerate(classes))
        raise ConfigError(f"labels={choice} is no class of this model; classes: {named}")
    return torch.full((len(seeds),), choice)


def recipe(cfg: DictConfig, weights: str, num_frames: int) -> dict[str, Any]:
    """All that decides what a sample of a given seed looks like."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    decisive = ("sampler", "guidance", "plan", "labels", "noise_level")
    return {"weights_sha256": weights, "num_frames": num_frames} | {key: plain[key] for key in decisive}


def refuse_other_samples(folder: Path, made_by: dict[str, Any]) -> None:
    """Raises ConfigError if a folder holds samples of another model or made in another way.

    Mixed, they would be measured as one.
    """
    path = folder / "samples.json"
    if not path.is_file():
        return
    lines = difference(json.loads(path.read_text()).get("made_by", {}), made_by)
    if lines:
        changes = "\n".join(lines)
        raise ConfigError(
            f"{folder} holds samples that were made in another way (there -> here):\n{changes}\n"
            f"Choose another folder with output=…, or remove {folder} first"
        )


def _describe(
    cfg: DictConfig,
    model: "DiffusionModel",
    folder: Path,
    made_by: dict[str, Any],
    paths: list[Path],
    seeds: list[int],
) -> None:
    """Writes ``samples.json`` and ``contact_sheet.png``."""
    from .data.storage import atomic_path
    from .data.video import contact_sheet, read_clip

    labels, num_frames = labels_of(model, seeds, cfg.labels), made_by["num_frames"]
    entries = [
        {"file": path.name, "seed": seed}
        | ({} if labels is None else {"class": model.data.classes[int(labels[i])]})
        for i, (path, seed) in enumerate(zip(paths, seeds, strict=True))
    ]
    description = {
        "model": str(cfg.model),
        "step": model.step,
        "num_frames": num_frames,
        "fps": model.data.fps,
        "guidance_scale": cfg.guidance.scale,
        "made_by": made_by,
        "samples": entries,
    }
    with atomic_path(folder / "samples.json") as part:
        part.write_text(json.dumps(description, indent=1))
    stride = max(1, num_frames // 16)
    shown = [read_clip(path, 0, min(num_frames // stride, 16), stride) for path in paths[:12]]
    (folder / "contact_sheet.png").write_bytes(contact_sheet(shown, num_columns=len(shown[0])))


if __name__ == "__main__":
    main()
