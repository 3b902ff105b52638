"""What a sweep over long videos has found, beside what was expected: a page in Markdown with a picture."""

from __future__ import annotations

import glob
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from ..data.storage import parse_json
from ..metrics.drift import LASTING
from .plots import COLORS, STYLE

# Statistics of single clips that tell a good model, as experiments/README.md says; and its rule.
SCORED = ("contrast", "saturation", "sharpness", "motion_energy")
NUM_SEEDS = 3
NUM_FIRST = 4
MOST_AT_FIRST = 0.25
REAL_CHANGED = 0.05
LEAST_DRIFT = 0.10
LEAST_DIFFERENCE = 0.05


@dataclass(frozen=True)
class Cell:
    """One condition at one seed; everything by clip position.

    Args:
        condition: as `expected` names it.
        seed: of training and sampling.
        outside: share of videos outside the band of single real clips, averaged over `SCORED`.
        changed: share of videos that have gone further from their own first clip than real ones do, averaged
            over `LASTING`.
        changed_in: the same of each trait.
        real_changed: `changed` of real videos.
        distances: of the clips to real clips, by name.
        blocks: what longer parts are like, see `Blocks`.
        made: when, and of what.
        setting: how it was sampled and measured; what cells must have in common.
    """

    condition: str
    seed: int
    outside: Sequence[float]
    changed: Sequence[float]
    changed_in: Mapping[str, Sequence[float]]
    real_changed: Sequence[float]
    distances: Mapping[str, Sequence[float]]
    blocks: Mapping[str, Any] | None
    made: Mapping[str, Any]
    setting: Mapping[str, Any]

    @property
    def outside_at_first(self) -> float:
        """The share outside while the video is short."""
        return mean(self.outside[:NUM_FIRST])

    @property
    def outside_at_end(self) -> float:
        """The share outside in the last quarter."""
        return mean(_last_quarter(self.outside))

    @property
    def loss(self) -> float:
        """By how much the share outside has grown in the last quarter: quality that is lost in time."""
        return self.outside_at_end - self.outside_at_first

    @property
    def departure(self) -> float:
        """By how much the share that has changed, over all of the video, exceeds that of real videos."""
        return mean(self.changed[1:]) - REAL_CHANGED


