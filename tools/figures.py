"""Draw the paper's figures with your runs in them: ``python -m tools.figures RUN-OR-WEIGHTS ... [--output DIR]``.

For the given runs: training curves, error against parameters (the paper's Figure 4) and, on ImageNet, error against
parameters and multiply-accumulates (Figure 3), beside what the paper reports. For each run and each file of weights: the
reuse of features (Figure 5).
"""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from pipeline.audit import setting_for
from pipeline.checkpoint import load_checkpoint
from pipeline.config import Config, from_stored
from pipeline.errors import ArgumentParser, UserError, exit_on_user_error
from pipeline.feature_reuse import draw_reuse, feature_reuse
from pipeline.models import create_model
from pipeline.models.densenet import DenseNet
from pipeline.run_dir import epochs_done, read_records
from pipeline.weights import read_weights
from tools.support import published
from tools.support.facts import multiply_accumulates, network_without_weights, on_meta, parameters
from tools.support.outputs import writable_folder
from tools.support.weights_arguments import short_names


@dataclass(frozen=True)
class Run:
    """A run's directory: its name, configuration, number of classes, and its records of whole epochs."""

    name: str
    config: Config
    classes: int
    epochs: list[dict]

    @property
    def error(self) -> float:
        """Validation top-1 error in percent, chosen as in the paper: the best epoch on ImageNet and SVHN, else the last one."""
        errors = [record["val/top1_error"] for record in self.epochs]
        return min(errors) if self.data in ("ImageNet", "SVHN") else errors[-1]

    @property
    def label(self) -> str:
        """Its name in a legend, and the epoch that it has reached if it has not ended."""
        done, planned = len(self.epochs), self.config.optim.epochs
        held_out = ", held-out training images" if self.config.data.holdout else ""
        return f"ours: {self.name}{'' if done == planned else f', epoch {done} of {planned}'}{held_out}"

    def network(self) -> nn.Module:
        """The network without its weights."""
        return network_without_weights(self.config.model, self.classes)

    @property
    def data(self) -> str:
        """Its data set: the paper's name for it, or the name of the folder."""
        config = self.config.data
        if config.loader == "synthetic":
            return "synthetic images"
        if config.dataset == "images":
            return "ImageNet" if self.classes == 1000 else f"images in {Path(config.dir).name}"
        return config.dataset if config.dataset == "fashion-mnist" else setting_for(self.config).name


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
    run_dirs = [run for path in map(Path, options.paths) if path.is_dir() for run in runs_in(path)]
    weights = [str(run / "checkpoints" / "last.pt") for run in run_dirs]
    weights += [path for path in options.paths if not Path(path).is_dir()]

    written = []
    runs = [read_run(run_dir) for run_dir in run_dirs]
    if runs:
        written.append(save(draw_curves(runs), output / "curves.png"))
        written.append(save(draw_small_images(runs), output / "parameters.png"))
        written.append(save(draw_imagenet([run for run in runs if run.data == "ImageNet"]), output / "imagenet.png"))
    for name, path in zip(short_names(weights), weights, strict=True):
        network = read_weights(path).network
        if isinstance(network, DenseNet):
            picture = draw_reuse(feature_reuse(network), f"{name}: average absolute weight by source and target layer")
            written.append(save(picture, output / f"reuse-{name}.png"))
    print("\n".join(map(str, written)))


def runs_in(folder: Path) -> list[Path]:
    """The folder, if it is a run that has ended an epoch, or those in it.

    Raises:
        UserError: there is none.
    """
    found = [run for run in (folder, *sorted(folder.glob("*/"))) if whole_epochs(run)]
    if not found:
        raise UserError(
            f"{folder} holds no run that has ended an epoch: give a run directory, a folder of runs, or a .pt file"
        )
    return found


def whole_epochs(run_dir: Path) -> list[dict]:
    """The records of a run's epochs that have ended."""
    return [record for record in read_records(run_dir) if "val/top1_error" in record]


def read_run(run_dir: Path) -> Run:
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    config = from_stored(checkpoint["config"], str(run_dir))
    epochs = whole_epochs(run_dir)
    return Run(run_dir.name, config, len(checkpoint["classes"]), epochs)


