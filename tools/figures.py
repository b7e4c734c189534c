"""Draw the paper's figures with your runs in them: ``python -m tools.figures RUN-OR-WEIGHTS ... [--output DIR]``.

For the given runs: training curves, error against parameters (the paper's Figure 4) and, for runs on ImageNet, error against
parameters and multiply-accumulates (Figure 3), beside what the paper reports. For each run and each file of weights: the
reuse of features (Figure 5). Of data sets without a run nothing is drawn, nor error against parameters where all networks
are the same. Runs that were validated on different images stand in different panels.
"""

import dataclasses
import math
import os
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from torch import nn

from pipeline.audit import is_papers_data, published_errors_hold
from pipeline.checkpoint import load_checkpoint
from pipeline.command import ArgumentParser, exit_on_user_error
from pipeline.config import Config, DataConfig, ModelConfig
from pipeline.config_file import from_stored, load_stored_config
from pipeline.errors import UserError
from pipeline.feature_reuse import draw_reuse, feature_reuse
from pipeline.models import create_model
from pipeline.models.densenet import DenseNet
from pipeline.paper import setting_for
from pipeline.run_dir import CONFIG, epochs_done, read_records, why_no_best
from pipeline.weights import read_weights
from pipeline.words import drawable
from tools.support import published
from tools.support.facts import multiply_accumulates, network_without_weights, on_meta, parameters
from tools.support.outputs import in_folder, writable_folder
from tools.support.weights_arguments import names_of_files

# Okabe and Ito's colours, which the colour-blind tell apart, and three of Tol's; each run has a marker of its own beside.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#882255", "#999933", "#332288")
MARKERS = "osD^vPX<>*"
NAME_PLACES = ((6, 5, "left"), (6, -11, "left"), (6, 16, "left"), (-6, -11, "right"), (6, -22, "left"))  # in points
MANY = len(COLORS)  # more runs than that in a panel have not each a line in the legend
IMAGENET = "ImageNet"
BEST = 7  # runs of many that have
TITLE = 70  # characters of a line of a panel's title

Points = list[tuple[str, tuple[float, float]]]  # names, which may be alike, with x and error


@dataclass(frozen=True)
class Measure:
    """What a curve shows: its name in the records, and on the axis; whether more of it is better."""

    key: str
    title: str
    more_is_better: bool


ERROR = Measure("top1_error", "top-1 error, %", False)
AUROC = Measure("mean_auroc", "mean AUROC", True)  # where images have several labels


