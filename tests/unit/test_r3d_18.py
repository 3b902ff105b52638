"""R3D-18 against torchvision's own network, preprocessing and classifier."""

import pytest
import torch

from src.metrics import r3d_18
from src.metrics.features import load_extractor
from tests.recorded_features import made_up_state, video


def test_features_are_what_torchvisions_classifier_sees(tmp_path):
    network = r3d_18.R3d18().network
    state = made_up_state(network)
    path = tmp_path / "r3d_18.pth"
    torch.save(state, path)
    extractor = load_extractor("r3d_18", resize="squash", weights=path)
    assert (extractor.dim, extractor.min_frames) == (512, 8)

    from torchvision.models.video import R3D_18_Weights
    from torchvision.models.video import r3d_18 as build

    theirs = build(weights=None).eval()
    theirs.load_state_dict(state)
    clip = video(8, 112)
    published = R3D_18_Weights.KINETICS400_V1.transforms()
    mean, deviation = (
        torch.tensor(values)[:, None, None, None] for values in (published.mean, published.std)
    )
    with torch.no_grad():
        logits = theirs(((clip + 1) / 2 - mean) / deviation)
    features = extractor(clip)
    assert features.shape == (1, 512)
    torch.testing.assert_close(theirs.fc(features), logits, rtol=1e-5, atol=1e-5)


def test_without_the_file_the_error_says_where_it_is():
    with pytest.raises(
        FileNotFoundError, match=rf"(?s)download.pytorch.org/models/{r3d_18.FILE}.*weights=PATH"
    ):
        load_extractor("r3d_18", resize="crop")
