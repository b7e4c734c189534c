"""Whether there is something at a path."""

from pathlib import Path


def is_present(path: Path) -> bool:
    """Whether there is something of that name: a link to nowhere, or what cannot be looked at, is not nothing."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True
