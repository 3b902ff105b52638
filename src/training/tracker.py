"""Where numbers and videos of a run go: ``metrics.jsonl`` for programs, TensorBoard for eyes."""

import json
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary

from ..data.storage import atomic_path
from ..data.transforms import to_frames
from ..data.video import encode_preview


class Tracker:
    """Writes rows of numbers and previews; rows after the step that a run resumes from are dropped.

    Args:
        folder: of the run.
        step: from which the run goes on; 0 for a new one.
        fps: at which previews play.
        tensorboard: whether TensorBoard files are written beside ``metrics.jsonl``.
    """

    def __init__(self, folder: Path, step: int, fps: float, tensorboard: bool) -> None:
        self.folder = folder
        self.fps = fps
        self.path = folder / "metrics.jsonl"
        self._keep_rows_up_to(step)
        self._file = self.path.open("a")
        self._writer = None
        if tensorboard:
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def _keep_rows_up_to(self, step: int) -> None:
        if not self.path.exists():
            return
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # torn by a kill in the middle of the line
                continue
            if row["step"] <= step:
                rows.append(line)
        with atomic_path(self.path) as part:
            part.write_text("".join(f"{row}\n" for row in rows))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Adds one row."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def videos(self, step: int, videos: dict[str, Tensor]) -> None:
        """Saves videos ``b c t h w`` in [-1, 1] as animated WebP, side by side, for TensorBoard, too."""
        for title, video in videos.items():
            frames = to_frames(video.float().cpu())
            side_by_side = frames.transpose(1, 2, 0, 3, 4).reshape(
                frames.shape[1], frames.shape[2], -1, frames.shape[4]
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
                self._writer._get_file_writer().add_summary(Summary(value=[value]), step)

    def close(self) -> None:
        """Flushes everything to the disk."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
