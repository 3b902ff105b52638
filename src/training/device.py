"""Which device, how many processes, what precision; what of a machine helps and what must be distrusted."""

import atexit
import ctypes
import itertools
import math
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.layers import Size3d

PRECISIONS = ("auto", "no", "bf16", "fp16")


def make_accelerator(
    *, precision: str, tf32: bool, batch_size: int, micro_batch_size: int | None
) -> tuple[Accelerator, int]:
    """An accelerator whose gradient accumulation makes up the global batch, and the micro-batch's size.

    Args:
        precision: ``no`` (float32), ``bf16``, ``fp16``, or ``auto``: bf16 on a GPU that has it, else float32
            (bf16 is slower than float32 on a CPU).
        tf32: whether float32 matrix products on a GPU may round to TF32.
        batch_size: clips of one optimizer step, over all processes.
        micro_batch_size: clips of one process at once; None for its whole share.

    Raises:
        ValueError: for an unknown precision, a batch that doesn't divide, or a GPU whose convolutions are
            wrong in the precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown machine.precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError(
            "machine.precision=fp16 needs a GPU, and there is none; use machine.precision=auto or no"
        )
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    refuse_broken_launch()
    end_with_launcher()
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"train.batch_size={batch_size} is the global batch and must be a multiple of the "
            f"{world_size} processes"
        )
    share = batch_size // world_size
    micro_batch_size = share if micro_batch_size is None else micro_batch_size
    if micro_batch_size < 1 or share % micro_batch_size:
        raise ValueError(
            f"each of {world_size} process(es) has {share} of train.batch_size={batch_size} clips; "
            f"train.micro_batch_size={micro_batch_size} must divide that"
        )
    if not torch.cuda.is_available():
        keep_freed_memory()
    # PyTorch renames the option from 2.13 on; the old name is the one that all supported releases know.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    # Runs of one multirun follow each other in one process, and may differ in precision.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # without it, Accelerate forms no group of CPU processes
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=share // micro_batch_size, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The others wait while the main process reads a large data set for the first time.
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
        step_scheduler_with_optimizer=False,
    )
    if accelerator.num_processes != world_size:
        raise ValueError(
            f"launched as {world_size} processes, but {accelerator.num_processes} found each other; "
            "use torchrun --nproc_per_node N -m src.train …"
        )
    check_half_precision(accelerator.device, precision)
    return accelerator, micro_batch_size


def refuse_broken_launch() -> None:
    """Refuses launches of which something else would become than was asked for.

    Raises:
        ValueError: if ``accelerate launch`` was told several processes and started one (on CPUs it does so
            without a word), or its config asks for another way of sharding than this loop's.
    """
    for flag, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(flag, "false").lower() in ("1", "true", "t", "yes", "y", "on"):
            raise ValueError(
                f"accelerate's config asks for {what}; here machine=fsdp shards a model over processes, with "
                "the same numbers and states as without. Launch without it, and train with machine=fsdp"
            )
    if "WORLD_SIZE" in os.environ:
        return
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdigit() and int(tasks) > 1:
        raise ValueError(
            f"srun started {tasks} tasks, which know nothing of each other and would all do the same work; "
            "use one task a node, and in it torchrun --nproc_per_node N -m src.VERB … (docs/cluster.md)"
        )
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:  # not Linux
        return
    told = told_processes(command)
    if told > 1:
        raise ValueError(
            f"accelerate launch was told {told} processes and started one, as it does on CPUs; use "
            f"torchrun --standalone --nproc_per_node {told} -m src.VERB …"
        )


def told_processes(command: list[str]) -> int:
    """How many processes the command line of ``accelerate launch`` asks for; 1 for any other command."""
    names = [Path(part).name for part in command]
    where = next((i for i, name in enumerate(names) if name.startswith("accelerate")), len(names))
    if names[where : where + 1] not in (["accelerate-launch"], ["accelerate.commands.launch"]) and (
        names[where + 1 : where + 2] != ["launch"]
    ):
        return 1
    options: dict[str, str] = {}
    for part, after in itertools.pairwise([*command[where:], ""]):
        if not part.startswith("--"):
            continue
        key, _, value = part.lstrip("-").partition("=")
        options.setdefault(key.replace("-", "_"), value or after)
    said = options.get("num_processes")
    if said is None:
        from accelerate.commands.config.config_args import default_config_file

        try:
            config = yaml.safe_load(Path(options.get("config_file", default_config_file)).read_text())
            said = str(config.get("num_processes", 1))
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            return 1
    return int(said) if said.isdigit() else 1


def end_with_launcher() -> None:
    """Lets a launcher's end, however it comes, ask this process to stop: no orphan goes on training.

    On Linux the process gets SIGTERM when ``torchrun`` ends (also of a signal that it doesn't hand on), and
    so saves and stops.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_signal_at_parents_death = 1  # PR_SET_PDEATHSIG of prctl.h
        ctypes.CDLL(None).prctl(set_signal_at_parents_death, signal.SIGTERM)


def leave(status: int) -> None:
    """Ends this process at once if it has shared the training of CPU processes; else does nothing.

    What is registered for a program's end is done; only the interpreter isn't taken apart. Gloo's threads may
    still hold a tensor then, for whose release they would need the interpreter, and abort: a finished run
    would now and then end with status -6. Nor can the group be taken apart before, once
    `DistributedDataParallel` has used it (PyTorch 2.13 keeps it).
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def pick_device(keeps_memory: bool = True) -> torch.device:
    """The GPU of this process if there is one, else the CPU.

    Args:
        keeps_memory: whether the process keeps a CPU's memory that it frees, as suits large networks, or
            gives it back at once, which bounds its peak.
    """
    if not torch.cuda.is_available():
        if keeps_memory:
            keep_freed_memory()
        else:
            give_back_freed_memory()
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def keep_freed_memory() -> None:
    """Lets this process keep memory that it frees, for the next step, instead of giving it back each time.

    On a CPU a training step takes and frees as much memory as the weights fill, and every fresh page costs a
    fault. Measured with 549 M parameters on two cores of a virtual machine: 3.8 s instead of 4.8 s for
    forward and backward, at the same peak. It asks glibc by `mallopt`; elsewhere it does nothing.
    """
    _mallopt({-1: -1, -4: 0})  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h


def give_back_freed_memory() -> None:
    """Lets this process give large pieces of memory back as soon as they are freed.

    By default glibc keeps pieces of up to 32 MB once some were freed, with the gaps between them, and the
    heap of a long job grows, now and then, where nothing fits any more. Measured while 96 clips of 16×256²
    were scored with I3D: 1.3 to 1.6 GB at the peak, differently in each run. If pieces are given back from
    16 MB: 0.85 GB for 13 % more time of the processor; from 1 MB: 0.58 GB for 60 % more. Elsewhere than with
    glibc it does nothing.
    """
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX of malloc.h
    _mallopt({-3: 16 * 2**20, -1: 256 * 2**20, -4: 65536, -8: 1})


def release_freed_memory() -> None:
    """Gives the pages that lie free in the heap back, now and then, where `keep_freed_memory` keeps them.

    A long job's heap grows by the gaps in it. Giving each piece back as it is freed bounds that, too, but
    makes sampling a long video of 32×32 take twice the time. Elsewhere than with glibc it does nothing.
    """
    trim = _from_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _mallopt(options: dict[int, int]) -> None:
    mallopt = _from_libc("mallopt")
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def _from_libc(name: str) -> Callable[..., object] | None:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def compile_in_place(modules: Iterable[nn.Module]) -> None:
    """Compiles the calls of modules by `torch.compile`, at the first call and anew for other shapes.

    The modules stay what they are: the names of their weights don't change, and deep copies (moving averages)
    aren't compiled.

    Raises:
        ValueError: if there is neither a GPU nor a C++ compiler to compile for the CPU.
    """
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in compilers):
        raise ValueError(
            f"machine.compile=true needs a C++ compiler on a machine without a GPU, and none of "
            f"{', '.join(compilers)} is on the PATH; install one (apt-get install g++), or use "
            "machine.compile=false"
        )
    # The adversarial autoencoder differentiates one graph twice, to balance its losses at the last layer.
    from torch._functorch import config

    config.donated_buffer = False
    for module in modules:
        module.compile()


Convolution = Callable[[Tensor, Tensor, Size3d], Tensor]

# Kernel and stride of the convolutions that the networks use: the autoencoder's two, and the U-Net's, which
# is computed frame by frame.
CHECKED_CONVOLUTIONS: dict[str, tuple[Size3d, Size3d]] = {
    "3x3x3": ((3, 3, 3), (1, 1, 1)),
    "4x4x4 of stride 2": ((4, 4, 4), (2, 2, 2)),
    "(1,3,3) folded": ((1, 3, 3), (1, 1, 1)),
}
# Rounding the result to bfloat16 costs at most 2^-8 of it; a faulty kernel is wrong by as much as the result.
CONVOLUTION_TOLERANCE = 0.02
# The numbers in the input at which the fault was reported, 16 channels of 124 frames of 1282×722.
FAULTY_SIZE = 16 * 124 * 1282 * 722
# A clip in the widest layers of the autoencoder at full size: channels and (t, h, w).
CHECKED_CLIP = (64, 16, 256, 256)


def check_half_precision(device: torch.device, precision: str) -> None:
    """Checks the convolutions of a GPU in the precision that it shall compute in; takes about a second.

    The input has the size of the reported fault or, on a GPU that can't hold it, fills a quarter of its free
    memory. Nothing is done on a CPU or in single precision.

    Raises:
        ValueError: as `check_convolutions` does.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if device.type != "cuda" or dtype is None:
        return
    room = torch.cuda.mem_get_info(device)[0] // (4 * dtype.itemsize)
    clips = max(1, min(FAULTY_SIZE, room) // math.prod(CHECKED_CLIP))
    check_convolutions(device, dtype, (clips, *CHECKED_CLIP))
    torch.cuda.empty_cache()


def networks_convolution(x: Tensor, weight: Tensor, stride: Size3d) -> Tensor:
    """The unpadded convolution of `b c t h w` as the networks compute it: 2-D if it stays inside frames."""
    if weight.shape[2] > 1:
        return F.conv3d(x, weight, None, stride)
    frames = F.conv2d(rearrange(x, "b c t h w -> (b t) c h w"), weight[:, :, 0], None, stride[1:])
    return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])


