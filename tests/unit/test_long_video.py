"""Plans of long videos, and what carries them out, against models whose answers are known."""

import time
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from src.diffusion.long_video import Level, Plan, Window, carry_out

DENSE = (Level(1, 4),)
TWO = (Level(4, 5), Level(1, 5))
PLANS = {
    "autoregressive": Plan(DENSE, 17, 1),
    "three given": Plan(DENSE, 17, 3),
    "shorter than a window": Plan(DENSE, 3, 2),
    "flat": Plan(DENSE, 18, 0),
    "hierarchical": Plan((Level(4, 4), Level(1, 5)), 256, 1),
    "one frame of a hierarchy": Plan(TWO, 1, 1),
    "one frame of three levels": Plan((Level(16, 5), Level(4, 5), Level(1, 5)), 1, 1),
    "one key behind a video": Plan(TWO, 1, 1, continues=True),
    "three levels": Plan((Level(16, 5), Level(4, 5), Level(1, 5)), 1000, 2),
    "two gaps a window": Plan((Level(4, 5), Level(1, 9)), 70, 1),
    "continues": Plan(DENSE, 11, 2, continues=True),
    "continues keys": Plan(TWO, 21, 2, continues=True),
    "fills": Plan(DENSE, 14, 1, continues=True, closes=True),
    "fills one window": Plan((Level(1, 5),), 3, 1, continues=True, closes=True),
    "fills keys": Plan(TWO, 63, 1, continues=True, closes=True),
    "loops": Plan(DENSE, 10, 1, closes=True),
    "loops keys": Plan(TWO, 64, 1, closes=True),
}


def known_positions(plan: Plan) -> set[int]:
    before = set(range(-plan.num_known, 0))
    return before | ({plan.num_frames} if plan.closes and plan.continues else set())


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_frame_is_made_once_from_what_is_there(plan: Plan) -> None:
    there, made = known_positions(plan), set[int]()
    counts = [0] * len(plan.levels)
    for window in plan.windows():
        level = plan.levels[window.level]
        steps = {b - a for a, b in zip(window.frames, window.frames[1:], strict=False)}
        assert steps == {level.stride} and len(window.frames) == level.window
        closing = {plan.num_frames} if plan.closes and 0 in there else set()
        assert set(window.given) <= there | closing
        assert not made & set(window.made)
        made |= set(window.made)
        there |= set(window.made)
        assert window.number == counts[window.level]
        counts[window.level] += 1
    assert made >= set(range(plan.num_frames)) and counts == plan.counts()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_windows_see_only_what_they_may(plan: Plan) -> None:
    for window in plan.windows():
        if window.level > 0:
            ratio = plan.levels[window.level - 1].stride // plan.levels[window.level].stride
            assert window.pattern == tuple(range(0, len(window.frames), ratio))
        elif window.number > 0 or plan.continues:
            end = plan.num_frames
            leading = [p for p in window.given if p != end]
            assert leading == list(window.frames[: len(leading)])
            assert len(leading) == plan.num_given or end in window.given
        else:
            assert window.given == ()


def test_a_thousand_frames_take_the_numbers_of_the_paper() -> None:
    """1,024 frames, 256 latents: 65 key latents, 21 extensions of the first window; every gap is filled."""
    plan = PLANS["hierarchical"]
    first, gaps = plan.counts()
    assert first - 1 == 21 and gaps == 64
    keys = {p for window in plan.windows() if window.level == 0 for p in window.frames}
    assert {4 * i for i in range(65)} <= keys


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_what_is_known_without_the_windows_is_true_of_them(plan: Plan) -> None:
    """The kinds of windows, how many there are, and how many are made together."""
    kinds = {(window.level, window.pattern) for window in plan.kinds()}
    windows = list(plan.windows())
    assert kinds == {(window.level, window.pattern) for window in windows}
    assert set(plan.kinds()) <= set(windows)
    for at_once in (1, 2, 5, 100):
        for level in range(len(plan.levels)):
            made = [len(batch.windows) for batch in plan.batches(at_once) if batch.windows[0].level == level]
            assert plan.group_sizes(level, at_once) == Counter(made)


