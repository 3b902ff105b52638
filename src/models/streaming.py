"""Decoding latents that arrive piece by piece, however long the video gets."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def decode_stream(
    decode: Callable[[Tensor], Tensor],
    pieces: Iterable[Tensor],
    *,
    factor: int,
    window: int,
    overlap: int,
    fade: bool,
) -> Iterator[Tensor]:
    """Video of latents, decoded in windows that overlap.

    Where a decoder sees no further than ``overlap / 2`` latent frames, windows that are joined in the middle
    of their overlap give what decoding everything at once would give. Where its normalization spans all
    frames there is no such whole: the video then is what windows of one length, cross-faded, make of it.

    Args:
        decode: latents ``b c t h w`` to video ``b c (factor t) h w``.
        pieces: latents ``b c t h w`` in order.
        factor: video frames of a latent frame.
        window: latent frames decoded at once; a shorter video is decoded whole.
        overlap: latent frames that two windows share.
        fade: whether the shared frames are cross-faded; else each is taken from the window in which it is
            further from the border.

    Yields:
        Video ``b c t h w``, all frames of all pieces.

    Raises:
        ValueError: unless ``0 <= overlap < window``.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap must be from 0 to {window - 1} (the window has {window}), got {overlap}")
    weights = _fade(overlap * factor) if fade else _steps(overlap, factor)
    weights = weights.reshape(1, 1, -1, 1, 1)
    held: Tensor | None = None

    def joined(video: Tensor) -> Tensor:
        """The decoded window behind what was held back of the one before."""
        if held is None or overlap == 0:
            return video
        shared = held.shape[2]
        blended = torch.lerp(held, video[:, :, :shared], weights.to(video))
        return torch.cat([blended, video[:, :, shared:]], dim=2)

    # The window's latents and those before it that the last window, which is as long, may need again.
    behind = window - overlap
    latents: Tensor | None = None
    begin = 0
    for piece in pieces:
        latents = piece if latents is None else torch.cat([latents, piece], dim=2)
        while latents.shape[2] - begin > window:
            video = joined(decode(latents[:, :, begin : begin + window]))
            ready = behind * factor
            yield video[:, :, :ready]
            held = video[:, :, ready:]
            begin += behind
            past = max(begin - behind, 0)
            latents, begin = latents[:, :, past:], begin - past
    if latents is None:
        return
    first = max(latents.shape[2] - window, 0)
    video = decode(latents[:, :, first:])
    yield joined(video[:, :, (begin - first) * factor :])


def _fade(num_frames: int) -> Tensor:
    """From 0 to 1 with neither slope nor curvature at the ends, where windows know least of what is beyond.

    A straight fade shows where a window begins: 1.15 times the motion inside, against 1.04 (an autoencoder of
    16 frames with ``norm=clip``, embedded data set).
    """
    at = torch.linspace(0, 1, num_frames + 2)[1:-1]
    return at**3 * (at * (6 * at - 15) + 10)


def _steps(overlap: int, factor: int) -> Tensor:
    """0 for the first half of the shared frames, 1 for the second."""
    weights = torch.zeros(overlap, factor)
    weights[overlap // 2 :] = 1.0
    return weights.flatten()
