"""Where a command's results go: its output folders and files are checked before the work."""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

ANY_NAME: dict[str, Any] = dict(
    encoding="utf-8", errors="surrogateescape"
)  # of open(): file names that are not UTF-8 stay as they are


def writable_folder(path: str, flag: str = "--output") -> Path:
    """Refuse the folder of a flag before the work if nothing can be written there. It is there with its first file; see
    `in_folder`."""
    try:
        with _for_a_moment(Path(path)), tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise UserError(f"cannot write into {flag} {path}: {error.strerror}") from None


def made_folder(path: str, flag: str = "--output") -> Path:
    """As `writable_folder`, for a command that begins to write at once: the folder is there."""
    folder = writable_folder(path, flag)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def writable_file(path: str, flag: str, suffixes: Collection[str] = ()) -> Path:
    """Refuse the file of a flag before the work if it cannot be written or ends otherwise; nothing is left of the try.

    Args:
        suffixes: those that it may end in, any if there are none.
    """
    file = Path(path)
    if suffixes and file.suffix not in suffixes:
        raise UserError(f"{flag} {path}: the name must end in {' or '.join(suffixes)}")
    try:
        with _for_a_moment(file.parent):
            existed = file.exists()
            open(file, "a").close()
            if not existed:
                file.unlink()
    except OSError as error:
        raise UserError(f"cannot write {flag} {path}: {error.strerror}") from None
    return file


def in_folder(file: Path) -> Path:
    """The file, whose folder is there from now on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


@contextmanager
def _for_a_moment(folder: Path) -> Iterator[None]:
    """While this is entered the folder is there; what had to be made for it is removed again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()
