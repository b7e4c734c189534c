"""Images whose colours say which labels they have, and a table of them."""

import csv
from pathlib import Path

import numpy as np
from conftest import photo
from PIL import Image

from pipeline.data.label_table_source import LabelTableSource
from pipeline.data.sources import open_source

COLOURS = ("blue", "green", "red")


def write_labelled_images(root: Path, images: int = 60, training: int = 44) -> Path:
    """PNG files in folders below `root`, and train.csv and val.csv with names between |."""
    rows = []
    for i in range(images):
        names = [colour for k, colour in enumerate(COLOURS) if i >> k & 1]
        pixels = np.asarray(photo(i, 18 + i % 3, 20)).astype(float) / 2
        for k, colour in enumerate(("red", "green", "blue")):
            pixels[..., k] += 60 * (colour in names)
        file = root / f"folder{i % 2}" / f"image{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
        rows.append((file.name, "|".join(names) or "No Finding", i))
    for name, part in (("train.csv", rows[:training]), ("val.csv", rows[training:])):
        with open(root / name, "w", newline="") as stream:
            csv.writer(stream).writerows([("Image Index", "Finding Labels", "Follow-up #"), *part])
    return root


def open_label_table(root: Path, table: Path, classes: tuple[str, ...] | None = None) -> LabelTableSource:
    """All images below `root` that the table names."""
    return LabelTableSource(str(table), open_source(root), classes)
