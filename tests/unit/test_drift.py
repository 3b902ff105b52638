"""Long videos that fade, saturate, freeze and blur by construction, and one that stays what it was."""

import json

import pytest
import torch
from torch.nn import functional as F

from src.metrics.drift import (
    STATISTICS,
    DistanceCurve,
    Drift,
    change_from_first,
    clip_statistics,
    compare_blocks,
    curve_beside_band,
    measure_drift,
)

NUM_FRAMES, NUM_WINDOWS = 8, 10
LENGTH = NUM_FRAMES * NUM_WINDOWS


def moving(num_videos: int, num_frames: int, seed: int) -> torch.Tensor:
    """Coloured textures that drift by a pixel a frame, each of its own contrast: stationary."""
    generator = torch.Generator().manual_seed(seed)
    texture = F.interpolate(torch.rand(num_videos, 3, 12, 12, generator=generator) * 2 - 1, size=(24, 24))
    texture = texture * (0.4 + 0.4 * torch.rand(num_videos, 1, 1, 1, generator=generator))
    return torch.stack([texture.roll(t, -1) for t in range(num_frames)], 2)


def ramp(start: float, end: float) -> torch.Tensor:
    """1 up to the middle, then from `start` to `end` in time, `(1 1 t 1 1)`."""
    half = LENGTH // 2
    return torch.cat([torch.full((half,), start), torch.linspace(start, end, half)]).reshape(1, 1, -1, 1, 1)


def real_statistics() -> dict[str, torch.Tensor]:
    return clip_statistics(moving(60, NUM_FRAMES, seed=1))


def along(video: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics of a video window by window."""
    windows = [clip_statistics(window) for window in video.split(NUM_FRAMES, 2)]
    return {name: torch.stack([window[name] for window in windows], 1) for name in STATISTICS}


def drift_of(video: torch.Tensor) -> Drift:
    return measure_drift(along(video), real_statistics(), NUM_FRAMES)


def left(drift: Drift) -> dict[str, int]:
    """The statistics that leave their band, with the window where they do."""
    return {name: curve.left_at for name, curve in drift.statistics.items() if curve.left_at is not None}


def test_a_stationary_video_stays_inside_its_band():
    drift = drift_of(moving(12, LENGTH, seed=2))
    assert left(drift) == {}
    for curve in drift.statistics.values():
        assert len(curve.median) == NUM_WINDOWS
        # The band leaves out a tenth of real clips; of twelve videos, some more may lie there.
        assert max(curve.share_outside) <= 0.35


def test_fading_to_grey_leaves_below_after_the_middle():
    drift = drift_of(moving(12, LENGTH, seed=2) * ramp(1.0, 0.0))
    found = left(drift)
    assert {"contrast", "saturation", "sharpness", "motion_energy"} <= set(found)
    for name in ("contrast", "saturation"):
        curve = drift.statistics[name]
        assert 5 <= found[name] <= 8
        assert curve.outside == list(range(found[name], NUM_WINDOWS))
        assert curve.median[-1] < curve.band[0]
        assert curve.share_outside[-1] == 1.0


def test_running_into_saturation_leaves_above():
    drift = drift_of((moving(12, LENGTH, seed=2) * ramp(1.0, 6.0)).clamp(-1, 1))
    assert {"contrast", "saturation", "clipped_fraction"} <= set(left(drift))
    for name in ("contrast", "saturation", "clipped_fraction"):
        assert left(drift)[name] >= 5
        assert drift.statistics[name].median[-1] > drift.statistics[name].band[1]


def test_freezing_shows_in_motion_and_in_the_freeze_rate_alone():
    video = moving(12, LENGTH, seed=2)
    video[:, :, 44:] = video[:, :, 43:44]  # within window 5
    drift = drift_of(video)
    assert left(drift) == {"motion_energy": 5, "freeze_rate": 5}
    freeze_rate = drift.statistics["freeze_rate"]
    assert freeze_rate.band == (0.0, 0.0)
    # Frames 40 to 47: of their seven differences the last four are nothing.
    assert freeze_rate.median == pytest.approx([0.0] * 5 + [4 / 7] + [1.0] * 4)


def test_blurring_shows_in_sharpness():
    video = moving(12, LENGTH, seed=2)
    blurred = F.avg_pool3d(F.pad(video, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), stride=1)
    video[:, :, LENGTH // 2 :] = blurred[:, :, LENGTH // 2 :]
    drift = drift_of(video)
    assert left(drift)["sharpness"] == 5
    assert drift.statistics["sharpness"].outside == [5, 6, 7, 8, 9]
    assert "freeze_rate" not in left(drift)


def test_a_minority_shows_in_the_share_outside():
    video = moving(12, LENGTH, seed=2)
    video[:4, :, 40:] = 0.0
    drift = drift_of(video)
    curve = drift.statistics["saturation"]
    assert curve.left_at is None
    assert curve.share_outside[5] == pytest.approx(curve.share_outside[4] + 4 / 12, abs=0.1)


def test_the_band_is_the_quantiles_of_real_clips():
    real = torch.arange(101.0)
    values = torch.tensor([[50.0, 3.0, 5.0, 96.0, 95.0]])
    curve = curve_beside_band(values, real)
    assert curve.band == pytest.approx((5.0, 95.0))
    assert (curve.outside, curve.left_at) == ([1, 3], 1)
    assert curve_beside_band(values, real, quantiles=(0.0, 1.0)).outside == []


def test_turning_into_another_video_shows_as_a_change_though_every_clip_is_real():
    """Means of real clips wander by 1 around their video's own, which differ by 100."""
    generator = torch.Generator().manual_seed(0)

    def videos(count: int) -> torch.Tensor:
        own = 100 * torch.randn(count, 1, 1, generator=generator)
        return own + torch.randn(count, 8, 1, generator=generator)

    turning = videos(2000)
    turning[500:, 5:] = turning[500:, 5:].roll(1, 0)
    change = change_from_first(turning, videos(2000))
    assert change.limit == pytest.approx(1.96 * 2**0.5, rel=0.03)
    assert change.median[0] == change.share_beyond[0] == change.real_share_beyond[0] == 0
    assert sum(change.real_share_beyond) / 7 == pytest.approx(0.05, abs=0.001)
    assert change.share_beyond[4] == pytest.approx(0.05, abs=0.015)
    # Of pairs of other videos hardly one in fifty is alike enough.
    assert change.share_beyond[5] == pytest.approx(0.75 + 0.25 * 0.05, abs=0.03)


def test_a_change_is_a_distance_of_vectors():
    values = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    real = torch.tensor([[[1.0, 1.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 3.0]]])
    change = change_from_first(values, real, far=0.5)
    assert change.limit == 2.0 and change.median == [0.0, 5.0] and change.share_beyond == [0.0, 1.0]
    assert change.real_share_beyond == [0.0, 0.5]
    with pytest.raises(ValueError, match=r"got \(1, 2, 2\) and \(2, 1, 2\)"):
        change_from_first(values, real[:, :1])


def test_blocks_that_stand_still_or_are_copies_are_found():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 9, 5, generator=generator)
    motion = torch.full((3, 9), 2.0)
    kept = compare_blocks(motion, pixels, 2.0, pixels, clips=2, num_frames=16)
    assert kept is not None and kept.num_frames == 32
    assert (kept.share_slow, kept.motion) == (0.0, (1.0, 1.0))
    blocks = pixels[:, :8].double().reshape(3, 4, 10) / 2**0.5
    pairs = [min(float((video[i] - video[j]).norm()) for i in range(4) for j in range(i)) for video in blocks]
    assert kept.nearest == kept.real_nearest
    assert kept.nearest == pytest.approx((min(pairs), sorted(pairs)[1]))
    motion[1, 4:6] = torch.tensor([0.0, 1.8])
    pixels[2, 6:8] = pixels[2, 0:2]
    found = compare_blocks(motion, pixels, 2.0, None, clips=2, num_frames=16)
    assert found is not None and found.real_nearest is None
    assert found.share_slow == pytest.approx(1 / 12) and found.motion[0] == pytest.approx(0.45)
    assert found.nearest[0] == 0.0 < found.nearest[1]
    assert compare_blocks(motion[:, :3], pixels[:, :3], 2.0, None, clips=2, num_frames=16) is None


