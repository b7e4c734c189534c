"""Estimate the scaling of training over many GPUs: ``python -m tools.lab.scaling [--batch-size N] [--measured FILE]``.

A calculation from assumed bandwidths, not a measurement: it says where a global batch stops scaling, and what limits it
there. FILE is what ``python -m tools.gpu`` wrote on a GPU: the line through a network's times of a step over two batch sizes
gives its launch and speed, of the precision that --precision says. For N GPUs with b = batch / N images each, a step takes

    compute      launch + b / speed             launch: what a step costs whatever its size
    all-reduce   2 (N-1)/N bytes / bandwidth + 2 log2(N) latency, of which the backward pass hides what it can:
                 two thirds of the compute, but not the last bucket of 25 MB
    loader       b / loader speed, beside the compute
    and its share of a checkpoint in ten minutes and of a validation after each epoch, which is divided by the ranks.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.compilation import in_words
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from tools.lab.imagenet import TRAINING_IMAGES, VALIDATION_IMAGES
from tools.support.facts import multiply_accumulates, network_without_weights, parameters
from tools.support.gpu_speed import OURS
from tools.support.markdown import table

MODELS = ("densenet121", "densenet161", "densenet169", "densenet201", "densenet264")
BUCKET = 25 * 2**20  # bytes, DDP's default
BACKWARD = 2 / 3  # of a step's compute
CHECKPOINT_INTERVAL = 600  # seconds


@dataclass(frozen=True)
class Machines:
    """What the model assumes. Bandwidths in bytes a second, times in seconds.

    Attributes:
        within: all-reduce bandwidth among the GPUs of a node.
        between: network bandwidth of a node.
        latency: of a message between nodes.
        launch: of a step's kernels and host work, whatever the batch.
        loader: images a second that the CPU cores of one GPU load.
        checkpoint: a checkpoint's time for each byte.
    """

    gpus_per_node: int
    within: float
    between: float
    latency: float
    launch: float
    loader: float
    checkpoint: float


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step by what they go into."""

    compute: float
    exposed_all_reduce: float
    loader_wait: float
    checkpoint: float
    validation: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed_all_reduce + self.loader_wait + self.checkpoint + self.validation


def step_time(gpus: int, batch: int, parameters: int, speed: float, machines: Machines) -> Step:
    """Model one step of the global `batch` over `gpus`, each of which computes `speed` images a second."""
    local = batch / gpus
    compute = machines.launch + local / speed
    exposed = _exposed_all_reduce(gpus, 4 * parameters, BACKWARD * compute, machines)
    loader_wait = max(0.0, local / machines.loader - compute - exposed)
    busy = compute + exposed + loader_wait
    steps = math.ceil(TRAINING_IMAGES / batch)
    validation = math.ceil(VALIDATION_IMAGES / gpus) / min(3 * speed, machines.loader) / steps
    checkpoint = 8 * parameters * machines.checkpoint * busy / CHECKPOINT_INTERVAL  # weights and momentum
    return Step(compute, exposed, loader_wait, checkpoint, validation)


