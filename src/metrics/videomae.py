"""VideoMAE V2 ViT-g/14, fine-tuned on Something-Something v2, whose features tell motion apart, too.

The network is that of Wang et al. 2023 (arXiv 2303.16727), its use that of the content-debiased Fréchet video
distance, Ge et al. 2024 (arXiv 2404.12391). Where the code of the latter (package cd-fvd 0.1.1) is more
specific than the papers, it is followed, so that distances compare: frames go in as they are in [0, 1],
without ImageNet's mean and deviation, although the network was trained with them; and clips of more than 16
frames are seen at once, with positions stretched in time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from .weight_files import check_state, read_state, required

FILE = "vit_g_hybrid_pt_1200e_ssv2_ft.pth"
URL = f"https://huggingface.co/OpenGVLab/InternVideoMAE_models/resolve/main/mae-g/{FILE}"
SIZE = 224
DIM = 1408
NUM_FRAMES = 16
TUBELET = 2
_NUM_CLASSES = 174
_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention in which queries and values have a bias and keys have none."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(b n d)` → `(b n d)`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)"))


class Mlp(nn.Module):
    """Two linear layers and an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer's block with normalization before each part."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, _NORM_EPS), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, _NORM_EPS), Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VideoMae(nn.Module):
    """Vision transformer over tubelets: `(b 3 t size size)` in [-1, 1] → `(b dim)`.

    The mean of its tokens after normalization, which its classifier, here not computed, is a linear function
    of. For inference only: frozen, without dropout.

    Args:
        num_frames: that it was trained on; clips may have more.
        size: of its frames, a multiple of `patch`.
        tubelet, patch: a token's extent in time and in space.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        hidden: int,
        size: int,
        num_frames: int,
        tubelet: int,
        patch: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        if dim % num_heads or dim % 2 or size % patch or num_frames % tubelet:
            raise ValueError(
                f"dim={dim} must be even and a multiple of num_heads={num_heads}, size={size} one of "
                f"patch={patch}, and num_frames={num_frames} one of tubelet={tubelet}"
            )
        self.size, self.num_frames, self.tubelet, self.patch = size, num_frames, tubelet, patch
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv3d(3, dim, (tubelet, patch, patch), (tubelet, patch, patch))}
        )
        self.blocks = nn.ModuleList(Block(dim, num_heads, hidden) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(dim, _NORM_EPS)
        self.head = nn.Linear(dim, num_classes)
        self.requires_grad_(False).eval()

    def forward(self, video: Tensor) -> Tensor:
        frames, *size = video.shape[2:]
        if size != [self.size, self.size] or frames < self.num_frames or frames % self.tubelet:
            raise ValueError(
                f"VideoMAE takes videos (b, 3, t, {self.size}, {self.size}) with at least {self.num_frames} "
                f"frames, a multiple of {self.tubelet}, got {tuple(video.shape)}"
            )
        x = rearrange(self.patch_embed["proj"]((video + 1) / 2), "b d t h w -> b (t h w) d")
        x = x + self.positions(frames, x)
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(reduce(x, "b n d -> b d", "mean"))

    def positions(self, frames: int, like: Tensor) -> Tensor:
        """The positions' encoding `(n d)` for so many frames.

        For more frames than it was trained on it is interpolated linearly in time. The code of the
        content-debiased distance asks for a tenth of a token more than there are, against rounding, and that
        stretches the positions a little; so does this.
        """
        side, trained = self.size // self.patch, self.num_frames // self.tubelet
        table = sinusoids(trained * side * side, like.shape[-1]).to(like)
        wanted = frames // self.tubelet
        if wanted == trained:
            return table
        table = rearrange(table, "(t h w) d -> 1 d t h w", h=side, w=side)
        factor = ((wanted + 0.1) / trained, 1.0, 1.0)
        table = F.interpolate(table, scale_factor=factor, mode="trilinear", align_corners=False)
        return rearrange(table, "1 d t h w -> (t h w) d")


def sinusoids(num_positions: int, dim: int) -> Tensor:
    """Sines in the even, cosines in the odd dimensions, of wavelengths 2π to 2π · 10⁴: `(n d)`.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5; in float64 until the end.
    """
    position = rearrange(torch.arange(num_positions, dtype=torch.float64), "n -> n 1")
    angles = position / 10_000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return rearrange(torch.stack([angles.sin(), angles.cos()], -1), "n d two -> n (d two)").float()


def load_videomae(path: str | Path | None = None) -> VideoMae:
    """The network with its trained weights, on the CPU in float32: about a billion numbers.

    Args:
        path: the file of them.

    Raises:
        FileNotFoundError: without the file, saying where to get it.
        ValueError: if the file holds something else.
    """
    path = required(path, "VideoMAE V2 (some gigabytes)", URL)
    state = {name: tensor.float() for name, tensor in read_state(path).items()}
    # Without memory of its own, which the file's tensors bring.
    with torch.device("meta"):
        network = VideoMae(
            dim=DIM,
            depth=40,
            num_heads=16,
            hidden=6144,
            size=SIZE,
            num_frames=NUM_FRAMES,
            tubelet=TUBELET,
            patch=14,
            num_classes=_NUM_CLASSES,
        )
    check_state(state, network, path, f"VideoMAE V2 ViT-g fine-tuned on Something-Something v2 ({FILE})")
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()
