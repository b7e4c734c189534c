"""Launching without SLURM: what is asked for, what follows an end, and the local twin, really run and struck."""

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, override_flags, run_module, small_config
from test_trainer import assert_equal_weights, comparable_records, weights

from launch.__main__ import start
from launch.after import decide, end
from launch.cluster import Cluster, add_flags, read_cluster
from launch.estimate import estimate
from launch.records import Job, add_event, read_events, read_job, write_job
from pipeline.errors import ArgumentParser, UserError
from tools.lab.scaling import Machines, step_time


def cluster(*words: str) -> Cluster:
    parser = ArgumentParser()
    add_flags(parser)
    return read_cluster(parser.parse_args(words))


def test_a_sites_file_and_flags_that_win(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text(
        "{partition: gpu, gpus_per_node: 8, cpus_per_task: 12, setup: [module load cuda], sbatch: {reservation: a}}"
    )
    asked = cluster("--cluster", str(site), "--nodes", "4", "--time", "1-12:30:01", "--sbatch", "exclusive=user")
    assert (asked.kind, asked.partition, asked.ranks_per_node, asked.ranks) == ("slurm", "gpu", 8, 32)
    assert asked.minutes == 36 * 60 + 31 and asked.setup == ("module load cuda",)
    assert asked.sbatch == {"reservation": "a", "exclusive": "user"}
    assert cluster("--cluster", "local", "--tasks-per-node", "3").ranks == 3
    site.write_text("time: 24:00:00")  # which YAML takes for a number of base 60
    assert cluster("--cluster", str(site)).minutes == 24 * 60


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodes", "none"], "--nodes: Input should be a valid integer.*'none'"),
        (["--time", "2 days"], "--time: .*'2 days'"),
        (["--time", "0:02:00"], "warning_seconds 120 must be less than the time limit 0:02:00"),
        (["--sbatch", "exclusive"], "--sbatch exclusive: NAME=VALUE is needed"),
        (["--cluster", "nowhere.yaml"], "cannot read the cluster file nowhere.yaml .*local or slurm"),
        (["--cluster", "site.yaml"], "site.yaml: 'partiton' is not a known key \\(did you mean 'partition'"),
    ],
)
def test_mistakes_name_the_flag_or_the_key(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("site.yaml").write_text("partiton: gpu")
    with pytest.raises(UserError, match=expected):
        cluster(*words)


@pytest.mark.parametrize(
    ("code", "rank_codes", "ends", "expected"),
    [
        (0, [], [(0, "a")], "done"),
        (137, [75, None, 75], [(137, "a")], "again"),
        (137, [75, None, 75], [(137, "a"), (137, "b"), (137, "c")], "again"),
        (137, [75, None, 75], [(137, "a"), (137, "a"), (137, "a")], "stopped"),
        (137, [75, None, 75], [(137, "a"), (75, "a"), (137, "a"), (75, "a"), (137, "a")], "stopped"),
        (137, [], [(137, None)] * 3, "stopped"),
        (137, [], [(137, "a")] * 2, "again"),
        (75, [75, 75], [(75, "a")] * 9, "again"),
        (75, [75, 75], [(75, "a")] * 10, "stopped"),
        (75, [75, 75], [(75, "a")] * 9 + [(75, "b")], "again"),
        (137, [2, 137], [(137, "a")], "stopped"),
        (2, [2, 2], [(2, "a")], "stopped"),
    ],
)
def test_what_follows_an_end(code, rank_codes, ends, expected):
    assert decide(code, rank_codes, ends, failures=3)[0] == expected


def test_failures_before_a_run_was_submitted_again_do_not_count(tmp_path):
    write_job(tmp_path, Job("1", "local", "here", str(tmp_path), ranks=2, failures=3))
    what = []
    for submission in range(2):
        add_event(tmp_path, "submit", job=str(submission), cluster={})
        for number in range(3):
            add_event(tmp_path, "start", start=f"{submission}.{number}")
            what.append(end(tmp_path, 137))
    assert what == ["again", "again", "stopped"] * 2


def test_an_estimate_counts_what_a_start_can_use():
    time_ = estimate((900, 300), epochs=10, images_per_second=10, limit=320, warning=20)
    assert (time_.epoch, time_.run, time_.epochs_per_start, time_.starts) == (100, 1000, 3, 4)


def test_a_step_on_more_gpus_is_faster_but_less_efficient():
    machines = Machines(8, 200e9, 25e9, 1e-5, 0.02, 2000, 1e-9)
    times = [step_time(n, 256, 8_000_000, 1000, machines).total for n in (1, 2, 8, 64, 256)]
    assert times == sorted(times, reverse=True)
    assert all(256 * later > n * 0.02 for n, later in zip((1, 2, 8, 64, 256), times, strict=True))
    assert times[0] == pytest.approx(0.02 + 0.256, rel=0.05)


def local_words(config, *more: object) -> list[str]:
    words = ["configs/demo.yaml", *override_flags(config), "--cluster", "local", "--tasks-per-node", 2, *more]
    return [str(word) for word in words]


def wait_for(condition, patience: float = 120) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_the_local_twin_starts_a_struck_run_again_and_ends_as_torchrun_does(tmp_path):
    optim = {"epochs": 6, "milestones": [3]}
    twin, torchrun = (small_config(tmp_path / name, optim=optim) for name in ("twin", "torchrun"))
    done = run_module("pipeline.train", "configs/demo.yaml", *override_flags(torchrun), ranks=2)
    assert done.returncode == 0, done.stderr
    done = run_module("launch", *local_words(twin, "--train.checkpoint_every", 1))
    assert done.returncode == 0 and f"job {read_job(Path(twin.run_dir)).id}: {twin.run_dir}" in done.stdout, done.stderr
    run = Path(twin.run_dir)
    wait_for(lambda: (run / "checkpoints" / "previous.pt").exists())
    again = run_module("launch", *local_words(twin))
    assert again.returncode == 2 and "which is running: cancel it" in again.stderr
    started = next(event for event in read_events(run) if event["event"] == "start")
    os.kill(started["pid"], signal.SIGKILL)
    wait_for(lambda: read_events(run)[-1].get("what") == "done")
    assert [event["event"] for event in read_events(run)] == ["submit", "start", "end", "start", "end"]
    assert_equal_weights(weights(twin), weights(torchrun))
    assert comparable_records(twin) == comparable_records(torchrun)
    status = run_module("launch", "status", tmp_path)
    assert " done " in status.stdout and "6/6" in status.stdout
    logs = run_module("launch", "logs", run).stdout
    assert "0: resuming at" in logs and "1: interrupted: rank 1 has lost contact" in logs


@pytest.mark.slow
def test_the_local_twin_is_cancelled_with_a_checkpoint_and_resumed(tmp_path):
    config = small_config(tmp_path / "run", optim={"epochs": 40, "milestones": [20]})
    run = Path(config.run_dir)
    assert run_module("launch", *local_words(config)).returncode == 0
    wait_for(lambda: (run / "checkpoints" / "last.pt").exists())
    assert "is told to end" in run_module("launch", "cancel", run).stdout
    wait_for(lambda: read_events(run)[-1]["event"] == "end")
    assert " cancelled " in run_module("launch", "status", run).stdout
    assert run_module("launch", "resume", tmp_path).returncode == 0  # all in the folder
    wait_for(lambda: read_events(run)[-1].get("what") == "done")
    assert "has ended already (done)" in run_module("launch", "cancel", tmp_path).stdout
    assert " done " in run_module("launch", "status", run).stdout
    assert "0: resuming at" in run_module("launch", "logs", run).stdout


@pytest.mark.parametrize(
    ("words", "device"),
    [
        (["--gpus-per-node", "2"], "cuda"),
        (["--tasks-per-node", "2"], "auto"),
        (["--gpus-per-node", "2", "--train.device", "cpu"], "cpu"),
    ],
)
def test_a_job_on_gpus_does_not_train_on_cpu(tmp_path, monkeypatch, words, device):
    devices = []
    monkeypatch.setattr("launch.__main__.describe", lambda config, *_: devices.append(config.train.device))
    monkeypatch.chdir(REPOSITORY)
    start(["configs/densenet121.yaml", "--cluster", "local", "--run_dir", str(tmp_path), "--dry-run", *words])
    assert devices == [device]


def test_a_dry_run_says_what_a_run_would_be_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    config = small_config(tmp_path / "run")
    start(local_words(config, "--dry-run", "--images-per-second", "10", "--grid", "optim.lr=0.1,0.2"))
    text = capsys.readouterr().out
    assert f"{tmp_path}/run-lr0.2: densenet_bc40_k12, 46 training and 11 validation images, 3 classes" in text
    assert (
        "batch 12 = 1 nodes x 2 ranks x 1 accumulation steps x 6 images" in text
        and "4 steps an epoch, 2 epochs" in text
    )
    assert "at 20 images/s" in text and "1 starts" in text
    assert not list(tmp_path.glob("*/job.json"))
    start(["configs/densenet169.yaml", *local_words(config, "--dry-run")])
    assert f"{tmp_path}/run/densenet169: " in capsys.readouterr().out
    with pytest.raises(UserError, match="batch_size 12 cannot be split over 1 nodes x 5 ranks.*multiple of 5"):
        start(local_words(config, "--dry-run", "--tasks-per-node", 5))
    with pytest.raises(UserError, match="--nodes must be 1"):
        start(local_words(config, "--nodes", 2, "--optim.batch_size", 12))
    assert not (tmp_path / "run" / "job.json").exists() and not (tmp_path / "jobs").exists()
    with pytest.raises(UserError, match="--grid optim.lr: KEY=A,B is needed"):
        start(local_words(config, "--dry-run", "--grid", "optim.lr"))
    with pytest.raises(UserError, match="did you mean '--optim.lr'"):
        start(local_words(config, "--dry-run", "--optim.lrr", 1))
