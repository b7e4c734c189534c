"""Who this process is among the ranks of a run, and what ranks say to each other.

CPU with gloo is what the tests exercise. NCCL has been run with one rank, not between GPUs.
"""

import dataclasses
import functools
import gc
import inspect
import itertools
import math
import os
import signal
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import (
    InterruptedRunError,
    LocalUserError,
    LostContactError,
    StorageError,
    UserError,
    first_line,
    is_out_of_memory,
)
from pipeline.machine import (
    ask_for_signal_when_parent_dies,
    available_cores,
    keep_freed_memory,
    network_interfaces,
    present_gpus,
    usable_cores,
)

PATIENCE = timedelta(hours=1)  # for another rank: rank 0 may be indexing a large data set for the first time


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run.

    Attributes:
        hosts: the group through which the ranks' hosts talk, so that no GPU is waited for; None alone.
        store: what every rank can read and write without the others; None alone.
        share_of_cores: see the function of that name; None before the ranks have met.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    share_of_cores: int | None = None

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and talks to the user."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """CPU cores of this machine that fall to this rank."""
        return self.share_of_cores or max(1, available_cores() // self.local_size)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tensor` over all ranks (a new tensor, the same on each)."""
        total = tensor.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """Return the largest that any rank gives, place by place. Waits for the hosts of all ranks, for no GPU."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.hosts)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value` (picklable), by rank, on each rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def gather_to_rank0(self, value: Any) -> list[Any]:
        """Return every rank's `value` (picklable), by rank, on rank 0, and an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.hosts)
        return values or []

    def broadcast_from_rank0(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0 and return its result, or raise its `UserError` or `InterruptedRunError`, on every rank."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [make()]
            except UserError as error:
                outcome = [UserError(str(error))]  # of its subclasses some do not pickle, and rank 0 speaks for all
            except InterruptedRunError as error:
                outcome = [InterruptedRunError(str(error))]
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.hosts)
        if isinstance(outcome[0], UserError | InterruptedRunError):
            raise outcome[0]
        return outcome[0]

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank rank 0's buffers (batch-norm statistics)."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


class Agreement:
    """The largest values that any rank gives, place by place, as of the call before: no rank waits for another.

    The ranks' hosts exchange the values while the devices compute. Alone, a rank has its own values at once.
    """

    def __init__(self, world: World):
        self._world = world
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, values: Sequence[int]) -> list[int]:
        """Give this rank's values; return the largest that were given at the call before, zeros at first.

        Every rank must call this at the same places.
        """
        if self._world.size == 1:
            return list(values)
        before = self._pending
        tensor = torch.tensor(values)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._world.hosts, async_op=True)
        assert work is not None  # this rank is in the group
        self._pending = work, tensor
        if before is None:
            return [0] * len(values)
        before[0].wait()
        return before[1].tolist()


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
def init_distributed(device: str = "auto") -> Iterator[World]:
    """Join the ranks that torchrun's environment names, or stand alone without it.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is a GPU.
    """
    rank, local_rank, size, local_size = _ranks_of_environment()
    world = World(rank, local_rank, size, local_size, choose_device(device, local_rank))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # of a program that has not called `exit_when_asked`
        ask_for_signal_when_parent_dies(signal.SIGTERM)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        # In autograd's thread, to which torch then gives one: it said so at the start of each run on an H200.
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    if size > 1:
        world = dataclasses.replace(world, **_meet(world))
        mine = socket.gethostname(), usable_cores()
        world = dataclasses.replace(world, share_of_cores=share_of_cores(mine, world.gather(mine)))
    if world.device.type == "cpu":
        torch.set_num_threads(world.cores)  # torchrun would leave one thread a rank
        keep_freed_memory()
    failed = True
    try:
        with lost_contact_named(world):
            yield world
        failed = False
    except InterruptedRunError as error:
        failed = isinstance(error, LostContactError | StorageError)  # else all ranks have agreed to leave together
        raise
    finally:
        # After a failure the other ranks may be waiting in a collective, and NCCL would wait with them: a command of ours
        # then ends without the group's end (command.py).
        if size > 1 and not (failed and world.device.type == "cuda"):
            # Free the group's last users first: a gloo thread that outlives the interpreter aborts the process.
            gc.collect()
            dist.destroy_process_group()


