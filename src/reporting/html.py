"""One self-contained HTML page about some runs: nothing in it is fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.storage import atomic_path
from ..data.video import VideoError, probe
from .plots import draw, panels
from .runs import Clip, Evaluation, Preview, Run

# Browsers refuse to play more than 75 videos on one page.
_MAX_VIDEOS = 72
_MAX_PER_SET = 12
_MAX_BYTES = 12 * 2**20
_MAX_PREVIEWS = 6
_SMALL = 160  # pixels; smaller videos are enlarged with visible pixels rather than blurred
_MIME = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".webp": "image/webp",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}

# Name (or its beginning), heading, meaning; in the order of the table.
_MEANINGS: tuple[tuple[str, str, str], ...] = (
    ("fvd", "Distance to real videos", "Fréchet distance of I3D features; lower is better"),
    ("kvd", "Distance to real videos", "kernel distance of I3D features; lower is better"),
    ("frechet_distance", "Distance to real videos", "between Gaussians of the features; lower is better"),
    ("kernel_distance", "Distance to real videos", "unbiased, cubic kernel; lower is better, 0 for one law"),
    ("contrast", "Plain statistics", "deviation of the pixels of a frame; ratio 1 is real"),
    ("motion", "Plain statistics", "mean difference of neighbouring frames; ratio 1 is real"),
    ("saturation", "Plain statistics", "spread of a pixel's colours; ratio 1 is real"),
    ("pairwise_distance", "Variety", "mean distance between two videos; a ratio near 0 is collapse"),
    ("nearest_training_clip_of_held_out", "Copying", "the same for real videos that weren't trained on"),
    (
        "nearest_training_clip",
        "Copying",
        "distance of a sample to the nearest training clip; near 0 is a copy",
    ),
    ("rfvd", "Autoencoder", "Fréchet distance between held-out clips and their reconstructions"),
    ("reconstruction_frechet_distance", "Autoencoder", "the same in other features"),
    ("reconstruction_lpips", "Autoencoder", "perceptual distance of reconstructions; lower is better"),
    ("reconstruction_psnr", "Autoencoder", "dB on held-out clips; higher is better"),
    ("reconstruction_ssim", "Autoencoder", "on held-out clips; 1 is perfect"),
    ("mean_frame_psnr", "Autoencoder", "dB of predicting the mean of all frames"),
    ("still_frame_psnr", "Autoencoder", "dB of predicting each clip's own mean frame"),
)


@dataclass(frozen=True)
class Shown:
    """A video as the page shows it."""

    uri: str
    caption: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        return max(self.width, self.height) <= _SMALL

    @property
    def shape(self) -> str:
        return f"{self.width} / {self.height}"


@dataclass(frozen=True)
class Card:
    """A number worth a headline."""

    label: str
    value: str
    context: str


@dataclass(frozen=True)
class Row:
    """One metric in every run."""

    name: str
    meaning: str
    values: Sequence[str]


class _Budget:
    """How many more videos the page may hold, and what had to be left out."""

    def __init__(self) -> None:
        self.left = _MAX_VIDEOS
        self.notes: list[str] = []

    def take(self, clips: Sequence[Clip], title: str) -> list[Shown]:
        shown: list[Shown] = []
        for clip in clips[: min(_MAX_PER_SET, self.left)]:
            size = clip.path.stat().st_size
            if size > _MAX_BYTES:
                self.notes.append(
                    f"{clip.path.name} is left out: {size / 2**20:.0f} MB are too much for a page"
                )
                continue
            try:
                info = probe(clip.path)
            except VideoError as error:
                self.notes.append(str(error))
                continue
            shown.append(Shown(_data_uri(clip.path), clip.caption, info.width, info.height))
        self.left -= len(shown)
        if len(shown) < len(clips):
            self.notes.append(f"{title}: {len(shown)} of {len(clips)} videos are shown")
        return shown


def write_page(runs: Sequence[Run], output: str | Path, title: str) -> None:
    """Write the report of some runs as one HTML file, atomically.

    Args:
        runs: in the order of the page, as `reporting.runs.load_run` gives them.
        output: path of the page; its folder is made.
        title: heading of the page.
    """
    if not runs:
        raise ValueError("a report needs at least one run; give runs=[FOLDER,…]")
    with atomic_path(Path(output)) as part:
        part.write_text(render(runs, title), encoding="utf-8", errors="backslashreplace")


def render(runs: Sequence[Run], title: str) -> str:
    """The page as text; everything that comes from files is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    budget = _Budget()
    # Runs with something to watch take their videos first, in the order in which the page shows them.
    results = [_result(run, budget) for run in runs]
    evaluated = [run for run in runs if run.evaluation is not None]
    return environment.get_template("page.html.j2").render(
        title=title,
        results=results,
        evaluated=evaluated,
        table=_table([run.evaluation for run in runs if run.evaluation is not None]),
        protocols=_protocols(evaluated),
        trainings=[_training(run) for run in runs],
        left_out=budget.notes,
    )


