"""Windows of latent frames that lie a stride apart: sparse key frames, and the frames between them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LatentStrides:
    """The distances between latent frames that one network learns.

    LVDM encodes a whole clip and lets its prediction model see every fourth latent frame, its interpolation
    model every one (section 3.4). One network can learn both: it then sees windows of equal length at every
    stride, and is told which. A window has as many latent frames as the largest stride finds in a clip.

    Args:
        strides: distinct, the largest first; ``(1,)`` is a clip as it is.

    Raises:
        ValueError: for anything else.
    """

    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        given = list(self.strides)
        whole = all(isinstance(stride, int) and not isinstance(stride, bool) for stride in given)
        if not given or not whole or min(given) < 1:
            raise ValueError(f"latent_strides must list whole numbers of at least 1, got {given}")
        ordered = sorted(set(given), reverse=True)
        if given != ordered:
            raise ValueError(
                f"latent_strides must be distinct, the largest first, got {given}; use {ordered}"
            )

    @property
    def are_told(self) -> bool:
        """Whether a network has to be told which stride it sees."""
        return len(self.strides) > 1

    def window(self, num_latents: int) -> int:
        """Latent frames of a window, for a clip of so many."""
        return (num_latents - 1) // self.strides[0] + 1

    def check(self, num_latents: int, frames_per_latent: int) -> None:
        """Refuses clips in which the largest stride finds a single latent frame.

        Raises:
            ValueError: with the numbers and the remedy.
        """
        if self.strides[0] > 1 and self.window(num_latents) < 2:
            least = (self.strides[0] + 1) * frames_per_latent
            raise ValueError(
                f"latent_strides={list(self.strides)} would leave 1 of the clip's {num_latents} latent "
                f"frames; use clips of at least dataset.num_frames={least}, or smaller strides"
            )

    def num_starts(self, num_latents: int, index: int) -> int:
        """Places in a clip where a window of stride number ``index`` may begin; the largest has the first."""
        return num_latents - self._span(num_latents, index) + 1 if index > 0 else 1

    def cut(self, latents: Tensor, index: int, start: int = 0) -> Tensor:
        """The window ``… t h w`` of a clip's latents ``… t h w`` at stride number ``index``."""
        span = self._span(latents.shape[-3], index)
        return latents[..., start : start + span : self.strides[index], :, :]

    def _span(self, num_latents: int, index: int) -> int:
        return (self.window(num_latents) - 1) * self.strides[index] + 1


EVERY_FRAME = LatentStrides((1,))
