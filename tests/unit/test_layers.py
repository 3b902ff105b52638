"""Shared layers against PyTorch's own, computed another way."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from src.models.embeddings import OptionalEmbedding, sinusoidal_embedding
from src.models.layers import (
    MANY_ROWS,
    MANY_WEIGHTS,
    FrameConv3d,
    FrameGroupNorm,
    GroupNorm,
    Linear,
    PointConv3d,
    SameConv3d,
    SameConvTranspose3d,
    channels_last,
    same_padding,
    unet_conv,
)


def test_padding_gives_the_front_the_odd_one():
    assert same_padding((3, 3, 3), (1, 1, 1)) == (1, 1, 1, 1, 1, 1)
    assert same_padding((4, 4, 4), (1, 2, 2)) == (1, 1, 1, 1, 2, 1)  # from the last axis to the first
    assert same_padding((1, 1, 1), (1, 1, 1)) == (0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)])
def test_same_convolutions_divide_and_multiply_sizes(stride):
    x = torch.randn(1, 2, 4, 6, 8)
    down = SameConv3d(2, 3, 4, stride)(x)
    assert down.shape == (1, 3, 4 // stride[0], 6 // stride[1], 8 // stride[2])
    assert SameConvTranspose3d(3, 2, 4, stride)(down).shape == x.shape


def test_same_convolution_repeats_the_border():
    x = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    conv = SameConv3d(2, 3, 3).double()
    reference = nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate").double()
    reference.load_state_dict(conv.state_dict())
    torch.testing.assert_close(conv(x), reference(x), rtol=0, atol=1e-12)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_a_single_clip_is_convolved_as_several_are(stride, monkeypatch):
    """By another kernel than PyTorch's choice: the same values and gradients."""
    x = torch.randn(1, 4, 6, 8, 8)
    single, several, reference = (SameConv3d(4, 8, 3 if stride == (1, 1, 1) else 4, stride) for _ in range(3))
    for other in (several, reference):
        other.load_state_dict(single.state_dict())
    one = single(x)
    torch.testing.assert_close(one, several(x.repeat(2, 1, 1, 1, 1))[:1], rtol=0, atol=2e-6)
    monkeypatch.setattr("src.models.layers._takes_onednn", lambda x, weight: False)
    slow = reference(x)
    torch.testing.assert_close(one, slow, rtol=0, atol=2e-6)
    upstream = torch.randn_like(one)
    one.backward(upstream), slow.backward(upstream)
    for a, b in zip(single.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_a_constant_video_has_no_border():
    x = torch.ones(1, 2, 3, 4, 5)
    y = SameConvTranspose3d(2, 3, 4, (2, 2, 2))(SameConv3d(2, 2, 3)(x))
    # A stride of two leaves a pattern of period two, and nothing else.
    torch.testing.assert_close(y, y[:, :, :2, :2, :2].repeat(1, 1, 3, 4, 5), rtol=0, atol=1e-6)


# The widths lead to each of the ways in which the convolution is computed.
@pytest.mark.parametrize("out_channels", [5, 256, 2048])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_frame_convolution_is_the_flat_3d_one(stride, size, out_channels):
    x = channels_last(torch.randn(2, 3, 4, *size, dtype=torch.float64)).requires_grad_()
    conv = FrameConv3d(3, out_channels, stride).double()
    actual = conv(x)
    expected = F.conv3d(x, conv.weight[:, :, None], conv.bias, (1, stride, stride), (0, 1, 1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert actual.is_contiguous(memory_format=torch.channels_last_3d)
    gradients = [
        torch.autograd.grad(y.square().sum(), [x, conv.weight, conv.bias]) for y in (actual, expected)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


def test_frame_convolution_keeps_the_layout_without_copies():
    x = channels_last(torch.randn(2, 8, 4, 6, 6))
    y = FrameConv3d(8, 16)(x)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert GroupNorm(4, 16, 1e-5)(y).is_contiguous(memory_format=torch.channels_last_3d)
    assert PointConv3d(16, 8)(y).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 100), (5,)])  # through the convolution's kernel, and not
def test_linear_is_linear(shape, bias):
    assert (math.prod(shape) >= MANY_ROWS) == (len(shape) == 2)
    x = torch.randn(*shape, 256, dtype=torch.float64, requires_grad=True)
    linear = Linear(256, 320, bias=bias).double()
    assert linear.weight.numel() >= MANY_WEIGHTS
    actual, expected = linear(x), F.linear(x, linear.weight, linear.bias)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    inputs = [x, *linear.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (actual, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


def test_point_convolution_is_1x1x1():
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    conv = PointConv3d(3, 7).double()
    expected = F.conv3d(x, conv.weight[:, :, None, None, None], conv.bias)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-12)


def test_frame_statistics_are_those_of_single_frames():
    x = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)
    norm = FrameGroupNorm(4, 8, 1e-6).double()
    nn.init.normal_(norm.weight)
    expected = torch.stack(
        [F.group_norm(x[:, :, t], 4, norm.weight, norm.bias, 1e-6) for t in range(3)], dim=2
    )
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


def test_half_precision_keeps_its_type_and_single_precision_statistics():
    # A mean of 100 with a deviation of 0.5: in bfloat16 sums, the deviation would be lost.
    x = (100 + torch.randn(1, 4, 2, 16, 16) / 2).bfloat16()
    y = GroupNorm(1, 4, 1e-5)(x)
    assert y.dtype == torch.bfloat16
    expected = (x.double() - x.double().mean()) / x.double().std(correction=0)
    assert (y.double() - expected).abs().max() < 0.02


def test_groups_that_dont_divide_are_refused():
    with pytest.raises(ValueError, match="30 channels can't be split into 32"):
        GroupNorm(32, 30, 1e-5)
    with pytest.raises(ValueError, match="temporal_kernel must be 1"):
        unet_conv(2)


@pytest.mark.parametrize("width", [2, 6, 7])
def test_sinusoids(width):
    embedding = sinusoidal_embedding(torch.tensor([0, 1, 999]), width)
    half = width // 2
    for row, t in zip(embedding, (0, 1, 999), strict=True):
        angles = [t * 10000 ** (-k / half) for k in range(half)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (width % 2)
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=1e-4)


def test_what_isnt_told_adds_nothing_and_learns_nothing():
    embedding = OptionalEmbedding(3, 4)
    out = embedding(torch.tensor([2, -1]))
    torch.testing.assert_close(out[0], embedding.weight[2])
    assert torch.equal(out[1], torch.zeros(4))
    out[1].sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.abs().sum() == 0
