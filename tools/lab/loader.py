"""The loader benchmark: how exact and how fast the data loaders are on your images.

``python -m tools.lab.loader DIR [--images N] [--output FOLDER]`` prepares the same images with the native loader, DALI, the
PIL reference and torchvision, compares the results operator by operator, and times the loaders in interleaved repetitions. It
prints the tables and writes loader.json, loader.md, loader.png and contact-sheet.png.

DALI on GPU takes part where there is a GPU; this benchmark has not been run on one yet.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional
from tqdm import tqdm

from pipeline.command import ArgumentParser, exit_on_user_error, positive_integer
from pipeline.config import DataConfig, Interpolation
from pipeline.config_file import load_config
from pipeline.data.color import apply_colors
from pipeline.data.dali_stages import CutPipeline
from pipeline.data.decoding import decode
from pipeline.data.index import DatasetIndex
from pipeline.data.index_cache import cache_beside
from pipeline.data.loader import (
    ColoringPipeline,
    EvaluationLoader,
    ImagePipeline,
    Shard,
    TrainingLoader,
    create_image_pipeline,
    unavailable_reason,
)
from pipeline.data.native import DECODE, READ, NativePipeline
from pipeline.data.plan import BatchPlan, evaluation_plans, training_plans
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes
from pipeline.machine import available_cores, keep_freed_memory
from tools.lab.loader_report import (
    BASELINE,
    BASELINE_ONE_CROP,
    BOUND,
    DALI_CPU,
    DALI_GPU,
    DALI_USUAL,
    FRAME,
    NATIVE,
    ONE_CROP,
    REFERENCE,
    REGIONS,
    STAGES,
    TEN_CROPS,
    TORCHVISION,
    baseline_of,
    plot,
    report,
)
from tools.lab.machine import describe_machine
from tools.lab.peers import UsualDali, torchvision_evaluation, torchvision_training
from tools.support.outputs import made_folder
from tools.support.speed import median_seconds

SEED = 1
RESIZES: tuple[Interpolation, ...] = typing.get_args(Interpolation)
SHEET_IMAGES, AMPLIFICATION = 8, 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """The images, their preparation and the cores, which are the same in all measurements."""

    index: DatasetIndex
    config: DataConfig
    threads: int
    batch_size: int

    def image_pipeline(self, name: str, resize: Interpolation, views: int) -> ImagePipeline:
        if name == TORCHVISION:
            return TorchvisionPipeline(self.index, self.config.crop_size, resize)
        config = dataclasses.replace(self.loader_config(name), interpolation=resize)
        return create_image_pipeline(self.index, config, self.shard(name), self.batch_size, views)

    def loader_config(self, name: str) -> DataConfig:
        return dataclasses.replace(self.config, loader={NATIVE: "native", REFERENCE: "reference"}.get(name, "dali"))

    def shard(self, name: str) -> Shard:
        return Shard(rank=0, ranks=1, device=device_of(name), threads=self.threads)

    def training_plans(self) -> list[BatchPlan]:
        options = dict(seed=SEED, epoch=0, first_step=0, batch_size=self.batch_size, rank=0, ranks=1, accumulation=1)
        return list(training_plans(self.index, self.config, **options))

    def evaluation_plans(self, crops: int) -> list[BatchPlan]:
        options = dict(batch_size=self.batch_size, rank=0, ranks=1)
        return list(evaluation_plans(self.index, self.config, crops=crops, **options))


# What other loaders are measured without.
ALONE: dict[str, Any] = dict(
    auto_augment="none", mixup_alpha=0.0, cutmix_alpha=0.0, aug_repeats=1, train_crop_size=(), train_crop_milestones=(),
    cutout=0, random_erasing=0.0,
)  # fmt: skip


def main() -> None:
    options = _parser().parse_args()
    output = made_folder(options.output)
    config = load_config(options.config).data if options.config else DataConfig()
    plain = dataclasses.replace(config, **ALONE)
    if plain != config:
        print(
            "compared at data.crop_size, without auto_augment, mixing and repeats, which torchvision's loader has not here"
        )
    config = plain
    threads = options.threads or config.threads or available_cores()
    config = dataclasses.replace(config, interpolation=options.interpolation or config.interpolation, threads=threads)
    keep_freed_memory()  # as training on CPU does
    workload = Workload(open_images(Path(options.dir), options.images, output), config, threads, options.batch_size)

    print(f"comparing the loaders' images on {len(workload.index)} images of {workload.index.root}", flush=True)
    fidelity = measure_fidelity(workload)
    contact_sheet(workload, output / "contact-sheet.png")
    print(f"timing the loaders: {options.repeats} repetitions after one that warms up", flush=True)
    torch.set_num_threads(max(1, available_cores() - threads))  # more would only take the loader's cores from it
    speed, stages = measure_speed(workload, options.repeats)

    dali = [package.name for package in importlib.metadata.distributions() if package.name.startswith("nvidia-dali")]
    results = {
        "machine": describe_machine(["torch", "torchvision", *dali, "numpy", "pillow"]),
        "images": {
            "root": workload.index.root,
            "count": len(workload.index),
            "mean_pixels": workload.index.sizes.prod(axis=1).mean(),
        },
        "settings": {name: getattr(options, name) for name in ("repeats", "batch_size")}
        | {"threads": threads, "interpolation": config.interpolation, "crop_size": config.crop_size},
        "fidelity": fidelity,
        "speed": speed,
        "stages": stages,
    }
    text = report(results)
    print(f"\n{text}\n\nin {output}: loader.json, loader.md, loader.png, contact-sheet.png")
    (output / "loader.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "loader.md").write_text(text + "\n")
    plot(results, output / "loader.png")


def open_images(folder: Path, images: int, output: Path) -> DatasetIndex:
    """Index `folder` (or its train/) and keep `images` of it, evenly spread."""
    folder = folder / "train" if (folder / "train").is_dir() else folder
    index = scan_classes(folder, cache_beside(folder, output), progress=True)
    kept = np.unique(np.linspace(0, len(index) - 1, min(images, len(index))).round().astype(int))
    rows = {name: getattr(index, name)[kept] for name in ("labels", "sizes", "offsets", "lengths")}
    return dataclasses.replace(index, names=tuple(index.names[i] for i in kept), **rows)


def fast_pipelines() -> list[str]:
    """The loaders that can be used here, but for the reference."""
    native = [] if unavailable_reason("native") else [NATIVE]
    return [*native, *([DALI_GPU] if torch.cuda.is_available() else []), DALI_CPU]


def device_of(name: str) -> torch.device:
    return torch.device("cuda", 0) if name == DALI_GPU else torch.device("cpu")


# torchvision, as an image pipeline of plans


class TorchvisionPipeline:
    """Executes plans with torchvision's functional transforms on Pillow images, as most training code does."""

    def __init__(self, index: DatasetIndex, crop_size: int, resize: Interpolation):
        self._index, self._crop_size, self._reader = index, crop_size, Reader(index)
        # It has no filter like the paper's: its bicubic, with antialias, is the nearest.
        modes = functional.InterpolationMode
        self._filter = modes.BILINEAR if resize == "pil-bilinear" else modes.BICUBIC

    def run(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, Tensor]]:
        """Yield each plan with its pixels, (n, V, H, W, 3) uint8."""
        for plan, contents in self._reader.read_ahead(plans):
            yield plan, torch.stack([self._views(plan, i, content.result()) for i, content in enumerate(contents)])

    def _views(self, plan: BatchPlan, i: int, content: np.ndarray) -> Tensor:
        image = functional.crop(decode(content, self._index.location(plan.ids[i])), *plan.crop_boxes[i].tolist())
        image = functional.resize(image, plan.sizes[i].tolist(), self._filter, antialias=True)
        views = []
        for (top, left), mirrored in zip(plan.offsets[i].tolist(), plan.hflip[i], strict=True):
            view = functional.crop(image, top, left, self._crop_size, self._crop_size)
            views.append(torch.from_numpy(np.array(functional.hflip(view) if mirrored else view)))
        return torch.stack(views)


