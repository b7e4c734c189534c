"""The fused dense block for CUDA: Triton kernels that compute batch norm and ReLU inside the convolutions.

It ran on an H200 (2026-11-26): right in fp32, tf32, bf16 and fp16 (`tools.gpu`). Triton's interpreter has run every kernel
on CPU, and Triton has compiled them for the architectures of `TILES` (tests/test_triton_block.py).

In float32, or with maps and their gradients in bfloat16 or float16, as under torch's autocast. Products add up in float32;
parameters, their gradients and statistics are float32. A product of float32 uses TF32 where torch's own convolutions do.

It keeps for the backward pass what fused.py keeps, and the weights in the dtype of the maps. The formulas are in
kernels/ALGEBRA.md, the kernels in triton_kernels.py.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pipeline.models.stage import (
    Stage,
    TrackedBatchNorm,
    eager_stage,
    eager_stem,
    gradients_by_definition,
    update_running_statistics,
)

AUTOMATIC = False  # taken only where a run has measured it (pipeline/autotune.py)
FROZEN_PARTS = False

HALVES = torch.bfloat16, torch.float16
LOWEST_CAPABILITY = 8, 0  # bfloat16 and TF32
ROW = 16  # rows of a block's maps begin at multiples of so many elements, for wide loads


class Tile(NamedTuple):
    """What a program of a kernel computes at once.

    Attributes:
        block_p: pixels.
        block_n: output channels at most, or the bottleneck's.
        block_k: channels that are summed over at most; of the backward passes to weights, input channels.
        stages: in how many copies of shared memory loads run ahead.
        programs: of a kernel that splits the pixels, so many for a multiprocessor, as its registers allow.
        warps: of 32 threads, in a program.
    """

    block_p: int
    block_n: int
    block_k: int
    stages: int
    programs: int = 1
    warps: int = 8


class Tiles(NamedTuple):
    """The tiles of an architecture for one kind of products. All are fixed: the order of summation follows from them."""

    bottleneck_forward: Tile
    conv3x3_forward: Tile
    conv3x3_backward_data: Tile
    conv3x3_backward_weights: Tile
    bottleneck_backward: Tile
    conv3x3_backward_data_persistent: Tile | None = None  # for as many features as its block_k; None: never


MULTIPROCESSORS = {
    80: 108,
    90: 132,
    100: 148,
}  # of an A100, an H100 and a B200; a constant, as it decides the order of sums
_IEEE = Tiles(
    bottleneck_forward=Tile(64, 64, 32, stages=2),
    conv3x3_forward=Tile(128, 32, 32, stages=2),
    conv3x3_backward_data=Tile(64, 64, 16, stages=2),
    conv3x3_backward_weights=Tile(32, 32, 64, stages=2, programs=2),
    bottleneck_backward=Tile(32, 64, 32, stages=1),
)
_TF32 = Tiles(
    bottleneck_forward=Tile(64, 128, 32, stages=2),
    conv3x3_forward=Tile(128, 32, 32, stages=2),
    conv3x3_backward_data=Tile(64, 128, 32, stages=2),
    conv3x3_backward_weights=Tile(32, 32, 128, stages=2, programs=2),
    bottleneck_backward=Tile(32, 128, 32, stages=1, programs=2),
)
_HALF = Tiles(
    bottleneck_forward=Tile(128, 128, 32, stages=3),
    conv3x3_forward=Tile(128, 32, 64, stages=3),
    conv3x3_backward_data=Tile(64, 64, 32, stages=3, warps=4),
    conv3x3_backward_weights=Tile(64, 32, 128, stages=3, programs=2),
    bottleneck_backward=Tile(64, 128, 32, stages=2),
)
# By architecture and by how float32 or halves are multiplied. Those of 9.0 for halves come from a sweep on an H200 in
# bfloat16 (tools/lab/gpu_tiles.py, 2026-11-26), which bottleneck_forward, bottleneck_backward and the persistent kernel went
# through in earlier forms; as they are they have been timed in whole steps. The other tiles are chosen by what they compile to
# (tools/lab/gpu_kernels.py): no spills, and where possible two programs a multiprocessor; no GPU has timed them.
TILES = {
    (80, "ieee"): _IEEE,
    (80, "tf32"): _TF32,
    (80, "half"): _HALF,
    (90, "ieee"): _IEEE,
    (90, "tf32"): _TF32._replace(bottleneck_backward=Tile(64, 128, 32, stages=1)),
    (90, "half"): Tiles(
        bottleneck_forward=Tile(128, 128, 32, stages=3),
        conv3x3_forward=Tile(128, 32, 64, stages=3),
        conv3x3_backward_data=Tile(64, 128, 32, stages=3, warps=4),
        conv3x3_backward_data_persistent=Tile(32, 128, 32, stages=2, programs=2),
        conv3x3_backward_weights=Tile(64, 32, 128, stages=3, programs=2),
        bottleneck_backward=Tile(64, 128, 64, stages=3),
    ),
    (100, "ieee"): _IEEE._replace(conv3x3_forward=Tile(128, 32, 16, stages=2)),
    (100, "tf32"): _TF32._replace(
        conv3x3_forward=Tile(128, 32, 16, stages=2),
        conv3x3_backward_weights=Tile(32, 32, 128, stages=1, programs=2),  # Triton 3.6 does not compile it with more
    ),
    (100, "half"): _HALF._replace(
        bottleneck_forward=Tile(64, 128, 32, stages=3),
        conv3x3_backward_weights=Tile(64, 32, 128, stages=1, programs=2),  # as for tf32
        bottleneck_backward=Tile(64, 128, 32, stages=1, programs=2),
    ),
}
FOLDED = 128  # channels of a program that folds a norm into scale and shift
POINT = 4096  # numbers of a tile of what has no product
POINT_CHANNELS = 32  # of such a tile at most
SUMS = dict(BLOCK_T=1024, BLOCK_C=2, warps=8)  # tiles and channels of a program that adds up partial sums
NUMBERS = dict(BLOCK_T=16, BLOCK=256)  # of a program that adds up the weights' gradients


def refusal(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _is_interpreted():
        return ""
    if device.type != "cuda":
        return f"its kernels are for CUDA devices, and this one is '{device.type}'"
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        needed, found = (".".join(map(str, numbers)) for numbers in (LOWEST_CAPABILITY, capability))
        return f"its kernels need compute capability {needed}, and this GPU has {found}"
    return ""


def unsupported(features: nn.Module, x: Tensor) -> str:
    dtypes = set()
    for name, tensor in (*features.named_parameters(), *features.named_buffers()):
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}"
        if tensor.layout is not torch.strided:
            return f"{name} is not dense"
        if tensor.dim() == 1 and not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor.is_neg():
            return f"{name} is a negated view"
        if tensor.is_floating_point() or tensor.is_complex():
            dtypes.add(tensor.dtype)
    return refusal(x.device) or _unsupported_dtypes(x, dtypes)


def _unsupported_dtypes(x: Tensor, parameters: set[torch.dtype]) -> str:
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    maps = autocast or x.dtype
    known = (torch.float32, *HALVES)
    if x.dtype not in known or maps not in known or len(parameters) != 1 or not parameters <= {*known}:
        return "the kernels take images and parameters in float32, bfloat16 or float16"
    if not autocast and parameters != {x.dtype}:
        return "the images have another dtype than the parameters"
    if maps is torch.bfloat16 and _is_interpreted():
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return ""


def stem(x: Tensor, norm: TrackedBatchNorm) -> Tensor:
    return _Stem.apply(x.contiguous(memory_format=torch.channels_last), norm, norm.weight.float(), norm.bias.float())


def stage(x: Tensor, stage: Stage) -> Tensor:
    keep = torch.is_grad_enabled() and not stage.recompute
    parameters = [parameter.float() for parameter in stage.parameters]
    return _Stage.apply(x.contiguous(memory_format=torch.channels_last), stage, keep, *parameters)


def launch(
    kernel: str, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 1, **constants: Any
) -> None:
    """Start a kernel of triton_kernels.py. What counts or compiles launches puts itself in the place of this function."""
    with torch.cuda.device_of(arguments[0]):  # Triton starts kernels on the current device
        getattr(_kernels(), kernel)[grid](*arguments, num_warps=warps, num_stages=stages, **constants)


def architecture(device: torch.device) -> int:
    """The architecture of `TILES` whose tiles a device takes."""
    if device.type != "cuda":
        return 80  # Triton's interpreter
    major = torch.cuda.get_device_capability(device)[0]
    return 10 * major if major in (9, 10) else 80  # what others have, 8.0 has


def products(dtype: torch.dtype) -> str:
    """The kind of products, as `TILES` names them, of maps of a dtype."""
    return "half" if dtype in HALVES else "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("pipeline.models.triton_kernels")


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


class _Stem(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, norm: TrackedBatchNorm, gamma: Tensor, beta: Tensor) -> Tensor:
        run = _Launches(y)
        moments = run.floats(2, run.channels)
        if norm.training:
            run.copy_and_measure(y, None, moments)
            update_running_statistics(norm, moments[0], moments[1], run.pixels)
        size = (run.height + 1) // 2, (run.width + 1) // 2
        out = run.images_of(run.channels, *size)
        argmax = torch.empty_like(out, dtype=torch.uint8)
        batch_norm = _norm(norm, moments, gamma, beta)
        run.stem_forward(y, batch_norm, out, argmax)
        ctx.save_for_backward(y, gamma, beta, moments, argmax)
        ctx.norm = norm
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, gamma, beta, moments, argmax = ctx.saved_tensors
        if torch.is_grad_enabled():
            dy, *others = _gradients_by_definition(eager_stem, gradient, y, ctx.norm, (gamma, beta))
            return dy, None, *others
        y, argmax, gradient = (
            tensor.contiguous(memory_format=torch.channels_last) for tensor in (y, argmax, gradient)
        )  # hooks may change what is saved
        run = _Launches(y)
        dy, dgamma, dbeta = torch.empty_like(y), torch.empty_like(gamma), torch.empty_like(beta)
        batch_norm = _batch_norm(moments, gamma, beta, ctx.norm.eps)
        sums = run.doubles(2, run.channels)
        run.stem_backward(y, batch_norm, gradient, argmax, dy, dgamma, dbeta, sums)
        run.finish_gradient(
            dy, y, run.channels, moments, ctx.norm.eps, sums, dy
        )  # in place: a number depends on no other
        return dy, None, dgamma, dbeta


class _Stage(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Stage, keep: bool, *parameters: Tensor) -> Tensor:
        run, growth, width = _Launches(x), stage.growth_rate, stage.layers[0].conv1.out_channels
        channels = run.channels
        channels_out = channels + len(stage.layers) * growth
        training = stage.norm.training
        maps = run.maps(run.pixels, -(-channels_out // ROW) * ROW)
        # Mean and variance of the block's maps, then of each layer's bottleneck.
        moments = run.floats(2, channels_out + len(stage.layers) * width)
        weights = _packed(parameters, run.dtype, run.precision)

        def measured(first: int, count: int) -> Tensor | None:
            return moments[:, first : first + count] if training else None

        run.copy_and_measure(x, maps, measured(0, channels))
        bottlenecks: list[Tensor] = []
        d = run.maps(run.pixels, width)  # of one layer after the other; the backward pass computes it again
        for i, (layer, (weight1, weight2)) in enumerate(zip(stage.layers, weights, strict=True)):
            gamma1, beta1, _, gamma2, beta2, _ = parameters[6 * i : 6 * i + 6]
            if keep or not bottlenecks:
                bottlenecks.append(run.maps(run.pixels, width))
            bottleneck, own = bottlenecks[-1], moments[:, channels_out + i * width :]
            norm1, norm2 = _norm(layer.norm1, moments, gamma1, beta1), _norm(layer.norm2, own, gamma2, beta2)
            run.bottleneck_forward(
                maps, channels, norm1, weight1, bottleneck, measured(channels_out + i * width, width)
            )
            run.conv3x3_forward(bottleneck, norm2, weight2, d, maps[:, channels:], measured(channels, growth))
            channels += growth
        out = run.images_of(channels, run.height // stage.pool[0], run.width // stage.pool[1])
        run.pool_forward(maps, _norm(stage.norm, moments, *parameters[-2:]), stage.pool, out)
        if training:
            _update_running_statistics(stage, moments, run.pixels)
        packed = [weight for pair in weights for weight in pair]
        ctx.save_for_backward(x, maps, moments, *parameters, *packed, *(bottlenecks if keep else ()))
        ctx.stage = stage
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stage, (x, maps, moments, *saved) = ctx.stage, ctx.saved_tensors
        layers, growth, width = len(stage.layers), stage.growth_rate, stage.layers[0].conv1.out_channels
        parameters, packed, bottlenecks = (
            saved[: 6 * layers + 2],
            saved[6 * layers + 2 : 8 * layers + 2],
            saved[8 * layers + 2 :],
        )
        if torch.is_grad_enabled():
            dx, *others = _gradients_by_definition(eager_stage, gradient, x, stage, parameters)
            return dx, None, None, *others
        run, eps = _Launches(x), stage.norm.eps
        channels = channels_out = run.channels + layers * growth
        gradients = [run.floats(*parameter.shape) for parameter in parameters]
        for i in range(5, len(parameters), 6):  # as the kernels write 3x3 weights
            gradients[i] = run.floats(growth, 3, 3, width).permute(0, 3, 1, 2)
        map_gradient = torch.empty_like(maps)
        # The sums over pixels of map_gradient, and of it times (x - mean), of each map.
        sums = run.doubles(2, channels_out)
        new_gradient, dz, coefficients = run.maps(run.pixels, growth), run.maps(run.pixels, width), run.floats(3, width)
        recomputed = None if bottlenecks else torch.empty_like(dz)

        last_norm = _batch_norm(moments, parameters[-2], parameters[-1], eps)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        run.pool_backward(
            maps, channels, last_norm, stage.pool, gradient, map_gradient, gradients[-2], gradients[-1], sums
        )  # fmt: skip
        for i in reversed(range(layers)):
            channels -= growth
            layer, (weight1, weight2) = stage.layers[i], packed[2 * i : 2 * i + 2]
            gamma1, beta1, _, gamma2, beta2, _ = parameters[6 * i : 6 * i + 6]
            dgamma1, dbeta1, dweight1, dgamma2, dbeta2, dweight2 = gradients[6 * i : 6 * i + 6]
            norm1 = _batch_norm(moments, gamma1, beta1, layer.norm1.eps)
            norm2 = _batch_norm(moments[:, channels_out + i * width :], gamma2, beta2, layer.norm2.eps)
            if recomputed is None:
                bottleneck = bottlenecks[i]
            else:
                bottleneck = recomputed
                run.bottleneck_forward(maps, channels, norm1, weight1, bottleneck, None)
            new = slice(channels, channels + growth)
            run.finish_gradient(
                map_gradient[:, new], maps[:, new], maps.stride(0), moments[:, new], eps, sums[:, new], new_gradient,
                factor=True,
            )  # fmt: skip
            run.conv3x3_backward_data(new_gradient, weight2, bottleneck, norm2, dz, dgamma2, dbeta2, coefficients)
            run.conv3x3_backward_weights(new_gradient, bottleneck, norm2, dweight2)
            run.bottleneck_backward(
                dz, bottleneck, coefficients, maps, map_gradient, channels, norm1, weight1, dweight1, dgamma1, dbeta1,
                sums,
            )  # fmt: skip
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        run.finish_gradient(map_gradient, maps, maps.stride(0), moments, eps, sums[:, :channels], dx)
        return dx, None, None, *gradients


class _Norm(NamedTuple):
    """A batch norm as the kernels take it: float32, one number a channel, and epsilon."""

    mean: Tensor
    variance: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float


def _batch_norm(moments: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> _Norm:
    return _Norm(moments[0], moments[1], gamma, beta, eps)


def _norm(norm: TrackedBatchNorm, moments: Tensor, gamma: Tensor, beta: Tensor) -> _Norm:
    """With the batch's moments in training, with the running ones in evaluation."""
    if norm.training:
        return _batch_norm(moments, gamma, beta, norm.eps)
    return _Norm(norm.running_mean.float(), norm.running_var.float(), gamma, beta, norm.eps)


