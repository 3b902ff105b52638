"""Write one self-contained page about some runs: ``python -m src.report runs=[runs/a] output=a.html``."""

from pathlib import Path

from omegaconf import DictConfig

from .config import ReportConfig, verb


@verb("report", ReportConfig)
def main(cfg: DictConfig) -> None:
    """Curves, samples that play in the page, metrics with their protocol."""
    from .reporting.html import write_page
    from .reporting.runs import load_run

    output = Path(cfg.output)
    write_page([load_run(Path(run)) for run in cfg.runs], output, cfg.title)
    print(f"page: {output}")


if __name__ == "__main__":
    main()