def clamped_colors(pixels: Tensor, plan: BatchPlan, config: DataConfig) -> Tensor:
    """What `apply_colors` does, with the same random factors but torchvision's operators, which round and clamp bytes.

    Before the normalisation A = b c (s I + (1 - s) 1 g'), B = b (1 - c) 1 g' and t is the pca_noise, in whatever order
    brightness b, contrast c and saturation s came: the factors follow from the plan. The order matters to the clamping
    only.
    """
    std, mean = np.array(config.std), np.array(config.mean)
    color, mean_color = plan.color * std[:, None], plan.mean_color * std[:, None]
    bc = color.sum(axis=2).mean(axis=1)
    saturation = (color[:, 0, 0] - color[:, 1, 0]) / bc
    brightness = bc + mean_color.sum(axis=2).mean(axis=1)
    pca_noise = torch.from_numpy((plan.shift * std + mean).astype(np.float32))
    results = []
    for i, views in enumerate(pixels):
        for view in views:
            image = functional.adjust_brightness(Image.fromarray(view.numpy()), brightness[i])
            image = functional.adjust_contrast(image, bc[i] / brightness[i])
            image = functional.adjust_saturation(image, saturation[i])
            results.append(functional.to_tensor(image) + pca_noise[i, :, None, None])
    return functional.normalize(torch.stack(results), config.mean, config.std)


