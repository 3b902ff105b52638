"""Masks, conditions, guidance, autoregression."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from src.data.sampler import clip_generator
from src.diffusion.conditioning import Condition, FrameMasking, GivenFrames, denoiser_of, levels_of_given
from src.diffusion.guidance import guided


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


def probabilities(masking: FrameMasking, num_frames: int) -> dict[tuple[int, ...], float]:
    """The probability of every mask, as the sum over what may lead to it."""
    expected = dict.fromkeys(itertools.product((0, 1), repeat=num_frames), 0.0)
    expected[(1, *[0] * (num_frames - 2), 1)] += masking.interpolation
    for n in masking.num_given:
        leading = (1,) * n + (0,) * (num_frames - n)
        expected[leading] += masking.prediction / len(masking.num_given)
        expected[leading[::-1]] += masking.backward / len(masking.num_given)
    for row in expected:
        if 0 < sum(row) < num_frames:
            expected[row] += masking.infilling / (num_frames - 1) / math.comb(num_frames, sum(row))
    given = masking.prediction + masking.interpolation + masking.backward + masking.infilling
    expected[(0,) * num_frames] += 1 - given
    return expected


@pytest.mark.parametrize(
    "chosen",
    [
        dict(prediction=0.25, interpolation=0.25, backward=0.1, infilling=0.15),
        dict(prediction=0.0, interpolation=0.0, backward=0.4, infilling=0.0),
        dict(prediction=0.0, interpolation=0.0, backward=0.0, infilling=1.0),
        dict(prediction=0.5, interpolation=0.0, num_given=[1]),
        dict(prediction=0.0, interpolation=0.9, num_given=[]),
    ],
)
def test_every_mask_comes_as_often_as_it_should(chosen: dict[str, object]) -> None:
    """Each of the 32 masks of five frames within three standard errors, over 10,000 draws."""
    count, expected = 10_000, probabilities(masking(**chosen), 5)
    assert sum(expected.values()) == pytest.approx(1.0)
    rows = [
        tuple(masking(**chosen).mask(5, clip_generator(0, position, "mask")).int().tolist())
        for position in range(count)
    ]
    for row, probability in expected.items():
        error = (max(probability * (1 - probability), 0.0) * count) ** 0.5
        assert abs(rows.count(row) - probability * count) <= 3 * error + 1e-6, row


def test_infilling_gives_each_number_of_frames_alike() -> None:
    infilling = masking(prediction=0.0, interpolation=0.0, infilling=1.0)
    draws = torch.stack([infilling.mask(7, clip_generator(0, i, "mask")) for i in range(10_000)])
    numbers = torch.bincount(draws.sum(1).long(), minlength=8)
    assert numbers[0] == numbers[7] == 0
    assert (numbers[1:7] - 10_000 / 6).abs().max() < 3 * (10_000 * 5 / 36) ** 0.5
    assert (draws.sum(0) - 5_000).abs().max() < 3 * (10_000 / 4) ** 0.5


def test_what_was_trained_can_be_read() -> None:
    trained = masking(prediction=0.0, interpolation=0.0, backward=0.5)
    assert trained.gives_frames and trained.share_given == 0.5 and not trained.is_perturbed
    assert masking(max_noise_level=250).is_perturbed
    nothing = masking(prediction=0.0, interpolation=0.0, max_noise_level=250)
    assert not nothing.gives_frames and not nothing.is_perturbed


def test_kinds_that_cant_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to at most 1"):
        masking(infilling=0.6)
    with pytest.raises(ValueError, match="prediction or backward"):
        masking(prediction=0.0, backward=0.1, num_given=[])
    with pytest.raises(ValueError, match="noise_level_per_frame"):
        masking(noise_level_per_frame=True)
    with pytest.raises(ValueError, match="1 of 1 latent frames"):
        masking(prediction=0.0, interpolation=0.0, infilling=0.5).check(1)
    masking(prediction=0.0, interpolation=0.0, infilling=0.5).check(2)
    with pytest.raises(ValueError, match="2 of 2 latent frames"):
        masking(prediction=0.0, interpolation=0.0, backward=0.5).check(2)


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


def test_given_frames_are_exactly_the_given_latents_and_others_have_no_influence() -> None:
    """Gradients of a network that mixes everything: zero where a latent isn't looked at, exactly."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=generator)
    noisy, given = (torch.randn(2, 3, 5, 4, 4, generator=generator, requires_grad=True) for _ in range(2))
    rows = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    mask = rows.float()[:, None, :, None, None].expand(-1, 1, -1, 4, 4)
    seen = []

    def network(x: Tensor, timesteps: Tensor, **told: Tensor) -> Tensor:
        seen.append(x)
        return torch.tanh(torch.einsum("st,bcthw->bcshw", mixing, x) / 4 + told["mask"])

    condition = Condition(GivenFrames(given, mask, torch.tensor([-1, -1])))
    denoiser_of(network)(noisy, torch.zeros(2).long(), condition).square().sum().backward()
    assert torch.equal(seen[0], torch.where(mask > 0, given, noisy))
    assert given.grad is not None and noisy.grad is not None
    is_given = (mask > 0).expand_as(given)
    assert not given.grad[~is_given].any() and given.grad[is_given].all()
    assert not noisy.grad[is_given].any() and noisy.grad[~is_given].all()


