"""What each piece of a recipe brings at equal cost: ``python -m tools.lab.ablation DATA``.

DATA holds Fashion-MNIST as torchvision keeps it. One small network trains on a fixed part of the training images, for few
epochs, with each piece switched on alone (ROWS). All runs take the same number of steps on the same images. With the same seed
they have the same initial weights, and see the images in the same order. The error is that of the last epoch on other training
images, which are held out; the test images are never read.

Each training is a process of its own, and its command is printed. The same command of the tool goes on where it was stopped:
runs that are finished count as they are, others resume. ``table.md`` in the run directory is written after each run.

Few epochs favour light augmentation: what makes the images harder pays where a network sees them often enough to overfit.
"""

import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import Config
from pipeline.config_file import load_config, load_stored_config
from pipeline.data.arrays import ArraySource, read_arrays
from pipeline.errors import InterruptedRunError, UserError, look_up
from pipeline.exits import EXIT_RESUME
from pipeline.parsing import value_text
from pipeline.run_dir import epochs_done, read_records
from tools.support.markdown import table
from tools.support.outputs import made_folder
from tools.support.significance import paired_interval

CONFIG = "configs/fashion-mnist.yaml"
SHARED = {"train.precision": "bf16", "train.pictures_every": 0}
STEPS = {"optim.schedule": "step", "optim.milestones": ["1/2", "3/4"]}
AVERAGED = {"train.ema_decay": 0.99}  # which changes nothing but that the average is evaluated too

# What each row is called, and its fields beside those of the file, whose schedule is a cosine. Of those that average their
# weights a second row has the average. TrivialAugment's colour operation leaves gray images as they are.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("base: two drops, crop and flip", {**STEPS, **AVERAGED}),
    "cosine": ("cosine", AVERAGED),
    "cutout": ("cutout, 8 pixels", {**STEPS, "data.cutout": 8}),
    "random_erasing": ("random erasing, 0.25", {**STEPS, "data.random_erasing": 0.25}),
    "mixup": ("mixup, 0.2", {**STEPS, "data.mixup_alpha": 0.2}),
    "cutmix": ("cutmix, 1.0, half of the pairs", {**STEPS, "data.cutmix_alpha": 1.0, "data.mix_prob": 0.5}),
    "label_smoothing": ("label smoothing, 0.1", {**STEPS, "optim.label_smoothing": 0.1}),
    "trivialaugment": ("TrivialAugment", {**STEPS, "data.auto_augment": "trivialaugment"}),
    "no_nesterov": ("momentum without Nesterov", {**STEPS, "optim.nesterov": False}),
    "no_norm_decay": ("no weight decay on norms and biases", {**STEPS, "optim.decay_norms": False}),
}


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.lab.ablation", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="folder in which torchvision keeps Fashion-MNIST")
    parser.add_argument(
        "--rows",
        metavar="NAME,...",
        default=",".join(ROWS),
        help="the base and pieces to compare with it [%(default)s]",
    )
    parser.add_argument("--seeds", type=positive_integer, metavar="N", default=3, help="number of seeds, from 1 on [3]")
    parser.add_argument("--epochs", type=positive_integer, metavar="N", default=6, help="passes over the images [6]")
    parser.add_argument("--images", type=positive_integer, metavar="N", default=8000, help="training images [8000]")
    parser.add_argument(
        "--held-out",
        type=positive_integer,
        metavar="N",
        default=5000,
        help="other training images to evaluate on [5000]",
    )
    parser.add_argument("--network", metavar="NAME", default="densenet_bc40_k12", help="of the zoo [%(default)s]")
    parser.add_argument("--run-dir", metavar="DIR", default="runs/ablation", help="for images and runs [%(default)s]")
    options = parser.parse_args()
    names = list(dict.fromkeys(["base", *(name.strip() for name in options.rows.split(",") if name.strip())]))
    for name in names:
        look_up(ROWS, name, "--rows")
    out = made_folder(options.run_dir, "--run-dir").absolute()
    data = out / f"images-{options.images}-{options.held_out}"
    write_images(options.data, data, options.images + options.held_out)
    shared = {
        "model.name": options.network,
        "data.dir": str(data),
        "data.holdout": options.held_out,
        "optim.epochs": options.epochs,
        **SHARED,
    }
    errors: dict[str, list[float]] = {}
    text = ""
    for seed in range(1, options.seeds + 1):
        for name in names:
            title, changes = ROWS[name]
            fields = {**shared, **changes, "seed": seed, "run_dir": str(out / f"{name}-{seed}")}
            record = last_record(load_config(CONFIG, fields))
            if record is None:
                train(fields)
                record = last_record(load_config(CONFIG, fields))
            if record is None:
                raise UserError(
                    f"{out / f'{name}-{seed}'} has no record of its last epoch: remove that run, and start again"
                )
            for row, error in errors_of(record, title).items():
                errors.setdefault(row, []).append(error)
            text = report(errors, options)
            (out / "table.md").write_text(text + "\n")
    print(text)