class _Launches:
    """The kernels' launches for images of one size: their grids, tiles, and memory for partial sums.

    Args:
        x: images (N, C, H, W) in channels-last order; the maps have its dtype.
    """

    def __init__(self, x: Tensor):
        self.images, self.channels, self.height, self.width = x.shape
        self.pixels, self.dtype, self.device = self.images * self.height * self.width, x.dtype, x.device
        name = architecture(x.device)
        kind = products(x.dtype)
        self.tiles, self.multiprocessors = TILES[name, kind], MULTIPROCESSORS[name]
        self.precision = "ieee" if kind == "ieee" else "tf32"  # which means nothing for halves

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def doubles(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def maps(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def images_of(self, channels: int, height: int, width: int) -> Tensor:
        return self.maps(self.images, height, width, channels).permute(0, 3, 1, 2)

    def copy_and_measure(self, x: Tensor, out: Tensor | None, moments: Tensor | None) -> None:
        grid, tile = _point(self.pixels, self.channels)
        partial = None if moments is None else self.floats(grid[0], 2, self.channels)
        launch(
            "copy_and_measure", grid,
            x, out, 0 if out is None else out.stride(0), partial, self.pixels, self.channels,
            COPY=out is not None, MEASURE=moments is not None, **tile,
        )  # fmt: skip
        self._reduce_moments(partial, tile["BLOCK_P"], moments)

    def stem_forward(self, y: Tensor, norm: _Norm, out: Tensor, argmax: Tensor) -> None:
        _, channels, *size = out.shape
        pixels = self.images * size[0] * size[1]
        grid, tile = _point(pixels, channels)
        launch("stem_forward", grid, y, *norm, out, argmax, pixels, self.height, self.width, *size, channels, **tile)

    def stem_backward(
        self, y: Tensor, norm: _Norm, gradient: Tensor, argmax: Tensor, out: Tensor, dgamma: Tensor, dbeta: Tensor,
        sums: Tensor,
    ) -> None:  # fmt: skip
        grid, tile = _point(self.pixels, self.channels)
        partial = self.floats(grid[0], 2, self.channels)
        launch(
            "stem_backward", grid,
            y, *norm, gradient, argmax, out, partial, self.pixels, self.height, self.width, *gradient.shape[2:],
            self.channels, **tile,
        )  # fmt: skip
        self._reduce_shared_norm(partial, norm, dgamma, dbeta, sums, first=True)

    def bottleneck_forward(
        self, maps: Tensor, channels: int, norm: _Norm, weight: Tensor, out: Tensor, moments: Tensor | None
    ) -> None:
        tile, width = self.tiles.bottleneck_forward, out.shape[1]
        tiles, block_n = _blocks(self.pixels, tile.block_p), _fitting(tile.block_n, width)
        partial = None if moments is None else self.floats(tiles, 2, width)
        scale, shift = self.floats(2, channels)
        launch("fold_norm", (_blocks(channels, FOLDED),), *norm, scale, shift, channels, BLOCK_C=FOLDED)
        launch(
            "bottleneck_forward", (tiles, _blocks(width, block_n)),
            maps, maps.stride(0), scale, shift, weight, out, partial, self.pixels, channels, width,
            MEASURE=moments is not None, BLOCK_P=tile.block_p, BLOCK_N=block_n, BLOCK_K=tile.block_k,
            **self._product(tile),
        )  # fmt: skip
        self._reduce_moments(partial, tile.block_p, moments)

    def conv3x3_forward(
        self, b: Tensor, norm: _Norm, weight: Tensor, d: Tensor, out: Tensor, moments: Tensor | None
    ) -> None:
        """`d` is memory for relu(norm(b))."""
        tile, (growth, *_, width) = self.tiles.conv3x3_forward, weight.shape
        grid, point = _point(self.pixels, width)
        launch("norm_forward", grid, b, *norm, d, self.pixels, width, PRECISION=self.precision, **point)
        rows, block_n = tile.block_p - 2, _fitting(tile.block_n, growth)
        tiles = _blocks(self.pixels, rows)
        partial = None if moments is None else self.floats(tiles, 2, growth)
        launch(
            "conv3x3_forward", (tiles, _blocks(growth, block_n)),
            d, weight, out, out.stride(0), partial, self.pixels, self.height, self.width, width, growth,
            MEASURE=moments is not None, BLOCK_P=tile.block_p, BLOCK_N=block_n, BLOCK_K=_fitting(tile.block_k, width),
            **self._product(tile),
        )  # fmt: skip
        self._reduce_moments(partial, rows, moments)

    def pool_forward(self, maps: Tensor, norm: _Norm, pool: tuple[int, int], out: Tensor) -> None:
        _, channels, *size = out.shape
        pixels = self.images * size[0] * size[1]
        grid, tile = _point(pixels, channels)
        launch(
            "pool_forward", grid,
            maps, maps.stride(0), *norm, out, pixels, self.height, self.width, *size, *pool, channels, **tile,
        )  # fmt: skip

    def pool_backward(
        self, maps: Tensor, channels: int, norm: _Norm, pool: tuple[int, int], gradient: Tensor, map_gradient: Tensor,
        dgamma: Tensor, dbeta: Tensor, sums: Tensor,
    ) -> None:  # fmt: skip
        grid, tile = _point(self.pixels, channels)
        partial = self.floats(grid[0], 2, channels)
        launch(
            "pool_backward", grid,
            maps, maps.stride(0), *norm, gradient, map_gradient, partial, self.pixels, self.height, self.width,
            *gradient.shape[2:], *pool, channels, **tile,
        )  # fmt: skip
        self._reduce_shared_norm(partial, norm, dgamma, dbeta, sums, first=True)

    def finish_gradient(
        self, map_gradient: Tensor, x: Tensor, ldx: int, moments: Tensor, eps: float, sums: Tensor, out: Tensor,
        factor: bool = False,
    ) -> None:  # fmt: skip
        """`factor`: the kernels multiply it."""
        channels = sums.shape[1]
        grid, tile = _point(self.pixels, channels)
        launch(
            "finish_gradient", grid,
            map_gradient, x, ldx, *moments, eps, *sums, out, channels, self.pixels, channels,
            PRECISION=self.precision if factor else None, **tile,
        )  # fmt: skip

    def conv3x3_backward_data(
        self, gradient: Tensor, weight: Tensor, b: Tensor, norm: _Norm, dz: Tensor, dgamma: Tensor, dbeta: Tensor,
        coefficients: Tensor,
    ) -> None:  # fmt: skip
        persistent, (growth, *_, width) = self.tiles.conv3x3_backward_data_persistent, weight.shape
        sizes: tuple[int, ...] = (self.pixels, self.height, self.width, width, growth)
        own: dict[str, Any] = {}
        if persistent is not None and growth <= persistent.block_k:
            tile, kernel, own = persistent, "conv3x3_backward_data_persistent", dict(STAGES=persistent.stages)
            blocks = _blocks(width, _fitting(tile.block_n, width))
            partials, tiles = self._ranges(tile, blocks)
            grid, sizes = (blocks, partials), (*sizes, tiles)
        else:
            tile, kernel = self.tiles.conv3x3_backward_data, "conv3x3_backward_data"
            blocks = _blocks(width, _fitting(tile.block_n, width))
            partials = _blocks(self.pixels, tile.block_p)
            grid = partials, blocks
        partial = self.floats(partials, 2, width)
        launch(
            kernel, grid, gradient, weight, b, *norm, dz, partial, *sizes, BLOCK_P=tile.block_p,
            BLOCK_N=_fitting(tile.block_n, width), BLOCK_K=_fitting(tile.block_k, growth), **own, **self._product(tile),
        )  # fmt: skip
        self._reduce_own_norm(partial, norm, dgamma, dbeta, coefficients)

    def conv3x3_backward_weights(self, gradient: Tensor, b: Tensor, norm: _Norm, dweight: Tensor) -> None:
        tile, (growth, width, *_) = self.tiles.conv3x3_backward_weights, dweight.shape
        block_c, block_n = _fitting(tile.block_k, width), _fitting(tile.block_n, growth)
        blocks = 3 * _blocks(growth, block_n), _blocks(width, block_c)
        ranges, tiles = self._ranges(tile, blocks[0] * blocks[1])
        partial = self.floats(ranges, growth, 9, width)
        launch(
            "conv3x3_backward_weights", (blocks[0], ranges, blocks[1]),
            b, *norm, gradient, partial, self.pixels, self.height, self.width, width, growth, tiles,
            BLOCK_P=tile.block_p, BLOCK_C=block_c, BLOCK_N=block_n, **self._product(tile),
        )  # fmt: skip
        self._reduce_weights(partial, dweight)

    def bottleneck_backward(
        self, dz: Tensor, b: Tensor, coefficients: Tensor, maps: Tensor, map_gradient: Tensor, channels: int, norm: _Norm,
        weight: Tensor, dweight: Tensor, dgamma: Tensor, dbeta: Tensor, sums: Tensor,
    ) -> None:  # fmt: skip
        """The gradient of b takes the place of dz."""
        tile, width = self.tiles.bottleneck_backward, b.shape[1]
        block_c, block_n = _fitting(tile.block_k, channels), _fitting(tile.block_n, width)
        blocks, parts = _blocks(channels, block_c), _blocks(width, block_n)
        ranges, tiles = self._ranges(tile, blocks)
        weight_partial, partial = self.floats(ranges, width, channels), self.floats(parts * ranges, 2, channels)
        grid, point = _point(self.pixels, width)
        launch("norm_backward", grid, dz, b, coefficients, self.pixels, width, PRECISION=self.precision, **point)
        for part in range(parts):  # the gradient of a wide bottleneck's input adds up over parts of it
            launch(
                "bottleneck_backward", (blocks, ranges),
                dz, maps, map_gradient, maps.stride(0), *norm, weight, weight_partial, partial[part * ranges :],
                self.pixels, channels, width, part * block_n, tiles,
                BLOCK_P=tile.block_p, BLOCK_N=block_n, BLOCK_C=block_c, STAGES=tile.stages, **self._product(tile),
            )  # fmt: skip
        self._reduce_weights(weight_partial, dweight)
        self._reduce_shared_norm(partial, norm, dgamma, dbeta, sums, first=False)

    def _product(self, tile: Tile) -> dict[str, Any]:
        return dict(PRECISION=self.precision, warps=tile.warps, stages=tile.stages)

    def _ranges(self, tile: Tile, blocks: int) -> tuple[int, int]:
        """Into how many ranges a kernel with so many blocks of channels splits the pixels; the tiles of a range."""
        tiles = _blocks(self.pixels, tile.block_p)
        of_a_range = _blocks(tiles, max(1, tile.programs * self.multiprocessors // blocks))
        return _blocks(tiles, of_a_range), of_a_range

    def _reduce_moments(self, partial: Tensor | None, rows: int, moments: Tensor | None) -> None:
        if partial is not None and moments is not None:
            tiles, _, channels = partial.shape
            launch(
                "reduce_moments", (_blocks(channels, SUMS["BLOCK_C"]),),
                partial, tiles, self.pixels, channels, *moments, ROWS=rows, **SUMS,
            )  # fmt: skip

    def _reduce_shared_norm(
        self, partial: Tensor, norm: _Norm, dgamma: Tensor, dbeta: Tensor, sums: Tensor, first: bool
    ) -> None:
        tiles, _, channels = partial.shape
        launch(
            "reduce_shared_norm", (_blocks(channels, SUMS["BLOCK_C"]),),
            partial, tiles, channels, norm.variance, norm.gamma, norm.eps, dgamma, dbeta, *sums, FIRST=first, **SUMS,
        )  # fmt: skip

    def _reduce_own_norm(
        self, partial: Tensor, norm: _Norm, dgamma: Tensor, dbeta: Tensor, coefficients: Tensor
    ) -> None:
        tiles, _, channels = partial.shape
        launch(
            "reduce_own_norm", (_blocks(channels, SUMS["BLOCK_C"]),),
            partial, tiles, self.pixels, channels, norm.mean, norm.variance, norm.gamma, norm.eps, dgamma, dbeta,
            coefficients, **SUMS,
        )  # fmt: skip

    def _reduce_weights(self, partial: Tensor, out: Tensor) -> None:
        numbers = out.numel()
        launch(
            "reduce_weights", (_blocks(numbers, NUMBERS["BLOCK"]),), partial, out, len(partial), numbers, **NUMBERS
        )  # fmt: skip


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _point(pixels: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the tile of a kernel without products."""
    block_c = _fitting(POINT_CHANNELS, channels)
    block_p = POINT // block_c
    return (_blocks(pixels, block_p), _blocks(channels, block_c)), dict(BLOCK_P=block_p, BLOCK_C=block_c)


def _fitting(most: int, size: int) -> int:
    """The side of a tile: a power of two from 16, which the tensor cores need, to `most`, not far above `size`."""
    return max(16, min(most, 1 << (size - 1).bit_length()))


def _packed(parameters: Sequence[Tensor], dtype: torch.dtype, precision: str) -> list[tuple[Tensor, Tensor]]:
    """Each layer's weights in the maps' dtype, once for both passes: 1x1 as (out, in), 3x3 as (out, 3, 3, in).

    Float32 weights that lie so already, as those of channels-last networks do, are not copied. For TF32 they are rounded to
    it, as the kernels' `_factor` does.
    """
    rounds = precision == "tf32" and dtype is torch.float32
    own = [
        weight
        for i in range(0, len(parameters) - 2, 6)
        for weight in (parameters[i + 2].flatten(1), parameters[i + 5].permute(0, 2, 3, 1))
    ]
    if rounds or dtype is not torch.float32 or not all(weight.is_contiguous() for weight in own):
        sizes = [_blocks(weight.numel(), ROW) * ROW for weight in own]
        buffer = torch.empty(sum(sizes), dtype=dtype, device=own[0].device)
        pieces = buffer.split(sizes)
        packed = [piece[: weight.numel()].view(weight.shape) for piece, weight in zip(pieces, own, strict=True)]
        torch._foreach_copy_(packed, own)
        if rounds:
            bits = buffer.view(torch.int32)
            rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)
            torch.where(buffer == buffer, rounded, buffer, out=buffer)
        own = packed
    return list(zip(own[::2], own[1::2], strict=True))


def _update_running_statistics(stage: Stage, moments: Tensor, pixels: int) -> None:
    """Of all norms of a stage, in four launches where they are alike."""
    norms, firsts = [], []
    first = stage.norm.num_features
    for layer in stage.layers:
        norms += [layer.norm1, layer.norm2]
        firsts += [0, first]
        first += layer.norm2.num_features
    norms, firsts = [*norms, stage.norm], [*firsts, 0]
    mean, variance = moments
    parts = [slice(first, first + norm.num_features) for first, norm in zip(firsts, norms, strict=True)]
    if len({norm.momentum for norm in norms}) > 1 or stage.norm.running_mean.dtype is not torch.float32:
        for norm, part in zip(norms, parts, strict=True):
            update_running_statistics(norm, mean[part], variance[part], pixels)
        return
    with torch.no_grad():
        unbiased, momentum = variance * (pixels / (pixels - 1)), stage.norm.momentum
        torch._foreach_lerp_([norm.running_mean for norm in norms], [mean[part] for part in parts], momentum)
        torch._foreach_lerp_([norm.running_var for norm in norms], [unbiased[part] for part in parts], momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def _gradients_by_definition(eager: Callable[..., Tensor], gradient: Tensor, x: Tensor, *arguments: Any) -> list[Any]:
    dtype = x.dtype if x.dtype in HALVES else torch.bfloat16
    with torch.autocast(x.device.type, dtype, enabled=x.dtype in HALVES, cache_enabled=False):
        return gradients_by_definition(eager, gradient, x, *arguments)
