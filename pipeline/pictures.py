"""Draws images in a grid with a few words below each."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 128  # pixels that an image gets
MARGIN = 6
TEXT = 16  # size of the letters, which stay legible on TensorBoard's cards, which halve the picture
SMALL = 64  # images below this side are enlarged without smoothing, so that their pixels show
# Blue and red differ for the colour-blind too. Whatever a colour says stands there in words as well.
BLUE, RED, GRAY, BLACK = (0, 80, 170), (190, 0, 0), (95, 95, 95), (0, 0, 0)

Line = tuple[str, tuple[int, int, int]]  # a line of a caption, and its colour


def draw_grid(images: Tensor, captions: Sequence[Sequence[Line]], columns: int) -> np.ndarray:
    """Draw images in equal cells, with a caption below each.

    Args:
        images: (n, 3, H, W) float in [0, 1].
        captions: n captions of equally many lines; what is wider than an image ends in an ellipsis.

    Returns:
        (height, width, 3) uint8.
    """
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    font = _font(all(text.isascii() for caption in captions for text, _ in caption))
    line_height = TEXT + 3
    width, height = CELL + MARGIN, CELL + line_height * max(map(len, captions)) + MARGIN
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        left, top = MARGIN + i % columns * width, MARGIN + i // columns * height
        sheet.paste(_fitted(Image.fromarray(image)), (left, top))
        for number, (text, color) in enumerate(caption):
            draw.text((left, top + CELL + number * line_height), _shortened(text, font), color, font)
    return np.asarray(sheet)


def percent_text(probability: float) -> str:
    """A probability in whole percent; one that rounds to 100 is not called certain, as an answer that is sure may be wrong."""
    return "> 99 %" if 0.995 <= probability < 1 else f"{100 * probability:.0f} %"


def _fitted(image: Image.Image) -> Image.Image:
    """The image in the middle of a cell."""
    cell = Image.new("RGB", (CELL, CELL), (225, 225, 225))
    scale = CELL / max(image.size)
    kernel = Image.Resampling.NEAREST if max(image.size) < SMALL else Image.Resampling.LANCZOS
    image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), kernel)
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return cell


@cache
def _font(ascii_only: bool) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or for letters that it lacks Matplotlib's."""
    if ascii_only:
        return ImageFont.load_default(TEXT)  # type: ignore[return-value]
    import matplotlib  # only here: it takes a while

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), TEXT - 1)


def _shortened(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, or as much of its beginning as is no wider than a cell."""
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength(f"{text}...") > CELL:
        text = text[:-1]
    return f"{text}..."