@dataclass(frozen=True)
class Run:
    """A run's directory.

    Attributes:
        classes: how many.
        epochs: the records of whole epochs.
        validation: which images its error is on, in words that no other images have after `told_apart`; empty if that is not
            known.
        images: how many it was trained and validated on; None if that is not known.
        fingerprint: of its training and validation images (`dataset.fingerprint_of`), None if it is not known.
        val_fingerprint: of its validation images alone; None if it is not known, as of runs of before.
    """

    name: str
    config: Config
    classes: int
    epochs: list[dict]
    validation: str = ""
    images: list[int] | None = None
    fingerprint: str | None = None
    val_fingerprint: str | None = None

    @property
    def measure(self) -> Measure:
        return AUROC if self.config.data.labels == "multi" else ERROR

    def curve(self, beginning: str) -> list[float]:
        """What the records call `beginning` and the measure, epoch by epoch; empty if they have no such thing."""
        values = [record.get(f"{beginning}{self.measure.key}") for record in self.epochs]
        known = any(value is not None for value in values)
        return [math.nan if value is None else value for value in values] if known else []

    @property
    def last(self) -> float:
        """The measure after the last epoch."""
        values = self.curve("val/")
        return values[-1] if values else math.nan

    @property
    def error(self) -> float:
        """Validation top-1 error in percent after the best epoch, whose weights ``best.pt`` has and our commands take."""
        return min(record["val/top1_error"] for record in self.epochs)

    @property
    def label(self) -> str:
        """Its name in a legend, and whose error is shown: the best epoch of those that have ended."""
        best = next(record for record in self.epochs if record["val/top1_error"] == self.error)
        done, planned = len(self.epochs), self.config.optim.epochs
        of = f"{done}" if done == planned else f"{done} so far, {planned} planned"
        return f"ours: {self.called}, best epoch ({epochs_done(best):.0f} of {of}){self.other_images}"

    @property
    def called(self) -> str:
        """Its name, and where it averages its weights which of the two sets its validation is of."""
        train = self.config.train
        return f"{self.name} ({train.best_by} weights)" if train.ema_decay else self.name

    @property
    def other_images(self) -> str:
        """Beside the paper's points, which images its error is on, if they are others; empty if that is not known."""
        if self.data not in (*published.COLUMNS, IMAGENET) or not self.validation:
            return ""
        tested = published.TEST_IMAGES["imagenet" if self.data == IMAGENET else self.config.data.dataset]
        on_test_set = not self.config.data.holdout and self.images is not None and self.images[1] == tested
        return "" if on_test_set else f", {self.validation}"

    @property
    def panel(self) -> str:
        """Title of its panel of error against parameters: the paper's data set, or its own with the images."""
        if self.data in (*published.COLUMNS, IMAGENET) or not self.validation:
            return self.data
        data = self.config.data
        if data.dataset == "images" and data.loader != "synthetic":  # the same images may lie in several folders
            return in_lines(self.validation)
        return f"{self.data}\n{in_lines(self.validation)}"

    def network(self) -> nn.Module:
        """The network without its weights."""
        return network_of(self.config.model, self.classes, self.config.data.channels)

    @property
    def has_published(self) -> bool:
        """Whether the figures that its configuration quotes may stand beside its own."""
        return published_errors_hold(self.config, self.classes, self._counts)

    @property
    def _is_imagenet(self) -> bool:
        """Whether it has ImageNet's classes and, as far as that is known, as many images to validate on."""
        known = self.images is None or self.images[1] == published.TEST_IMAGES["imagenet"]
        return self.classes == 1000 and (known or is_papers_data(self.config, self.classes, self._counts))

    @property
    def _counts(self) -> tuple[int, int] | None:
        train, val = self.images or (0, 0)
        return (train, val) if self.images else None

    @property
    def data(self) -> str:
        """Its data set: the paper's name for it, or the name of the folder."""
        config = self.config.data
        if config.loader == "synthetic":
            return "synthetic images"
        if config.dataset == "images":
            return IMAGENET if self._is_imagenet else f"images in {Path(config.dir).name}"
        return config.dataset if config.dataset == "fashion-mnist" else setting_for(self.config).name


@cache
def network_of(model: ModelConfig, classes: int, channels: int) -> nn.Module:
    """The network without its weights: of a sweep's runs it is the same."""
    return network_without_weights(model, classes, channels)


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.figures", description=__doc__)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="RUN-OR-WEIGHTS",
        help="run directories, folders of run directories, or files of weights",
    )
    parser.add_argument("--output", metavar="DIR", default="figures", help="folder for the pictures [figures]")
    options = parser.parse_args()
    output = writable_folder(options.output)
    run_dirs = run_dirs_of(options.paths)
    weights = [str(run / "checkpoints" / "last.pt") for run in run_dirs]
    weights += [path for path in options.paths if not Path(path).is_dir()]

    written = []
    runs = told_apart([read_run(run_dir, name) for name, run_dir in names_of(run_dirs).items()])
    if runs:
        written.append(save(draw_curves(runs), output / "curves.png"))
        with_errors = [run for run in runs if run.measure is ERROR]
        others = [run for run in with_errors if run.data != IMAGENET]
        small = comparable(others)
        alone = [run.name for run in others if run not in small]
        if alone:
            print(
                f"no error against parameters for {', '.join(alone)}: no network of another size was validated on the same "
                "images",
                file=sys.stderr,
                flush=True,
            )
        if small:
            written.append(save(draw_small_images(small), output / "parameters.png"))
        if large := [run for run in with_errors if run.data == IMAGENET]:
            written.append(save(draw_imagenet(large), output / "imagenet.png"))
    for name, path in zip(names_of_files(weights), weights, strict=True):
        found = read_weights(path)
        if isinstance(found.network, DenseNet):
            says_which = found.config.train.ema_decay and found.note  # files of before do not
            of = f" ({'ema' if found.averaged else 'raw'} weights)" if says_which else ""
            picture = draw_reuse(feature_reuse(found.network), f"{name}{of}: feature reuse")
            written.append(save(picture, output / f"reuse-{name}.png"))
        else:
            print(f"{path}: no picture of the reuse of features, which is of DenseNets", file=sys.stderr, flush=True)
    print("\n".join(map(str, written)))