@pytest.mark.parametrize("num_given", [0, 1, 3])
def test_a_plan_of_any_length_is_known_at_once(num_given: int) -> None:
    plan = Plan(DENSE, 10**12 + 4, num_given)
    began = time.monotonic()
    last = list(plan.kinds())[-1]
    assert plan.num_frames - 1 in last.made
    assert plan.counts() == [last.number + 1] == [plan.group_sizes(0, 1)[1]]
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("at_once", [1, 3, 8, 1000])
def test_windows_of_a_batch_need_nothing_from_each_other(at_once: int) -> None:
    plan = PLANS["three levels"]
    there = set[int]()
    seen: list[Window] = []
    for batch in plan.batches(at_once):
        assert len(batch.windows) <= (at_once if batch.windows[0].level else 1)
        assert all(set(window.given) <= there for window in batch.windows)
        there |= {p for window in batch.windows for p in window.made}
        seen += batch.windows
    key = lambda window: (window.level, window.number)  # noqa: E731
    assert sorted(seen, key=key) == sorted(plan.windows(), key=key)


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", [name for name in PLANS if "flat" not in name and "loops" not in name])
def test_latents_are_handed_on_to_the_right_places(name: str, backward: bool, at_once: int) -> None:
    plan = PLANS[name]

    def value(position: int) -> Tensor:
        return torch.full((1, 1, 1, 1), float(-position if backward else position), dtype=torch.float64)

    def sample(windows: Sequence[Window], given: Tensor | None, mask: Tensor | None) -> Tensor:
        """A model that has learned only that latents count up by one a frame."""
        rows = []
        for i, window in enumerate(windows):
            steps = torch.arange(len(window.frames), dtype=torch.float64)
            counted = steps * (window.frames[1] - window.frames[0])
            if given is None or mask is None:
                counted += -window.frames[-1] if backward else window.frames[0]
            else:
                at = int(mask[i].flatten().nonzero()[0])
                counted += given[i].flatten()[at] - counted[at]
            rows.append(counted.reshape(1, 1, -1, 1, 1))
        return torch.stack(rows)

    known = {p: value(p) for p in known_positions(plan)}
    pieces = list(carry_out(plan, sample, known=known, at_once=at_once, backward=backward))
    expected = torch.cat([value(p)[:, :, None] for p in range(plan.num_frames)], dim=2)
    assert torch.equal(torch.cat(pieces, dim=2), expected)


@pytest.mark.parametrize("plan", [PLANS["loops"], PLANS["loops keys"]])
def test_a_loop_ends_where_it_began(plan: Plan) -> None:
    """The frame after the last is the first: the window that closes is given both."""
    closing: list[list[float]] = []

    def sample(windows: Sequence[Window], given: Tensor | None, mask: Tensor | None) -> Tensor:
        for i, window in enumerate(windows):
            if plan.num_frames in window.given:
                assert given is not None
                closing.append(given[i].flatten().tolist())
        frames = torch.tensor([window.frames for window in windows], dtype=torch.float64)
        return 100 + frames.reshape(len(windows), 1, 1, -1, 1, 1)

    latents = torch.cat(list(carry_out(plan, sample, at_once=4, loops=True)), dim=2)
    assert latents.flatten().tolist() == [100.0 + i for i in range(plan.num_frames)]
    assert closing and all(values[-1] == 100.0 for values in closing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DENSE, 0, 1), "num_frames must be at least 1, got 0"),
        ((DENSE, 8, 4), "num_given must be from 0 to 3"),
        (((Level(4, 5),), 8, 1), r"must decrease to 1, got \[4\]"),
        (((Level(1, 5), Level(4, 5)), 8, 1), "must decrease to 1"),
        (((Level(4, 5), Level(1, 4)), 8, 1), "can't fill gaps between frames 4 apart"),
        (((Level(3, 5), Level(1, 5)), 8, 1), "latents 2 or 4 apart before .* windows of 4 or 7 latent"),
        (((Level(16, 6), Level(3, 6), Level(1, 6)), 8, 1), "together .*: latents 15 apart before the gaps"),
        (
            ((Level(16, 5), Level(3, 5), Level(1, 5)), 8, 1),
            "or latents 4 apart in the gaps, in place of those 3",
        ),
        (((Level(16, 17), Level(1, 5)), 8, 1), "or latents 4 apart in the gaps, before those 1 apart"),
        (((Level(4, 5), Level(1, 1)), 8, 1), r"\): windows of 5 latent frames in the gaps"),
        (((Level(3, 2), Level(2, 2), Level(1, 2)), 8, 1), "with windows of at least 3"),
        ((DENSE, 8, 0, True), "can neither continue nor close"),
        ((TWO, 62, 1, True, True), "can't be closed with these windows; use 59 or 63"),
        ((TWO, 3, 1, True, True), "use 15"),
        ((DENSE, 4, 1, False, True), "use 5"),
    ],
)
def test_plans_that_cannot_be_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(*arguments)
