"""G7: DALI."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.support.gpu_checks.check import Finding, Setting, Skipped, require
from tools.support.gpu_checks.runs import resumed

NEAR = 0.05  # standard deviations of ImageNet's pixels, in the mean of an image: decoders round otherwise


def photos(folder: Path, count: int, seed: int = 1) -> Any:
    """An index of smooth random JPEG images of odd sizes."""
    import numpy as np
    from PIL import Image

    from pipeline.data.scan import scan_classes

    generator = np.random.default_rng(seed)
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (7, 9, 3), np.uint8))
        coarse.resize((71 + i, 53 + 2 * i), Image.Resampling.BICUBIC).save(path, quality=90)
    return scan_classes(folder)


def odd_photos(folder: Path) -> Any:
    """An index of images that are not plain JPEG, or have a size, a place for a mark or a direction that is rare."""
    import numpy as np
    from PIL import Image

    from pipeline.data.scan import scan_classes

    generator = np.random.default_rng(2)
    pictures = (
        Image.fromarray(generator.integers(0, 256, (5, 7, 3), np.uint8)).resize(
            (61 + 3 * i, 83 - 2 * i), Image.Resampling.BICUBIC
        )
        for i in range(20)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a right angle, which nobody does
    alpha = next(pictures)
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    files: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "gray.jpg": (next(pictures).convert("L"), "JPEG", {}),
        "progressive.jpg": (next(pictures), "JPEG", {"progressive": True}),
        "restarts.jpg": (next(pictures), "JPEG", {"restart_marker_blocks": 3}),
        "full colours.jpg": (next(pictures), "JPEG", {"subsampling": "4:4:4"}),
        "half colours.jpg": (next(pictures), "JPEG", {"subsampling": "4:2:2"}),
        "rotated.jpg": (next(pictures), "JPEG", {"exif": exif}),
        "pixel.jpg": (next(pictures).resize((1, 1)), "JPEG", {}),
        "narrow.jpg": (next(pictures).resize((9, 200)), "JPEG", {}),
        "cmyk.jpg": (next(pictures).convert("CMYK"), "JPEG", {}),
        "png.jpg": (next(pictures), "PNG", {}),
        "rgba.png": (alpha, "PNG", {}),
        "palette.png": (next(pictures).quantize(16), "PNG", {}),
        "bmp.bmp": (next(pictures), "BMP", {}),
    }
    (folder / "class0").mkdir(parents=True)
    for name, (picture, kind, options) in files.items():
        picture.save(folder / "class0" / name, kind, **options)
    return scan_classes(folder)


CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 crop": (1, {}),
    "10 crops": (10, {}),
    "random_resized_crop": (0, {}),
    "random_crop": (0, {"train_crop": "random_crop", "padding": 4}),
}
"""What is cut from an image: views of an evaluation, or 0 for a training's one, and fields of the configuration."""
INTERPOLATIONS = "torch7-bicubic", "pil-bilinear", "pil-bicubic"


def pixels(
    index: Any, device: torch.device, interpolation: str, cut: str, batch_size: int, loader: str = "dali"
) -> dict[int, Tensor]:
    """What a loader makes of each image, by its row in the index."""
    from pipeline.config import DataConfig
    from pipeline.data.loader import EvaluationLoader, Shard, TrainingLoader

    views, fields = CUTS[cut]
    config = DataConfig(
        loader=loader,
        crop_size=32,
        resize_size=40,
        interpolation=interpolation,  # type: ignore[arg-type]
        **fields,
    )
    shard = Shard(0, 1, device, 2)
    if views:
        batches = EvaluationLoader(index, config, shard, batch_size=batch_size, crops=views).batches()
    else:
        batches = TrainingLoader(index, config, shard, seed=1, batch_size=batch_size, accumulation=1).batches(0)
    found: dict[int, Tensor] = {}
    held = []
    for batch in batches:
        images = batch.images.unflatten(0, (-1, batch.views))
        held.append((images, images.clone()))
        found |= {int(row): image.cpu() for row, image in zip(batch.ids, images, strict=True)}
    require(all(torch.equal(*pair) for pair in held), "a batch changes while others are loaded")
    require(len(found) == len(index), f"{len(found)} of {len(index)} images came")
    return found


