"""Attention over a video's latents: one block, seen through several views of its tokens."""

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import GroupNorm, zero_initialized

View = Literal["spatial", "temporal", "joint"]


class Tokens(NamedTuple):
    """How a view sees `b c t h w`: as sequences of tokens, within which attention mixes."""

    pattern: str
    spans_time: bool


VIEWS: dict[str, Tokens] = {
    "spatial": Tokens("(b t) (h w) c", spans_time=False),
    "temporal": Tokens("(b h w) t c", spans_time=True),
    "joint": Tokens("b (t h w) c", spans_time=True),
}


class AttentionBlock(nn.Module):
    """Pre-normalized self-attention, residual, in one view of the tokens after the other.

    `("spatial", "temporal")` is LVDM's factorized attention (He et al. 2022, section 3.2), `("joint",)`
    attends over all of space and time at once. Each view owns its normalization over its tokens, its
    projections and, if it spans time, its relative positions. The heads are counted by `num_heads` or sized
    by `head_channels`. Distances in time are clamped at `max_distance`. Raises ValueError if channels, heads
    and groups don't fit.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int | None = None,
        head_channels: int | None = None,
        views: tuple[View, ...] = ("spatial", "temporal"),
        relative_position: bool = True,
        max_distance: int = 16,
        norm_groups: int = 32,
        relative_position_as_released: bool = False,
    ) -> None:
        super().__init__()
        if (num_heads is None) == (head_channels is None):
            raise ValueError(
                "exactly one of num_heads and head_channels must be given, got "
                f"num_heads={num_heads}, head_channels={head_channels}; set the other to null"
            )
        heads = num_heads if num_heads is not None else channels // (head_channels or channels)
        if heads < 1 or channels % heads or (head_channels is not None and heads * head_channels != channels):
            wish = f"{num_heads} heads" if head_channels is None else f"heads of {head_channels} channels"
            raise ValueError(
                f"{channels} channels can't be split into {wish}; choose a divisor of {channels}"
            )
        unknown = [view for view in views if view not in VIEWS]
        if unknown or not views:
            raise ValueError(f"views must be some of {', '.join(VIEWS)}, got {list(views)}")
        self.views = nn.ModuleList(
            AttentionView(
                channels,
                heads,
                VIEWS[view],
                max_distance if relative_position and VIEWS[view].spans_time else None,
                norm_groups,
                relative_position_as_released,
            )
            for view in views
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b c t h w` to itself."""
        for view in self.views:
            x = x + view(x)
        return x


class AttentionView(nn.Module):
    """Normalized multi-head self-attention in one view of `b c t h w`, without the residual.

    Relative position in time (Shaw et al. 2018, eqs. 3 and 4), with tables shared by all heads: the logit of
    query i and key j is (q_i·k_j + q_i·E_K[t_j - t_i]) / √d, and the output is Σ_j a_ij (v_j + E_V[t_j -
    t_i]). The released code instead has q_i·k_j / √d + q_j·E_K[t_i - t_j] / ∜d.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        tokens: Tokens,
        max_distance: int | None,
        norm_groups: int,
        as_released: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.tokens = tokens
        self.norm = GroupNorm(norm_groups, channels, eps=1e-5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_initialized(nn.Linear(channels, channels))
        self.relative: RelativePosition | None = None
        if max_distance is not None:
            self.relative = RelativePosition(channels // num_heads, max_distance, as_released)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b c t h w` to itself."""
        b, _, t, h, w = x.shape
        sizes = {"b": b, "t": t, "h": h, "w": w}
        tokens = rearrange(x, f"b c t h w -> {self.tokens.pattern}", **sizes)
        tokens = self.norm(tokens.unsqueeze(1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).squeeze(1)
        q, k, v = rearrange(self.qkv(tokens), "b l (three n d) -> three b n l d", three=3, n=self.num_heads)
        if self.relative is None:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = self.relative(q, k, v, num_frames=t)
        out = self.out(rearrange(mixed, "b n l d -> b l (n d)"))
        return rearrange(out, f"{self.tokens.pattern} -> b c t h w", **sizes)


class RelativePosition(nn.Module):
    """Fused attention with relative position in time, exactly, and without a matrix of tokens by tokens.

    The heads are widened by one column per frame: q' = [q, q·E_K(t_i → ·)], k' = [k, onehot(t_j)], v' = [v,
    onehot(t_j)]. The product q'·k' then holds the relative logit, and the output's extra columns hold the
    attention that each query pays to each frame, from which the value side is read.
    """

    def __init__(self, head_channels: int, max_distance: int, as_released: bool) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.as_released = as_released
        self.key = nn.Parameter(torch.empty(2 * max_distance + 1, head_channels))
        self.value = nn.Parameter(torch.empty(2 * max_distance + 1, head_channels))
        nn.init.xavier_uniform_(self.key)
        nn.init.xavier_uniform_(self.value)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_frames: int) -> Tensor:
        """Attention of `b n (t s) d` over (t s), where the s tokens of a frame share its time."""
        d = q.shape[-1]
        frames = torch.arange(num_frames, device=q.device)
        distance = (frames[None, :] - frames[:, None]).clamp(-self.max_distance, self.max_distance)
        distance = distance + self.max_distance
        table_k, table_v = self.key[distance].to(q.dtype), self.value[distance].to(q.dtype)

        onehot = torch.eye(num_frames, dtype=q.dtype, device=q.device)
        onehot = onehot.repeat_interleave(q.shape[2] // num_frames, dim=0).expand(*q.shape[:3], num_frames)
        if self.as_released:
            relative = torch.einsum("bntsd,tfd->bntsf", by_frame(q, num_frames), table_k * d**0.25)
            wide_q, wide_k = torch.cat([q, onehot], -1), torch.cat([k, relative.flatten(2, 3)], -1)
        else:
            relative = torch.einsum("bntsd,tfd->bntsf", by_frame(q, num_frames), table_k)
            wide_q, wide_k = torch.cat([q, relative.flatten(2, 3)], -1), torch.cat([k, onehot], -1)
        wide = F.scaled_dot_product_attention(wide_q, wide_k, torch.cat([v, onehot], -1), scale=d**-0.5)
        mixed, paid = wide.split([d, num_frames], dim=-1)
        relative = torch.einsum("bntsf,tfd->bntsd", by_frame(paid, num_frames), table_v)
        return mixed + relative.flatten(2, 3)


def by_frame(x: Tensor, num_frames: int) -> Tensor:
    """`b n (t s) d -> b n t s d`."""
    return x.unflatten(2, (num_frames, -1))
