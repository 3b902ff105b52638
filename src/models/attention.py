"""Attention over a video's latents: one block, seen through several views of its tokens."""

from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import GroupNorm, Linear, zero_initialized

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
        self.qkv = Linear(channels, 3 * channels)
        self.out = zero_initialized(Linear(channels, channels))
        self.relative: RelativePosition | None = None
        if max_distance is not None:
            self.relative = RelativePosition(channels // num_heads, max_distance, as_released)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `b c t h w` to itself."""
        b, _, t, h, w = x.shape
        sizes = {"b": b, "t": t, "h": h, "w": w}
        tokens = rearrange(x, f"b c t h w -> {self.tokens.pattern}", **sizes)
        tokens = self.norm(tokens.unsqueeze(1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).squeeze(1)
        qkv = rearrange(self.qkv(tokens), "b l (three n d) -> three b n l d", three=3, n=self.num_heads)
        if self.relative is None:
            mixed = F.scaled_dot_product_attention(*qkv.unbind())
        else:
            mixed = self.relative(qkv, num_frames=t)
        out = self.out(rearrange(mixed, "b n l d -> b l (n d)"))
        return rearrange(out, f"{self.tokens.pattern} -> b c t h w", **sizes)


class RelativePosition(nn.Module):
    """Attention with relative position in time, exactly, and without a matrix of tokens by tokens."""

    def __init__(self, head_channels: int, max_distance: int, as_released: bool) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.as_released = as_released
        self.key = nn.Parameter(torch.empty(2 * max_distance + 1, head_channels))
        self.value = nn.Parameter(torch.empty(2 * max_distance + 1, head_channels))
        nn.init.xavier_uniform_(self.key)
        nn.init.xavier_uniform_(self.value)

    def forward(self, qkv: Tensor, num_frames: int) -> Tensor:
        """Attention of `three b n (t s) d` over (t s), where s tokens share a frame, to `b n (t s) d`."""
        frames = torch.arange(num_frames, device=qkv.device)
        distance = (frames[None, :] - frames[:, None]).clamp(-self.max_distance, self.max_distance)
        rows = distance + self.max_distance
        table_k, table_v = self.key[rows].to(qkv.dtype), self.value[rows].to(qkv.dtype)
        length, head_channels = qkv.shape[3:]
        if length == num_frames and length**2 * head_channels <= SMALL_WINDOW and not self.as_released:
            return attend_in_small_windows(qkv, table_k, table_v)
        return attend_with_widened_heads(qkv, table_k, table_v, self.as_released)


# In windows of so few frames² · channels, a matrix product costs more to call than to compute. Measured on
# one CPU core, forward and backward: 512 windows of 4 frames with 4 heads of 8 take 2.5 ms by sums of
# products, 6.8 ms by widened heads; 128 windows of 16 frames with 4 heads of 16 take 13 and 11 ms. In
# the released sizes 256 windows of 4 frames with 4 heads of 128 take 30 and 13 ms, 16 with heads of 256 2.6
# and 1.4.
SMALL_WINDOW = 1024


def attend_in_small_windows(qkv: Tensor, table_k: Tensor, table_v: Tensor) -> Tensor:
    """Attention of `three b n t d` with relative tables `t t d`, as sums of products over all b at once."""
    q, k, v = rearrange(qkv, "three b n t d -> three n d t b").contiguous().unbind()
    table_k, table_v = (rearrange(table, "i j d -> d i j 1") for table in (table_k, table_v))
    keys, values = k.unsqueeze(2) + table_k, v.unsqueeze(2) + table_v
    weights = ((q.unsqueeze(3) * keys).sum(1) * q.shape[1] ** -0.5).softmax(dim=2)
    mixed = ContiguousGradient.apply((weights.unsqueeze(1) * values).sum(3))
    return rearrange(mixed, "n d t b -> b n t d")


class ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is brought into the output's layout before products run over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The input itself."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradient, contiguous: through a transposed one, the products would take three times as long."""
        return gradient.contiguous()


def attend_with_widened_heads(qkv: Tensor, table_k: Tensor, table_v: Tensor, as_released: bool) -> Tensor:
    """Fused attention of `three b n (t s) d` with relative tables `t t d` between frames.

    The heads are widened by one column per frame: q' = [q, q·E_K(t_i → ·)], k' = [k, onehot(t_j)], v' = [v,
    onehot(t_j)]. The product q'·k' then holds the relative logit, and the output's extra columns hold the
    attention that each query pays to each frame, from which the value side is read.
    """
    q, k, v = qkv.unbind()
    num_frames, d = table_k.shape[0], q.shape[-1]
    # The GPU's fused kernels want widths in multiples of eight, else a matrix of tokens by tokens is made.
    columns = -(-num_frames // 8) * 8 if q.is_cuda else num_frames
    table_k = F.pad(table_k * (d**0.25 if as_released else 1.0), (0, 0, 0, columns - num_frames))
    relative = torch.einsum("bntsd,tfd->bntsf", by_frame(q, num_frames), table_k).flatten(2, 3)
    onehot = torch.eye(num_frames, columns, dtype=q.dtype, device=q.device)
    onehot = onehot.repeat_interleave(q.shape[2] // num_frames, dim=0).expand_as(relative)
    of_query, of_key = (onehot, relative) if as_released else (relative, onehot)
    wide_q, wide_k, wide_v = (torch.cat(pair, dim=-1) for pair in ((q, of_query), (k, of_key), (v, onehot)))
    wide = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=d**-0.5)
    paid = by_frame(wide[..., d : d + num_frames], num_frames)
    return wide[..., :d] + torch.einsum("bntsf,tfd->bntsd", paid, table_v).flatten(2, 3)


def by_frame(x: Tensor, num_frames: int) -> Tensor:
    """`b n (t s) d -> b n t s d`."""
    return x.unflatten(2, (num_frames, -1))
