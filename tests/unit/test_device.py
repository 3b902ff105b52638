"""What is distrusted of a machine: half-precision convolutions; what is asked of it: a compiler; launches."""

import os
import subprocess
import sys
import time
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
    told_processes,
)
from src.training.share import Share

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
    for start in (refuse_broken_launch, Share):  # the latter is what sampling, evaluation and encoding share
        with pytest.raises(ValueError, match="machine=fsdp shards a model over processes"):
            start()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs it starts as many processes as it was told")
def test_a_launch_that_became_one_process_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from src.training.share import Share; Share()")
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


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("python /usr/bin/accelerate launch --cpu --num_processes 2 -m src.train", 2),
        ("python /usr/bin/accelerate launch --cpu --num_processes=3 -m src.train", 3),
        ("python -m accelerate.commands.launch --num-processes 2 script.py", 2),
        ("python -m accelerate.commands.accelerate_cli launch --num_processes 4 script.py", 4),
        ("python /usr/bin/accelerate-launch --num_processes 2 script.py", 2),
        ("python /usr/bin/accelerate launch --config_file CONFIG script.py", 5),
        ("python /usr/bin/accelerate launch --config_file=CONFIG script.py", 5),
        ("python /usr/bin/accelerate launch --config_file CONFIG --num_processes 1 script.py", 1),
        ("python /usr/bin/accelerate launch --config_file nowhere script.py", 1),
        ("bash -c accelerate", 1),
        ("python launch --num_processes 2", 1),
        ("python -m pytest", 1),
    ],
)
def test_what_accelerate_was_told_is_read_off_its_command(command, told, tmp_path):
    (tmp_path / "config.yaml").write_text("num_processes: 5\nuse_cpu: true\n")
    parts = command.replace("CONFIG", str(tmp_path / "config.yaml")).split()
    assert told_processes(parts) == told


def test_tasks_that_dont_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="srun started 2 tasks, which know nothing of each other"):
        refuse_broken_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_broken_launch()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    refuse_broken_launch()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_the_end_of_a_launcher_ends_its_processes(tmp_path):
    """Killed without a chance to say goodbye, as by SIGKILL, it leaves no orphan behind."""
    worker = (
        "import signal, sys, time; from src.training.device import end_with_launcher; end_with_launcher();"
        "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'w').write('asked'), sys.exit()));"
        "open(sys.argv[2], 'w').close(); time.sleep(60)"
    )
    said, ready = tmp_path / "said", tmp_path / "ready"
    launcher = (
        "import subprocess, sys, time;subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x"}
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, worker, str(said), str(ready)], env=environment
    )
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while not (said.exists() and said.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert said.read_text() == "asked"


HOLDS = """
import ctypes, sys
from pathlib import Path
from src.training.device import pick_device

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pick_device(keeps_memory=sys.argv[1] == "keeps")
libc.free(libc.malloc(30 * 2**20))  # glibc keeps pieces of that size from now on, by default
before, pieces = resident(), []
for size in [20 * 2**20, 2**20] * 8:
    pieces.append(libc.malloc(size))
    ctypes.memset(pieces[-1], 1, size)
for large in pieces[::2]:
    libc.free(large)
print(resident() - before)
"""


RELEASES = HOLDS.replace("print(", "from src.training.device import release_freed_memory\n"
                         "held = resident() - before\nrelease_freed_memory()\nprint(held, ")  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_what_lies_free_in_the_heap_is_released_on_request():
    told = subprocess.run([sys.executable, "-c", RELEASES, "keeps"], capture_output=True, check=True).stdout
    before, after = map(float, told.split())
    assert after < 30 < 150 < before, "MB, after 160 of 168 were freed"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_large_pieces_are_given_back_where_memory_shall_not_be_kept():
    held = {
        how: float(subprocess.run([sys.executable, "-c", HOLDS, how], capture_output=True, check=True).stdout)
        for how in ("gives back", "keeps")
    }
    assert held["gives back"] < 30 < 150 < held["keeps"], "MB, after 160 of 168 were freed"
