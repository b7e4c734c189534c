"""Fine-tuning beside training from scratch: ``python -m tools.lab.fine_tuning DIR``.

DIR holds CIFAR-10 as class folders of JPEG files, train/CLASS/*.jpg and test/CLASS/*.jpg. A few images of each class, drawn
anew for each seed, train the same network by the same recipe for as many steps, once begun with the Fashion-MNIST weights of
this repository and once with drawn weights. The error is that of the last epoch, on test images that are the same for all.
Runs that are there already resume or count as they are.
"""

import csv
import statistics
from pathlib import Path

import numpy as np

from pipeline.api import fit, load_config
from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.data.index import DatasetIndex
from pipeline.data.index_cache import known_cache
from pipeline.data.scan import scan_classes
from pipeline.errors import UserError
from tools.support.markdown import table

CONFIG, WEIGHTS = "configs/cifar10-jpeg.yaml", "tools/weights/fashion-mnist.safetensors"


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.lab.fine_tuning", description=__doc__)
    parser.add_argument("data", metavar="DIR", help="CIFAR-10 as class folders, in train/ and test/")
    parser.add_argument(
        "--images", type=positive_integer, metavar="N", default=100, help="training images a class [100]"
    )
    parser.add_argument(
        "--test-images", type=positive_integer, metavar="N", default=200, help="test images a class [200]"
    )
    parser.add_argument("--epochs", type=positive_integer, metavar="N", default=8, help="passes over them [8]")
    parser.add_argument("--seeds", type=positive_integer, metavar="N", default=3, help="number of seeds, from 1 on [3]")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the runs [bf16]")
    parser.add_argument(
        "--run-dir", metavar="DIR", default="runs/fine-tuning", help="for tables and runs [%(default)s]"
    )
    options = parser.parse_args()
    data, out = Path(options.data).absolute(), Path(options.run_dir)
    train, test = (scan_classes(data / part, known_cache(data / part), progress=True) for part in ("train", "test"))
    write_table(test, "test", options.test_images, seed=0, file=out / "test.csv")
    errors: dict[str, list[float]] = {"fine-tuned": [], "from scratch": []}
    for seed in range(1, options.seeds + 1):
        write_table(train, "train", options.images, seed, out / f"train-{seed}.csv")
        for kind, of_kind in errors.items():
            overrides = {
                "run_dir": str(out / f"{kind.replace(' ', '-')}-{seed}"),
                "seed": seed,
                "model.weights": WEIGHTS if kind == "fine-tuned" else None,
                "data.dir": str(data),
                "data.train": str((out / f"train-{seed}.csv").absolute()),
                "data.val": str((out / "test.csv").absolute()),
                "optim.epochs": options.epochs,
                "optim.batch_size": 32,
                "optim.lr": 0.05,
                "train.precision": options.precision,
                "train.pictures_every": 0,
            }
            of_kind.append(fit(load_config(CONFIG, overrides)).last_top1_error)
    print(report(errors, options.images, len(test.classes) * options.test_images, options.epochs))


def write_table(index: DatasetIndex, part: str, images: int, seed: int, file: Path) -> None:
    """Write a table of so many images of each class, drawn at random, as PART/NAME and class.

    Raises:
        UserError: a class has fewer.
    """
    fewest = int(np.bincount(index.labels, minlength=len(index.classes)).min())
    if fewest < images:
        flag = "--test-images" if part == "test" else "--images"
        raise UserError(f"{flag} {images}: a class of {index.root} has {fewest:,} images: give as many at most")
    random = np.random.default_rng(seed)
    rows = [np.sort(random.permutation(np.flatnonzero(index.labels == k))[:images]) for k in range(len(index.classes))]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "label"])
        writer.writerows([f"{part}/{index.names[i]}", index.classes[index.labels[i]]] for i in np.concatenate(rows))


def report(errors: dict[str, list[float]], images: int, test_images: int, epochs: int) -> str:
    """A Markdown table and the margin."""
    seeds = len(errors["fine-tuned"])
    titles = ["top-1 error, %", *(f"seed {seed}" for seed in range(1, seeds + 1)), "mean"]
    rows = [
        [kind, *(f"{e:.2f}" for e in of_kind), f"{statistics.mean(of_kind):.2f}"] for kind, of_kind in errors.items()
    ]
    margins = [b - a for a, b in zip(errors["fine-tuned"], errors["from scratch"], strict=True)]
    rows.append(["margin", *(f"{m:.2f}" for m in margins), f"{statistics.mean(margins):.2f}"])
    spread = f" (from {min(margins):.2f} to {max(margins):.2f})" if seeds > 1 else ""
    return "\n".join(
        [
            f"{images} training images a class, {epochs} epochs, {test_images:,} test images",
            "",
            *table(titles, rows, names=1),
            "",
            f"Fine-tuning is better by {statistics.mean(margins):.2f} points{spread}.",
        ]
    )


if __name__ == "__main__":
    exit_on_user_error(main)