def _exposed_all_reduce(gpus: int, size: int, backward: float, machines: Machines) -> float:
    """Seconds of the all-reduce of `size` bytes that the backward pass does not hide."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / machines.gpus_per_node)
    bandwidth = machines.within if nodes == 1 else min(machines.within, machines.between)
    messages = math.ceil(size / BUCKET)
    latency = 2 * math.ceil(math.log2(gpus)) * machines.latency

    def duration(part: float) -> float:
        return 2 * (gpus - 1) / gpus * part / bandwidth

    last = duration(min(size, BUCKET)) + latency
    hidden = duration(max(0, size - BUCKET)) + (messages - 1) * latency
    return last + max(0.0, hidden - backward)


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.lab.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=positive_integer, default=256, help="global batch [%(default)s]")
    parser.add_argument(
        "--tflops", type=float, default=20.0, help="TFLOP/s that a GPU reaches in training [%(default)s]"
    )
    parser.add_argument(
        "--speed",
        action="append",
        default=[],
        metavar="MODEL=N",
        help="training speed of a network in images/s per GPU, without what a step takes whatever its size (--launch), in "
        "place of --tflops",
    )
    parser.add_argument(
        "--measured",
        metavar="FILE",
        help="JSON of python -m tools.gpu, in place of --tflops and --launch for its networks",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16", "fp16"), default="bf16", help="of --measured [%(default)s]"
    )
    parser.add_argument("--gpus-per-node", type=positive_integer, default=8, help="GPUs per node [%(default)s]")
    parser.add_argument(
        "--within", type=float, default=200.0, help="all-reduce bandwidth within a node, GB/s [%(default)s]"
    )
    parser.add_argument("--between", type=float, default=25.0, help="network bandwidth of a node, GB/s [%(default)s]")
    parser.add_argument(
        "--latency", type=float, default=10.0, help="latency of a message between nodes, microseconds [%(default)s]"
    )
    parser.add_argument(
        "--launch", type=float, default=25.0, help="fixed time of a step whatever the batch size, ms [%(default)s]"
    )
    parser.add_argument(
        "--loader", type=float, default=2000.0, help="loading speed of the CPU cores of one GPU, images/s [%(default)s]"
    )
    parser.add_argument("--disk", type=float, default=0.3, help="speed of writing a checkpoint, GB/s [%(default)s]")
    options = parser.parse_args()
    machines = Machines(
        gpus_per_node=options.gpus_per_node,
        within=options.within * 1e9,
        between=options.between * 1e9,
        latency=options.latency * 1e-6,
        launch=options.launch * 1e-3,
        loader=options.loader,
        checkpoint=1 / (options.disk * 1e9),
    )
    lines = read_measured(Path(options.measured), options.precision) if options.measured else {}
    given = dict(_model_and_speed(word) for word in options.speed)
    counts = [2**k for k in range(11) if 2**k <= options.batch_size]
    print(
        f"Global batch {options.batch_size}; images/s of all GPUs, efficiency against one GPU, and the time of an epoch.\n"
    )
    for name, line in lines.items():
        print(f"{name}: {line.speed:,.0f} images/s and {1e3 * line.launch:.1f} ms a step, measured: {line.source}")
    if lines:
        print(f"Assumed: all bandwidths, and the speeds of {', '.join(set(MODELS) - {*lines, *given}) or 'none'}.\n")
    rows = []
    for name in MODELS:
        network = network_without_weights(ModelConfig(name=name), classes=1000)
        size, work = parameters(network), multiply_accumulates(network, 224)
        # Forward, and backward to data and to weights: three times the multiply-accumulates, each two operations.
        speed, here = options.tflops * 1e12 / (6 * work), machines
        if name in lines:
            speed, here = lines[name].speed, replace(machines, launch=lines[name].launch)
        speed = given.get(name, speed)
        alone = options.batch_size / step_time(1, options.batch_size, size, speed, here).total
        for gpus in counts:
            step = step_time(gpus, options.batch_size, size, speed, here)
            images = options.batch_size / step.total
            parts = {"all-reduce": step.exposed_all_reduce, "launch": here.launch, "loader": step.loader_wait}
            parts["compute"] = step.compute - here.launch
            rows.append(
                [
                    name, max(parts, key=parts.__getitem__), str(gpus), str(options.batch_size // gpus), f"{images:,.0f}",
                    f"{images / alone / gpus:.0%}", f"{TRAINING_IMAGES / images / 60:.1f} min",
                ]
            )  # fmt: skip
    titles = ["network", "most of a step", "GPUs", "images each", "images/s", "efficiency", "epoch"]
    print("\n".join(table(titles, rows, names=2)))


@dataclass(frozen=True)
class Line:
    """A network's time of a step over the batch: launch + b / speed.

    Attributes:
        source: what was measured, in words.
    """

    launch: float
    speed: float
    source: str


def read_measured(file: Path, precision: str) -> dict[str, Line]:
    """The lines of the networks that `tools.gpu` has measured with two batch sizes, each of its fastest implementation.

    Raises:
        UserError: the file is not such a one, or has nothing to draw a line through.
    """
    try:
        results = json.loads(file.read_text())
        device = results["device"]
        rows = [
            row for check in results["checks"] if check["check"] == "speed" for row in (check["figures"] or {})["rows"]
        ]
        rows = [row for row in rows if row["precision"] == precision and row["implementation"] in OURS]
        found = {name: _line([row for row in rows if row["model"] == name]) for name in MODELS}
    except OSError as error:
        raise UserError(f"--measured {file}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--measured {file} is no JSON of python -m tools.gpu with speeds in it ({reason})") from None
    if device != "cuda":
        raise UserError(f"--measured {file} was measured on a {device}: run python -m tools.gpu on a GPU")
    lines = {name: line for name, line in found.items() if line}
    if not lines:
        raise UserError(
            f"--measured {file} has no network of ours in {precision} with two batch sizes: run python -m tools.gpu with more "
            "--minutes, or give another --precision"
        )
    return lines


def _line(rows: list[dict[str, Any]]) -> Line | None:
    """Through the smallest and the largest batch of the implementation that is fastest; None if no one has two."""
    lines = []
    for kind in {_kind(row) for row in rows}:
        own = sorted((row["batch_size"], row["seconds"]) for row in rows if _kind(row) == kind)
        (small, least), (large, most) = own[0], own[-1]
        if large > small and most > least:
            speed = (large - small) / (most - least)
            source = f"{', '.join(kind)}, batches of {small} and {large}"
            lines.append((most / large, Line(max(0.0, least - small / speed), speed, source)))
    return min(lines, key=lambda item: item[0])[1] if lines else None


def _kind(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(filter(None, (row["implementation"], row["memory_format"], in_words(row["compile"]))))


def _model_and_speed(word: str) -> tuple[str, float]:
    model, _, speed = word.partition("=")
    try:
        value = float(speed)
    except ValueError:
        value = 0.0
    if model not in MODELS or value <= 0:
        raise UserError(f"--speed {word}: MODEL=IMAGES_PER_SECOND is needed, with one of {', '.join(MODELS)}")
    return model, value


if __name__ == "__main__":
    exit_on_user_error(main)