# Fidelity


def frame_widths(plan: BatchPlan) -> list[int]:
    """Width in pixels of the frame of each view of a plan, n * V: where DALI repeats the edge of an enlarged crop and Torch7
    extrapolates it. That is one pixel of the crop as it is after the resize, and FRAME at least."""
    enlarged = (plan.sizes - 1) / np.maximum(plan.crop_boxes[:, 2:] - 1, 1)
    return np.repeat(np.maximum(np.ceil(enlarged.max(axis=1)).astype(int), FRAME), plan.hflip.shape[1]).tolist()


class Differences:
    """Mean and maximum of absolute differences: everywhere, in the interior, and in the frame around it."""

    def __init__(self):
        self._sums, self._counts, self._maxima = np.zeros(3), np.zeros(3), np.zeros(3)

    def add(self, actual: Tensor, expected: Tensor, frames: Sequence[int] = (FRAME,)) -> None:
        """Add images, (n, H, W, 3), or one, with the width of the frame of each, or one width for all."""
        differences = (actual.cpu() - expected.cpu()).abs()
        for difference, frame in zip(
            differences.view(-1, *differences.shape[-3:]), itertools.cycle(frames), strict=False
        ):
            interior = difference[frame:-frame, frame:-frame]
            everywhere, inside = difference.sum(dtype=torch.float64).item(), interior.sum(dtype=torch.float64).item()
            self._sums += (everywhere, inside, everywhere - inside)
            self._counts += (difference.numel(), interior.numel(), difference.numel() - interior.numel())
            maxima = [difference.max().item(), interior.max().item() if interior.numel() else 0.0]
            interior.zero_()  # leaves the frame
            self._maxima = np.maximum(self._maxima, [*maxima, difference.max().item()])

    def result(self) -> dict[str, float]:
        means = self._sums / np.maximum(self._counts, 1)
        places = ("", "interior_", "frame_")
        return {f"{place}mean": mean for place, mean in zip(places, means.tolist(), strict=True)} | {
            f"{place}max": maximum for place, maximum in zip(places, self._maxima.tolist(), strict=True)
        }


def measure_fidelity(workload: Workload) -> list[dict[str, Any]]:
    """Rows of differences in units of 1/255, operator by operator and as a whole."""
    plans = workload.training_plans()
    upright = [dataclasses.replace(plan, hflip=np.zeros_like(plan.hflip)) for plan in plans]
    rows = [decode_row(workload, plans, name) for name in fast_pipelines() if name != NATIVE]
    for resize in RESIZES:
        rows += against_reference(f"crop and resize, {resize}", workload, upright, resize, colored=False)
    rows += flip_rows(workload, upright)
    rows += color_rows(workload, plans)
    rows += against_reference("training transform", workload, plans, workload.config.interpolation, colored=True)
    for operator, crops in ((ONE_CROP, 1), (TEN_CROPS, 10)):
        rows += against_reference(
            operator, workload, workload.evaluation_plans(crops), workload.config.interpolation, colored=True
        )
    return rows


