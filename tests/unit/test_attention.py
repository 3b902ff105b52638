"""Attention against the definition, token by token, and what each view may mix."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.models.attention import AttentionBlock, AttentionView, RelativePosition


def naive(q: Tensor, k: Tensor, v: Tensor, relative: RelativePosition, num_frames: int) -> Tensor:
    """Relative position attention as its formula says, with every pair of tokens written out."""
    b, n, length, d = q.shape
    tokens_per_frame = length // num_frames
    time = [i // tokens_per_frame for i in range(length)]
    reach = relative.max_distance

    def row(distance: int) -> int:
        return max(-reach, min(reach, distance)) + reach

    logits = torch.zeros(b, n, length, length, dtype=q.dtype)
    for i in range(length):
        for j in range(length):
            plain = (q[:, :, i] * k[:, :, j]).sum(-1) / math.sqrt(d)
            if relative.as_released:
                shift = (q[:, :, j] * relative.key[row(time[i] - time[j])]).sum(-1) / d**0.25
            else:
                shift = (q[:, :, i] * relative.key[row(time[j] - time[i])]).sum(-1) / math.sqrt(d)
            logits[:, :, i, j] = plain + shift
    weights = logits.softmax(-1)
    out = torch.zeros_like(q)
    for i in range(length):
        for j in range(length):
            value = v[:, :, j] + relative.value[row(time[j] - time[i])]
            out[:, :, i] += weights[:, :, i, j, None] * value
    return out


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize(("num_frames", "tokens_per_frame"), [(4, 1), (12, 1), (1, 5), (3, 4), (6, 2)])
def test_relative_position_equals_the_definition(num_frames, tokens_per_frame, as_released):
    torch.manual_seed(0)
    relative = RelativePosition(8, max_distance=3, as_released=as_released).double()
    qkv = torch.randn(3, 2, 2, num_frames * tokens_per_frame, 8, dtype=torch.float64)
    actual = relative(qkv, num_frames)
    torch.testing.assert_close(actual, naive(*qkv, relative, num_frames), rtol=0, atol=1e-10)


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize(("num_frames", "tokens_per_frame"), [(4, 1), (20, 1), (4, 3), (2, 6)])
def test_gradients_are_those_of_the_definition(num_frames, tokens_per_frame, as_released):
    torch.manual_seed(0)
    relative = RelativePosition(4, max_distance=2, as_released=as_released).double()
    qkv = torch.randn(3, 1, 2, num_frames * tokens_per_frame, 4, dtype=torch.float64, requires_grad=True)
    gradients = [
        torch.autograd.grad(out.square().sum(), [qkv, relative.key, relative.value])
        for out in (relative(qkv, num_frames), naive(*qkv, relative, num_frames))
    ]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def awake(channels: int, **settings: object) -> AttentionBlock:
    """A block whose last layers aren't zero."""
    torch.manual_seed(0)
    block = AttentionBlock(channels, num_heads=2, norm_groups=4, **settings).double()
    for view in block.views:
        torch.nn.init.normal_(view.out.weight)
    return block


@pytest.mark.parametrize(
    ("views", "same_frame", "same_pixel", "elsewhere"),
    [
        (("spatial",), True, False, False),
        (("temporal",), False, True, False),
        (("joint",), True, True, True),
        (("spatial", "temporal"), True, True, True),
    ],
)
def test_which_pixels_a_view_mixes(views, same_frame, same_pixel, elsewhere):
    block = awake(8, views=views)
    x = torch.randn(1, 8, 3, 4, 4, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 2, 3, 1] += torch.randn(8, dtype=torch.float64)
    difference = (block(changed) - block(x)).abs().amax(dim=(0, 1))
    assert (difference[2, 0, 0] > 1e-6) == same_frame
    assert (difference[0, 3, 1] > 1e-6) == same_pixel
    assert (difference[0, 0, 0] > 1e-6) == elsewhere
    assert difference[2, 3, 1] > 1e-6


