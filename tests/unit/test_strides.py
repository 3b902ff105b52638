"""Windows of latents at several strides, against slices written out by hand."""

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from src.data.sampler import Batch, LatentBatch
from src.diffusion import loss_weighting
from src.diffusion.conditioning import Condition, FrameMasking, GivenFrames, denoiser_of
from src.diffusion.guidance import guided
from src.diffusion.strides import LatentStrides
from src.generation import VideoGenerator
from src.models.autoencoder import Autoencoder3d, IdentityAutoencoder3d
from src.stages.diffusion import DiffusionStage
from tests.told import PROCESS, Told


def stage_of(unet: nn.Module, strides: tuple[int, ...], **masking: object) -> DiffusionStage:
    values = (
        dict(prediction=0.0, interpolation=0.0, num_given=[], max_noise_level=0, class_dropout=0.0) | masking
    )
    return DiffusionStage(
        unet, autoencoder=IdentityAutoencoder3d(), parameterization=PROCESS, masking=FrameMasking(**values),
        loss="l2", given_frames_in_loss=False, loss_weighting=loss_weighting.none, has_labels=False,
        generator=lambda _: None, seed=0, latent_strides=LatentStrides(strides),
    )  # fmt: skip


def counting(num_clips: int, num_frames: int) -> Batch:
    """Clips whose pixels are the number of their frame."""
    video = torch.arange(num_frames, dtype=torch.float32).reshape(1, 1, -1, 1, 1)
    video = video.expand(num_clips, 3, num_frames, 2, 2)
    return Batch(video, torch.full((num_clips,), -1), torch.arange(num_clips))


def test_the_papers_prediction_model_sees_every_fourth_latent() -> None:
    strides = LatentStrides((4,))
    clip = torch.arange(16.0).reshape(1, 16, 1, 1)
    assert strides.window(16) == 4
    assert strides.cut(clip, 0).flatten().tolist() == [0, 4, 8, 12]
    unet = Told()
    stage = stage_of(unet, (4,), prediction=1.0, num_given=[3])
    list(stage.updates(stage.modules, counting(2, 16), 0))
    (told,) = unet.told
    assert told["x"][:, 0, :3, 0, 0].tolist() == [[0, 4, 8]] * 2 and "stride" not in told


def test_strides_of_one_are_the_clip_as_it_is() -> None:
    latents, told = stage_of(Told(), (1,)).windows(counting(2, 7).video, torch.arange(2))
    assert torch.equal(latents, counting(2, 7).video) and told is None


def test_each_clip_draws_a_stride_and_a_place_all_alike() -> None:
    """Two strides in halves, and the 13 places of the finer one, over 10,000 clips."""
    stage = stage_of(Told(), (4, 1))
    count = 10_000
    windows, told = stage.windows(counting(count, 17).video[:, :1, :, :1, :1], torch.arange(count))
    assert told is not None and windows.shape == (count, 1, 5, 1, 1)
    rows = windows.flatten(1)
    coarse, fine = rows[told == 0], rows[told == 1]
    assert coarse.unique(dim=0).tolist() == [[0, 4, 8, 12, 16]]
    assert torch.equal(fine - fine[:, :1], torch.arange(5.0).expand_as(fine))
    assert abs(len(coarse) - count / 2) < 3 * (count / 4) ** 0.5
    places = torch.bincount(fine[:, 0].long(), minlength=13)
    assert len(places) == 13 and chisquare(places.numpy()).pvalue > 0.001


def test_a_clips_stride_depends_on_its_position_alone() -> None:
    stage = stage_of(Told(), (4, 1))
    video, positions = counting(8, 17).video, torch.arange(8)
    whole, told = stage.windows(video, positions)
    order = torch.tensor([5, 2, 7])
    part, told_part = stage.windows(video[order], positions[order])
    assert torch.equal(part, whole[order]) and torch.equal(told_part, told[order])
    assert not torch.equal(stage.windows(video, positions + 8)[0], whole)


