"""Index a data set and say what is there: ``python -m tools.index DIR``.

DIR is a folder of classes, a tar archive or zip file of classes, a tar of tars such as ILSVRC2012_img_train.tar, a table,
shards, or (with --labels) a flat folder or archive; or what holds both sets: a folder that training takes as data.dir, with
`train` and `test`, or a table that says of each line which set it is for. What is found is cached beside the images, where
training looks for it too; where DIR is read-only, in --cache, which RUN_DIR/index should be for a run to find it. With
--several-labels the tables name several labels an image.

With --verify every image is first read and decoded, and what is odd or left out is listed with what comes of it. The exit
code is 2 if the index or a run with the default configuration would stop at one, else 0.
"""

import argparse
import dataclasses
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Generator
from contextlib import redirect_stderr, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.command import ArgumentParser, exit_on_user_error
from pipeline.config import DataConfig
from pipeline.data.checks import warnings_about
from pipeline.data.dataset import open_datasets, source_of
from pipeline.data.image_files import PixelFormat, pixel_format
from pipeline.data.index import DatasetIndex
from pipeline.data.index_cache import cache_beside
from pipeline.data.label_table import name_of_split
from pipeline.data.label_table_source import LabelTableSource
from pipeline.data.scan import scan_classes, scan_flat, scan_label_table
from pipeline.data.source import FileSource, ImageIssue
from pipeline.data.sources import open_source
from pipeline.data.split_names import SPLIT_NAMES
from pipeline.data.splits import find_splits
from pipeline.data.table import Columns, TableSource, is_table, splits_in
from pipeline.data.verify import verify
from pipeline.errors import UserError
from pipeline.words import counted
from tools.support.label_files import find_label_file
from tools.support.tables import add_columns_arguments, open_with_columns


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.index", description=__doc__)
    parser.add_argument("data", metavar="DIR", help="folder, archive, table or shards")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="label file or development kit, if DIR (or its val) is flat, or a table of images in DIR; relative to the working "
        "directory or to DIR",
    )
    parser.add_argument("--classes", metavar="DIR", help="the training set, whose classes the labels count in")
    parser.add_argument("--cache", metavar="FOLDER", default="runs/index", help="for the cache if DIR is read-only")
    parser.add_argument("--verify", action="store_true", help="read and decode every image, and list what is odd")
    parser.add_argument("--against", metavar="DIR", help="verify this validation set too, and list what both hold")
    parser.add_argument("--depth", type=int, choices=(8, 16), default=8, help="bits of a pixel, as data.depth [8]")
    parser.add_argument(
        "--exif-orientation", action="store_true", help="images are turned as EXIF says, as data.exif_orientation"
    )
    add_columns_arguments(parser)
    parser.add_argument(
        "--several-labels",
        action="store_true",
        help="DIR is a table of several labels an image, or holds such tables, as with data.labels multi",
    )
    options = parser.parse_args()
    root, fallback = Path(options.data), Path(options.cache)
    several = options.several_labels
    if several and (options.classes or options.file_column or options.label_column):
        parser.error(
            "--several-labels is for tables with a header: leave out --classes, --file-column and --label-column"
        )
    labels = find_label_file(options.labels, root)
    table = labels if labels and (several or (not options.classes and is_table(labels))) else None
    config, both = both_sets(
        DataConfig(
            dir=str(root),
            val_labels=None if several or not labels else str(Path(labels).absolute()),
            channels=3 if options.depth == 8 else 1,
            depth=options.depth,
            exif_orientation=options.exif_orientation,
            file_column=options.file_column,
            label_column=options.label_column,
            labels="multi" if several else "single",
        ),
        table if several else None,
    )
    read_as = pixel_format(config)
    if labels and not (options.classes or both or table):
        parser.error("--labels needs --classes, the folder or archive of the training set, or is a table (.csv, .tsv)")
    if options.classes and (both or not labels):
        parser.error("--classes is for --labels, of a DIR that does not hold both sets: leave it out")
    splits = splits_of(table) if table else [] if both or labels else splits_of(root)
    if options.against and (both or splits or labels or not options.verify):
        parser.error("--against needs --verify, no --labels, and a DIR that does not hold both sets")
    if splits:  # as a run takes them that has the table as data.train and data.val
        both, file = True, str(Path(table or root).absolute())
        config = dataclasses.replace(
            config, dir=str(root if table else root.parent), train=file, val=file, val_labels=None
        )
        there = ", ".join(splits_in(Path(file)))
        said = f"of {table or root} the splits {' and '.join(splits)} are taken (there are {there})"
        print(said, file=sys.stderr, flush=True)
    start = time.perf_counter()
    if options.verify and both:
        list_odd_images([source_of(config, "train")], [source_of(config, "val")], read_as)
    elif options.verify:
        trained = [] if labels and not table else [open_table_or_source(root, options, table)]
        validated = [open_source(root)] if labels and not table else []
        if options.against:
            split = "val" if (of_table := splits_of(options.against)) else None
            if split:
                print(f"of {options.against} the split {of_table[1]} is taken", file=sys.stderr, flush=True)
            validated.append(open_table_or_source(options.against, options, split=split))
        list_odd_images(trained, validated, read_as)
    places = [Path(config.dir, name) for name in (config.train, config.val)] if both else [root]
    if both:
        indexes = list(open_datasets(config, fallback, progress=True))
    elif labels and not table:
        of_classes = cache_beside(Path(options.classes), fallback)
        classes = scan_classes(options.classes, of_classes, progress=True, pixel_format=read_as).classes
        indexes = [scan_flat(root, labels, classes, cache_beside(root, fallback), progress=True, pixel_format=read_as)]
    else:
        places = [Path(table or root)]
        cache, source = cache_beside(places[0], fallback), open_table_or_source(root, options, table)
        if isinstance(source, LabelTableSource):
            indexes = [scan_label_table(source, cache, progress=True, pixel_format=read_as)]
        else:
            indexes = [scan_classes(source, cache, progress=True, pixel_format=read_as, labels_field="--labels")]
    for line in warnings_about(indexes[0], indexes[1] if both else None, config):
        print(f"warning: {line}", file=sys.stderr, flush=True)
    for place, index, split in zip(places, indexes, splits or [""] * len(indexes), strict=True):
        if split:
            print(f"split      {split}")
        print(f"{describe(index)}\ncache      {cache_beside(place, fallback)}")
    print(f"time       {time.perf_counter() - start:.1f} s")


