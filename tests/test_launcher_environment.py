"""What launchers leave in the environment, whole and in parts, and the cores that fall to a rank."""

import pytest

from pipeline.distributed import init_distributed, share_of_cores
from pipeline.errors import LocalUserError

NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
)  # fmt: skip
WHOLE = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="9")


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def set_to(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1, but RANK is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0, but RANK is not set"),
        ({**WHOLE, "MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({**WHOLE, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": None}, "LOCAL_WORLD_SIZE is not set"),
        ({**WHOLE, "RANK": "one"}, "RANK is 'one', which is no number"),
        ({**WHOLE, "RANK": "-1"}, "RANK is '-1', which is no number"),
        ({**WHOLE, "WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0', which is no number"),
        ({**WHOLE, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', which is no number"),
        ({**WHOLE, "RANK": "2"}, "RANK is 2, but WORLD_SIZE only 2"),
        ({**WHOLE, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE only 2"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3, but WORLD_SIZE only 2"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, "srun has started 4 processes .*python -m launch"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes"),
        ({"PMI_SIZE": "8"}, "mpiexec has started 8 processes"),
    ],
)
def test_a_part_of_an_environment_is_refused_in_one_line(environment, values, expected):
    environment(values)
    with pytest.raises(LocalUserError, match=expected) as failure, init_distributed("cpu"):
        pass
    assert len(str(failure.value).splitlines()) == 1


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "", "RANK": ""},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # in the script of a job, or its shell
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {
            "WORLD_SIZE": "1",
            "RANK": "0",
            "SLURM_STEP_NUM_TASKS": "4",
        },  # torchrun with one process in each of four tasks
    ],
)
def test_a_process_alone_trains_alone(environment, values):
    environment(values)
    with init_distributed("cpu") as world:
        assert (world.rank, world.local_rank, world.size, world.local_size) == (0, 0, 1, 1)
        assert world.cores >= 1


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ([list(range(12 * rank, 12 * rank + 12)) for rank in range(8)], 12),  # SLURM has bound each of 8 ranks
        ([list(range(96))] * 8, 12),  # torchrun has not
        ([list(range(12))] * 8, 1),  # all in one cgroup of 12
        ([[0]] * 8, 1),
        ([list(range(6))] * 3, 2),
    ],
)
def test_a_rank_has_its_share_of_the_cores_that_it_may_use(masks, expected):
    one = [("node1", mask) for mask in masks]
    two = one + [("node2", list(range(96)))] * 8
    for ranks in (one, two):
        assert all(share_of_cores(rank, ranks) == expected for rank in one)