@contextmanager
def lost_contact_named(world: World) -> Iterator[None]:
    """Raise what a rank meets in a collective, when another has ended, as what it is.

    Raises:
        LostContactError: that.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or is_out_of_memory(error):
            raise
        if _lacks_shared_memory(error):
            remedy = "start the container with more of it (docker run --ipc=host)"
            raise LocalUserError(f"NCCL fails on rank {world.rank}: {_reason(error)}: {remedy}") from None
        if _is_lost_contact(error):
            raise LostContactError(
                f"rank {world.rank} has lost contact to another rank, whose own message or torchrun's report says why "
                f"({_reason(error)})"
            ) from None
        raise


def share_of_cores(mine: tuple[str, list[int]], all_ranks: list[tuple[str, list[int]]]) -> int:
    """CPU cores that fall to a rank, when each core is divided among the ranks that may use it.

    Ranks of torchrun may all use all cores of their machine; SLURM can bind each to cores of its own.

    Args:
        mine: the rank's host, and the numbers of the cores that it may use.
        all_ranks: the same of every rank, this one included.
    """
    host, cores = mine
    users = Counter(core for other, theirs in all_ranks if other == host for core in theirs)
    return max(1, math.floor(sum(1 / users[core] for core in cores) + 1e-9))


_ALONE = "unset it to train in one process, or start with torchrun or python -m launch"
_OTHER_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


def _ranks_of_environment() -> tuple[int, int, int, int]:
    """Rank, rank on this machine, number of ranks, and number on this machine, as torchrun's variables name them.

    Raises:
        LocalUserError: they are incomplete or contradict each other.
    """
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if name not in missing and not os.environ[name].strip().isdecimal():
            raise LocalUserError(f"{name} is '{os.environ[name]}', which is no number from 0 on: {_ALONE}")
    numbers = {name: int(os.environ[name]) for name in needed[:4] if name not in missing}
    if numbers.get("WORLD_SIZE", 1) == 1 and not numbers.get("RANK") and not numbers.get("LOCAL_RANK"):
        for name, launcher in _OTHER_LAUNCHERS.items():
            tasks = os.environ.get(name, "1")
            if "WORLD_SIZE" in missing and tasks.isdecimal() and int(tasks) > 1:
                raise LocalUserError(
                    f"{launcher} has started {tasks} processes ({name}), each of which would train alone: use "
                    f"python -m launch, start torchrun once a machine, or unset {name} to train in this one"
                )
        return 0, 0, 1, 1
    if missing:
        present = next(name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in numbers)
        raise LocalUserError(f"{present} is {numbers[present]}, but {missing[0]} is not set: {_ALONE}")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        if numbers[rank] >= numbers[size] + (rank == "LOCAL_WORLD_SIZE"):
            raise LocalUserError(f"{rank} is {numbers[rank]}, but {size} only {numbers[size]}: {_ALONE}")
    return numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_WORLD_SIZE"]


_MEETINGS = itertools.count()  # of this process, as many as of each other rank


@functools.cache
def _rendezvous(*_: int | str) -> dist.Store:
    """The store of the ranks that the environment names."""
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    return store


def _meet(world: World) -> dict[str, Any]:
    """Wait for the other ranks; return the store and the hosts' group."""
    interface = None if "GLOO_SOCKET_IFNAME" in os.environ else gloo_interface(world.size > world.local_size)
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    # A program may meet again, for another run or an evaluation: in the same store, which rank 0 or torchrun keeps.
    address = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    store = dist.PrefixStore(f"meeting {next(_MEETINGS)}", _rendezvous(world.rank, world.size, *address))
    options: dict[str, Any] = dict(store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    if world.device.type == "cuda":
        refuse_shared_gpus(world, store)
        dist.init_process_group("nccl", device_id=world.device, **options)
        return dict(store=store, hosts=dist.new_group(backend="gloo", timeout=PATIENCE))
    dist.init_process_group("gloo", **options)
    return dict(store=store, hosts=dist.group.WORLD)


def gloo_interface(several_machines: bool) -> str | None:
    """The network interface for gloo; None to let it take the one of the host's name.

    That is NCCL's, if the environment names one. Otherwise it is the one that reaches the rendezvous, where ranks are on
    several machines and the host's name is an address of this machine alone (as Debian's /etc/hosts has it).
    """
    interfaces = network_interfaces()
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if wanted:
        return next(iter(_named_as_nccl_does(wanted, list(interfaces))), None)
    if not several_machines or not _is_loopback_name(socket.gethostname()):
        return None
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing, but chooses a route
        address = probe.getsockname()[0]
        return next((name for name, own in interfaces.items() if own == address and not own.startswith("127.")), None)
    return None


def _named_as_nccl_does(wanted: str, interfaces: list[str]) -> list[str]:
    """Those of `interfaces` that NCCL_SOCKET_IFNAME names: prefixes between commas, whole names after =, others than those
    after ^ (then neither loopback nor Docker's, which NCCL takes last)."""
    excluded, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    names = [name for name in wanted.lstrip("^=").split(",") if name]

    def is_named(interface: str) -> bool:
        return interface in names if exact else interface.startswith(tuple(names))

    if excluded:
        return [name for name in interfaces if not is_named(name) and not name.startswith(("lo", "docker"))]
    return [name for name in interfaces if is_named(name)]


def _is_loopback_name(host: str) -> bool:
    try:
        return all(
            info[4][0] in ("::1",) or str(info[4][0]).startswith("127.") for info in socket.getaddrinfo(host, None)
        )
    except OSError:  # the name is unknown
        return True


def refuse_shared_gpus(world: World, store: dist.Store) -> None:
    """Refuse two ranks on one GPU, which NCCL would tell in a traceback, if at all.

    Raises:
        UserError: names the ranks, on every rank.
    """
    store.set(f"GPU of rank {world.rank}", str(torch.cuda.get_device_properties(world.device).uuid))
    ranks: dict[bytes, list[int]] = {}
    for rank in range(world.size):
        ranks.setdefault(store.get(f"GPU of rank {rank}"), []).append(rank)
    for gpu, users in ranks.items():
        if len(users) > 1:
            raise UserError(
                f"ranks {', '.join(map(str, users))} have the same GPU ({gpu.decode()}): start one process a GPU, or choose "
                "--train.device cpu"
            )


def _reason(error: RuntimeError) -> str:
    """What NCCL says last, or the first line."""
    _, _, last = str(error).partition("Last error:")
    return next((line.strip() for line in last.splitlines() if line.strip()), first_line(error).split(". ")[0])


def _lacks_shared_memory(error: RuntimeError) -> bool:
    """Whether NCCL finds too little of it on this machine, which no other attempt mends. No GPU has run it: the words are those
    of NCCL 2.28's sources."""
    return "NCCL error" in str(error) and any(words in str(error) for words in ("shared memory segment", "/dev/shm"))


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether another rank's end, and nothing of this rank's own, is behind this exception."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def data_parallel(network: nn.Module, world: World) -> nn.Module:
    """Wrap a network for training on several ranks, whose gradients are averaged; alone it is returned as it is."""
    if world.size == 1:
        return network
    on_cpu = world.device.type == "cpu"
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    # Rank 0's batch-norm statistics count, as the first GPU's do in the Torch code.
    options: dict[str, Any] = {"forward_sync_buffers": False}
    if "forward_sync_buffers" not in known:  # torch before 2.13, which tools.gpu takes, though pyproject.toml does not
        options = {"broadcast_buffers": False}  # with this older word rank 0 sends none at the start either
        world.broadcast_buffers(network)
    if "batched_grad_copy" in known and not on_cpu:  # fewer launches: two a bucket instead of two a parameter
        options["batched_grad_copy"] = True
    parallel = DistributedDataParallel(
        network, device_ids=None if on_cpu else [world.device], gradient_as_bucket_view=True, **options
    )
    if on_cpu:
        parallel.register_comm_hook(world.size, average_in_rank_order)
    return parallel


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a rank. With one visible GPU that is its own: SLURM's --gpus-per-task hides the others.

    Args:
        name: "cpu", "cuda", or "auto" for CUDA where there is a GPU.

    Raises:
        LocalUserError: there is no GPU for the rank, or one that torch cannot use.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
        if present := [] if hidden else present_gpus():
            raise LocalUserError(
                f"torch {torch.__version__} cannot use this machine's GPU {present[0]} ({_cuda_failure()}): install a driver "
                "for its CUDA or a torch for the driver's, or choose --train.device cpu"
            )
        if name == "auto":
            return torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise LocalUserError(
            f"rank {local_rank} of this machine has no GPU ({count} found): start one process a GPU, or choose the device cpu"
        )
    return torch.device("cuda", index)


def is_usable(device: torch.device) -> bool:
    """Whether a device still computes, after an error: a kernel's wrong memory access spoils a GPU for the whole process."""
    try:
        return torch.ones(1, device=device).item() == 1  # waits for what was started before
    except Exception:  # the same error again, or one that follows from it
        return False


def _cuda_failure() -> str:
    """Why torch cannot use CUDA, in a few words."""
    if torch.version.cuda is None:
        return "it is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # of several types
        return first_line(error).rstrip(".")
    return f"it is built for CUDA {torch.version.cuda}"
