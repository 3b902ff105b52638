"""What a run folder holds, read without judging: what is missing or broken is named and left out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = (".mp4", ".webm")


@dataclass(frozen=True)
class Curve:
    """One logged quantity over optimizer steps; values are finite."""

    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Clip:
    """A video file of the run, with what is worth saying under it."""

    path: Path
    caption: str = ""


@dataclass(frozen=True)
class SampleSet:
    """The videos of one call of sampling.

    Attributes:
        name: of its folder inside the run.
        num_frames: of every video; None if not told.
        guidance_scale: that they were sampled with; None if not told.
        contact_sheet: picture of the first videos frame by frame, if there is one.
    """

    name: str
    clips: Sequence[Clip]
    num_frames: int | None = None
    guidance_scale: float | None = None
    contact_sheet: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """Numbers of a run, under which conditions they were measured, and videos to look at beside them.

    Attributes:
        metrics: by name.
        beside: what is told beside some of them: deviation over seeds, floor.
        comparison: identifies what was compared with what, and how; only distances with equal ones compare.
        protocol: its name.
        space: in which the nearest training clips were looked for.
        sentence: the conditions in words.
        videos: by kind.
        notes: what has to be known of the numbers.
    """

    metrics: Mapping[str, float]
    beside: Mapping[str, str] = field(default_factory=dict)
    comparison: str = ""
    protocol: str = ""
    space: str = ""
    sentence: str = ""
    videos: Mapping[str, Sequence[Clip]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Preview:
    """An animated picture that training saved on its way."""

    step: int
    title: str
    path: Path


@dataclass(frozen=True)
class Run:
    """All that a report shows of one run folder.

    Attributes:
        config: the resolved configuration as text; empty if missing.
        seconds: that training took until the last logged row; None if nothing was logged.
        problems: what is missing or unreadable, one sentence each.
    """

    folder: Path
    config: str
    curves: Mapping[str, Curve]
    seconds: float | None
    evaluation: Evaluation | None
    sample_sets: Sequence[SampleSet]
    previews: Sequence[Preview]
    problems: Sequence[str]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def num_steps(self) -> int:
        """The last step that was logged; 0 if none."""
        return max((curve.steps[-1] for curve in self.curves.values()), default=0)


def load_run(folder: str | Path) -> Run:
    """Read a run folder as training, sampling and evaluation left it.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing of a run in it. Single missing or broken
            pieces are named in `Run.problems` instead.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no run folder at {folder}; train one first or point to another: runs=[FOLDER]"
        )
    problems: list[str] = []
    config_path = folder / "config.yaml"
    if config_path.is_file():
        config = config_path.read_text(errors="replace")
    else:
        config = ""
        problems.append("config.yaml is missing")
    curves, seconds = _read_metrics(folder / "metrics.jsonl", problems)
    run = Run(
        folder=folder,
        config=config,
        curves=curves,
        seconds=seconds,
        evaluation=_read_evaluation(folder, problems),
        sample_sets=_read_sample_sets(folder, problems),
        previews=_read_previews(folder / "previews"),
        problems=problems,
    )
    if not (run.config or run.curves or run.evaluation or run.sample_sets or run.previews):
        raise FileNotFoundError(
            f"{folder} isn't a run folder: expected config.yaml, metrics.jsonl, evaluation.json, samples/ or "
            "previews/, found none of them"
        )
    return run


def _read_metrics(path: Path, problems: list[str]) -> tuple[dict[str, Curve], float | None]:
    """Every number of `metrics.jsonl` as a curve; a row that a kill cut short is skipped and counted."""
    if not path.is_file():
        problems.append("metrics.jsonl is missing: no curves")
        return {}, None
    points: dict[str, dict[int, float]] = {}
    seconds = None
    broken = not_finite = 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            broken += bool(line.strip())
            continue
        for name, value in row.items():
            if not _is_number(value):
                continue
            if not math.isfinite(value):
                not_finite += 1
            elif name == "time":
                seconds = max(seconds or 0.0, float(value))
            else:
                points.setdefault(name, {})[step] = float(value)
    if broken:
        problems.append(f"metrics.jsonl: {broken} rows can't be read")
    if not_finite:
        problems.append(f"metrics.jsonl: {not_finite} values aren't finite")
    curves = {}
    for name, values in points.items():
        steps = sorted(values)
        curves[name] = Curve(steps, [values[step] for step in steps])
    return curves, seconds


