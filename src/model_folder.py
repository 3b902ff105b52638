"""Model folders: what people share. ``config.yaml`` + ``weights.safetensors``, and nothing that runs.

A diffusion model's folder is self-contained: its autoencoder lies in the sub-folder ``autoencoder/``.
Equal weights give equal bytes: no date, host or path is stored beside them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from .config import CONF, PACKAGE, build, difference, full_arguments, read_yaml
from .data.storage import atomic_folder, load_tensors, save_tensors
from .diffusion.conditioning import FrameMasking
from .diffusion.parameterization import Parameterization
from .diffusion.samplers import Sampler
from .generation import VideoGenerator
from .models.autoencoder import LatentSpace

FORMAT = 1


@dataclass(frozen=True)
class DataRecord:
    """The data that a model was trained on: facts for whoever uses or measures the model.

    Args:
        name: of the data set.
        fingerprint: of its content.
        num_frames: of a training clip.
        frame_stride: between the clip's frames, in frames of the file.
        resolution: height and width.
        fps: of the clip, after the stride.
        classes: names of classes, in the order of labels.
        target_fps: the rate at which all videos were read, if they were; None for their own.
    """

    name: str
    fingerprint: str
    num_frames: int
    frame_stride: int
    resolution: list[int]
    fps: float
    classes: list[str]
    target_fps: float | None = None


@dataclass
class DiffusionModel:
    """A latent diffusion model as loaded from its folder, frozen.

    Args:
        unet: the denoising network.
        autoencoder: of its latents.
        parameterization: schedule and prediction type.
        masking: which frames were given in training.
        class_conditional: whether classes were told in training.
        window: latent shape ``(c, t, h, w)`` of what the network saw at once in training.
        data: what it was trained on.
        step: optimizer steps.
        latent_strides: distances between the window's latent frames that were trained, the largest first.
        autoencoder_frames: video frames of a clip that the autoencoder was trained on.
    """

    unet: nn.Module
    autoencoder: LatentSpace
    parameterization: Parameterization
    masking: FrameMasking
    class_conditional: bool
    window: tuple[int, int, int, int]
    data: DataRecord
    step: int
    latent_strides: tuple[int, ...]
    autoencoder_frames: int

    def to(self, device: torch.device) -> "DiffusionModel":
        """The same model on a device."""
        self.unet.to(device)
        self.autoencoder.to(device)
        return replace(self, parameterization=self.parameterization.to(device))

    def generator(
        self,
        sampler: Sampler,
        *,
        guidance_scale: float,
        noise_level: int,
        guidance_interval: tuple[int, int] | None = None,
        keys: tuple[str, str, str] = ("guidance.scale", "guidance.interval", "noise_level"),
    ) -> VideoGenerator:
        """What makes videos with this model; `keys` are the config's for what is chosen here."""
        return VideoGenerator(
            autoencoder=self.autoencoder,
            unet=self.unet,
            parameterization=self.parameterization,
            sampler=sampler,
            guidance_scale=guidance_scale,
            window=self.window,
            gives_frames=self.masking.gives_frames,
            has_labels=self.class_conditional,
            max_noise_level=self.masking.max_noise_level if self.masking.gives_frames else 0,
            noise_level=noise_level,
            guidance_interval=guidance_interval,
            strides=self.latent_strides,
            noise_level_per_frame=self.masking.noise_level_per_frame,
            keys=keys,
        )


Weights = Mapping[str, Tensor]
"""A network's state dict."""


def save_autoencoder(
    folder: Path, autoencoder: Weights, *, node: dict[str, Any], data: DataRecord, step: int
) -> None:
    """Writes an autoencoder's folder, replacing an older one only once the new one is complete."""
    with atomic_folder(folder) as temporary:
        _write(
            temporary,
            autoencoder,
            {"kind": "autoencoder", "autoencoder": node, "data": asdict(data), "step": step},
        )


