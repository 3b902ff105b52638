"""PSNR and SSIM against scikit-image, LPIPS against its authors' values."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from src.metrics.reconstruction import PerceptualDistance, perceptual_distance, psnr, ssim
from src.metrics.reconstruction import video_perceptual_distance as video_distance


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(*shape, generator=generator) * 2 - 1
    return video, (video + 0.2 * torch.randn(*shape, generator=generator)).clamp(-1, 1)


# ---- PSNR, SSIM ----


def test_psnr_of_a_known_error():
    video = torch.zeros(2, 3, 4, 8, 8)
    other = video.clone()
    other[0] += 0.2  # a tenth of the range: 20 dB
    other[1, :, 0] += 0.4  # the same error in one frame of four: the clip's mean squared error is equal
    assert psnr(video, other).tolist() == pytest.approx([20.0, 20.0], abs=1e-5)
    assert psnr(video, video).tolist() == [math.inf, math.inf]


def test_ssim_is_that_of_scikit_image():
    video, other = pair(2, 3, 4, 20, 31)
    expected = [
        np.mean([
            structural_similarity(
                video[b, :, t].numpy(), other[b, :, t].numpy(), data_range=2.0, channel_axis=0,
                gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            )
            for t in range(4)
        ])
        for b in range(2)
    ]  # fmt: skip
    assert ssim(video, other).tolist() == pytest.approx(expected, rel=1e-5)
    assert ssim(video, video).tolist() == pytest.approx([1.0, 1.0], rel=1e-12)


@pytest.mark.parametrize("function", [psnr, ssim])
def test_videos_of_two_shapes_are_refused(function):
    with pytest.raises(ValueError, match=r"got \(1, 3, 4, 16, 16\) and \(1, 3, 5, 16, 16\)"):
        function(torch.zeros(1, 3, 4, 16, 16), torch.zeros(1, 3, 5, 16, 16))


def test_ssim_of_small_frames_is_refused():
    with pytest.raises(ValueError, match="11×11 or more"):
        ssim(torch.zeros(1, 3, 1, 8, 16), torch.zeros(1, 3, 1, 8, 16))


# ---- LPIPS ----

BACKBONES = {"alex": "alexnet_features.pth", "squeeze": "squeezenet1_1_features.pth"}


@pytest.fixture
def load(shared):
    return lambda net: perceptual_distance(net, shared(f"weights/lpips/{BACKBONES[net]}"))


@pytest.mark.parametrize("net", BACKBONES)
def test_lpips_is_the_published_one(load, shared, net):
    known = json.loads(shared("known_answers/known_answers.json").read_text())["lpips_v0.1"]

    def image(name: str) -> torch.Tensor:
        pixels = np.array(Image.open(shared(f"known_answers/lpips_images/{name}.png")).convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1

    network = load(net)
    values = network(image("ex_ref").expand(2, -1, -1, -1), torch.cat([image("ex_p0"), image("ex_p1")]))
    assert values.tolist() == pytest.approx(known[net]["measured"], abs=2e-6)
    ones = torch.ones(1, 3, 64, 64)
    expected = known[f"{net}_minus1_vs_plus1_64x64"]["measured"]
    assert network(-ones, ones).item() == pytest.approx(expected, abs=2e-6)
    assert network.name == f"lpips_{net}"


def test_lpips_is_that_in_torchmetrics_documentation(load, shared):
    known = json.loads(shared("known_answers/known_answers.json").read_text())["lpips_v0.1"]["squeeze"]
    generator = torch.Generator().manual_seed(123)
    images, references = (torch.rand(10, 3, 100, 100, generator=generator) * 2 - 1 for _ in range(2))
    published = known["torchmetrics_docstring_seed123_10x3x100x100"]["published"]
    assert load("squeeze")(images, references).mean().item() == pytest.approx(published, abs=5e-5)


def test_it_stays_in_evaluation_mode_and_frozen(load):
    network = load("squeeze")
    parent = torch.nn.ModuleList([network]).train()
    assert parent.training and not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(images, -images), network(images, -images))


def test_gradients_reach_the_images_and_are_finite_on_flat_ones(load):
    network = load("squeeze")
    for value in (0.0, -1.0):
        images = torch.full((1, 3, 40, 40), value, requires_grad=True)
        network(images, torch.zeros(1, 3, 40, 40)).sum().backward()
        assert images.grad.isfinite().all()
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    network(images, torch.zeros(1, 3, 40, 40)).sum().backward()
    assert images.grad.abs().max() > 0


def test_a_random_backbone_is_seeded_named_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (perceptual_distance("squeeze", random=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.name == "lpips_random"
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    values = first(images, -images)
    assert torch.equal(values, second(images, -images))
    assert (values > 0).all()
    # The published heads weigh no channel negatively: no distance can be below zero.
    assert all((parameter >= 0).all() for parameter in first.heads.parameters())


def test_a_video_scores_the_mean_of_its_frames(load):
    network = load("squeeze")
    video, other = pair(2, 3, 3, 40, 40)
    expected = [
        np.mean([network(video[b, :, t][None], other[b, :, t][None]).item() for t in range(3)])
        for b in range(2)
    ]
    assert video_distance(network, video, other).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_missing_backbone_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        perceptual_distance("vgg")
    message = str(error.value)
    folder = tmp_path / "hub" / "checkpoints"
    for part in (
        str(folder / "vgg16-397923af.pth"),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "perceptual.weights=PATH",
        "perceptual=alex, perceptual=squeeze, perceptual=none",
    ):
        assert part in message
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        perceptual_distance("alex", tmp_path / "elsewhere.pth")


def test_a_backbone_in_torchs_cache_is_found(tmp_path, monkeypatch, shared):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "squeezenet1_1-b8a52dc0.pth").symlink_to(shared("weights/lpips/squeezenet1_1_features.pth"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert isinstance(perceptual_distance("squeeze"), PerceptualDistance)


def test_wrong_choices_are_refused(shared):
    with pytest.raises(ValueError, match="'resnet'; choices: vgg, alex, squeeze"):
        perceptual_distance("resnet")
    path = shared("weights/lpips/squeezenet1_1_features.pth")
    with pytest.raises(
        ValueError, match=r"alexnet-owt-7be5be79.pth: missing or misshapen .*features\.6\.weight"
    ):
        perceptual_distance("alex", path)
    with pytest.raises(ValueError, match="takes no weights"):
        perceptual_distance("squeeze", path, random=True)
    with pytest.raises(ValueError, match=r"got \(1, 1, 40, 40\)"):
        perceptual_distance("squeeze", path)(torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 40, 40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>quota exceeded</html>", "is no file of weights: it is a web page"),
        (b"", "is no file of weights: it is empty"),
        (b"\x80\x04K\x01.", "can't read weights from|holds no state dict"),
        (b"PK\x03\x04 but no archive", "can't read weights from"),
    ],
)
def test_a_backbone_that_is_no_file_of_weights_is_named(tmp_path, content, message):
    path = tmp_path / "alex.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        perceptual_distance("alex", path)
    assert str(path) in str(error.value)


def test_another_networks_weights_are_refused_with_the_file(tmp_path):
    path = tmp_path / "alex.pth"
    torch.save({"conv.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=f"{path} doesn't hold torchvision's alexnet"):
        perceptual_distance("alex", path)
