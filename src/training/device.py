"""Which device, how many processes, what precision."""

import os
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

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
        ValueError: for an unknown precision or a batch that doesn't divide.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown machine.precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
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
    return accelerator, micro_batch_size


def pick_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