def _read_evaluation(folder: Path, problems: list[str]) -> Evaluation | None:
    told = _read_object(folder / "evaluation.json", problems)
    if told is None:
        return None
    metrics = told.get("metrics")
    if not isinstance(metrics, dict):
        problems.append("evaluation.json holds no metrics")
        metrics = {}
    protocol = told.get("protocol")
    sentence = protocol.get("sentence") if isinstance(protocol, dict) else None
    if sentence is None and protocol:
        sentence = json.dumps(protocol, ensure_ascii=False)
    videos: dict[str, list[Clip]] = {}
    groups = told.get("videos")
    for title, names in (groups if isinstance(groups, dict) else {}).items():
        paths = [_inside(folder, name, problems) for name in (names if isinstance(names, list) else [])]
        videos[str(title)] = [Clip(path) for path in paths if path is not None]
    notes = told.get("notes")
    copies = told.get("copies")
    comparison, uncertainty = told.get("comparison"), told.get("uncertainty")
    return Evaluation(
        beside=_beside(uncertainty if isinstance(uncertainty, dict) else {}),
        comparison=str(comparison.get("digest", "")) if isinstance(comparison, dict) else "",
        protocol=str(protocol.get("name", "")) if isinstance(protocol, dict) else "",
        space=str(copies.get("space", "")) if isinstance(copies, dict) else "",
        metrics={str(name): float(value) for name, value in metrics.items() if _is_number(value)},
        sentence=str(sentence or ""),
        videos=videos,
        notes=[str(note) for note in notes] if isinstance(notes, list) else [],
    )


def _beside(uncertainty: Mapping[str, Any]) -> dict[str, str]:
    """Deviation over seeds and floor of each distance, as it is written beside the number."""
    beside = {}
    for name, told in uncertainty.items():
        if not isinstance(told, dict):
            continue
        parts = []
        if _is_number(told.get("deviation_over_seeds")):
            parts.append(f"± {told['deviation_over_seeds']:.3g}")
        if _is_number(told.get("floor")):
            parts.append(f"(real: {told['floor']:.3g})")
        beside[str(name)] = " ".join(parts)
    return beside


def _read_sample_sets(folder: Path, problems: list[str]) -> list[SampleSet]:
    """Every sub-folder that sampling wrote (it holds `samples.json`), short videos first."""
    sets = []
    for child in sorted(folder.iterdir()):
        if child.is_dir() and (child.name == "samples" or (child / "samples.json").is_file()):
            sets.append(_read_sample_set(child, problems))
    return sorted((s for s in sets if s.clips), key=lambda s: (s.num_frames or 0, s.name))


def _read_sample_set(folder: Path, problems: list[str]) -> SampleSet:
    told = _read_object(folder / "samples.json", problems) or {}
    listed = told.get("samples")
    clips = []
    for entry in listed if isinstance(listed, list) else []:
        path = _inside(folder, entry.get("file"), problems) if isinstance(entry, dict) else None
        if path is not None:
            clips.append(Clip(path, _caption(entry)))
    if not listed:
        clips = [
            Clip(path, path.stem) for path in _natural(folder.iterdir()) if path.suffix in VIDEO_SUFFIXES
        ]
    num_frames, scale = told.get("num_frames"), told.get("guidance_scale")
    sheet = folder / "contact_sheet.png"
    return SampleSet(
        name=folder.name,
        clips=clips,
        num_frames=num_frames if isinstance(num_frames, int) else None,
        guidance_scale=float(scale) if isinstance(scale, int | float) else None,
        contact_sheet=sheet if sheet.is_file() else None,
    )


def _read_previews(folder: Path) -> list[Preview]:
    previews = []
    for path in folder.glob("step_*/*.webp"):
        if match := re.fullmatch(r"step_(\d+)", path.parent.name):
            previews.append(Preview(int(match[1]), path.stem, path))
    return sorted(previews, key=lambda preview: (preview.title, preview.step))


def _read_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """A JSON object; None, naming the problem, if the file is missing or holds something else."""
    name = path.name if path.name != "samples.json" else f"{path.parent.name}/{path.name}"
    if not path.is_file():
        problems.append(f"{name} is missing")
        return None
    try:
        told = json.loads(path.read_text())
    except ValueError as error:
        problems.append(f"{name} can't be read: {error}")
        return None
    if not isinstance(told, dict):
        problems.append(f"{name} must hold an object, it holds a {type(told).__name__}")
        return None
    return told


def _inside(folder: Path, name: object, problems: list[str]) -> Path | None:
    """The video file of that name, if it lies inside the folder: a page must not carry off other files."""
    path = folder / str(name)
    if path.suffix not in VIDEO_SUFFIXES or not path.resolve().is_relative_to(folder.resolve()):
        problems.append(f"{name} isn't a video inside the run")
    elif not path.is_file():
        problems.append(f"{name} is missing")
    else:
        return path
    return None


def _caption(entry: Mapping[str, object]) -> str:
    parts = [str(entry["class"]).replace("_", " ")] if "class" in entry else []
    if "seed" in entry:
        parts.append(f"seed {entry['seed']}")
    return " · ".join(parts)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _natural(paths: Any) -> list[Path]:
    """Sorted as people count: 2 before 10."""
    return sorted(paths, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)])
