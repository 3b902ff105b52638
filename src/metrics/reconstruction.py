"""How close a reconstruction is to its original: PSNR, SSIM and the perceptual distance LPIPS."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from .torchvision_import import declare_torchvision_operators
from .weight_files import read_state

Backbone = Literal["vgg", "alex", "squeeze"]

# What torchvision calls the classifiers' weights that LPIPS takes its features from.
_BACKBONE_FILES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
_PEAK = 2.0  # videos lie in [-1, 1]
_SSIM_WIDTH, _SSIM_SIGMA = 11, 1.5


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB, from its mean squared error over all frames.

    `(b c t h w)` twice, in [-1, 1] → `(b,)`; infinite where the two are equal.
    """
    _check_pair(video, reference)
    error = reduce((video.double() - reference.double()).square(), "b c t h w -> b", "mean")
    return 10 * torch.log10(_PEAK**2 / error)


def ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each clip, averaged over frames, colours and window positions.

    Wang et al. 2004: an 11×11 Gaussian window of deviation 1.5, K₁ = 0.01, K₂ = 0.03, only where it fits.
    `(b c t h w)` twice, in [-1, 1] → `(b,)`; raises ValueError for frames smaller than the window.
    """
    _check_pair(video, reference)
    if min(video.shape[-2:]) < _SSIM_WIDTH:
        raise ValueError(
            f"SSIM needs frames of {_SSIM_WIDTH}×{_SSIM_WIDTH} or more, got {list(video.shape[-2:])}"
        )
    x = rearrange(video.double(), "b c t h w -> (b c t) 1 h w")
    y = rearrange(reference.double(), "b c t h w -> (b c t) 1 h w")
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return reduce(luminance * structure, "(b n) 1 h w -> b", "mean", b=len(video))


def _blur(x: Tensor) -> Tensor:
    offsets = torch.arange(_SSIM_WIDTH, dtype=x.dtype, device=x.device) - _SSIM_WIDTH // 2
    window = torch.exp(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    window = window / window.sum()
    x = F.conv2d(x, rearrange(window, "k -> 1 1 k 1"))
    return F.conv2d(x, rearrange(window, "k -> 1 1 1 k"))


class PerceptualDistance(nn.Module):
    """Learned perceptual distance of image pairs: `(n 3 h w)` twice, in [-1, 1] → `(n,)`.

    Zhang et al. 2018 (arXiv 1801.03924), eq. (1), version 0.1. Frozen and in evaluation mode for ever:
    `train()` doesn't reach it, because its dropout would thin the distance. Gradients flow to the images.

    Attributes:
        name: under which values may be reported: `lpips_vgg`, or `lpips_random` for a random backbone.
    """

    def __init__(self, scaling: nn.Module, backbone: nn.Module, heads: nn.ModuleList, name: str) -> None:
        super().__init__()
        self.scaling, self.backbone, self.heads = scaling, backbone, heads
        self.name = name
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in evaluation mode, whatever is asked."""
        super().train(False)
        return self

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        if images.shape != references.shape or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"LPIPS takes two batches of images (n, 3, h, w) of one shape, got {tuple(images.shape)} "
                f"and {tuple(references.shape)}"
            )
        features = zip(self._features(images), self._features(references), strict=True)
        distances = [
            reduce(head((x - y).square()), "n 1 h w -> n", "mean")
            for head, (x, y) in zip(self.heads, features, strict=True)
        ]
        return torch.stack(distances).sum(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        # `vector_norm` has a finite gradient where all channels are zero; the root of a sum hasn't.
        return [
            x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
            for x in self.backbone(self.scaling(images))
        ]


def perceptual_distance(
    net: Backbone, weights: str | Path | None = None, *, random: bool = False
) -> PerceptualDistance:
    """LPIPS with its published linear heads on a backbone that is already on this machine.

    Args:
        net: the backbone.
        weights: torchvision's file of the backbone's weights; without it, torch's cache folder is searched.
        random: a random backbone instead (seeded, so it is the same everywhere). Its values are no LPIPS.

    Raises:
        FileNotFoundError: if the backbone isn't there, saying how to get it; nothing is ever downloaded here.
        ValueError: for another backbone or a file that doesn't hold its weights.
    """
    if net not in _BACKBONE_FILES:
        raise ValueError(f"unknown LPIPS backbone {net!r}; choices: {', '.join(_BACKBONE_FILES)}")
    if random and weights is not None:
        raise ValueError(f"a random backbone takes no weights, got {weights}")
    path = None if random else _backbone_path(net, weights)
    state = None if path is None else read_state(path)
    lpips = _import_lpips()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")  # the package calls it by an old argument
        torch.manual_seed(0)
        # `pnet_rand` keeps the package from downloading; its heads come with it.
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    if path is not None and state is not None:
        _load_backbone(network.net, state, path, net)
    return PerceptualDistance(
        network.scaling_layer, network.net, network.lins, "lpips_random" if random else f"lpips_{net}"
    )


@torch.no_grad()
def video_perceptual_distance(network: nn.Module, video: Tensor, reference: Tensor) -> Tensor:
    """Perceptual distance of each clip, averaged over its frames: `(b 3 t h w)` twice → `(b,)`."""
    _check_pair(video, reference)
    pairs = zip(video, reference, strict=True)
    clips = [
        network(*(rearrange(clip.float(), "c t h w -> t c h w") for clip in pair)).mean() for pair in pairs
    ]
    return torch.stack(clips)


def _backbone_path(net: Backbone, weights: str | Path | None) -> Path:
    name = _BACKBONE_FILES[net]
    folder = Path(torch.hub.get_dir(), "checkpoints")
    path = folder / name if weights is None else Path(weights).expanduser()
    if path.is_file():
        return path
    others = ", ".join(f"perceptual={other}" for other in [*_BACKBONE_FILES, "none"] if other != net)
    raise FileNotFoundError(
        f"no weights of LPIPS's {net} backbone at {path}. On a machine with a network run\n"
        f"    wget https://download.pytorch.org/models/{name}\n"
        f"and put the file into {folder}, or point to it: perceptual.weights=PATH. Other choices: {others}"
    )


def _load_backbone(backbone: nn.Module, state: Mapping[str, Tensor], path: Path, net: Backbone) -> None:
    """Load torchvision's `features.3.weight` into what the package calls `slice2.3.weight`."""
    ours = backbone.state_dict()
    renamed = {name: f"features.{name.split('.', 1)[1]}" for name in ours}
    wrong = [
        theirs
        for name, theirs in renamed.items()
        if theirs not in state or state[theirs].shape != ours[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{path} doesn't hold torchvision's {_BACKBONE_FILES[net]}: "
            f"missing or misshapen {', '.join(wrong)}"
        )
    backbone.load_state_dict({name: state[theirs] for name, theirs in renamed.items()})


def _import_lpips() -> ModuleType:
    """The package lpips, imported late because it takes seconds and drags torchvision along."""
    if "torchvision" not in sys.modules:
        declare_torchvision_operators()
    import lpips

    return lpips


def _check_pair(video: Tensor, reference: Tensor) -> None:
    if video.shape != reference.shape or video.ndim != 5:
        raise ValueError(
            f"two batches of videos (b, c, t, h, w) of one shape are compared, got {tuple(video.shape)} "
            f"and {tuple(reference.shape)}"
        )