def run_dirs_of(paths: list[str]) -> list[Path]:
    """The runs that are meant, each once, whatever names it is given under.

    Raises:
        UserError: see `runs_in`.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        for run_dir in runs_in(path) if path.is_dir() else ():
            found.setdefault(os.path.realpath(run_dir), run_dir)
    return list(found.values())


def names_of(run_dirs: list[Path]) -> dict[str, Path]:
    """Runs by their directories' names, or by their paths where several have one name."""
    times = Counter(run_dir.name for run_dir in run_dirs)
    return {run_dir.name if times[run_dir.name] == 1 else str(run_dir): run_dir for run_dir in run_dirs}


def runs_in(folder: Path) -> list[Path]:
    """The folder, if it is a run that has ended an epoch, or those in it.

    Raises:
        UserError: there is none.
    """
    below = (path for path in sorted(folder.glob("*/")) if os.access(path, os.X_OK))  # not lost+found
    found = [run for run in (folder, *below) if whole_epochs(run)]
    if not found and (reason := why_no_best(folder)):
        raise UserError(reason)
    if not found:
        raise UserError(
            f"{folder} holds no run that has ended an epoch: give a run directory, a folder of runs, or a .pt file"
        )
    return found


def whole_epochs(run_dir: Path) -> list[dict]:
    """The records of a run's epochs that have ended."""
    return [record for record in read_records(run_dir) if "val/loss" in record]


def read_run(run_dir: Path, name: str = "") -> Run:
    """A run's directory, under a name; none: the directory's."""
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    # The configuration in the directory has the sets that the run has found.
    stored = run_dir / CONFIG
    config = load_stored_config(stored) if stored.exists() else from_stored(checkpoint["config"], str(run_dir))
    epochs = whole_epochs(run_dir)
    conditions = checkpoint.get("conditions", {})
    images = conditions.get("images")
    validation = validation_of(config.data, images)
    fingerprints = conditions.get("fingerprint"), conditions.get("val_fingerprint")
    return Run(name or run_dir.name, config, len(checkpoint["classes"]), epochs, validation, images, *fingerprints)


def validation_of(data: DataConfig, images: list[int] | None) -> str:
    """In words, which images a run was validated on.

    Args:
        images: how many it was trained and validated on; None if that is not known.
    """
    train, val = images or (0, 0)
    many, all_training = (f"{val:,} ", f"the {train + val:,} ") if images else ("", "")
    if data.loader == "synthetic":
        return f"{many}synthetic images"
    if data.holdout:
        place = os.path.join(data.dir, data.train) if data.dataset == "images" else data.dataset
        return f"{many}of {all_training}training images of {place}, held out"
    place = os.path.join(data.dir, data.val) if data.dataset == "images" else f"the test set of {data.dataset}"
    return f"{many}images of {place}"


def told_apart(runs: list[Run]) -> list[Run]:
    """The runs, of which those that were validated on the same images say so in the same words (the most frequent ones), and
    no others in these.

    Of a run of before only its training and validation images together are known: its validation images are those of a run
    of today with the same ones, else another set.
    """
    known = {run.fingerprint: run.val_fingerprint for run in runs if run.val_fingerprint}
    sets = [known.get(run.fingerprint, run.fingerprint) for run in runs]
    called: dict[str | None, Counter[str]] = {}
    for of, run in zip(sets, runs, strict=True):
        called.setdefault(of, Counter())[run.validation] += 1
    words = {of: names.most_common(1)[0][0] for of, names in called.items()}
    shared = Counter(words[of] for of in words if of)
    names = {of: f"{text} (content {of[:8]})" if of and shared[text] > 1 else text for of, text in words.items()}
    return [dataclasses.replace(run, validation=names[of]) if of else run for of, run in zip(sets, runs, strict=True)]


