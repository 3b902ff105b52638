"""Write one self-contained page about some runs: ``python -m src.report runs=[runs/a] output=a.html``.

Or what a sweep has found, beside what was expected: ``python -m src.report sweep=hierarchy``.
"""

import glob
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from .config import EXPERIMENTS, ConfigError, ReportConfig, read_yaml, verb

# Videos of a condition whose frames are shown.
NUM_STRIPS = 6

if TYPE_CHECKING:
    from .data.transforms import Frames


@verb("report", ReportConfig)
def main(cfg: DictConfig) -> None:
    """Curves, samples that play in the page, metrics with their protocol."""
    from .reporting.html import write_page
    from .reporting.runs import load_run

    if cfg.sweep is not None:
        output = Path(cfg.output) if cfg.output else EXPERIMENTS / "reports"
        print(f"report: {report_sweep(cfg.sweep, cfg.runs, output)}")
        return
    if not cfg.runs:
        raise ConfigError("give runs=[FOLDER,…], for a page about runs, or sweep=NAME, for a sweep's report")
    output = Path(cfg.output or "report.html")
    write_page([load_run(Path(run)) for run in cfg.runs], output, cfg.title)
    print(f"page: {output}")


def report_sweep(name: str, places: Sequence[str] | None, folder: Path) -> Path:
    """Writes a sweep's report, its plot, strips of frames and its cells' numbers into a folder.

    Args:
        name: of the sweep.
        places: folders of its cells; None for where the sweep puts them.
        folder: of the report.

    Raises:
        ConfigError: if nothing is expected of such a sweep, or nothing of it was measured.
    """
    from .data.storage import atomic_path, write_json
    from .data.video import contact_sheet
    from .reporting.sweeps import gathered, page, plot

    path = EXPERIMENTS / "expected" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise ConfigError(f"nothing is expected of a sweep {name}; there are: {known}")
    expected = read_yaml(path)
    measured = [Path(place) for place in places or [expected["folder"]]]
    cells = gathered(expected, measured, folder / f"{name}.json")
    if not cells:
        raise ConfigError(
            f"nothing was measured under {', '.join(map(str, measured))} yet. Run\n    {expected['command']}"
        )
    strips = {}
    for condition, cell in expected["cells"].items():
        picture = folder / f"{name}_{condition}.png"
        samples = f"{glob.escape(cell)}_*/evaluation_samples/sample_*.mp4"
        videos = sorted(video for place in measured for video in place.glob(samples))
        videos = [video for video in videos if video.parent == videos[0].parent][:NUM_STRIPS]
        if videos:
            frames = [frames_at(video, (1, 64, 256, 512, None)) for video in videos]
            with atomic_path(picture) as part:
                part.write_bytes(contact_sheet(frames, num_columns=5))
        if picture.is_file():
            strips[condition] = picture.name
    with atomic_path(folder / f"{name}.svg") as part:
        part.write_bytes(plot(expected, cells))
    write_json(folder / f"{name}.json", [asdict(cell) for cell in cells])
    with atomic_path(folder / f"{name}.md") as part:
        part.write_text(page(name, expected, cells, strips))
    return folder / f"{name}.md"


def frames_at(video: Path, numbers: Sequence[int | None]) -> "Frames":
    """Frames of a video, uint8 ``t h w c``, by numbers from 1; None is the last, as is any behind it."""
    import numpy as np

    from .data.video import probe, read_frames

    last = probe(video).num_frames
    return np.stack([read_frames(video, [min(number or last, last) - 1])[0] for number in numbers])


if __name__ == "__main__":
    main()
