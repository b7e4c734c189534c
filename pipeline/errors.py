"""The one exception for a user's mistake, and how every command ends on it."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import NoReturn

EXIT_USER_ERROR = 2


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, what to do."""


class LocalUserError(UserError):
    """A user error that only this rank has met (a file that does not decode, say)."""


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage, and takes no abbreviated flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all arguments")


def positive_integer(text: str) -> int:
    """The type of an argument that counts something."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a positive number is needed (got '{text}')")
    return int(text)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of `choices`, or an empty string."""
    nearest = get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Run `main`; turn a `UserError` into one line on stderr and exit code 2.

    With several ranks only rank 0 prints what all of them know.
    """
    try:
        main()
    except UserError as error:
        if isinstance(error, LocalUserError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
