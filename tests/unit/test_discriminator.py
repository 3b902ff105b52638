"""The patch discriminator: which pixels a logit sees, and that frames are judged alone."""

import pytest
import torch

from src.models.discriminator import PatchDiscriminator, smallest_input


def test_size_of_the_released_network():
    network = PatchDiscriminator(norm="batch")
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_765_633


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_the_smallest_frame_gives_one_logit(n_layers):
    network = PatchDiscriminator(width=8, n_layers=n_layers)
    size = network.min_size
    assert network(torch.randn(2, 3, size, size)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match=f"needs {size} pixels per side"):
        network(torch.randn(2, 3, size, size - 1))


def test_smallest_input_of_three_layers():
    assert smallest_input([2, 2, 2, 1, 1]) == 24


def test_a_logit_sees_70_pixels():
    # The receptive field of Isola et al. 2017, by gradient; without normalization, which sees everything.
    network = PatchDiscriminator(width=8)
    for i in range(len(network.norms)):
        network.norms[i] = torch.nn.Identity()
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = network(image)
    (gradient,) = torch.autograd.grad(logits[0, 0, 9, 9], image)
    seen = gradient[0].abs().sum(dim=(0, 1)).nonzero().flatten()
    assert seen.max() - seen.min() + 1 == 70


def test_frames_of_a_video_are_judged_alone():
    network = PatchDiscriminator(width=8)
    video = torch.randn(2, 3, 3, 32, 32)
    logits = network(video)
    for b in range(2):
        for t in range(3):
            alone = network(video[b : b + 1, :, t])
            torch.testing.assert_close(logits[3 * b + t], alone[0], rtol=0, atol=1e-5)


def test_batch_normalization_depends_on_the_batch_as_the_original_does():
    network = PatchDiscriminator(width=8, norm="batch")
    frames = torch.randn(4, 3, 32, 32)
    assert not torch.allclose(network(frames)[:1], network(frames[:1]), atol=1e-3)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_initial_weights(norm):
    torch.manual_seed(0)
    network = PatchDiscriminator(norm=norm)
    for conv in network.convs:
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for layer in network.norms:
        assert abs(layer.weight.mean().item() - 1) < 0.01
        assert layer.bias.abs().sum() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"norm": "layer"}, "norm must be group or batch"), ({"n_layers": 0}, "n_layers must be at least 1")],
)
def test_impossible_networks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(**settings)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"takes frames \(n, 3, h, w\) or video"):
        PatchDiscriminator(width=8)(torch.zeros(1, 4, 32, 32))
