"""How a command ends."""

import numpy as np
import pytest
import torch

from pipeline.command import exit_on_user_error
from pipeline.errors import first_line


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)], ids=["torch", "numpy"])
def test_no_memory_is_one_line_that_says_what_to_lower(capsys, allocate):
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(allocate)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: out of memory (") and "lower the batch size" in line


def test_a_bug_keeps_its_traceback():
    def bug():
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind"):
        exit_on_user_error(bug)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no room\nfor all of it"), "no room"),
        (RuntimeError("\n  no room"), "no room"),
        (AssertionError(), "AssertionError"),
        (ValueError("\n"), "ValueError"),
    ],
)
def test_of_an_error_its_first_line_is_told_or_its_type(error, line):
    assert first_line(error) == line
