"""What a process is told of its machine. Its GPUs and networks: test_gpu_start.py."""

import subprocess
import sys

from conftest import REPOSITORY


def test_the_peak_of_memory_is_the_process_s_own_and_not_its_parent_s():
    """As `exec` leaves it, with which torchrun and a launcher start ranks."""
    own = "from pipeline.machine import peak_memory; print(peak_memory())"
    script = f"import os, sys; large = b'x' * (400 << 20); os.execv(sys.executable, [sys.executable, '-c', {own!r}])"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 1 << 20 < int(result.stdout) < 200 << 20
