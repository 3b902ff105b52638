"""Preprocessing of videos for feature extractors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from src.metrics import features
from src.metrics.features import (
    EXTRACTORS,
    RESIZES,
    ExtractorKind,
    i3d_features,
    load_extractor,
    resize_frames,
)
from src.metrics.weight_files import state_sha256


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
    assert seen == [(2, 3, 9, 224, 224)] * 3, "an odd chunk is filled up"
    torch.testing.assert_close(features, torch.arange(5.0)[:, None].expand(5, 3))


def test_resizing_equals_resizing_bytes_before_scaling():
    frames = torch.randint(0, 256, (2, 3, 1, 20, 30), generator=torch.Generator().manual_seed(2))
    expected = F.interpolate(frames[:, :, 0].double(), size=(24, 24), mode="bilinear") * 2 / 255 - 1
    actual = resize_frames(frames.double() / 127.5 - 1, 24)[:, :, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ---- resizing rules ----


def rand(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", RESIZES)
@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (25, 25), (8, 40)])
def test_every_rule_gives_the_size_and_keeps_frames_and_constants_apart(name, height, width):
    rule = RESIZES[name]
    assert rule.description.endswith(".") and rule.description.count(". ") == 0
    levels = torch.linspace(-1, 1, 2 * 3 * 4).reshape(2, 3, 4, 1, 1)
    resized = rule(levels.expand(2, 3, 4, height, width), 24)
    torch.testing.assert_close(resized, levels.expand(2, 3, 4, 24, 24), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RESIZES)
def test_every_rule_refuses_bytes_and_passes_its_own_size(name):
    video = rand(1, 3, 2, 24, 24)
    assert RESIZES[name](video, 24) is video
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        RESIZES[name](torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), 24)


def test_squash_is_what_resize_frames_does():
    video = rand(1, 3, 2, 20, 31)
    assert torch.equal(RESIZES["squash"](video, 24), resize_frames(video, 24))


@pytest.mark.parametrize(("height", "width", "size"), [(60, 80, 24), (31, 17, 24), (10, 14, 24)])
def test_squash_with_antialiasing_is_pillows(height, width, size):
    frame = rand(height, width)
    expected = Image.fromarray(frame.numpy()).resize((size, size), Image.Resampling.BILINEAR)
    resized = RESIZES["squash_antialias"](frame.expand(1, 3, 1, height, width), size)
    np.testing.assert_allclose(resized[0, 1, 0].numpy(), np.asarray(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(60, 80, 24), (31, 17, 24), (10, 14, 24), (16, 16, 32)]
)
def test_squash_of_tensorflow_1_interpolates_at_multiples_of_the_scale(height, width, size):
    frame = rand(height, width).double().numpy()
    # numpy interpolates along one axis and repeats the last value beyond the end.
    columns = [np.interp(np.arange(size) * width / size, np.arange(width), row) for row in frame]
    rows = [np.interp(np.arange(size) * height / size, np.arange(height), c) for c in np.transpose(columns)]
    video = torch.from_numpy(frame).float().expand(1, 3, 1, height, width)
    resized = RESIZES["squash_tf1"](video, size)[0, 2, 0].numpy()
    np.testing.assert_allclose(resized, np.transpose(rows), rtol=0, atol=2e-5)


def test_squash_of_tensorflow_1_of_two_pixels_is_the_known_one():
    # TensorFlow 1's answer for [0, 1] enlarged to 4 is [0, 0.5, 1, 1].
    video = torch.tensor([[0.0, 1.0]]).expand(1, 3, 1, 2, 2)
    row = RESIZES["squash_tf1"](video, 4)[0, 0, 0, 0]
    assert row.tolist() == [0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("height", "width", "between", "top", "left"),
    # The other side by hand: 24 / 20 · 30 = 36, 24 / 21 · 32 = 36.6, 24 / 17 · 90 = 127.06.
    [(20, 30, (24, 36), 0, 6), (32, 21, (37, 24), 6, 0), (17, 90, (24, 128), 0, 52)],
)
def test_crop_takes_the_centre_of_the_frame_with_its_shorter_side_at_the_size(
    height, width, between, top, left
):
    video = rand(1, 3, 2, height, width)
    frames = F.interpolate(video[0].transpose(0, 1), size=between, mode="bilinear", align_corners=False)
    expected = frames[..., top : top + 24, left : left + 24].transpose(0, 1)[None]
    assert torch.equal(RESIZES["crop"](video, 24), expected)


def test_crop_rounds_in_floating_point():
    # 224 / 50 · 50 is a little more than 224 in floating point: VideoGPT makes 225 rows of it.
    video = rand(1, 3, 1, 50, 50)
    expected = F.interpolate(video[:, :, 0], size=(225, 224), mode="bilinear", align_corners=False)
    assert torch.equal(RESIZES["crop"](video, 224)[:, :, 0], expected[..., :224, :])


# ---- the interface ----


class Mean(nn.Module):
    """A stand-in: four numbers of each clip through a linear layer, and a record of what it saw."""

    def __init__(self, weight: float = 0.3) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        nn.init.constant_(self.linear.weight, weight)
        nn.init.constant_(self.linear.bias, 0.1)
        self.seen: list[tuple[torch.Size, torch.dtype, bool, bool]] = []

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        features = self.linear(video.mean((2, 3, 4)))
        self.seen.append(
            (video.shape, features.dtype, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        )
        return features


@pytest.fixture
def mean(monkeypatch) -> Mean:
    network = Mean()
    kind = ExtractorKind("Means.", lambda path: network, size=16, dim=4, min_frames=4, frame_multiple=2)
    monkeypatch.setitem(features.EXTRACTORS, "mean", kind)
    return network


def test_an_extractor_maps_videos_to_features_in_float32(mean):
    extractor = load_extractor("mean", resize="crop")
    facts = (extractor.name, extractor.resize, extractor.dim, extractor.min_frames)
    assert facts == ("mean", "crop", 4, 4)
    video = rand(3, 3, 4, 20, 30).requires_grad_()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = extractor(video)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert mean.seen == [((2, 3, 4, 16, 16), torch.float32, False, False)] * 2
    assert values.dtype == torch.float32 and not values.requires_grad
    # The means lie between the pixels' and the linear layer is known.
    means = RESIZES["crop"](video.detach(), 16).mean((2, 3, 4))
    torch.testing.assert_close(
        values, (0.3 * means.sum(1, keepdim=True) + 0.1).expand(3, 4), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_videos_of_another_precision_are_computed_in_float32(mean, dtype):
    values = load_extractor("mean", resize="squash")(rand(1, 3, 4, 8, 8).to(dtype))
    assert values.dtype == torch.float32 and mean.seen[0][1] == torch.float32


def test_wrong_names_and_videos_are_refused(mean):
    choices = ", ".join(["i3d", "r3d_18", "videomae", "inception", "mean"])
    assert choices == ", ".join(EXTRACTORS)
    with pytest.raises(ValueError, match=f"unknown feature extractor 'c3d'; choices: {choices}"):
        load_extractor("c3d", resize="squash")
    with pytest.raises(ValueError, match="'stretch'; choices: squash, squash_antialias, squash_tf1, crop"):
        load_extractor("mean", resize="stretch")
    extractor = load_extractor("mean", resize="squash")
    with pytest.raises(ValueError, match="mean needs at least 4 frames, got 2; use longer clips"):
        extractor(rand(1, 3, 2, 8, 8))
    with pytest.raises(ValueError, match="a multiple of 2, got 5; use clips of 4"):
        extractor(rand(1, 3, 5, 8, 8))
    with pytest.raises(ValueError, match="no videos"):
        extractor(rand(0, 3, 4, 8, 8))
    for wrong in (rand(3, 4, 8, 8), rand(1, 1, 4, 8, 8), torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"float videos \(b, 3, t, h, w\) in \[-1, 1\], got"):
            extractor(wrong)


def test_the_digest_tells_weights_apart_by_name_shape_and_value(mean):
    digest = load_extractor("mean", resize="squash").weights_sha256
    assert len(digest) == 64 and digest == state_sha256(Mean())
    assert digest != state_sha256(Mean(weight=0.3000001))
    renamed = nn.ModuleDict({"other": Mean().linear})
    assert digest != state_sha256(renamed)
    flat, tall = nn.Module(), nn.Module()
    flat.register_buffer("x", torch.zeros(2, 3))
    tall.register_buffer("x", torch.zeros(3, 2))
    assert state_sha256(flat) != state_sha256(tall)
    # sha256 of "x torch.float32 (1,)\n" and of the four bytes of 1.0.
    one = nn.Module()
    one.register_buffer("x", torch.ones(1))
    assert state_sha256(one) == "23fde029d9e182261f4ff11511b6d054bf6530a563c9e4b0041480ce8f2d479b"


def test_every_extractor_has_a_sentence_and_loads_its_packages_late():
    for kind in EXTRACTORS.values():
        assert kind.description.endswith(".") and kind.description.count(". ") == 0
        assert kind.dim > 1 and kind.min_frames >= 1
    code = (
        "import sys, src.metrics.features; sys.exit('torchvision' in sys.modules or 'lpips' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode
        == 0
    )