def save_diffusion(
    folder: Path,
    unet: Weights,
    *,
    autoencoder: Weights,
    autoencoder_node: dict[str, Any],
    config: dict[str, Any],
    data: DataRecord,
    step: int,
) -> None:
    """Writes a diffusion model's folder with its autoencoder's inside."""
    with atomic_folder(folder) as temporary:
        inside = temporary / "autoencoder"
        inside.mkdir()
        record = {"kind": "autoencoder", "autoencoder": autoencoder_node, "data": asdict(data), "step": 0}
        if "folder" in autoencoder_node:  # a trained one brings its own record
            record = {
                k: v for k, v in autoencoder_config(autoencoder_node["folder"])[1].items() if k != "format"
            }
        _write(inside, autoencoder, record)
        _write(
            temporary,
            unet,
            {
                "kind": "diffusion",
                **config,
                "autoencoder_sha256": fingerprint(inside),
                "data": asdict(data),
                "step": step,
            },
        )


def autoencoder_config(folder: str) -> tuple[Path, dict[str, Any]]:
    """Where an autoencoder's weights are, and its config; a diffusion model's folder holds one, too."""
    path = Path(folder)
    config = read_config(path, remedy=_training_command(path, "tiny_autoencoder"))
    if config["kind"] == "diffusion":
        path = path / "autoencoder"
        config = read_config(path, remedy="")
    return path, config


def load_autoencoder(folder: str) -> LatentSpace:
    """The frozen autoencoder of a model folder, or the one inside a diffusion model's folder.

    Raises:
        FileNotFoundError: if there is no model folder; the message says how one is made.
        ValueError: if the folder isn't an autoencoder's, or its weights don't fit.
    """
    path, config = autoencoder_config(folder)
    autoencoder = build(config["autoencoder"], trusted=False)
    if not isinstance(autoencoder, LatentSpace):
        raise ValueError(f"{path} names {type(autoencoder).__name__}, which is no autoencoder")
    _fill(autoencoder, path)
    return autoencoder.requires_grad_(False).eval()


def load_diffusion(folder: str, trained: bool = True) -> DiffusionModel:
    """A latent diffusion model of its folder.

    Args:
        folder: written by ``python -m src.train``.
        trained: False leaves the network at its initial weights, to compare against.

    Raises:
        FileNotFoundError: if there is no model folder.
        ValueError: if it is another kind of folder, was damaged, or its weights don't fit.
    """
    path = Path(folder)
    config = read_config(path, remedy=_training_command(path, "tiny"))
    if config["kind"] != "diffusion":
        raise ValueError(
            f"{folder} holds an {config['kind']}, expected a diffusion model; train one with "
            f"python -m src.train +experiment=… autoencoder.folder={folder}"
        )
    if fingerprint(path / "autoencoder") != config["autoencoder_sha256"]:
        raise ValueError(
            f"the autoencoder inside {folder} isn't the one that the model was trained with "
            f"(expected sha256 {config['autoencoder_sha256'][:12]}…); copy the whole model folder again"
        )
    unet = build(config["unet"], trusted=False)
    if trained:
        _fill(unet, path)
    return DiffusionModel(
        unet=unet.requires_grad_(False).eval(),
        autoencoder=load_autoencoder(str(path / "autoencoder")),
        parameterization=Parameterization(
            build(config["noise_schedule"], trusted=False), config["prediction_type"]
        ),
        masking=masking_of(config["conditioning"], trusted=False),
        class_conditional=config["class_conditional"],
        window=tuple(config["window"]),
        data=data_record(config),
        step=config["step"],
        latent_strides=tuple(config.get("latent_strides", [1])),  # older folders have one
        autoencoder_frames=data_record(autoencoder_config(str(path / "autoencoder"))[1]).num_frames,
    )


# What a network may change when it goes on from a model folder: nothing that its weights were made for.
FREE_ON_START = {"dropout", "checkpoint", "initial_logvar"}


