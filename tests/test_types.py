"""Types, as ``make types`` checks them; here beside the other tests, on a core that would wait."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY


@pytest.mark.slow
def test_types():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
