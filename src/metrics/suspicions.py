"""Signs that videos were read or written wrongly before anybody measured them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from einops import rearrange, reduce
from torch import Tensor

from .pace import other_stride, pace

# A share of videos that can't be chance, and a share of pixels that real videos never have.
_MOST, _FEW = 0.95, 0.01
# Black, mapped from [0, 1] as if from [-1, 1], is 127 or 128.
DARK = 120


def traits(frames: Tensor) -> dict[str, Tensor]:
    """What the signs are read from, of each video: frames uint8 `b t h w c` → tensors `b *`.

    `colour` is the mean of red, green, blue in [0, 255]; `dark` the share of values clearly below the
    middle of the range; `black` the share of zeros; `spread` the deviation within a colour; `stillness` the
    share of neighbouring frames that are equal; `pace` how fast they become different (`metrics.pace`);
    `content` the first 16 bytes of a checksum, as numbers.
    """
    values = frames.float()
    colour = reduce(values, "b t h w c -> b c", "mean")
    around = values - rearrange(colour, "b c -> b 1 1 1 c")
    pairs = frames[:, 1:] == frames[:, :-1]
    same = (
        reduce(pairs.float(), "b t h w c -> b t", "min").mean(1)
        if frames.shape[1] > 1
        else torch.zeros(len(frames), device=frames.device)
    )
    content = [hashlib.sha256(video.contiguous().numpy().tobytes()).digest()[:16] for video in frames.cpu()]
    return {
        "colour": colour,
        "dark": reduce((frames < DARK).float(), "b t h w c -> b", "mean"),
        "black": reduce((frames == 0).float(), "b t h w c -> b", "mean"),
        "spread": reduce(around.square(), "b t h w c -> b", "mean").sqrt(),
        "stillness": same,
        "pace": pace(frames),
        "content": torch.tensor([list(digest) for digest in content], dtype=torch.uint8),
    }


def suspicions(real: Mapping[str, Tensor], generated: Mapping[str, Tensor]) -> list[str]:
    """Sentences on what looks like a mistake in the generated videos, beside the real ones.

    Args:
        real, generated: `traits` of all videos of each side.
    """
    found = []
    count = len(generated["dark"])
    constant = int((generated["spread"] < 0.1).sum())
    if constant:
        found.append(f"{constant:,} of {count:,} generated videos show one colour all over")
    elif (generated["spread"] < 1).double().mean() > _MOST:
        found.append(
            "nearly all generated videos are flat: were values in [0, 1] stored as 8 bits without times 255?"
        )
    frozen = int((generated["stillness"] == 1).sum()) - constant
    usual = float((real["stillness"] == 1).double().mean())
    if frozen > 0 and frozen / count > 2 * usual + 0.05:
        found.append(f"{frozen:,} of {count:,} generated videos stand still")
    for side, rows in (("generated", generated), ("real", real)):
        distinct = len(torch.unique(rows["content"], dim=0))
        if distinct < len(rows["content"]):
            doubles = len(rows["content"]) - distinct
            found.append(f"{doubles:,} of {len(rows['content']):,} {side} videos are copies of another one")
    real_dark = float(real["dark"].double().mean())
    if float((generated["dark"] < _FEW).double().mean()) > _MOST and real_dark > 0.1:
        found.append(
            "no generated video has values below the middle of the range: was a video in [0, 1] taken for "
            "one in [-1, 1]?"
        )
    black = float(generated["black"].double().mean())
    if black > 0.25 and black > 4 * float(real["black"].double().mean()) + 0.1:
        found.append(
            f"{black:.0%} of the generated values are 0: was a video in [-1, 1] taken for one in [0, 1]?"
        )
    if _looks_swapped(real["colour"].double(), generated["colour"].double()):
        found.append(
            "the colours fit the real ones better with red and blue exchanged: were frames written as BGR?"
        )
    return found


def suspicious_stride(real: Mapping[str, Tensor], generated: Mapping[str, Tensor]) -> list[str]:
    """A sentence if the generated videos seem to have another stride than the real ones; see `suspicions`."""
    factor = other_stride(real["pace"], generated["pace"])
    if factor is None:
        return []
    times = f"{factor:.0f} times" if factor > 1 else f"1/{1 / factor:.0f} of"
    return [f"generated videos move like real ones at about {times} their stride: do both have the same?"]


def _looks_swapped(real: Tensor, generated: Tensor) -> bool:
    """Whether mean colours `n 3` are clearly nearer to the real ones with red and blue exchanged."""
    if min(len(real), len(generated)) < 8:
        return False
    # Red minus blue is what an exchange turns round.
    ours, theirs = (colour[:, 0] - colour[:, 2] for colour in (real, generated))
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    as_it_is, swapped = (ours.mean() - theirs.mean()).abs(), (ours.mean() + theirs.mean()).abs()
    return bool(as_it_is > swapped + 2.5 * error and as_it_is > 4.0)