def start_from(
    folder: str,
    module: nn.Module,
    node: dict[str, Any],
    kind: str,
    autoencoder: str | None = None,
    process: dict[str, Any] | None = None,
) -> list[str]:
    """Fills a network with the weights of a model folder, to train on from there.

    Args:
        folder: of a model of the same kind; for an autoencoder also of a diffusion model, which holds one.
        module: just built from ``node``.
        node: the network's node in the new run's config.
        kind: ``unet`` or ``autoencoder``.
        autoencoder: folder of the autoencoder on whose latents a U-Net will be trained.
        process: `noise_schedule` and `prediction_type` of the new run.

    Returns:
        Lines that say how the process differs from the one that the weights were trained for: allowed, since
        they can be trained over to it.

    Raises:
        FileNotFoundError: if there is no model folder.
        ValueError: if it holds another kind of model, another architecture (the message names the keys) or a
            model of another autoencoder's latents.
    """
    path = Path(folder)
    config = read_config(path, remedy="") if kind == "unet" else autoencoder_config(folder)[1]
    if kind not in config:
        raise ValueError(f"start_from={folder} holds an {config['kind']}, expected a diffusion model")
    if kind == "autoencoder":
        path = autoencoder_config(folder)[0]
    old, new = (
        {key: value for key, value in full_arguments(plain).items() if key not in FREE_ON_START}
        for plain in (config[kind], node)
    )
    lines = difference(old, new)
    if lines:
        changes = "\n".join(lines)
        raise ValueError(
            f"the network in start_from={folder} is another one than the config's (folder -> config):\n"
            f"{changes}\nSet these keys of {kind} as the folder has them, or train anew: start_from=null"
        )
    if autoencoder is not None and fingerprint(autoencoder_config(autoencoder)[0]) != config.get(
        "autoencoder_sha256"
    ):
        raise ValueError(
            f"the network in start_from={folder} was trained on latents of another autoencoder than "
            f"{autoencoder}; use its own: autoencoder.folder={folder}"
        )
    _fill(module, path)
    return difference({key: config[key] for key in process or {}}, process or {})


def data_record(config: dict[str, Any]) -> DataRecord:
    """The data that a model folder's config says the model was trained on."""
    return DataRecord(**config["data"])


def masking_of(node: dict[str, Any], trusted: bool = True) -> FrameMasking:
    """The frame masking of a ``conditioning`` node."""
    return build({**node, "num_given": list(node["num_given"])}, trusted=trusted)


def _training_command(folder: Path, otherwise: str) -> str:
    """What trains the model that is expected in ``runs/NAME/model`` (or ``NAME_SEED``), or an example."""
    name = folder.parent.name
    experiment, _, seed = name.rpartition("_")
    if (CONF / "experiment" / f"{name}.yaml").exists():
        return f"python -m {PACKAGE}.train +experiment={name}"
    if seed.isdigit() and (CONF / "experiment" / f"{experiment}.yaml").exists():
        return f"python -m {PACKAGE}.train +experiment={experiment} seed={seed}"
    return f"python -m {PACKAGE}.train +experiment={otherwise}"


def read_config(folder: Path, remedy: str) -> dict[str, Any]:
    """The config of a model folder.

    Raises:
        FileNotFoundError: if there is none; the message names the remedy.
        ValueError: if it is of another format.
    """
    path = folder / "config.yaml"
    if not (path.is_file() and (folder / "weights.safetensors").is_file()):
        if not folder.exists():
            found = "nothing there"
        else:
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "an empty folder"
        hint = f" Train one first:\n    {remedy}\nor give the folder of another" if remedy else ""
        raise FileNotFoundError(
            f"no model at {folder}: expected config.yaml and weights.safetensors, found {found}.{hint}"
        )
    config = read_yaml(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path} isn't the config of a model folder of format {FORMAT}")
    return {str(key): value for key, value in config.items()}


def step_of(folder: Path) -> int | None:
    """How many steps a model folder's model was trained for; None if there is none that can be read."""
    try:
        return int(read_config(folder, remedy="")["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fingerprint(folder: Path) -> str:
    """SHA-256 of the weights in a model folder."""
    with (folder / "weights.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, weights: Weights, config: dict[str, Any]) -> None:
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_tensors(on_cpu, folder / "weights.safetensors")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"format": FORMAT, **config})))


def _fill(module: nn.Module, folder: Path) -> None:
    weights = load_tensors(folder / "weights.safetensors")
    expected = module.state_dict()
    wrong = sorted(weights.keys() ^ expected.keys())
    wrong += [
        name for name in weights.keys() & expected.keys() if weights[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"the weights in {folder} don't fit its config.yaml; first differences: {wrong[:5]}")
    with torch.no_grad():
        module.load_state_dict(weights)