def _last_quarter(values: Sequence[float]) -> Sequence[float]:
    return values[-(len(values) // 4) :]


def cell_of(condition: str, seed: int, record: Mapping[str, Any]) -> Cell:
    """A cell of its `evaluation.json`.

    Raises:
        ValueError: if that holds no drift of long videos.
    """
    drift = record.get("drift")
    if not drift or len(drift["statistics"][SCORED[0]]["median"]) < 2 * NUM_FIRST or not drift.get("changes"):
        raise ValueError(
            f"no drift over at least {2 * NUM_FIRST} clip positions was measured for {condition}, seed "
            f"{seed}; evaluate with num_positions=… beside real videos of more than one clip"
        )
    changes = drift["changes"]
    reached = len(changes[LASTING[0]]["real_share_beyond"])
    if reached < NUM_FIRST:
        raise ValueError(
            f"{condition}, seed {seed}: the real videos reach only {reached} clips far, at least {NUM_FIRST} "
            "are needed to tell what changes in real ones; evaluate beside longer real videos"
        )
    samples = record["generated"].get("samples") or {}
    return Cell(
        condition=condition,
        seed=seed,
        outside=_mean_curve([drift["statistics"][name]["share_outside"] for name in SCORED]),
        changed=_mean_curve([changes[name]["share_beyond"] for name in LASTING]),
        changed_in={name: _rounded(changes[name]["share_beyond"]) for name in LASTING},
        real_changed=_mean_curve([changes[name]["real_share_beyond"] for name in LASTING]),
        distances={name: _rounded(curve["values"]) for name, curve in drift["distances"].items()},
        blocks=drift["blocks"],
        made={
            "created": record.get("created"),
            "weights_sha256": samples.get("weights_sha256"),
        },
        setting={
            "videos": drift["num_videos"],
            "frames": samples.get("num_frames"),
            "clips": len(drift["statistics"][SCORED[0]]["median"]),
            "frames of a clip": drift["num_frames"],
            "real clips": drift["num_real"],
            "sampler": samples.get("sampler"),
        },
    )


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return _rounded([mean(at) for at in zip(*curves, strict=True)])


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def verdict(cells: Sequence[Cell], expected: Mapping[str, Any], measure: Literal["loss", "departure"]) -> str:
    """What the rule says by one of the two measures, with its reason."""
    by = {(cell.condition, cell.seed): cell for cell in cells}
    worse, better = expected["worse"], expected["better"]
    # Windows that know nothing of each other lose no quality, but must depart.
    drifting = [expected.get("baseline", worse), worse] if measure == "departure" else [worse]
    needed = {*drifting, better}
    seeds = sorted(seed for seed in {s for _, s in by} if all((name, seed) in by for name in needed))
    if len(seeds) < NUM_SEEDS:
        return f"undecided: {len(seeds)} of {NUM_SEEDS} seeds measured"

    def drift(name: str, seed: int) -> float:
        return float(getattr(by[name, seed], measure))

    at_first = max(by[worse, seed].outside_at_first for seed in seeds)
    if at_first > MOST_AT_FIRST:
        return (
            f"undecided: the model isn't good enough, {at_first:.2f} lie outside from the start (at most "
            f"{MOST_AT_FIRST})"
        )
    for name in drifting:
        least = min(drift(name, seed) for seed in seeds)
        if least < LEAST_DRIFT:
            return (
                f"undecided: there is nothing to hold down, {name} drifts by {least:.2f} (at least "
                f"{LEAST_DRIFT} is asked for)"
            )
    gains = [drift(worse, seed) - drift(better, seed) for seed in seeds]
    if min(gains) > 0 and mean(gains) >= LEAST_DIFFERENCE:
        return f"reproduced: {better} drifts less in all {len(seeds)} seeds, by {mean(gains):.2f} on average"
    if max(gains) < 0 and mean(gains) <= -LEAST_DIFFERENCE:
        return (
            f"contradicted: {better} drifts more in all {len(seeds)} seeds, by {-mean(gains):.2f} on average"
        )
    return f"not reproduced at this scale: the differences are {', '.join(f'{gain:+.2f}' for gain in gains)}"


def page(name: str, expected: Mapping[str, Any], cells: Sequence[Cell], strips: Mapping[str, str]) -> str:
    """The report in Markdown; ``strips`` are pictures by condition."""
    distance = sorted({title for cell in cells for title in cell.distances})
    heads = ["condition", "", "seed", "outside at first", "at the end", "loss"]
    heads += [f"{title}, at first and at the end" for title in distance] + ["departure"]
    lines = [
        f"# {expected['question']}",
        "",
        f"**Claim.** {expected['claim']} ({expected['source']})",
        "",
        f"**Verdict by quality.** {verdict(cells, expected, 'loss')}.",
        "",
        f"**Verdict by departure.** {verdict(cells, expected, 'departure')}.",
        "",
        "```bash",
        *expected["training"].strip().splitlines(),
        expected["command"],
        f"python -m src.report sweep={name}",
        "```",
        "",
        "Measures and rule: [experiments/README.md](../README.md). *Outside*: share of videos outside the "
        "band of single real clips (of real ones 0.10), over the first four clips and over the last quarter; "
        "the difference is the *loss* of quality. *Departure*: share of videos that have gone further from "
        "their own beginning than real ones do, over all clips, less the 0.05 of real ones.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for condition, meaning in expected["conditions"].items():
        of_it = sorted((cell for cell in cells if cell.condition == condition), key=lambda cell: cell.seed)
        for cell in of_it:
            lines.append(_row(condition, meaning, str(cell.seed), [cell], distance))
        if len(of_it) > 1:
            lines.append(_row(f"**{condition}**", "", "mean", of_it, distance))
        if not of_it:
            lines.append(f"| {condition} | {meaning} | not measured |{' |' * (len(heads) - 3)}")
    lines += ["", f"![share changed and share outside by clip position]({name}.svg)", ""]
    if cells:
        measured = sorted({str(cell.made["created"])[:10] for cell in cells})
        how = cells[0].setting
        lines += [
            f"{how['videos']} videos of {how['clips']} clips of {how['frames of a clip']} frames in each "
            f"cell, measured {', '.join(measured)}; all numbers: `{name}.json`.",
            "",
        ]
    lines += _about_blocks([cell for cell in cells if cell.blocks])
    if strips:
        lines += ["Frames 1, 64, 256, 512 and the last of the first videos of the first seed:", ""]
    for condition, picture in strips.items():
        lines += [f"**{condition}**", "", f"![{condition}]({picture})", ""]
    return "\n".join(lines)


def _row(condition: str, meaning: str, seed: str, cells: Sequence[Cell], distances: Sequence[str]) -> str:
    def average(measure: str, form: str = ".3f") -> str:
        return format(mean(getattr(cell, measure) for cell in cells), form)

    numbers = [average("outside_at_first"), average("outside_at_end"), average("loss", "+.3f")]
    for title in distances:
        curves = [cell.distances[title] for cell in cells if title in cell.distances]
        first, end = (
            mean(mean(part(curve)) for curve in curves) if curves else nan for part in (_first, _last_quarter)
        )
        numbers.append(f"{first:.4f}, {end:.4f}")
    numbers.append(average("departure", "+.3f"))
    return f"| {condition} | {meaning} | {seed} | {' | '.join(numbers)} |"


def _first(values: Sequence[float]) -> Sequence[float]:
    return values[:NUM_FIRST]


def _about_blocks(cells: Sequence[Cell]) -> list[str]:
    """Whether parts of the videos stand still or return."""
    if not cells:
        return []
    blocks = [cell.blocks for cell in cells if cell.blocks]
    slow, num_frames = max(block["share_slow"] for block in blocks), blocks[0]["num_frames"]
    least = min(block["motion"][0] for block in blocks)
    nearest = min(block["nearest"][0] for block in blocks)
    of_real = [block["real_nearest"][0] for block in blocks if block["real_nearest"]]
    beside = f", in real videos {min(of_real):.3f}" if of_real else ""
    return [
        f"Blocks of {num_frames} frames: in the worst cell {slow:.1%} move less than half as much as real "
        f"clips (the stillest {least:.2f} times as much); the two of one video that are nearest to each "
        f"other are {nearest:.3f} apart{beside} (root mean square of small pictures; a copy would be 0).",
        "",
    ]


def plot(expected: Mapping[str, Any], cells: Sequence[Cell]) -> bytes:
    """Share changed and share outside by clip position: thin lines for seeds, thick ones for means; SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        titles = ("changed from its own beginning", "outside the band of single real clips")
        for axes, kind, title in zip(figure.subplots(1, 2), ("changed", "outside"), titles, strict=True):
            for condition, color in zip(expected["conditions"], COLORS, strict=False):
                curves = [getattr(cell, kind) for cell in cells if cell.condition == condition]
                for curve in curves:
                    axes.plot(range(1, len(curve) + 1), curve, color=color, alpha=0.3, linewidth=0.7)
                if curves:
                    together = [mean(at) for at in zip(*curves, strict=False)]
                    axes.plot(
                        range(1, len(together) + 1), together, color=color, linewidth=1.8, label=condition
                    )
            real = [cell.real_changed for cell in cells] if kind == "changed" else []
            usual = [mean(at) for at in zip(*real, strict=False)] or [0.10] * max(
                len(c.outside) for c in cells
            )
            axes.plot(range(1, len(usual) + 1), usual, color="#718096", linewidth=0.8, ls="--", label="real")
            axes.set_xlabel("clip of a video")
            axes.set_ylabel("share of videos")
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.legend(loc="best")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def gathered(expected: Mapping[str, Any], folders: Sequence[Path], kept: Path) -> list[Cell]:
    """Cells that lie under some folders, and those kept from before that don't.

    Args:
        expected: what is expected, with the names of the conditions' cells.
        folders: with a sub-folder `NAME_SEED` for each cell.
        kept: JSON file of cells.

    Raises:
        ValueError: for cells that can't be compared with each other, and for a kept file of something else.
    """
    cells: dict[tuple[str, int], Cell] = {}
    if kept.is_file():
        told = parse_json(kept, "copy it again, or remove it and gather the cells anew")
        try:
            cells = {(cell["condition"], cell["seed"]): Cell(**cell) for cell in told}
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{kept} holds no cells as this version writes them ({error}); remove it, or choose another "
                "place: output=FOLDER"
            ) from error
    for folder in folders:
        for condition, name in expected["cells"].items():
            for path in folder.glob(f"{glob.escape(name)}_*/evaluation.json"):
                seed = path.parent.name.removeprefix(f"{name}_")
                if seed.isdigit():
                    record = parse_json(path, "remove it and run the cell's `evaluate` again")
                    cells[condition, int(seed)] = cell_of(condition, int(seed), record)
    in_order = [cells[key] for key in sorted(cells)]
    _refuse_mixtures(in_order)
    return in_order


def _refuse_mixtures(cells: Sequence[Cell]) -> None:
    by_setting: dict[str, list[str]] = {}
    for cell in cells:
        setting = ", ".join(f"{name} {value}" for name, value in cell.setting.items())
        by_setting.setdefault(setting, []).append(f"{cell.condition} {cell.seed}")
    if len(by_setting) > 1:
        sets = "".join(f"\n  {', '.join(names)}: {setting}" for setting, names in by_setting.items())
        raise ValueError(
            f"cells that were sampled or measured in different ways can't stand in one table:{sets}\n"
            "Keep them in folders of their own and name one, runs=[FOLDER], and a report of its own, "
            "output=FOLDER"
        )
