"""Loading keeps neither memory, files nor threads from epoch to epoch."""

import pytest
from conftest import run_module


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
def test_a_few_short_epochs_are_steady(loader):
    done = run_module("tools.lab.endurance", "--files", 600, "--epochs", 5, "--loader", loader)
    assert done.returncode == 0, done.stderr
    rows = [[int(cell) for cell in line.split("|")[1:5]] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5]
    assert len({(files, threads) for _, _, files, threads in rows[1:]}) == 1
    assert rows[-1][1] - rows[1][1] < 20  # MiB; an epoch's images are 2 MiB
