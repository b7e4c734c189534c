"""Generated image files for tests of training and loading."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(root: Path, classes: int, images: int, seed: int, side: int = 40) -> None:
    """Write `images` JPEG files of `side` x `side` pixels in class folders: random patterns, brighter from class to class."""
    generator = np.random.default_rng(seed)
    for i in range(images):
        folder = root / f"class{i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        cells = generator.integers(0, 128, (5, 5, 3)) + 127 * (i % classes) // max(1, classes - 1)
        Image.fromarray(cells.astype(np.uint8)).resize((side, side)).save(folder / f"{i:06d}.jpg", quality=90)