def write_images(source: str, folder: Path, images: int) -> None:
    """Write so many of the training images, the same in each call, as torchvision keeps them; what is there is not written.

    Of the test images there are empty files, without which torchvision takes none of the four.
    """
    raw = folder / "FashionMNIST" / "raw"
    last = raw / "train-labels-idx1-ubyte"
    if last.exists():
        return
    arrays = read_arrays(ArraySource("fashion-mnist", source, "train"))
    if images > len(arrays.labels):
        raise UserError(
            f"--images and --held-out are {images:,} together, and {source} has {len(arrays.labels):,} training images: "
            "lower them"
        )
    chosen = np.sort(np.random.default_rng(0).permutation(len(arrays.labels))[:images])
    raw.mkdir(parents=True, exist_ok=True)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).touch()
    write_idx(raw / "train-images-idx3-ubyte", arrays.pixels[chosen])
    write_idx(part := last.with_suffix(".part"), arrays.labels[chosen])
    part.rename(last)  # last: it stands for both


def write_idx(file: Path, array: np.ndarray) -> None:
    """Write bytes as an idx file (http://yann.lecun.com/exdb/mnist describes the format)."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    file.write_bytes(header + array.astype(np.uint8).tobytes())


def last_record(config: Config) -> dict[str, Any] | None:
    """The record of the last epoch's end, if the run is finished and of this configuration."""
    run_dir = Path(config.run_dir)
    stored = run_dir / "config.yaml"
    if not stored.exists() or load_stored_config(stored) != config:
        return None
    ends = [record for record in read_records(run_dir) if "val/top1_error" in record]
    return ends[-1] if ends and epochs_done(ends[-1]) == config.optim.epochs else None


def train(fields: dict[str, Any]) -> None:
    """Train, or resume, in a process of its own."""
    words = [word for key, value in fields.items() for word in (f"--{key}", value_text(value))]
    print("python -m", shlex.join(["pipeline.train", CONFIG, *words]), flush=True)
    code = subprocess.run([sys.executable, "-m", "pipeline.train", CONFIG, *words]).returncode
    if code == EXIT_RESUME:
        raise InterruptedRunError(f"{fields['run_dir']} was asked to leave")
    if code:
        raise UserError(f"the training in {fields['run_dir']} ended with exit code {code}: its last line says why")


def errors_of(record: dict[str, Any], title: str) -> dict[str, float]:
    """Held-out errors in percent: of the raw weights, and of their average where there is one."""
    if "val_raw/top1_error" not in record:
        return {title: record["val/top1_error"]}
    return {title: record["val_raw/top1_error"], f"{title}; average (EMA)": record["val/top1_error"]}


def report(errors: dict[str, list[float]], options: Any) -> str:
    """A Markdown table: each row's errors by seed in percent, and its difference to the first row's.

    Rows may lack their last seeds, as long as they are not trained.
    """
    seeds = [f"seed {seed}" for seed in range(1, options.seeds + 1)]
    base = next(iter(errors.values()))
    rows = []
    for title, found in errors.items():
        cells = [f"{error:.2f}" for error in found] + ["-"] * (options.seeds - len(found))
        spread = f"{statistics.stdev(found):.2f}" if len(found) > 1 else "-"
        rows.append([title, *cells, f"{statistics.mean(found):.2f}", spread, *_compared(found, base)])
    titles = ["held-out top-1 error, %", *seeds, "mean", "spread", "difference", "95 % interval", "verdict"]
    return "\n".join(
        [
            f"{options.network}, bf16, {options.images:,} training images of Fashion-MNIST, {options.epochs} epochs, each row "
            f"the same steps; {options.held_out:,} held-out training images, after the last epoch.",
            "",
            *table(titles, rows, names=1),
            "",
            "The spread is the standard deviation over seeds. The difference is to the base of the same seed; its interval is "
            "Student's, and is not corrected for the number of rows: of twenty such verdicts about one is wrong by chance.",
            f"{options.epochs} epochs favour light augmentation: these are no verdicts on long trainings.",
        ]
    )


def _compared(found: list[float], base: list[float]) -> list[str]:
    """Difference to the base, its interval, and what that says."""
    if found is base:
        return ["", "", ""]
    difference, half = paired_interval([own - other for own, other in zip(found, base, strict=False)])
    if math.isinf(half):
        return [f"{difference:+.2f}", "-", "one seed says nothing"]
    low, high = difference - half, difference + half
    verdict = "better" if high < 0 else "worse" if low > 0 else "within the noise"
    return [f"{difference:+.2f}", f"{low:+.2f} to {high:+.2f}", verdict]


if __name__ == "__main__":
    exit_on_user_error(main)
