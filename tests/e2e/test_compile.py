"""Compiled networks: the numbers of eager ones, through the real verbs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.test_tiny import at, verb

pytestmark = pytest.mark.slow


def losses(run: Path) -> dict[int, dict[str, float]]:
    """The losses of a run by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {name: x for name, x in line.items() if name.endswith("/loss")}
        for line in lines
        if any(name.endswith("/loss") for name in line)
    }


def test_a_compiled_run_learns_resumes_and_samples_as_an_eager_one(tmp_path: Path) -> None:
    for folder, compiled in ((tmp_path / "eager", "false"), (tmp_path / "compiled", "true")):
        for experiment in ("tiny_autoencoder", "tiny"):
            # Adversarial training magnifies rounding: it is compared over few steps.
            steps = ["train.log_every=1", "train.save_every=6"]
            adversarial = ["stage.adversarial_start=6"] if experiment == "tiny_autoencoder" else []
            train = ["train", f"+experiment={experiment}", *at(folder), *steps, *adversarial]
            verb(folder, *train, "train.num_steps=12", f"machine.compile={compiled}")
    for experiment in ("tiny_autoencoder", "tiny"):
        eager, compiled = (losses(tmp_path / way / "runs" / experiment) for way in ("eager", "compiled"))
        assert eager.keys() == compiled.keys() == set(range(1, 13))
        for step in eager:
            assert compiled[step] == pytest.approx(eager[step], rel=1e-4, abs=1e-4), (experiment, step)
        weights = [
            load_file(tmp_path / way / "runs" / experiment / "model" / "weights.safetensors")
            for way in ("eager", "compiled")
        ]
        torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=2e-3)

    # The machine isn't what is learned: an eager run may go on compiled.
    run = tmp_path / "eager" / "runs" / "tiny"
    resume = ["train.log_every=1", "train.save_every=6", "train.num_steps=13", "machine.compile=true"]
    verb(tmp_path, "train", "+experiment=tiny", *at(tmp_path / "eager"), *resume)
    assert max(losses(run)) == 13
    for compiled in ("false", "true"):
        sampling = ["num_samples=3", "batch_size=2", "sampler.num_sampling_steps=2"]
        output = [f"output={tmp_path / compiled}", f"machine.compile={compiled}"]
        verb(tmp_path, "sample", f"model={run / 'model'}", *sampling, *output)
    from src.data.video import read_clip

    for name in ("sample_000000.mp4", "sample_000002.mp4"):
        eager, compiled = (read_clip(tmp_path / way / name, 0, 8, 1) for way in ("false", "true"))
        difference = (torch.as_tensor(eager).float() - torch.as_tensor(compiled).float()).abs()
        assert difference.mean() < 1
