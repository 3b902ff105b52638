"""Turn checkpoints of the released LVDM code into model folders, and back: ``python -m src.convert``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import ConfigError, ConvertConfig, verb

if TYPE_CHECKING:
    from torch import Tensor

    from .interop.official import OfficialLatentDiffusion
    from .model_folder import DataRecord

# What a released model was trained on is known only as far as its preset or its config tells.
UNKNOWN_DATA: dict[str, Any] = {"num_frames": 16, "frame_stride": 1, "fps": 8.0, "classes": []}


@verb("convert", ConvertConfig)
def main(cfg: DictConfig) -> None:
    """Writes a model folder from a checkpoint file, or a checkpoint file from a model folder."""
    if cfg.direction not in ("import", "export"):
        raise ConfigError(f"direction={cfg.direction} is unknown; choose import or export")
    if not cfg.output:
        raise ConfigError("output= is empty; name the folder or file to write")
    if cfg.direction == "export":
        if cfg.get("preset") is not None or cfg.config is not None:
            raise ConfigError("a model folder knows its own config; leave preset and config away to export")
        if not cfg.use_ema:
            raise ConfigError("a model folder holds one set of weights; leave use_ema away to export")
        export(Path(cfg.checkpoint), Path(cfg.output))
        return
    if (cfg.get("preset") is None) == (cfg.config is None):
        raise ConfigError(
            "say what the checkpoint holds: either preset=NAME (short_sky, ae_sky, …; --help lists them) or "
            "config=FILE.yaml, the released code's own config of the model"
        )
    described = read_description(cfg)
    try:
        import_checkpoint(Path(cfg.checkpoint), described, Path(cfg.output), use_ema=cfg.use_ema)
    except (TypeError, KeyError, AttributeError) as error:  # a value of another type, a part that isn't there
        raise ConfigError(
            f"the config of the model can't be understood ({type(error).__name__}: {error}); expected the "
            "released code's own YAML"
        ) from error


def read_description(cfg: DictConfig) -> dict[str, Any]:
    """The model's config in the released code's terms (``model``), and facts of its data (``data``).

    Raises:
        FileNotFoundError: if there is no such file.
        ConfigError: if it isn't YAML, or holds no model.
    """
    node: Any = cfg.get("preset")
    if cfg.config is not None:
        path = Path(cfg.config)
        if not path.is_file():
            raise FileNotFoundError(f"no file at config={path}")
        try:
            node = OmegaConf.load(path)
        except Exception as error:
            raise ConfigError(f"config={path} isn't YAML: {error}") from error
    described = plain_of(node)
    if isinstance(described, dict) and "model" not in described:
        described = {"model": described}
    if not isinstance(described, dict) or not isinstance(described["model"], dict) or not described["model"]:
        raise ConfigError(
            f"config={cfg.config} describes no model; expected the released code's YAML: a mapping `model` "
            "with target and params"
        )
    return described


def plain_of(node: Any) -> Any:
    """A node as plain Python, resolved as far as the file itself can tell.

    The released files leave values to their command line (`ckpt_path: ${ckpt_path}`); these stay text.
    """
    if isinstance(node, ListConfig):
        return [plain_of(child) for child in node]
    if not isinstance(node, DictConfig):
        return node
    raw: Any = OmegaConf.to_container(node, resolve=False)

    def value(key: Any) -> Any:
        try:
            return plain_of(node[key])
        except OmegaConfBaseException:
            return raw[key]

    return {str(key): value(key) for key in raw}


def import_checkpoint(checkpoint: Path, described: dict[str, Any], folder: Path, use_ema: bool) -> None:
    """Writes the model folder of a released checkpoint.

    Args:
        checkpoint: file of the released code.
        described: ``model``, its config in the released code's terms, and perhaps ``data``.
        folder: to be written.
        use_ema: whether averaged weights are taken.

    Raises:
        ValueError: if the checkpoint doesn't fit the config, listing the keys that are left over or missing.
    """
    from .interop import official, official_configs
    from .interop.checkpoint_file import read_checkpoint
    from .model_folder import save_autoencoder, save_diffusion

    refuse_existing(folder)
    state, step = read_checkpoint(checkpoint)
    config = described["model"]
    whole = any(key.startswith(official.UNET_PREFIX) for key in state)
    if whole != ("unet_config" in official_configs.params_of(config)):
        kinds = {True: "a whole latent diffusion model", False: "no diffusion model, perhaps an autoencoder"}
        raise ValueError(
            f"{checkpoint} holds {kinds[whole]}, the config describes {kinds[not whole]}; choose another "
            f"preset or config, like {'short_sky' if whole else 'ae_sky'}"
        )
    refuse_non_finite(state, checkpoint)
    if not whole:
        autoencoder = official.autoencoder_from_official(state, config)
        arguments = official_configs.autoencoder_arguments(config)
        data = data_of(described, checkpoint, None)
        node = {"_target_": ".models.autoencoder.Autoencoder3d", **arguments}
        save_autoencoder(folder, autoencoder.state_dict(), node=node, data=data, step=step)
        if "scale_factor" not in official_configs.params_of(config):
            print(
                "the config tells neither scale_factor nor shift_factor: latents count as normalized as they "
                "are. Give both among the params of config if a diffusion model will be trained on them"
            )
        print(f"autoencoder, {count(autoencoder):,} parameters: {folder}")
        return
    model = official.latent_diffusion_from_official(state, config, use_ema)
    if model.autoencoder is None:
        raise ValueError(f"{checkpoint} holds no autoencoder (no first_stage_model.* keys)")
    unet_arguments = official_configs.unet_arguments(
        config, model.compatibility.relative_position_as_released
    )
    attention = {"_target_": ".models.attention.AttentionBlock", "_partial_": True}
    function, arguments = model.schedule
    data = data_of(described, checkpoint, model)
    save_diffusion(
        folder,
        model.unet.state_dict(),
        autoencoder=model.autoencoder.state_dict(),
        autoencoder_node={
            "_target_": ".models.autoencoder.Autoencoder3d",
            **official_configs.autoencoder_arguments(config),
        },
        config={
            "unet": {
                "_target_": ".models.unet.UNet3d",
                **unet_arguments,
                "attention": attention | unet_arguments["attention"],
            },
            "noise_schedule": {"_target_": f".diffusion.noise_schedule.{function}", **arguments},
            "prediction_type": model.prediction_type,
            "conditioning": {"_target_": ".diffusion.conditioning.FrameMasking", **asdict(model.masking)},
            "class_conditional": model.unet.num_classes > 0,
            "window": list(model.window),
            "latent_strides": official_configs.strides_from_official(official_configs.params_of(config)),
        },
        data=data,
        step=step,
    )
    weights = {
        True: "averaged weights",
        False: "raw weights",
        None: "raw weights (the checkpoint has no others)",
    }
    print(f"{weights[model.averaged]}, {count(model.unet):,} parameters: {folder}")


def data_of(
    described: dict[str, Any], checkpoint: Path, model: "OfficialLatentDiffusion | None"
) -> "DataRecord":
    """What a preset tells of the training data; without one, what the model's own sizes tell.

    A released config file names sizes among the parameters of its data sets (``data.params.train.params``).
    """
    from .interop.official_configs import params_of, strides_from_official
    from .model_folder import DataRecord

    told = described.get("data") or {}
    facts: dict[str, Any] = {"name": checkpoint.stem, "resolution": [256, 256]} | UNKNOWN_DATA
    split: Any = told
    for key in ("params", "train", "params"):
        split = (split.get(key) if isinstance(split, dict) else None) or {}
    between = split.get("frame_stride", split.get("clip_step", facts["frame_stride"]))
    facts["frame_stride"] = between if isinstance(between, int) else facts["frame_stride"]
    if model is not None:
        assert model.autoencoder is not None
        _, t, h, w = model.window
        ft, fh, fw = model.autoencoder.downsample
        (stride,) = strides_from_official(params_of(described["model"]))
        facts |= {"num_frames": t * stride * ft, "resolution": [h * fh, w * fw]}
        facts["classes"] = [f"class {i}" for i in range(model.unet.num_classes)]
    else:
        size = split.get("resolution", facts["resolution"])
        facts["resolution"] = [size, size] if isinstance(size, int) else list(size)
        facts["num_frames"] = split.get("video_length", facts["num_frames"])
    known = {key: value for key, value in told.items() if key in DataRecord.__dataclass_fields__}
    return DataRecord(**(facts | known | {"fingerprint": "unknown"}))


def export(folder: Path, output: Path) -> None:
    """Writes the checkpoint of a model folder and, beside it, the config that the released code wants.

    Raises:
        ValueError: if the released code has no such model, naming what it can't express.
    """
    import torch

    from .data.storage import atomic_path
    from .diffusion.conditioning import FrameMasking
    from .interop import official, official_configs
    from .interop.checkpoint_file import write_checkpoint
    from .model_folder import autoencoder_config, load_autoencoder, load_diffusion, read_config
    from .models.autoencoder import Autoencoder3d
    from .models.unet import UNet3d

    beside = output.with_suffix(".yaml")
    if beside == output:
        raise ValueError(f"output={output}: that is the name of the config beside the checkpoint; use .ckpt")
    if folder.is_file():
        raise ValueError(f"checkpoint={folder} is a file; direction=export takes a model folder")
    for path in (output, beside):
        refuse_existing(path)
    config = read_config(folder, remedy="")
    autoencoder = load_autoencoder(str(folder))
    if not isinstance(autoencoder, Autoencoder3d):
        raise ValueError(f"the released code has no {type(autoencoder).__name__}")
    autoencoder_arguments = arguments_of(autoencoder_config(str(folder))[1]["autoencoder"])
    # The released code knows one number for all channels.
    if bool((autoencoder.latent_mean != autoencoder.latent_mean[0]).any()) or bool(
        (autoencoder.latent_std != autoencoder.latent_std[0]).any()
    ):
        autoencoder = official.fold_moments(autoencoder)
    if config["kind"] == "autoencoder":
        state = official.to_official(autoencoder)
        described = {"params": official_configs.autoencoder_config(autoencoder_arguments)}
        described["params"] |= official.latent_scale(autoencoder)
    else:
        loaded = load_diffusion(str(folder))
        if not isinstance(loaded.unet, UNet3d) or not isinstance(loaded.masking, FrameMasking):
            raise ValueError(f"the released code has no {type(loaded.unet).__name__}")
        schedule = dict(config["noise_schedule"])
        model = official.OfficialLatentDiffusion(
            unet=loaded.unet,
            autoencoder=autoencoder,
            schedule=(str(schedule.pop("_target_")).rsplit(".", 1)[-1], schedule),
            prediction_type=loaded.parameterization.prediction_type,
            masking=loaded.masking,
            window=loaded.window,
            averaged=True,
        )
        official.refuse_inexpressible(
            official_configs.process_differences(model.schedule, model.prediction_type)
            + official_configs.conditioning_differences(model.masking, loaded.latent_strides)
            + official.unet_differences(model.unet)
            + official.autoencoder_differences(autoencoder)
        )
        unet_arguments = arguments_of(config["unet"])
        unet_arguments["attention"] = arguments_of(unet_arguments["attention"])
        described = official_configs.latent_diffusion_config(
            unet=unet_arguments,
            autoencoder=autoencoder_arguments,
            scale=official.latent_scale(autoencoder),
            schedule=model.schedule,
            prediction_type=model.prediction_type,
            masking=model.masking,
            window=model.window,
            averaged=True,
            latent_strides=loaded.latent_strides,
        )
        state = official.to_official(model)
    with torch.no_grad():
        write_checkpoint(state, output, config["step"])
    data = {key: value for key, value in config["data"].items() if key != "fingerprint"}
    with atomic_path(beside) as part:
        part.write_text(OmegaConf.to_yaml(OmegaConf.create({"data": data, "model": described})))
    print(f"{len(state)} tensors: {output}; their config: {beside}")


def refuse_non_finite(state: "dict[str, Tensor]", checkpoint: Path) -> None:
    """Raises ValueError if a weight is NaN or infinite: such a model makes nothing but black frames."""
    wrong = [key for key, tensor in state.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ValueError(
            f"{checkpoint} holds numbers that aren't finite, in {len(wrong)} of {len(state)} tensors (first "
            f"{wrong[0]}); its training has diverged, take an earlier checkpoint"
        )


def refuse_existing(path: Path) -> None:
    """Raises FileExistsError if a file, or a folder with something in it, is there: perhaps a model."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; choose another output, or remove it first")


def arguments_of(node: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments in a node."""
    return {key: value for key, value in node.items() if not key.startswith("_")}


def count(module: Any) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
