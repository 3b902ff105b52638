"""The video autoencoder: sizes, posterior, latent space, what each frame can see."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from src.models.autoencoder import Autoencoder3d, IdentityAutoencoder3d, Posterior, stage_strides

SMALL = {
    "hidden_channels": 8,
    "downsample": (4, 4, 4),
    "patch_size": (1, 2, 2),
    "decoder_blocks": 1,
    "norm_groups": None,
    "channels_per_group": 4,
}


def number_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_papers_network_has_the_released_size():
    with torch.device("meta"):
        autoencoder = Autoencoder3d()
    assert number_of(autoencoder.encoder) == 7_458_952
    assert number_of(autoencoder.decoder) == 11_987_715
    assert number_of(autoencoder) == 19_446_759
    assert autoencoder.latent_shape(16, 256, 256) == (4, 4, 32, 32)


@pytest.mark.parametrize(
    ("downsample", "patch_size", "expected"),
    [
        ((4, 8, 8), (1, 1, 1), [(2, 2, 2), (2, 2, 2), (1, 2, 2)]),
        ((1, 2, 2), (1, 1, 1), [(1, 2, 2)]),
        ((4, 4, 4), (1, 2, 2), [(2, 2, 2), (2, 1, 1)]),
        ((3, 4, 4), (3, 1, 1), [(1, 2, 2), (1, 2, 2)]),
    ],
)
def test_strides(downsample, patch_size, expected):
    assert stage_strides(downsample, patch_size) == expected


@pytest.mark.parametrize("norm", ["clip", "frame"])
@pytest.mark.parametrize("video_size", [(4, 8, 12), (8, 16, 16)])
def test_sizes_there_and_back(norm, video_size):
    autoencoder = Autoencoder3d(**SMALL, norm=norm)
    video = torch.rand(2, 3, *video_size) * 2 - 1
    shape = autoencoder.latent_shape(*video_size)
    assert shape == (4, *(size // 4 for size in video_size))
    reconstruction, posterior = autoencoder(video, torch.randn(2, *shape))
    assert reconstruction.shape == video.shape
    assert posterior.mean.shape == (2, *shape)


def test_forward_decodes_the_sample():
    autoencoder = Autoencoder3d(**SMALL)
    video, noise = torch.rand(1, 3, 4, 8, 8) * 2 - 1, torch.randn(1, 4, 1, 2, 2)
    reconstruction, posterior = autoencoder(video, noise)
    encoded = autoencoder.encode(video)
    torch.testing.assert_close(posterior.mean, encoded.mean)
    torch.testing.assert_close(reconstruction, autoencoder.decode(encoded.mean + encoded.std * noise))


def test_posterior_is_a_gaussian():
    posterior = Posterior(torch.randn(2, 3, 2, 4, 4).double(), torch.randn(2, 3, 2, 4, 4).double())
    normal = Normal(posterior.mean, torch.exp(posterior.logvar / 2))
    expected = kl_divergence(normal, Normal(0.0, 1.0)).sum((1, 2, 3, 4))
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-12, atol=0)
    noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    standard = (posterior.sample(noise) - normal.mean) / normal.stddev
    torch.testing.assert_close(standard, noise, rtol=0, atol=1e-12)


def test_initial_deviation_is_chosen():
    torch.manual_seed(0)
    video = torch.rand(1, 3, 4, 8, 8) * 2 - 1
    autoencoder = Autoencoder3d(**SMALL, initial_logvar=-6.0)
    assert abs(autoencoder.encode(video).logvar.mean() + 6) < 1


def test_logvar_stays_in_range():
    autoencoder = Autoencoder3d(**SMALL, initial_logvar=-1000.0)
    posterior = autoencoder.encode(torch.zeros(1, 3, 4, 8, 8))
    assert torch.equal(posterior.logvar, torch.full_like(posterior.logvar, -30.0))


def test_statistics_per_frame_let_latents_be_decoded_in_chunks():
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 16, 2, 2, dtype=torch.float64)
    seams = {}
    for norm in ("clip", "frame"):
        autoencoder = Autoencoder3d(**SMALL, norm=norm).double()
        whole, chunk = autoencoder.decode(latents), autoencoder.decode(latents[:, :, 4:])
        seams[norm] = (whole[:, :, -16:] - chunk[:, :, -16:]).abs().max()
    assert seams["frame"] < 1e-12
    assert seams["clip"] > 1e-4


def test_latents_are_normalized_by_the_stored_moments():
    autoencoder = Autoencoder3d(**SMALL)
    autoencoder.latent_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    autoencoder.latent_std.copy_(torch.tensor([2.0, 0.5, 1.0, 4.0]))
    raw = torch.randn(20000, 4, 1, 1, 1) * autoencoder.latent_std.view(-1, 1, 1, 1)
    raw = raw + autoencoder.latent_mean.view(-1, 1, 1, 1)
    latents = autoencoder.normalize(raw)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=0.03)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(4), rtol=0, atol=0.03)
    torch.testing.assert_close(autoencoder.denormalize(latents), raw, rtol=1e-6, atol=1e-6)
    assert {"latent_mean", "latent_std"} <= autoencoder.state_dict().keys()


def test_last_layer_is_the_last():
    autoencoder = Autoencoder3d(**SMALL)
    latents = torch.randn(1, 4, 1, 2, 2)
    with torch.no_grad():
        autoencoder.last_layer.zero_()
    video = autoencoder.decode(latents)
    # Without its weight, only the last layer's bias is left: one number per channel of a patch.
    assert all(len(channel.unique()) <= 4 for channel in video[0])


def test_pixel_space_has_the_same_interface():
    autoencoder = IdentityAutoencoder3d()
    video = torch.rand(2, 3, 5, 7, 9)
    reconstruction, posterior = autoencoder(video, torch.randn_like(video))
    assert torch.equal(reconstruction, video)
    assert torch.equal(posterior.std, torch.zeros_like(video))
    assert autoencoder.latent_shape(5, 7, 9) == (3, 5, 7, 9)
    assert autoencoder.downsample == (1, 1, 1)
    assert number_of(autoencoder) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"downsample": (4, 6, 8)}, "on h 6/2 isn't one"),
        ({"downsample": (1, 2, 2)}, "nothing is left for strided stages"),
        ({"norm": "video"}, "norm must be clip .* or frame"),
        ({"norm_groups": 4}, "exactly one of norm_groups and channels_per_group"),
        ({"channels_per_group": None, "norm_groups": 32}, "16 channels can't be split into 32"),
    ],
)
def test_impossible_networks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder3d(**(SMALL | settings))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 18, 32, 32), "num_frames=18 must be a multiple of 4; use 16 or 20"),
        ((1, 3, 16, 3, 32), "height=3 must be a multiple of 4; use 4"),
        ((1, 4, 16, 32, 32), r"takes video \(b, 3, t, h, w\), got \(1, 4, 16, 32, 32\)"),
        ((3, 16, 32, 32), "takes video"),
    ],
)
def test_videos_that_dont_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder3d(**SMALL).encode(torch.zeros(shape))


def test_latents_that_dont_fit_are_refused():
    with pytest.raises(ValueError, match=r"takes latents \(b, 4, t, h, w\)"):
        Autoencoder3d(**SMALL).decode(torch.zeros(1, 3, 1, 2, 2))


def test_every_weight_learns():
    autoencoder = Autoencoder3d(**SMALL)
    video = torch.rand(1, 3, 8, 8, 8) * 2 - 1
    reconstruction, posterior = autoencoder(video, torch.randn(1, 4, 2, 2, 2))
    ((reconstruction - video).abs().mean() + posterior.kl().mean()).backward()
    silent = [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert silent == []
    assert math.isfinite(sum(float(p.grad.sum()) for p in autoencoder.parameters() if p.grad is not None))
