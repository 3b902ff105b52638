"""Decoding in windows, against decoding everything at once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from src.data.synthetic import render
from src.models.autoencoder import Autoencoder3d, IdentityAutoencoder3d
from src.models.streaming import decode_stream

SHAPES = [((4, 8, 8), (1, 1, 1)), ((4, 4, 4), (1, 2, 2)), ((4, 4, 4), (2, 2, 2)), ((8, 4, 4), (1, 1, 1))]


def autoencoder(downsample: tuple, patch_size: tuple, norm: str = "frame") -> Autoencoder3d:
    torch.manual_seed(0)
    network = Autoencoder3d(
        hidden_channels=4,
        downsample=downsample,
        patch_size=patch_size,
        norm=norm,
        norm_groups=None,
        channels_per_group=4,
    ).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.requires_grad_(False)


@pytest.mark.parametrize(("downsample", "patch_size"), SHAPES)
def test_the_decoding_context_is_just_as_far_as_a_change_reaches(
    downsample: tuple, patch_size: tuple
) -> None:
    network = autoencoder(downsample, patch_size)
    context = network.decoding_context
    assert context is not None
    n, m = 2 * context + 5, context + 2
    latents = torch.randn(1, 4, n, 2, 2, dtype=torch.float64)
    changed = latents.clone()
    changed[:, :, m] += 1.0
    difference = (network.decode(changed) - network.decode(latents)).abs().amax((0, 1, 3, 4))
    frames = difference.reshape(n, downsample[0]).amax(1).nonzero().flatten()
    assert max(m - int(frames[0]), int(frames[-1]) - m) == context


@pytest.mark.parametrize(("downsample", "patch_size"), SHAPES)
@pytest.mark.parametrize("more", [1, 4])
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_windows_that_overlap_by_the_context_give_the_whole(
    downsample: tuple, patch_size: tuple, more: int, piece: int
) -> None:
    network = autoencoder(downsample, patch_size)
    context = network.decoding_context
    assert context is not None
    latents = torch.randn(2, 4, 4 * context + 9, 2, 2, dtype=torch.float64)
    video = torch.cat(
        list(
            decode_stream(
                network.decode,
                latents.split(piece, dim=2),
                factor=downsample[0],
                window=2 * context + more,
                overlap=2 * context,
                fade=False,
            )
        ),
        dim=2,
    )
    torch.testing.assert_close(video, network.decode(latents), rtol=0, atol=1e-9)


def test_where_statistics_span_time_there_is_no_context_and_borders_do_not_show() -> None:
    """Cross-faded windows: from one frame to the next no more happens at borders than inside."""
    network = autoencoder((4, 4, 4), (1, 2, 2), norm="clip")
    assert network.decoding_context is None and IdentityAutoencoder3d().decoding_context == 0
    noise = torch.randn(4, 4, 90, 4, 4, dtype=torch.float64)
    latents = torch.nn.functional.avg_pool3d(noise, (9, 1, 1), (1, 1, 1))  # what moves, moves smoothly
    video = torch.cat(
        list(decode_stream(network.decode, [latents], factor=4, window=4, overlap=2, fade=True)), dim=2
    )
    assert video.shape[2] == 4 * latents.shape[2]
    change = (video[:, :, 1:] - video[:, :, :-1]).abs().mean((0, 1, 3, 4))
    starts = torch.arange(8, video.shape[2] - 8, 8) - 1  # a window begins at every second latent frame
    assert change[starts].mean() <= 1.1 * change.median()


@pytest.mark.slow
def test_borders_do_not_show_in_real_videos_of_an_autoencoder_that_has_learnt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same of moving pictures, where a straight fade shows."""
    torch.manual_seed(0)
    network = Autoencoder3d(
        hidden_channels=8, downsample=(4, 4, 4), patch_size=(1, 2, 2), norm="clip", norm_groups=None,
        channels_per_group=4,
    )  # fmt: skip
    videos = torch.from_numpy(np.stack([render(0, "train", i, 128, 32) for i in range(40)]))
    videos = videos.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99))
    for step in range(160):
        start = int(torch.randint(0, 113, ()))
        clips = videos[torch.randint(8, 40, (2,)), :, start : start + 16]
        error = network.decode(network.encode(clips).mean) - clips
        optimizer.zero_grad()
        (error.square().mean() + error.abs().mean()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 160) * min(1, (step + 1) / 10)
        optimizer.step()
    with torch.no_grad():
        latents = network.encode(videos[:8]).mean

    def change_at_starts() -> float:
        with torch.no_grad():
            pieces = decode_stream(network.decode, [latents], factor=4, window=4, overlap=2, fade=True)
            video = torch.cat(list(pieces), dim=2)
        assert (video - videos[:8]).square().mean() < 0.07, "it has learnt"
        change = video.diff(dim=2).abs().mean((0, 1, 3, 4))
        starts = torch.arange(8, video.shape[2] - 8, 8) - 1
        return float(change[starts].mean() / change.median())

    smooth = change_at_starts()
    monkeypatch.setattr("src.models.streaming._fade", lambda n: torch.linspace(0, 1, n + 2)[1:-1])
    straight = change_at_starts()
    assert smooth <= 1.1 and smooth < straight - 0.03


def doubled(latents: Tensor) -> Tensor:
    return latents.repeat_interleave(2, dim=2)


@pytest.mark.parametrize("length", [1, 4, 5, 6, 7, 23])
@pytest.mark.parametrize(("window", "overlap"), [(4, 0), (4, 1), (4, 3), (6, 2)])
@pytest.mark.parametrize("fade", [False, True])
def test_every_frame_comes_once_and_in_order(length: int, window: int, overlap: int, fade: bool) -> None:
    latents = torch.arange(float(length)).reshape(1, 1, -1, 1, 1)
    pieces = decode_stream(
        doubled, latents.split(2, dim=2), factor=2, window=window, overlap=overlap, fade=fade
    )
    torch.testing.assert_close(torch.cat(list(pieces), dim=2), doubled(latents), rtol=0, atol=1e-6)


def test_nothing_in_nothing_out_and_overlaps_that_cannot_be() -> None:
    assert list(decode_stream(doubled, [], factor=2, window=4, overlap=1, fade=True)) == []
    with pytest.raises(ValueError, match="overlap must be from 0 to 3"):
        list(decode_stream(doubled, [], factor=2, window=4, overlap=4, fade=True))
