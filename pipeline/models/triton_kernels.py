"""The Triton kernels of triton_block.py. The formulas and names are those of kernels/ALGEBRA.md.

Triton's interpreter runs them on CPU, and Triton compiles them for compute capabilities 8.0, 9.0 and 10.0.

All activations are matrices [pixels][channels] in the dtype of the maps; a row starts every `ldx` elements, where a kernel
has an `ldx`, else every `channels`. Products add up in float32. Statistics, gamma and beta are float32.

No sum is made with atomics: each program writes its partial sums, and a second kernel adds those up in order, in float64
where they are statistics. So a step has the same bits each time.

A kernel is launched with one program for each tile; its docstring says which. BLOCK_P is a tile's pixels, BLOCK_C, BLOCK_N
and BLOCK_K its channels. Addresses are 64-bit where a pixel is a factor.
"""

import triton
import triton.language as tl

# Sizes whose divisibility is of no use to the compiler: a new value of them does not compile a kernel anew.
SIZES = ["pixels", "height", "width", "out_pixels", "out_height", "out_width", "pool_height", "pool_width", "tiles"]
jit = triton.jit(do_not_specialize=SIZES)


# Parts of kernels


@triton.jit
def _scale_and_shift(mean, variance, gamma, beta, eps, c, present):
    """Of a batch norm as x * scale + shift; both are 0 beyond the last channel."""
    inverse = tl.rsqrt(tl.load(variance + c, mask=present, other=1.0) + eps)
    scale = tl.load(gamma + c, mask=present, other=0.0) * inverse
    shift = tl.load(beta + c, mask=present, other=0.0) - tl.load(mean + c, mask=present, other=0.0) * scale
    return scale, shift


@triton.jit
def _relu(z):
    """max(z, 0), and NaN where z is: a network that is not finite must show it."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _factor(x, PRECISION: tl.constexpr):
    """x as a factor of a product. Tensor cores cut float32 off to TF32; rounding it to the nearest first leaves no bias."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # the bits of NaN may run over
    return x


@triton.jit
def _store_moments(partial, tile, values, inside, pixels, c, channels, ROWS: tl.constexpr):
    """The sum of a tile's rows that are inside, and of their squares about its own mean: partial [tile][2][channels].

    A tile has ROWS such rows, the last one fewer.
    """
    total = tl.sum(tl.where(inside[:, None], values, 0.0), 0)
    rows = tl.minimum(pixels - tile * ROWS, ROWS).to(tl.float32)
    centred = tl.where(inside[:, None], values - (total / rows)[None, :], 0.0)
    _store_two(partial, tile, total, tl.sum(centred * centred, 0), c, channels)


@triton.jit
def _sum_two(first, second):
    """Both sums over pixels; as one they wait for all warps once."""
    return tl.split(tl.sum(tl.join(first, second), 0))


@triton.jit
def _store_two(partial, tile, first, second, c, channels):
    tl.store(partial + 2 * tile * channels + c, first, mask=c < channels)
    tl.store(partial + (2 * tile + 1) * channels + c, second, mask=c < channels)


