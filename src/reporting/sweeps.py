"""What a sweep over long videos has found, beside what was expected: a page in Markdown with a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from .plots import COLORS, STYLE

SCORED = ("contrast", "saturation", "sharpness", "motion_energy")
# The rule of experiments/README.md.
NUM_SEEDS = 3
NUM_FIRST = 4
MOST_AT_FIRST = 0.25
LEAST_DRIFT = 0.10
LEAST_DIFFERENCE = 0.05


@dataclass(frozen=True)
class Cell:
    """One condition at one seed.

    Args:
        condition: as `expected` names it.
        seed: of training and sampling.
        shares: of videos outside the band of real clips, by clip position, averaged over `SCORED`.
        medians: of each statistic by clip position, and its band.
        made: when, and of what.
    """

    condition: str
    seed: int
    shares: Sequence[float]
    medians: Mapping[str, Any]
    made: Mapping[str, Any]

    @property
    def at_first(self) -> float:
        """The share outside while the video is short."""
        return mean(self.shares[:NUM_FIRST])

    @property
    def drift(self) -> float:
        """By how much the share outside has grown in the last quarter."""
        return mean(self.shares[-(len(self.shares) // 4) :]) - self.at_first


def cell_of(condition: str, seed: int, record: Mapping[str, Any]) -> Cell:
    """A cell of its `evaluation.json`.

    Raises:
        ValueError: if that holds no drift of long videos.
    """
    drift = record.get("drift")
    if not drift or len(next(iter(drift["statistics"].values()))["median"]) < 2 * NUM_FIRST:
        raise ValueError(
            f"no drift over at least {2 * NUM_FIRST} clip positions was measured for {condition}, seed "
            f"{seed}; evaluate with num_positions=…"
        )
    curves = {name: drift["statistics"][name] for name in SCORED}
    shares = [
        mean(curve["share_outside"][i] for curve in curves.values())
        for i in range(len(curves["contrast"]["median"]))
    ]
    made_by = record["generated"].get("samples", {})
    return Cell(
        condition,
        seed,
        [round(share, 4) for share in shares],
        {
            name: {
                "median": [round(v, 5) for v in curve["median"]],
                "band": [round(v, 5) for v in curve["band"]],
            }
            for name, curve in curves.items()
        },
        {
            "created": record.get("created"),
            "weights_sha256": made_by.get("weights_sha256"),
            "num_videos": drift["num_videos"],
            "num_real": drift["num_real"],
        },
    )


def verdict(cells: Sequence[Cell], worse: str, better: str) -> str:
    """What the rule says, with its reason."""
    by = {(cell.condition, cell.seed): cell for cell in cells}
    seeds = sorted({seed for condition, seed in by if condition == worse} & {s for c, s in by if c == better})
    if len(seeds) < NUM_SEEDS:
        return f"undecided: {len(seeds)} of {NUM_SEEDS} seeds measured"
    at_first = max(by[worse, seed].at_first for seed in seeds)
    if at_first > MOST_AT_FIRST:
        return (
            f"undecided: the model isn't good enough, {at_first:.2f} lie outside from the start (at most "
            f"{MOST_AT_FIRST})"
        )
    least = min(by[worse, seed].drift for seed in seeds)
    if least < LEAST_DRIFT:
        return (
            f"undecided: there is nothing to hold down, {worse} drifts by {least:.2f} (at least "
            f"{LEAST_DRIFT} is asked for)"
        )
    gains = [by[worse, seed].drift - by[better, seed].drift for seed in seeds]
    if min(gains) > 0 and mean(gains) >= LEAST_DIFFERENCE:
        return f"reproduced: {better} drifts less in all {len(seeds)} seeds, by {mean(gains):.2f} on average"
    if max(gains) < 0 and mean(gains) <= -LEAST_DIFFERENCE:
        return (
            f"contradicted: {better} drifts more in all {len(seeds)} seeds, by {-mean(gains):.2f} on average"
        )
    return f"not reproduced at this scale: the differences are {', '.join(f'{gain:+.2f}' for gain in gains)}"


def page(name: str, expected: Mapping[str, Any], cells: Sequence[Cell], strips: Mapping[str, str]) -> str:
    """The report in Markdown; ``strips`` are pictures by condition."""
    lines = [
        f"# {expected['question']}",
        "",
        f"**Claim.** {expected['claim']} ({expected['source']})",
        "",
        f"**Verdict.** {verdict(cells, expected['worse'], expected['better'])}.",
        "",
        "```bash",
        expected["training"],
        expected["command"],
        f"python -m src.report sweep={name}",
        "```",
        "",
        "Measure and rule: [experiments/README.md](../README.md). Share of videos outside the band of real "
        "clips (0.10 of real ones are), over the first 64 frames and over the last quarter, and their "
        "difference, the drift:",
        "",
        "| condition | | seed | at first | at the end | drift |",
        "|---|---|---|---|---|---|",
    ]
    for condition, meaning in expected["conditions"].items():
        of_it = sorted((cell for cell in cells if cell.condition == condition), key=lambda cell: cell.seed)
        for cell in of_it:
            lines.append(
                f"| {condition} | {meaning} | {cell.seed} | {cell.at_first:.3f} | "
                f"{cell.at_first + cell.drift:.3f} | {cell.drift:+.3f} |"
            )
        if len(of_it) > 1:
            at_first, drift = mean(c.at_first for c in of_it), mean(c.drift for c in of_it)
            lines.append(
                f"| {condition} | | mean | {at_first:.3f} | {at_first + drift:.3f} | **{drift:+.3f}** |"
            )
        if not of_it:
            lines.append(f"| {condition} | {meaning} | | not measured | | |")
    measured = sorted({str(cell.made["created"])[:10] for cell in cells})
    numbers = sorted({(cell.made["num_videos"], len(cell.shares)) for cell in cells})
    lines += ["", f"![share outside by clip position]({name}.svg)", ""]
    if cells:
        sizes = ", ".join(f"{videos} videos of {positions} clips" for videos, positions in numbers)
        lines += [
            f"{sizes} in each cell, measured {', '.join(measured)}; the numbers are in `{name}.json`.",
            "",
        ]
    if strips:
        lines += ["Frames 1, 64, 256, 512 and the last of the first videos of one seed:", ""]
    for condition, picture in strips.items():
        lines += [f"**{condition}**", "", f"![{condition}]({picture})", ""]
    return "\n".join(lines)


def plot(expected: Mapping[str, Any], cells: Sequence[Cell]) -> bytes:
    """Share outside by clip position, a thin line a seed and a thick one for their mean, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for condition, color in zip(expected["conditions"], COLORS, strict=False):
            curves = [cell.shares for cell in cells if cell.condition == condition]
            for curve in curves:
                axes.plot(range(1, len(curve) + 1), curve, color=color, alpha=0.3, linewidth=0.7)
            if curves:
                length = min(map(len, curves))
                together = [mean(curve[i] for curve in curves) for i in range(length)]
                axes.plot(range(1, length + 1), together, color=color, linewidth=1.8, label=condition)
        axes.axhline(0.10, color="#718096", linewidth=0.8, linestyle="--", label="real")
        axes.set_xlabel("clip of 16 frames")
        axes.set_ylabel("share outside")
        axes.legend(loc="best")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def gathered(expected: Mapping[str, Any], folders: Sequence[Path], kept: Path) -> list[Cell]:
    """Cells that lie under some folders, and those kept from before that don't.

    Args:
        expected: what is expected, with the conditions.
        folders: with a sub-folder `CONDITION_SEED` for each cell.
        kept: JSON file of cells.
    """
    cells: dict[tuple[str, int], Cell] = {}
    if kept.is_file():
        for cell in json.loads(kept.read_text()):
            cells[cell["condition"], cell["seed"]] = Cell(**cell)
    for path in sorted(path for folder in folders for path in folder.glob("*/evaluation.json")):
        condition, _, seed = path.parent.name.rpartition("_")
        if condition in expected["conditions"] and seed.isdigit():
            cells[condition, int(seed)] = cell_of(condition, int(seed), json.loads(path.read_text()))
    return [cells[key] for key in sorted(cells)]
