"""A short version of the fault tests with real processes; and their comparison notices a difference of one bit."""

import shutil

import pytest
import torch
from conftest import run_module, small_config

from pipeline import trainer
from pipeline.checkpoint import CheckpointFolder, load_checkpoint
from tools.lab.chaos import files_in, same_bits


@pytest.mark.slow
def test_a_run_survives_a_sample_of_the_faults(tmp_path):
    """Processes under torchrun; a single one meets the other faults in test_starting, _interruptions and _resume."""
    faults = ["kill-torchrun", "read-error"]
    words = ["--tries", 1, "--model", "densenet_bc22_k8", "--output", tmp_path, "--faults", *faults]
    done = run_module("tools.lab.chaos", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in (tmp_path / "chaos.md").read_text().splitlines()[2:] if line.endswith("| 1 | 1 | 1 |")]
    assert [row.split(":")[0].strip("| ") for row in rows] == faults


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The folder of runs `a` and `b` of the same configuration."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        trainer.fit(small_config(folder / name, optim={"epochs": 1}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("change", ["none", "weight", "momentum", "record"])
def test_a_difference_of_one_bit_or_record_is_noticed(tmp_path, two_runs, change):
    shutil.copytree(two_runs, tmp_path, dirs_exist_ok=True)
    folder = CheckpointFolder(tmp_path / "b" / "checkpoints")
    state = load_checkpoint(folder.last)
    if change == "weight":
        state["model"]["classifier.bias"].view(torch.int32)[0] ^= 1
    elif change == "momentum":
        last = max(state["optimizer"]["state"])
        state["optimizer"]["state"][last]["momentum_buffer"].view(torch.int32)[0] ^= 1
    elif change == "record":
        lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "b" / "metrics.jsonl").write_text("".join(lines + lines[-1:]))
    folder.save(state, best=False)
    assert same_bits(tmp_path / "a", tmp_path / "b") == (change == "none")


@pytest.mark.parametrize("change", ["none", "lock", "emptied", "renamed", "new", "link"])
def test_a_file_that_a_refused_start_changes_is_noticed(tmp_path, change):
    (tmp_path / "checkpoints").mkdir()
    last, records = tmp_path / "checkpoints" / "last.pt", tmp_path / "metrics.jsonl"
    last.symlink_to("/proc/self/mem")  # as a read error is made; it cannot be read here either
    for file in (records, tmp_path / "lock"):
        file.write_text("content")
    before = files_in(tmp_path)
    if change == "lock":
        (tmp_path / "lock").write_text("another process")
    elif change == "emptied":
        records.write_text("")
    elif change == "renamed":
        last.rename(last.with_suffix(".damaged"))
    elif change == "new":
        (tmp_path / "checkpoints" / "last.tmp").touch()
    elif change == "link":
        last.unlink()
        last.symlink_to("elsewhere")
    assert (files_in(tmp_path) == before) == (change in ("none", "lock"))
