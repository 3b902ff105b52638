import numpy as np
import pytest
import torch

from src.data.transforms import Resize, as_size, to_frames, to_video


def test_every_level_survives_the_round_trip() -> None:
    frames = np.arange(256, dtype=np.uint8).reshape(1, 4, 4, 16, 1).repeat(3, axis=-1)
    video = to_video(frames)
    assert video.shape == (1, 3, 4, 4, 16)
    assert video.min() == -1 and video.max() == 1
    np.testing.assert_array_equal(to_frames(video), frames)


def test_axes_are_renamed_not_mixed() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 7, 3), dtype=np.uint8)
    video = to_video(torch.from_numpy(frames))
    for b, c, t, h, w in [(0, 0, 0, 0, 0), (1, 2, 4, 5, 6), (1, 1, 3, 2, 5)]:
        assert video[b, c, t, h, w].item() == pytest.approx(int(frames[b, t, h, w, c]) / 127.5 - 1, abs=1e-6)
    assert video.is_contiguous(memory_format=torch.channels_last_3d)
    np.testing.assert_array_equal(to_frames(video[1]), frames[1])


def test_a_resolution_is_one_number_or_two() -> None:
    assert as_size(32) == as_size([32, 32]) == (32, 32) and as_size((24, 32)) == (24, 32)
    for wrong in (["a", "b"], 32.5, [32], [32, 32, 32], "32", None, [32, 1.5]):
        with pytest.raises(ValueError, match=r"one whole number of pixels or \[height,width\], got"):
            as_size(wrong)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        as_size(0)


def test_to_frames_rounds_and_clamps() -> None:
    levels = torch.tensor([-7.0, -1.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1, 1.0, 3.0])
    assert to_frames(levels.reshape(1, 1, 1, 6)).ravel().tolist() == [0, 0, 0, 1, 255, 255]


def test_wrong_frames_are_refused_with_their_shape() -> None:
    with pytest.raises(ValueError, match=r"uint8.*torch.float32 of shape \(2, 2\)"):
        to_video(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"b\) c t h w.*\(2, 2\)"):
        to_frames(torch.zeros(2, 2))


def test_center_crop_takes_the_middle_and_squash_takes_all() -> None:
    frame = np.zeros((8, 16, 3), np.uint8)
    frame[:, 3:13] = 200  # the centred square, and the pixel beside it that antialiasing looks at
    frame[:, :2] = 90
    assert np.all(Resize(4)(frame) == 200)
    frame[:, 3:5] = frame[:, 11:13] = frame[:, :2] = 0
    squashed = Resize(4, "squash")(frame)
    assert np.all(squashed[:, 0] < 60) and np.all(squashed[:, 1:3] > 140)


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    assert np.abs(Resize(8)(checkerboard).astype(float) - 127.5).max() < 3


def test_resize_agrees_with_an_antialiased_torch_resize() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    planes = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(planes, (20, 20), mode="bilinear", antialias=True)[0]
    assert np.abs(Resize(20)(frame) - expected.permute(1, 2, 0).numpy()).max() <= 1.01


def test_sizes() -> None:
    frame = np.full((30, 17, 3), 9, np.uint8)
    assert Resize((10, 24))(frame).shape == (10, 24, 3)
    assert Resize((30, 17))(frame) is frame
    with pytest.raises(ValueError, match="center_crop, random_crop, squash"):
        Resize(8, "middle")
    with pytest.raises(ValueError, match="at least 1"):
        Resize(0)
