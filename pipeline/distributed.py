"""Who this process is among the ranks of a run, and what ranks say to each other.

The CUDA and NCCL branches have not been run on a GPU yet; CPU with gloo is what the tests exercise.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import LocalUserError, UserError
from pipeline.machine import available_cores, keep_freed_memory

PATIENCE = timedelta(hours=1)  # for another rank: rank 0 may be indexing a large data set for the first time


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and talks to the user."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """CPU cores of this machine that fall to this rank."""
        return max(1, available_cores() // self.local_size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tensor` over all ranks (a new tensor, the same on each)."""
        total = tensor.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value` (picklable), by rank, on each rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0 and return its result, or raise its `UserError`, on every rank."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [make()]
            except UserError as error:
                outcome = [error]
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank rank 0's buffers (batch-norm statistics)."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


def average_in_rank_order(size: int, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook: average gradients over `size` ranks, adding them in the order of the ranks.

    An all-reduce adds in an order that depends on an element's place in its bucket, and DDP regroups its buckets after
    a process's first step, so that with three ranks or more a resumed run would differ in the last bit.
    """
    parts = [torch.empty_like(bucket.buffer()) for _ in range(size)]
    dist.all_gather(parts, bucket.buffer())
    total = parts[0]
    for part in parts[1:]:
        total += part
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(total.div_(size))
    return future


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Join the ranks that torchrun's environment names, or stand alone without it.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is a GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not os.environ.keys() >= {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        raise UserError(
            "WORLD_SIZE is set, but not the rest of torchrun's environment: start with torchrun, or unset it"
        )
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = World(rank, local_rank, size, local_size, _device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(world.cores)  # torchrun would leave one thread a rank
        keep_freed_memory()
    if size > 1:
        if world.device.type == "cuda":
            dist.init_process_group("nccl", device_id=world.device, timeout=PATIENCE)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
    failed = True
    try:
        yield world
        failed = False
    finally:
        # After a failure the other ranks may be waiting in a collective, and NCCL would wait with them.
        if size > 1 and not (failed and world.device.type == "cuda"):
            # Free the group's last users first: a gloo thread that outlives the interpreter aborts the process.
            gc.collect()
            dist.destroy_process_group()


def set_precision(precision: str) -> None:
    """Let float32 convolutions use TF32 on GPUs only for "tf32": PyTorch's default is to."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise LocalUserError(
            f"rank {local_rank} of this machine has no GPU ({torch.cuda.device_count()} found): "
            "start one process a GPU, or choose the device cpu"
        )
    return torch.device("cuda", local_rank)