def splits_of(table: str | Path) -> list[str]:
    """What a table calls the splits that a run trains and validates on; none if this is no table or lacks one of them."""
    there = splits_in(Path(table)) if is_table(table) else []
    if not all(set(names) & set(there) for names in SPLIT_NAMES.values()):
        return []
    return [name_of_split(Path(table), there, split) for split in SPLIT_NAMES]


def open_table_or_source(
    root: str | Path, options: argparse.Namespace, table: str | None = None, split: str | None = None
) -> FileSource:
    """The images at a path.

    Args:
        table: which names images at the path; None: the path is that of the table, or says itself which they are.
        split: of a table, of whose lines those are taken; None: all.

    Raises:
        UserError: as `open_source`; or this is no table, and one is asked for.
    """
    if options.several_labels:
        return LabelTableSource(table or str(root), open_source(root if table else Path(root).parent), split=split)
    if table:
        return TableSource(table, open_source(root), Columns(options.file_column, options.label_column, split))
    return open_with_columns(root, options, split)


def both_sets(config: DataConfig, table: str | None) -> tuple[DataConfig, bool]:
    """The configuration with both sets, where its folder holds them as a run finds them, which is reported; else as it is.

    Args:
        table: of several labels, which names images in that folder; None: the folder holds such tables.

    Raises:
        UserError: a folder holds no tables of several labels, which it is said to hold.
    """
    if config.labels == "multi" and (table or not os.path.isdir(config.dir)):
        return config, False
    said, found = io.StringIO(), None
    with suppress(UserError), redirect_stderr(said):
        found = find_splits(config)
    if found is None and config.labels == "multi":
        raise UserError(
            f"{config.dir} holds no tables train.csv and val.csv: give the table itself, as {config.dir}/NAME.csv"
        )
    if found is None or found.dir != config.dir:  # nor where the training set itself was given
        return config, False
    print(said.getvalue(), end="", file=sys.stderr, flush=True)
    return found, True


def list_odd_images(training: list[FileSource], validation: list[FileSource], read_as: PixelFormat) -> None:
    """Print a line for each issue that `verify` finds, and how many there are of each kind. What is to be said of the whole
    place, as that a table has several splits, counts as no odd image.

    Raises:
        UserError: the index or a run would stop.
    """
    kinds: Counter[tuple[str, str]] = Counter()
    stops = 0
    whole = {source.root for source in (*training, *validation)}
    issues = _Returning(verify(training, validation, read_as))
    for issue in issues:
        tqdm.write(str(issue))
        if issue.location in whole and not issue.stops:
            continue
        kinds[issue.fault, issue.outcome] += issue.count
        stops += issue.stops
    for (fault, outcome), count in kinds.most_common():
        print(f"{count:>10,}  {fault}: {outcome}")
    if not kinds:
        print(f"no image is odd ({counted(issues.returned, 'image')} read)")
    if stops:
        raise UserError(f"{stops:,} of what is listed would stop the index or a run: repair or remove them")


class _Returning:
    """Iterates over a generator, and keeps what that returns."""

    def __init__(self, generator: Generator[ImageIssue, None, int]):
        self._generator, self.returned = generator, 0

    def __iter__(self) -> Generator[ImageIssue, None, None]:
        self.returned = yield from self._generator


def describe(index: DatasetIndex) -> str:
    """A few lines on the images of an index."""
    if index.several_labels:
        per_class, unlabelled = index.labels.sum(axis=0, dtype=np.int64), int((index.labels.sum(axis=1) == 0).sum())
        labels = f", several an image, {unlabelled:,} images with none"
    else:
        per_class, labels = np.bincount(index.labels, minlength=len(index.classes)), ""
    sides = index.sizes.min(axis=1)
    return "\n".join(
        [
            f"images     {len(index):,} in {index.root}",
            f"classes    {len(index.classes):,}, of {per_class.min():,} to {per_class.max():,} images{labels}",
            f"bytes      {_size_text(float(index.lengths.sum()))}, {index.lengths.mean() / 1024:.1f} KiB an image",
            f"short side {sides.min()} to {sides.max()} pixels, median {np.median(sides):g}",
            f"content    {index.fingerprint}",
        ]
    )


def _size_text(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


if __name__ == "__main__":
    exit_on_user_error(main)
