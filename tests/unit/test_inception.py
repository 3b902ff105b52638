"""The FID's Inception-v3 against the package pytorch-fid, live where it is installed, and as recorded."""

import json

import pytest
import torch

from src.metrics.features import load_extractor
from src.metrics.inception import InceptionV3
from tests.recorded_features import RECORD, made_up_state, pytorch_fid_inception, video


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    network = InceptionV3()
    network.network.load_state_dict(made_up_state(network.network))
    return network


def test_features_are_the_recorded_ones(network):
    features = network(video(2, 299))
    assert features.shape == (1, 2, 2048)
    expected = torch.tensor(json.loads(RECORD.read_text())["pytorch_fid_inception"])
    assert expected.std() > 0.1
    torch.testing.assert_close(features[..., ::64], expected, rtol=1e-5, atol=1e-5)


def test_features_are_those_of_pytorch_fid(network):
    pytest.importorskip("pytorch_fid", reason="pip install pytorch-fid")
    clips = torch.rand(2, 3, 2, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = pytorch_fid_inception(network.network.state_dict(), clips)
    torch.testing.assert_close(network(clips)[..., ::64], expected, rtol=1e-5, atol=1e-5)


def test_it_is_loaded_from_a_file_and_looks_at_single_frames(network, tmp_path):
    path = tmp_path / "inception.pth"
    torch.save(network.network.state_dict(), path)
    extractor = load_extractor("inception", resize="squash_tf1", weights=path)
    assert (extractor.dim, extractor.min_frames, extractor.per_frame) == (2048, 1, True)
    clip = video(2, 64)
    features = extractor(clip)
    assert features.shape == (1, 2, 2048)
    torch.testing.assert_close(extractor(clip[:, :, 1:]), features[:, 1:], rtol=1e-5, atol=1e-5)


def test_without_the_file_or_with_another_the_error_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)fid_weights/pt_inception-2015-12-05.*weights=PATH"):
        load_extractor("inception", resize="squash")
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(ValueError, match=r"fc.weight is \(1000, 2048\) instead of \(1008, 2048\)"):
        load_extractor("inception", resize="squash", weights=path)
