"""Whether given frames in the training loss help the others: `python -m benchmarks.given_frames MODEL …`.

Of each model, the denoising loss of the frames that aren't given, on held-out clips of the drift sweeps'
data: where the first frame is given, the first and the last, or none; averaged over four times, both strides
and all clips. Models trained with and without `stage.given_frames_in_loss` can be compared by it, since what
is said of given frames has no part in it. Every model gets the same clips and the same noise.
"""

import argparse
import json
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from src.config import CONF, build
from src.data.clips import ClipDataset
from src.data.transforms import to_video
from src.diffusion.conditioning import Condition, GivenFrames, denoiser_of
from src.diffusion.objective import denoising_loss
from src.diffusion.strides import LatentStrides
from src.model_folder import DiffusionModel, load_diffusion

TIMES = (125, 375, 625, 875)
GIVEN = {"none": [], "first": [0], "first and last": [0, -1]}


def main() -> None:
    """Measures and prints, a line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "models", nargs="+", type=Path, help="model folders of drift_perturbed, drift_all_frames"
    )
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--noise-level", type=int, default=100, help="to which given frames are noised")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", overrides=["+experiment=drift_perturbed"]).dataset
    dataset: ClipDataset = build(node, split="test", seed=0)
    frames = [dataset.clip(item, "first")["frames"] for item in range(min(options.clips, len(dataset)))]
    video = to_video(torch.stack(frames))
    for folder in options.models:
        print(
            json.dumps({"model": str(folder)} | measure(load_diffusion(folder), video, options.noise_level))
        )


@torch.no_grad()
def measure(model: DiffusionModel, video: torch.Tensor, noise_level: int) -> dict[str, float]:
    """Mean losses of the frames that aren't given, by what is given.

    Args:
        model: trained with perturbed given frames.
        video: clips `b c t h w` in [-1, 1], as long as those of its training.
        noise_level: to which given frames are noised.
    """
    space = model.autoencoder
    latents = torch.cat([space.normalize(space.encode(part).mean) for part in video.split(8)])
    strides = LatentStrides(model.latent_strides)
    told = {}
    for name, given in GIVEN.items():
        losses = []
        for index in range(len(strides.strides)):
            window = strides.cut(latents, index, 0)
            generator = torch.Generator().manual_seed(index)
            mask = torch.zeros(len(window), 1, *window.shape[2:])
            mask[:, :, given] = 1.0
            level = torch.full((len(window),), noise_level)
            perturbed = model.parameterization.add_noise(
                window, torch.randn(window.shape, generator=generator), level
            )
            stride = torch.full((len(window),), index) if strides.are_told else None
            condition = Condition(GivenFrames(perturbed, mask, level), None, stride)
            for time in TIMES:
                loss = denoising_loss(
                    denoiser_of(model.unet),
                    model.parameterization,
                    window,
                    torch.randn(window.shape, generator=generator),
                    torch.full((len(window),), time),
                    condition,
                    error=torch.square,
                )
                losses.append(loss.double().mean().item())
        told[name] = round(sum(losses) / len(losses), 5)
    return told


if __name__ == "__main__":
    main()
