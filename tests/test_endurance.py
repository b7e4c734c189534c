"""Loading keeps neither memory, files nor threads from epoch to epoch."""

import pytest
from conftest import run_module


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["native", "dali", "reference"])
def test_a_few_short_epochs_are_steady(loader):
    done = run_module("tools.lab.endurance", "--files", 600, "--crop-size", 64, "--epochs", 9, "--loader", loader)
    assert done.returncode == 0, done.stderr
    rows = [[int(cell) for cell in line.split("|")[1:5]] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [*range(1, 10)]
    assert len({(files, threads) for _, _, files, threads in rows[1:]}) == 1
    assert rows[-1][1] - rows[1][1] < 100  # MiB; the images of seven epochs are 196 MiB
