"""Samples of two kinds never share a folder."""

import json
from pathlib import Path

import pytest

from src.config import ConfigError
from src.sample import recipe, refuse_other_samples
from tests.composing import composed


def test_a_folder_of_other_samples_is_refused(tmp_path: Path) -> None:
    cfg = composed("sample", "model=m")
    made_by = recipe(cfg, "abc", 16)
    refuse_other_samples(tmp_path, made_by)
    refuse_other_samples(tmp_path / "none", made_by)
    (tmp_path / "samples.json").write_text(json.dumps({"made_by": made_by}))
    refuse_other_samples(tmp_path, recipe(composed("sample", "model=m", "num_samples=3"), "abc", 16))
    with pytest.raises(ConfigError, match=r"weights_sha256: abc -> def[\s\S]*output="):
        refuse_other_samples(tmp_path, recipe(cfg, "def", 16))
    other = recipe(composed("sample", "model=m", "sampler=ddim", "guidance=lvdm"), "abc", 16)
    with pytest.raises(ConfigError, match=r"guidance.scale: 1.0 -> [\s\S]*sampler._target_"):
        refuse_other_samples(tmp_path, other)
