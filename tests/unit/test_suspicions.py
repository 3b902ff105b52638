"""Mistakes of reading and writing are noticed, and sound videos are not suspected."""

import numpy as np
import pytest
import torch
from torch import Tensor

from src.data.synthetic import render
from src.metrics.suspicions import suspicions, traits


def rendered(split: str, count: int = 16) -> Tensor:
    videos = np.stack([render(0, split, index, 8, 32) for index in range(count)])
    # Tinted, as landscapes are: blue is the strongest colour.
    return torch.from_numpy((videos * np.array([0.6, 0.8, 1.0])).astype(np.uint8))


@pytest.fixture(scope="module")
def real() -> Tensor:
    return rendered("train")


@pytest.fixture(scope="module")
def sound() -> Tensor:
    return rendered("test")


def told(real: Tensor, generated: Tensor) -> list[str]:
    return suspicions(traits(real), traits(generated))


def test_sound_videos_are_not_suspected(real, sound):
    assert told(real, sound) == []
    assert told(sound, real) == []


MISTAKES = {
    "[0, 1] taken for one in [-1, 1]": lambda x: ((x / 255 + 1) * 127.5).round(),
    "[0, 1] taken for one in [-1, 1]?": lambda x: ((x / 255 + 1) * 127.5).floor(),
    "[-1, 1] taken for one in [0, 1]": lambda x: ((x / 127.5 - 1) * 255).clamp(0, 255),
    "without times 255": lambda x: (x / 255).round(),
    "written as BGR": lambda x: x.flip(-1),
    "16 of 16 generated videos stand still": lambda x: x[:, :1].expand_as(x),
    "16 of 16 generated videos show one colour all over": lambda x: x[:, :1, :1, :1].expand_as(x),
    "8 of 16 generated videos are copies of another one": lambda x: torch.cat([x[:8], x[:8]]),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_each_mistake_is_noticed(real, sound, message):
    mistaken = MISTAKES[message](sound.float()).to(torch.uint8)
    found = told(real, mistaken)
    assert any(message in sentence for sentence in found), found


def test_a_few_still_videos_are_no_mistake_where_real_ones_stand_still_too(real, sound):
    some = sound.clone()
    some[:4] = some[:4, :1]
    assert any("4 of 16 generated videos stand still" in sentence for sentence in told(real, some))
    still = real.clone()
    still[:4] = still[:4, :1]
    assert told(still, some) == []


def test_copies_among_real_videos_are_told(real, sound):
    assert any("16 of 32 real videos" in s for s in told(torch.cat([real, real]), sound))


def test_real_sky_videos_are_not_suspected(shared):
    from src.data.video import read_clip

    def clips(name: str) -> Tensor:
        paths = sorted(shared(f"clips_sky/{name}").iterdir())[:48]
        return torch.stack([torch.from_numpy(read_clip(path, 0, 8)) for path in paths])

    real = clips("real")
    assert told(real, clips("generated_mdgan_stage2")) == []
    assert any("BGR" in sentence for sentence in told(real, real.flip(-1)))
    assert any("BGR" in sentence for sentence in told(real, clips("generated_mdgan_stage1").flip(-1)))
    half = len(real) // 2
    assert told(real[:half], real[half:]) == []
