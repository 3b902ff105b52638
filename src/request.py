"""What `sample` is asked for: which plan, by which models, beside which given videos."""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from .config import ConfigError, GuidanceSettings, InterpolationSettings, build, typed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from .diffusion.long_video import Plan
    from .generation import VideoGenerator
    from .model_folder import DiffusionModel


def check_request(cfg: DictConfig) -> None:
    """Raises ConfigError for options that can't be meant or don't go together."""
    for name in ("num_samples", "batch_size", "num_frames", "decoding_window"):
        if cfg[name] is not None and cfg[name] < 1:
            raise ConfigError(f"{name} must be at least 1, got {cfg[name]}")
    if cfg.first_seed < 0:
        raise ConfigError(f"first_seed must be at least 0, got {cfg.first_seed}")
    if cfg.direction not in ("forward", "backward"):
        raise ConfigError(f"direction must be forward or backward, got {cfg.direction}")
    kinds = ("autoregressive", "hierarchical", "flat")
    if cfg.plan.kind not in kinds:
        raise ConfigError(f"plan.kind must be one of {', '.join(kinds)}, got {cfg.plan.kind}")
    if (cfg.plan.kind == "flat") != (cfg.plan.num_given == 0):
        raise ConfigError(
            f"plan.num_given={cfg.plan.num_given} doesn't go with plan.kind={cfg.plan.kind}: windows of a "
            "flat plan are given nothing (0), those of the others at least 1 latent frame"
        )
    filling = [
        f"interpolation.{key}={value}" for key, value in cfg.interpolation.items() if value is not None
    ]
    if filling and cfg.plan.kind != "hierarchical":
        raise ConfigError(
            f"{', '.join(filling)} {'has' if len(filling) == 1 else 'have'} nothing to do in "
            f"plan={cfg.plan.kind}, which fills no gaps; use plan=hierarchical, or leave interpolation.* away"
        )
    between = isinstance(cfg.video, ListConfig)
    if between and len(cfg.video) != 2:
        raise ConfigError(f"video=[A,B] fills what lies between two videos, got {len(cfg.video)} of them")
    if cfg.direction == "backward" and (cfg.video is None or between or cfg.loop):
        raise ConfigError("direction=backward needs video=FILE, and neither a second video nor loop=true")
    if between and cfg.loop:
        raise ConfigError("loop=true takes one video or none: video=[A,B] would have two ends")
    if cfg.plan.kind == "flat" and (cfg.video is not None or cfg.loop):
        raise ConfigError(
            "windows of plan=flat know nothing of each other: they can neither go on from a video nor lead "
            "back to a start; use plan=autoregressive or plan=hierarchical"
        )
    for path in cfg.video if between else [cfg.video]:
        if (between or path is not None) and not (path and Path(path).exists()):
            raise FileNotFoundError(f"there is no {path}; give video=FILE, the video to go on from")


Setting = tuple[str, Any]
"""A key of the config and its value."""


def number_of(name: str, value: Any, whole: bool) -> float:
    """A number as it stands in a config.

    Raises:
        ConfigError: if it is none, or not a whole one where one is asked for.
    """
    fits = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and not whole)
    if isinstance(value, bool) or not fits:
        raise ConfigError(f"{name} must be a {'whole ' if whole else ''}number, got {value}")
    return float(value)


def interval_of(name: str, value: Any) -> tuple[int, int] | None:
    """A guidance interval as it stands in a config.

    Raises:
        ConfigError: unless it is null or two whole numbers.
    """
    if value is None:
        return None
    if not isinstance(value, list | ListConfig) or len(value) != 2:
        raise ConfigError(f"{name} must be null or [first,last] diffusion time, got {value}")
    first, last = (int(number_of(name, time, whole=True)) for time in value)
    return first, last


@dataclass(frozen=True)
class LevelChoice:
    """Who makes the windows of one level of a plan, and how.

    Args:
        stride: latent frames from one frame of a window to the next.
        model: the trained model.
        generator: makes its windows.
    """

    stride: int
    model: "DiffusionModel"
    generator: "VideoGenerator"


def filling_model(cfg: DictConfig, model: "DiffusionModel") -> "DiffusionModel":
    """The model that fills the gaps between key latents.

    Raises:
        ConfigError: if it knows other latents than the model of the key latents.
    """
    from .model_folder import fingerprint, load_diffusion

    path = cfg.interpolation.model
    if path is None:
        return model
    filler = load_diffusion(path)
    known, other = (fingerprint(Path(folder) / "autoencoder") for folder in (cfg.model, path))
    if known != other:
        raise ConfigError(
            f"model={cfg.model} and interpolation.model={path} were trained on latents of different "
            "autoencoders; train both on one: autoencoder_from=FOLDER"
        )
    for fact in ("fps", "resolution", "classes"):
        if getattr(model.data, fact) != getattr(filler.data, fact):
            raise ConfigError(
                f"model={cfg.model} and interpolation.model={path} differ in {fact}: "
                f"{getattr(model.data, fact)} and {getattr(filler.data, fact)}; they must have been trained "
                "on the same kind of clips"
            )
    return filler


