"""The results of tools/lab/loader.py as Markdown and as a plot."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tools.lab.machine import machine_line
from tools.support.markdown import table

# The names of what is measured, in loader.json and in the tables.
NATIVE, DALI_CPU, DALI_GPU = "native", "DALI on CPU", "DALI on GPU"
REFERENCE, TORCHVISION = "reference (PIL)", "torchvision"
ONE_CROP, TEN_CROPS = "evaluation, 1 crop", "evaluation, 10 crops"
BASELINE, DALI_USUAL = "torchvision DataLoader", "DALI's usual pipeline, no colours"
BASELINE_ONE_CROP = f"{ONE_CROP}, {BASELINE}"
BOUND, REGIONS = "bound: full JPEG decode", "bound: decode the regions"
STAGES = {  # of the training loaders; DALI's resize also flips
    NATIVE: ("read", "decode", "resize, cut and colour"),
    DALI_CPU: ("read", "decode", "resize", "cut", "colour"),
}
CHARACTERS = 110  # that have room in the longest bar of the stages
FRAME = 4  # pixels, or more where a crop is enlarged more: DALI repeats its edge where Torch7 extrapolates it


def report(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    settings = results["settings"]
    differences = ("mean", "max", "interior_mean", "interior_max", "frame_mean", "frame_max")
    fidelity = [
        [line["operator"], line["image_pipeline"], *(_difference(line[key]) for key in differences)]
        for line in results["fidelity"]
    ]
    speed = [
        [line["loader"], f"{line['images_per_s']:.0f}", f"{line['per_core']:.0f}", f"{line['ratio']:.2f}"]
        for line in results["speed"]
    ]
    stages = [
        [line["loader"], line["stage"], f"{line['ms_per_image']:.2f}", f"{100 * line['share']:.0f} %"]
        for line in results["stages"]
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
                f"operator|image pipeline|mean|max|interior mean|max|frame of {FRAME} px or more: mean|max".split("|"),
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
            f"The ratio of evaluation is to {BASELINE_ONE_CROP}, of all else to {BASELINE}. Ten crops cost "
            f"{ten_crop_cost(results):.2f} times one crop.",
            "",
            "## Stages of the training loaders on CPU",
            "",
            *table(["loader", "stage", "ms per image", "share"], stages, 2),
        ]
    )


def _difference(value: float) -> str:
    """With more digits where three would say 0 of what is not."""
    return f"{value:.3f}" if value == 0 or value >= 0.0005 else f"{value:.1e}"


def baseline_of(loader: str) -> str:
    """The loader to whose speed another's is compared."""
    return BASELINE_ONE_CROP if loader.startswith((ONE_CROP, TEN_CROPS)) else BASELINE


def ten_crop_cost(results: dict[str, Any]) -> float:
    """Of the first loader in the table."""
    one, ten = (
        next(line["images_per_s"] for line in results["speed"] if line["loader"].startswith(kind) and ours(line))
        for kind in (ONE_CROP, TEN_CROPS)
    )
    return one / ten


def ours(line: dict[str, Any]) -> bool:
    """Whether a row of the speed table is one of this project's loaders."""
    name = line["loader"]
    return name.endswith((NATIVE, DALI_CPU, DALI_GPU, REFERENCE)) and not name.startswith(REGIONS)


def plot(results: dict[str, Any], file: Path) -> None:
    """Bars of images per second with the nearest bound as a line, and the stages."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    rates, shares = figure.subplots(2, 1, height_ratios=[4, 1])
    speed = {line["loader"]: line["images_per_s"] for line in results["speed"]}
    nearest = next(name for name in (f"{REGIONS}, {NATIVE}", f"{REGIONS}, {DALI_CPU}") if name in speed)
    bound = speed.pop(nearest)
    names = list(speed)
    colors = ["tab:blue" if ours({"loader": name}) else "tab:gray" for name in names]
    bars = rates.barh(names, list(speed.values()), color=colors)
    rates.bar_label(bars, fmt="%.0f", padding=4)
    rates.axvline(bound, color="tab:red", linestyle="--", label=f"{nearest}: {bound:.0f}")
    rates.invert_yaxis()
    rates.margins(x=0.12)
    rates.set_xlabel(f"images/s with {results['settings']['threads']} threads")
    rates.legend(loc="upper center", bbox_to_anchor=(0.5, 1.09), frameon=False)

    start: dict[str, float] = {}
    longest = max(sum(line["ms_per_image"] for line in results["stages"] if line["loader"] == name) for name in STAGES)
    for i, line in enumerate(results["stages"]):
        name, cost, share = line["loader"], line["ms_per_image"], f"{line['stage']} {100 * line['share']:.0f} %"
        bar = shares.barh([name], [cost], left=start.get(name, 0.0), color=f"C{i}", alpha=0.7)
        start[name] = start.get(name, 0.0) + cost
        if len(share) < CHARACTERS * cost / longest:
            shares.bar_label(bar, labels=[share], label_type="center", fontsize=7)
        elif line["stage"] == STAGES[name][-1]:  # beside it
            shares.text(start[name], name, f"  {share}", va="center", fontsize=7)
    shares.invert_yaxis()
    shares.set_xlabel("stages of the training loaders: ms an image")
    figure.savefig(file, dpi=120)
