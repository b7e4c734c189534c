"""The kinds of places that may hold image files.

The first kind that knows a path takes it: a kind whose paths are folders (of shards, say) stands above "folder".
"""

import os
from pathlib import Path

from pipeline.data.archive import TarSource
from pipeline.data.folder import FolderSource
from pipeline.data.parquet import ParquetSource
from pipeline.data.shards import ShardSource
from pipeline.data.source import FileSource
from pipeline.data.table import TableSource
from pipeline.data.zip_archive import ZipSource
from pipeline.errors import UserError

SOURCES: dict[str, type[FileSource]] = {
    "table": TableSource,
    "set of shards": ShardSource,
    "set of parquet files": ParquetSource,
    "tar archive": TarSource,
    "zip file": ZipSource,
    "folder": FolderSource,
}


def find_source(root: str | Path) -> FileSource | None:
    """The source of the images at a path, None if it is of no known kind or nothing is there.

    Raises:
        OSError: it cannot be looked at.
        UserError: it is of a kind that cannot be read in place.
    """
    return next((source for kind in SOURCES.values() if (source := kind.at(str(root)))), None)


def open_source(root: str | Path) -> FileSource:
    """The source of the images at a path.

    Raises:
        UserError: nothing is there, it cannot be looked at, or it is of no known kind.
    """
    try:
        if source := find_source(root):
            return source
        os.stat(root)
    except FileNotFoundError:
        raise UserError(f"the data folder {root} does not exist: give one that does") from None
    except OSError as error:
        raise UserError(f"cannot read {root}: {error.strerror}: check its path and permissions") from None
    kinds = ", ".join(reversed(SOURCES))
    raise UserError(f"{root} is of no known kind ({kinds}): unpack it, or give another path")