def levels_of(cfg: DictConfig, model: "DiffusionModel", filler: "DiffusionModel") -> list[LevelChoice]:
    """The levels of the plan, coarsest first.

    Raises:
        ConfigError: if the models don't know the strides that the plan needs.
    """
    guidance: GuidanceSettings = typed(cfg, "guidance", GuidanceSettings)
    filling: InterpolationSettings = typed(cfg, "interpolation", InterpolationSettings)
    sampler = build(cfg.sampler)

    def level(
        stride: int, of: "DiffusionModel", scale: Setting, interval: Setting, noise_level: Setting
    ) -> LevelChoice:
        generator = of.generator(
            sampler,
            guidance_scale=number_of(*scale, whole=False),
            guidance_interval=interval_of(*interval),
            noise_level=int(number_of(*noise_level, whole=True)),
            keys=(scale[0], interval[0], noise_level[0]),
        )
        return LevelChoice(stride, of, generator)

    chosen = (
        ("guidance.scale", guidance.scale),
        ("guidance.interval", guidance.interval),
        ("noise_level", cfg.noise_level),
    )
    known = ", ".join(map(str, model.latent_strides))
    if cfg.plan.kind != "hierarchical":
        if 1 not in model.latent_strides:
            raise ConfigError(
                f"model={cfg.model} makes key latents only ({known} latent frames apart), and "
                f"plan={cfg.plan.kind} needs every one; use plan=hierarchical with "
                "interpolation.model=FOLDER"
            )
        return [level(1, model, *chosen)]
    coarsest = model.latent_strides[0]
    finer = _below(coarsest, filler)
    if not finer or finer[-1] != 1:
        raise ConfigError(_no_hierarchy(cfg, model, filler))

    def setting(name: str, value: Any, fallback: Setting, i: int) -> Setting:
        listed = list(value) if isinstance(value, list | ListConfig) else None
        if name == "guidance_interval" and listed and not isinstance(listed[0], list | ListConfig | None):
            listed = None  # one interval
        if listed is not None and len(listed) != len(finer):
            raise ConfigError(
                f"interpolation.{name} lists {len(listed)} values for {len(finer)} level(s) of filling "
                f"(strides {', '.join(map(str, finer))}); give one value, or one for each"
            )
        own = value if listed is None else listed[i]
        return fallback if own is None else (f"interpolation.{name}", own)

    scale, interval, noise_level = chosen
    if not filler.masking.max_noise_level:
        noise_level = ("noise_level", 0)  # a model that knows clean latents alone gets them
    levels = [level(coarsest, model, *chosen)]
    for i, stride in enumerate(finer):
        levels.append(
            level(
                stride,
                filler,
                setting("guidance_scale", filling.guidance_scale, scale, i),
                setting("guidance_interval", filling.guidance_interval, interval, i),
                setting("noise_level", filling.noise_level, noise_level, i),
            )
        )
    return levels


def _below(coarsest: int, filler: "DiffusionModel") -> list[int]:
    """The strides at which a model can fill gaps between latents so far apart."""
    return [stride for stride in filler.latent_strides if stride < coarsest]


def _no_hierarchy(cfg: DictConfig, model: "DiffusionModel", filler: "DiffusionModel") -> str:
    """Why two models, or one, are no hierarchy, and what would be one."""
    coarsest, listed = model.latent_strides[0], list(model.latent_strides)
    beside = f"model={cfg.model} was trained with latent_strides={listed}"
    if filler is not model:
        beside += f", interpolation.model={cfg.interpolation.model} with {list(filler.latent_strides)}"
        if _below(filler.latent_strides[0], model)[-1:] == [1]:
            return (
                f"{beside}: the two seem to be the wrong way round. model=FOLDER makes the key latents, "
                "interpolation.model=FOLDER fills the gaps between them; swap the two"
            )
    if coarsest == 1:
        return (
            f"plan=hierarchical fills the gaps between key latents; {beside} and makes no key latents, which "
            "lie several latent frames apart. Train one model on several strides (latent_strides=[4,1]), or "
            "one on key latents ([4]) and give this one as interpolation.model=FOLDER beside it, or use "
            "plan=autoregressive"
        )
    if filler is model:
        return (
            f"{beside} and makes key latents only: there is nothing that fills the gaps between them. Give "
            "interpolation.model=FOLDER, a model trained with latent_strides=[1], or train one model on "
            f"several strides (latent_strides={[*listed, 1]})"
        )
    return (
        f"{beside}: there is nothing that fills the gaps between the key latents down to every latent frame. "
        "Give an interpolation.model trained with latent_strides=[1], or with more strides that end in 1 and "
        f"are smaller than {coarsest}"
    )


