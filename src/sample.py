"""Make videos with a trained model: ``python -m src.sample model=runs/ucf101/model``."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from .config import ConfigError, MachineSettings, SampleConfig, difference, typed, verb
from .request import LevelChoice, Wanted, check_request, filling_model, levels_of

if TYPE_CHECKING:
    from torch import Tensor

    from .data.pieces import Pieces
    from .diffusion.long_video import Window
    from .generation import LongVideoGenerator
    from .model_folder import DiffusionModel
    from .training.share import Share


@verb("sample", SampleConfig)
def main(cfg: DictConfig) -> None:
    """Writes one mp4 a sample, a contact sheet, and a list of seeds and classes."""
    from .training.share import Share

    share = Share()
    make_videos(cfg, Path(cfg.output) if cfg.output else Path(cfg.model).parent / "samples", share)
    share.close()


def make_videos(cfg: DictConfig, folder: Path, share: "Share") -> None:
    """Samples what a config of `sample` asks for into a folder; what is complete there stays."""
    from tqdm import tqdm

    from .data.storage import remove_abandoned
    from .model_folder import fingerprint, load_diffusion
    from .training.device import compile_in_place, pick_device, release_freed_memory

    check_request(cfg)
    machine: MachineSettings = typed(cfg, "machine", MachineSettings)
    device = pick_device(keeps_memory=False)
    model = load_diffusion(cfg.model).to(device)
    levels = levels_of(cfg, model, filling_model(cfg, model))
    wanted = Wanted.of(cfg, model, levels)
    if machine.compile:
        networks = {id(network): network for level in levels for network in level.generator.networks()}
        compile_in_place(networks.values())
    num_windows = sum(wanted.plan.counts())
    seeds = [cfg.first_seed + i for i in range(cfg.num_samples)]
    labels_of(model, seeds, cfg.labels)  # what is wrong with them is told now
    if cfg.dry_run:
        if share.rank == 0:
            sizes = [len(batch) for batch in share.all_batches(len(seeds), cfg.batch_size)]
            print(plan_in_words(cfg, wanted, levels, sizes, share.world_size))
            write_plan(wanted, folder / "plan.svg")
        return
    made_by = recipe(cfg, fingerprint(Path(cfg.model)), wanted.num_frames)
    names = {seed: folder / f"sample_{seed:06d}.mp4" for seed in seeds}

    def begun() -> list[int]:
        """The seeds that are still to be sampled; the folder says from now on how its samples are made."""
        refuse_other_samples(folder, made_by)
        remove_abandoned(folder, "sample_*.mp4")
        told = (folder / "samples.json").is_file()
        finished = [seed for seed in seeds if told and is_complete(names[seed], wanted.num_in_file)]
        describe(cfg, model, folder, made_by, {seed: names[seed] for seed in finished})
        return [seed for seed in seeds if seed not in finished]

    todo = share.from_first(begun)
    if share.rank == 0 and num_windows > 1 and todo:
        sizes = [len(batch) for batch in share.all_batches(len(todo), cfg.batch_size)]
        print(plan_in_words(cfg, wanted, levels, sizes, share.world_size))
    batches = [[todo[i] for i in batch] for batch in share.batches(len(todo), cfg.batch_size)]
    total = sum(map(len, batches)) * num_windows
    unfinished = Windows(folder / ".unfinished", made_by)
    with tqdm(total=total, unit="window", desc="sampling", disable=share.rank > 0) as bar:

        def progress(made: int) -> None:
            bar.update(made)
            if device.type == "cpu":
                release_freed_memory()

        for batch in batches:
            generator = long_videos(cfg, wanted, levels, unfinished if num_windows > 1 else None, progress)
            labels = labels_of(model, batch, cfg.labels)
            with ExitStack() as files:
                write_videos(cfg, model, wanted, generator, labels, {n: names[n] for n in batch}, files)
            unfinished.remove(batch)
    share.wait()
    if share.rank == 0:
        unfinished.close()
        describe(cfg, model, folder, made_by, names)
        write_contact_sheet(folder / "contact_sheet.png", list(names.values()), wanted.num_in_file)
        before = f" ({len(seeds) - len(todo)} of them were there)" if len(todo) < len(seeds) else ""
        print(f"{len(seeds)} videos of {wanted.num_in_file} frames{before}: {folder}")


def long_videos(
    cfg: DictConfig,
    wanted: Wanted,
    levels: Sequence[LevelChoice],
    kept: "Windows | None" = None,
    progress: Callable[[int], object] = lambda count: None,
) -> "LongVideoGenerator":
    """What makes the videos."""
    from .generation import LongVideoGenerator

    model = levels[0].model
    return LongVideoGenerator(
        wanted.plan,
        [level.generator for level in levels],
        max(model.autoencoder_frames // model.autoencoder.downsample[0], 1),
        cfg.decoding_window,
        kept,
        progress,
    )


def write_videos(
    cfg: DictConfig,
    model: "DiffusionModel",
    wanted: Wanted,
    generator: "LongVideoGenerator",
    labels: "Tensor | None",
    paths: dict[int, Path],
    files: ExitStack,
) -> None:
    """Writes a file for each seed, frames as they are made, beside those that were given."""
    from .data.transforms import to_frames
    from .data.video import VideoWriter
    from .generation import require_finite

    writers = [files.enter_context(VideoWriter(path, model.data.fps)) for path in paths.values()]
    if wanted.first is not None:
        for given in wanted.first.frames():
            for writer in writers:
                writer.write(given)
    for video in videos(wanted, generator, list(paths), labels, cfg.batch_size):
        for writer, frames in zip(writers, to_frames(require_finite(video.cpu())), strict=True):
            writer.write(frames)
    if wanted.then is not None and wanted.then is not wanted.first:
        for given in wanted.then.frames():
            for writer in writers:
                writer.write(given)


def videos(
    wanted: Wanted,
    generator: "LongVideoGenerator",
    seeds: Sequence[int],
    labels: "Tensor | None",
    batch_size: int,
) -> Iterator["Tensor"]:
    """What is to be made, ``b c t h w`` in [-1, 1], piece by piece in order of time."""
    import torch

    from .generation import without_ends

    pieces = generator.latents(
        seeds,
        labels,
        batch_size=batch_size,
        known=wanted.known(len(seeds)),
        loops=wanted.loops,
        backward=wanted.backward,
    )
    extra = wanted.plan.num_frames * generator.factor - wanted.num_frames
    if wanted.loops:
        yield from generator.loop(pieces)
        return
    if wanted.backward:
        # Made from the last to the first. Latents are small: they are kept until the first is there.
        pieces = iter([torch.cat(list(pieces), dim=2).flip(2)])
    ends = [
        None if latents is None else latents.expand(len(seeds), -1, -1, -1, -1)
        for latents in (wanted.known_first, wanted.known_then)
    ]
    video = generator.decode(pieces, before=ends[0], after=ends[1])
    yield from without_ends(video, extra if wanted.backward else 0, 0 if wanted.backward else extra)


class Windows:
    """Finished windows of unfinished samples, on the disk.

    Args:
        folder: of all that is unfinished.
        made_by: how the samples are made; windows of samples made in another way aren't seen.
    """

    def __init__(self, folder: Path, made_by: dict[str, Any]) -> None:
        self.outer = folder
        self.folder = folder / hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]

    def get(self, seed: int, window: "Window") -> "Tensor | None":
        """Latents ``c t h w`` of one sample's window, if they are there."""
        return self._pieces(seed).get(_name(window))

    def put(self, seed: int, window: "Window", latents: "Tensor") -> None:
        """Keeps latents ``c t h w``."""
        self._pieces(seed).put(_name(window), latents)

    def remove(self, seeds: Sequence[int]) -> None:
        """Removes those of finished samples."""
        for seed in seeds:
            self._pieces(seed).remove()

    def close(self) -> None:
        """Removes the folder, unless windows of other samples wait in it."""
        for folder in (self.folder, self.outer):
            with suppress(OSError):
                folder.rmdir()

    def _pieces(self, seed: int) -> "Pieces":
        from .data.pieces import Pieces

        return Pieces(self.folder / f"{seed:06d}")


