"""Masks, conditions, guidance, autoregression."""

import pytest
import torch
from torch import Tensor

from src.diffusion.conditioning import Condition, FrameMasking, GivenFrames, denoiser_of
from src.diffusion.guidance import guided
from src.diffusion.long_video import autoregressive, num_windows


def masking(**changes: object) -> FrameMasking:
    values = dict(prediction=0.3, interpolation=0.2, num_given=[1, 2], max_noise_level=0, class_dropout=0.1)
    return FrameMasking(**(values | changes))


def test_masks_come_with_their_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(masking().mask(5, generator).int().tolist()) for _ in range(8000)]
    share = {row: rows.count(row) / len(rows) for row in set(rows)}
    # Standard error is at most 0.0056.
    assert share.pop((1, 0, 0, 0, 1)) == pytest.approx(0.2, abs=0.025)
    assert share.pop((1, 0, 0, 0, 0)) == pytest.approx(0.15, abs=0.025)
    assert share.pop((1, 1, 0, 0, 0)) == pytest.approx(0.15, abs=0.025)
    assert share.pop((0, 0, 0, 0, 0)) == pytest.approx(0.5, abs=0.025)
    assert not share


def test_interpolation_may_give_every_nth_frame() -> None:
    generator = torch.Generator().manual_seed(0)
    strided = masking(prediction=0.0, interpolation=1.0, interpolation_stride=3)
    assert strided.mask(8, generator).tolist() == [1, 0, 0, 1, 0, 0, 1, 0]
    strided.check(2)
    with pytest.raises(ValueError, match="at least 2"):
        masking(interpolation_stride=1)
    with pytest.raises(ValueError, match="1 of 1 latent frames"):
        strided.check(1)


def test_windows_too_short_for_the_masks_are_refused() -> None:
    masking().check(3)
    with pytest.raises(ValueError, match="2 of 2 latent frames"):
        masking().check(2)
    with pytest.raises(ValueError, match="sum to at most 1"):
        masking(prediction=0.9)


def test_given_latents_stand_in_the_place_of_noisy_ones() -> None:
    seen = {}

    def network(x: Tensor, timesteps: Tensor, **told: Tensor) -> Tensor:
        seen.update(told, x=x)
        return x

    noisy, given = torch.zeros(2, 3, 4, 5, 5), torch.ones(2, 3, 4, 5, 5)
    mask = torch.zeros(2, 1, 4, 5, 5)
    mask[:, :, :1] = 1
    condition = Condition(GivenFrames(given, mask, torch.tensor([7, 8])), torch.tensor([1, 2]))
    denoiser_of(network)(noisy, torch.zeros(2, dtype=torch.int64), condition)
    assert seen["x"][:, :, 0].eq(1).all() and seen["x"][:, :, 1:].eq(0).all()
    assert seen["noise_level"].tolist() == [7, 8] and seen["label"].tolist() == [1, 2]


def test_guidance_is_the_textbook_formula_in_one_call() -> None:
    calls = []

    def denoiser(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        calls.append(len(x))
        assert condition.label is not None
        return x * condition.label.reshape(-1, 1, 1, 1, 1)

    x = torch.full((2, 1, 1, 1, 1), 3.0)
    condition = Condition(label=torch.tensor([2, 5]))
    time = torch.zeros(2, dtype=torch.int64)
    got = guided(denoiser, 1.5)(x, time, condition).flatten().tolist()
    assert calls == [4]
    # uncond is 3 * -1; cond is 3 * label
    assert got == pytest.approx([-3 + 1.5 * (6 + 3), -3 + 1.5 * (15 + 3)])
    assert guided(denoiser, 1.0) is denoiser


@pytest.mark.parametrize(
    "num_frames, window, num_given", [(4, 4, 1), (5, 4, 1), (17, 4, 3), (3, 4, 2), (64, 5, 2)]
)
def test_autoregression_counts_and_hands_over_the_right_frames(
    num_frames: int, window: int, num_given: int
) -> None:
    """With a "model" that counts on from what it is given, the pieces must be 0, 1, 2, …"""
    calls = []

    def sample_window(index: int, given: Tensor | None) -> Tensor:
        calls.append(index)
        first = 0.0 if given is None else given[0, 0, 0, 0, 0].item()
        return torch.arange(window).reshape(1, 1, -1, 1, 1) + first

    pieces = list(autoregressive(sample_window, num_frames, window, num_given))
    assert torch.cat(pieces, dim=2).flatten().tolist() == list(range(num_frames))
    assert calls == list(range(num_windows(num_frames, window, num_given)))


def test_guidance_in_one_call_is_guidance_in_two_and_the_papers_form() -> None:
    """One batched call equals two separate ones; (1 + w) cond - w uncond is a scale of 1 + w."""
    torch.manual_seed(0)
    mixing = torch.randn(3, 3, dtype=torch.float64)

    def network(x: Tensor, timesteps: Tensor, *, mask: Tensor, noise_level: Tensor, label: Tensor) -> Tensor:
        told = noise_level.reshape(-1, 1, 1, 1, 1) + 2.0 * label.reshape(-1, 1, 1, 1, 1)
        return torch.tanh(torch.einsum("dc,bcthw->bdthw", mixing, x) + mask + 0.1 * told)

    x, given = torch.randn(2, 2, 3, 4, 5, 5, dtype=torch.float64).unbind()
    mask = torch.zeros(2, 1, 4, 5, 5, dtype=torch.float64)
    mask[:, :, :2] = 1
    condition = Condition(GivenFrames(given, mask, torch.tensor([3, 4])), torch.tensor([1, 0]))
    times = torch.tensor([5, 9])
    denoiser = denoiser_of(network)
    cond, uncond = denoiser(x, times, condition), denoiser(x, times, condition.dropped())
    assert (cond - uncond).abs().max() > 0.1
    w = 0.7
    got = guided(denoiser, 1 + w)(x, times, condition)
    torch.testing.assert_close(got, uncond + (1 + w) * (cond - uncond), rtol=0, atol=1e-12)
    torch.testing.assert_close(got, (1 + w) * cond - w * uncond, rtol=0, atol=1e-12)
