"""Another stride is noticed by how fast frames become different, and other amplitudes are not."""

import math

import pytest
import torch
from torch import Tensor

from src.metrics.pace import LAGS, other_stride, pace
from src.metrics.suspicions import suspicious_stride


def curves(count: int, stride: float, seed: int) -> Tensor:
    """Paces whose level, slope and curvature scatter as those of real clips do, at any stride."""
    generator = torch.Generator().manual_seed(seed)
    level, slope, curvature = torch.randn(3, count, 1, generator=generator)
    lags = (torch.tensor(LAGS) * stride).log2()
    return 1 + 0.6 * level + (0.5 + 0.07 * slope) * lags - (0.03 + 0.01 * curvature) * lags**2


def test_the_pace_is_the_difference_at_each_lag():
    frames = torch.randint(0, 256, (3, 7, 128, 200, 3), generator=torch.Generator().manual_seed(0))
    frames = frames.to(torch.uint8)
    looked_at = frames[:, :, ::2, ::2].double()
    told = pace(frames)
    for column, lag in enumerate(LAGS):
        if lag > 6:
            assert told[:, column].isnan().all()
            continue
        difference = (looked_at[:, lag:] - looked_at[:, :-lag]).abs().mean((1, 2, 3, 4))
        torch.testing.assert_close(told[:, column].double(), (difference + 0.1).log(), rtol=1e-5, atol=1e-5)
    assert pace(frames[:, :1]).isnan().all()


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_another_stride_is_told_in_both_directions(stride):
    real, fast = curves(400, 1, 0), curves(400, stride, 1)
    there, back = other_stride(real, fast), other_stride(fast, real)
    assert there and back and abs(there - stride) <= 1 and abs(1 / back - stride) <= 1
    sentences = suspicious_stride({"pace": real}, {"pace": fast}) + suspicious_stride(
        {"pace": fast}, {"pace": real}
    )
    assert f"at about {there:.0f} times their stride" in sentences[0]
    assert f"at about 1/{1 / back:.0f} of their stride" in sentences[1]


@pytest.mark.parametrize("amplitude", [0.8, 1.0, 1.25])
def test_the_same_stride_and_another_amplitude_are_not(amplitude):
    for seed in range(0, 8, 2):
        real, generated = curves(64, 1, seed), curves(64, 1, seed + 1) + math.log(amplitude)
        assert other_stride(real, generated) is None


def test_clips_of_few_frames_tell_nothing():
    short = torch.full((8, len(LAGS)), torch.nan)
    short[:, :3] = curves(8, 1, 0)[:, :3]
    assert other_stride(short, short + 1) is None


@pytest.mark.slow
def test_real_skies_at_other_strides_are_told_and_models_of_them_are_not(shared):
    from benchmarks.stride_guard import clips, read

    real = read(shared("clips_sky/real"), 96)
    for stride, num_frames in ((2, 16), (3, 8), (4, 8)):
        once, taken = clips(real, num_frames, 1, 1, 0), clips(real, num_frames, stride, 1, 1)
        there, back = other_stride(once, taken), other_stride(taken, once)
        assert there and back and there > 1 > back
    half, whole = len(real) // 2, clips(real, 16, 1, 1, 0)
    assert other_stride(clips(real[:half], 16, 1, 1, 0), clips(real[half:], 16, 1, 1, 1)) is None
    for stage in (1, 2):
        made = clips(read(shared(f"clips_sky/generated_mdgan_stage{stage}"), 96), 16, 1, 1, 1)
        assert other_stride(whole, made) is None
