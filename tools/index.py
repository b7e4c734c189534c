"""Index a data set and say what is there: ``python -m tools.index DIR``.

DIR is a folder of classes, a tar archive of classes, a tar of tars such as ILSVRC2012_img_train.tar, or (with --labels)
a flat folder or archive. What is found is cached beside DIR, where training looks for it too.
"""

import time
from pathlib import Path

import numpy as np

from pipeline.data.index import DatasetIndex, cache_beside, scan_classes, scan_flat
from pipeline.errors import ArgumentParser, exit_on_user_error


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.index", description=__doc__)
    parser.add_argument("data", metavar="DIR", help="folder or tar archive")
    parser.add_argument("--labels", metavar="FILE", help="label file or development kit, if DIR has no classes")
    parser.add_argument("--classes", metavar="DIR", help="the training set, whose classes the labels count in")
    parser.add_argument("--cache", metavar="FOLDER", default="runs/index", help="for the cache if DIR is read-only")
    options = parser.parse_args()
    if options.labels and not options.classes:
        parser.error("--labels needs --classes, the folder or archive of the training set")
    root, fallback = Path(options.data), Path(options.cache)
    cache = cache_beside(root, fallback)
    start = time.perf_counter()
    if options.labels:
        training = Path(options.classes)
        classes = scan_classes(training, cache_beside(training, fallback), progress=True).classes
        index = scan_flat(root, options.labels, classes, cache, progress=True)
    else:
        index = scan_classes(root, cache, progress=True)
    print(describe(index))
    print(f"cache      {cache}\ntime       {time.perf_counter() - start:.1f} s")


def describe(index: DatasetIndex) -> str:
    """A few lines on the images of an index."""
    per_class = np.bincount(index.labels, minlength=len(index.classes))
    sides = index.sizes.min(axis=1)
    return "\n".join(
        [
            f"images     {len(index):,} in {index.root}{' (read in place)' if index.packed else ''}",
            f"classes    {len(index.classes):,}, of {per_class.min():,} to {per_class.max():,} images",
            f"bytes      {index.lengths.sum() / 2**30:.2f} GiB, {index.lengths.mean() / 1024:.1f} KiB an image",
            f"short side {sides.min()} to {sides.max()} pixels, median {int(np.median(sides))}",
            f"content    {index.fingerprint}",
        ]
    )


if __name__ == "__main__":
    exit_on_user_error(main)
