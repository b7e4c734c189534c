"""How a run starts and ends on GPUs, as far as a machine without one shows: torch.cuda is stubbed, nothing else."""

import os
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline import command, distributed
from pipeline.command import exit_on_user_error
from pipeline.config import DataConfig
from pipeline.data import loader
from pipeline.data.synthetic import synthetic_index
from pipeline.distributed import Agreement, World, gloo_interface, init_distributed, refuse_shared_gpus
from pipeline.errors import InterruptedRunError, LocalUserError, UserError
from pipeline.machine import network_interfaces, present_gpus
from pipeline.precision import choose_kernels, memory_format, set_tf32

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def rank_3_of_8(monkeypatch):
    """The environment of one of 8 ranks of a machine; the others are stubs."""
    ranks = dict(
        RANK="3", WORLD_SIZE="8", LOCAL_RANK="3", LOCAL_WORLD_SIZE="8", MASTER_ADDR="127.0.0.1", MASTER_PORT="9"
    )
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    ends = []
    monkeypatch.setattr(distributed, "_meet", lambda world: {})
    monkeypatch.setattr(World, "gather", lambda self, value: [value] * 8)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ends.append("destroyed"))
    return ends


def test_a_rank_that_slurm_has_bound_loads_with_all_of_its_cores(monkeypatch, rank_3_of_8):
    masks = [("node1", list(range(12 * rank, 12 * rank + 12))) for rank in range(8)]
    monkeypatch.setattr(distributed, "usable_cores", lambda: masks[3][1])
    monkeypatch.setattr(distributed.socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(World, "gather", lambda self, value: masks if value == masks[3] else None)
    threads = []
    monkeypatch.setitem(loader.IMAGE_PIPELINES, "synthetic", lambda work: threads.append(work.threads))
    with init_distributed("cpu") as world:
        assert world.cores == 12 and torch.get_num_threads() == 12
        shard = loader.Shard(world.rank, world.size, world.device, world.cores)
        loader.create_image_pipeline(synthetic_index(8, 2, 1, "x"), DataConfig(loader="synthetic"), shard, 1, 1)
    assert threads == [12]


INTERFACES = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.5", "eth1": "10.2.0.5", "ib0": "10.1.0.5"}


@pytest.mark.parametrize(
    ("nccl", "expected"),
    [
        ("ib", "ib0"),
        ("eth", "eth0"),
        ("=eth1", "eth1"),
        ("^eth", "ib0"),
        ("^=eth0", "eth1"),
        ("wl,ib0", "ib0"),
        ("wl", None),
    ],
)
def test_gloo_takes_the_interface_of_nccl(monkeypatch, nccl, expected):
    monkeypatch.setattr(distributed, "network_interfaces", lambda: INTERFACES)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", nccl)
    assert gloo_interface(several_machines=False) == expected


@pytest.mark.parametrize(
    ("host", "several", "expected"), [("127.0.1.1", True, "eth1"), ("127.0.1.1", False, None), ("10.2.0.5", True, None)]
)
def test_on_several_machines_gloo_takes_an_interface_that_others_can_reach(monkeypatch, host, several, expected):
    """Debian's /etc/hosts gives a machine's own name an address of the loopback."""
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "10.2.0.9")
    monkeypatch.setattr(distributed, "network_interfaces", lambda: INTERFACES)
    monkeypatch.setattr(distributed.socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", (host, 0))])

    class Probe:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def connect(self, address):
            assert address[0] == "10.2.0.9"

        def getsockname(self):
            return "10.2.0.5", 4711

    monkeypatch.setattr(distributed.socket, "socket", Probe)
    assert gloo_interface(several) == expected


def test_the_interfaces_of_this_machine():
    assert network_interfaces()["lo"] == "127.0.0.1"


def test_ranks_agree_a_step_later_and_wait_for_nobody(monkeypatch):
    """Another rank has given a 15 in the first step and nothing in the second, and its part arrives when it is waited for."""
    others, waited = iter([[0, 15], [1, 0], [0, 0]]), []

    def all_reduce(tensor, operation, group, async_op):
        assert operation == dist.ReduceOp.MAX and async_op
        theirs = torch.tensor(next(others))

        def wait():
            waited.append(theirs.tolist())
            tensor.copy_(torch.maximum(tensor, theirs))

        return types.SimpleNamespace(wait=wait)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    agreement = Agreement(World(0, 0, 2, 2, CPU))
    assert agreement.exchange([0, 2]) == [0, 0] and not waited
    assert agreement.exchange([0, 0]) == [0, 15] and waited == [[0, 15]]
    assert agreement.exchange([0, 0]) == [1, 0] and len(waited) == 2
    assert Agreement(World(0, 0, 1, 1, CPU)).exchange([0, 15]) == [0, 15]


@pytest.fixture
def tf32_flags():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("of_the_container", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_tf32_is_used_where_it_is_asked_for(tf32_flags, precision, of_the_container):
    """TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 of NVIDIA's containers starts torch with the flag of matrix products set."""
    torch.backends.cuda.matmul.allow_tf32 = of_the_container
    set_tf32(precision)
    assert torch.backends.cudnn.allow_tf32 == (precision == "tf32") and not torch.backends.cuda.matmul.allow_tf32


def test_tests_see_no_gpu():
    """Many start more ranks than a machine has GPUs, and compare bits."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and torch.cuda.device_count() == 0


@pytest.mark.parametrize(("asked", "device"), [("auto", CPU), ("channels_last", GPU), ("contiguous", CPU)])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_the_order_of_feature_maps_follows_device_and_precision(asked, device, precision):
    expected = torch.contiguous_format if asked == "contiguous" else torch.channels_last
    assert memory_format(asked, precision, device) == expected
    on_gpu = torch.contiguous_format if precision == "fp32" else torch.channels_last
    assert memory_format("auto", precision, GPU) == on_gpu


@pytest.fixture
def gpus(monkeypatch):
    def visible(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return visible


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 3, 3), (1, 3, 0), (1, 0, 0)])
def test_a_task_that_sees_one_gpu_takes_it(gpus, visible, local_rank, index):
    gpus(visible)
    assert distributed.choose_device("auto", local_rank) == torch.device("cuda", index)


def test_more_ranks_than_gpus_are_refused(gpus):
    gpus(2)
    with pytest.raises(LocalUserError, match="rank 2 of this machine has no GPU"):
        distributed.choose_device("cuda", 2)


def test_two_ranks_on_one_gpu_are_refused(monkeypatch):
    store = dist.HashStore()
    uuids = ["GPU-a", "GPU-b", "GPU-a"]
    for rank in (0, 1):
        store.set(f"GPU of rank {rank}", uuids[rank])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="GPU-a"))
    with pytest.raises(UserError, match=r"ranks 0, 2 have the same GPU \(GPU-a\)"):
        refuse_shared_gpus(World(2, 2, 3, 3, GPU), store)
    refuse_shared_gpus(World(0, 0, 2, 2, GPU), store)


@pytest.mark.parametrize(
    ("outcome", "destroyed"),
    [(None, True), (InterruptedRunError("all leave"), True), (RuntimeError("mine"), False), (UserError("bad"), False)],
)
def test_nccl_is_ended_by_ranks_that_leave_together_alone(monkeypatch, gpus, rank_3_of_8, outcome, destroyed):
    gpus(8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        with init_distributed("cuda"):
            if outcome:
                raise outcome
    except Exception as error:
        assert error is outcome
    assert rank_3_of_8 == ["destroyed"] * destroyed


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("bad"), 2), (InterruptedRunError("lost"), 75), (ValueError("bug"), 1)]
)
def test_a_failed_rank_that_leaves_a_process_group_ends_at_once(monkeypatch, capsys, error, code):
    """The group's end, which comes with the interpreter's, may wait for ranks that wait for this one."""

    class EndError(BaseException):
        pass

    def end(code):
        raise EndError(code)

    def fail():
        raise error

    monkeypatch.setattr(command.os, "_exit", end)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(EndError) as ended:
            exit_on_user_error(fail)
    finally:
        dist.destroy_process_group()
    assert ended.value.args == (code,) and str(error) in capsys.readouterr().err


@pytest.mark.parametrize("version", ["2.11", "2.14"])
def test_older_torch_sends_no_buffers_in_a_step_either(monkeypatch, version):
    built, sent = [], []

    class Older:
        def __init__(self, module, device_ids=None, broadcast_buffers=True, gradient_as_bucket_view=False):
            built.append(broadcast_buffers)

        def register_comm_hook(self, *_):
            pass

    class Newer(Older):
        def __init__(self, module, device_ids=None, gradient_as_bucket_view=False, forward_sync_buffers=None):
            built.append(forward_sync_buffers)

    monkeypatch.setattr(distributed, "DistributedDataParallel", Older if version == "2.11" else Newer)
    monkeypatch.setattr(World, "broadcast_buffers", lambda self, network: sent.append(network))
    distributed.data_parallel(nn.Linear(1, 1), World(0, 0, 2, 2, CPU))
    assert built == [False] and len(sent) == (version == "2.11")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(monkeypatch, tmp_path, device, gpus):
    gpus(0)
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(distributed, "present_gpus", lambda: present_gpus(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(
        LocalUserError, match=r"cannot use this machine's GPU .*/nvidia0 \(.*--train.device cpu"
    ) as failure:
        distributed.choose_device(device, 0)
    assert len(str(failure.value).splitlines()) == 1
    assert distributed.choose_device("cpu", 0) == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert distributed.choose_device("auto", 0) == CPU
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    os.unlink(tmp_path / "nvidia0")
    assert distributed.choose_device("auto", 0) == CPU


@pytest.mark.parametrize(("benchmark", "deterministic"), [(True, False), (False, False), (True, True)])
def test_kernels_are_chosen_as_asked(monkeypatch, benchmark, deterministic):
    """torch's setter, which imports a compiler, is a stub."""
    enabled = [False]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: enabled[-1])
    monkeypatch.setattr(torch, "use_deterministic_algorithms", enabled.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    choose_kernels(benchmark, deterministic)
    assert enabled[-1] == deterministic and len(enabled) == 1 + deterministic
    assert torch.backends.cudnn.benchmark == (benchmark and not deterministic)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    choose_kernels(benchmark, False)
    assert enabled[-1] is False  # of another run in the same process
