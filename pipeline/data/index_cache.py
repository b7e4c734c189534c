"""The file that keeps what a scan has found, a line for each group of images (a class, or a flat folder).

A scan that was interrupted goes on from there, and a later one reads only what has changed.
"""

import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

RULE = "5"  # which rule of image_files.py a kept row follows
BEGIN = f'{{"rule":"{RULE}","group":'  # of a line


def cache_beside(root: Path, otherwise: Path) -> Path:
    """The cache file for `root`: beside it, or beside the file that it is a part of; or in the folder `otherwise` if it cannot
    be read and written there, with a name that only this place has."""
    # not a folder inside a zip file
    folder = next((above for above in root.parents if os.path.isdir(above)), root.parent)
    name = f".{'.'.join(root.relative_to(folder).parts)}.index.jsonl"
    beside = folder / name
    if os.access(beside if _exists(beside) else folder, os.R_OK | os.W_OK):
        return beside
    place = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:8]
    return otherwise / f".{place}{name}"


def known_cache(root: Path) -> Path | None:
    """The cache file beside `root`, if there is one that this user may read and write."""
    cache = cache_beside(root, otherwise=root.parent)
    return cache if _exists(cache) and os.access(cache, os.R_OK | os.W_OK) else None


def _exists(path: Path) -> bool:
    with suppress(OSError):  # of a folder that this user may not enter
        return path.exists()
    return False


def read_cache(cache: Path | None) -> dict[str, str]:
    """The newest line of each group, which may be damaged inside. One that a crash cut short is skipped; a file that cannot be
    read is reported."""
    rows: dict[str, str] = {}
    if cache is None:
        return rows
    try:
        if cache.exists():
            with open(cache) as stream:
                for line in stream:
                    if line.startswith(BEGIN) and line.rstrip().endswith("}"):  # whole, and not of an earlier version
                        with suppress(ValueError, TypeError):
                            name, _ = json.JSONDecoder().raw_decode(line, len(BEGIN))
                            rows[name] = line
    except (OSError, UnicodeDecodeError) as error:
        _warn_of_cache(cache, "read", error)
    return rows


def append(cache: Path, row: dict[str, Any]) -> bool:
    """Add a row, whose first key is `group`; return whether the file takes more. Without it a scan only takes longer."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(cache, "a") as stream:  # the new line comes first: it ends one that a crash cut short
            stream.write("\n" + json.dumps({"rule": RULE, **row}, separators=(",", ":")))
    except OSError as error:
        _warn_of_cache(cache, "written", error)
        return False
    return True


def _warn_of_cache(cache: Path, verb: str, error: Exception) -> None:
    reason = getattr(error, "strerror", None) or error
    print(
        f"warning: the index cache {cache} cannot be {verb} ({reason}): every start reads all headers again until it can",
        file=sys.stderr,
        flush=True,
    )