@dataclass(frozen=True)
class Wanted:
    """What is to be made, beside what is known.

    Args:
        num_frames: video frames to be made.
        plan: of the latent frames.
        first: the given video that comes before, if any.
        then: the given video that comes after, if any.
        known_first: latents ``1 c t h w`` of the end of `first`.
        known_then: latents ``1 c t h w`` of the start of `then`.
        backward: whether the plan runs from the last frame to the first.
        loops: whether the end leads to the start, with no video given.
    """

    num_frames: int
    plan: "Plan"
    first: "GivenVideo | None" = None
    then: "GivenVideo | None" = None
    known_first: "Tensor | None" = None
    known_then: "Tensor | None" = None
    backward: bool = False
    loops: bool = False

    @property
    def num_in_file(self) -> int:
        """Video frames of a written file; of a given one that leads back to itself only once."""
        given = [video for video in (self.first, self.then) if video is not None]
        if self.first is self.then:
            given = given[:1]
        return self.num_frames + sum(video.num_frames for video in given)

    @classmethod
    def of(cls, cfg: DictConfig, model: "DiffusionModel", levels: Sequence[LevelChoice]) -> "Wanted":
        """What a config asks for.

        Raises:
            ConfigError: for lengths that can't be.
        """
        factor = model.autoencoder.downsample[0]
        between = isinstance(cfg.video, ListConfig)
        paths = list(cfg.video) if between else [cfg.video] if cfg.video else []
        videos = [GivenVideo(Path(path), model) for path in paths]
        backward = cfg.direction == "backward"
        closes = between or bool(cfg.loop)
        continues = bool(videos)
        first = None if backward or not videos else videos[0]
        then = videos[0] if backward or (videos and cfg.loop) else videos[1] if between else None

        def plan(num_latents: int) -> "Plan":
            from .diffusion.long_video import Level, Plan

            return Plan(
                tuple(Level(level.stride, level.model.window[1]) for level in levels),
                num_latents,
                cfg.plan.num_given,
                continues=continues,
                closes=closes,
            )

        window = levels[0].model.window[1]
        if cfg.num_frames is not None:
            num_frames = cfg.num_frames
        elif closes:
            num_frames = factor * fitting_lengths(plan, levels, 1)[0]
        else:
            num_frames = factor * (window - cfg.plan.num_given if continues else window)
        if closes and num_frames // factor not in (
            found := fitting_lengths(plan, levels, num_frames // factor)
        ):
            numbers = " or ".join(str(factor * count) for count in found)
            raise ConfigError(
                f"num_frames={num_frames} can't be closed by windows that this model knows; use {numbers}"
            )
        if closes and num_frames % factor:
            raise ConfigError(
                f"num_frames={num_frames} must be a multiple of {factor}, the video frames of a latent "
                f"frame, where the end meets what is known; use {num_frames // factor * factor}"
            )
        num_latents = -(-num_frames // factor)
        # A first window is decoded whole, even if not all of it is wanted.
        whole = not (closes or continues) and levels[0].stride == 1
        made = plan(max(num_latents, window) if whole else num_latents)
        check_training(made, levels, backward)
        return cls(
            num_frames,
            made,
            first,
            then,
            None if first is None else first.latents(made.num_known, last=True),
            None if then is None else then.latents(made.num_known if backward else 1, last=False),
            backward,
            closes and not videos,
        )

    def known(self, count: int) -> "dict[int, Tensor]":
        """Known latents ``b c h w`` by their positions in the plan, for so many samples."""
        found: dict[int, Tensor] = {}
        before, after = self.known_first, self.known_then
        if before is not None:
            found |= {i - before.shape[2]: before[:, :, i] for i in range(before.shape[2])}
        if after is not None:
            # Backwards the plan continues what comes after; else it ends at its first frame.
            n = after.shape[2] if self.backward else 1
            found |= {-1 - i if self.backward else self.plan.num_frames: after[:, :, i] for i in range(n)}
        return {position: latents.expand(count, -1, -1, -1) for position, latents in found.items()}


def fitting_lengths(plan: "Callable[[int], Plan]", levels: Sequence[LevelChoice], wished: int) -> list[int]:
    """The nearest numbers of latent frames, below and above a wish or equal to it, that a plan can close.

    Raises:
        ConfigError: if there is none.
    """

    def fits(count: int) -> bool:
        try:
            check_training(plan(count), levels, backward=False)
        except (ConfigError, ValueError):
            return False
        return True

    # Whatever fits comes again after as many frames as the coarsest windows reach over.
    period = math.lcm(*(level.stride * (level.model.window[1] - 1) for level in levels)) + 1
    above = next((n for n in range(max(wished, 1), wished + 3 * period) if fits(n)), None)
    below = next((n for n in range(wished - 1, max(wished - 3 * period, 0), -1) if fits(n)), None)
    if above == wished:
        return [wished]
    found = [count for count in (below, above) if count is not None]
    if not found:
        plan(1_000 * period)  # says what is wrong, if it is the plan
        raise ConfigError(
            "this model can't make windows that end at a known frame, whatever their number; train it with "
            "conditioning=any"
        )
    return found


class GivenVideo:
    """A video to go on from, read at the model's pace and size, a few frames at a time.

    Args:
        path: of the file, or of a folder of frames.
        model: whose pace, size and autoencoder are used.
    """

    def __init__(self, path: Path, model: "DiffusionModel") -> None:
        self.path, self.model = path, model
        warn_if_cut_short(path)
        self.num_frames = sum(1 for _ in self._read())
        factor = model.autoencoder.downsample[0]
        if self.num_frames < factor:
            raise ConfigError(
                f"{path} has {self.num_frames} frames at the model's pace, fewer than the {factor} of a "
                "latent frame"
            )

    def _read(self) -> "Iterator[np.ndarray[Any, Any]]":
        from .data.video import iterate_frames

        data = self.model.data
        yield from islice(iterate_frames(self.path, at_fps=data.target_fps), 0, None, data.frame_stride)

    def frames(self, at_once: int = 32) -> "Iterator[np.ndarray[Any, Any]]":
        """Frames uint8 ``t h w c`` in the model's size, piece by piece."""
        import numpy as np

        from .data.transforms import Resize

        height, width = self.model.data.resolution
        resize = Resize((height, width))
        frames = map(resize, self._read())
        while piece := list(islice(frames, at_once)):
            yield np.stack(piece)

    def latents(self, num_needed: int, last: bool) -> "Tensor":
        """Normalized latents ``1 c t h w`` of the video's end, or of its start: as many as a training clip's.

        Raises:
            ConfigError: if the video is too short for so many as are needed.
        """
        import numpy as np
        import torch

        from .data.transforms import to_video

        autoencoder = self.model.autoencoder
        factor = autoencoder.downsample[0]
        count = min(self.num_frames // factor, max(self.model.data.num_frames // factor, num_needed))
        if count < num_needed:
            raise ConfigError(
                f"{self.path} has {self.num_frames} frames at the model's pace, and {num_needed * factor} "
                "have to be known; use a longer video or a smaller plan.num_given"
            )
        frames = (frame for piece in self.frames() for frame in piece)
        clip = deque(frames, count * factor) if last else list(islice(frames, count * factor))
        with torch.no_grad():
            video = to_video(torch.from_numpy(np.stack(clip))[None]).to(
                next(self.model.unet.parameters()).device
            )
            return autoencoder.normalize(autoencoder.encode(video).mean)


# Frames by which whole files may miss what they declare: packed-B AVI counts a few too many.
MISCOUNT = 3


def warn_if_cut_short(path: Path) -> None:
    """Warns if a video declares more frames than can be decoded: only those would be gone on from."""
    from .data.video import count_frames, declared_frames

    declared = declared_frames(path)
    if declared is not None and (count := count_frames(path)) < declared - MISCOUNT:
        warnings.warn(
            f"{path} says that it has {declared} frames, and {count} of them can be decoded: it seems to be "
            "cut short or damaged. Those are taken; copy the file again if it should have more",
            stacklevel=2,
        )


def check_training(plan: "Plan", levels: Sequence[LevelChoice], backward: bool) -> None:
    """Raises ConfigError if a window is given what its model was never given in training."""
    for window in plan.kinds():
        length = len(window.frames)
        pattern = window.pattern
        if backward:
            pattern = tuple(length - 1 - i for i in reversed(pattern))
        masking = levels[window.level].model.masking
        if not masking.could_give(pattern, length):
            what = f"latent frames {', '.join(map(str, pattern))} of {length}" if pattern else "nothing"
            raise ConfigError(
                f"the plan needs windows that are given {what}, which this model never saw in training "
                f"({masking.told()}). Choose another plan or plan.num_given, or train with conditioning=any"
            )