def against_reference(
    operator: str, workload: Workload, plans: list[BatchPlan], resize: Interpolation, colored: bool
) -> list[dict[str, Any]]:
    """Rows of all image pipelines, which go through the plans together, so that the reference, the slowest, does so once."""
    found = {name: Differences() for name in [*fast_pipelines(), TORCHVISION]}
    batches = [images(workload, name, plans, resize, colored) for name in [REFERENCE, *found]]
    for plan, (expected, *actual) in zip(plans, zip(*batches, strict=True), strict=True):
        for differences, ours in zip(found.values(), actual, strict=True):
            differences.add(ours, expected, frame_widths(plan))
    return [{"operator": operator, "image_pipeline": name, **found[name].result()} for name in found]


def row(
    operator: str, name: str, actual: Iterable[Tensor], expected: Iterable[Tensor], plans: list[BatchPlan]
) -> dict[str, Any]:
    differences = Differences()
    for ours, wanted, plan in zip(actual, expected, plans, strict=True):
        differences.add(ours, wanted, frame_widths(plan))
    return {"operator": operator, "image_pipeline": name, **differences.result()}


def images(
    workload: Workload, name: str, plans: list[BatchPlan], resize: Interpolation, colored: bool
) -> Iterator[Tensor]:
    """Batches (n * V, H, W, 3) of an image pipeline in units of 1/255, their colours mapped or as they are."""
    image_pipeline = workload.image_pipeline(name, resize, views=plans[0].hflip.shape[1])
    if colored and isinstance(image_pipeline, ColoringPipeline):
        for _, mapped in image_pipeline.run_with_colors(plans):
            yield unnormalised(mapped, workload.config)
        return
    for plan, pixels in image_pipeline.run(plans):
        yield colored_images(workload, name, plan, pixels) if colored else pixels.flatten(0, 1).float()


def colored_images(workload: Workload, name: str, plan: BatchPlan, pixels: Tensor) -> Tensor:
    if name == TORCHVISION:
        return unnormalised(clamped_colors(pixels, plan, workload.config), workload.config)
    return unnormalised(apply_colors(pixels, plan, device_of(name)), workload.config)


def unnormalised(batch: Tensor, config: DataConfig) -> Tensor:
    """From normalised images (n, 3, H, W) to (n, H, W, 3) in units of 1/255."""
    return (batch.permute(0, 2, 3, 1).cpu() * torch.tensor(config.std) + torch.tensor(config.mean)) * 255


def decode_row(workload: Workload, plans: list[BatchPlan], name: str) -> dict[str, Any]:
    """Whole images as DALI and as Pillow decode them."""
    reader = Reader(workload.index)
    resize, device = workload.config.interpolation, device_of(name)
    image_pipeline = CutPipeline("full decode", workload.index, resize, workload.threads, workload.batch_size, device)
    batches = ((plan.ids.tolist(), decoded) for plan, decoded in image_pipeline.run(plans))
    pairs = (pair for ids, decoded in batches for pair in zip(ids, decoded, strict=True))
    differences = Differences()
    for i, image in pairs:
        expected = np.array(decode(reader.read(i), workload.index.location(i)), np.float32)
        differences.add(torch.from_numpy(np.array(image, np.float32)), torch.from_numpy(expected))
    return {"operator": "decode", "image_pipeline": name, **differences.result()}


def flip_rows(workload: Workload, upright: list[BatchPlan]) -> list[dict[str, Any]]:
    """Each image pipeline's flipped images against its own unflipped ones, flipped afterwards."""
    mirrored = [dataclasses.replace(plan, hflip=np.ones_like(plan.hflip)) for plan in upright]
    rows = []
    filter_ = workload.config.interpolation
    for name in [*fast_pipelines(), REFERENCE, TORCHVISION]:
        turned = (batch.flip(-2) for batch in images(workload, name, upright, filter_, colored=False))
        ours = images(workload, name, mirrored, filter_, colored=False)
        rows.append(row("horizontal flip", name, ours, turned, mirrored))
    return rows


