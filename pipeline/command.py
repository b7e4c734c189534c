"""What a command takes, and how it ends: on a user's mistake, on an interruption that it can go on from, or on a bug."""

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from pipeline import preemption
from pipeline.errors import InterruptedRunError, LocalUserError, LostContactError, UserError, is_out_of_memory
from pipeline.exits import (
    EXIT_BROKEN_PIPE,
    EXIT_BUG,
    EXIT_KEYBOARD,
    EXIT_RESUME,
    EXIT_USER_ERROR,
    launcher_speaks,
    open_closed_streams,
    record_for_torchrun,
    show_any_name,
)

NEGATIVE_NUMBER = re.compile(r"-[\d.].*")  # or several between commas; no flag begins so


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage, and takes no abbreviated flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, which takes -1e-3 and -1,2 for flags. ~ stands for the home folder, after = too."""
        return super().parse_known_args(_readable(args), namespace)

    def parse_known_intermixed_args(self, args=None, namespace=None):
        """As `parse_known_args`, by which newer Pythons do not come."""
        return super().parse_known_intermixed_args(_readable(args), namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all arguments")


def _readable(args: list[str] | None) -> list[str]:
    """The words as argparse reads them as they are meant."""
    words = [_at_home(word) for word in (sys.argv[1:] if args is None else args)]
    for i in range(len(words) - 1, 0, -1):
        if NEGATIVE_NUMBER.fullmatch(words[i]) and words[i - 1].startswith("--") and "=" not in words[i - 1]:
            words[i - 1 : i + 1] = [f"{words[i - 1]}={words[i]}"]
    return words


def _at_home(word: str) -> str:
    """The word with the home folder in the place of ~, where a shell has left it: quoted, or after = in a flag."""
    flag, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{sign}{os.path.expanduser(value)}" if value.startswith("~") else word


def positive_integer(text: str) -> int:
    """The type of an argument that counts something."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a positive number is needed (got '{text}')")
    return int(text)


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run `main`; turn a `UserError` into one line on stderr and exit code 2, an interruption into code 75.

    With several ranks only rank 0 prints what all of them know. torchrun finds what ended a rank in its error file, and
    pipeline.torchrun says it in their place.
    """
    open_closed_streams()
    show_any_name()
    try:
        try:
            main()
        finally:
            preemption.ending()
    except UserError as error:
        if isinstance(error, LocalUserError) or os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
            _complain(f"error: {error}")
        record_for_torchrun(str(error), EXIT_USER_ERROR)
        _end(EXIT_USER_ERROR)
    except InterruptedRunError as error:
        _complain(f"interrupted: {error}; start the same command again to go on")
        lost = isinstance(error, LostContactError)
        record_for_torchrun(str(error), EXIT_RESUME, signal=preemption.received(), lost_contact=lost)
        _end(EXIT_RESUME)
    except KeyboardInterrupt:
        _end(EXIT_KEYBOARD)
    except BrokenPipeError:  # whoever read the output, as `head`, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        _end(EXIT_BROKEN_PIPE)
    except Exception as error:
        if is_out_of_memory(error):
            reason = (
                f"out of memory ({' '.join(str(error).split()) or 'MemoryError'}): lower the batch size, or set "
                "model.activation_checkpointing or more optim.grad_accum_steps in training"
            )
            _complain(f"error: {reason}")
            record_for_torchrun(reason, EXIT_USER_ERROR)
            _end(EXIT_USER_ERROR)
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            record_for_torchrun(traceback.format_exc(), EXIT_BUG)
            if _ranks_are_connected():
                traceback.print_exc()
                _end(EXIT_BUG)
            raise
        reason = (
            f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}: make room on that disk"
        )
        record_for_torchrun(reason, EXIT_USER_ERROR)
        _complain(f"error: {reason}")
        _end(EXIT_USER_ERROR)


def _complain(line: str) -> None:
    if launcher_speaks():
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # whoever read it has gone
        preemption.leave_closed_outputs()


def _end(code: int) -> NoReturn:
    """End the process; at once where a failed rank has left NCCL alive, whose end may wait for the other ranks for ever."""
    if _ranks_are_connected():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _ranks_are_connected() -> bool:
    """Whether a process group is left, as `init_distributed` leaves NCCL's after a failure. torch is not imported for this."""
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_available() and distributed.is_initialized())
