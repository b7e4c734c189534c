"""Which operations RandAugment and TrivialAugment apply to each image, drawn as a function of the plan's random numbers.

An operation is one of a few kinds with arguments, which auto_augment.py executes: all changes of place are one affine map.

Sources: RandAugment (Cubuk et al. 2020) and TrivialAugment (Mueller and Hutter 2021) in torchvision's spaces; RandAugment in
timm's increasing space (``rand-mM-nN-mstdS-inc1``), where each operation is applied with probability 0.5 and its magnitude is
drawn from a normal distribution.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from pipeline.config import DataConfig

BINS = 30  # the greatest magnitude of torchvision's spaces, which have 31
TIMM_LEVELS = 10  # and of timm's


class Operation(IntEnum):
    """What is done to an image of bytes; in brackets the arguments."""

    IDENTITY = 0
    WARP = 1  # (a, b, c, d, e, f): the pixel at (x, y) comes from (a x + b y + c, d x + e y + f); pixels are squares of side 1
    BRIGHTNESS = 2  # (factor)
    CONTRAST = 3  # (factor)
    SOLARIZE = 4  # (threshold)
    SOLARIZE_ADD = 5  # (what is added below 128)
    POSTERIZE = 6  # (bits that are kept)
    INVERT = 7
    AUTOCONTRAST = 8
    EQUALIZE = 9
    COLOR = 10  # (factor)
    SHARPNESS = 11  # (factor)


Arguments = tuple[float | np.ndarray, ...]


@dataclass(frozen=True)
class Choice:
    """One entry of a space.

    Attributes:
        operation: what it does.
        arguments: from a value and the crop's side.
        value: from the magnitude, 0 to 1, and the crop's side.
        signed: the value's sign is drawn.
    """

    operation: Operation
    arguments: Callable[[np.ndarray, int], Arguments] = lambda value, crop: (value,)
    value: Callable[[np.ndarray, int], np.ndarray] = lambda magnitude, crop: magnitude
    signed: bool = False


def _shear_x(value: np.ndarray, crop: int) -> Arguments:
    return 1, value, 0, 0, 1, 0


def _shear_y(value: np.ndarray, crop: int) -> Arguments:
    return 1, 0, 0, value, 1, 0


def _translate_x(value: np.ndarray, crop: int) -> Arguments:
    return 1, 0, -value, 0, 1, 0


def _translate_y(value: np.ndarray, crop: int) -> Arguments:
    return 1, 0, 0, 0, 1, -value


def _rotate(value: np.ndarray, crop: int) -> Arguments:
    """Counter-clockwise about the centre, by degrees."""
    angle, centre = -np.radians(value), crop / 2
    cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)  # as Pillow, so that a right angle is one
    return cos, sin, centre - centre * cos - centre * sin, -sin, cos, centre + centre * sin - centre * cos


def _factor(value: np.ndarray, crop: int) -> Arguments:
    return (1 + value,)


def _signed(operation: Operation, arguments: Callable, greatest: float) -> Choice:
    return Choice(operation, arguments, lambda magnitude, crop: greatest * magnitude, signed=True)


def _torchvision(
    shear: float, translate: Callable[[np.ndarray, int], np.ndarray], rotate: float, factor: float, bits: int
) -> tuple[Choice, ...]:
    """A space of torchvision, in its order.

    Args:
        bits: the most that posterize takes away.
    """
    return (
        Choice(Operation.IDENTITY),
        _signed(Operation.WARP, _shear_x, shear),
        _signed(Operation.WARP, _shear_y, shear),
        Choice(Operation.WARP, _translate_x, translate, signed=True),
        Choice(Operation.WARP, _translate_y, translate, signed=True),
        _signed(Operation.WARP, _rotate, rotate),
        _signed(Operation.BRIGHTNESS, _factor, factor),
        _signed(Operation.COLOR, _factor, factor),
        _signed(Operation.CONTRAST, _factor, factor),
        _signed(Operation.SHARPNESS, _factor, factor),
        Choice(Operation.POSTERIZE, value=lambda magnitude, crop: 8 - np.rint(bits * magnitude)),
        Choice(Operation.SOLARIZE, value=lambda magnitude, crop: 255 - 8.5 * np.rint(BINS * magnitude)),  # exact halves
        Choice(Operation.AUTOCONTRAST),
        Choice(Operation.EQUALIZE),
    )


def _at_least_a_tenth(value: np.ndarray, crop: int) -> Arguments:
    return (np.maximum(0.1, 1 + value),)


SPACES: dict[str, tuple[Choice, ...]] = {
    "randaugment": _torchvision(0.3, lambda t, crop: np.trunc(150 / 331 * crop * t), 30, 0.9, 4),
    "trivialaugment": _torchvision(0.99, lambda t, crop: np.trunc(32 * t), 135, 0.99, 6),
    "randaugment-timm": (
        Choice(Operation.AUTOCONTRAST),
        Choice(Operation.EQUALIZE),
        Choice(Operation.INVERT),
        _signed(Operation.WARP, _rotate, 30),
        Choice(Operation.POSTERIZE, value=lambda t, crop: 4 - np.trunc(4 * t)),
        Choice(Operation.SOLARIZE, value=lambda t, crop: 256 - np.trunc(256 * t)),
        Choice(Operation.SOLARIZE_ADD, value=lambda t, crop: np.trunc(110 * t)),
        _signed(Operation.COLOR, _at_least_a_tenth, 0.9),
        _signed(Operation.CONTRAST, _at_least_a_tenth, 0.9),
        _signed(Operation.BRIGHTNESS, _at_least_a_tenth, 0.9),
        _signed(Operation.SHARPNESS, _at_least_a_tenth, 0.9),
        _signed(Operation.WARP, _shear_x, 0.3),
        _signed(Operation.WARP, _shear_y, 0.3),
        Choice(Operation.WARP, _translate_x, lambda t, crop: 0.45 * crop * t, signed=True),
        Choice(Operation.WARP, _translate_y, lambda t, crop: 0.45 * crop * t, signed=True),
    ),
}


def draw_operations(config: DataConfig, draws: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The K operations that n images go through one after the other.

    Args:
        draws: (n) uniform numbers in [0, 1), five for each of the K.

    Returns:
        (n, K) int8, `Operation`, and (n, K, 6) float64, their arguments.
    """
    layers = 1 if config.auto_augment == "trivialaugment" else config.randaugment_ops
    drawn = [_draw(config, *(next(draws) for _ in range(5))) for _ in range(layers)]
    return np.stack([kinds for kinds, _ in drawn], axis=1), np.stack([arguments for _, arguments in drawn], axis=1)


def _draw(
    config: DataConfig, which: np.ndarray, sign: np.ndarray, apply: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    space = SPACES[config.auto_augment]
    chosen = np.floor(which * len(space)).astype(int)
    if config.auto_augment == "trivialaugment":
        magnitude = np.floor(first * (BINS + 1)) / BINS
    elif config.auto_augment == "randaugment":
        magnitude = np.full(len(which), config.randaugment_magnitude / BINS)
    else:
        noise = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
        level = config.randaugment_magnitude + config.randaugment_magnitude_std * noise
        magnitude = np.clip(level, 0, TIMM_LEVELS) / TIMM_LEVELS
        chosen[apply >= 0.5] = -1
    kinds, arguments = np.zeros(len(which), np.int8), np.zeros((len(which), 6))
    for number, choice in enumerate(space):
        rows = np.flatnonzero(chosen == number)
        value = choice.value(magnitude[rows], config.crop_size)
        value = np.where(choice.signed & (sign[rows] < 0.5), -value, value)
        kinds[rows] = choice.operation
        for column, argument in enumerate(choice.arguments(value, config.crop_size)):
            arguments[rows, column] = argument
    return kinds, arguments
