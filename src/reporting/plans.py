"""A picture of which latent frames of a long video are made from which."""

from __future__ import annotations

import io
from collections.abc import Sequence

from ..diffusion.long_video import Plan, Window
from .plots import COLORS, STYLE


def draw_plan(plan: Plan, windows: Sequence[Window]) -> bytes:
    """An SVG picture with a line for each window, in the order in which they are made.

    Full boxes are latent frames that a window makes, framed ones are given to it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    last = max(window.frames[-1] for window in windows)
    first = min(window.frames[0] for window in windows)
    with matplotlib.rc_context(STYLE):
        size = (min(max((last - first) * 0.12, 4.0), 14.0), 0.9 + 0.15 * len(windows))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for line, window in enumerate(windows):
            color = COLORS[window.level % len(COLORS)]
            made, given = window.made, window.given
            axes.plot(
                [window.frames[0], window.frames[-1]], [line, line], color=color, linewidth=0.6, zorder=1
            )
            axes.scatter(made, [line] * len(made), s=16, marker="s", color=color, zorder=2)
            axes.scatter(
                given, [line] * len(given), s=14, marker="s", facecolor="white", edgecolor=color, zorder=3
            )
        axes.invert_yaxis()
        axes.set_xlabel("latent frame")
        total = sum(plan.counts())
        shown = f"the first {len(windows)} of {total}" if total > len(windows) else f"{total}"
        axes.set_title(
            f"{shown} windows, one colour a level; full: made, framed: given", fontsize=8, loc="left"
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
