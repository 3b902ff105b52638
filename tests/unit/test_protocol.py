"""A distance may call itself FVD only under the conditions of the literature."""

import json
from dataclasses import replace

import pytest

from src.metrics.protocol import Protocol

STANDARD = Protocol(
    features="i3d",
    num_real=2048,
    num_generated=2048,
    num_frames=16,
    frame_stride=1,
    resolution=(256, 256),
    resize="bilinear squash to 224×224",
    dataset="ucf101",
    split="train",
    clip_choice="one random clip per video",
    seed=0,
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("fvd", "kvd")),
        ({"num_real": 9000}, ("fvd", "kvd")),
        ({"num_real": 64, "num_generated": 64}, ("frechet_distance_i3d_n64", "kernel_distance_i3d_n64")),
        ({"num_real": 2047}, ("frechet_distance_i3d_n2047vs2048", "kernel_distance_i3d_n2047vs2048")),
        ({"num_generated": 48}, ("frechet_distance_i3d_n2048vs48", "kernel_distance_i3d_n2048vs48")),
        ({"features": "pixels"}, ("frechet_distance_pixels_n2048", "kernel_distance_pixels_n2048")),
    ],
)
def test_names_are_honest(change, expected):
    protocol = replace(STANDARD, **change)
    assert (protocol.name("frechet_distance"), protocol.name("kernel_distance")) == expected
    assert (protocol.name("fvd"), protocol.name("kvd")) == expected


def test_json_round_trip_keeps_every_field():
    protocol = replace(STANDARD, resolution=(128, 96), seed=7)
    values = json.loads(json.dumps(protocol.to_dict()))
    assert Protocol.from_dict(values) == protocol
    del values["split"]
    with pytest.raises(ValueError, match=r"missing \['split'\], unknown \['colour'\]"):
        Protocol.from_dict({**values, "colour": 1})


def test_the_sentence_says_what_decides_the_number():
    sentence = replace(STANDARD, num_real=64, frame_stride=4, resolution=(32, 48)).sentence()
    expected = [
        "2,048 generated against 64 real clips",
        "ucf101, train",
        "one random clip per video",
        "16 frames (every 4th frame) at 32×48",
        "i3d",
        "bilinear squash",
        "float64",
        "seed 0",
    ]
    for part in expected:
        assert part in sentence
    assert "\n" not in sentence
    assert "every 2nd frame" in replace(STANDARD, frame_stride=2).sentence()
    assert "every 11th frame" in replace(STANDARD, frame_stride=11).sentence()
    assert "(every frame)" in STANDARD.sentence()


def test_what_no_distance_can_do_is_refused():
    with pytest.raises(ValueError, match="1 real, 2048 generated"):
        replace(STANDARD, num_real=1)
    with pytest.raises(ValueError, match="unknown metric 'psnr'; choices: frechet_distance"):
        STANDARD.name("psnr")
