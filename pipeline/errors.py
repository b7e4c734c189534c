"""What can go wrong, as exceptions, and what helps to say it in one line."""

import errno
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")

# What torch on CPU, CUDA and its libraries, and DALI say.
OUT_OF_MEMORY = ("allocate memory", "out of memory", "alloc_failed", "allocation failed", "can't allocate", "bad_alloc")


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, what to do."""


class LocalUserError(UserError):
    """A user error that only this rank has met (a file that does not decode, say)."""


class InterruptedRunError(Exception):
    """A run left before its end, through no fault of its own, and can go on. The message is one line."""


class StorageError(InterruptedRunError):
    """A disk or file server does not answer this rank, which may pass: a later attempt may find it well."""

    NUMBERS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


class LostContactError(InterruptedRunError):
    """Another rank has ended, whose own word says why."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of `choices`, or an empty string."""
    nearest = get_close_matches(name, list(choices), n=1, cutoff=0.65)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""


def look_up(registry: Mapping[str, T], name: str, key: str) -> T:
    """Return what a registry has under `name`, which the field `key` of the configuration gave.

    Raises:
        UserError: there is none of that name.
    """
    if name not in registry:
        raise UserError(f"{key}: there is no '{name}'{did_you_mean(name, registry)}; choose {', '.join(registry)}")
    return registry[name]


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type's name if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_out_of_memory(error: Exception) -> bool:
    """Of Python, NumPy, DALI, or torch on CPU or GPU, which is not imported for this."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)
    )