def _result(run: Run, budget: _Budget) -> dict[str, object]:
    """What can be watched of a run."""
    sets = []
    shortest = min((s.num_frames or 0 for s in run.sample_sets), default=0)
    for samples in run.sample_sets:
        title = f"{run.name}/{samples.name}"
        sets.append(
            {
                "name": samples.name,
                "clips": budget.take(samples.clips, title),
                "num_frames": samples.num_frames,
                "guidance_scale": samples.guidance_scale,
                "long": bool(samples.num_frames and samples.num_frames > shortest),
                "sheet": _data_uri(samples.contact_sheet) if samples.contact_sheet else None,
            }
        )
    videos = run.evaluation.videos if run.evaluation else {}
    groups = {name: budget.take(clips, f"{run.name}: {name}") for name, clips in videos.items()}
    return {
        "run": run,
        "cards": _cards(run.evaluation) if run.evaluation else [],
        "sets": sets,
        "real": groups.get("real", []),
        "generated": groups.get("generated", []),
        "nearest": list(zip(groups.get("generated", []), groups.get("nearest", []), strict=False)),
        "others": {name: g for name, g in groups.items() if name not in ("real", "generated", "nearest")},
    }


def _training(run: Run) -> dict[str, object]:
    """How a run was trained: its length, curves, previews and configuration."""
    parts = []
    if run.num_steps:
        parts.append(f"{run.num_steps:,} steps")
    if run.seconds is not None:
        parts.append(duration(run.seconds))
    return {
        "run": run,
        "summary": " · ".join(parts),
        "panels": [
            {"title": panel.title, "uri": _encoded(draw(panel), ".svg")} for panel in panels(run.curves)
        ],
        "previews": [
            {"step": preview.step, "title": preview.title, "uri": _data_uri(preview.path)}
            for preview in _spread(run.previews)
        ],
    }


def _spread(previews: Sequence[Preview]) -> Iterator[Preview]:
    """Of every kind of preview at most six, evenly spread over training, first and last among them."""
    for title in dict.fromkeys(preview.title for preview in previews):
        kind = [preview for preview in previews if preview.title == title]
        count = min(len(kind), _MAX_PREVIEWS)
        chosen = {round(i * (len(kind) - 1) / max(count - 1, 1)) for i in range(count)} | {len(kind) - 1}
        yield from (kind[i] for i in sorted(chosen))