@triton.jit
def _add_up_two(partial, tiles, c, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums over all tiles of what `_store_two` wrote, in float64."""
    first, second = tl.zeros((BLOCK_C,), tl.float64), tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        present = (t < tiles)[:, None] & (c < channels)[None, :]
        at = partial + 2 * t[:, None] * channels + c[None, :]
        first += tl.sum(tl.load(at, mask=present, other=0.0).to(tl.float64), 0)
        second += tl.sum(tl.load(at + channels, mask=present, other=0.0).to(tl.float64), 0)
    return first, second


@triton.jit
def _store_norm_gradients(sum_dz, centred_sum, variance, eps, dgamma, dbeta, c, channels):
    inverse = tl.rsqrt(tl.load(variance + c, mask=c < channels, other=1.0) + eps)
    tl.store(dbeta + c, sum_dz.to(tl.float32), mask=c < channels)
    tl.store(dgamma + c, (centred_sum * inverse).to(tl.float32), mask=c < channels)
    return inverse


@triton.jit
def _store_map_gradient(da, x, z, mean, gamma, G, at, c, channels, inside):
    """G = gamma dz, with dz = da where z > 0; gives the tile's sums of dz and of dz (x - mean)."""
    dz = tl.where(inside & (z > 0), da, 0.0)
    gain = tl.load(gamma + c, mask=c < channels, other=0.0)[None, :]
    tl.store(G + at, (dz * gain).to(G.dtype.element_ty), mask=inside)
    return _sum_two(dz, dz * (x - tl.load(mean + c, mask=c < channels, other=0.0)[None, :]))


# Sums of partial sums. A program takes BLOCK_C channels, or BLOCK numbers.


@jit
def reduce_moments(
    partial, tiles, pixels, channels, mean, variance,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of each channel, from `_store_moments` of tiles of ROWS pixels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total, squares = tl.zeros((BLOCK_C,), tl.float64), tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        present = (t < tiles)[:, None] & (c < channels)[None, :]
        at = partial + 2 * t[:, None] * channels + c[None, :]
        own = tl.load(at, mask=present, other=0.0).to(tl.float64)
        rows = tl.maximum(tl.minimum(pixels - t * ROWS, ROWS), 1).to(tl.float64)
        total += tl.sum(own, 0)
        squares += tl.sum(tl.load(at + channels, mask=present, other=0.0).to(tl.float64) + own * own / rows[:, None], 0)
    mu = total / pixels
    tl.store(mean + c, mu.to(tl.float32), mask=c < channels)
    tl.store(variance + c, _relu(squares / pixels - mu * mu).to(tl.float32), mask=c < channels)


@jit
def reduce_shared_norm(
    partial, tiles, channels, variance, gamma, eps, dgamma, dbeta, map_sum, map_centred_sum,
    FIRST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of gamma and beta of one consumer of the maps, and S and Q of all consumers so far."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_dz, centred_sum = _add_up_two(partial, tiles, c, channels, BLOCK_T, BLOCK_C)
    _store_norm_gradients(sum_dz, centred_sum, variance, eps, dgamma, dbeta, c, channels)
    gain = tl.load(gamma + c, mask=c < channels, other=0.0)
    s, q = gain * sum_dz, gain * centred_sum
    if not FIRST:
        s += tl.load(map_sum + c, mask=c < channels, other=0.0)
        q += tl.load(map_centred_sum + c, mask=c < channels, other=0.0)
    tl.store(map_sum + c, s, mask=c < channels)
    tl.store(map_centred_sum + c, q, mask=c < channels)


@jit
def reduce_own_norm(
    partial, tiles, pixels, channels, mean, variance, gamma, eps, dgamma, dbeta, coefficients,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of gamma and beta of norm2, and its backward pass as coefficients [3][channels]: db = k0 dz + k1 b + k2."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_dz, centred_sum = _add_up_two(partial, tiles, c, channels, BLOCK_T, BLOCK_C)
    inverse = _store_norm_gradients(sum_dz, centred_sum, variance, eps, dgamma, dbeta, c, channels)
    k0 = tl.load(gamma + c, mask=c < channels, other=0.0) * inverse
    k1 = -k0 * inverse * inverse * (centred_sum / pixels)
    k2 = -k0 * (sum_dz / pixels) - k1 * tl.load(mean + c, mask=c < channels, other=0.0)
    tl.store(coefficients + c, k0, mask=c < channels)
    tl.store(coefficients + channels + c, k1.to(tl.float32), mask=c < channels)
    tl.store(coefficients + 2 * channels + c, k2.to(tl.float32), mask=c < channels)


@jit
def reduce_weights(partial, out, splits, numbers, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """out [numbers] = the sum over the first index of partial [splits][numbers], in float32; BLOCK_T of them at once."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        present = (t < splits)[:, None] & (i < numbers)[None, :]
        total += tl.sum(tl.load(partial + t[:, None] * numbers + i[None, :], mask=present, other=0.0), 0)
    tl.store(out + i, total, mask=i < numbers)


# Forward. A program takes BLOCK_P pixels (of the output) and BLOCK_C or BLOCK_N channels.


@jit
def copy_and_measure(
    x, out, ldout, partial, pixels, channels,
    COPY: tl.constexpr, MEASURE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x into the first columns of `out`, and its partial moments."""
    tile = tl.program_id(0)
    p, c = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, row = (p < pixels)[:, None] & (c < channels)[None, :], p[:, None].to(tl.int64)
    values = tl.load(x + row * channels + c[None, :], mask=inside, other=0.0)
    if COPY:
        tl.store(out + row * ldout + c[None, :], values, mask=inside)
    if MEASURE:
        _store_moments(partial, tile, values.to(tl.float32), p < pixels, pixels, c, channels, BLOCK_P)


@jit
def fold_norm(mean, variance, gamma, beta, eps, scale, shift, channels, BLOCK_C: tl.constexpr):
    """A batch norm as x * scale + shift, for kernels that loop over channels. A program takes BLOCK_C of them."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    gain, offset = _scale_and_shift(mean, variance, gamma, beta, eps, c, c < channels)
    tl.store(scale + c, gain, mask=c < channels)
    tl.store(shift + c, offset, mask=c < channels)


@jit
def bottleneck_forward(
    x, ldx, scale, shift, weight, out, partial, pixels, channels, features,
    MEASURE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [pixels][features] = relu(x scale + shift) weight', with weight [features][channels]; partial moments of out."""
    tile = tl.program_id(0)
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = x + p[:, None].to(tl.int64) * ldx
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, channels, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        gain = tl.load(scale + c, mask=c < channels, other=0.0)
        offset = tl.load(shift + c, mask=c < channels, other=0.0)
        v = tl.load(row + c[None, :], mask=(p < pixels)[:, None] & (c < channels)[None, :], other=0.0)
        a = _factor(_relu(v.to(tl.float32) * gain[None, :] + offset[None, :]).to(v.dtype), PRECISION)
        present = (n < features)[None, :] & (c < channels)[:, None]
        w = tl.load(weight + n[None, :] * channels + c[:, None], mask=present, other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
    b = total.to(out.dtype.element_ty)
    at = out + p[:, None].to(tl.int64) * features + n[None, :]
    tl.store(at, b, mask=(p < pixels)[:, None] & (n < features)[None, :])
    if MEASURE:
        _store_moments(partial, tile, b.to(tl.float32), p < pixels, pixels, n, features, BLOCK_P)


@jit
def norm_forward(
    b, mean, variance, gamma, beta, eps, out, pixels, channels,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = relu(norm(b)), as a factor of a product."""
    p, c = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, at = (p < pixels)[:, None] & (c < channels)[None, :], p[:, None].to(tl.int64) * channels + c[None, :]
    scale, shift = _scale_and_shift(mean, variance, gamma, beta, eps, c, c < channels)
    v = tl.load(b + at, mask=inside, other=0.0)
    a = _relu(v.to(tl.float32) * scale[None, :] + shift[None, :])
    tl.store(out + at, _factor(a.to(v.dtype), PRECISION), mask=inside)


@jit
def conv3x3_forward(
    d, weight, out, ldout, partial, pixels, height, width, channels, features,
    MEASURE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [pixels][features] = conv3x3(d), with weight [features][9][channels]; partial moments of out.

    d is loaded three times, not nine: the products with the three taps of a row of the 3x3 add up apart, and are shifted
    against each other in the end. So a tile's first and last pixel are there for their neighbours, and BLOCK_P - 2 are its
    own.
    """
    tile, own = tl.program_id(0), tl.arange(0, BLOCK_P)
    p, n = tile * (BLOCK_P - 2) - 1 + own, tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i, j = p // width % height, p % width
    left, middle = tl.zeros((BLOCK_P, BLOCK_N), tl.float32), tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    right = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for step in range(0, 3 * tl.cdiv(channels, BLOCK_K)):
        y, c = step % 3 - 1, step // 3 * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (p >= 0) & (p < pixels) & (i + y >= 0) & (i + y < height)
        at = d + (p + y * width)[:, None].to(tl.int64) * channels + c[None, :]
        row = tl.load(at, mask=inside[:, None] & (c < channels)[None, :], other=0.0)
        at = weight + (n[None, :] * 9 + (y + 1) * 3) * channels + c[:, None]
        present = (n < features)[None, :] & (c < channels)[:, None]
        left = tl.dot(row, tl.load(at, mask=present, other=0.0), left, input_precision=PRECISION)
        middle = tl.dot(row, tl.load(at + channels, mask=present, other=0.0), middle, input_precision=PRECISION)
        right = tl.dot(row, tl.load(at + 2 * channels, mask=present, other=0.0), right, input_precision=PRECISION)
    before = tl.broadcast_to(tl.maximum(own - 1, 0)[:, None], (BLOCK_P, BLOCK_N))
    behind = tl.broadcast_to(tl.minimum(own + 1, BLOCK_P - 1)[:, None], (BLOCK_P, BLOCK_N))
    total = middle + tl.where((j >= 1)[:, None], tl.gather(left, before, 0), 0.0)
    total += tl.where((j + 1 < width)[:, None], tl.gather(right, behind, 0), 0.0)
    new, whole = total.to(out.dtype.element_ty), (own >= 1) & (own < BLOCK_P - 1) & (p < pixels)
    at = out + p[:, None].to(tl.int64) * ldout + n[None, :]
    tl.store(at, new, mask=whole[:, None] & (n < features)[None, :])
    if MEASURE:
        _store_moments(partial, tile, new.to(tl.float32), whole, pixels, n, features, BLOCK_P - 2)


@jit
def pool_forward(
    x, ldx, mean, variance, gamma, beta, eps, out, out_pixels, height, width, out_height, out_width,
    pool_height, pool_width, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Norm, ReLU and average pooling; what is left of an odd side is left out."""
    o, c = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (o < out_pixels)[:, None] & (c < channels)[None, :]
    scale, shift = _scale_and_shift(mean, variance, gamma, beta, eps, c, c < channels)
    image, i, j = o // (out_height * out_width), o // out_width % out_height, o % out_width
    corner = (image * height + i * pool_height) * width + j * pool_width
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for k in range(0, pool_height * pool_width):
        p = (corner + k // pool_width * width + k % pool_width)[:, None].to(tl.int64)
        v = tl.load(x + p * ldx + c[None, :], mask=inside, other=0.0).to(tl.float32)
        total += _relu(v * scale[None, :] + shift[None, :])
    total = (total / (pool_height * pool_width)).to(out.dtype.element_ty)
    tl.store(out + o[:, None].to(tl.int64) * channels + c[None, :], total, mask=inside)


@jit
def stem_forward(
    y, mean, variance, gamma, beta, eps, out, argmax, out_pixels, height, width, out_height, out_width, channels,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Norm, ReLU and 3x3 max pooling of stride 2; argmax (uint8) says which of the nine pixels is the largest."""
    o, c = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = (o < out_pixels)[:, None] & (c < channels)[None, :]
    scale, shift = _scale_and_shift(mean, variance, gamma, beta, eps, c, c < channels)
    best, winner = tl.full((BLOCK_P, BLOCK_C), -1.0, tl.float32), tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    image, row, column = o // (out_height * out_width), o // out_width % out_height, o % out_width
    for tap in range(9):
        i, j = row * 2 - 1 + tap // 3, column * 2 - 1 + tap % 3
        inside = present & ((i >= 0) & (i < height) & (j >= 0) & (j < width))[:, None]
        p = ((image * height + i) * width + j)[:, None].to(tl.int64)
        v = tl.load(y + p * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
        a = _relu(v * scale[None, :] + shift[None, :])
        a = tl.where(inside, a, -1.0)
        winner = tl.where((a > best) | (a != a), tap, winner)
        best = tl.maximum(a, best, propagate_nan=tl.PropagateNan.ALL)
    at = o[:, None].to(tl.int64) * channels + c[None, :]
    tl.store(out + at, best.to(out.dtype.element_ty), mask=present)
    tl.store(argmax + at, winner.to(tl.uint8), mask=present)


# Backward. A program takes BLOCK_P pixels and BLOCK_C or BLOCK_N channels, unless its docstring says otherwise.


@jit
def finish_gradient(
    G, x, ldx, mean, variance, eps, map_sum, map_centred_sum, out, ldout, pixels, channels,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of maps whose consumers are all done; `out` may be G. PRECISION is None where it is no factor."""
    p, c = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = c < channels
    inside, row = (p < pixels)[:, None] & present[None, :], p[:, None].to(tl.int64)
    inverse = tl.rsqrt(tl.load(variance + c, mask=present, other=1.0) + eps)
    s = (tl.load(map_sum + c, mask=present, other=0.0) / pixels).to(tl.float32) * inverse
    q = (tl.load(map_centred_sum + c, mask=present, other=0.0) / pixels).to(tl.float32) * inverse * inverse * inverse
    g = tl.load(G + row * ldx + c[None, :], mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + row * ldx + c[None, :], mask=inside, other=0.0).to(tl.float32)
    centred = v - tl.load(mean + c, mask=present, other=0.0)[None, :]
    dx = g * inverse[None, :] - s[None, :] - centred * q[None, :]
    tl.store(out + row * ldout + c[None, :], _factor(dx.to(out.dtype.element_ty), PRECISION), mask=inside)


@jit
def pool_backward(
    x, ldx, mean, variance, gamma, beta, eps, gradient, G, partial, pixels, height, width, out_height, out_width,
    pool_height, pool_width, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """G = the gradient of the maps through the norm behind the block, and its partial sums."""
    tile = tl.program_id(0)
    p, c = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i, j = p // width % height // pool_height, p % width // pool_width
    inside, at = (p < pixels)[:, None] & (c < channels)[None, :], p[:, None].to(tl.int64) * ldx + c[None, :]
    scale, shift = _scale_and_shift(mean, variance, gamma, beta, eps, c, c < channels)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    o = ((p // (height * width) * out_height + i) * out_width + j)[:, None].to(tl.int64) * channels + c[None, :]
    pooled = inside & ((i < out_height) & (j < out_width))[:, None]
    da = tl.load(gradient + o, mask=pooled, other=0.0).to(tl.float32) / (pool_height * pool_width)
    z = v * scale[None, :] + shift[None, :]
    s, q = _store_map_gradient(da, v, z, mean, gamma, G, at, c, channels, inside)
    _store_two(partial, tile, s, q, c, channels)


@jit
def stem_backward(
    y, mean, variance, gamma, beta, eps, gradient, argmax, G, partial, pixels, height, width, out_height, out_width,
    channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """G = gamma dz of the stem's norm, and its partial sums. A pixel lies in up to four windows of the pooling."""
    tile = tl.program_id(0)
    p, c = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, at = (p < pixels)[:, None] & (c < channels)[None, :], p[:, None].to(tl.int64) * channels + c[None, :]
    image, row, column = p // (height * width), p // width % height, p % width
    da = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for corner in range(4):
        o_i, o_j = (row + 1) // 2 - corner // 2, (column + 1) // 2 - corner % 2
        tap_i, tap_j = row + 1 - 2 * o_i, column + 1 - 2 * o_j  # the pixel's place in that window
        window = (o_i >= 0) & (o_i < out_height) & (tap_i < 3) & (o_j >= 0) & (o_j < out_width) & (tap_j < 3)
        o = ((image * out_height + o_i) * out_width + o_j)[:, None].to(tl.int64) * channels + c[None, :]
        won = tl.load(argmax + o, mask=inside & window[:, None], other=255) == (tap_i * 3 + tap_j)[:, None]
        da += tl.load(gradient + o, mask=won, other=0.0).to(tl.float32)
    scale, shift = _scale_and_shift(mean, variance, gamma, beta, eps, c, c < channels)
    v = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    z = v * scale[None, :] + shift[None, :]
    s, q = _store_map_gradient(da, v, z, mean, gamma, G, at, c, channels, inside)
    _store_two(partial, tile, s, q, c, channels)


@jit
def conv3x3_backward_data(
    gradient, weight, b, mean, variance, gamma, beta, eps, dz, partial, pixels, height, width, channels, features,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz [pixels][channels] = the gradient of norm2(b), and its partial sums; gradient [pixels][features]."""
    tile = tl.program_id(0)
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i, j = p // width % height, p % width
    own, here = (p < pixels)[:, None] & (n < channels)[None, :], p[:, None].to(tl.int64) * channels + n[None, :]
    v = tl.load(b + here, mask=own, other=0.0)  # before the products, for which it need not wait
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        for tap in range(9):
            y, x = 1 - tap // 3, 1 - tap % 3
            inside = (p < pixels) & (i + y >= 0) & (i + y < height) & (j + x >= 0) & (j + x < width)
            at = gradient + (p + y * width + x)[:, None].to(tl.int64) * features + k[None, :]
            g = tl.load(at, mask=inside[:, None] & (k < features)[None, :], other=0.0)
            at = weight + (k[:, None] * 9 + tap) * channels + n[None, :]
            w = tl.load(at, mask=(n < channels)[None, :] & (k < features)[:, None], other=0.0)
            total = tl.dot(g, w, total, input_precision=PRECISION)
    scale, shift = _scale_and_shift(mean, variance, gamma, beta, eps, n, n < channels)
    centre = tl.load(mean + n, mask=n < channels, other=0.0)
    v = v.to(tl.float32)
    rounded = tl.where(v * scale[None, :] + shift[None, :] > 0, total, 0.0).to(dz.dtype.element_ty)
    tl.store(dz + here, rounded, mask=own)
    s, q = _sum_two(rounded.to(tl.float32), rounded.to(tl.float32) * (v - centre[None, :]))
    _store_two(partial, tile, s, q, n, channels)


@jit
def conv3x3_backward_data_persistent(
    gradient, weight, b, mean, variance, gamma, beta, eps, dz, partial, pixels, height, width, channels, features,
    tiles, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As conv3x3_backward_data, for features that fit BLOCK_K.

    A program takes a range of `tiles` tiles; its weights stay in shared memory. Sums are kept for each pixel of a tile, and
    added up in the end: so the warps do not wait for each other.
    """
    n, part, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1), tl.arange(0, BLOCK_K)
    present, w = (n < channels)[None, :], ()
    for tap in tl.static_range(9):
        taps = weight + (k[:, None] * 9 + tap) * channels + n[None, :]
        w += (tl.load(taps, mask=present & (k < features)[:, None], other=0.0),)  # type: ignore[assignment]
    scale, shift = _scale_and_shift(mean, variance, gamma, beta, eps, n, n < channels)
    centre = tl.load(mean + n, mask=n < channels, other=0.0)
    s, q = tl.zeros((BLOCK_P, BLOCK_N), tl.float32), tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    own = tl.arange(0, BLOCK_P)
    at, near = own[:, None] * channels + n[None, :], own[:, None] * features + k[None, :]
    for t in tl.range(0, tiles, num_stages=STAGES):  # so that b is loaded ahead, too, though no product takes it
        start = (part * tiles + t) * BLOCK_P
        p, row = start + own, start.to(tl.int64)
        i, j = p // width % height, p % width
        total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        for tap in tl.static_range(9):
            y, x = 1 - tap // 3, 1 - tap % 3
            inside = (p < pixels) & (i + y >= 0) & (i + y < height) & (j + x >= 0) & (j + x < width)
            mask = inside[:, None] & (k < features)[None, :]
            g = tl.load(gradient + (row + y * width + x) * features + near, mask=mask, other=0.0)
            total = tl.dot(g, w[tap], total, input_precision=PRECISION)
        inside = (p < pixels)[:, None] & present
        v = tl.load(b + row * channels + at, mask=inside, other=0.0).to(tl.float32)
        rounded = tl.where(v * scale[None, :] + shift[None, :] > 0, total, 0.0).to(dz.dtype.element_ty)
        tl.store(dz + row * channels + at, rounded, mask=inside)
        s += rounded.to(tl.float32)
        q += rounded.to(tl.float32) * (v - centre[None, :])
    sum_dz, centred_sum = _sum_two(s, q)
    _store_two(partial, part, sum_dz, centred_sum, n, channels)


@jit
def conv3x3_backward_weights(
    b, mean, variance, gamma, beta, eps, gradient, partial, pixels, height, width, channels, features, tiles,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial [range][features][9][channels]: the weight's gradient from one range of pixels.

    A program takes a range of `tiles` tiles, BLOCK_N features with the three taps of a row of the 3x3, and BLOCK_C
    channels. The matrix that it shifts is the gradient, which is narrow; so norm and ReLU are computed 3 times, not 9.
    """
    y, part = tl.program_id(0) % 3 - 1, tl.program_id(1)
    c, n = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(0) // 3 * BLOCK_N + tl.arange(0, BLOCK_N)
    scale, shift = _scale_and_shift(mean, variance, gamma, beta, eps, c, c < channels)
    left, middle = tl.zeros((BLOCK_C, BLOCK_N), tl.float32), tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    right = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    present = (n < features)[None, :]
    for t in range(0, tiles):
        p = (part * tiles + t) * BLOCK_P + tl.arange(0, BLOCK_P)
        i, j = p // width % height - y, p % width
        inside = (p < pixels)[:, None] & (c < channels)[None, :]
        v = tl.load(b + p[:, None].to(tl.int64) * channels + c[None, :], mask=inside, other=0.0)
        d = tl.trans(_factor(_relu(v.to(tl.float32) * scale[None, :] + shift[None, :]).to(v.dtype), PRECISION))
        at, rows = (
            gradient + (p - y * width)[:, None].to(tl.int64) * features + n[None, :],
            (p < pixels) & (i >= 0) & (i < height),
        )
        g = tl.load(at + features, mask=(rows & (j + 1 < width))[:, None] & present, other=0.0)
        left = tl.dot(d, g, left, input_precision=PRECISION)
        g = tl.load(at, mask=rows[:, None] & present, other=0.0)
        middle = tl.dot(d, g, middle, input_precision=PRECISION)
        g = tl.load(at - features, mask=(rows & (j >= 1))[:, None] & present, other=0.0)
        right = tl.dot(d, g, right, input_precision=PRECISION)
    out = partial + ((part * features + n[None, :]) * 9 + (y + 1) * 3) * channels + c[:, None]
    inside = (c < channels)[:, None] & present
    tl.store(out, left, mask=inside)
    tl.store(out + channels, middle, mask=inside)
    tl.store(out + 2 * channels, right, mask=inside)


@jit
def norm_backward(
    dz, b, coefficients, pixels, channels, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """db = k0 dz + k1 b + k2, as a factor of a product; it takes the place of dz."""
    p, c = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, at = (p < pixels)[:, None] & (c < channels)[None, :], p[:, None].to(tl.int64) * channels + c[None, :]
    k0 = tl.load(coefficients + c, mask=c < channels, other=0.0)[None, :]
    k1 = tl.load(coefficients + channels + c, mask=c < channels, other=0.0)[None, :]
    k2 = tl.load(coefficients + 2 * channels + c, mask=c < channels, other=0.0)[None, :]
    db = tl.load(dz + at, mask=inside, other=0.0).to(tl.float32) * k0 + k2
    db += tl.load(b + at, mask=inside, other=0.0).to(tl.float32) * k1
    tl.store(dz + at, _factor(db.to(dz.dtype.element_ty), PRECISION), mask=inside)


@jit
def bottleneck_backward(
    db, x, G, ldx, mean, variance, gamma, beta, eps, weight, weight_partial, partial, pixels, channels, features, first,
    tiles, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Through the 1x1 convolution and norm1, for the bottleneck's features `first` to `first` + BLOCK_N.

    da = db weight; G += gamma dz1 and its partial sums; weight_partial [range][features][channels] = db' a. All but the
    weight's gradient add up over launches with other features, as the mask of the ReLU is the same.

    A program takes a range of `tiles` tiles, and BLOCK_C channels. Programs with the same range are neighbours, so that db
    comes from the cache. Sums are kept for each pixel of a tile, and added up in the end: so the warps do not wait for each
    other.
    """
    c, part, n = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1), first + tl.arange(0, BLOCK_N)
    channel, feature = (c < channels)[None, :], (n < features)[None, :]
    scale, shift = _scale_and_shift(mean, variance, gamma, beta, eps, c, c < channels)
    gain = tl.load(gamma + c, mask=c < channels, other=0.0)[None, :]
    centre = tl.load(mean + c, mask=c < channels, other=0.0)[None, :]
    w = tl.load(weight + n[:, None] * channels + c[None, :], mask=(n < features)[:, None] & channel, other=0.0)
    total, s = tl.zeros((BLOCK_N, BLOCK_C), tl.float32), tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    q = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    own = tl.arange(0, BLOCK_P)
    at, db_at = own[:, None] * ldx + c[None, :], own[:, None] * features + n[None, :]
    for t in tl.range(0, tiles, num_stages=STAGES):  # so that G is loaded ahead, too, though no product takes it
        start = (part * tiles + t) * BLOCK_P
        pixel, row = (own < pixels - start)[:, None], start.to(tl.int64)
        factor = tl.load(db + row * features + db_at, mask=pixel & feature, other=0.0)
        v = tl.load(x + row * ldx + at, mask=pixel & channel, other=0.0).to(tl.float32)
        g = tl.load(G + row * ldx + at, mask=pixel & channel, other=0.0).to(tl.float32)
        da = tl.dot(factor, w, input_precision=PRECISION)  # 0 where there is no pixel or channel
        z = v * scale[None, :] + shift[None, :]
        dz1 = tl.where(z > 0, da, 0.0)
        tl.store(G + row * ldx + at, (dz1 * gain + g).to(G.dtype.element_ty), mask=pixel & channel)
        s += dz1
        q += dz1 * (v - centre)
        a = _factor(_relu(z).to(w.dtype), PRECISION)
        total = tl.dot(tl.trans(factor), a, total, input_precision=PRECISION)
    at = weight_partial + (part * features + n)[:, None] * channels + c[None, :]
    tl.store(at, total, mask=(n < features)[:, None] & channel)
    sum_dz, centred_sum = _sum_two(s, q)
    _store_two(partial, part, sum_dz, centred_sum, c, channels)
