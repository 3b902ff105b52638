"""Configs: composed by Hydra, checked before anything is built, saved with every run.

Values live in ``conf/``; this module holds the types of what never swaps (the plumbing), turns nodes with a
``_target_`` into objects, and gives every verb the same door.
"""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException, HydraException, InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# OpenMP's threads wait in a busy loop; where another program holds a core that makes small operations twenty
# times slower. A short wait costs next to nothing (read when torch is first imported).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

assert __package__ is not None
PACKAGE: str = __package__
_HERE = Path(__file__).parent
# In a wheel conf/ and experiments/ lie inside the package, in a checkout beside it.
_ROOT = _HERE if (_HERE / "conf").is_dir() else _HERE.parent
CONF = _ROOT / "conf"
EXPERIMENTS = _ROOT / "experiments"

# Exit status of a run that was asked to stop and saved its state: a temporary failure, worth another start.
INTERRUPTED = 75

_SWEPT = "LATENT_VIDEO_SWEPT_KEYS"

# What may differ when a run is taken up again: lengths, periods, machines; never what is learned.
HARMLESS = (
    "train.num_steps",
    "train.log_every",
    "train.preview_every",
    "train.evaluate_every",
    "train.save_every",
    "train.keep_states",
    "train.keep_every",
    "train.best_metric",
    "train.on_nonfinite",
    "train.max_skipped",
    "train.profile",
    "ema.snapshot_every",
    "resume",
    "train.micro_batch_size",
    "train.num_held_out",
    "machine",
    "latents_on_device",
    "logger",
    "runs",
    "name",
)


# What a verb that has a model takes from the model's own record when the config leaves it open (null).
CLIP_FACTS = ("num_frames", "frame_stride", "resolution")


class CellFailed(CompactHydraException):
    """A cell of a multirun has failed, and has said why."""


class ConfigError(ValueError):
    """A config that can't be meant: an unknown key, a wrong type, a missing value."""


# ---------------------------------------------------------------- the plumbing's schema


@dataclass
class TrainSettings:
    """The ``train`` node: length, batch, periods. See ``training.loop.LoopSettings``."""

    num_steps: int
    batch_size: int
    micro_batch_size: int | None
    warmup_steps: int
    decay: str
    clip_norm: float
    log_every: int
    preview_every: int
    evaluate_every: int
    save_every: int
    keep_states: int
    keep_every: int
    best_metric: str | None
    on_nonfinite: str
    max_skipped: int
    profile: bool
    num_held_out: int
    num_statistics_clips: int

    def __post_init__(self) -> None:
        least = dict.fromkeys(
            ("num_steps", "batch_size", "keep_states", "num_held_out", "num_statistics_clips"), 1
        )
        for field in fields(self):
            value, lowest = getattr(self, field.name), least.get(field.name, 0)
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and not lowest <= value < math.inf
            ):
                raise ConfigError(
                    f"train.{field.name} must be a finite number of at least {lowest}, got {value}"
                )


