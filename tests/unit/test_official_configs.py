"""Configs of the released code: what they mean where they say things twice, and what is refused."""

from typing import Any

import pytest

from src.interop.official_configs import refuse_unknown_kind, unet_arguments

UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [1],
    "num_res_blocks": 1,
    "num_heads": 4,
    "kernel_size_t": 1,
    "padding_t": 0,
}


@pytest.mark.parametrize(
    ("said", "count", "width"),
    [
        ({}, 4, None),
        ({"num_heads": 8, "num_head_channels": 16}, None, 16),
        ({"num_heads": -1, "num_head_channels": 16}, None, 16),
        ({"num_head_channels": -1}, 4, None),
    ],
)
def test_a_width_of_heads_wins_over_their_number(
    said: dict[str, int], count: int | None, width: int | None
) -> None:
    arguments = unet_arguments(UNET | said, relative_position_as_released=True)
    assert (arguments["num_heads"], arguments["head_channels"]) == (count, width)


def test_what_the_original_takes_by_default_may_be_said() -> None:
    said = {
        "dims": 3,
        "use_fp16": False,
        "num_heads_upsample": -1,
        "transformer_depth": 1,
        "context_dim": None,
        "use_temporal_transformer": False,
        "nonlinearity_type": "silu",
        "ST_transformer_module": "attention_temporal",
    }
    assert unet_arguments(UNET | said, True) == unet_arguments(UNET, True)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_heads": -1}, "either num_heads or num_head_channels"),
        ({"dims": 2}, "dims must be 3"),
        ({"nonlinearity_type": "leaky_relu"}, "nonlinearity_type must be 'silu'"),
        ({"context_dim": 768}, "text-to-video variant isn't supported"),
        ({"use_temporal_transformer": True}, "text-to-video variant isn't supported"),
        ({"kernel_size_t": 3, "padding_t": 0}, "changes the length"),
        ({"num_hedas": 2}, "unknown keys .*num_hedas"),
    ],
)
def test_what_cannot_be_built_is_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet_arguments(UNET | said, True)


@pytest.mark.parametrize("said", [{"given_betas": [0.1]}, {"concat_mask_on_input": False}])
def test_kinds_of_diffusion_that_were_never_released_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(said))):
        refuse_unknown_kind({"unet_config": {}, "first_stage_config": {}} | said)
