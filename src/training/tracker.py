"""Where numbers and videos of a run go: ``metrics.jsonl`` for programs, TensorBoard for eyes."""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary, hparams

from ..data.storage import atomic_path, named_if_full
from ..data.transforms import to_frames
from ..data.video import encode_preview


class Tracker:
    """Writes rows of numbers and previews; rows after the step that a run resumes from are dropped.

    Args:
        folder: of the run.
        step: from which the run goes on; 0 for a new one.
        measured: whether what held-out clips told at that step counts; else it will be told again.
        fps: at which previews play.
        tensorboard: whether TensorBoard files are written beside ``metrics.jsonl``.
        wandb: project of Weights & Biases that gets the same numbers; None for none. It can't stop a run.
        settings: the run's settings by dotted key, shown beside its last numbers to compare runs by.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        fps: float,
        *,
        measured: bool = True,
        tensorboard: bool,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.fps = fps
        self.path = folder / "metrics.jsonl"
        self.settings = dict(settings or {})
        self._last: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        kept = self._keep_rows_up_to(step, measured)
        self._file = self.path.open("a")
        self._writer = None
        if tensorboard:
            # What a run that was killed has written after its last state doesn't count, be there one or not.
            self._writer = SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1 if measured else step
            )
            self._writer.add_custom_scalars(LAYOUT)
            if not measured:  # the rows of that step went with what it had measured
                for row in kept:
                    if row["step"] == step:
                        self._write_scalars(step, row)
        self._wandb: Any = None
        if wandb is not None:
            self._guarded(lambda: self._start_wandb(wandb))

    def _keep_rows_up_to(self, step: int, measured: bool) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        kept = []
        lines = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # torn by a kill in the middle of the line
                continue
            if not (isinstance(row, dict) and isinstance(row.get("step"), int)):  # nothing that a run writes
                continue
            held_out = any(name.startswith("held_out/") for name in row)
            if row["step"] < step or (row["step"] == step and (measured or not held_out)):
                lines.append(line)
                kept.append(row)
                self._note(row)
        with atomic_path(self.path) as part:
            part.write_text("".join(f"{line}\n" for line in lines))
        return kept

    def _note(self, row: dict[str, Any]) -> None:
        self._last |= {name: value for name, value in row.items() if name != "step"}

    def _start_wandb(self, project: str) -> None:
        import wandb  # type: ignore[import-not-found, unused-ignore]

        self._wandb = wandb.init(
            project=project,
            name=self.folder.name,
            id=self.folder.name,
            dir=str(self.folder),
            config=self.settings,
            resume="allow",
        )

    def _guarded(self, action: Callable[[], object]) -> None:
        """Does something with Weights & Biases; after a failure it is let go, and the run goes on."""
        try:
            action()
        except Exception as error:  # whatever another service does wrong is no reason to lose a run
            self._wandb = None
            warnings.warn(f"wandb is switched off: {type(error).__name__}: {error}", stacklevel=3)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Adds one row."""
        with named_if_full(self.path):
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()
        self._note({"step": step, **numbers})
        self.chart(step, numbers)

    def chart(self, step: int, numbers: dict[str, float]) -> None:
        """Shows numbers that are of the machine, not of the run: they get no row."""
        self._write_scalars(step, numbers)
        if self._wandb is not None:
            self._guarded(lambda: self._wandb.log(numbers, step=step))

    def _write_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        # One event for all, as add_scalar writes one for each, at a fifth of its time. TensorBoard knows the
        # time itself.
        shown = {name: value for name, value in numbers.items() if name not in ("time", "step")}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in shown.items()]
        self._add_summary(Summary(value=values), step)

    def _add_summary(self, summary: Summary, step: int | None = None) -> None:
        if self._writer is not None:
            with named_if_full(self.folder / "tensorboard"):
                self._writer._get_file_writer().add_summary(summary, step)

    def sync(self) -> None:
        """Brings all rows to the disk, and hands all events to the system: a killed process loses none."""
        with named_if_full(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._writer is not None:
            with named_if_full(self.folder / "tensorboard"):
                self._writer.flush()

    def videos(self, step: int, videos: dict[str, Tensor]) -> None:
        """Saves videos ``b c t h w`` in [-1, 1] as animated WebP, four a row, for TensorBoard, too."""
        for title, video in videos.items():
            columns = min(len(video), COLUMNS)
            video = video.float().cpu()
            black = -torch.ones_like(video[:1]).expand(-len(video) % columns, -1, -1, -1, -1)
            side_by_side = rearrange(
                to_frames(torch.cat([video, black])), "(r k) t h w c -> t (r h) (k w) c", k=columns
            )
            encoded = encode_preview(side_by_side, self.fps)
            path = self.folder / "previews" / f"step_{step:09d}" / f"{title}.webp"
            with atomic_path(path) as part:
                part.write_bytes(encoded)
            if self._writer is not None:
                # TensorBoard's own add_video writes nothing here; an animated image plays in its page.
                image = Summary.Image(
                    height=side_by_side.shape[1],
                    width=side_by_side.shape[2],
                    colorspace=3,
                    encoded_image_string=encoded,
                )
                value = Summary.Value(tag=title, image=image)
                self._add_summary(Summary(value=[value]), step)

    def finish(self) -> None:
        """Puts the run's settings and last numbers where TensorBoard compares runs, and closes."""
        if self._writer is not None:
            plain = {
                key: value if isinstance(value, bool | int | float | str) else str(value)
                for key, value in self.settings.items()
                if not PLUMBING.search(key)
            }
            shown = {name: value for name, value in self._last.items() if name.startswith("held_out/")}
            finite = {name: value for name, value in shown.items() if math.isfinite(value)}
            for summary in hparams(plain, finite):
                self._add_summary(summary)
        self.close()

    def close(self) -> None:
        """Flushes everything to the disk."""
        with named_if_full(self.path):
            self._file.close()
        if self._writer is not None:
            with named_if_full(self.folder / "tensorboard"):
                self._writer.close()
        if self._wandb is not None:
            self._guarded(lambda: self._wandb.finish())


COLUMNS = 4
# Settings by which nobody compares runs: constructors, places, periods.
PLUMBING = re.compile(
    r"(^|\.)_|^(name|runs|resume|latents|start_from|autoencoder_from)$|^(logger|machine)\.|_every$|keep_states$"
    r"|\.(root|cache|folder)$"
)

# Charts of TensorBoard's custom scalars: what belongs together, by regular expressions for whole names.
LAYOUT = {
    "Learning": {
        "losses": ["Multiline", [r"^(unet|autoencoder|discriminator)/loss$"]],
        "loss by diffusion time": ["Multiline", [r"^unet/loss_at/.*"]],
        "gradient norms": ["Multiline", [r".*gradient.*"]],
        "learning rate": ["Multiline", [r"^learning_rate/.*"]],
    },
    "Held out": {
        "loss": ["Multiline", [r"^held_out/loss.*"]],
        "PSNR in dB": ["Multiline", [r"^held_out/psnr$"]],
        "other numbers": ["Multiline", [r"^held_out/(?!loss|psnr|gradient).*"]],
    },
    "Machine": {
        "clips per second": ["Multiline", [r"^speed/clips_per_second$"]],
        "share of waiting for data": ["Multiline", [r"^speed/waiting_for_data$"]],
        "peak memory in GiB": ["Multiline", [r"^speed/peak_memory_gib$"]],
    },
}
