"""Where a command's results go: its output folders and files are checked before the work."""

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

ANY_NAME: dict[str, Any] = dict(
    encoding="utf-8", errors="surrogateescape"
)  # of open(): file names that are not UTF-8 stay as they are


def writable_folder(path: str, flag: str = "--output") -> Path:
    """Make the folder of a flag, and refuse it before the work if nothing can be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise UserError(f"cannot write into {flag} {path}: {error.strerror}") from None


def writable_file(path: str, flag: str, suffixes: Collection[str] = ()) -> Path:
    """Make the folder of a flag's file, and refuse the file before the work if it cannot be written or ends otherwise.

    Args:
        suffixes: those that it may end in, any if there are none.
    """
    file = Path(path)
    if suffixes and file.suffix not in suffixes:
        raise UserError(f"{flag} {path}: the name must end in {' or '.join(suffixes)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        existed = file.exists()
        open(file, "a").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise UserError(f"cannot write {flag} {path}: {error.strerror}") from None
    return file
