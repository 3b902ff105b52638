"""Which videos, and which clip of each, stand for a set of videos when sets are compared."""

from collections.abc import Sequence
from typing import Literal

import torch

from .sampler import clip_generator

ClipPlace = Literal["random", "first", "middle"] | int
VIDEO_CHOICES = ("shuffled", "sorted", "balanced")


def start_of(where: ClipPlace, room: int, seed: int, index: int) -> int:
    """The tick at which a clip begins in a video that has ``room`` ticks more than a clip.

    A random place is a function of (seed, index of the video), whatever was drawn for other videos.

    Raises ValueError for a tick that leaves too few, and for unknown words.
    """
    if where == "first":
        return 0
    if where == "middle":
        return room // 2
    if where == "random":
        drawn = torch.rand((), generator=clip_generator(seed, index, "compared clip"), dtype=torch.float64)
        return int(drawn.item() * (room + 1))
    if not isinstance(where, int):
        raise ValueError(f"unknown place {where!r} of a clip; choose first, middle, random or a tick")
    if not 0 <= where <= room:
        raise ValueError(f"no clip begins at tick {where}: the last one begins at {room}")
    return where


def order_of_videos(
    labels: Sequence[int], how: str, seed: int, names: Sequence[str] | None = None
) -> list[int]:
    """All videos of a set in the order in which they are chosen, by their indices.

    Args:
        labels: class of each video, -1 for none.
        how: ``shuffled`` (a permutation drawn from the seed), ``sorted`` (by name, as Python sorts), or
            ``balanced`` (each class in turn, both classes and the videos of each in a drawn order, until all
            are taken).
        seed: of the draws.
        names: their relative paths; without them ``sorted`` leaves them as they stand.
    """
    if how not in VIDEO_CHOICES:
        raise ValueError(f"unknown choice of videos {how!r}; choose one of: {', '.join(VIDEO_CHOICES)}")
    if how == "sorted":
        return sorted(range(len(labels)), key=lambda index: names[index] if names else "")
    generator = clip_generator(seed, 0, "compared videos")
    shuffled: list[int] = torch.randperm(len(labels), generator=generator).tolist()
    if how == "shuffled":
        return shuffled
    # The k-th video of each class comes before the k + 1st of any; classes stand as they first appear.
    turn: dict[int, int] = {}
    rank = []
    for index in shuffled:
        turn[labels[index]] = turn.get(labels[index], -1) + 1
        rank.append((turn[labels[index]], list(turn).index(labels[index])))
    return [index for _, index in sorted(zip(rank, shuffled, strict=True))]
