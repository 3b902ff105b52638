"""Videos longer than the model's window, made piece by piece over latents."""

from collections.abc import Callable, Iterator

from torch import Tensor

SampleWindow = Callable[[int, Tensor | None], Tensor]


def autoregressive(
    sample_window: SampleWindow, num_frames: int, window: int, num_given: int
) -> Iterator[Tensor]:
    """Latents of a long video, each window conditioned on the end of the one before (LVDM, section 3.4).

    Pieces are yielded as they are made, so memory doesn't grow with the length.

    Args:
        sample_window: ``(index, given)`` gives a window ``b c t h w`` of latents; ``given`` holds the
            leading latent frames ``b c num_given h w``, None for the first window.
        num_frames: latent frames in all.
        window: latent frames that the model makes at once.
        num_given: latent frames on which each further window is conditioned.

    Yields:
        Latents ``b c t h w``; together they have exactly ``num_frames`` latent frames.

    Raises:
        ValueError: unless ``0 < num_given < window`` and at least one frame is asked for.
    """
    if not 0 < num_given < window:
        raise ValueError(
            f"num_given must be from 1 to {window - 1} (the window has {window}), got {num_given}"
        )
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    given: Tensor | None = None
    made, index = 0, 0
    while made < num_frames:
        latents = sample_window(index, given)
        fresh = latents if given is None else latents[:, :, num_given:]
        fresh = fresh[:, :, : num_frames - made]
        yield fresh
        given = latents[:, :, -num_given:]
        made += fresh.shape[2]
        index += 1


def num_windows(num_frames: int, window: int, num_given: int) -> int:
    """How many windows :func:`autoregressive` makes for so many latent frames."""
    return 1 + max(0, -(-(num_frames - window) // (window - num_given)))


def leading_mask(given: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Given leading frames, padded to a window, and their mask.

    Args:
        given: ``b c n h w``.
        window: latent frames of the window.

    Returns:
        Latents ``b c window h w`` (zero after the first n frames) and mask ``b 1 window h w``.
    """
    b, c, n, h, w = given.shape
    latents = given.new_zeros(b, c, window, h, w)
    latents[:, :, :n] = given
    mask = given.new_zeros(b, 1, window, h, w)
    mask[:, :, :n] = 1.0
    return latents, mask
