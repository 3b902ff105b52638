"""Preprocessing of videos for feature extractors."""

import pytest
import torch
from torch.nn import functional as F

from src.metrics.features import extract, i3d_features, resize_frames


def test_resizing_is_affine_and_keeps_order():
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 2, 6, 8).clone()
    ramp[:, :, 1] += 0.5
    wide = resize_frames(ramp, 16)
    assert wide.shape == (1, 3, 2, 16, 16)
    # Half-pixel centres: inside, a ramp stays a ramp of half the slope; borders repeat.
    slopes = wide[0, 0, 0, 0].diff()
    torch.testing.assert_close(slopes[1:-1], torch.full((13,), 1 / 7), rtol=1e-5, atol=1e-6)
    assert slopes[0] < 1e-6 or slopes[0] == pytest.approx(1 / 14, rel=1e-4)
    torch.testing.assert_close(wide[:, :, 1] - wide[:, :, 0], torch.full((1, 3, 16, 16), 0.5))


def test_shrinking_takes_two_neighbours_and_no_average():
    video = torch.rand(1, 1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    # A factor of 4 samples at 1.5, 5.5, 9.5: the mean of pixels 1 and 2, 5 and 6, 9 and 10.
    at = torch.tensor([1, 5, 9])
    rows = (video[..., at, :] + video[..., at + 1, :]) / 2
    expected = (rows[..., at] + rows[..., at + 1]) / 2
    torch.testing.assert_close(resize_frames(video, 3), expected)


def test_frames_of_the_right_size_pass_untouched():
    video = torch.rand(1, 3, 2, 24, 24)
    assert resize_frames(video, 24) is video


def test_i3d_features_enlarges_in_chunks_and_in_order():
    seen = []

    def network(video):
        seen.append(tuple(video.shape))
        return video.mean(dim=(2, 3, 4))

    video = torch.arange(5.0).reshape(5, 1, 1, 1, 1).expand(5, 3, 9, 8, 10)
    features = i3d_features(network, video)
    assert seen == [(2, 3, 9, 224, 224)] * 2 + [(1, 3, 9, 224, 224)]
    torch.testing.assert_close(features, torch.arange(5.0)[:, None].expand(5, 3))


def test_extract_stacks_a_stream():
    videos = torch.randn(7, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    features = extract(lambda video: video.flatten(1), iter(videos.split(3)))
    assert torch.equal(features, videos.flatten(1))
    with pytest.raises(ValueError, match="no videos"):
        extract(lambda video: video, iter([]))


def test_resizing_equals_resizing_bytes_before_scaling():
    frames = torch.randint(0, 256, (2, 3, 1, 20, 30), generator=torch.Generator().manual_seed(2))
    expected = F.interpolate(frames[:, :, 0].double(), size=(24, 24), mode="bilinear") * 2 / 255 - 1
    actual = resize_frames(frames.double() / 127.5 - 1, 24)[:, :, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
