"""What is distrusted of a machine: half-precision convolutions; what is asked of it: a compiler; launches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.training.device import (
    CHECKED_CONVOLUTIONS,
    check_convolutions,
    check_half_precision,
    compile_in_place,
    make_accelerator,
    networks_convolution,
    refuse_broken_launch,
)

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")
SHAPE = (3, 16, 6, 12, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_convolutions_in_half_precision_pass(dtype):
    check_convolutions(CPU, dtype, SHAPE)


@pytest.mark.parametrize("name", CHECKED_CONVOLUTIONS)
@pytest.mark.parametrize("fault", ["last clip is zero", "a frame is another's", "nothing is finite"])
def test_a_faulty_convolution_is_refused_by_name(name, fault):
    def faulty(x: Tensor, weight: Tensor, stride: tuple[int, int, int]) -> Tensor:
        y = networks_convolution(x, weight, stride)
        if (tuple(weight.shape[2:]), stride) == CHECKED_CONVOLUTIONS[name]:
            if fault == "last clip is zero":
                y[-1] = 0
            elif fault == "a frame is another's":
                y[1, :, -1] = y[0, :, -1]
            else:
                y[:] = torch.nan
        return y

    message = rf"the {name.replace('(', '.').replace(')', '.')} convolution of .* in bfloat16 on cpu differs"
    with pytest.raises(ValueError, match=f"{message}.*cuDNN.*machine.precision=no"):
        check_convolutions(CPU, torch.bfloat16, SHAPE, faulty)


def test_convolutions_in_single_precision_and_on_a_cpu_are_trusted(monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr("src.training.device.check_convolutions", never)
    check_half_precision(CPU, "bf16")
    check_half_precision(torch.device("cuda", 0), "no")


def test_the_checked_convolution_inside_frames_is_the_3d_one():
    x, weight = torch.randn(2, 3, 4, 5, 6), torch.randn(7, 3, 1, 3, 3)
    expected = torch.nn.functional.conv3d(x, weight)
    torch.testing.assert_close(networks_convolution(x, weight, (1, 1, 1)), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no C++ compiler")
def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler.*machine.compile=false"):
        compile_in_place([nn.Linear(1, 1)])


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_models_are_refused(flag, monkeypatch):
    monkeypatch.setenv(flag, "true")
    with pytest.raises(ValueError, match="machine=fsdp shards a model over processes"):
        refuse_broken_launch()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs it starts as many processes as it was told")
def test_a_launch_that_became_one_process_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from src.training.device import refuse_broken_launch; refuse_broken_launch()")
    launcher = str(Path(sys.executable).with_name("accelerate"))
    for count in (1, 2):
        command = [launcher, "launch", "--cpu", "--num_processes", str(count), str(script)]
        result = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
        )
        assert (result.returncode == 0) == (count == 1), result.stderr
    assert "was told 2 processes and started one" in result.stderr and "torchrun" in result.stderr


def test_half_precision_with_a_scaler_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        make_accelerator(precision="fp16", tf32=False, batch_size=2, micro_batch_size=None)