def color_rows(workload: Workload, plans: list[BatchPlan]) -> list[dict[str, Any]]:
    """Each loader's colour map against float64: all on the same bytes, which are Pillow's in the native loader too."""
    rows = []
    for name in [*fast_pipelines(), TORCHVISION]:
        differences = Differences()
        native = images(workload, NATIVE, plans, "pil-bicubic", colored=True) if name == NATIVE else None
        for plan, pixels in workload.image_pipeline(TORCHVISION, "pil-bicubic", views=1).run(plans):
            actual = next(native) if native else colored_images(workload, name, plan, pixels)
            differences.add(actual, unnormalised(exact_colors(pixels, plan), workload.config))
        rows.append({"operator": "colour map", "image_pipeline": name, **differences.result()})
    return rows


def exact_colors(pixels: Tensor, plan: BatchPlan) -> Tensor:
    """A x + B m + t of images with one view, in float64."""
    x = pixels[:, 0].double() / 255
    color, mean_color, shift = (torch.from_numpy(part).double() for part in (plan.color, plan.mean_color, plan.shift))
    shift = shift + torch.einsum("nij,nj->ni", mean_color, x.mean(dim=(1, 2)))
    return torch.einsum("nij,nhwj->nihw", color, x) + shift[:, :, None, None]


# Speed