@torch.no_grad()
def check_convolutions(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    convolution: Convolution = networks_convolution,
) -> None:
    """Compares convolutions of a large batch in half precision with those of its clips in single precision.

    cuDNN 9.10.2 computes 3-D convolutions of large inputs in bfloat16 silently wrong (PyTorch issue 163539).
    Both sides get the same rounded numbers, so that they may differ by the rounding of the result alone.

    Args:
        device: where.
        dtype: the half precision.
        shape: of the input, (b, c, t, h, w).
        convolution: what is checked, of (x, weight, stride), without padding.

    Raises:
        ValueError: naming the convolution, its error and the tolerance, cuDNN's version and the remedy.
    """
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=draw, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    for name, (kernel, stride) in CHECKED_CONVOLUTIONS.items():
        weight = torch.randn(shape[1], shape[1], *kernel, generator=draw, device=device)
        weight = (weight / weight[0].numel() ** 0.5).to(dtype)
        actual = convolution(x, weight, stride)
        errors, largest = [], []
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            for clip, result in zip(x.split(1), actual.split(1), strict=True):
                expected = networks_convolution(clip.float(), weight.float(), stride)
                errors.append((result.float() - expected).abs().max())
                largest.append(expected.abs().max())
        error = float(torch.stack(errors).max() / torch.stack(largest).max())
        if not error <= CONVOLUTION_TOLERANCE:
            raise ValueError(
                f"the {name} convolution of {shape} in {str(dtype).removeprefix('torch.')} on {device} "
                f"differs from single precision by {error:.2g} of its largest value (tolerance "
                f"{CONVOLUTION_TOLERANCE}): cuDNN {torch.backends.cudnn.version()} computes it wrongly. Use "
                "machine.precision=no, or upgrade to a PyTorch with cuDNN 9.15 or later"
            )
