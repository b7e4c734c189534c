// The kernels of a dense block and of what stands around it, for CPUs: batch norm and ReLU within the convolutions.
//
// Activations are channels-last, [pixels][channels], the pixels those of all images. A block keeps its input and all
// its new maps in one matrix x [pixels][ldx]; a layer reads the first columns and writes the next ones. ALGEBRA.md
// beside this file has the formulas. Every kernel exists for maps in float, double and bfloat16 (S) and computes in float
// or double (T): statistics, parameters and their gradients are in T, sums over pixels in double. Leading dimensions `ld`
// count elements. Intermediate matrices (a bottleneck's output, gradients of new maps) have rows of whole vectors.

#include <cmath>
#include <type_traits>

#include "parallel.h"
#include "winograd.h"

namespace dense {

constexpr long TILE_BYTES = 160 * 1024;  // of activations that a thread has in its cache at once

// Pixels that a thread works on at once: whole register tiles, within a share of the cache.
template <class T, class S> long tile_rows(long channels) {
  constexpr long MR = dense::MR<Operand<S>>;
  return std::clamp<long>(TILE_BYTES / (channels * sizeof(T)) / MR * MR, round_up(24, MR), 192);
}

// A batch norm: statistics (of the batch, or the running ones) and parameters, one of each a channel.
template <class T> struct BatchNorm {
  const T *mean, *variance, *gamma, *beta;
  double epsilon;
};

// z = x * scale + shift, filled up with zeros to whole vectors.
template <class T> struct Affine {
  Padded<T> scale, shift;

  Affine(const BatchNorm<T>& norm, long channels) : scale(channels), shift(channels) {
    for (long c = 0; c < channels; c++) {
      scale[c] = norm.gamma[c] / std::sqrt(norm.variance[c] + T(norm.epsilon));
      shift[c] = norm.beta[c] - norm.mean[c] * scale[c];
    }
  }

  Vector<T> operator()(long c, Vector<T> x) const { return at(c)(x); }

  // For one vector of channels, with its coefficients in registers.
  auto at(long c) const {
    return [scale = load(scale + c), shift = load(shift + c)](Vector<T> x) -> Vector<T> { return x * scale + shift; };
  }
};

// dx = gain * dz - offset - (x - mean) * slope: what batch statistics make of a gradient, given its sums over pixels,
// sum dz and sum dz (x - mean). Without gamma (null), which the sums then contain: see ALGEBRA.md.
template <class T> struct NormBackward {
  Padded<T> gain, offset, slope, mean;

  NormBackward(const BatchNorm<T>& norm, const double* sum, const double* centred_sum, long pixels, long channels)
      : gain(channels), offset(channels), slope(channels), mean(norm.mean, channels) {
    for (long c = 0; c < channels; c++) {
      const double inverse = 1 / std::sqrt(double(norm.variance[c]) + norm.epsilon);
      const double factor = norm.gamma ? norm.gamma[c] * inverse : inverse;
      gain[c] = factor;
      offset[c] = factor * sum[c] / pixels;
      slope[c] = factor * inverse * inverse * centred_sum[c] / pixels;
    }
  }

  Vector<T> operator()(long c, Vector<T> dz, Vector<T> x) const { return at(c)(dz, x); }

  // For one vector of channels, with its coefficients in registers.
  auto at(long c) const {
    return [gain = load(gain + c), offset = load(offset + c), slope = load(slope + c), mean = load(mean + c)](
               Vector<T> dz, Vector<T> x) -> Vector<T> { return gain * dz - offset - (x - mean) * slope; };
  }
};

// Gradients of gamma and beta from the sums over pixels.
template <class T>
void parameter_gradients(const BatchNorm<T>& norm, const double* sum, const double* centred_sum, long channels,
                         T* dgamma, T* dbeta) {
  for (long c = 0; c < channels; c++) {
    dgamma[c] = centred_sum[c] / std::sqrt(double(norm.variance[c]) + norm.epsilon);
    dbeta[c] = sum[c];
  }
}

// Gradients of gamma and beta, and this norm's part in the sums of G over its maps.
template <class T>
void parameter_gradients(const BatchNorm<T>& norm, const std::vector<BackwardSums<T>>& parts, long channels, T* dgamma,
                         T* dbeta, double* map_sum, double* map_centred_sum) {
  std::vector<double> sum(channels), centred_sum(channels);
  write_sums(parts, channels, sum.data(), centred_sum.data());
  parameter_gradients(norm, sum.data(), centred_sum.data(), channels, dgamma, dbeta);
  for (long c = 0; c < channels; c++) {
    map_sum[c] += norm.gamma[c] * sum[c];
    map_centred_sum[c] += norm.gamma[c] * centred_sum[c];
  }
}

// out[:, :channels] = x [pixels][channels], with the mean and variance of each channel; either may be null.
template <class T, class S>
void copy_and_measure(long threads, const S* x, long pixels, long channels, S* out, long ldout, T* mean, T* variance) {
  std::vector<Moments<T>> moments(threads, Moments<T>(channels));
  parallel(threads, [&](int thread, int all) {
    const Range range = share(pixels, thread, all);
    for (long begin = range.begin; begin < range.end; begin += 128) {
      const long rows = std::min<long>(128, range.end - begin);
      for (long r = begin; out && r < begin + rows; r++) copy(x + r * channels, channels, out + r * ldout);
      if (mean) moments[thread].add(x + begin * channels, channels, rows);
    }
  });
  if (mean) write_moments(moments, mean, variance);
}

// b [pixels][padded width] = relu(norm(x[:, :channels])) weight', with the mean and variance of its columns, before they
// are rounded to S, if mean is not null. weight: [width][channels].
template <class T, class S>
void bottleneck_forward(long threads, const S* x, long ldx, long pixels, long channels, const BatchNorm<T>* norm,
                        const T* weight, long width, S* b, T* mean, T* variance) {
  constexpr bool ROUNDED = !std::is_same_v<S, T>;
  const long ldb = padded<T>(width), lda = padded<T>(channels) + VECTOR_BYTES / sizeof(Element<S>);
  const long depth = operands<S>(channels), tile = tile_rows<T, S>(channels);
  const long whole = channels / (2 * LANES<T>) * 2 * LANES<T>;  // channels in whole pairs of vectors
  const Affine<T> normalise(*norm, channels);
  Buffer<Operand<S>> panels(depth * ldb);
  std::vector<Moments<T>> moments(threads, Moments<T>(width));
  PerThread<Buffer<Element<S>>> activations(threads, tile * lda);
  PerThread<Buffer<T>> products(threads, ROUNDED ? tile * ldb : 0);
  parallel(threads, [&](int thread, int all) {
    const Range packed = share(depth, thread, all), range = share(pixels, thread, all);
    pack<S>(channels, width, NR, packed.begin, packed.end, panels,
            [&](long c, long k) { return weight[k * channels + c]; });
    wait_for_all_threads();
    Element<S>* a = activations[thread];
    for (long begin = range.begin; begin < range.end; begin += tile) {
      const long rows = std::min(tile, range.end - begin);
      for (long r = 0; r < rows; r++) {
        const S* pixel = x + (begin + r) * ldx;
        store_all(a + r * lda, whole, [&](long c) { return relu<T>(normalise(c, load(pixel + c))); });
        store_all(a + r * lda + whole, padded<T>(channels) - whole,
                  [&](long c) { return relu<T>(normalise(whole + c, load(pixel + whole + c, channels - whole - c))); });
      }
      Prefetch ahead(x + (begin + tile) * ldx, std::min(tile, range.end - begin - tile), channels, ldx);
      ahead.over(register_tiles<T, Operand<S>>(rows, width));
      T* c;
      if constexpr (ROUNDED) c = products[thread];
      else c = b + begin * ldb;
      multiply(rows, width, depth, as_operands<S>(a), lda / PER_OPERAND<S>, panels + 0, c, ldb, ahead);
      if (mean) moments[thread].add(c, ldb, rows);
      if constexpr (ROUNDED) store_all(b + begin * ldb, rows * ldb, [&](long i) { return load(c + i); });
    }
  });
  if (mean) write_moments(moments, mean, variance);
}

// The way back from dz, the gradient of norm2(b), to the layer's input: adds gamma1 dz1 to g[:, :channels]. sum2 and
// centred_sum2 are those of dz; map_sum and map_centred_sum take in those of g.
template <class T, class S>
void bottleneck_backward(long threads, const S* dz, const S* b, long pixels, long width, const BatchNorm<T>* norm2,
                         const double* sum2, const double* centred_sum2, T* dgamma2, T* dbeta2, const S* x, S* g,
                         long ldx, long channels, const BatchNorm<T>* norm1, const T* weight, T* dweight, T* dgamma1,
                         T* dbeta1, double* map_sum, double* map_centred_sum) {
  constexpr long P = PER_OPERAND<S>, MR = dense::MR<Operand<S>>, MR_TRANSPOSED = dense::MR_TRANSPOSED<Operand<S>>;
  constexpr long VECTORS = IN_PAIRS<S> ? NR : NR_TRANSPOSED<Operand<S>>, PANEL = VECTORS * LANES<T>;
  constexpr long TILE = round_up(144, MR * P);
  const long ldb = padded<T>(width), columns = padded<T>(channels), width_rows = round_up(width, MR_TRANSPOSED);
  const long depth = operands<S>(width), db_size = TILE * std::max(ldb, width_rows);
  const NormBackward<T> norm_backward(*norm2, sum2, centred_sum2, pixels, width);
  parameter_gradients(*norm2, sum2, centred_sum2, width, dgamma2, dbeta2);
  const Affine<T> normalise(*norm1, channels);
  const Padded<T> gamma(norm1->gamma, channels), mean(norm1->mean, channels);
  Buffer<Operand<S>> panels(depth * columns);
  Buffer<T> dweights(threads * width_rows * columns);
  std::vector<BackwardSums<T>> sums(threads, BackwardSums<T>(channels));
  PerThread<Buffer<Element<S>>> db_of(threads, db_size);
  // For dweight, whose sum is over pixels: db with two pixels in a pair, and a.
  PerThread<Buffer<Operand<S>>> db_pairs_of(threads, IN_PAIRS<S> ? db_size / 2 : 0), a_of(threads, TILE / P * PANEL);
  PerThread<Buffer<Operand<S>>> left_of(threads, left_size<Operand<S>>(TILE / P, width));
  PerThread<Buffer<T>> da_of(threads, TILE * PANEL);
  parallel(threads, [&](int thread, int all) {
    const Range packed = share(depth, thread, all), reduced = share(width, thread, all);
    const Range range = share(pixels, thread, all);
    pack<S>(width, channels, VECTORS, packed.begin, packed.end, panels,
            [&](long k, long c) { return weight[k * channels + c]; });
    T* dw = dweights + thread * width_rows * columns;
    std::fill_n(dw, width_rows * columns, T(0));
    wait_for_all_threads();
    Element<S>* db = db_of[thread];
    Operand<S>*db_pairs = db_pairs_of[thread], *a = a_of[thread];
    T* da = da_of[thread];
    for (long begin = range.begin; begin < range.end; begin += TILE) {
      const long rows = std::min(TILE, range.end - begin);
      for (long r = 0; r < rows; r += P)
        for (long k = 0; k < ldb; k += LANES<T>) {
          const auto backward = norm_backward.at(k);
          const auto write = [&](long r) {
            const long i = (begin + r) * ldb + k;
            const Vector<T> v = backward(load(dz + i, width - k), load(b + i, width - k));
            store(db + r * ldb + k, v);
            return v;
          };
          const Vector<T> first = write(r);
          if constexpr (IN_PAIRS<S>)
            store<Pair>(db_pairs + r / 2 * ldb + k, as_pairs(first, r + 1 < rows ? write(r + 1) : Vector<T>{}));
        }
      const Left<Operand<S>> db_left =
          left(operands<S>(rows), width, IN_PAIRS<S> ? db_pairs : as_operands<S>(db), ldb, left_of[thread] + 0);
      for (long j = 0; j < channels; j += PANEL) {
        const long panel = std::min(PANEL, columns - j);
        // While this panel is worked on, the next one's columns of x and g come, or the next tile's.
        const bool last = j + PANEL >= channels;
        const long next = last ? (begin + TILE) * ldx : begin * ldx + j + PANEL;
        const long coming = last ? std::min(TILE, range.end - begin - TILE) : rows;
        Prefetch x_ahead(x + next, coming, PANEL, ldx), g_ahead(g + next, coming, PANEL, ldx);
        x_ahead.over(TILE / MR);
        g_ahead.over(register_tiles_transposed<T, Operand<S>>(width, panel));
        multiply_panel(rows, panel / LANES<T>, depth, as_operands<S>(db), ldb / P, panels + j * depth, da, panel, x_ahead);
        for (long c = 0; c < panel; c += LANES<T>) {
          const auto norm = normalise.at(j + c);
          const Vector<T> gain = load(gamma + j + c), centre = load(mean + j + c);
          Vector<T> sum = {}, centred_sum = {};
          const long ld = ldx;  // of this scope, as stores to memory cannot change it
          const S* x_column = x + begin * ld + j + c;
          S* g_column = g + begin * ld + j + c;
          const T* da_column = da + c;
          const auto activation = [&](long r) {
            const Vector<T> value = load(x_column + r * ld), z = norm(value);
            const Vector<T> dz1 = relu_backward<T>(z, load(da_column + r * panel));
            store(g_column + r * ld, load(g_column + r * ld) + gain * dz1);
            sum += dz1;
            centred_sum += dz1 * (value - centre);
            return relu<T>(z);
          };
          for (long r = 0; r < rows; r += P) {
            const Vector<T> first = activation(r);
            if constexpr (IN_PAIRS<S>)
              store<Pair>(a + r / 2 * panel + c, as_pairs(first, r + 1 < rows ? activation(r + 1) : Vector<T>{}));
            else
              store(a + r * panel + c, first);
          }
          sums[thread].add(j + c, sum, centred_sum);
        }
        multiply_transposed(width, panel, operands<S>(rows), db_left, a, panel, dw + j * width_rows, panel, g_ahead);
      }
    }
    wait_for_all_threads();
    for (long k = reduced.begin; k < reduced.end; k++)
      for (long j = 0; j < channels; j += PANEL) {
        const long panel = std::min(PANEL, columns - j);
        for (long c = j; c < std::min(j + panel, channels); c++) {
          T sum = 0;
          for (int t = 0; t < all; t++) sum += dweights[(t * columns + j) * width_rows + k * panel + c - j];
          dweight[k * channels + c] = sum;
        }
      }
  });
  parameter_gradients(*norm1, sums, channels, dgamma1, dbeta1, map_sum, map_centred_sum);
}

// Rows of pixels relu(norm(b)), [width][padded channels], filled up with zeros.
template <class T, class S> struct NormalisedRow {
  const S* b;
  long width, channels;
  const Affine<T>& normalise;

  void operator()(long row, T* out) const {
    const long ld = padded<T>(channels);
    const S* in = b + row * width * ld;
    for (long i = 0; i < width * ld; i += ld)
      for (long c = 0; c < ld; c += LANES<T>) store(out + i + c, relu<T>(normalise(c, load(in + i + c, channels - c))));
  }
};

// The pixels of rows [begin, end) of tiles.
template <class S> Prefetch pixels_of(const Tiles& tiles, long begin, long end, const S* b, long ldb) {
  const long length = tiles.width * ldb;
  return Prefetch(b + tiles.pixel_row(begin) * length, 2 * (end - begin), length, length);
}

// out[:, :growth] = the 3x3 convolution of relu(norm(b)), with the mean and variance of its columns, before they are
// rounded to S, if mean is not null. weight: [3][3][channels][growth].
template <class T, class S>
void conv3x3_forward(long threads, const S* b, long images, long height, long width, long channels,
                     const BatchNorm<T>* norm, const T* weight, long growth, S* out, long ldout, T* mean, T* variance) {
  const Tiles tiles{images, height, width};
  const long ldb = padded<T>(channels), ldg = padded<T>(growth), depth = operands<S>(channels);
  const Affine<T> normalise(*norm, channels);
  Buffer<Operand<S>> weights(FREQUENCIES * depth * ldg);
  std::vector<Moments<T>> moments(threads, Moments<T>(growth));
  PerThread<ConvolveScratch<T, S>> scratch(threads, tiles, channels, growth);
  parallel(threads, [&](int thread, int all) {
    const Range packed = share(depth, thread, all), range = share(tiles.rows(), thread, all);
    transform_weights<T, S>(weight, false, channels, growth, packed.begin, packed.end, weights);
    wait_for_all_threads();
    convolve<T, S>(
        tiles, range, channels, growth, weights, scratch[thread], NormalisedRow<T, S>{b, width, channels, normalise},
        [&](long row, const T* values) {
          for (long x = 0; x < width; x++)
            for (long c = 0; c < growth; c += LANES<T>)
              store(out + (row * width + x) * ldout + c, load(values + x * ldg + c), growth - c);
          if (mean) moments[thread].add(values, ldg, width);
        },
        [&](long begin, long end) { return pixels_of(tiles, end, std::min(2 * end - begin, range.end), b, ldb); });
  });
  if (mean) write_moments(moments, mean, variance);
}

// The way back through the 3x3 convolution and the ReLU before it: dweight, and the masked gradient dz of norm(b) with
// its sums over pixels. gradient: [pixels][padded growth]; weight: [3][3][growth][channels]; dweight:
// [3][3][channels][growth].
template <class T, class S>
void conv3x3_backward(long threads, const S* b, long images, long height, long width, long channels,
                      const BatchNorm<T>* norm, const T* weight, long growth, const S* gradient, S* dz, T* dweight,
                      double* sum, double* centred_sum) {
  const Tiles tiles{images, height, width};
  const long ldb = padded<T>(channels), ldg = padded<T>(growth), depth = operands<S>(growth);
  const long matrix = round_up(growth, MR_TRANSPOSED<Operand<S>>) * ldb;  // of a frequency: dweight, transposed
  const Affine<T> normalise(*norm, channels);
  const Padded<T> mean(norm->mean, channels);
  Buffer<Operand<S>> weights(FREQUENCIES * depth * ldb);
  Buffer<T> dweights(threads * FREQUENCIES * matrix);
  std::vector<BackwardSums<T>> sums(threads, BackwardSums<T>(channels));
  PerThread<WeightGradientScratch<T, S>> weight_scratch(threads, tiles, channels, growth);
  PerThread<ConvolveScratch<T, S>> scratch(threads, tiles, growth, channels);
  parallel(threads, [&](int thread, int all) {
    const Range packed = share(depth, thread, all), range = share(tiles.rows(), thread, all);
    transform_weights<T, S>(weight, true, growth, channels, packed.begin, packed.end, weights);
    T* dw = dweights + thread * FREQUENCIES * matrix;
    std::fill_n(dw, FREQUENCIES * matrix, T(0));
    wait_for_all_threads();
    convolve_backward_weights<T, S>(
        tiles, range, channels, growth, weight_scratch[thread], NormalisedRow<T, S>{b, width, channels, normalise},
        gradient, dw,
        [&](long begin, long end) { return pixels_of(tiles, end, std::min(2 * end - begin, range.end), b, ldb); });
    convolve<T, S>(
        tiles, range, growth, channels, weights, scratch[thread],
        [&](long row, T* out) {
          for (long i = row * width * ldg; i < (row + 1) * width * ldg; i += ldg, out += ldg)
            for (long c = 0; c < ldg; c += LANES<T>) store(out + c, load(gradient + i + c, growth - c));
        },
        [&](long row, const T* values) {
          for (long c = 0; c < channels; c += LANES<T>) {
            Vector<T> row_sum = {}, row_centred_sum = {};
            for (long x = 0; x < width; x++) {
              const long i = (row * width + x) * ldb + c;
              const Vector<T> value = load(b + i);
              const Vector<T> d = relu_backward<T>(normalise(c, value), load(values + x * ldb + c));
              store(dz + i, d);
              row_sum += d;
              row_centred_sum += d * (value - load(mean + c));
            }
            sums[thread].add(c, row_sum, row_centred_sum);
          }
        },
        [&](long begin, long end) { return pixels_of(tiles, begin, end, b, ldb); });
    wait_for_all_threads();
    const Range reduced = share(ldb / LANES<T> * growth, thread, all);
    for (long k = reduced.begin; k < reduced.end; k++) {
      const long in = k / growth * LANES<T>, o = k % growth;
      Vector<T> u[FREQUENCIES] = {}, w[9];
      for (int t = 0; t < all; t++)
        for (int f = 0; f < FREQUENCIES; f++) u[f] += load(dweights + (t * FREQUENCIES + f) * matrix + o * ldb + in);
      transform_weight_gradient<T>(u, w);
      for (int i = 0; i < 9; i++)
        for (long c = in; c < std::min(in + LANES<T>, channels); c++) dweight[(i * channels + c) * growth + o] = w[i][c - in];
    }
  });
  write_sums(sums, channels, sum, centred_sum);
}

// The gradient of maps whose consumers are all done: out [pixels][ldout], filled up with zeros.
template <class T, class S>
void finish_gradient(long threads, const S* g, const S* x, long ldx, long pixels, long channels,
                     const BatchNorm<T>* norm, const double* map_sum, const double* map_centred_sum, S* out,
                     long ldout) {
  constexpr long AHEAD = 16;  // rows
  const NormBackward<T> norm_backward(*norm, map_sum, map_centred_sum, pixels, channels);
  parallel(threads, [&](int thread, int all) {
    const Range range = share(pixels, thread, all);
    for (long r = range.begin; r < range.end; r++)
      for (long c = 0; c < channels; c += LANES<T>) {
        const long i = r * ldx + c, count = channels - c;
        __builtin_prefetch(g + i + AHEAD * ldx);
        __builtin_prefetch(x + i + AHEAD * ldx);
        store(out + r * ldout + c, norm_backward(c, load(g + i, count), load(x + i, count)), ldout - c);
      }
  });
}

// out [pixels / (side_y side_x)][channels] = the average of relu(norm(x)) over rectangles; what is left over at the
// bottom and on the right is left out.
template <class T, class S>
void pool_forward(long threads, const S* x, long ldx, long images, long height, long width, long channels,
                  const BatchNorm<T>* norm, long side_y, long side_x, S* out) {
  const long rows = height / side_y, columns = width / side_x;
  const Affine<T> normalise(*norm, channels);
  const T factor = T(1) / (side_y * side_x);
  parallel(threads, [&](int thread, int all) {
    const Range range = share(images * rows * columns, thread, all);
    for (long q = range.begin; q < range.end; q++) {
      const long image = q / (rows * columns), row = q / columns % rows, column = q % columns;
      const S* first = x + ((image * height + row * side_y) * width + column * side_x) * ldx;
      for (long c = 0; c < channels; c += LANES<T>) {
        Vector<T> sum = {};
        for (long i = 0; i < side_y; i++)
          for (long j = 0; j < side_x; j++) sum += relu<T>(normalise(c, load(first + (i * width + j) * ldx + c)));
        store(out + q * channels + c, sum * factor, channels - c);
      }
    }
  });
}

// The way back: writes g = gamma dz, zero where no rectangle lies, and its sums over pixels.
template <class T, class S>
void pool_backward(long threads, const S* x, S* g, long ldx, long images, long height, long width, long channels,
                   const BatchNorm<T>* norm, long side_y, long side_x, const S* gradient, T* dgamma, T* dbeta,
                   double* map_sum, double* map_centred_sum) {
  const long rows = height / side_y, columns = width / side_x;
  const Affine<T> normalise(*norm, channels);
  const Padded<T> gamma(norm->gamma, channels), mean(norm->mean, channels);
  const T factor = T(1) / (side_y * side_x);
  std::vector<BackwardSums<T>> sums(threads, BackwardSums<T>(channels));
  parallel(threads, [&](int thread, int all) {
    const Range range = share(images * height, thread, all);
    for (long line = range.begin; line < range.end; line++) {
      const long image = line / height, row = line % height / side_y;
      S* out = g + line * width * ldx;
      const long covered = row < rows ? columns * side_x : 0;
      for (long column = covered; column < width; column++) std::fill_n(out + column * ldx, channels, S{});
      const S* pooled = gradient + (image * rows + row) * columns * channels;
      for (long c = 0; c < channels && covered; c += LANES<T>) {
        Vector<T> sum = {}, centred_sum = {};
        for (long column = 0; column < covered; column++) {
          __builtin_prefetch(x + ((line + 1) * width + column) * ldx + c);
          __builtin_prefetch(out + (width + column) * ldx + c, 1);
          const Vector<T> value = load(x + (line * width + column) * ldx + c);
          const Vector<T> d = load(pooled + column / side_x * channels + c, channels - c) * factor;
          const Vector<T> dz = relu_backward<T>(normalise(c, value), d);
          store(out + column * ldx + c, load(gamma + c) * dz);
          sum += dz;
          centred_sum += dz * (value - load(mean + c));
        }
        sums[thread].add(c, sum, centred_sum);
      }
    }
  });
  std::fill_n(map_sum, channels, 0);
  std::fill_n(map_centred_sum, channels, 0);
  parameter_gradients(*norm, sums, channels, dgamma, dbeta, map_sum, map_centred_sum);
}

constexpr int NO_WINNER = 255;  // no pixel of the window is above zero

// out = 3x3 max pooling, stride 2, padding 1, of relu(norm(y)); argmax: which of the nine pixels gave it.
template <class T, class S>
void stem_forward(long threads, const S* y, long images, long height, long width, long channels,
                  const BatchNorm<T>* norm, S* out, uint8_t* argmax) {
  const long rows = (height + 1) / 2, columns = (width + 1) / 2;
  const Affine<T> normalise(*norm, channels);
  parallel(threads, [&](int thread, int all) {
    const Range range = share(images * rows * columns, thread, all);
    for (long q = range.begin; q < range.end; q++) {
      const long image = q / (rows * columns), top = 2 * (q / columns % rows) - 1, left = 2 * (q % columns) - 1;
      for (long c = 0; c < channels; c += LANES<T>) {
        Vector<T> best = {}, winner = best + NO_WINNER;
        for (long i = std::max(top, 0L); i < std::min(top + 3, height); i++)
          for (long j = std::max(left, 0L); j < std::min(left + 3, width); j++) {
            const Vector<T> z = normalise(c, load(y + ((image * height + i) * width + j) * channels + c, channels - c));
            const auto loses = (z <= best) | (best != best);  // a NaN wins over all others
            best = loses ? best : z;
            winner = loses ? winner : Vector<T>{} + T((i - top) * 3 + j - left);
          }
        store(out + q * channels + c, best, channels - c);
        narrow_to_bytes<T>(argmax + q * channels + c, winner, channels - c);
      }
    }
  });
}

// Of a window of the pooling, for a vector of channels: which of its pixels gave the maximum, and the gradient.
template <class T> struct Window {
  Vector<T> winner, gradient;

  Vector<T> to(long place) const { return winner == T(place) ? gradient : Vector<T>{}; }
};

// dy, from the gradient of the pooled maps.
template <class T, class S>
void stem_backward(long threads, const S* y, long images, long height, long width, long channels,
                   const BatchNorm<T>* norm, const S* gradient, const uint8_t* argmax, S* dy, T* dgamma,
                   T* dbeta) {
  const long rows = (height + 1) / 2, columns = (width + 1) / 2, pixels = images * height * width;
  std::vector<std::vector<double>> sums(threads, std::vector<double>(2 * channels));
  std::vector<double> sum(channels), centred_sum(channels);
  const Padded<T> mean(norm->mean, channels);
  parallel(threads, [&](int thread, int all) {
    const Range range = share(images * height, thread, all);
    for (long line = range.begin; line < range.end; line++) {
      const long image = line / height, i = line % height;
      for (long c = 0; c < channels; c += LANES<T>) {
        const long count = std::min(LANES<T>, channels - c);
        const Vector<T> centre = load(mean + c);
        // The rows of windows that contain this line: those with 2 row - 1 <= i <= 2 row + 1. Columns likewise, so that
        // an even pixel lies in one window and an odd one in two, of which this one is kept from the pixel before.
        const long first = i / 2, here = std::min((i + 1) / 2, rows - 1) - first + 1;
        Window<T> windows[2], next[2];
        const auto load_windows = [&](long column, Window<T>* to) {
          for (long r = 0; r < here; r++) {
            const long q = ((image * rows + first + r) * columns + column) * channels + c;
            to[r] = {widen_bytes<T>(argmax + q, count), load(gradient + q, count)};
          }
        };
        const auto place = [&](long r, long column) { return (i - 2 * (first + r) + 1) * 3 + column; };
        Vector<T> line_sum = {}, line_centred_sum = {};
        const auto finish = [&](long j, Vector<T> d) {
          const long k = (line * width + j) * channels + c;
          store(dy + k, d, count);
          line_sum += d;
          line_centred_sum += d * (load(y + k, count) - centre);
        };
        load_windows(0, windows);
        for (long column = 0; column < columns; column++) {
          Vector<T> even = {}, odd = {};
          if (column + 1 < columns) load_windows(column + 1, next);
          for (long r = 0; r < here; r++) {
            even += windows[r].to(place(r, 1));
            odd += windows[r].to(place(r, 2));
            if (column + 1 == columns) continue;
            odd += next[r].to(place(r, 0));
            windows[r] = next[r];
          }
          finish(2 * column, even);
          if (2 * column + 1 < width) finish(2 * column + 1, odd);
        }
        for (long k = 0; k < count; k++) {
          sums[thread][c + k] += line_sum[k];
          sums[thread][channels + c + k] += line_centred_sum[k];
        }
      }
    }
  });
  for (const auto& part : sums)
    for (long c = 0; c < channels; c++) sum[c] += part[c], centred_sum[c] += part[channels + c];
  parameter_gradients(*norm, sum.data(), centred_sum.data(), channels, dgamma, dbeta);
  const NormBackward<T> backward(*norm, sum.data(), centred_sum.data(), pixels, channels);
  parallel(threads, [&](int thread, int all) {
    const Range range = share(pixels, thread, all);
    for (long i = range.begin * channels; i < range.end * channels; i += channels)
      for (long c = 0; c < channels; c += LANES<T>)
        store(dy + i + c, backward(c, load(dy + i + c, channels - c), load(y + i + c, channels - c)), channels - c);
  });
}

// A kernel as it is called from outside: returns 0, or 1 if there is no memory for its scratch. The threads of a
// parallel region throw nothing, see `PerThread`.
template <auto kernel> struct Exported;
template <class... Arguments, void (*kernel)(Arguments...)> struct Exported<kernel> {
  static int call(Arguments... arguments) noexcept {
    try {
      kernel(arguments...);
      return 0;
    } catch (const std::bad_alloc&) {
      return 1;
    }
  }
};

}  // namespace dense

#define EXPORT(kernel)                                                          \
  auto kernel##_float32 = dense::Exported<dense::kernel<float, float>>::call;   \
  auto kernel##_float64 = dense::Exported<dense::kernel<double, double>>::call; \
  auto kernel##_bfloat16 = dense::Exported<dense::kernel<float, dense::bf16>>::call;

EXPORT(copy_and_measure)
EXPORT(bottleneck_forward)
EXPORT(bottleneck_backward)
EXPORT(conv3x3_forward)
EXPORT(conv3x3_backward)
EXPORT(finish_gradient)
EXPORT(pool_forward)
EXPORT(pool_backward)
EXPORT(stem_forward)
EXPORT(stem_backward)

long vector_bytes = dense::VECTOR_BYTES;