@dataclass
class MachineSettings:
    """The ``machine`` node: what may change without changing what is learned."""

    precision: str
    num_workers: int
    prefetch_factor: int
    pin_memory: bool
    tf32: bool
    compile: bool
    fsdp: bool

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 0), ("prefetch_factor", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"machine.{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def loading(self) -> dict[str, Any]:
        """How clips are loaded: arguments of ``data.sampler.batches``."""
        return {name: getattr(self, name) for name in ("num_workers", "prefetch_factor", "pin_memory")}


@dataclass
class LoggerSettings:
    """The ``logger`` node."""

    tensorboard: bool
    wandb: str | None


@dataclass
class EmaSettings:
    """The ``ema`` node: a decay a step, a half-life in clips, or relative lengths; all null: no averaging."""

    decay: float | None
    half_life: float | None
    sigma_rel: list[float] | None
    snapshot_every: int

    def __post_init__(self) -> None:
        if self.snapshot_every < 0:
            raise ConfigError(f"ema.snapshot_every must be at least 0 (never), got {self.snapshot_every}")

    def per_step(self, batch_size: int) -> float | None:
        """The decay of one step of so many clips.

        Raises:
            ConfigError: if several are given, or the half-life isn't positive and finite.
        """
        given = [value for value in (self.decay, self.half_life, self.sigma_rel) if value is not None]
        if len(given) > 1 or (self.half_life is not None and not 0 < self.half_life < math.inf):
            raise ConfigError(
                f"ema.decay={self.decay}, ema.half_life={self.half_life}, ema.sigma_rel={self.sigma_rel}: "
                "give one of them, and a finite half-life above 0"
            )
        if self.half_life is None:
            return self.decay
        return float(0.5 ** (batch_size / self.half_life))


@dataclass
class GuidanceSettings:
    """The ``guidance`` node: ``uncond + scale (cond - uncond)``; 1 means off."""

    scale: float
    interval: Any = None


@dataclass
class PlanSettings:
    """The ``plan`` node: how videos longer than the model's window are made."""

    kind: str
    num_given: int


@dataclass
class InterpolationSettings:
    """The ``interpolation`` node: what fills the gaps between key latents; None is as for those."""

    model: str | None
    guidance_scale: Any
    guidance_interval: Any
    noise_level: Any


@dataclass
class TrainConfig:
    """Top-level keys of ``python -m src.train``."""

    name: str
    runs: str
    seed: int
    train: TrainSettings
    machine: MachineSettings
    logger: LoggerSettings
    ema: EmaSettings
    dataset: Any
    optimizer: Any
    stage: Any
    autoencoder: Any
    perceptual: Any = None
    discriminator: Any = None
    unet: Any = None
    noise_schedule: Any = None
    prediction_type: Any = None
    loss_weighting: Any = None
    conditioning: Any = None
    class_conditional: bool | None = None
    sampler: Any = None
    start_from: str | None = None
    resume: str = "auto"
    latents: str | None = None
    latents_on_device: bool = False
    autoencoder_from: str | None = None
    clips_per_video: int = 1
    latent_strides: Any = None


@dataclass
class SampleConfig:
    """Top-level keys of ``python -m src.sample``."""

    model: str
    output: str | None
    num_samples: int
    first_seed: int
    batch_size: int
    num_frames: int | None
    labels: Any
    noise_level: int
    video: Any
    direction: str
    loop: bool
    decoding_window: int | None
    dry_run: bool
    machine: MachineSettings
    guidance: GuidanceSettings
    plan: PlanSettings
    interpolation: InterpolationSettings
    sampler: Any


@dataclass
class EvaluateConfig:
    """Top-level keys of ``python -m src.evaluate``."""

    model: str | None
    videos: Any
    output: str | None
    seed: int
    first_seed: int
    batch_size: int
    noise_level: int
    compare_untrained: bool
    num_positions: int
    num_replicates: int
    num_reconstructed: int
    num_candidates: int | None
    num_frames: int | None
    decoding_window: int | None
    weights: str | None
    machine: MachineSettings
    guidance: GuidanceSettings
    plan: PlanSettings
    interpolation: InterpolationSettings
    sampler: Any
    dataset: Any
    protocol: Any
    perceptual: Any = None


@dataclass(kw_only=True)
class EncodeConfig(TrainConfig):
    """Top-level keys of ``python -m src.encode``: an experiment's, and where from and where to."""

    model: str | None
    output: str | None
    batch_size: int


@dataclass
class AverageConfig:
    """Top-level keys of ``python -m src.average``."""

    run: str
    output: str
    sigma_rel: float
    step: int | None


@dataclass
class ConvertConfig:
    """Top-level keys of ``python -m src.convert``."""

    checkpoint: str
    output: str
    config: str | None
    use_ema: bool
    direction: str
    preset: Any = None


@dataclass
class PrepareConfig:
    """Top-level keys of ``python -m src.prepare``."""

    weights: str | None
    dataset: Any
    index: str | None
    shards: str | None
    videos_per_shard: int


@dataclass
class ReportConfig:
    """Top-level keys of ``python -m src.report``."""

    runs: list[str] | None
    sweep: str | None
    output: str | None
    title: str


# ---------------------------------------------------------------- the door of every verb


class _ExperimentsOnSearchPath(SearchPathPlugin):
    """Lets ``+sweep=…`` find ``experiments/`` from any working directory, installed or not."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider=PACKAGE, path=f"file://{EXPERIMENTS}")


def verb(config_name: str, schema: type) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes a command-line entry point of a function that takes a composed and checked config.

    What a user can mend ends in one message on standard error and exit status 2, without a traceback;
    ``HYDRA_FULL_ERROR=1`` shows the traceback.
    """

    def decorate(function: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(function)
        def guarded(cfg: DictConfig) -> None:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                check(cfg, schema)
                return function(cfg)
            try:
                check(cfg, schema)
                function(cfg)
            except KeyboardInterrupt:
                print("\ninterrupted; the same command goes on from the last saved state", file=sys.stderr)
                sys.exit(130)
            except _interrupted() as stop:
                print(f"\n{stop}", file=sys.stderr)
                sys.exit(INTERRUPTED)
            except _mendable() as error:
                print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
                if _in_multirun():  # the other cells come first
                    raise CellFailed("some cells of the multirun failed; their messages are above") from None
                sys.exit(2)

        @functools.wraps(function)
        def main() -> None:
            # `report` has a key of that name, which is no group.
            if config_name != "report" and _ExperimentsOnSearchPath not in Plugins.instance().discover(
                SearchPathPlugin
            ):
                Plugins.instance().register(_ExperimentsOnSearchPath)
            if isinstance(sys.stdout, io.TextIOWrapper):  # names of files needn't be text
                sys.stdout.reconfigure(errors="backslashreplace")
            # Launchers may run the cells in other processes, which inherit the environment but no arguments.
            os.environ[_SWEPT] = " ".join(_swept_keys(sys.argv[1:]))
            try:
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
            except SystemExit as stop:
                # Hydra has said that it can't compose the config, in its own words.
                hint = _meant(config_name, sys.argv[1:]) if stop.code == 1 else ""
                if hint:
                    print(f"\n{hint}", file=sys.stderr)
                raise

        return main

    return decorate


def _interrupted() -> type[BaseException]:
    from .training.interruption import Interrupted

    return Interrupted


def _mendable() -> tuple[type[BaseException], ...]:
    """Errors that name what the user can mend. Bugs (TypeError, AssertionError, …) keep their traceback."""
    from .data.video import VideoError
    from .training.numbers import NonFiniteError

    return (ValueError, OSError, ImportError, OmegaConfBaseException, VideoError, NonFiniteError)


# ---------------------------------------------------------------- checking


def check(cfg: DictConfig, schema: type) -> None:
    """Refuses unknown keys, missing values and arguments that no constructor takes.

    Raises:
        ConfigError: naming the key, what it might have meant, and what exists.
    """
    known = {field.name: field for field in fields(schema)}
    for key in cfg:
        if key not in known:
            raise ConfigError(_unknown(str(key), [*known, *_groups()], "key"))
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        hint = " Choose an experiment: +experiment=tiny, for example." if "name" in missing else ""
        raise ConfigError(f"no value for {', '.join(missing)}.{hint}")
    left_open = {f"dataset.{fact}" for fact in CLIP_FACTS} if "model" in known else set()
    for name, field in known.items():
        if name not in cfg:
            continue
        if is_dataclass(field.type):
            typed(cfg, name, typing.cast(type, field.type))
        else:
            _check_nodes(cfg[name], name, left_open)
            if not isinstance(cfg[name], (DictConfig, ListConfig)):
                _check_type(field.type, cfg[name], name)


def typed(cfg: DictConfig, name: str, schema: type) -> Any:
    """A plumbing node as an instance of its dataclass.

    Raises:
        ConfigError: for an unknown or missing key or a value of another type.
    """
    node = cfg[name]
    known = [field.name for field in fields(schema)]
    for key in map(str, node):
        if key not in known:
            raise ConfigError(_unknown(f"{name}.{key}", [f"{name}.{other}" for other in known], "key"))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {str(error).splitlines()[0]} (key {name}.{error.key})") from error


def _check_nodes(node: Any, path: str, left_open: set[str]) -> None:
    if isinstance(node, ListConfig):
        for i, child in enumerate(node):
            _check_nodes(child, f"{path}[{i}]", left_open)
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        target = _locate(node["_target_"])
        parameters, takes_any, hints = _arguments(target)
        for key in map(str, node):
            if key.startswith("_"):
                continue
            if key not in parameters and not takes_any:
                raise ConfigError(_unknown(f"{path}.{key}", [f"{path}.{p}" for p in parameters], "key"))
            if node[key] is not None or f"{path}.{key}" not in left_open:
                _check_type(hints.get(key), node[key], f"{path}.{key}")
    for key in map(str, node):
        _check_nodes(node[key], f"{path}.{key}", left_open)


def _arguments(target: Any) -> tuple[list[str], bool, dict[str, Any]]:
    """Names of what a constructor takes, whether it takes any others, and the types of the names.

    Options that are typed as a whole (``**options: Unpack[SomeTypedDict]``) count one by one.
    """
    names = list(inspect.signature(target).parameters)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            if typing.get_origin(hints.get(name)) is not typing.Unpack:
                return names, True, hints
            options = typing.get_type_hints(typing.get_args(hints[name])[0])
            names[names.index(name) :] = options
            hints |= options
    return names, False, hints


def _check_type(hint: Any, value: Any, path: str) -> None:
    """Refuses a plain value of another type than the constructor's annotation."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [option for option in options if option in (int, float, str, bool, type(None))]
    if len(plain) != len(options) or isinstance(value, (DictConfig, ListConfig)):
        if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
            raise ConfigError(f"{path}={value} is unknown; choose one of {', '.join(typing.get_args(hint))}")
        return
    for option in plain:
        if isinstance(value, bool) and option is not bool:
            continue
        if isinstance(value, option) or (option is float and isinstance(value, int)):
            return
    names = " or ".join("null" if option is type(None) else option.__name__ for option in plain)
    raise ConfigError(f"{path} must be {names}, got {value!r}")


def _meant(config_name: str, arguments: list[str]) -> str:
    """What overrides that Hydra refused might have meant; empty if none is recognized."""
    parser = OverridesParser.create()
    chosen, values = [], []
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException:
            name, _, value = argument.partition("=")
            return f"a value with special characters is quoted twice: '{name}=\"{value}\"'"
        key = str(override.key_or_group)
        if (CONF / key).is_dir() and override.value() is None:
            return f"{key} is a group of options; leave it away instead of choosing null"
        if (CONF / key).is_dir() or override.is_add():
            chosen.append(argument)
        else:
            values.append(key)
    GlobalHydra.instance().clear()
    if "machine=slurm" in arguments and importlib.util.find_spec("submitit") is None:
        return "machine=slurm needs the package hydra-submitit-launcher: pip install -e '.[cluster]'"
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose(config_name, overrides=chosen)
    except HydraException:
        return ""
    known = _keys(cfg)

    def near(key: str) -> list[str]:
        parent = key.rpartition(".")[0]
        beside = [other for other in known if other.rpartition(".")[0] == parent]
        return beside + ([] if parent else _groups())

    return "\n".join(_unknown(key, near(key) or known, "key") for key in values if key not in known)


def _keys(node: Any, path: str = "") -> list[str]:
    """All keys of a config, with dots."""
    if not isinstance(node, DictConfig):
        return [path]
    below = [
        key for name in map(str, node) for key in _keys(node._get_node(name), f"{path}.{name}".lstrip("."))
    ]
    return below + ([path] if path else [])


def _groups() -> list[str]:
    return [path.name for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__"] + ["sweep"]


def _unknown(key: str, known: list[str], what: str) -> str:
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    meant = f" Did you mean {' or '.join(close)}?" if close else f" Known: {', '.join(sorted(set(known)))}."
    return f"unknown {what} {key!r}.{meant}"


# ---------------------------------------------------------------- building


def _absolute(target: str) -> str:
    return f"{PACKAGE}{target}" if target.startswith(".") else target


def _locate(target: str) -> Any:
    module, _, name = _absolute(target).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"_target_ {target!r} can't be found: {error}") from error


def build(node: DictConfig | dict[str, Any], /, trusted: bool = True, **extra: Any) -> Any:
    """The object that a node with a ``_target_`` describes.

    A target that begins with a dot is ours (``.models.unet.UNet3d``); another is the user's own class.

    Args:
        node: the config node; nested nodes with targets are built first.
        trusted: False for a node that came with a model folder: then only this package's models,
            schedules and masks are built.
        extra: arguments that objects know and configs don't.

    Raises:
        ConfigError: for a target that isn't there, or isn't allowed.
    """
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    if not isinstance(plain, dict) or "_target_" not in plain:
        raise ConfigError(f"{plain} has no _target_: choose an option of its group (group=option) first")
    resolved = _resolve_targets(plain, trusted)
    wants_partial = resolved.pop("_partial_", False)
    # Live objects never pass through OmegaConf, which would turn a dataclass into a dictionary.
    try:
        maker = hydra.utils.instantiate(resolved | {"_partial_": True}, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise
    return functools.partial(maker, **extra) if wants_partial else maker(**extra)


def _resolve_targets(node: Any, trusted: bool) -> Any:
    if isinstance(node, list):
        return [_resolve_targets(child, trusted) for child in node]
    if not isinstance(node, dict):
        return node
    resolved = {key: _resolve_targets(value, trusted) for key, value in node.items()}
    if "_target_" in resolved:
        target = str(resolved["_target_"])
        located = (
            None if not trusted and not target.startswith((".models.", ".diffusion.")) else _locate(target)
        )
        ours = (f"{PACKAGE}.models.", f"{PACKAGE}.diffusion.")
        if not trusted and not str(getattr(located, "__module__", "")).startswith(ours):
            raise ConfigError(
                f"the model folder asks to build {target!r}; only this package's own models and schedules "
                "are built from a model folder"
            )
        resolved["_target_"] = _absolute(target)
    return resolved


def full_arguments(node: Any) -> Any:
    """A plain node with the defaults of its constructors written out, so that two of them can be compared."""
    if isinstance(node, list | tuple):
        return [full_arguments(child) for child in node]
    if not isinstance(node, dict):
        return node
    full = {key: full_arguments(value) for key, value in node.items()}
    if "_target_" not in node:
        return full
    parameters = inspect.signature(_locate(node["_target_"])).parameters.values()
    defaults = {p.name: full_arguments(p.default) for p in parameters if p.default is not p.empty}
    return defaults | full


# ---------------------------------------------------------------- saving and comparing


def save_resolved(cfg: DictConfig, path: Path) -> None:
    """Writes the config with all interpolations resolved, atomically."""
    from .data.storage import atomic_path

    with atomic_path(path) as part:
        part.write_text(OmegaConf.to_yaml(cfg, resolve=True))


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines ``key: old -> new`` for all that differs and isn't harmless."""
    if path in HARMLESS:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            below = f"{path}.{key}" if path else str(key)
            lines += difference(old.get(key, "(none)"), new.get(key, "(none)"), below)
        return lines
    return [] if old == new else [f"  {path}: {old} -> {new}"]


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """A plain config by dotted keys."""
    if not isinstance(node, dict):
        return {path: node}
    below = [flat(value, f"{path}.{key}".lstrip(".")) for key, value in node.items()]
    return {key: value for part in below for key, value in part.items()}


def run_folder(cfg: DictConfig) -> Path:
    """Where a run lives: ``runs/name``; in a multirun with what is swept behind the name.

    Two cells of a multirun thereby never share a folder, whatever they vary, and a longer run of the same
    cell finds its folder again.
    """
    name = str(cfg.name)
    if not name.strip("./ ") or ".." in Path(name).parts or Path(name).is_absolute():
        raise ConfigError(
            f"name={name!r} is no name for a folder under {cfg.runs}; choose one, like name=first"
        )
    if _in_multirun():
        swept = set(os.environ.get(_SWEPT, "").split()) | set(HydraConfig.get().sweeper.get("params") or {})
        overrides = [str(override) for override in HydraConfig.get().overrides.task]
        # Each experiment has a name of its own, and may look for the folder of another by that.
        told = {"name"} if "name" in map(_key, overrides) else {"name", "experiment"}
        cell = [override.lstrip("+") for override in overrides if _key(override) in swept - told]
        if cell:
            name = f"{name}-{','.join(cell).replace('/', '.')}"
    return Path(cfg.runs) / name


def _in_multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]


def _swept_keys(arguments: list[str]) -> list[str]:
    """Keys that the command line gives several values."""
    parser = OverridesParser.create()
    keys = []
    for argument in arguments:
        with contextlib.suppress(HydraException):
            if not argument.startswith("-") and parser.parse_override(argument).is_sweep_override():
                keys.append(_key(argument))
    return keys


def read_yaml(path: Path) -> Any:
    """What a config file holds, as plain Python.

    Raises:
        ConfigError: if it isn't YAML; nothing in it is run.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is damaged, it isn't a config: {reason[:300]}") from error


def claim_run_folder(cfg: DictConfig, folder: Path) -> None:
    """Writes ``config.yaml`` into the run's folder, unless another run lives there.

    Raises:
        ConfigError: if the folder holds states or a model of a run with another config.
    """
    path = folder / "config.yaml"
    if path.exists() and ((folder / "state").exists() or (folder / "model").exists()):
        remedy = (
            "bring it back from a copy, or remove it: the folder's states then go on with the config as it "
            "is given now"
        )
        try:
            old = read_yaml(path)
        except ConfigError as error:
            raise ConfigError(f"{error}; {remedy}") from error
        if not isinstance(old, dict) or not old:
            raise ConfigError(f"{path} holds no config; {remedy}")
        lines = difference(old, OmegaConf.to_container(cfg, resolve=True))
        if lines:
            changes = "\n".join(lines)
            raise ConfigError(
                f"{folder} holds a run with another config (old -> new):\n{changes}\n"
                f"Choose another folder with name=…, or remove {folder} to start anew"
            )
    save_resolved(cfg, path)