def _name(window: "Window") -> str:
    return f"level_{window.level}_window_{window.number:06d}"


def plan_in_words(
    cfg: DictConfig,
    wanted: Wanted,
    levels: Sequence[LevelChoice],
    sizes: Sequence[int],
    num_processes: int,
) -> str:
    """What will be made from what, how many calls of the network that takes, and about how long.

    Args:
        cfg: of `sample`.
        wanted: what is to be made.
        levels: of its plan.
        sizes: how many samples each batch has.
        num_processes: that share them.
    """
    plan, factor = wanted.plan, levels[0].model.autoencoder.downsample[0]
    # How often the network is called for so many windows at once, by level.
    calls: list[Counter[int]] = [Counter() for _ in levels]
    for size, times in Counter(sizes).items():
        for level, choice in enumerate(levels):
            for count, often in plan.group_sizes(level, max(cfg.batch_size // size, 1)).items():
                calls[level][size * count] += times * often * choice.generator.num_calls
    lines = [
        f"plan {cfg.plan.kind}: {wanted.num_frames:,} frames = {plan.num_frames:,} latent frames of "
        f"{factor}, {sum(sizes)} sample(s)"
    ]
    seconds = 0.0
    for i, (choice, count) in enumerate(zip(levels, plan.counts(), strict=True)):
        total, widest = calls[i].total(), max(calls[i], default=1)
        seconds += total * choice.generator.seconds_of_call(widest, choice.stride)
        apart = f"{choice.stride} apart" if choice.stride > 1 else "one after another"
        how = (
            f"each continuing the last {plan.num_given}"
            if plan.num_given
            else "knowing nothing of each other"
        )
        if i > 0:
            how = "filling the gaps of the level above"
        lines.append(
            f"  level {i}: {count:,} windows of {plan.levels[i].window} latent frames {apart}, {how}; "
            f"up to {widest} at once: {total:,} calls of the network"
        )
    time = in_words(seconds / min(num_processes, len(sizes)))
    total = sum(counter.total() for counter in calls)
    lines.append(f"  {total:,} calls, about {time} on {num_processes} process(es), and the decoding")
    return "\n".join(lines)


def in_words(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def write_plan(wanted: Wanted, path: Path) -> None:
    """Draws the plan's first windows into an SVG file."""
    from .data.storage import atomic_path
    from .reporting.plans import draw_plan

    with atomic_path(path) as part:
        part.write_bytes(draw_plan(wanted.plan, list(islice(wanted.plan.windows(), 60))))
    print(f"drawn: {path}")


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
    from .data.video import sha256_of
    from .model_folder import fingerprint

    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    decisive = ["sampler", "guidance", "plan", "labels", "noise_level"]
    decisive += ["interpolation", "direction", "loop", "decoding_window"]
    made_by = {"weights_sha256": weights, "num_frames": num_frames} | {key: plain[key] for key in decisive}
    filler = plain["interpolation"].pop("model")
    if filler is not None:
        made_by["interpolation_sha256"] = fingerprint(Path(filler))
    videos = plain["video"] if isinstance(plain["video"], list) else [plain["video"]]
    return made_by | {"videos_sha256": [sha256_of(Path(video)) for video in videos if video is not None]}


def refuse_other_samples(folder: Path, made_by: dict[str, Any]) -> None:
    """Raises ConfigError if a folder holds samples of another model or made in another way, ValueError if it
    can't be told.

    Mixed, they would be measured as one.
    """
    from .data.storage import parse_json

    path = folder / "samples.json"
    if not path.is_file():
        return
    remedy = "remove it and run the same command again, which makes the samples anew"
    told = parse_json(path, remedy)
    if not isinstance(told, dict) or not isinstance(told.get("made_by", {}), dict):
        raise ConfigError(f"{path} is damaged, it doesn't say how its samples were made; {remedy}")
    lines = difference(told.get("made_by", {}), made_by)
    if lines:
        changes = "\n".join(lines)
        raise ConfigError(
            f"{folder} holds samples that were made in another way (there -> here):\n{changes}\n"
            f"Choose another folder with output=…, or remove {folder} first"
        )


def is_complete(path: Path, num_frames: int) -> bool:
    """Whether a sample is there with all its frames; says so if it is there without them."""
    from .data.video import count_frames

    if not path.is_file():
        return False
    count = count_frames(path)
    if count != num_frames:
        print(f"{path} is damaged: {count} of {num_frames} frames can be decoded; it is made again")
    return count == num_frames


def describe(
    cfg: DictConfig,
    model: "DiffusionModel",
    folder: Path,
    made_by: dict[str, Any],
    paths: dict[int, Path],
) -> None:
    """Writes ``samples.json``: how the samples are made, and those that are there, by seed."""
    from .data.storage import write_json

    labels = labels_of(model, list(paths), cfg.labels)
    entries = [
        {"file": path.name, "seed": seed}
        | ({} if labels is None else {"class": model.data.classes[int(labels[i])]})
        for i, (seed, path) in enumerate(paths.items())
    ]
    write_json(
        folder / "samples.json",
        {
            "model": str(cfg.model),
            "step": model.step,
            "num_frames": made_by["num_frames"],
            "fps": model.data.fps,
            "guidance_scale": cfg.guidance.scale,
            "made_by": made_by,
            "samples": entries,
        },
    )


def write_contact_sheet(path: Path, videos: Sequence[Path], num_frames: int) -> None:
    """A picture of frames of the first few videos, from left to right."""
    from .data.video import contact_sheet, read_clip

    stride = max(1, num_frames // 16)
    shown = [read_clip(video, 0, min(num_frames // stride, 16), stride) for video in videos[:12]]
    path.write_bytes(contact_sheet(shown, num_columns=len(shown[0])))


if __name__ == "__main__":
    main()
