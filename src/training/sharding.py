"""A network spread over processes, each with a part of every weight (fully sharded data parallelism, FSDP).

A sharded module computes what the whole one does: weights are gathered block by block while they are needed.
What is written to disk is whole, so that a run can go on sharded or not, on any number of processes.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Parameters that are gathered together: a larger block is taken apart, a smaller one stays with the rest.
SMALLEST_BLOCK, LARGEST_BLOCK = 100_000, 40_000_000


def shard(module: nn.Module, accelerator: Accelerator, *, trained: bool) -> None:
    """Spreads a module's parameters over all processes, in place; buffers stay whole.

    Args:
        module: on the processes' devices, the same everywhere.
        accelerator: of the run; a trained module computes in its precision.
        trained: whether it is trained, or only an average of what is.
    """
    # Imported where something is sharded: half a second that no other run need wait.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Nothing here writes into what a network returns.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for parameter in module.parameters():  # a part is a piece of memory
        parameter.data = parameter.data.contiguous()
    for block in _blocks(module):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if trained and accelerator.mixed_precision != "no":
        module.forward = convert_outputs_to_fp32(_autocast(module.forward, accelerator))


def check_sharding(accelerator: Accelerator) -> None:
    """Raises ValueError with one process, or with fp16, whose loss scale would have to hear of every part."""
    if accelerator.num_processes < 2:
        raise ValueError(
            "machine.fsdp=true shards a network over processes, and there is one; launch with torchrun "
            "--standalone --nproc_per_node N -m src.train …, or use machine.fsdp=false"
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "machine.fsdp=true doesn't go with machine.precision=fp16; use bf16 or no, or machine.fsdp=false"
        )


def _autocast(forward: Callable[..., Any], accelerator: Accelerator) -> Callable[..., Any]:
    def mixed(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    return mixed


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules inside this one that are called as a whole and aren't too large to be gathered."""
    for child in module.children():
        size = sum(parameter.numel() for parameter in child.parameters())
        if size < SMALLEST_BLOCK:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or (size > LARGEST_BLOCK and [*child.children()]):
            yield from _blocks(child)
        else:
            yield child


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are spread over processes, all of which must then call it together."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and isinstance(module, loaded.FSDPModule)


def _is_part(tensor: Tensor) -> "TypeGuard[DTensor]":
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together; for a sharded one all processes must ask."""
    return tensor.full_tensor() if _is_part(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory and without gradients; else the tensor."""
    if not _is_part(tensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part.detach()


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole value as ``like`` is spread over processes, without asking any of them."""
    if not _is_part(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    moved = value.to(like.device).contiguous()
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def whole_weights(module: nn.Module, halve: bool = False) -> dict[str, Tensor]:
    """A module's state dict, whole, contiguous and on the CPU; for a sharded one all processes must ask.

    With ``halve`` floating-point numbers are in half precision.
    """
    weights = {}
    for name, value in module.state_dict().items():
        put_together = whole(value.detach())
        if halve and put_together.is_floating_point():
            put_together = put_together.half()
        weights[name] = put_together.cpu().contiguous()
    return weights
