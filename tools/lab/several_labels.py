"""Train on several labels an image: ``python -m tools.lab.several_labels DATA``.

DATA holds Fashion-MNIST as class folders, train/CLASS/*.jpg and val/CLASS/*.jpg, as `make demo` unpacks it. One or two of its
images lie in quarters of a black square of 56 pixels, whose labels are their classes: an image has one label or
two. A small network learns them by binary cross-entropy, and is evaluated on squares of the validation images with a report.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.api import fit
from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config_file import from_dict
from pipeline.data.index import DatasetIndex
from pipeline.data.scan import scan_classes

SIDE = 56  # of a square, in pixels


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.lab.several_labels", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="Fashion-MNIST as class folders, in train/ and val/")
    parser.add_argument("--images", type=positive_integer, metavar="N", default=4000, help="training squares [4000]")
    parser.add_argument("--epochs", type=positive_integer, metavar="N", default=4, help="passes over them [4]")
    parser.add_argument(
        "--run-dir", metavar="DIR", default="runs/several-labels", help="for squares and run [%(default)s]"
    )
    options = parser.parse_args()
    out = Path(options.run_dir)
    for seed, (part, images) in enumerate((("train", options.images), ("val", options.images // 4))):
        write_squares(scan_classes(Path(options.data, part)), out / "data", part, images, seed)
    fit(from_dict(recipe(out, options.epochs), "the experiment"))
    weights = out / "run" / "checkpoints" / "best.pt"
    print(
        f"report: python -m tools.evaluate {weights} --data {out / 'data'} --labels {out / 'data' / 'val.csv'} "
        f"--report {out / 'report'}"
    )


def recipe(out: Path, epochs: int) -> dict:
    """The run's configuration."""
    return {
        "run_dir": str(out / "run"),
        "model": {"name": "densenet_bc40_k12"},
        "data": {
            "dir": str(out / "data"),
            "labels": "multi",
            "train": "train.csv",
            "val": "val.csv",
            "channels": 1,
            "mean": [0.1],
            "std": [0.25],
            "crop_size": 40,
            "resize_size": 40,
            "train_crop": "random_crop",
            "padding": 4,
            "color_jitter": 0,
            "pca_noise": 0,
        },
        "optim": {"objective": "binary_cross_entropy", "epochs": epochs, "batch_size": 32, "schedule": "cosine"},
        "train": {"pictures_every": 0},
    }


def write_squares(index: DatasetIndex, folder: Path, part: str, images: int, seed: int) -> None:
    """Write so many squares below FOLDER/PART and their labels into FOLDER/PART.csv; what is there is not written again."""
    table = folder / f"{part}.csv"
    if table.exists():
        return
    (folder / part).mkdir(parents=True, exist_ok=True)
    random, rows = np.random.default_rng(seed), []
    for n in tqdm(range(images), f"squares of {index.root}", disable=None, leave=False):
        chosen = random.choice(len(index), random.integers(1, 3), replace=False)
        places = random.permutation(4)[: len(chosen)]
        square = Image.new("L", (SIDE, SIDE))
        for i, place in zip(chosen.tolist(), places.tolist(), strict=True):
            with Image.open(index.location(i)) as image:
                square.paste(image.convert("L"), (SIDE // 2 * (place % 2), SIDE // 2 * (place // 2)))
        name = f"{part}/{n:05d}.png"
        square.save(folder / name)
        rows.append([name, "|".join(sorted({index.classes[index.labels[i]] for i in chosen.tolist()}))])
    with table.open("w", newline="") as stream:  # last: the images that it names are whole
        csv.writer(stream).writerows([["file", "labels"], *rows])


if __name__ == "__main__":
    exit_on_user_error(main)