@pytest.mark.parametrize("views", [("spatial",), ("temporal",), ("joint",)])
def test_a_view_of_one_block_is_pytorchs_attention(views):
    block = awake(8, views=views, relative_position=False)
    view = block.views[0]
    assert isinstance(view, AttentionView)
    reference = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        reference.in_proj_weight.copy_(view.qkv.weight)
        reference.in_proj_bias.copy_(view.qkv.bias)
        reference.out_proj.weight.copy_(view.out.weight)
        reference.out_proj.bias.copy_(view.out.bias)
    x = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)
    axes = {"spatial": (0, 2, 3, 4, 1), "temporal": (0, 3, 4, 2, 1), "joint": (0, 2, 3, 4, 1)}[views[0]]
    tokens = x.permute(axes)
    sequences = {"spatial": (6, 20, 8), "temporal": (40, 3, 8), "joint": (2, 60, 8)}[views[0]]
    normal = view.norm(tokens.reshape(sequences).transpose(1, 2)).transpose(1, 2)
    mixed = reference(normal, normal, normal, need_weights=False)[0].reshape(tokens.shape)
    back = [axes.index(i) for i in range(5)]
    torch.testing.assert_close(block(x), x + mixed.permute(back), rtol=0, atol=1e-10)


def test_the_block_begins_as_the_identity_and_leaves_its_input_alone():
    block = AttentionBlock(8, head_channels=4, norm_groups=4)
    x = torch.randn(2, 8, 1, 3, 5, requires_grad=True)
    before = x.detach().clone()
    y = block(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.detach(), before)


def test_order_in_time_matters_only_with_relative_position():
    x = torch.randn(1, 8, 4, 2, 2, dtype=torch.float64)
    for relative_position in (False, True):
        block = awake(8, views=("joint",), relative_position=relative_position)
        told = (block(x.flip(2)).flip(2) - block(x)).abs().max() > 1e-6
        assert told == relative_position


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("head_channels", [8, 30])
def test_joint_attention_takes_the_fused_kernel_in_training(head_channels, as_released):
    relative = RelativePosition(head_channels, max_distance=16, as_released=as_released)
    qkv = torch.randn(3, 1, 2, 4 * 9, head_channels, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # without the fallback that makes a matrix of all pairs
        relative(qkv, 4).sum().backward()


# Linux's ru_maxrss survives exec, so a child's would be its parent's; VmHWM is the program's own, in KiB.
MEMORY = """
import sys, torch
from src.models.attention import AttentionBlock
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
height, width, training = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "training"
torch.set_num_threads(1)
block = AttentionBlock(32, num_heads=2, views=("joint",), norm_groups=4)
block(torch.randn(1, 32, 2, 8, 8)).sum().backward()
before = peak()
with torch.set_grad_enabled(training):
    loss = block(torch.randn(1, 32, 16, height, width)).sum()
if training:
    loss.backward()
print(peak() - before)
"""


def grown_by(height: int, width: int, job: str) -> float:
    """MiB by which the peak of a process grows for 16 frames of such latents."""
    command = [sys.executable, "-c", MEMORY, str(height), str(width), job]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("job", ["forward", "training"])
def test_memory_of_joint_attention_grows_with_the_tokens_not_with_their_square(job):
    sizes = [grown_by(16, 16, job), grown_by(32, 32, job)]
    # 16,384 tokens at last; a matrix of all their pairs would take 1,024 MiB for each of the two heads.
    assert 10 < sizes[1] < 150, sizes
    # Four times the tokens; all their pairs are sixteen times as many. Allocators are coarse by some MiB.
    assert sizes[1] < 4 * (sizes[0] + 5), sizes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "8 channels can't be split into 3 heads"),
        ({"head_channels": 3}, "8 channels can't be split into heads of 3"),
        ({}, "exactly one of num_heads and head_channels"),
        ({"num_heads": 2, "views": ("space",)}, "views must be some of spatial, temporal, joint"),
        ({"num_heads": 2, "norm_groups": 3}, "8 channels can't be split into 3 normalization groups"),
    ],
)
def test_what_doesnt_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionBlock(8, **({"norm_groups": 4} | settings))