def draw_curves(runs: list[Run]) -> Figure:
    """Error in validation (solid) and in training (dashed) by epoch, with what is published as a dotted line."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        epochs = [epochs_done(record) for record in run.epochs]
        (line,) = axes.plot(epochs, [r["val/top1_error"] for r in run.epochs], label=f"{run.name}, validation")
        axes.plot(
            epochs,
            [r["epoch/train_top1_error"] for r in run.epochs],
            "--",
            color=line.get_color(),
            label=f"{run.name}, training",
        )
        if run.config.published.top1 is not None:
            axes.axhline(
                run.config.published.top1,
                linestyle=":",
                color=line.get_color(),
                label=f"{run.config.published.source or 'published'}: {run.config.published.top1} %{on_test_images(run)}",
            )
    axes.set(xlabel="epochs", ylabel="top-1 error, %", title="Training curves", ylim=(0, None))
    axes.legend()
    return figure


def on_test_images(run: Run) -> str:
    """A note for a published error that stands beside an error on held-out training images."""
    return " (test images)" if run.config.data.holdout else ""


def draw_small_images(runs: list[Run]) -> Figure:
    """Error against parameters: a panel for each data set on which there are runs, and the paper's C10+."""
    panels = list(dict.fromkeys(["C10+", *(run.data for run in runs if run.data != "ImageNet")]))
    figure = Figure(figsize=(6 * len(panels), 5), layout="constrained")
    for title, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        if title in published.COLUMNS:
            draw_papers_points(axes, title)
        for run in (run for run in runs if run.data == title):
            point = (millions(parameters(run.network())), run.error)
            draw_points(axes, {run.name: point}, "*", run.label)
            if title not in published.COLUMNS and run.config.published.top1 is not None:
                draw_points(
                    axes,
                    {run.config.model.name: (point[0], run.config.published.top1)},
                    "o",
                    f"{run.config.published.source or 'published'}{on_test_images(run)}",
                )
        axes.set(xlabel="million parameters", ylabel="top-1 error, %", title=title)
        axes.legend()
    return figure


def draw_papers_points(axes: Axes, title: str) -> None:
    column, classes = published.COLUMNS.index(title), 100 if title.startswith("C100") else 10
    points = {
        name: (millions(parameters(on_meta(create_model, name, classes))), error)
        for name, errors in published.DENSENETS_ON_SMALL_IMAGES.items()
        if (error := errors[column]) is not None
    }
    for kind, marker in (("DenseNet", "o"), ("DenseNet-BC", "s")):
        own = {name: point for name, point in points.items() if ("_bc" in name) == (kind == "DenseNet-BC")}
        draw_points(axes, own, marker, f"{kind}, paper")
    if title in ("C10+", "C100+"):
        place = 1 if title == "C10+" else 2
        resnets = {f"ResNet-{depth}": (row[0], row[place]) for depth, row in published.RESNETS_ON_SMALL_IMAGES.items()}
        draw_points(axes, resnets, "^", "pre-activation ResNet, paper")


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
        *((run.label, "*", [(run.name, run.network(), run.config.data.crop_size, run.error)]) for run in runs),
    ]
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_size, by_work = figure.subplots(1, 2)
    for label, marker, networks in series:
        sizes = {name: (millions(parameters(network)), error) for name, network, _, error in networks}
        work = {name: (multiply_accumulates(network, size) / 1e9, error) for name, network, size, error in networks}
        draw_points(by_size, sizes, marker, label)
        draw_points(by_work, work, marker, label)
    by_size.set(xlabel="million parameters", ylabel="top-1 error, %")
    by_work.set(xlabel="billion multiply-accumulates at 224 x 224, or at a run's own crop", ylabel="top-1 error, %")
    by_size.legend()
    return figure


def draw_points(axes: Axes, points: dict[str, tuple[float, float]], marker: str, label: str) -> None:
    """Points (x, error) with their names; several are joined."""
    ordered = sorted(points.items(), key=lambda item: item[1])
    axes.plot(
        *zip(*(point for _, point in ordered), strict=True),
        marker=marker,
        markersize=12 if marker == "*" else 6,
        label=label,
    )
    for name, point in ordered:
        axes.annotate(name, point, textcoords="offset points", xytext=(5, 5), fontsize=7)
    axes.margins(x=0.2, y=0.1)


def millions(count: int) -> float:
    return count / 1e6


def save(figure: Figure, file: Path) -> Path:
    figure.savefig(file, dpi=110)
    return file


if __name__ == "__main__":
    exit_on_user_error(main)
