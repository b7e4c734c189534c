"""The Torch code's transforms one image and one pixel at a time in float64, for the tests to compare with.

Written from the description of fb.resnet.torch's transforms.lua, image by image as that code works; it shares nothing
with pipeline/. Images are (height, width, 3) in [0, 1].
"""

import math

import numpy as np

EIGENVALUES = [0.2175, 0.0188, 0.0045]
EIGENVECTORS = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]


def gray(image: np.ndarray) -> np.ndarray:
    return 0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]


def blend(image: np.ndarray, other: np.ndarray, alpha: float) -> np.ndarray:
    return image * alpha + other * (1 - alpha)


def brightness(image: np.ndarray, alpha: float) -> np.ndarray:
    return blend(image, np.zeros_like(image), alpha)


def contrast(image: np.ndarray, alpha: float) -> np.ndarray:
    return blend(image, np.full_like(image, gray(image).mean()), alpha)


def saturation(image: np.ndarray, alpha: float) -> np.ndarray:
    return blend(image, np.repeat(gray(image)[..., None], 3, axis=2), alpha)


def lighting(image: np.ndarray, alphas: list[float]) -> np.ndarray:
    image = image.copy()
    for channel in range(3):
        image[..., channel] += sum(EIGENVECTORS[channel][k] * alphas[k] * EIGENVALUES[k] for k in range(3))
    return image


def normalise(image: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    image = image.copy()
    for channel in range(3):
        image[..., channel] = (image[..., channel] - mean[channel]) / std[channel]
    return image


def cubic(p0: float, p1: float, p2: float, p3: float, x: float) -> float:
    return p1 + 0.5 * x * (p2 - p0 + x * (2 * p0 - 5 * p1 + 4 * p2 - p3 + x * (3 * (p1 - p2) + p3 - p0)))


def scale_line(line: np.ndarray, length: int) -> np.ndarray:
    """Catmull-Rom between aligned corners; beyond the ends the line goes on straight."""
    if len(line) == length:
        return line.copy()
    result = np.empty(length)
    for i in range(length - 1):
        position = i * (len(line) - 1) / (length - 1)
        k = int(position)
        p1, p2 = line[k], line[k + 1]
        p0 = line[k - 1] if k > 0 else 2 * p1 - p2
        p3 = line[k + 2] if k + 2 < len(line) else 2 * p2 - p1
        result[i] = cubic(p0, p1, p2, p3, position - k)
    result[-1] = line[-1]
    return result


def scale(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """image.scale(image, width, height, 'bicubic')."""
    across = np.empty((image.shape[0], width, 3))
    for y in range(image.shape[0]):
        for channel in range(3):
            across[y, :, channel] = scale_line(image[y, :, channel], width)
    result = np.empty((height, width, 3))
    for x in range(width):
        for channel in range(3):
            result[:, x, channel] = scale_line(across[:, x, channel], height)
    return result


def short_side_to(height: int, width: int, short: int) -> tuple[int, int]:
    if (width <= height and width == short) or (height <= width and height == short):
        return height, width
    if width < height:
        return int(height / width * short), short
    return short, int(width / height * short)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    top, left = math.ceil((image.shape[0] - size) / 2), math.ceil((image.shape[1] - size) / 2)
    return image[top : top + size, left : left + size]


def ten_crop(image: np.ndarray, size: int) -> list[np.ndarray]:
    height, width = image.shape[:2]
    crops = []
    for current in (image, image[:, ::-1]):
        crops.append(centre_crop(current, size))
        crops.append(current[:size, :size])
        crops.append(current[:size, width - size :])
        crops.append(current[height - size :, :size])
        crops.append(current[height - size :, width - size :])
    return crops
