"""Statistics of videos whose values are known by construction."""

import math

import pytest
import scipy.ndimage
import scipy.spatial.distance
import torch

from src.metrics import video_statistics
from src.metrics.video_statistics import (
    clipped_fraction,
    contrast,
    frozen,
    mean_pairwise_distance,
    motion_energy,
    nearest,
    pixel_features,
    saturation,
    sharpness,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_contrast_is_the_deviation_of_every_frame():
    video = rand(2, 3, 4, 5, 6)
    expected = [[video[b, :, t].std(correction=0).item() for t in range(4)] for b in range(2)]
    torch.testing.assert_close(contrast(video), torch.tensor(expected))
    checkerboard = torch.tensor([-1.0, 1.0]).repeat(1, 3, 2, 4, 2)
    torch.testing.assert_close(contrast(checkerboard), torch.ones(1, 2))
    assert contrast(torch.full((1, 3, 2, 4, 4), 0.3)).abs().max() < 1e-6


def test_motion_energy_of_a_moving_edge():
    # A white edge on black moves by one of 8 columns each frame: 1/8 of the pixels change by 2.
    video = torch.stack([torch.where(torch.arange(8) < t, 1.0, -1.0).expand(3, 8, 8) for t in range(5)], 1)[
        None
    ]
    torch.testing.assert_close(motion_energy(video), torch.full((1, 4), 0.25))
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        motion_energy(video[:, :, :1])


def test_saturation_is_0_for_grey_and_1_for_pure_colours():
    grey, red = torch.full((1, 3, 1, 2, 2), 0.4), torch.tensor([1.0, -1, -1]).reshape(1, 3, 1, 1, 1)
    video = torch.cat([grey, red.expand(1, 3, 1, 2, 2), (grey + red) / 2], dim=2)
    torch.testing.assert_close(saturation(video), torch.tensor([[0.0, 1.0, 0.5]]))


def test_clipped_fraction_counts_both_ends():
    values = torch.tensor([-1.0, -0.999, -0.9, 0.0, 0.5, 1.0, 1.3, 0.99]).reshape(1, 1, 1, 2, 4)
    assert clipped_fraction(values).item() == pytest.approx(4 / 8)


@pytest.mark.parametrize("shape", [(2, 3, 4, 7, 9), (1, 1, 1, 3, 3)])
def test_sharpness_is_the_variance_of_scipys_laplacian(shape):
    video = rand(*shape)
    grey = video.double().mean(1).numpy()
    expected = [
        [
            scipy.ndimage.laplace(frame)[1:-1, 1:-1].var() for frame in clip
        ]  # inside, where no border is made up
        for clip in grey
    ]
    torch.testing.assert_close(sharpness(video), torch.tensor(expected).float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"3×3 or more, got \[2, 9\]"):
        sharpness(video.new_zeros(1, 3, 1, 2, 9))


def test_frames_are_frozen_below_the_threshold_in_grey_levels():
    # Frame after frame differs by 0, 0.2, 0.3 and 5 grey levels of 255.
    levels = torch.tensor([100.0, 100.0, 100.2, 100.5, 105.5])
    video = (levels / 127.5 - 1).reshape(1, 1, 5, 1, 1).expand(2, 3, 5, 4, 4)
    assert frozen(video).tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2
    assert frozen(video, threshold=0.1).tolist() == [[1.0, 0.0, 0.0, 0.0]] * 2
    assert frozen(video, threshold=6).tolist() == [[1.0] * 4] * 2


def test_pixel_features_measure_root_mean_square_differences():
    a, b = torch.full((1, 3, 8, 16, 16), 0.25), torch.full((1, 3, 8, 16, 16), -0.5)
    distance = torch.cdist(pixel_features(a), pixel_features(b)).item()
    assert distance == pytest.approx(0.75, rel=1e-6)
    assert pixel_features(rand(2, 3, 16, 32, 32)).shape == (2, 3 * 4 * 8 * 8)


@pytest.mark.parametrize("rows", [1024, 3])
def test_mean_pairwise_distance_is_that_of_scipy(monkeypatch, rows):
    monkeypatch.setattr(video_statistics, "_ROWS_PER_BLOCK", rows)
    x = rand(11, 5)
    expected = scipy.spatial.distance.pdist(x.double().numpy()).mean()
    assert mean_pairwise_distance(x) == pytest.approx(expected, rel=1e-12)


def test_collapsed_samples_have_no_distance():
    assert mean_pairwise_distance(rand(1, 400).expand(20, 400) * 1e3) == 0.0
    with pytest.raises(ValueError, match="n >= 2"):
        mean_pairwise_distance(rand(1, 4))


@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("k", [1, 3])
def test_nearest_over_a_stream_is_nearest_over_all(batch, k):
    queries, candidates = rand(6, 8), rand(21, 8, seed=1)
    candidates[17] = candidates[2]  # a tie: the earlier one wins
    found = nearest(queries, iter(candidates.split(batch)), k)
    table = scipy.spatial.distance.cdist(queries.double().numpy(), candidates.double().numpy())
    order = table.argsort(axis=1, kind="stable")[:, :k]
    assert found.indices.tolist() == order.tolist()
    expected = torch.from_numpy(table).gather(1, torch.from_numpy(order))
    torch.testing.assert_close(found.distances, expected, rtol=1e-12, atol=0)


def test_a_copy_is_found_at_distance_zero():
    candidates = rand(50, 400, seed=2) * 100
    found = nearest(candidates[[31, 7]], [candidates[:20], candidates[20:]])
    assert found.indices.flatten().tolist() == [31, 7]
    assert found.distances.abs().max() == 0.0
    with pytest.raises(ValueError, match="3 nearest candidates, got only 2"):
        nearest(candidates, [candidates[:2]], k=3)


@pytest.mark.parametrize(
    "function", [contrast, motion_energy, saturation, clipped_fraction, sharpness, frozen, pixel_features]
)
def test_a_single_video_without_batch_is_refused(function):
    with pytest.raises(ValueError, match=r"\(b, c, t, h, w\), got \(3, 4, 8, 8\)"):
        function(torch.zeros(3, 4, 8, 8))


def test_half_precision_is_measured_in_full():
    video = rand(1, 3, 16, 32, 32).half()
    torch.testing.assert_close(contrast(video), contrast(video.float()), rtol=1e-6, atol=0)
    assert math.isfinite(motion_energy(video * 60000).sum().item())