def test_latents_from_the_cache_give_the_same_windows() -> None:
    autoencoder = Autoencoder3d(
        hidden_channels=8, downsample=(2, 2, 2), norm_groups=4, encoder_blocks=1, decoder_blocks=1
    )  # fmt: skip
    unet = Told()
    stage = stage_of(unet, (2, 1), prediction=0.5, num_given=[1])
    stage.autoencoder = autoencoder.eval()
    video = torch.rand(6, 3, 10, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = Batch(video, torch.full((6,), -1), torch.arange(6))
    with torch.no_grad():
        posterior = autoencoder.encode(video)
    cached = LatentBatch(posterior.mean, posterior.std, batch.label, batch.positions)
    losses = [next(iter(stage.updates(stage.modules, seen, 0))).loss for seen in (batch, cached)]
    first, second = unet.told
    assert first["x"].shape[2] == 3 and torch.equal(first["stride"], second["stride"])
    torch.testing.assert_close(first["x"], second["x"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*losses)


def test_held_out_numbers_are_of_every_stride_and_their_mean() -> None:
    """A network that is exact at the coarse stride and says 0 at the fine one: losses 0 and E ε² = 1."""

    class ExactWhereTold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, timesteps: Tensor, *, stride: Tensor, **_: Tensor) -> Tensor:
            clean = torch.arange(5.0).reshape(1, 1, -1, 1, 1) * 4
            signal, spread = PROCESS.coefficients(timesteps, x)
            exact = (x - signal * clean) / spread
            return torch.where((stride == 0).reshape(-1, 1, 1, 1, 1), exact, torch.zeros_like(x))

    stage = stage_of(ExactWhereTold(), (4, 1))
    numbers = stage.evaluate(stage.modules, [counting(40, 17), counting(24, 17)])
    assert tuple(numbers) == stage.measured
    assert numbers["loss_at_stride_4"] == pytest.approx(0.0, abs=1e-6)
    assert numbers["loss_at_stride_1"] == pytest.approx(1.0, abs=0.05)
    assert numbers["loss"] == pytest.approx(numbers["loss_at_stride_1"] / 2, rel=1e-5)
    times = [numbers[f"loss_at_{time}"] for time in stage.times]
    assert sum(times) / 4 == pytest.approx(numbers["loss"], rel=1e-6)
    alone = stage_of(Told(), (4,))
    assert not any("stride" in name for name in alone.evaluate(alone.modules, [counting(4, 16)]))


@pytest.mark.parametrize(
    "strides, message",
    [
        ((), "at least 1"),
        ((0,), "at least 1"),
        ((1.5,), "whole numbers"),
        ((True,), "whole numbers"),
        ((1, 4), r"largest first, got \[1, 4\]; use \[4, 1\]"),
        ((4, 4), r"distinct.*use \[4\]"),
    ],
)
def test_strides_that_cant_be_meant_are_refused(strides: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentStrides(strides)


def test_clips_too_short_for_a_stride_are_refused_with_the_length_that_does() -> None:
    LatentStrides((4,)).check(5, 4)
    LatentStrides((1,)).check(1, 4)
    with pytest.raises(ValueError, match=r"1 of the clip's 4 latent.*num_frames=20"):
        LatentStrides((4,)).check(4, 4)


def test_the_stride_stays_in_both_halves_of_guidance() -> None:
    unet = Told()
    x = torch.zeros(2, 3, 4, 2, 2)
    mask = torch.zeros(2, 1, 4, 2, 2)
    mask[:, :, 0] = 1
    condition = Condition(GivenFrames(x, mask, torch.tensor([-1, -1])), stride=torch.tensor([1, 0]))
    guided(denoiser_of(unet), 2.0)(x, torch.zeros(2, dtype=torch.int64), condition)
    assert unet.told[0]["stride"].tolist() == [1, 0, 1, 0]


def test_samples_are_of_the_stride_that_is_asked_for() -> None:
    for strides, stride, expected in (((4, 1), None, [1, 1]), ((4, 1), 4, [0, 0]), ((4,), 4, None)):
        unet = Told()
        generator = VideoGenerator(
            autoencoder=IdentityAutoencoder3d(), unet=unet, parameterization=PROCESS, gives_frames=True,
            sampler=lambda denoise, noise, table, draw: denoise(noise, torch.zeros(len(noise)).long()),
            guidance_scale=1.0, window=(3, 4, 2, 2), has_labels=False, max_noise_level=0, noise_level=0,
            strides=strides,
        )  # fmt: skip
        unet.told.clear()
        generator.sample_window([0, 1], None, stride=stride)
        told = unet.told[-1].get("stride")
        assert (told if told is None else told.tolist()) == expected