def dali_pixels(setting: Setting) -> Finding:
    """DALI's graphs: near to Pillow's pixels, the same bits in each run and in whatever batch an image comes."""
    index = photos(setting.folder / "photos", 12)
    cpu = torch.device("cpu")
    far, graphs, wrong = 0.0, 0, []
    for name in INTERPOLATIONS if setting.on_gpu else INTERPOLATIONS[:1]:
        for cut in CUTS if setting.on_gpu else ("10 crops", "random_resized_crop", "random_crop"):
            first, again, other = (pixels(index, setting.device, name, cut, size) for size in (4, 4, 5))
            expected = pixels(index, cpu, name, cut, 4, "reference")
            mean = max((first[row] - expected[row]).abs().mean().item() for row in first)
            for what, images in (("in a second run", again), ("in other batches", other)):
                apart = [(first[row] - images[row]).abs().max().item() for row in first]
                if count := sum(value != 0 for value in apart):  # a NaN, too
                    wrong.append(f"{name}, {cut}: {count} of {len(apart)} {what}, by {max(apart):.1e}")
            if not mean < NEAR:
                wrong.append(f"{name}, {cut}: {mean:.3f} from Pillow's in the mean")
            far, graphs = max(far, mean), graphs + 1
    require(not wrong, f"images differ, in standard deviations: {'; '.join(wrong)}")
    return Finding(f"{graphs} graphs, at most {far:.1e} standard deviations from Pillow's in the mean of an image")


def dali_odd(setting: Setting) -> Finding:
    """Gray, CMYK, progressive, turned, tiny and other images, each by its name, are near to Pillow's pixels."""
    index = odd_photos(setting.folder / "odd")
    first, expected = (
        pixels(index, device, INTERPOLATIONS[0], "1 crop", 5, loader)
        for device, loader in ((setting.device, "dali"), (torch.device("cpu"), "reference"))
    )
    far = {index.names[row]: (first[row] - expected[row]).abs().mean().item() for row in first}
    wrong = [f"{name} {value:.3f}" for name, value in far.items() if not value < NEAR]
    require(not wrong, f"pixels differ from Pillow's in the mean, in standard deviations: {', '.join(wrong)}")
    return Finding(
        f"{len(far)} images, at most {max(far.values()):.1e} standard deviations from Pillow's in the mean", far
    )


def dali_corrupt(setting: Setting) -> Finding:
    """A corrupt image is replaced and does not count."""
    from pipeline.config import DataConfig
    from pipeline.data.loader import Shard, TrainingLoader

    folder = setting.folder / "corrupt"
    index = photos(folder, 8)
    path = folder / "class1" / "3.jpg"
    path.write_bytes(path.read_bytes()[:100] + bytes(path.stat().st_size - 100))
    config = DataConfig(loader="dali", crop_size=32, resize_size=40, corrupt_images="skip")
    loader = TrainingLoader(index, config, Shard(0, 1, setting.device, 2), seed=1, batch_size=8, accumulation=1)
    with redirect_stderr(io.StringIO()):
        (batch,) = loader.batches(0)
    require(batch.weights.sum().item() == 7, f"{batch.weights.sum().item():.0f} of 8 images count")
    return Finding("7 of 8 images count")


def dali_resumed(setting: Setting) -> Finding:
    """A run that DALI feeds with JPEG files, cut and resumed; on a GPU in CUDA graphs."""
    folder = setting.folder / "files"
    photos(folder / "train", 40)
    photos(folder / "val", 10, seed=2)
    data = {"loader": "dali", "dir": str(folder), "crop_size": 32, "resize_size": 40}
    train = {"deterministic": setting.on_gpu, "compile": "graphs" if setting.on_gpu else "none"}
    return resumed(setting, "files", data=data, train=train)


WARM, EPOCHS = 5, 20
"""Epochs in which the pools of DALI and torch may still grow, and all of them."""
GROWN = 100.0
"""MiB that may come after: a block of DALI's pool has 64, a batch 11.5, of which one lost an epoch makes 172."""


def dali_memory(setting: Setting) -> Finding:
    """The memory of the GPU that is taken grows no more after some epochs."""
    if not setting.on_gpu:
        raise Skipped("of a GPU's memory; on CPU python -m tools.lab.endurance looks")
    from pipeline.config import DataConfig
    from pipeline.data.loader import Shard, TrainingLoader

    index, config = photos(setting.folder / "memory", 60), DataConfig(loader="dali")
    loader = TrainingLoader(index, config, Shard(0, 1, setting.device, 2), seed=1, batch_size=20, accumulation=1)
    taken = []
    for epoch in range(EPOCHS):
        for _ in loader.batches(epoch):
            pass
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(setting.device)
        taken.append((total - free) / 2**20)
    text = f"MiB more than after the first epoch: {', '.join(f'{value - taken[0]:.0f}' for value in taken[1:])}"
    require(taken[-1] - taken[WARM] < GROWN, text)
    return Finding(text, {"MiB": taken})
