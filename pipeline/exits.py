"""What a process of ours leaves behind: exit codes, the word of why it ended, and nothing in others' files."""

import io
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

EXIT_BUG = 1  # with a traceback
EXIT_USER_ERROR = 2
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on where this one left
EXIT_KEYBOARD = 130
EXIT_BROKEN_PIPE = 141

SPEAKER = "PIPELINE_LAUNCHER_SPEAKS"  # set in the ranks of pipeline.torchrun


def open_closed_streams() -> None:
    """Send standard streams that were closed (``>&-``) to nowhere, or the next file opened would receive what is printed."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - for as long as the process lives


def show_any_name() -> None:
    """Have standard streams show file names that are not UTF-8, with marks such as \\udcfc, where they would refuse them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def launcher_speaks() -> bool:
    """Whether the launcher says why a rank of its ends, from the word that the rank leaves, so that it stands there once."""
    return SPEAKER in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ


def record_for_torchrun(message: str, code: int, **details: str | bool) -> None:
    """Write down why this rank ends where torchrun's report, and `launch.after`, look for it.

    The form is that of torch.distributed.elastic.multiprocessing.errors, with the exit code and details for us.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        word = {"message": message, "timestamp": int(time.time()), "code": code, **details}
        with suppress(OSError):
            Path(file).write_text(json.dumps(word))
