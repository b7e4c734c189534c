"""G5: several processes."""

import multiprocessing
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed import World, data_parallel
from pipeline.precision import set_tf32
from tools.support.gpu_checks.check import Finding, Setting, Skipped, require
from tools.support.gpu_checks.networks import FLOAT32, distance, own_network, some_images, step


def process_groups(setting: Setting) -> Finding:
    """NCCL (on CPU gloo) with a gloo group beside it, in a world of one."""
    backend = "nccl" if setting.on_gpu else "gloo"
    bound: dict[str, Any] = dict(device_id=setting.device) if setting.on_gpu else {}
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **bound)
    try:
        side: Any = dist.new_group(backend="gloo")
        ours, hosts = torch.ones(3, device=setting.device), torch.ones(3)
        dist.all_reduce(ours)
        dist.all_reduce(hosts, group=side)
        require(ours.sum().item() == hosts.sum().item() == 3, "sums over one rank are wrong")
    finally:
        dist.destroy_process_group()
    return Finding(f"{backend} and gloo")


def two_ranks(setting: Setting) -> Finding:
    """Two ranks on one device average their gradients as one process does that computes both halves."""
    # Who has used a GPU, or autograd's threads, cannot fork: a server that has only loaded torch does it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [context.Process(target=one_of_two_ranks, args=(rank, setting)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(max(1.0, setting.deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    require(codes == [0, 0], f"the ranks ended with {codes}")
    found = [torch.load(setting.folder / f"rank{rank}.pt", map_location=setting.device) for rank in range(2)]
    halves = []
    for rank in range(2):
        halves.append(step(own_network(setting, "eager"), half_of(setting, rank))["gradients"])
    expected = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    far = distance(found[0], expected)
    require(all(map(torch.equal, *found)), "the ranks have different gradients")
    require(far < FLOAT32, f"the ranks' gradients are {far:.1e} off")
    return Finding(f"gradients {far:.1e} from one process's")


def half_of(setting: Setting, rank: int) -> tuple[Tensor, Tensor]:
    images, labels = some_images(setting)
    return images[rank::2], labels[rank::2]


def one_of_two_ranks(rank: int, setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.set_device(setting.device)
    else:
        torch.set_num_threads(1)
    set_tf32("fp32")
    store = dist.FileStore(str(setting.folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    network = data_parallel(own_network(setting, "eager"), World(rank, rank, 2, 2, setting.device))
    torch.save(step(network, half_of(setting, rank))["gradients"], setting.folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def lost_rank(setting: Setting) -> Finding:
    """A rank that is killed: the others leave with 75. Two GPUs are needed, and this command is for one."""
    raise Skipped("`fit` takes two ranks on two GPUs only; on CPU python -m tools.lab.chaos kills ranks")
