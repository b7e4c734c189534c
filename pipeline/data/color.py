"""The colour part of a plan: one affine map an image, on the training device: the same bits in whatever batch it comes."""

import numpy as np
import torch
from torch import Tensor

from pipeline.data.plan import BatchPlan

PIXELS_A_ROW = 4  # a product with a block-diagonal 12x12 matrix is 4 times faster than with the bare 3x3 on CPU


def to_device(source: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device; to a GPU from pinned memory, so that the host need not wait for the copy."""
    tensor = torch.from_numpy(source) if isinstance(source, np.ndarray) else source
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def apply_colors(pixels: Tensor, plan: BatchPlan, device: torch.device) -> Tensor:
    """Map the colours of every view and lay the result out for the network, in float32 whatever autocast is entered.

    Args:
        pixels: (n, V, H, W, K), uint8 or float32 in 0..255.

    Returns:
        (n * V, C, H, W) float32 on `device`, channels-last in memory.
    """
    with torch.autocast(device.type, enabled=False):
        return _mapped(pixels, plan, device)


def _mapped(pixels: Tensor, plan: BatchPlan, device: torch.device) -> Tensor:
    n, views, height, width, numbers = pixels.shape
    x = to_device(pixels, device).float()
    color, mean_color, shift = (to_device(array, device) for array in (plan.color, plan.mean_color, plan.shift))
    if plan.mean_color.any():
        first = x[:, 0].reshape(n, height * width, numbers)
        if device.type == "cuda":
            shift = _products(_mean(first)[:, None], mean_color / 255, shift)[:, 0]
        else:
            shift = shift + torch.einsum("nij,nj->ni", mean_color, first.mean(dim=1)) / 255
    if _keeps_colors_apart(plan.color):  # evaluation: one pass over memory, which ten crops are bound by
        scale = torch.diagonal(color, dim1=1, dim2=2) / 255
        rows = x.reshape(n, -1, 3 * width)
        x = torch.addcmul(shift.repeat(1, width)[:, None], rows, scale.repeat(1, width)[:, None])
    elif device.type == "cuda":
        x = _products(x.reshape(n, -1, numbers), color / 255, shift)
    else:
        together = PIXELS_A_ROW if height * width % PIXELS_A_ROW == 0 else 1
        of_one = (color.transpose(1, 2) / 255).clone(memory_format=torch.contiguous_format)
        matrix = torch.kron(torch.eye(together, device=device)[None], of_one)
        rows = x.reshape(n, -1, numbers * together)
        x = torch.baddbmm(shift.repeat(1, together)[:, None], rows, matrix)
    return x.view(n * views, height, width, color.shape[1]).permute(0, 3, 1, 2)


# On a GPU torch's means, and cuBLAS's products, choose a kernel by how many images there are, and so the order of their sums.
# These two have one order, whatever the batch.


def _mean(x: Tensor) -> Tensor:
    """Over the second of three dimensions: halves are added until one number is left."""
    count = x.shape[1]
    while (left := x.shape[1]) > 1:
        half = left // 2
        sums = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat([sums, x[:, 2 * half :]], dim=1) if left % 2 else sums
    return x[:, 0] / count


def _products(x: Tensor, matrices: Tensor, shift: Tensor) -> Tensor:
    """shift + matrices x, of each pixel (n, pixels, K)."""
    total = shift[:, None]
    for k in range(x.shape[2]):
        total = torch.addcmul(total, x[:, :, k : k + 1], matrices[:, None, :, k])
    return total


def _keeps_colors_apart(color: np.ndarray) -> bool:
    return color.shape[1:] == (3, 3) and not (color * (1 - np.eye(3))).any()
