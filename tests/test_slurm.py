"""Trainings on a real SLURM, interrupted in every way that SLURM has: each ends with the bits of torchrun's.

They run where `SLURM_CONF` names the cluster that ``tests/slurm/cluster up`` starts, which .ci/run does.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, REPOSITORY, run_module, run_torchrun

from launch.records import read_events, read_job
from tools.lab.chaos import same_bits
from tools.lab.images import write_images

CLUSTER = Path("/tmp/slurm-for-tests")

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("SLURM_CONF") != str(CLUSTER / "slurm.conf"), reason="tests/slurm/cluster is not up"
    ),
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),  # one after the other: they share the cluster's nodes
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with images, and with `torchrun`: what a training of four processes of one machine ends with."""
    root = tmp_path_factory.mktemp("slurm")
    write_images(root / "images" / "train", classes=4, images=640, seed=0)
    write_images(root / "images" / "val", classes=4, images=64, seed=1)
    (root / "training.yaml").write_text(
        json.dumps(
            {
                "model": {"name": "densenet_bc22_k8"},
                "data": {"dir": str(root / "images"), "crop_size": 24, "resize_size": 26},
                "optim": {"epochs": 6, "batch_size": 32, "milestones": [3, 5]},
                "train": {"device": "cpu", "checkpoint_every": 5, "log_every": 5, "heartbeat_timeout": 600},
            }
        )
    )
    done = run_torchrun("pipeline.train", root / "training.yaml", "--run_dir", root / "torchrun", ranks=4)
    assert done.returncode == 0, done.stderr
    return root


