"""A distance may call itself FVD only under the conditions of the literature."""

import json
from dataclasses import fields, replace

import pytest

from src.config import CONF, build
from src.metrics.protocol import Comparison, Protocol, name_of
from tests.composing import composed

OPTIONS = sorted(path.stem for path in (CONF / "protocol").glob("*.yaml"))


def shipped(name: str) -> Protocol:
    return build(composed("evaluate", f"protocol={name}", "model=x").protocol)


STANDARD = Comparison(
    protocol=shipped("ours"),
    num_real=2048,
    num_generated=2048,
    num_frames=16,
    real_stride=1,
    fps=None,
    resolution=(256, 256),
    crop="center_crop",
    short_videos="skip",
    dataset="ucf101",
    fingerprint="abc",
    weights="def",
)


@pytest.mark.parametrize(
    ("features", "counts", "expected"),
    [
        ("i3d", (2048, 2048), ("fvd", "kvd", "rfvd")),
        ("i3d", (9000, 2048), ("fvd", "kvd", "rfvd")),
        ("i3d", (64, 64), ("fvd_fast@64", "kvd_fast@64", "rfvd_fast@64")),
        ("i3d", (2047, 2048), ("fvd_fast@2047vs2048", "kvd_fast@2047vs2048", "rfvd_fast@2047vs2048")),
        (
            "r3d_18",
            (2048, 2048),
            (
                "frechet_distance_r3d_18@2048",
                "kernel_distance_r3d_18@2048",
                "reconstruction_frechet_distance_r3d_18@2048",
            ),
        ),
    ],
)
def test_names_are_honest(features, counts, expected):
    metrics = ("frechet_distance", "kernel_distance", "reconstruction_frechet_distance")
    assert tuple(name_of(metric, features, *counts) for metric in metrics) == expected
    with pytest.raises(ValueError, match="unknown metric 'psnr'; choices: frechet_distance"):
        name_of("psnr", features, *counts)


def test_every_protocol_says_where_it_comes_from():
    assert {
        "ours",
        "lvdm",
        "tf_original",
        "stylegan_v",
        "digan",
        "latte",
        "far",
        "magvit_10k",
        "mcvd",
    } <= set(OPTIONS)
    for name in OPTIONS:
        protocol = shipped(name)
        assert protocol.name == name
        if name not in ("ours", "quick"):
            assert "arXiv" in protocol.source and protocol.open_points


def test_no_two_protocols_are_the_same():
    assert len({shipped(name).digest for name in OPTIONS}) == len(OPTIONS)


def test_the_digest_knows_rules_and_not_words():
    ours = shipped("ours")
    told = replace(ours, name="mine", source="a book", open_points="none")
    assert told.digest == ours.digest
    changes = {
        "features": None, "resize": "crop", "num_frames": 17, "split": "all", "num_real": 5,
        "num_generated": 6, "real_videos": "sorted", "real_clip": "first", "generated_clip": "middle",
        "real_stride": 2, "generated_stride": 2, "jpeg_quality": 90, "arithmetic": "float32_svd",
        "biased_covariance": True, "seeds": (1,), "resample_real": False, "resample_generated": False,
    }  # fmt: skip
    assert set(changes) == {field.name for field in fields(Protocol)} - {"name", "source", "open_points"}
    digests = {replace(ours, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {ours.digest}) == len(changes) + 1


def test_comparisons_of_other_data_counts_or_weights_dont_mix():
    changes = {
        "protocol": shipped("lvdm"), "num_real": 4096, "num_generated": 4096, "num_frames": 32,
        "real_stride": 4, "fps": 8.0, "resolution": (128, 128), "crop": "squash", "short_videos": "pad",
        "fingerprint": "x", "weights": "y",
    }  # fmt: skip
    digests = {replace(STANDARD, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {STANDARD.digest}) == len(changes) + 1
    assert replace(STANDARD, dataset="a copy of it elsewhere").digest == STANDARD.digest


def test_json_holds_every_field():
    told = json.loads(json.dumps(shipped("lvdm").to_dict()))
    assert told.keys() == {field.name for field in fields(Protocol)}
    assert Protocol(**told) == shipped("lvdm")


def test_the_sentence_says_what_decides_the_number():
    sentence = replace(STANDARD, num_real=64, real_stride=4, resolution=(32, 48)).sentence()
    expected = [
        "Protocol ours (",
        "2,048 generated against 64 real clips",
        "ucf101, train",
        "shuffled videos, random clip",
        "16 frames (every 4th frame) at 32×48",
        "i3d after squash",
        "float64",
        "seeds 0, 1, 2, 3",
    ]
    for part in expected:
        assert part in sentence
    assert "\n" not in sentence
    assert "every 2nd frame" in replace(STANDARD, real_stride=2).sentence()
    assert "every 11th frame" in replace(STANDARD, real_stride=11).sentence()
    assert "(every frame)" in STANDARD.sentence()
    assert "(at 8 frames per second)" in replace(STANDARD, fps=8.0).sentence()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_real": 1}, "num_real must be at least 2, got 1"),
        ({"num_generated": 0}, "num_generated must be at least 2, got 0"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"real_stride": 0}, "real_stride must be at least 1"),
        ({"jpeg_quality": 101}, "jpeg_quality must be 1 to 100 or null, got 101"),
        ({"seeds": ()}, r"seeds must be different whole numbers from 0, one or more, got \[\]"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"seeds": (-1,)}, "seeds must be different whole numbers from 0"),
        ({"seeds": (1.5, True)}, "seeds must be different whole numbers from 0"),
    ],
)
def test_what_no_measurement_can_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(shipped("ours"), **change)


def test_one_video_is_no_set():
    with pytest.raises(ValueError, match="1 real, 2048 generated"):
        replace(STANDARD, num_real=1)
