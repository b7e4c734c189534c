"""The results of tools/lab/loader.py as Markdown and as a plot."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tools.lab.machine import machine_line
from tools.support.markdown import table

# The names of what is measured, in loader.json and in the tables.
DALI_CPU, DALI_GPU, REFERENCE, TORCHVISION = "DALI on CPU", "DALI on GPU", "reference (PIL)", "torchvision"
ONE_CROP, TEN_CROPS = "evaluation, 1 crop", "evaluation, 10 crops"
BASELINE, BOUND = "torchvision DataLoader", "bound: full JPEG decode"
STAGES = ("read", "decode", "resize", "cut", "colour")  # the resize also flips
FRAME = 4  # pixels; DALI repeats the edge of an enlarged crop where Torch7 extrapolates it


def report(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    settings = results["settings"]
    differences = ("mean", "max", "interior_mean", "interior_max", "frame_mean", "frame_max")
    fidelity = [
        [line["operator"], line["image_pipeline"], *(f"{line[key]:.3f}" for key in differences)]
        for line in results["fidelity"]
    ]
    speed = [
        [line["loader"], f"{line['images_per_s']:.0f}", f"{line['per_core']:.0f}", f"{line['ratio']:.2f}"]
        for line in results["speed"]
    ]
    stages = [
        [line["stage"], f"{line['ms_per_image']:.2f}", f"{100 * line['share']:.0f} %"] for line in results["stages"]
    ]
    return "\n".join(
        [
            "# Loader benchmark",
            "",
            f"{results['images']['count']} images of {results['images']['root']} "
            f"({results['images']['mean_pixels'] / 1e6:.2f} megapixels on average); resize {settings['interpolation']}, "
            f"crop {settings['crop_size']}, batches of {settings['batch_size']}, {settings['threads']} threads.",
            machine_line(results["machine"]),
            "",
            "## Fidelity: differences from the reference in units of 1/255",
            "",
            *table(
                f"operator|image pipeline|mean|max|interior mean|max|frame of {FRAME} px: mean|max".split("|"),
                fidelity,
                2,
            ),
            "",
            "Decode: compared with Pillow. Horizontal flip: compared with the image pipeline's own unflipped images, flipped",
            "afterwards. Colour map: compared with A x + B m + t in float64 on the same bytes; torchvision's operators round",
            "and clamp after each step, with the same factors. torchvision has no torch7-bicubic: its bicubic with antialias",
            "takes its place.",
            "",
            f"## Speed: medians of {settings['repeats']} interleaved repetitions",
            "",
            *table(["loader", "images/s", "images/s per core", "ratio to torchvision"], speed, 1),
            "",
            f"Ten crops cost {ten_crop_cost(results):.2f} times one crop.",
            "",
            "## Stages of the training loader, DALI on CPU",
            "",
            *table(["stage", "ms per image", "share"], stages, 1),
        ]
    )


def ten_crop_cost(results: dict[str, Any]) -> float:
    rates = {line["loader"]: line["images_per_s"] for line in results["speed"]}
    return rates[ONE_CROP] / rates[TEN_CROPS]


def plot(results: dict[str, Any], file: Path) -> None:
    """Bars of images per second with the bound as a line, and the shares of the stages."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    rates, shares = figure.subplots(2, 1, height_ratios=[4, 1])
    speed = {line["loader"]: line["images_per_s"] for line in results["speed"]}
    bound = speed.pop(BOUND)
    names = list(speed)
    colors = ["tab:gray" if name.startswith(BASELINE) else "tab:blue" for name in names]
    bars = rates.barh(names, list(speed.values()), color=colors)
    rates.bar_label(bars, fmt="%.0f", padding=4)
    rates.axvline(bound, color="tab:red", linestyle="--", label=f"{BOUND.removeprefix('bound: ')} alone: {bound:.0f}")
    rates.invert_yaxis()
    rates.margins(x=0.12)
    rates.set_xlabel(f"images/s with {results['settings']['threads']} threads")
    rates.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)

    start = 0.0
    for line in results["stages"]:
        width = 100 * line["share"]
        shares.barh([0], [width], left=start, label=f"{line['stage']} {width:.0f} %")
        start += width
    shares.set(yticks=[], xlim=(0, 100), xlabel=f"share of the training loader's time, {DALI_CPU} (%)")
    # At the right and above: it may be wider than the axes.
    shares.legend(ncols=len(STAGES), loc="lower right", bbox_to_anchor=(1, 1), frameon=False, columnspacing=1)
    figure.savefig(file, dpi=120)