def launch(*words: object) -> str:
    done = run_module("launch", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def submit(folder: Path, name: str, *words: object) -> Path:
    """Start the training of the folder on two nodes with two tasks each."""
    request = ["--nodes", 2, "--tasks-per-node", 2, "--cpus-per-task", 1, "--partition", "low", "--time", "00:30:00"]
    launch(folder / "training.yaml", "--run_dir", folder / name, *request, *words)
    return folder / name


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def wait_until(condition: Callable[[], object], run: Path) -> None:
    """Wait for `condition`; a requeued job need not wait the two minutes that SLURM makes it."""
    end = time.monotonic() + PATIENCE
    job = read_job(run).id
    while not condition():
        over = any(event.get("what") in ("done", "stopped") for event in read_events(run)[-1:])
        if (over and not condition()) or time.monotonic() > end:
            raise AssertionError(launch("status", run) + launch("logs", run)[-3000:])
        waits = slurm("squeue", "--noheader", "--jobs", job, "--format=%T %r") == "PENDING BeginTime"
        if waits and not ranks_of(run):  # or what is left of the last attempt would hold the run's lock
            time.sleep(5)  # SLURM refuses a start in the second in which it has ended the last one
            slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(0.2)


@contextlib.contextmanager
def held_at(run: Path, step: int) -> Iterator[list[int]]:
    """The run's ranks, stopped at that step or a little later until this is left: a test strikes before training ends."""

    def reached() -> bool:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        return bool(lines) and json.loads(lines[-1])["step"] >= step

    wait_until(reached, run)
    ranks = ranks_of(run)
    try:
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        assert len(ranks) == 4 and read_events(run)[-1]["event"] == "start", "training was faster than the test"
        yield ranks
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def starts(run: Path) -> int:
    return sum(event["event"] == "start" for event in read_events(run))


def assert_ends_as_torchrun(run: Path, at_least: int) -> None:
    wait_until(lambda: read_events(run)[-1]["event"] == "end" and read_events(run)[-1]["what"] != "again", run)
    assert read_events(run)[-1]["what"] == "done", launch("logs", run)[-3000:]
    assert starts(run) >= at_least
    assert same_bits(run, run.parent / "torchrun")
    status = launch("status", run)
    assert " done " in status and "6/6" in status


def ranks_of(run: Path, node: str = "node") -> list[int]:
    """Process ids of the run's tasks on nodes whose names begin so."""
    wanted = [f"SLURM_JOB_ID={read_job(run).id}".encode(), b"SLURM_PROCID=", f"SLURMD_NODENAME={node}".encode()]
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words, command = (entry / "environ").read_bytes().split(b"\0"), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if (
            all(any(word.startswith(want) for word in words) for want in wanted)
            and b"launch.rank" in command
            and not command.startswith(b"srun")
        ):
            found.append(int(entry.name))
    return found


def test_two_nodes_train_as_torchrun_does(folder):
    assert_ends_as_torchrun(submit(folder, "whole"), at_least=1)


def test_each_rank_has_the_cores_that_it_is_bound_to_and_no_other_divides_them(tmp_path):
    """Cores and threads as the ranks end up with them. A machine with two cores cannot show more than one a rank:
    test_gpu_start.py has 12 of 96."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, torch\n"
        "from pipeline.distributed import init_distributed\n"
        "for torchs, slurms in dict(RANK='PROCID', WORLD_SIZE='NTASKS', LOCAL_RANK='LOCALID').items():\n"
        "    os.environ[torchs] = os.environ[f'SLURM_{slurms}']\n"
        "os.environ.update(LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29417')\n"
        "with init_distributed('cpu') as world:\n"
        "    mask, threads = sorted(os.sched_getaffinity(0)), torch.get_num_threads()\n"
        "    print(json.dumps([os.environ['SLURMD_NODENAME'], mask, world.cores, threads]))\n"
    )
    request = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=1", "--partition=low", "--exclusive"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = ["srun", *request, sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(ranks) == 4, done.stderr
    for node in ("node1", "node2"):
        masks = [mask for name, mask, _, _ in ranks if name == node]
        assert len(masks) == 2 and not set(masks[0]) & set(masks[1])
    assert all(cores == threads == len(mask) for _, mask, cores, threads in ranks)


def test_a_killed_rank(folder):
    run = submit(folder, "killed")
    with held_at(run, 20) as ranks:
        assert [len(os.sched_getaffinity(pid)) for pid in ranks] == [1] * 4  # SLURM has bound each to its own core
        os.kill(ranks[-1], signal.SIGKILL)
    assert_ends_as_torchrun(run, at_least=2)


def test_a_requeue_by_hand(folder):
    run = submit(folder, "requeued")
    with held_at(run, 20):
        slurm("scontrol", "requeue", read_job(run).id)
    assert_ends_as_torchrun(run, at_least=2)


def test_two_warnings_of_the_time_limit(folder):
    """As SLURM gives them, but at a step that does not depend on how fast this machine is."""
    run = submit(folder, "timed-out")
    for _ in range(2):
        before = starts(run)
        with held_at(run, 20 * before):
            slurm("scancel", "--signal=USR2", read_job(run).id)
        wait_until(lambda: starts(run) > before, run)  # noqa: B023
    assert_ends_as_torchrun(run, at_least=3)


def test_signals_while_ranks_start_do_not_count_as_failures(folder):
    """Three failures would stop the run for good."""
    run = submit(folder, "struck-early")
    for number, name in enumerate(["USR2", "TERM", "USR1", "USR2"], start=1):
        wait_until(lambda: starts(run) == number, run)  # noqa: B023
        slurm("scancel", f"--signal={name}", read_job(run).id)
    assert_ends_as_torchrun(run, at_least=5)
    assert "while starting" in launch("logs", run)
    causes = {event["cause"] for event in read_events(run) if event["event"] == "end"}
    assert causes <= {"preempted", "interrupted", "complete"}


def test_a_request_that_sbatch_refuses_leaves_nothing(folder):
    words = [folder / "training.yaml", "--run_dir", folder / "refused" / "run", "--partition", "nowhere"]
    done = run_module("launch", *words)
    assert done.returncode == 2 and "sbatch refuses the job: " in done.stderr, done.stderr
    assert not (folder / "refused" / "jobs").exists() and not (folder / "refused" / "run" / "submitted.yaml").exists()


def test_a_preemption(folder):
    run = submit(folder, "preempted")
    with held_at(run, 20):
        slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    wait_until(lambda: starts(run) >= 2, run)
    assert_ends_as_torchrun(run, at_least=2)


def test_a_lost_node(folder):
    """All that runs on it is killed at once: SLURM's daemon, its keeper of the job's step, and the ranks."""
    run = submit(folder, "lost-node")
    with held_at(run, 20):
        ranks = ranks_of(run, "node2")
        keepers = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in ranks}
        assert len(ranks) == 2 and all("slurmstepd" in Path(f"/proc/{pid}/cmdline").read_text() for pid in keepers)
        for pid in (int((CLUSTER / "slurmd-node2.pid").read_text()), *keepers, *ranks):
            os.kill(pid, signal.SIGKILL)
    try:
        wait_until(lambda: "down" in slurm("sinfo", "--noheader", "--nodes=node2", "--format=%t"), run)
    finally:
        subprocess.run([REPOSITORY / "tests" / "slurm" / "cluster", "node-up", "node2"], check=True)
    assert_ends_as_torchrun(run, at_least=2)


def test_an_array_of_two_runs(folder):
    request = ["--nodes", 1, "--tasks-per-node", 1, "--cpus-per-task", 1]
    words = ["--run_dir", folder / "array", "--grid", "optim.lr=0.1,0.05", "--optim.epochs", 2, "--optim.milestones", 1]
    launch(folder / "training.yaml", *request, *words)
    runs = [folder / "array-lr0.1", folder / "array-lr0.05"]
    assert [read_job(run).id.split("_")[1] for run in runs] == ["0", "1"]
    for run in runs:
        wait_until(lambda: read_events(run)[-1]["event"] == "end", run)  # noqa: B023
        assert read_events(run)[-1]["what"] == "done"
    assert launch("status", folder).count("array-lr") == 2


def test_cancel_and_resume(folder):
    run = submit(folder, "cancelled")
    with held_at(run, 20):
        launch("cancel", run)
    wait_until(lambda: " cancelled " in launch("status", run), run)
    assert slurm("squeue", "--noheader", "--jobs", read_job(run).id, "--format=%T") == ""
    launch("resume", run)
    assert_ends_as_torchrun(run, at_least=2)


def test_a_mistake_is_not_tried_again(folder):
    run = submit(folder, "mistaken", "--optim.lr", 1e6)
    wait_until(lambda: read_events(run)[-1]["event"] == "end", run)
    assert read_events(run)[-1]["what"] == "stopped" and "loss is not finite" in read_events(run)[-1]["message"]
    assert "the loss is not finite" in launch("status", run)
