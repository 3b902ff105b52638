"""VideoMAE V2 against the packages transformers and cd-fvd, live where they are there, and as recorded."""

import json
import math

import pytest
import torch

from src.metrics.features import load_extractor
from src.metrics.videomae import VideoMae, load_videomae, sinusoids
from tests.recorded_features import (
    RECORD,
    SMALL,
    THIN,
    cdfvd_videomae,
    made_up_state,
    transformers_videomae,
    video,
)

CASES = {
    "transformers_videomae": (SMALL, 8),
    "cdfvd_videomae_16": (THIN, 16),
    "cdfvd_videomae_36": (THIN, 36),
}


def network_of(sizes: dict[str, int]) -> VideoMae:
    network = VideoMae(**sizes)
    network.load_state_dict(made_up_state(network))
    return network


@pytest.mark.parametrize("name", CASES)
def test_features_are_the_recorded_ones(name):
    sizes, frames = CASES[name]
    features = network_of(sizes)(video(frames, sizes["size"]))
    expected = torch.tensor(json.loads(RECORD.read_text())[name])
    assert expected.abs().max() > 1
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_features_are_those_of_transformers():
    pytest.importorskip("transformers", reason="pip install transformers")
    network = network_of(SMALL)
    clips = torch.rand(3, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = transformers_videomae(network.state_dict(), clips)
    torch.testing.assert_close(network(clips), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("frames", [16, 18, 64])
def test_features_are_those_of_the_content_debiased_distances_code(frames):
    pytest.importorskip("cdfvd", reason="pip install cd-fvd")
    network = network_of(THIN)
    clip = torch.rand(1, 3, frames, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(network(clip), cdfvd_videomae(network.state_dict(), clip), rtol=0, atol=2e-6)


def test_positions_are_sines_and_cosines():
    table = sinusoids(7, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert table[3, 0].item() == pytest.approx(0.14112000805986721, rel=1e-6)  # sin(3)
    assert table[5, 3].item() == pytest.approx(math.cos(5 / 10_000 ** (2 / 6)), rel=1e-6)


def test_unfit_sizes_and_videos_are_refused():
    with pytest.raises(ValueError, match="size=18 one of patch=4"):
        VideoMae(**SMALL | {"size": 18})
    network = VideoMae(**SMALL)
    for frames, size in ((6, 16), (9, 16), (8, 20)):
        with pytest.raises(ValueError, match="at least 8 frames, a multiple of 2, got"):
            network(torch.zeros(1, 3, frames, size, size))


def test_without_the_file_the_error_says_where_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)huggingface.co/.*ssv2_ft\.pth.*weights=PATH"):
        load_extractor("videomae", resize="squash")
    with pytest.raises(FileNotFoundError, match=r"at .*nowhere\.pth"):
        load_videomae(tmp_path / "nowhere.pth")


def test_the_weights_of_a_smaller_one_are_refused(tmp_path):
    path = tmp_path / "small.pth"
    torch.save({"module": network_of(SMALL).state_dict()}, path)
    with pytest.raises(ValueError, match=r"VideoMAE V2 ViT-g .*: lacks blocks"):
        load_videomae(path)