def test_a_result_goes_through_json():
    drift = measure_drift(
        along(moving(4, LENGTH, seed=2) * ramp(1.0, 0.0)),
        real_statistics(),
        NUM_FRAMES,
        distances={"fvd_fast@4": DistanceCurve([3.0, 4.0], 2.5)},
        changes={"contrast": change_from_first(torch.rand(4, 10, 1), torch.rand(5, 3, 1))},
        blocks=compare_blocks(torch.rand(4, 10), torch.rand(4, 10, 6), 0.5, None, 2, NUM_FRAMES),
    )
    written = json.loads(json.dumps(drift.to_dict(), allow_nan=False))
    assert written["distances"] == {"fvd_fast@4": {"values": [3.0, 4.0], "floor": 2.5}}
    contrast = written["statistics"]["contrast"]
    assert contrast["median"] == drift.statistics["contrast"].median
    assert tuple(contrast["band"]) == drift.statistics["contrast"].band
    assert written["statistics"]["contrast"]["left_at"] == drift.statistics["contrast"].left_at
    assert written["statistics"]["freeze_rate"]["left_at"] is None
    assert (written["num_videos"], written["num_real"]) == (4, 60)
    assert len(written["changes"]["contrast"]["share_beyond"]) == 10
    assert written["blocks"]["num_frames"] == 2 * NUM_FRAMES


def test_what_can_not_be_measured_is_refused():
    with pytest.raises(ValueError, match=r"got \(5,\) and \(3,\)"):
        curve_beside_band(torch.zeros(5), torch.zeros(3))
    with pytest.raises(ValueError, match=r"got \(0.9, 0.1\)"):
        curve_beside_band(torch.zeros(2, 5), torch.zeros(3), quantiles=(0.9, 0.1))
    with pytest.raises(ValueError, match=r"got \['contrast'\] and \['sharpness'\]"):
        measure_drift({"contrast": torch.zeros(1, 2)}, {"sharpness": torch.zeros(2)}, 8)
