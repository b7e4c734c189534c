"""Where the file of labels is that a command line names."""

import os
import sys
from pathlib import Path


def find_label_file(given: str | None, folder: Path) -> str | None:
    """A path relative to the working directory or, if it holds no such file, to the folder of the images.

    Where both hold one, that of the working directory is taken, which is reported on stderr.
    """
    if given is None:
        return None
    here, there = Path(given), folder / given
    if not here.exists() and there.exists():
        return str(there)
    if here.exists() and there.exists() and not os.path.samefile(here, there):
        print(
            f"warning: --labels {given} is {here.absolute()}; that of the images, {there}, is not read",
            file=sys.stderr,
            flush=True,
        )
    return given