def _cards(evaluation: Evaluation) -> list[Card]:
    """The few numbers that say most, if they were measured."""
    metrics = evaluation.metrics
    cards = []
    for name, value in metrics.items():
        if name.startswith(("fvd", "frechet_distance")) and not name.endswith("_untrained"):
            untrained = metrics.get(f"{name}_untrained")
            context = (
                f"untrained network: {number(untrained)}" if untrained is not None else "lower is better"
            )
            if beside := evaluation.beside.get(name):
                context = f"{beside}; {context}"
            cards.append(Card(name, number(value), context))
    known = (
        ("reconstruction_psnr", "reconstruction", " dB", "held-out clips through the autoencoder"),
        ("contrast_ratio", "contrast", " ×", "of real videos"),
        ("motion_ratio", "motion", " ×", "of real videos"),
        ("pairwise_distance_ratio", "variety", " ×", "distance between samples, of real videos"),
    )
    for name, label, unit, context in known:
        if name in metrics:
            cards.append(Card(label, f"{number(metrics[name], 3)}{unit}", context))
    if "nearest_training_clip" in metrics:
        held_out = metrics.get("nearest_training_clip_of_held_out")
        context = "distance of samples" if held_out is None else f"held-out real clips: {number(held_out, 3)}"
        context += f"; in {evaluation.space}" if evaluation.space else ""
        cards.append(
            Card("to the nearest training clip", number(metrics["nearest_training_clip"], 3), context)
        )
    return cards


def _table(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[Row]]]:
    """Rows by heading: every metric that any run has, one column a run.

    Distances that were measured in different ways, or in different spaces, never share a row.
    """
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
    groups: dict[str, list[Row]] = {heading: [] for _, heading, _ in (*_MEANINGS, ("", "Other", ""))}
    # The untrained network's value directly follows the trained one's.
    order = {name: i for i, name in enumerate(names)}
    for name in sorted(names, key=lambda n: (order.get(n.removesuffix("_untrained"), order[n]), order[n])):
        _, heading, meaning = next((m for m in _MEANINGS if name.startswith(m[0])), ("", "Other", ""))
        if name.endswith("_untrained"):
            meaning = "the same network before training"
        measured = [evaluation for evaluation in evaluations if name in evaluation.metrics]
        ways = list(dict.fromkeys(_way(e, name) for e in measured))
        for way in ways:
            values = [
                _value(e, name) if name in e.metrics and _way(e, name) == way else "–" for e in evaluations
            ]
            told = f"{name} [{way[1]}]" if len(ways) > 1 else name
            groups[heading].append(Row(told, meaning, values))
    return [(heading, rows) for heading, rows in groups.items() if rows]


def _way(evaluation: Evaluation, name: str) -> tuple[str, str]:
    """How a metric was measured, and that for people: values share a row if the first is the same."""
    if _is_distance(name):
        way = evaluation.comparison
        return way, f"{evaluation.protocol} {way[:6]}"
    return (evaluation.space,) * 2 if name.startswith("nearest_training_clip") else ("", "")


def _is_distance(name: str) -> bool:
    begins = ("fvd", "kvd", "rfvd", "frechet_distance", "kernel_distance", "reconstruction_frechet_distance")
    return name.startswith(begins)


def _value(evaluation: Evaluation, name: str) -> str:
    return f"{number(evaluation.metrics[name])} {evaluation.beside.get(name, '')}".rstrip()


def _protocols(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Protocol sentences with the runs that they hold for."""
    by_sentence: dict[str, list[str]] = {}
    for run in runs:
        if run.evaluation is not None and run.evaluation.sentence:
            by_sentence.setdefault(run.evaluation.sentence, []).append(run.name)
    return [(", ".join(names), sentence) for sentence, names in by_sentence.items()]


def number(value: float, digits: int = 4) -> str:
    """A number for people: some significant digits, thousands apart, tiny ones with an exponent."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value and abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return (
        f"{value:,.0f}"
        if abs(value) >= 10**digits
        else f"{float(f'{value:.{digits}g}'):,}".removesuffix(".0")
    )


def duration(seconds: float) -> str:
    """A span of time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _data_uri(path: Path) -> str:
    return _encoded(path.read_bytes(), path.suffix)


def _encoded(content: bytes, suffix: str) -> str:
    return f"data:{_MIME[suffix]};base64,{base64.b64encode(content).decode()}"
