"""Flags for the columns of a table of images, where their names do not say it."""

import argparse
import os

from pipeline.data.source import FileSource
from pipeline.data.sources import open_source
from pipeline.data.table import Columns, TableSource, is_table
from pipeline.errors import UserError


def add_columns_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file-column", metavar="NAME", help="a table's column of files, as data.file_column")
    parser.add_argument("--label-column", metavar="NAME", help="a table's column of classes, as data.label_column")


def open_with_columns(
    root: str | os.PathLike[str], options: argparse.Namespace, split: str | None = None
) -> FileSource:
    """The images at a path.

    Args:
        split: of a table, of whose lines those are taken; None: all.

    Raises:
        UserError: as `open_source`; or columns are given and this is no table.
    """
    root = os.fspath(root)
    if is_table(root):
        source = open_source(os.path.dirname(root) or os.curdir)
        return TableSource(root, source, Columns(options.file_column, options.label_column, split))
    if options.file_column or options.label_column:
        raise UserError(f"--file-column and --label-column are for a table, and {root} is none")
    return open_source(root)