def in_lines(text: str) -> str:
    return textwrap.fill(text, TITLE)


def draw_curves(runs: list[Run]) -> Figure:
    """Validation (solid) and training (dashed) by epoch, with what is published as a dotted line; a panel for each measure and
    for each set of images that runs were validated on.

    Of many runs in a panel the best have colours, and only their validation is drawn.
    """
    panels: dict[tuple[Measure, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.measure is AUROC):
        panels.setdefault((run.measure, run.validation), []).append(run)
    looks = [run for own in panels.values() for run in own]  # in all panels a run's own, as long as there are so many
    figure = Figure(figsize=(8, 5 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False)[:, 0]
    for ((measure, validation), own), axes in zip(panels.items(), grid, strict=True):
        many = len(own) > MANY
        shown = ranked(own)[:BEST] if many else own
        for run in own if many else []:
            if run not in shown:
                draw_curve(axes, run, "val/", "_others", color="lightgray", linewidth=0.8, markersize=0, zorder=1)
        numbered = shown if len(looks) > MANY else looks
        for run in shown:
            number = numbered.index(run)
            look = {"color": COLORS[number], "marker": MARKERS[number]}
            unlike = measure is ERROR and not many and trains_otherwise(run)
            draw_curve(axes, run, "val/", drawable(f"{run.called} *" if unlike else run.called), **look)
            if not many:
                style = {**look, "linestyle": "--", "markerfacecolor": "white"}
                draw_curve(axes, run, "epoch/train_", f"_{run.name}, training", **style)
        draw_published(axes, shown, [COLORS[numbered.index(run)] for run in shown])
        longest = max(epochs_done(run.epochs[-1]) for run in own)
        margin = max(0.5, 0.03 * longest)
        axes.set(xlabel="epoch", ylabel=measure.title, xlim=(1 - min(1, margin), longest + margin))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        on = [in_lines(f"validated on {validation}")] if validation else []
        if measure is ERROR and not many and any(map(trains_otherwise, shown)):
            on.append("* trains on mixed images or balanced classes: its two curves do not compare")
        best = f"Validation: the {BEST} best of {len(own)} runs after their last epoch, the others gray"
        both = "Validation" if measure is AUROC else "Validation (solid, filled) and training (dashed, hollow)"
        title = best if many else both
        axes.set_title(drawable("\n".join([title, *on])), fontsize=10)
        axes.legend(fontsize=9)
    return figure


def trains_otherwise(run: Run) -> bool:
    """Whether a run's training error, but not its validation error, is of mixed images, or of as many images of each class."""
    return run.config.data.mixes or run.config.data.sampling == "balanced"


def ranked(runs: list[Run]) -> list[Run]:
    """The runs of one measure, the best after its last epoch first; those of which it is not known come last."""
    sign = -1 if runs[0].measure.more_is_better else 1
    return sorted(runs, key=lambda run: math.inf if math.isnan(run.last) else sign * run.last)


def draw_curve(axes: Axes, run: Run, beginning: str, label: str, **style: object) -> None:
    values = run.curve(beginning)
    epochs = [epochs_done(record) for record in run.epochs]
    if values:
        look = {"marker": "o", "markersize": 5, "markevery": max(1, len(epochs) // 30), "label": label}
        axes.plot(epochs, values, **(look | style))  # type: ignore[arg-type]


def draw_published(axes: Axes, runs: list[Run], colors: list[str]) -> None:
    """A line for each published figure of these runs, of which several may have the same."""
    lines: dict[str, tuple[float, str]] = {}
    for run, color in zip(runs, colors, strict=True):
        published = run.config.published
        value = published.top1 if run.measure is ERROR else published.auroc
        if value is not None and run.has_published:
            unit = " %" if run.measure is ERROR else ""
            label = f"{published.source or 'published'}: {value}{unit}{on_test_images(run)}"
            lines.setdefault(label, (value, color))
    for label, (value, color) in lines.items():
        axes.axhline(value, linestyle=":", color=color, label=drawable(label))


def on_test_images(run: Run) -> str:
    """A note for a published error that stands beside an error on held-out training images."""
    return " (test images)" if run.config.data.holdout else ""


def comparable(runs: list[Run]) -> list[Run]:
    """The runs in panels in which networks of two sizes or more are known: a single size says nothing about sizes."""
    sizes: dict[str, set[str]] = {}
    for run in runs:
        sizes.setdefault(run.panel, set()).add(run.config.model.name)
    return [run for run in runs if run.panel in published.COLUMNS or len(sizes[run.panel]) > 1]


def draw_small_images(runs: list[Run]) -> Figure:
    """Error against parameters: a panel for each data set on which there are runs, and, but for the paper's, each set of
    images."""
    panels = list(dict.fromkeys(run.panel for run in runs))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in list(grid)[len(panels) :]:
        axes.axis("off")
    named: list[tuple[Axes, Points]] = []
    for title, axes in zip(panels, figure.axes, strict=False):
        points = draw_papers_points(axes, title) if title in published.COLUMNS else []
        own = [run for run in runs if run.panel == title]
        sizes = [millions(parameters(run.network())) for run in own]
        if title not in published.COLUMNS:
            points += draw_their_published(axes, own, sizes)
        draw_own(axes, own, sizes)
        axes.set(xlabel="million parameters", ylabel="top-1 error, %")
        axes.set_title(drawable(title), fontsize=10)
        named.append((axes, points))
    finish(figure, named)
    return figure


@cache
def size_of(name: str, classes: int) -> float:
    """Millions of parameters of one of the paper's networks."""
    return millions(parameters(on_meta(create_model, name, classes)))


def draw_papers_points(axes: Axes, title: str) -> Points:
    """Table 2 of the paper; the points with their names."""
    column, classes = published.COLUMNS.index(title), 100 if title.startswith("C100") else 10
    points = [
        (name, (size_of(name, classes), error))
        for name, errors in published.DENSENETS_ON_SMALL_IMAGES.items()
        if (error := errors[column]) is not None
    ]
    for kind, marker in (("DenseNet", "o"), ("DenseNet-BC", "s")):
        own = [(name, point) for name, point in points if ("_bc" in name) == (kind == "DenseNet-BC")]
        draw_points(axes, own, marker, f"{kind}, paper")
    if title in ("C10+", "C100+"):
        place = 1 if title == "C10+" else 2
        resnets = [
            (f"ResNet-{depth}", (row[0], row[place])) for depth, row in published.RESNETS_ON_SMALL_IMAGES.items()
        ]
        points += draw_points(axes, resnets, "^", "pre-activation ResNet, paper")
    return points


def draw_their_published(axes: Axes, runs: list[Run], sizes: list[float]) -> Points:
    """The figures that the runs' configurations have, each once."""
    found: dict[str, Points] = {}
    for run, size in zip(runs, sizes, strict=True):
        error, source = run.config.published.top1, f"{run.config.published.source or 'published'}{on_test_images(run)}"
        point = (run.config.model.name, (size, error))
        if error is not None and run.has_published and point not in found.setdefault(source, []):
            found[source].append((run.config.model.name, (size, error)))
    for source, points in found.items():
        draw_points(axes, points, "o", source)
    return [point for points in found.values() for point in points]


def draw_imagenet(runs: list[Run]) -> Figure:
    """Error against parameters and against multiply-accumulates, of the paper's networks and of our runs."""
    import torchvision  # takes seconds

    densenets = [
        (name, on_meta(create_model, name, dense_block="eager"), 224, top1)
        for name, (top1, _) in published.DENSENETS_ON_IMAGENET[1].items()
    ]
    resnets = [
        (name, on_meta(getattr(torchvision.models, name)), 224, error)
        for name, error in published.RESNETS_ON_IMAGENET.items()
    ]
    series = [
        ("DenseNet, paper", "o", densenets),
        ("ResNet, fb.resnet.torch", "^", resnets),
    ]
    figure = Figure(figsize=(12, 6), layout="constrained")
    by_size, by_work = figure.subplots(1, 2)
    named: tuple[Points, Points] = ([], [])
    for label, marker, networks in series:
        sizes = [(name, (millions(parameters(network)), error)) for name, network, _, error in networks]
        work = [(name, (multiply_accumulates(network, size) / 1e9, error)) for name, network, size, error in networks]
        named[0].extend(draw_points(by_size, sizes, marker, label))
        named[1].extend(draw_points(by_work, work, marker, label))
    own = [millions(parameters(run.network())) for run in runs]
    draw_own(by_size, runs, own)
    works = (multiply_accumulates(run.network(), run.config.data.crop_size, run.config.data.channels) for run in runs)
    own = [work / 1e9 for work in works]
    draw_own(by_work, runs, own)
    by_size.set(xlabel="million parameters", ylabel="top-1 error, %")
    by_work.set(xlabel="billion multiply-accumulates at 224 x 224, or at a run's own crop", ylabel="top-1 error, %")
    finish(figure, list(zip((by_size, by_work), named, strict=True)))
    return figure


def draw_own(axes: Axes, runs: list[Run], xs: list[float]) -> None:
    """A point for each run after its best epoch, named in the legend alone, as runs of one network stand close; of many one
    series."""
    errors, colors = [run.error for run in runs], unused_colors(axes)
    if len(runs) > len(colors):
        best = runs[errors.index(min(errors))].called
        on = {run.other_images for run in runs}
        images = next(iter(on)) if len(on) == 1 else ", on different images"
        axes.plot(
            xs, errors, "*", color="black", markersize=10, zorder=5,
            label=drawable(f"ours: {len(runs)} runs after their best epochs, the best {best}{images}"),
        )  # fmt: skip
        return
    for number, (run, x) in enumerate(zip(runs, xs, strict=True)):
        look = {"color": colors[-1 - number], "marker": MARKERS[-1 - number]}
        axes.plot([x], [run.error], linestyle="", markersize=10, zorder=5, label=drawable(run.label), **look)  # type: ignore[arg-type]


def draw_points(axes: Axes, points: Points, marker: str, label: str) -> Points:
    """Points of others, of which several are joined; returns them to be named."""
    ordered = sorted(point for _, point in points)
    color = next(iter(unused_colors(axes)), "dimgray")
    axes.plot(*zip(*ordered, strict=True), color=color, marker=marker, markersize=6, label=drawable(label))
    axes.plot(*zip(*ordered, strict=True), marker, color=color, markersize=6, zorder=4, label="_")  # above the names
    return points


def unused_colors(axes: Axes) -> list[str]:
    used = {line.get_color() for line in axes.lines}
    return [color for color in COLORS if color not in used]


def finish(figure: Figure, panels: list[tuple[Axes, Points]]) -> None:
    """Set the limits of the axes, put the legends below, where they hide no point, and name the points.

    A name stands right above its point, where falling lines leave room, or at the first other place that no name has taken.
    """
    for axes, _ in panels:
        axes.margins(y=0.12)
        axes.set_xlim(0, 1.25 * axes.dataLim.x1)  # so that no name leaves the frame
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.11))
    figure.draw_without_rendering()  # the panels have their size from here on
    halo = [withStroke(linewidth=2.5, foreground="white")]  # so that no line runs through a letter
    for axes, points in panels:
        taken: list[Bbox] = []
        for name, at in sorted(points, key=lambda point: point[1][1]):
            for x, y, side in NAME_PLACES:
                label = axes.annotate(
                    name, at, (x, y), textcoords="offset points", ha=side, fontsize=7.5, path_effects=halo
                )
                box = label.get_window_extent()
                if not any(box.overlaps(other) for other in taken) or (x, y, side) == NAME_PLACES[-1]:
                    break
                label.remove()
            taken.append(box)


def millions(count: int) -> float:
    return count / 1e6


def save(figure: Figure, file: Path) -> Path:
    figure.savefig(in_folder(file), dpi=110)
    return file


if __name__ == "__main__":
    exit_on_user_error(main)
