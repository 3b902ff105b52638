"""Videos longer than the model's window: which latent frames are made from which, and by whom."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Latent frames that are made at once.

    Args:
        level: of the plan, 0 is the coarsest.
        number: among the windows of its level; takes part in the random numbers.
        frames: positions in the video, in latent frames; what lies outside the video is made and dropped.
        given: those of them that are known before.
    """

    level: int
    number: int
    frames: tuple[int, ...]
    given: tuple[int, ...]

    @property
    def made(self) -> tuple[int, ...]:
        """The positions that this window adds."""
        return tuple(position for position in self.frames if position not in self.given)

    @property
    def pattern(self) -> tuple[int, ...]:
        """Which of its frames are given, counted from its first."""
        return tuple(i for i, position in enumerate(self.frames) if position in self.given)


@dataclass(frozen=True)
class Level:
    """One resolution in time.

    Args:
        stride: latent frames of the video from one frame to the next.
        window: frames that the model makes at once.
    """

    stride: int
    window: int


@dataclass(frozen=True)
class Batch:
    """Windows that need nothing from each other.

    Args:
        windows: of one level.
        oldest: the first position that any later window may still need.
    """

    windows: tuple[Window, ...]
    oldest: int


@dataclass(frozen=True)
class Plan:
    """Every window of a long video, in an order in which memory doesn't grow with its length.

    Windows of the first level follow each other, each continuing the last ``num_given`` frames so far (LVDM,
    section 3.4); with ``num_given=0`` they know nothing of each other. Every further level fills the gaps of
    the one before, whose frames are given at both ends of a gap.

    The video's latent frames are numbered from 0; what is known before is at -1, -2, ….

    Args:
        levels: coarsest first; the last one has stride 1.
        num_frames: latent frames to be made.
        num_given: frames of the first level that each window of it continues.
        continues: whether frames before the first are known; enough of them: ``num_known``.
        closes: whether the frame after the last is known.

    Raises:
        ValueError: for levels that don't fit each other, and for lengths that can't be closed.
    """

    levels: tuple[Level, ...]
    num_frames: int
    num_given: int
    continues: bool = False
    closes: bool = False

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        strides, first = [level.stride for level in self.levels], self.levels[0]
        if strides != sorted(set(strides), reverse=True) or strides[-1] != 1:
            raise ValueError(
                f"the levels' strides must decrease to 1, got {strides}: a model that makes every latent "
                "frame has to fill the last gaps"
            )
        if not 0 <= self.num_given < first.window:
            raise ValueError(
                f"num_given must be from 0 to {first.window - 1} (the window has {first.window} latent "
                f"frames), got {self.num_given}"
            )
        if self.num_given == 0 and (self.continues or self.closes):
            raise ValueError(
                "windows that are given nothing (num_given=0, as in a flat plan) can neither continue nor "
                "close a "
                "video; use another plan"
            )
        for coarse, fine in zip(self.levels, self.levels[1:], strict=False):
            ratio = coarse.stride / fine.stride
            if not ratio.is_integer() or fine.window < 2 or (fine.window - 1) % ratio:
                raise ValueError(_unfitting(coarse, fine))
        if self.closes:
            self._check_closing()

    @property
    def num_known(self) -> int:
        """How many latent frames before the first have to be known."""
        return (self.num_given - 1) * self.levels[0].stride + 1 if self.continues else 0

    def counts(self) -> list[int]:
        """How many windows each level has."""
        return [self._num_chained(), *(self._num_fillings(level) for level in range(1, len(self.levels)))]

    def kinds(self) -> Iterator[Window]:
        """Few of the windows: all others of a level are given the same of their frames as its second."""
        for level, count in enumerate(self.counts()):
            yield from self._of_level(level, [n for n in sorted({0, 1, count - 1}) if 0 <= n < count])

    def group_sizes(self, level: int, at_once: int) -> Counter[int]:
        """How many windows of a level :meth:`batches` makes together, and how often."""
        count, at_once = self.counts()[level], at_once if self._is_independent(level) else 1
        sizes = Counter({at_once: count // at_once, count % at_once: 1})
        return Counter({size: times for size, times in sizes.items() if size and times})

    def windows(self) -> Iterator[Window]:
        """All windows, in an order in which what is given has been made."""
        for batch in self.batches(1):
            yield from batch.windows

    def batches(self, at_once: int) -> Iterator[Batch]:
        """All windows, up to so many of a level together."""
        todo = [self._grouped(level, at_once) for level in range(len(self.levels))]
        ahead: list[tuple[Window, ...] | None] = [next(groups, None) for groups in todo]
        made = [-1] * len(self.levels)

        def reach(level: int, position: int) -> Iterator[Batch]:
            while made[level] < position and (group := ahead[level]) is not None:
                if level > 0:
                    yield from reach(level - 1, group[-1].given[-1])
                ahead[level] = next(todo[level], None)
                made[level] = group[-1].frames[-1]
                later = [other[0].frames[0] for other in ahead if other is not None]
                yield Batch(group, min(later, default=self.num_frames))

        yield from reach(len(self.levels) - 1, self.num_frames - 1)

    @property
    def _anchor(self) -> int:
        """Where each level has a frame."""
        return -1 if self.continues else 0

    def _needed(self, level: int) -> int:
        """The last frame of a level that has to be there, counted in its stride from the anchor."""
        if level == len(self.levels) - 1:
            needed = self.num_frames - self._anchor - (0 if self.closes else 1)
            return max(needed, 1) if level > 0 else needed  # the first frame alone is part of a gap
        finer = self.levels[level + 1]
        gaps = (finer.window - 1) * finer.stride // self.levels[level].stride
        return self._num_fillings(level + 1) * gaps

    def _num_fillings(self, level: int) -> int:
        return -(-self._needed(level) // (self.levels[level].window - 1))

    def _check_closing(self) -> None:
        """Every level must have a frame where the known one is, and room for the last window before it."""
        first = self.levels[0]
        multiple = math.lcm(first.stride, *(fine.stride * (fine.window - 1) for fine in self.levels[1:]))
        # The first window of a loop ends before its first frame comes again.
        least = first.stride * (first.window - 1 if self.continues else first.window + 1)
        span = self.num_frames - self._anchor
        if span % multiple == 0 and span >= least:
            return
        above = -(-max(span, least) // multiple) * multiple
        fitting = [below for below in [span // multiple * multiple] if below >= least] + [above]
        numbers = " or ".join(str(span + self._anchor) for span in fitting)
        raise ValueError(f"{self.num_frames} latent frames can't be closed with these windows; use {numbers}")

    def _grouped(self, level: int, at_once: int) -> Iterator[tuple[Window, ...]]:
        windows = self._of_level(level, range(self.counts()[level]))
        at_once = at_once if self._is_independent(level) else 1
        while group := tuple(islice(windows, at_once)):
            yield group

    def _is_independent(self, level: int) -> bool:
        """Whether windows of a level need nothing from each other."""
        return level > 0 or self.num_given == 0

    def _num_chained(self) -> int:
        """How many windows the first level has."""
        # Frame 0 is known, or the first window makes as many more than the others as those are given.
        before = 0 if self.continues else self.num_given - 1
        missing = self._needed(0) - self.closes - before
        return max(-(-missing // (self.levels[0].window - self.num_given)), 0 if self.continues else 1)

    def _chained(self, number: int, last: int) -> Window:
        """A window of the first level, whose last needed frame is `last`."""
        stride, length = self.levels[0].stride, self.levels[0].window
        begin = number * (length - self.num_given) + (1 - self.num_given if self.continues else 0)
        num_given = self.num_given if self.continues or number > 0 else 0
        new = begin + num_given
        given = list(range(begin, new))
        if self.closes and begin + length > last - 1:
            begin = last - length + 1
            given = [*range(begin, new), last]
        return self._window(0, number, range(begin, begin + length), given, stride)

    def _filling(self, level: int, number: int) -> Window:
        stride, length = self.levels[level].stride, self.levels[level].window
        frames = range(number * (length - 1), number * (length - 1) + length)
        return self._window(level, number, frames, frames[:: self.levels[level - 1].stride // stride], stride)

    def _of_level(self, level: int, numbers: Iterable[int]) -> Iterator[Window]:
        """Windows of a level by their numbers."""
        last = self._needed(0)
        for number in numbers:
            yield self._filling(level, number) if level > 0 else self._chained(number, last)

    def _window(
        self, level: int, number: int, frames: Sequence[int], given: Sequence[int], stride: int
    ) -> Window:
        def at(indices: Sequence[int]) -> tuple[int, ...]:
            return tuple(self._anchor + stride * index for index in indices)

        return Window(level, number, at(frames), at(given))


def _unfitting(coarse: Level, fine: Level) -> str:
    """Why the windows of a level can't fill the gaps of the one before, and what would go together."""
    gaps = fine.window - 1

    def fits(before: int, stride: int) -> bool:
        return before > stride and before % stride == 0 and stride * gaps % before == 0

    def joined(numbers: list[int]) -> str:
        return " or ".join(map(str, numbers))

    ways = []
    if strides := [n * fine.stride for n in range(2, fine.window) if fits(n * fine.stride, fine.stride)]:
        ways.append(f"latents {joined(strides)} apart before the gaps, in place of {coarse.stride}")
    others = [n for n in range(1, coarse.stride) if gaps and fits(coarse.stride, n)]
    if strides := [n for n in others if n == 1 or fits(n, 1)]:
        place = "before" if fine.stride == 1 else "in place of"
        ways.append(f"latents {joined(strides)} apart in the gaps, {place} those {fine.stride} apart")
    if coarse.stride % fine.stride == 0:
        ratio = coarse.stride // fine.stride
        lengths = sorted({max(gaps // ratio, 1) * ratio + 1, (gaps // ratio + 1) * ratio + 1})
        ways.append(f"windows of {joined(lengths)} latent frames in the gaps, in place of {fine.window}")
    return (
        f"windows of {fine.window} latent frames {fine.stride} apart can't fill gaps between frames "
        f"{coarse.stride} apart: {coarse.stride} must be a multiple of {fine.stride}, and {fine.stride} "
        f"times {gaps} a multiple of {coarse.stride}. Train models that go together (latent_strides and "
        f"dataset.num_frames): {', or '.join(ways) or 'with windows of at least 3 latent frames'}"
    )


SampleWindows = Callable[[Sequence[Window], Tensor | None, Tensor | None], Tensor]
"""Makes windows of one level: from their given latents ``w b c t h w`` and their mask ``w 1 1 t 1 1`` (both
None if nothing is given) come latents ``w b c t h w``."""


def carry_out(
    plan: Plan,
    sample: SampleWindows,
    *,
    known: Mapping[int, Tensor] | None = None,
    at_once: int = 1,
    loops: bool = False,
    backward: bool = False,
) -> Iterator[Tensor]:
    """Latents of a long video, piece by piece; memory doesn't grow with the length.

    Args:
        plan: what is made from what.
        sample: makes windows.
        known: latents ``b c h w`` by position, for a plan that continues or closes.
        at_once: how many windows are made together, where they need nothing from each other.
        loops: whether the frame after the last is the first, for a plan that closes.
        backward: whether time runs backwards: position 0 is then the last frame, and -1 the one after it.

    Yields:
        Latents ``b c t h w`` in the order of positions; together ``plan.num_frames`` frames.
    """
    latents = dict(known or {})
    ready = 0
    for batch in plan.batches(at_once):
        order = slice(None, None, -1) if backward else slice(None)
        rows = [window.frames[order] for window in batch.windows]
        given = mask = None
        if any(window.given for window in batch.windows):
            nothing = torch.zeros_like(next(iter(latents.values())))
            told = [[p in window.given for p in row] for window, row in zip(batch.windows, rows, strict=True)]
            given = torch.stack(
                [
                    torch.stack(
                        [latents[p] if is_given else nothing for p, is_given in zip(row, flags, strict=True)],
                        dim=2,
                    )
                    for row, flags in zip(rows, told, strict=True)
                ]
            )
            mask = given.new_tensor(told).reshape(len(rows), 1, 1, -1, 1, 1)
        made = sample(batch.windows, given, mask)
        for window, row, frames in zip(batch.windows, rows, made, strict=True):
            for position, frame in zip(row, frames.unbind(2), strict=True):
                if position not in window.given:
                    # A copy: a view would keep the whole batch in memory.
                    latents[position] = frame.clone()
        if loops and 0 in latents:
            latents[plan.num_frames] = latents[0]
        begin = ready
        while ready < plan.num_frames and ready in latents:
            ready += 1
        if ready > begin:
            yield torch.stack([latents[p] for p in range(begin, ready)], dim=2)
        for position in [p for p in latents if p < min(batch.oldest, ready)]:
            del latents[position]
