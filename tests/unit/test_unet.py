"""The U-Net: its size, what it is told, what it refuses, and that options change only what they say."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from src.models.attention import AttentionBlock
from src.models.unet import UNet3d
from src.training.device import compile_in_place

PAPER = {
    "out_channels": 4,
    "model_channels": 256,
    "channel_mult": (1, 2, 3, 4),
    "num_res_blocks": 3,
    "num_heads": 4,
}
SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_downsamples": (2,),
    "num_heads": 2,
    "norm_groups": 8,
}


def small(seed: int = 0, views: tuple[Any, ...] = ("spatial", "temporal"), **settings: Any) -> UNet3d:
    """A small network whose zero layers have been woken up."""
    torch.manual_seed(seed)
    unet = UNet3d(**(SMALL | {"attention": partial(AttentionBlock, views=views)} | settings))
    for parameter in unet.parameters():
        if not parameter.abs().sum():
            nn.init.normal_(parameter, std=0.05)
    return unet


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


TIMES = torch.tensor([10, 900])


@pytest.mark.parametrize(
    ("settings", "max_distance", "expected"),
    [
        ({}, 4, 548_904_580),
        ({"mask_channel": True, "num_noise_levels": 251}, 4, 549_163_908),
        ({"mask_channel": True, "num_noise_levels": 251}, 5, 549_181_060),
    ],
)
def test_the_papers_networks_have_the_released_sizes(settings, max_distance, expected):
    attention = partial(AttentionBlock, max_distance=max_distance)
    with torch.device("meta"):
        unet = UNet3d(in_channels=4, attention=attention, **(PAPER | settings))
    assert sum(parameter.numel() for parameter in unet.parameters()) == expected


@pytest.mark.parametrize("views", [("spatial", "temporal"), ("joint",)])
@pytest.mark.parametrize("shape", [(2, 4, 3, 8, 8), (1, 4, 1, 4, 6), (1, 4, 20, 2, 2)])
def test_any_length_and_size(views, shape):
    prediction = small(views=views)(torch.randn(shape), torch.zeros(shape[0], dtype=torch.int64))
    assert prediction.shape == shape
    assert prediction.std() > 0


def test_odd_sizes_without_halving():
    unet = small(channel_mult=(1,), attention_downsamples=(1,))
    assert unet(torch.randn(1, 4, 2, 5, 7), TIMES[:1]).shape == (1, 4, 2, 5, 7)


def test_an_untrained_network_predicts_zero(latents):
    unet = UNet3d(**SMALL, attention=AttentionBlock)
    assert unet(latents, TIMES).abs().max() == 0


def test_clips_dont_see_each_other_and_the_input_stays(latents):
    unet, before = small(), latents.clone()
    together = unet(latents, TIMES)
    alone = torch.cat([unet(latents[i : i + 1], TIMES[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert torch.equal(latents, before)


def test_memory_layout_doesnt_matter(latents):
    unet = small()
    last = latents.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(unet(last, TIMES), unet(latents, TIMES), rtol=0, atol=1e-6)


def test_frames_mix_in_attention(latents):
    changed = latents.clone()
    changed[:, :, 2] += 1
    for views, statistics_only in (
        (("spatial",), True),
        (("spatial", "temporal"), False),
        (("joint",), False),
    ):
        unet = small(views=views)
        # Normalization over the clip mixes frames too: silence it by looking at a single frame's statistics.
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda x: x  # type: ignore[method-assign]
        difference = (unet(changed, TIMES) - unet(latents, TIMES))[:, :, 0].abs().max()
        assert (difference < 1e-6) == statistics_only


def test_the_mask_is_the_last_input_channel(latents):
    unet = small(mask_channel=True)
    mask = torch.zeros(2, 1, 3, 8, 8)
    untold = unet(latents, TIMES)
    torch.testing.assert_close(unet(latents, TIMES, mask=mask), untold)
    mask[:, :, 0] = 1
    assert not torch.allclose(unet(latents, TIMES, mask=mask), untold, atol=1e-3)
    assert unet.conv_in.weight.shape[1] == 5


@pytest.mark.parametrize(
    ("setting", "argument"), [("num_noise_levels", "noise_level"), ("num_classes", "label")]
)
def test_levels_and_labels_add_a_row_or_nothing(latents, setting, argument):
    unet = small(**{setting: 7})
    untold = unet(latents, TIMES)
    torch.testing.assert_close(unet(latents, TIMES, **{argument: torch.tensor([-1, -1])}), untold)
    told = unet(latents, TIMES, **{argument: torch.tensor([-1, 6])})
    torch.testing.assert_close(told[0], untold[0], rtol=0, atol=1e-6)
    assert not torch.allclose(told[1], untold[1], atol=1e-3)


def test_a_level_at_every_frame_stands_for_the_time(latents):
    unet = small(frame_noise_embedding=True)
    unet.frame_noise_embedding.load_state_dict(unet.time_embedding.state_dict())
    levels = TIMES[:, None].expand(2, 3)
    torch.testing.assert_close(
        unet(latents, TIMES * 0, frame_noise_level=levels), unet(latents, TIMES), rtol=0, atol=1e-5
    )
    nowhere = torch.full((2, 3), -1)
    torch.testing.assert_close(unet(latents, TIMES, frame_noise_level=nowhere), unet(latents, TIMES))


def test_recomputing_changes_memory_not_gradients(latents):
    gradients = []
    for checkpoint in (False, True):
        unet = small(checkpoint=checkpoint)
        unet(latents, TIMES).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"views": ("joint",)},
        {"scale_shift_norm": False},
        {"temporal_kernel": 3},
        {"resampling": "residual"},
        {"resampling": "pool"},
        {"num_heads": None, "head_channels": 8},
        {"dropout": 0.5},
    ],
)
def test_every_weight_learns(latents, settings):
    unet = small(**settings)
    unet(latents, TIMES).square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_bfloat16_autocast_gives_single_precision_near_the_exact(latents):
    unet = small()
    exact = unet(latents, TIMES)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = unet(latents, TIMES)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert not torch.equal(rounded, exact)


@pytest.mark.slow
@pytest.mark.parametrize("views", [("spatial", "temporal"), ("joint",)])
def test_compiled_it_gives_the_same_numbers_and_gradients(latents, views):
    eager = small(views=views)
    compiled = copy.deepcopy(eager)
    compile_in_place([compiled])
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    for unet in (eager, compiled, copy.deepcopy(compiled)):
        prediction = unet(latents, TIMES)
        prediction.square().mean().backward()
        torch.testing.assert_close(prediction, eager(latents, TIMES), rtol=0, atol=1e-5)
        gradients = [parameter.grad for parameter in unet.parameters()]
        torch.testing.assert_close(gradients, [p.grad for p in eager.parameters()], rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_cpus_numbers(latents):
    unet = small()
    expected = unet(latents, TIMES)
    actual = unet.cuda()(latents.cuda(), TIMES.cuda()).cpu()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channel_mult": (2, 4)}, "channel_mult must begin with 1"),
        ({"resampling": "linear"}, "resampling must be conv, pool or residual"),
        ({"norm_groups": 5}, "16 channels can't be split into 5 normalization groups"),
        ({"num_heads": 3}, "32 channels can't be split into 3 heads"),
    ],
)
def test_impossible_networks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


ONE = torch.tensor([0, 0])


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (
            {},
            {"noisy_latents": torch.zeros(2, 4, 3, 7, 8)},
            r"7x8 latents must be multiples of 2; use \(6, 8\) or \(8, 8\)",
        ),
        ({}, {"noisy_latents": torch.zeros(2, 4, 3, 1, 8)}, r"multiples of 2; use \(2, 8\)"),
        ({}, {"noisy_latents": torch.zeros(2, 5, 3, 8, 8)}, r"takes latents \(b, 4, t, h, w\)"),
        ({}, {"timesteps": torch.zeros(1)}, r"timesteps must have shape \(2,\), got \(1,\)"),
        ({}, {"mask": torch.zeros(2, 1, 3, 8, 8)}, "has no mask_channel"),
        (
            {"mask_channel": True},
            {"mask": torch.zeros(2, 3, 8, 8)},
            r"mask must have shape \(2, 1, 3, 8, 8\)",
        ),
        ({}, {"label": ONE}, "num_classes=0"),
        ({"num_classes": 3}, {"label": ONE[:1]}, r"label must have shape \(2,\)"),
        ({}, {"noise_level": ONE}, "num_noise_levels=0"),
        ({}, {"frame_noise_level": ONE}, "without frame_noise_embedding"),
        ({}, {"stride": ONE}, "num_strides=0"),
        ({"num_strides": 2}, {"stride": ONE[:1]}, r"stride must have shape \(2,\)"),
    ],
)
def test_input_that_doesnt_fit_is_refused(latents, settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)(**({"noisy_latents": latents, "timesteps": TIMES} | arguments))


def test_the_stride_is_a_row_added_to_the_time(latents):
    unet = small(num_strides=2)
    told = torch.tensor([1, -1])
    with torch.no_grad():
        expected = unet.embed(TIMES, None, None, None)
        expected[0, 0] += unet.stride_embedding.weight[1]
    torch.testing.assert_close(unet.embed(TIMES, None, None, None, told), expected)
    untold = unet(latents, TIMES)
    seen = unet(latents, TIMES, stride=told)
    torch.testing.assert_close(seen[1], untold[1])
    assert not torch.allclose(seen[0], untold[0], atol=1e-3)


def test_a_level_that_isnt_told_is_welcome_anywhere(latents):
    unet = small()
    torch.testing.assert_close(unet(latents, TIMES, noise_level=torch.tensor([-1, -1])), unet(latents, TIMES))
