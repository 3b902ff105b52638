"""How often another stride is noticed, and falsely: `python -m benchmarks.stride_guard FOLDER …`.

Each folder holds videos of one kind. Clips at strides 1 to 4 of all videos stand for generated ones beside
real clips at stride 1 of the same videos, and of one half of the videos beside the other half; and the
reverse (1/2 to 1/4: the real clips have the larger stride). `contrast` has the same stride, with all
differences of frames times 0.8 or 1.25. With --generated every folder's clips stand beside those at their own
stride, too.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.data.clips import list_videos
from src.data.transforms import Frames, Resize
from src.data.video import probe, read_frames
from src.metrics.pace import other_stride, pace

RATIOS = (1.0, 2.0, 3.0, 4.0, 1 / 2, 1 / 3, 1 / 4)


def read(folder: Path, resolution: int, most: int = 330) -> list[Frames]:
    """The first frames of every video of a folder."""
    paths = [str(folder / name) for name in list_videos(folder)]
    resize = Resize(resolution, "center_crop")
    return [
        read_frames(path, range(min(probe(path).num_frames, most)), resize=resize).copy() for path in paths
    ]


def clips(videos: Sequence[Frames], num_frames: int, stride: int, of_each: int, seed: int) -> Tensor:
    """The pace of some clips of each video that is long enough, at random places."""
    generator = torch.Generator().manual_seed(seed)
    told = []
    for video in videos:
        room = len(video) - (num_frames - 1) * stride
        for _ in range(of_each if room > 0 else 0):
            start = int(torch.randint(room, (), generator=generator))
            clip = video[start : start + (num_frames - 1) * stride + 1 : stride]
            told.append(pace(torch.from_numpy(clip)[None])[0])
    return torch.stack(told) if len(told) > 1 else torch.empty(0, 0)


def share(draws: int, pair: Callable[[int], tuple[Tensor, Tensor]]) -> str:
    """In how many of 100 draws the guard speaks."""
    found = total = 0
    for seed in range(draws):
        real, generated = pair(2 * seed)
        if len(real) and len(generated):
            found, total = found + (other_stride(real, generated) is not None), total + 1
    return f"{100 * found / total:5.0f}" if total else "    –"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--generated", nargs="*", type=Path, default=[])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--clips", type=int, default=4, help="of each video")
    parser.add_argument("--resolution", type=int, default=96)
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    print(f"{'':24}{'':8}{' '.join(f'{ratio:5.2g}' for ratio in RATIOS)} contrast")
    for folder in options.folders:
        videos = read(folder, options.resolution)

        def sides(seed: int, other: bool, videos: list[Frames] = videos) -> tuple[list[Frames], list[Frames]]:
            order = torch.randperm(len(videos), generator=torch.Generator().manual_seed(seed)).tolist()
            half = len(videos) // 2
            chosen = (order[:half], order[half:]) if other else (order, order)
            return [videos[i] for i in chosen[0]], [videos[i] for i in chosen[1]]

        for other in (False, True) if len(videos) > 3 else (False,):

            def at(
                ratio: float, seed: int, other: bool = other, sides: Callable[..., Any] = sides
            ) -> tuple[Tensor, Tensor]:
                real, generated = sides(seed, other)
                strides = (1, round(ratio)) if ratio >= 1 else (round(1 / ratio), 1)
                return (
                    clips(real, options.frames, strides[0], options.clips, seed),
                    clips(generated, options.frames, strides[1], options.clips, seed + 1),
                )

            told = [share(options.draws, partial(at, ratio)) for ratio in RATIOS]

            def changed(seed: int, at: Callable[..., Any] = at) -> tuple[Tensor, Tensor]:
                real, generated = at(1.0, seed)
                return real, generated + log(1.25 if seed % 4 else 0.8)

            told.append(share(options.draws, changed))
            print(f"{folder.name:24}{'other' if other else 'same':8}{' '.join(told)}")
        for made in options.generated:
            samples = read(made, options.resolution)

            def beside(
                seed: int, videos: list[Frames] = videos, samples: list[Frames] = samples
            ) -> tuple[Tensor, Tensor]:
                return (
                    clips(videos, options.frames, 1, options.clips, seed),
                    clips(samples, options.frames, 1, options.clips, seed + 1),
                )

            print(f"{made.name:32}{share(options.draws, beside)}")


if __name__ == "__main__":
    main()