def measure_speed(workload: Workload, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of images per second, and rows of what each stage of the training loaders on CPU costs an image."""
    loaders, cuts = loaders_to_time(workload), stages_to_time(workload)
    parts = {f"{stage} {name}": run for name, stages in cuts.items() for stage, run in stages.items()}
    work = {**loaders, **parts}
    with tqdm(total=(1 + repeats) * len(work), desc="timing", leave=False, disable=None) as progress:
        seconds = median_seconds(work, repeats, progress.update)
    speed = []
    for name in loaders:
        rate = len(workload.index) / seconds[name]
        ratio = seconds[baseline_of(name)] / seconds[name]
        speed.append({"loader": name, "images_per_s": rate, "per_core": rate / workload.threads, "ratio": ratio})
    rows = []
    for name, stages in cuts.items():
        ends = [seconds[f"{stage} {name}"] for stage in stages] + [seconds[f"training, {name}"]]
        costs = np.diff(ends, prepend=0.0).clip(min=0)  # noise can make a cheap stage's difference negative
        for stage, cost in zip(STAGES[name], costs.tolist(), strict=True):
            per_image = 1000 * cost / len(workload.index)
            rows.append({"loader": name, "stage": stage, "ms_per_image": per_image, "share": cost / costs.sum()})
    return speed, rows


def loaders_to_time(workload: Workload) -> dict[str, Callable[[], object]]:
    """The loaders of the speed table, as functions that load every image once."""
    index, config, threads, batch_size = workload.index, workload.config, workload.threads, workload.batch_size
    options, plans = (index, config, threads, batch_size), workload.training_plans()
    runs: dict[str, Callable[[], object]] = {}
    for name, jitter in ((BASELINE, True), (f"{BASELINE}, no ColorJitter", False)):
        runs[name] = _pass(torchvision_training(*options, jitter).__iter__)
    runs[DALI_USUAL] = _pass(UsualDali(*options).run, plans)
    runs[f"{DALI_USUAL}, antialias"] = _pass(UsualDali(*options, antialias=True).run, plans)
    for name in [*fast_pipelines(), REFERENCE]:
        parts = (index, workload.loader_config(name), workload.shard(name))
        training = TrainingLoader(*parts, seed=SEED, batch_size=batch_size, accumulation=1)
        runs[f"training, {name}"] = _pass(training.batches, epoch=0)
    one_crop = workload.evaluation_plans(1)
    runs[BASELINE_ONE_CROP] = _pass(torchvision_evaluation(*options).__iter__)
    runs[f"{ONE_CROP}, {DALI_USUAL}"] = _pass(UsualDali(*options, evaluation=True).run, one_crop)
    for crops, kind in ((1, ONE_CROP), (10, TEN_CROPS)):
        for name in fast_pipelines():
            parts = (index, workload.loader_config(name), workload.shard(name))
            evaluation = EvaluationLoader(*parts, batch_size=batch_size, crops=crops)
            runs[f"{kind}, {name}"] = _pass(evaluation.batches)
    bounds = {BOUND: "full decode", f"{REGIONS}, {DALI_CPU}": "decode"}
    for name, last in bounds.items():
        runs[name] = _pass(CutPipeline(last, index, config.interpolation, threads, batch_size).run, plans)
    if NATIVE in fast_pipelines():
        runs[f"{REGIONS}, {NATIVE}"] = _pass(cut_native(workload, DECODE).run, plans)
    return runs


def stages_to_time(workload: Workload) -> dict[str, dict[str, Callable[[], object]]]:
    """The training loaders on CPU up to each stage but the last: the whole loader includes that one."""
    index, interpolation, plans = workload.index, workload.config.interpolation, workload.training_plans()
    dali = {}
    for stage in STAGES[DALI_CPU][:3]:
        cut = CutPipeline(stage, index, interpolation, workload.threads, workload.batch_size)
        dali[stage] = _pass(cut.run, plans)
    uncut = workload.image_pipeline(DALI_CPU, interpolation, views=1)
    stages = {DALI_CPU: dali | {STAGES[DALI_CPU][3]: _pass(uncut.run, plans)}}
    if NATIVE in fast_pipelines():
        ends = zip(STAGES[NATIVE], (READ, DECODE), strict=False)
        stages = {NATIVE: {stage: _pass(cut_native(workload, last).run, plans) for stage, last in ends}} | stages
    return stages


def cut_native(workload: Workload, last: int) -> ImagePipeline:
    """The native loader up to a stage."""
    image_pipeline = NativePipeline(workload.index, workload.config, workload.threads, views=1)
    image_pipeline.last = last
    return image_pipeline


def _pass(start: Callable[..., Iterator], *arguments: Any, **options: Any) -> Callable[[], object]:
    """A function that exhausts the iterator which `start` returns, and waits for the GPU."""

    def run() -> None:
        for _ in start(*arguments, **options):
            pass
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


# Contact sheet and command line


def contact_sheet(workload: Workload, file: Path) -> None:
    """A few training images through each image_pipeline, and how they differ from the reference's."""
    few = dataclasses.replace(workload, batch_size=min(SHEET_IMAGES, len(workload.index)))
    plans = few.training_plans()[:1]
    names = [*fast_pipelines(), REFERENCE, TORCHVISION]
    sheet = {name: next(images(few, name, plans, few.config.interpolation, colored=True)) for name in names}
    others = [name for name in names if name != REFERENCE]
    columns = list(sheet.items()) + [
        (f"{name} - reference, x{AMPLIFICATION}", AMPLIFICATION * (sheet[name] - sheet[REFERENCE]).abs())
        for name in others
    ]
    figure = Figure(figsize=(2 * len(columns), 2 * len(plans[0])), layout="constrained")
    grid = figure.subplots(len(plans[0]), len(columns), squeeze=False)
    for axes, (title, column) in zip(grid.T, columns, strict=True):
        axes[0].set_title(title, fontsize=8)
        for ax, image in zip(axes, column, strict=True):
            ax.imshow(image.clamp(0, 255).byte().numpy())
            ax.axis("off")
    figure.savefig(file, dpi=120)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tools.lab.loader", description=__doc__)
    parser.add_argument("dir", metavar="DIR", help="class folders or a tar of them, or a data set with train/ in it")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="runs/loader-benchmark",
        help="folder for tables and pictures [runs/loader-benchmark]",
    )
    parser.add_argument(
        "--config",
        metavar="CONFIG.yaml",
        help="configuration whose data section to use [the paper's ImageNet settings]",
    )
    parser.add_argument(
        "--images",
        type=positive_integer,
        metavar="N",
        default=500,
        help="number of images, evenly spread over DIR [500]",
    )
    parser.add_argument(
        "--repeats",
        type=positive_integer,
        metavar="N",
        default=5,
        help="repetitions of the timing, after one for warm-up [5]",
    )
    parser.add_argument(
        "--threads", type=positive_integer, metavar="N", help="threads or worker processes of each loader [all cores]"
    )
    parser.add_argument("--batch-size", type=positive_integer, metavar="N", default=64, help="images per batch [64]")
    parser.add_argument("--interpolation", choices=RESIZES, help="resize filter [the configuration's]")
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
