"""Each C++ kernel against torch's operators in float64, at sizes that are no multiple of any tile or vector.

In bfloat16 with and without the processor's products of pairs, with an emulated matrix unit, and with vectors of other
widths. Most of these builds fill scratch memory with NaN; matrices have NaN where a kernel must not look.
"""

import ctypes
import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import PATIENCE, REPOSITORY
from torch import Tensor

from pipeline import cpp
from pipeline.models import kernels
from pipeline.models.kernels import BatchNorm, call, computing_dtype

pytestmark = pytest.mark.skipif(kernels.unavailable_reason() is not None, reason=str(kernels.unavailable_reason()))
# Relative errors: a sum over some hundred values; in bfloat16, whose rounding is 2^-9, of numbers rounded three times.
DTYPES = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 1.5e-2}
EPSILON = 1e-3
NAN = "-DFILL_SCRATCH_WITH_NAN"
EMULATED_AMX = Path(__file__).with_name("emulated_amx.h")
BUILDS = {
    "float64": (torch.float64,),
    "float32": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "float32, NaN": (torch.float32, NAN),
    "bfloat16, NaN": (torch.bfloat16, NAN),
}
if platform.machine() == "x86_64":
    BUILDS |= {
        "bfloat16 without pairs": (torch.bfloat16, NAN, "-UMAY_USE_AMX", "-DSLOW_PAIRS"),
        "bfloat16 with AVX2": (torch.bfloat16, NAN, "-mno-avx512f"),
        "float32 with AVX2": (torch.float32, NAN, "-mno-avx512f"),
    }
if "avx512_bf16" in cpp.cpu():
    BUILDS |= {
        "bfloat16 in pairs": (torch.bfloat16, NAN, "-UMAY_USE_AMX", "-USLOW_PAIRS"),
        "bfloat16, emulated AMX": (torch.bfloat16, NAN, "-UMAY_USE_AMX", f"-include{EMULATED_AMX}"),
    }


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@functools.cache
def library(flags: tuple[str, ...]) -> ctypes.CDLL:
    """The kernels compiled with these flags too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SOURCES", [*kernels.SOURCES, EMULATED_AMX])
        patch.setattr(kernels, "FLAGS", [*kernels.FLAGS, *flags])
        result = kernels.load.__wrapped__()
    assert (b"emulated AMX" in Path(result._name).read_bytes()) == any(str(EMULATED_AMX) in flag for flag in flags)
    return result


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def dtype(request, monkeypatch) -> Iterator[torch.dtype]:
    """Of maps; `kernels.call` runs the build that belongs to it."""
    dtype, *flags = request.param
    if flags:
        build = library(tuple(flags))
        monkeypatch.setattr(kernels, "load", lambda: build)
        kernels._function.cache_clear()
    yield dtype
    if flags:
        kernels._function.cache_clear()


@pytest.fixture(params=[1, 2, 5], ids=lambda threads: f"{threads} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to rounding in `dtype`, relative to the largest expected value."""
    error, largest = (actual.double() - expected.double()).abs().max(), expected.abs().max()
    assert error <= DTYPES[dtype] * largest, f"error {error:.1e} of values up to {largest:.1e}"


def matrix(pixels: int, channels: int, ld: int, dtype: torch.dtype) -> Tensor:
    """Random, and NaN in the columns that follow."""
    result = torch.full((pixels, ld), torch.nan, dtype=dtype)
    result[:, :channels] = torch.randn(pixels, channels)
    return result