def test_levels_of_single_frames_are_told_by_their_own_route_and_go_with_the_frames() -> None:
    seen: list[dict[str, Tensor | None]] = []

    def network(x: Tensor, timesteps: Tensor, **told: Tensor | None) -> Tensor:
        seen.append(told)
        return x

    mask = torch.tensor([[1.0, 0, 1], [0, 0, 0]])[:, None, :, None, None].expand(-1, 1, -1, 2, 2)
    levels = levels_of_given(torch.tensor([[5, 6, 7], [8, 9, 10]]), mask)
    assert levels.tolist() == [[5, -1, 7], [-1, -1, -1]]
    x = torch.zeros(2, 4, 3, 2, 2)
    condition = Condition(GivenFrames(x, mask, levels))
    guided(denoiser_of(network), 1.5)(x, torch.zeros(2).long(), condition)
    (told,) = seen
    assert told["noise_level"] is None and told["frame_noise_level"] is not None
    assert told["frame_noise_level"].tolist() == [[5, -1, 7], *[[-1, -1, -1]] * 3]


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


@pytest.mark.parametrize("time, expected", [(9, 1.0), (10, 5.0), (20, 5.0), (21, 1.0)])
def test_guidance_works_in_its_interval_alone(time: int, expected: float) -> None:
    """Outside, the conditional prediction is taken as it is, and nothing else is computed."""
    rows = []

    def denoiser(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        rows.append(len(x))
        assert condition.label is not None
        return (condition.label.double() >= 0).double().reshape(-1, 1, 1, 1, 1).expand(x.shape)

    x, times = torch.zeros(2, 1, 1, 1, 1, dtype=torch.float64), torch.full((2,), time)
    got = guided(denoiser, 5.0, (10, 20))(x, times, Condition(None, torch.tensor([0, 1])))
    assert got.flatten().tolist() == [expected, expected]
    assert rows == [4 if expected > 1 else 2]


def test_an_interval_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[first, last\] diffusion time, got \[20, 10\]"):
        guided(lambda x, t, c: x, 2.0, (20, 10))


KINDS = {
    (): ["none"],
    (0,): ["prediction", "infilling"],
    (0, 1): ["prediction", "infilling"],
    (0, 1, 2): ["infilling"],
    (4,): ["backward", "infilling"],
    (0, 4): ["interpolation", "infilling"],
    (1, 3): ["infilling"],
}


@pytest.mark.parametrize("kind", ["none", "prediction", "backward", "interpolation", "infilling"])
def test_what_could_be_given_is_what_is_drawn(kind: str) -> None:
    """`could_give` agrees with 3,000 draws."""
    masking = FrameMasking(
        **{"prediction": 0.0, "interpolation": 0.0} | ({} if kind == "none" else {kind: 1.0}),
        num_given=[1, 2],
        max_noise_level=0,
        class_dropout=0.0,
    )
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(masking.mask(5, generator).nonzero().flatten().tolist()) for _ in range(3000)}
    assert all(masking.could_give(frames, 5) for frames in drawn)
    for frames, kinds in KINDS.items():
        assert masking.could_give(frames, 5) == (frames in drawn) == (kind in kinds)
