"""Training curves as small SVG pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .runs import Curve

# A curve with more points than this is shown smoothed, with the raw one behind it.
_SMOOTH_FROM = 20
# A quantity that spans more than this ratio is read on a logarithmic axis.
_LOG_FROM = 20.0
COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#4a5568")
STYLE: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "curves",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#cbd5e0",
    "axes.labelcolor": "#4a5568",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#edf2f7",
    "grid.linewidth": 0.8,
    "xtick.color": "#718096",
    "ytick.color": "#718096",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": "#4a5568",
}


@dataclass(frozen=True)
class Panel:
    """Curves that share a pair of axes, by the label of each."""

    title: str
    curves: Mapping[str, Curve]


def panels(curves: Mapping[str, Curve]) -> list[Panel]:
    """Which curves to draw together: one quantity at several levels (`loss_at_125`, …) or of
    several parts (`gradient_norm_of/kl`, …), else each alone.

    Losses first, then what is measured on held-out clips, then the rest, each in the order of appearance.
    """
    grouped: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        split = re.fullmatch(r"(?P<title>.+)_(?P<by>at_|of/)(?P<level>.+)", name)
        title, level = (f"{split['title']} {split['by'][:2]}", split["level"]) if split else (name, "")
        grouped.setdefault(title, {})[level] = curve
    found = [Panel(title, members) for title, members in grouped.items()]
    return sorted(found, key=lambda panel: _rank(panel.title))


def _rank(title: str) -> int:
    if title.startswith("held_out/"):
        return 1
    return 0 if title.endswith("/loss") else 2


def smoothed(values: Sequence[float], width: float) -> list[float]:
    """Gaussian average with a deviation of `width` points; centred, so that it doesn't lag."""
    import numpy as np

    reach = max(1, round(3 * width))
    kernel = np.exp(-((np.arange(-reach, reach + 1) / max(width, 1e-3)) ** 2) / 2)
    sums = np.convolve(np.asarray(values, dtype=float), kernel)[reach:-reach]
    weights = np.convolve(np.ones(len(values)), kernel)[reach:-reach]  # less of it at the ends
    return [float(value) for value in sums / weights]


def wants_log(values: Sequence[float]) -> bool:
    """Whether positive values span so much that only a logarithmic axis shows the small ones."""
    return min(values) > 0 and max(values) / min(values) > _LOG_FROM


def draw(panel: Panel) -> bytes:
    """The panel as an SVG picture; the same panel gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for (label, curve), color in zip(_by_level(panel.curves), _repeated(len(panel.curves)), strict=True):
            few = len(curve.steps) < _SMOOTH_FROM
            line = curve.values if few else smoothed(curve.values, len(curve.values) / 60)
            if not few:
                axes.plot(curve.steps, curve.values, color=color, alpha=0.25, linewidth=0.8)
            marker = "o" if len(curve.steps) <= 12 else None
            axes.plot(curve.steps, line, color=color, linewidth=1.6, marker=marker, markersize=3, label=label)
        values = [value for curve in panel.curves.values() for value in curve.values]
        if wants_log(values):
            axes.set_yscale("log")
            subs = (1.0, 2.0, 5.0) if max(values) / min(values) < 1000 else (1.0,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        if any(panel.curves):
            axes.legend(loc="best", ncols=2, handlelength=1.2, columnspacing=1.0)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    # Text was measured in matplotlib's own font and is shown in the reader's.
    return re.sub(rb"'?DejaVu Sans'?", b"system-ui, -apple-system, 'Segoe UI', sans-serif", buffer.getvalue())


def _by_level(curves: Mapping[str, Curve]) -> list[tuple[str, Curve]]:
    return sorted(curves.items(), key=lambda item: (len(item[0]), item[0]))


def _repeated(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]