class Norm:
    """A batch norm of so many channels, random, for maps of `dtype`, and what it does in float64."""

    def __init__(self, channels: int, dtype: torch.dtype):
        dtype = computing_dtype(dtype)
        self.mean, self.gamma, self.beta = torch.randn(3, channels, dtype=dtype)
        self.variance = torch.rand(channels, dtype=dtype) + 0.5
        self.struct = BatchNorm(self.mean, self.variance, self.gamma, self.beta, EPSILON)

    def apply(self, x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
        """ReLU of the norm of x (N, C, H, W) or (pixels, C), its statistics held constant."""
        gamma, beta = self.gamma.double() if gamma is None else gamma, self.beta.double() if beta is None else beta
        return F.relu(F.batch_norm(x, self.mean.double(), self.variance.double(), gamma, beta, eps=EPSILON))


def rows(channels: int, dtype: torch.dtype) -> int:
    lanes = kernels.vector_lanes(dtype)
    return -(-channels // lanes) * lanes


def as_images(pixels: Tensor, images: int, height: int, width: int) -> Tensor:
    """(pixels, C) to (N, C, H, W) in float64."""
    return pixels.double().reshape(images, height, width, -1).permute(0, 3, 1, 2)


def as_pixels(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.double().detach().requires_grad_()


@pytest.mark.parametrize(("pixels", "channels"), [(1, 3), (131, 70), (700, 33)])
def test_copy_and_measure(dtype, threads, pixels, channels):
    x = torch.randn(pixels, channels, dtype=dtype) + 3
    ld = rows(channels, dtype) + 16
    out, mean, variance = torch.zeros(pixels, ld, dtype=dtype), *torch.empty(2, channels, dtype=computing_dtype(dtype))
    call("copy_and_measure", dtype, x, pixels, channels, out, ld, mean, variance)
    assert torch.equal(out[:, :channels], x) and not out[:, channels:].any()
    assert_close(mean, x.double().mean(0), dtype)
    if pixels > 1:
        assert_close(variance, x.double().var(0, correction=0), dtype)


def test_variance_of_maps_far_from_zero():
    x = torch.randn(5000, 20, dtype=torch.float64) + 1e6
    mean, variance = torch.empty(2, 20, dtype=torch.float64)
    call("copy_and_measure", torch.float64, x, 5000, 20, None, 0, mean, variance)
    torch.testing.assert_close(variance, x.var(0, correction=0), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("pixels", "channels", "width"), [(1, 5, 4), (7, 24, 48), (397, 147, 131), (250, 300, 16)])
def test_bottleneck_forward(dtype, threads, pixels, channels, width):
    ld = rows(channels, dtype) + 16
    x, weight = matrix(pixels, channels, ld, dtype), torch.randn(width, channels, dtype=computing_dtype(dtype))
    norm, b = Norm(channels, dtype), torch.empty(pixels, rows(width, dtype), dtype=dtype)
    mean, variance = torch.empty(2, width, dtype=computing_dtype(dtype))
    call("bottleneck_forward", dtype, x, ld, pixels, channels, norm.struct, weight, width, b, mean, variance)
    expected = norm.apply(x[:, :channels].double()) @ weight.double().T
    assert_close(b[:, :width], expected, dtype)
    assert_close(mean, expected.mean(0), dtype)
    if pixels > 1:
        assert_close(variance, expected.var(0, correction=0), dtype)


@pytest.mark.parametrize(("pixels", "channels", "width"), [(9, 5, 4), (97, 24, 48), (397, 147, 131), (250, 300, 16)])
def test_bottleneck_backward(dtype, threads, pixels, channels, width):
    ld, ldb = rows(channels, dtype) + 16, rows(width, dtype)
    x, g = (matrix(pixels, channels, ld, dtype) for _ in range(2))
    g[:, rows(channels, dtype) :] = 7
    weight = torch.randn(width, channels, dtype=computing_dtype(dtype)) / width**0.5
    b, dz = (matrix(pixels, width, ldb, dtype) for _ in range(2))
    norm1, norm2 = Norm(channels, dtype), Norm(width, dtype)
    norm2.mean.copy_(b[:, :width].double().mean(0))
    norm2.variance.copy_(b[:, :width].double().var(0, correction=0))
    sum2 = dz[:, :width].double().sum(0)
    centred_sum2 = (dz[:, :width].double() * (b[:, :width].double() - norm2.mean.double())).sum(0)
    map_sum, map_centred_sum = torch.randn(2, channels, dtype=torch.float64)
    dweight, dgamma1, dbeta1 = torch.empty_like(weight), *torch.empty(2, channels, dtype=weight.dtype)
    dgamma2, dbeta2 = torch.empty(2, width, dtype=weight.dtype)
    before = g.clone(), map_sum.clone(), map_centred_sum.clone()
    call(
        "bottleneck_backward", dtype, dz, b, pixels, width, norm2.struct, sum2, centred_sum2, dgamma2, dbeta2,
        x, g, ld, channels, norm1.struct, weight, dweight, dgamma1, dbeta1, map_sum, map_centred_sum,
    )  # fmt: skip

    gamma2, beta2, b_leaf = leaf(norm2.gamma), leaf(norm2.beta), leaf(b[:, :width])
    z2 = F.batch_norm(b_leaf, None, None, gamma2, beta2, training=True, eps=EPSILON)
    db, expected_dgamma2, expected_dbeta2 = torch.autograd.grad(z2, [b_leaf, gamma2, beta2], dz[:, :width].double())
    gamma1, beta1, x_leaf, weight_leaf = leaf(norm1.gamma), leaf(norm1.beta), leaf(x[:, :channels]), leaf(weight)
    outputs = norm1.apply(x_leaf, gamma1, beta1) @ weight_leaf.T
    dx, *expected = torch.autograd.grad(outputs, [x_leaf, gamma1, beta1, weight_leaf], db)
    inverse = (norm1.variance.double() + EPSILON).rsqrt()
    assert_close(g[:, :channels], before[0][:, :channels].double() + dx / inverse, dtype)
    assert torch.equal(g[:, rows(channels, dtype) :], before[0][:, rows(channels, dtype) :])
    for actual, wanted in zip([dgamma1, dbeta1, dweight], expected, strict=True):
        assert_close(actual, wanted, dtype)
    assert_close(dgamma2, expected_dgamma2, dtype)
    assert_close(dbeta2, expected_dbeta2, dtype)
    tolerance = DTYPES[dtype] * (10 if dtype is torch.bfloat16 else 100)
    torch.testing.assert_close(map_sum - before[1], norm1.gamma * expected[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        map_centred_sum - before[2], norm1.gamma * expected[0] / inverse, rtol=tolerance, atol=tolerance
    )


SHAPES = [(1, 1, 1, 4, 3), (2, 5, 8, 48, 12), (3, 7, 7, 20, 10), (1, 14, 9, 131, 33), (9, 2, 31, 16, 70)]


@pytest.mark.parametrize(("images", "height", "width", "channels", "growth"), SHAPES)
def test_conv3x3_forward(dtype, threads, images, height, width, channels, growth):
    pixels, ldb, ld = images * height * width, rows(channels, dtype), growth + 21
    b, out = matrix(pixels, channels, ldb, dtype), torch.zeros(pixels, ld, dtype=dtype)
    weight, norm = torch.randn(growth, channels, 3, 3, dtype=computing_dtype(dtype)), Norm(channels, dtype)
    mean, variance = torch.empty(2, growth, dtype=weight.dtype)
    call(
        "conv3x3_forward", dtype, b, images, height, width, channels, norm.struct,
        weight.permute(2, 3, 1, 0).contiguous(), growth, out[:, 5:], ld, mean, variance,
    )  # fmt: skip
    d = norm.apply(as_images(b[:, :channels], images, height, width))
    expected = as_pixels(F.conv2d(d, weight.double(), padding=1))
    assert_close(out[:, 5 : 5 + growth], expected, dtype)
    assert not out[:, :5].any() and not out[:, 5 + growth :].any()
    assert_close(mean, expected.mean(0), dtype)
    if pixels > 1:
        assert_close(variance, expected.var(0, correction=0), dtype)


@pytest.mark.parametrize(("images", "height", "width", "channels", "growth"), SHAPES)
def test_conv3x3_backward(dtype, threads, images, height, width, channels, growth):
    pixels, ldb, ldg = images * height * width, rows(channels, dtype), rows(growth, dtype)
    b, gradient = matrix(pixels, channels, ldb, dtype), matrix(pixels, growth, ldg, dtype)
    weight, norm = torch.randn(growth, channels, 3, 3, dtype=computing_dtype(dtype)), Norm(channels, dtype)
    dz, dweight = torch.empty_like(b), torch.empty(3, 3, channels, growth, dtype=weight.dtype)
    total, centred = torch.empty(2, channels, dtype=torch.float64)
    call(
        "conv3x3_backward", dtype, b, images, height, width, channels, norm.struct,
        weight.permute(2, 3, 0, 1).contiguous(), growth, gradient, dz, dweight, total, centred,
    )  # fmt: skip
    shift, weight_leaf = leaf(norm.beta), leaf(weight)  # the gradient of beta before it is summed is dz
    images_in = as_images(b[:, :channels], images, height, width)
    z = F.batch_norm(images_in, norm.mean.double(), norm.variance.double(), norm.gamma.double(), shift, eps=EPSILON)
    z.retain_grad()
    F.conv2d(F.relu(z), weight_leaf, padding=1).backward(as_images(gradient[:, :growth], images, height, width))
    expected = as_pixels(z.grad)
    assert_close(dz[:, :channels], expected, dtype)
    assert_close(dweight.permute(3, 2, 0, 1), weight_leaf.grad, dtype)
    scale = expected.abs().sum()
    assert (total - expected.sum(0)).abs().max() <= DTYPES[dtype] * scale
    centred_expected = (expected * (b[:, :channels].double() - norm.mean.double())).sum(0)
    assert (centred - centred_expected).abs().max() <= DTYPES[dtype] * 10 * scale


@pytest.mark.parametrize(("pixels", "channels"), [(5, 3), (131, 70), (700, 16)])
def test_finish_gradient(dtype, threads, pixels, channels):
    ld, ldout, first = channels + 37, rows(channels, dtype) + 16, 5
    x, g = (matrix(pixels, first + channels, ld, dtype) for _ in range(2))
    maps, reached = x[:, first : first + channels].double(), g[:, first : first + channels].double()
    mean, variance = (moment.to(computing_dtype(dtype)) for moment in (maps.mean(0), maps.var(0, correction=0)))
    sums = reached.sum(0), (reached * (maps - mean.double())).sum(0)
    out = torch.full((pixels, ldout), 7, dtype=dtype)
    norm = BatchNorm(mean, variance, None, None, EPSILON)
    call("finish_gradient", dtype, g[:, first:], x[:, first:], ld, pixels, channels, norm, *sums, out, ldout)
    maps_leaf = leaf(maps)
    F.batch_norm(maps_leaf, None, None, training=True, eps=EPSILON).backward(reached)
    assert_close(out[:, :channels], maps_leaf.grad, dtype)
    assert not out[:, channels : rows(channels, dtype)].any()


@pytest.mark.parametrize(
    ("images", "height", "width", "channels", "side"),
    [(2, 4, 6, 33, (2, 2)), (3, 7, 5, 70, (2, 2)), (2, 7, 3, 20, (7, 3)), (1, 2, 2, 5, (2, 2))],
)
def test_pooling(dtype, threads, images, height, width, channels, side):
    pixels, ld = images * height * width, rows(channels, dtype) + 16
    x, g = (matrix(pixels, channels, ld, dtype) for _ in range(2))
    norm, shape = Norm(channels, dtype), (images, channels, height // side[0], width // side[1])
    out = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    call("pool_forward", dtype, x, ld, images, height, width, channels, norm.struct, *side, out)
    gamma, beta, maps = leaf(norm.gamma), leaf(norm.beta), leaf(as_images(x[:, :channels], images, height, width))
    expected = F.avg_pool2d(norm.apply(maps, gamma, beta), side)
    assert_close(out, expected, dtype)

    gradient = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    dgamma, dbeta = torch.empty(2, channels, dtype=computing_dtype(dtype))
    sums = torch.full((2, channels), 7, dtype=torch.float64)
    call(
        "pool_backward", dtype, x, g, ld, images, height, width, channels, norm.struct, *side, gradient, dgamma, dbeta,
        *sums,
    )  # fmt: skip
    dx, *expected = torch.autograd.grad(expected, [maps, gamma, beta], gradient.double())
    inverse = (norm.variance.double() + EPSILON).rsqrt()
    assert_close(g[:, :channels], as_pixels(dx) / inverse, dtype)
    assert_close(dgamma, expected[0], dtype)
    assert_close(dbeta, expected[1], dtype)
    torch.testing.assert_close(sums[0], (norm.gamma * dbeta).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[1], norm.gamma * expected[0] / inverse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "height", "width", "channels"), [(2, 6, 8, 16), (3, 7, 5, 70), (1, 1, 3, 5), (2, 5, 1, 5)]
)
def test_stem(dtype, threads, images, height, width, channels):
    norm = Norm(channels, dtype)
    y = torch.randn(images, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    norm.mean.copy_(y.double().mean((0, 2, 3)))
    norm.variance.copy_(y.double().var((0, 2, 3), correction=0))
    shape = (images, channels, (height + 1) // 2, (width + 1) // 2)
    out, argmax = (torch.empty(shape, dtype=t, memory_format=torch.channels_last) for t in (dtype, torch.uint8))
    sizes = (images, height, width, channels)
    call("stem_forward", dtype, y, *sizes, norm.struct, out, argmax)
    gamma, beta, y_leaf = leaf(norm.gamma), leaf(norm.beta), leaf(y)
    z = F.relu(F.batch_norm(y_leaf, None, None, gamma, beta, training=True, eps=EPSILON))
    expected = F.max_pool2d(z, kernel_size=3, stride=2, padding=1)
    assert_close(out, expected, dtype)

    gradient = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    dy, dgamma, dbeta = torch.empty_like(y), *torch.empty(2, channels, dtype=computing_dtype(dtype))
    call("stem_backward", dtype, y, *sizes, norm.struct, gradient, argmax, dy, dgamma, dbeta)
    wanted = torch.autograd.grad(expected, [y_leaf, gamma, beta], gradient.double())
    for actual, expected_gradient in zip([dy, dgamma, dbeta], wanted, strict=True):
        assert_close(actual, expected_gradient, dtype)


def test_the_stems_pooling_keeps_a_nan():
    """Also where lower numbers come after it."""
    norm = Norm(5, torch.float32)
    y = -torch.rand(1, 5, 6, 6).contiguous(memory_format=torch.channels_last)
    y[0, 2, 0, 0] = torch.nan
    norm.mean.zero_(), norm.variance.fill_(1), norm.gamma.fill_(1), norm.beta.zero_()
    out, argmax = (torch.empty(1, 5, 3, 3, dtype=t, memory_format=torch.channels_last) for t in (y.dtype, torch.uint8))
    call("stem_forward", torch.float32, y, 1, 6, 6, 5, norm.struct, out, argmax)
    expected = F.max_pool2d(F.relu(y), kernel_size=3, stride=2, padding=1)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any() and not (out < 0).any()


def test_a_nan_is_not_hidden():
    x = torch.randn(50, 16, dtype=torch.float64)
    x[17, 3] = torch.nan
    norm, weight = Norm(16, torch.float64), torch.randn(16, 16, dtype=torch.float64)
    b = torch.empty(50, 16, dtype=torch.float64)
    call("bottleneck_forward", torch.float64, x, 16, 50, 16, norm.struct, weight, 16, b, None, None)
    assert b[17].isnan().all() and not b[:17].isnan().any() and not b[18:].isnan().any()


def copy_and_measure(x: Tensor, out: Tensor | None, ld: int, mean: Tensor | None, variance: Tensor | None) -> None:
    call("copy_and_measure", torch.float32, x, 8, 4, out, ld, mean, variance)


X, OUT, MEAN = torch.ones(8, 4), torch.zeros(8, 16), torch.zeros(4)
IMAGES = torch.ones(2, 4, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((X.double(), OUT, 16, MEAN, MEAN), "copy_and_measure's x must be torch.float32 .* not torch.float64"),
        ((X.half(), OUT, 16, MEAN, MEAN), "copy_and_measure's x must be torch.float32 .* not torch.float16"),
        ((X.to("meta"), OUT, 16, MEAN, MEAN), "copy_and_measure's x must be .* on meta"),
        ((X.t().contiguous().t(), OUT, 16, MEAN, MEAN), "x must be .* strides \\(1, 8\\)"),
        ((torch.ones(8, 5)[:, :4], OUT, 16, MEAN, MEAN), "x must be .* strides \\(5, 1\\)"),
        ((IMAGES, OUT, 16, MEAN, MEAN), "x must be .* shape \\(2, 4, 2, 2\\)"),
        ((torch._neg_view(X), OUT, 16, MEAN, MEAN), "x must be"),
        ((None, OUT, 16, MEAN, MEAN), "x must be a tensor, not None"),
        ((X, OUT, 12, MEAN, MEAN), "out must be .* strides \\(16, 1\\)"),
        ((X, OUT, 16, torch.zeros(8)[::2], MEAN), "mean must be .* strides \\(2,\\)"),
        ((X[:7], OUT, 16, MEAN, MEAN), "x must be .* shape \\(7, 4\\)"),
        ((X, OUT[:, 14:], 16, MEAN, MEAN), "out must be .* shape \\(8, 2\\)"),
        ((X, OUT, 16, MEAN[:3], MEAN), "mean must be .* shape \\(3,\\)"),
        ((X, OUT, True, MEAN, MEAN), "ldout must be a whole number, not True"),
        ((X, OUT, 16.0, MEAN, MEAN), "ldout must be a whole number, not 16.0"),
        ((X, OUT, 16, MEAN, 3), "variance must be a tensor, not 3"),
    ],
)
def test_a_tensor_that_a_kernel_cannot_read_is_an_error(arguments, complaint):
    with pytest.raises(TypeError, match=complaint):
        copy_and_measure(*arguments)
    assert not OUT.any() and not MEAN.any()


def test_images_in_channels_last_order_are_rows_of_pixels():
    x = torch.randn(2, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    out = torch.zeros(8, 16)
    copy_and_measure(x, out, 16, None, None)
    assert torch.equal(out[:, :4], as_pixels(x))


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("kernel", kernels.SIGNATURES)
def test_a_miscounted_argument_is_an_error(kernel, change):
    count = len(kernels.SIGNATURES[kernel].split()) + change
    with pytest.raises(TypeError, match=f"{kernel} takes {count - change} arguments, not {count}"):
        call(kernel, torch.float32, *[None] * count)


def test_the_signatures_are_those_of_the_source():
    source = next(path for path in kernels.SOURCES if path.suffix == ".cpp").read_text()
    for kernel, declared in kernels.SIGNATURES.items():
        parameters = re.search(rf"^void {kernel}\(long threads, (.*?)\) {{", source, re.MULTILINE | re.DOTALL)[1]
        expected = []
        for parameter in re.sub(r"\s+", " ", parameters).split(", "):
            kind, name = parameter.rsplit(" ", 1)
            expected.append((name, "long" if kind == "long" else kind.removeprefix("const ")))
        c_types = {
            "": "long",
            "rows": "S*",
            "flat": "T*",
            "norm": "BatchNorm<T>*",
            "sums": "double*",
            "bytes": "uint8_t*",
        }
        words = [word.rstrip("?").partition(":") for word in declared.split()]
        assert [name for name, _, _ in words] == [name for name, _ in expected], kernel
        for (_, _, kind), (name, c_type) in zip(words, expected, strict=True):
            assert c_type == c_types[kind.split("(")[0]], f"{kernel}'s {name}"


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.zeros(8)[::2], MEAN, MEAN, MEAN),
        (MEAN, MEAN.double(), MEAN, MEAN),
        (MEAN, MEAN, MEAN.to("meta"), MEAN),
        (MEAN, MEAN, MEAN, torch._neg_view(MEAN)),
    ],
    ids=["strided", "dtype", "device", "negated"],
)
def test_a_batch_norm_of_tensors_that_a_kernel_cannot_read_is_an_error(tensors):
    with pytest.raises(TypeError, match="a batch norm's tensor must be"):
        BatchNorm(*tensors, 1e-5)


@pytest.mark.parametrize("tensor", [MEAN.double(), MEAN[:3]], ids=["dtype", "channels"])
def test_a_batch_norm_of_other_channels_is_an_error(tensor):
    norm = BatchNorm(*[tensor] * 4, 1e-5)
    with pytest.raises(TypeError, match="norm must be a BatchNorm of 4 channels in torch.float32"):
        call("pool_forward", torch.float32, OUT, 16, 2, 2, 2, 4, norm, 2, 2, IMAGES)


WIDE = """
import resource, sys, torch
from pipeline.models.kernels import BatchNorm, call, vector_lanes
torch.set_num_threads(2)
wide, f64 = 1024, torch.float64
norm = BatchNorm(*torch.ones(4, wide), 1e-5)
x, g, dz, out = torch.ones(4, 4, wide)
w, dw, v, s = torch.ones(9, wide, wide), torch.ones(9, wide, wide), torch.ones(2, wide), torch.ones(4, wide, dtype=f64)
calls = {
    "bottleneck_forward": (x, wide, 4, wide, norm, w[0], wide, out, *v),
    "bottleneck_backward": (dz, x, 4, wide, norm, s[0], s[1], *v, x, g, wide, wide, norm, w[0], dw[0], *v, s[2], s[3]),
    "conv3x3_forward": (x, 1, 2, 2, wide, norm, w, wide, out, wide, *v),
    "conv3x3_backward": (x, 1, 2, 2, wide, norm, w, wide, g, dz, dw, s[0], s[1]),
}
arguments = calls[sys.argv[1]]
call(sys.argv[1], torch.float32, *arguments)  # starts the threads
for mebibytes in map(int, sys.argv[2:]):
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + mebibytes * 2**20, resource.RLIM_INFINITY))
    try:
        call(sys.argv[1], torch.float32, *arguments)
        result = "had enough"
    except RuntimeError as error:
        result = f"{type(error).__name__} {error}"
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # Python needs some too
    print(mebibytes, result)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["bottleneck_forward", "bottleneck_backward", "conv3x3_forward", "conv3x3_backward"])
def test_no_memory_is_an_error_not_the_end_of_the_process(kernel):
    """With the larger limits a kernel gets a part of what it asks for, and then no more."""
    limits = {"bottleneck_forward": [2, 3], "bottleneck_backward": [2, 5, 10], "conv3x3_forward": [2, 5, 60]}
    mebibytes = limits.get(kernel, [2, 5, 70, 180])
    done = subprocess.run(
        [sys.executable, "-c", WIDE, kernel, *map(str, mebibytes)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    error = f"OutOfMemoryError the kernel {kernel} cannot allocate memory: take fewer images at once"
    assert done.stdout.splitlines() == [f"{limit} {error}" for limit in mebibytes]


@pytest.mark.slow
def test_compiled_once_by_processes_that_start_together(tmp_path):
    """Three processes with an empty cache: one library, no leftovers, all can call it."""
    script = (
        "import torch; from pipeline.models import kernels; x = torch.ones(4, 3); m = torch.empty(2, 3);"
        "kernels.call('copy_and_measure', x.dtype, x, 4, 3, None, 0, m[0], m[1]); print(m[0].sum().item())"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=PATIENCE)[0] for process in processes] == ["3.0\n"] * 3
    files = sorted(path.suffix for path in (tmp_path / "densenet-pipeline").iterdir())
    assert files == [".lock", ".so"]


@pytest.mark.slow
def test_without_a_compiler_the_reason_is_one_line(tmp_path):
    script = "from pipeline.models import kernels; print(kernels.unavailable_reason())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/nowhere", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "no C++ compiler (c++, g++, clang++ or $CXX)\n"


def test_a_compiler_that_cannot_be_run_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "odd").write_bytes(b"of another machine")
    (tmp_path / "odd").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "odd"))
    assert cpp.find_compiler() in ("c++", "g++", "clang++")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        cpp.CppUnavailableError, match=r"no C\+\+ compiler .*: .*odd cannot be run \(Exec format error\)"
    ):
        cpp.find_compiler()


def test_why_code_does_not_compile_is_the_error_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "a.h").write_text("#error nothing goes\n")
    (tmp_path / "a.cpp").write_text('#include "a.h"\n')
    with pytest.raises(cpp.CppUnavailableError, match=r"cannot compile a.cpp: .*a.h:1:.*error: .*nothing goes"):
        cpp.load_cpp([tmp_path / "a.cpp", tmp_path / "a.h"])


@pytest.mark.parametrize("links", [True, False])
def test_a_library_that_is_there_is_not_replaced(tmp_path, monkeypatch, links):
    """Another machine, which sees the lock or the file late, has compiled it meanwhile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "a.cpp").write_text('extern "C" int answer() { return 42; }\n')
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    assert cpp.load_cpp([tmp_path / "a.cpp"]).answer() == 42
    (library,) = (tmp_path / "densenet-pipeline").glob("*.so")
    before = library.stat().st_ino
    cpp._compile(cpp.find_compiler(), tmp_path / "a.cpp", cpp.FLAGS, library)
    assert (library.stat().st_ino == before) == links


@pytest.mark.slow
def test_a_compiler_that_fails_is_named(tmp_path):
    script = "from pipeline.models import kernels; print(kernels.unavailable_reason())"
    environment = {
        "XDG_CACHE_HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "CXX": "false",
        "PYTHONPATH": str(REPOSITORY),
    }
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "false cannot compile dense_block.cpp: exit code 1\n"


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "densenet-pipeline").write_text("a file where the folder should be")
    script = "from pipeline.models import kernels; print(kernels.unavailable_reason())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"cannot write {tmp_path}/densenet-pipeline (File exists): set XDG_CACHE_HOME\n"


def test_without_a_home_directory_the_reason_is_one_line(monkeypatch):
    """As of a user without an entry, in a bare container."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(
        "pathlib.Path.expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home directory"))
    )
    assert "set XDG_CACHE_HOME" in cpp.reason_if_unavailable(lambda: cpp.load_cpp(kernels.SOURCES))


def test_kernels_compiled_for_another_cpu_are_not_loaded(monkeypatch):
    here = cpp.fingerprint("c++", kernels.SOURCES, kernels.FLAGS)
    assert cpp.fingerprint("c++", kernels.SOURCES, kernels.FLAGS) == here
    monkeypatch.setattr(cpp, "cpu", lambda: "model name: another\nflags: avx512f")
    assert cpp.fingerprint("c++", kernels.SOURCES, kernels.FLAGS) != here


@pytest.mark.parametrize(
    ("machine", "cpu", "granted", "flags"),
    [
        (
            "x86_64",
            "vendor_id: GenuineIntel\nflags: avx512_bf16 amx_bf16 amx_tile",
            True,
            ["-DMAY_USE_AMX", "-DSLOW_PAIRS"],
        ),
        ("x86_64", "vendor_id: GenuineIntel\nflags: avx512_bf16 amx_bf16 amx_tile", False, ["-DSLOW_PAIRS"]),
        ("x86_64", "vendor_id: AuthenticAMD\nflags: avx512_bf16", True, []),
        ("aarch64", "CPU implementer: 0x41", True, []),
    ],
    ids=["AMX", "AMX refused", "AMD", "ARM"],
)
def test_how_bfloat16_is_multiplied_follows_the_processor(machine, cpu, granted, flags, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(cpp, "cpu", lambda: cpu)
    monkeypatch.setattr(kernels, "_may_use_amx", lambda: granted)
    assert kernels.instruction_flags() == flags


@pytest.mark.slow
def test_an_assembler_older_than_its_compiler_costs_amx_alone(tmp_path, monkeypatch):
    """The compiler here fails where it may use AMX, in the words of GNU's assembler."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *MAY_USE_AMX*) echo "x.s:7: Error: no such instruction: \\`tilezero\'" >&2; exit 1;; esac\n'
        f'exec {cpp.find_compiler()} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "FLAGS", [*kernels.FLAGS, "-O0"])
    monkeypatch.setattr(kernels, "instruction_flags", lambda: ["-DMAY_USE_AMX"])
    assert kernels.load.__wrapped__()
    with pytest.raises(
        cpp.CppUnavailableError, match="cannot compile dense_block.cpp: x.s:7: Error: no such instruction"
    ):
        cpp.load_cpp(kernels.SOURCES, ["-DMAY_USE_AMX", *kernels.FLAGS])
