// 3x3 convolution, stride 1, padding 1, by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms
// for Convolutional Neural Networks", CVPR 2016, Section 4.1): 16 products where the definition has 36.
//
//   Y = A' [ (G w G') * (B' d B) ] A      d: 4x4 pixels, w: 3x3 weights, Y: 2x2 outputs, *: element by element
//
// Its adjoint in w is  dw = G' [ (B' d B) * (A dY A') ] G.  The gradient in d is a convolution of dY with the weights
// turned by 180 degrees and their channels exchanged. Summed over channels, each of the 16 elements ("frequencies")
// is a matrix product [tiles x channels in] [channels in x channels out].
#pragma once

#include <algorithm>

#include "parallel.h"

namespace dense {

constexpr int FREQUENCIES = 16;

// The 2x2 output tiles of a batch of images, in rows of tiles.
struct Tiles {
  long images, height, width;

  long rows_of_image() const { return (height + 1) / 2; }
  long rows() const { return images * rows_of_image(); }
  long columns() const { return (width + 1) / 2; }
  // The upper row of pixels of a row of tiles, counted through the batch.
  long pixel_row(long row) const { return row / rows_of_image() * height + 2 * (row % rows_of_image()); }
  // Rows of tiles that a thread works on at once: about 48 tiles, with few rows of a register tile left empty.
  template <class O> long rows_at_once() const {
    constexpr long MR = dense::MR<O>;
    long best = 1;
    double least = 2;
    for (long rows = 1; rows == 1 || rows * columns() <= 60; rows++) {
      const double waste = double(round_up(rows * columns(), MR)) / (rows * columns());
      if (waste <= least) best = rows, least = waste;
    }
    return best;
  }
};

// B' d B of a row of tiles, from four rows of pixels: frequency f goes to out + f * plane, [tiles][ld].
template <class T, class E> void transform_input(const T* const (&pixels)[4], long tiles, long ld, E* out, long plane) {
  for (long c = 0; c < ld; c += LANES<T>) {
    Vector<T> t[4][4];  // of rows of frequencies and columns of pixels, of which a tile has two from the one before
    const auto load_column = [&](long column, int j) {
      const long i = column * ld + c;
      const Vector<T> d0 = load(pixels[0] + i), d1 = load(pixels[1] + i), d2 = load(pixels[2] + i), d3 = load(pixels[3] + i);
      t[0][j] = d0 - d2, t[1][j] = d1 + d2, t[2][j] = d2 - d1, t[3][j] = d1 - d3;
    };
    load_column(0, 0);
    load_column(1, 1);
    E* to = out + c;
    for (long tile = 0; tile < tiles; tile++, to += ld) {
      load_column(2 * tile + 2, 2);
      load_column(2 * tile + 3, 3);
      for (int i = 0; i < 4; i++) {
        store(to + (4 * i + 0) * plane, t[i][0] - t[i][2]);
        store(to + (4 * i + 1) * plane, t[i][1] + t[i][2]);
        store(to + (4 * i + 2) * plane, t[i][2] - t[i][1]);
        store(to + (4 * i + 3) * plane, t[i][1] - t[i][3]);
        t[i][0] = t[i][2], t[i][1] = t[i][3];
      }
    }
  }
}

// Two rows of two output pixels, from the 16 frequencies.
template <class T> inline void transform_output(const T* in, long plane, long channels, T* const (&rows)[2], long ld) {
  for (long c = 0; c < channels; c += LANES<T>) {
    Vector<T> t[2][4];
    for (int j = 0; j < 4; j++) {
      const Vector<T> m0 = load(in + j * plane + c), m1 = load(in + (4 + j) * plane + c),
                      m2 = load(in + (8 + j) * plane + c), m3 = load(in + (12 + j) * plane + c);
      t[0][j] = m0 + m1 + m2, t[1][j] = m1 - m2 - m3;
    }
    for (int i = 0; i < 2; i++) {
      store(rows[i] + c, t[i][0] + t[i][1] + t[i][2]);
      store(rows[i] + ld + c, t[i][1] - t[i][2] - t[i][3]);
    }
  }
}

// A dY A' of 2x2 output gradients; `gradient` gives a vector of them at (row, column, channel).
template <class T, class E, class Gradient>
inline void transform_gradient(Gradient gradient, long channels, E* out, long plane) {
  for (long c = 0; c < channels; c += LANES<T>) {
    Vector<T> t[4][2];
    for (int j = 0; j < 2; j++) {
      const Vector<T> y0 = gradient(0, j, c), y1 = gradient(1, j, c);
      t[0][j] = y0, t[1][j] = y0 + y1, t[2][j] = y0 - y1, t[3][j] = -y1;
    }
    for (int i = 0; i < 4; i++) {
      store(out + (4 * i + 0) * plane + c, t[i][0]);
      store(out + (4 * i + 1) * plane + c, t[i][0] + t[i][1]);
      store(out + (4 * i + 2) * plane + c, t[i][0] - t[i][1]);
      store(out + (4 * i + 3) * plane + c, -t[i][1]);
    }
  }
}

// G w G' of 3x3 weights; weight(position) gives a vector of them.
template <class T, class Weight> inline void transform_weight(Weight weight, Vector<T> (&u)[FREQUENCIES]) {
  Vector<T> t[4][3];
  for (int x = 0; x < 3; x++) {
    const Vector<T> w0 = weight(x), w1 = weight(3 + x), w2 = weight(6 + x);
    t[0][x] = w0, t[1][x] = (w0 + w1 + w2) / 2, t[2][x] = (w0 - w1 + w2) / 2, t[3][x] = w2;
  }
  for (int y = 0; y < 4; y++) {
    u[4 * y + 0] = t[y][0];
    u[4 * y + 1] = (t[y][0] + t[y][1] + t[y][2]) / 2;
    u[4 * y + 2] = (t[y][0] - t[y][1] + t[y][2]) / 2;
    u[4 * y + 3] = t[y][2];
  }
}

// The transformed weights of operands [begin, end) of channels in, packed as 16 matrices for `multiply`.
// weight: [3][3][channels_in][channels_out], turned by 180 degrees if asked.
template <class T, class S>
void transform_weights(const T* weight, bool turned, long channels_in, long channels_out, long begin, long end,
                       Operand<S>* packed) {
  const long plane = channels_in * channels_out, depth = operands<S>(channels_in), panel = NR * LANES<T>;
  const long matrix = depth * padded<T>(channels_out);
  for (long k = begin; k < end; k++)
    for (long o = 0; o < channels_out; o += LANES<T>) {
      Vector<T> u[PER_OPERAND<S>][FREQUENCIES] = {};
      for (long p = 0; p < PER_OPERAND<S> && k * PER_OPERAND<S> + p < channels_in; p++) {
        const T* first = weight + (k * PER_OPERAND<S> + p) * channels_out + o;
        transform_weight<T>(
            [&](int position) { return load(first + (turned ? 8 - position : position) * plane, channels_out - o); }, u[p]);
      }
      const long start = o / panel * panel, width = std::min(panel, padded<T>(channels_out) - start);
      Operand<S>* out = packed + start * depth + k * width + o - start;
      for (int f = 0; f < FREQUENCIES; f++) {
        if constexpr (IN_PAIRS<S>) store<Pair>(out + f * matrix, as_pairs(u[0][f], u[1][f]));
        else store(out + f * matrix, u[0][f]);
      }
    }
}

// G' u G: the gradient of 3x3 weights from that of the 16 frequencies.
template <class T> void transform_weight_gradient(const Vector<T> (&u)[FREQUENCIES], Vector<T> (&w)[9]) {
  Vector<T> t[3][4];
  for (int x = 0; x < 4; x++) {
    const Vector<T> half_sum = (u[4 + x] + u[8 + x]) / 2, half_difference = (u[4 + x] - u[8 + x]) / 2;
    t[0][x] = u[x] + half_sum, t[1][x] = half_difference, t[2][x] = half_sum + u[12 + x];
  }
  for (int y = 0; y < 3; y++) {
    const Vector<T> half_sum = (t[y][1] + t[y][2]) / 2, half_difference = (t[y][1] - t[y][2]) / 2;
    w[3 * y] = t[y][0] + half_sum, w[3 * y + 1] = half_difference, w[3 * y + 2] = half_sum + t[y][3];
  }
}

// The transformed inputs of rows of tiles. `load_row(row, out)` writes a row of pixels of the batch, [width][ld].
// Two of a tile's four rows belong to the next row of tiles too: they are kept.
template <class T, class LoadRow> class InputTiles {
 public:
  static long size(const Tiles& tiles, long channels) { return 5 * (2 * tiles.columns() + 2) * padded<T>(channels); }

  InputTiles(const Tiles& tiles, long channels, LoadRow load_row, T* rows)  // `size` elements of memory
      : tiles_(tiles), ld_(padded<T>(channels)), row_((2 * tiles.columns() + 2) * ld_), load_row_(load_row), rows_(rows) {
    std::fill_n(rows_, 5 * row_, T(0));
  }

  // Frequency f of the tiles of tile rows [begin, end) goes to out + f * plane, [tiles][ld].
  template <class E> void transform(long begin, long end, E* out, long plane) {
    for (long tile_row = begin; tile_row < end; tile_row++) {
      const long image = tile_row / tiles_.rows_of_image(), top = 2 * (tile_row % tiles_.rows_of_image()) - 1;
      const T* pixels[4];
      for (int i = 0; i < 4; i++) pixels[i] = row(image, top + i);
      transform_input(pixels, tiles_.columns(), ld_, out, plane);
      out += tiles_.columns() * ld_;
    }
  }

 private:
  const T* row(long image, long y) {
    if (y < 0 || y >= tiles_.height) return rows_ + 4 * row_;  // zeros
    const long row = image * tiles_.height + y;
    T* slot = rows_ + (y & 3) * row_;
    if (held_[y & 3] != row) load_row_(row, slot + ld_);
    held_[y & 3] = row;
    return slot;
  }

  const Tiles tiles_;
  const long ld_, row_;
  LoadRow load_row_;
  T* const rows_;  // four, and one of zeros; each with a pixel of zeros left and one or two right
  long held_[4] = {-1, -1, -1, -1};
};

// What a thread needs for `convolve`.
template <class T, class S> struct ConvolveScratch {
  const long at_once, count, plane_in, plane_out;  // planes are no multiple of a page
  Buffer<T> rows, products, output;
  Buffer<Element<S>> inputs;

  ConvolveScratch(const Tiles& tiles, long channels_in, long channels_out)
      : at_once(tiles.rows_at_once<Operand<S>>()), count(round_up(at_once * tiles.columns(), MR<Operand<S>>)),
        plane_in(count * padded<T>(channels_in) + VECTOR_BYTES / sizeof(Element<S>)),
        plane_out(count * padded<T>(channels_out) + LANES<T>), rows(InputTiles<T, int>::size(tiles, channels_in)),
        products(FREQUENCIES * plane_out), output(4 * tiles.columns() * padded<T>(channels_out)),
        inputs(FREQUENCIES * plane_in) {}
};

// Convolve rows [begin, end) of tiles. `store_row(row, values)` takes a row of pixels [width][padded channels out];
// `coming(begin, end)` is what to fetch while tile rows [begin, end) are multiplied.
template <class T, class S, class LoadRow, class StoreRow, class Coming>
void convolve(const Tiles& tiles, Range range, long channels_in, long channels_out, const Operand<S>* weights,
              ConvolveScratch<T, S>& scratch, LoadRow load_row, StoreRow store_row, Coming coming) {
  const long at_once = scratch.at_once, plane_in = scratch.plane_in, plane_out = scratch.plane_out;
  const long columns = tiles.columns(), ldin = padded<T>(channels_in), ldout = padded<T>(channels_out);
  const long depth = operands<S>(channels_in);
  Element<S>* inputs = scratch.inputs;
  T *products = scratch.products, *output = scratch.output;
  InputTiles<T, LoadRow> input_tiles(tiles, channels_in, load_row, scratch.rows);
  for (long begin = range.begin; begin < range.end; begin += at_once) {
    const long end = std::min(begin + at_once, range.end);
    input_tiles.transform(begin, end, inputs, plane_in);
    Prefetch ahead = coming(begin, end);
    ahead.over(FREQUENCIES * register_tiles<T, Operand<S>>((end - begin) * columns, channels_out));
    for (int f = 0; f < FREQUENCIES; f++)
      multiply((end - begin) * columns, channels_out, depth, as_operands<S>(inputs + f * plane_in), ldin / PER_OPERAND<S>,
               weights + f * depth * ldout, products + f * plane_out, ldout, ahead);
    for (long tile_row = begin; tile_row < end; tile_row++) {
      for (long column = 0; column < columns; column++) {
        T* rows[2] = {output + 2 * column * ldout, output + (2 * columns + 2 * column) * ldout};
        transform_output(products + ((tile_row - begin) * columns + column) * ldout, plane_out, channels_out, rows, ldout);
      }
      const long first = tiles.pixel_row(tile_row), count = std::min(2L, tiles.height - first % tiles.height);
      for (long i = 0; i < count; i++) store_row(first + i, output + i * 2 * columns * ldout);
    }
  }
}

// What a thread needs for `convolve_backward_weights`.
template <class T, class S> struct WeightGradientScratch {
  const long at_once, plane_in, plane_out;
  Buffer<T> rows;
  Buffer<Element<S>> inputs, gradients;
  Buffer<Operand<S>> input_pairs, gradient_pairs, left;  // of one frequency

  WeightGradientScratch(const Tiles& tiles, long channels_in, long channels_out)
      : at_once(tiles.rows_at_once<Operand<S>>()),
        plane_in(at_once * tiles.columns() * padded<T>(channels_in) + VECTOR_BYTES / sizeof(Element<S>)),
        plane_out(at_once * tiles.columns() * padded<T>(channels_out) + VECTOR_BYTES / sizeof(Element<S>) +
                  MR_TRANSPOSED<Operand<S>>),
        rows(InputTiles<T, int>::size(tiles, channels_in)), inputs(FREQUENCIES * plane_in),
        gradients(FREQUENCIES * plane_out), input_pairs(IN_PAIRS<S> ? plane_in : 0),
        gradient_pairs(IN_PAIRS<S> ? plane_out : 0),
        left(left_size<Operand<S>>(operands<S>(at_once * tiles.columns()), channels_out)) {}
};

// Add to sums [16][channels_out rounded up][padded channels_in] the gradient of the transformed weights over rows
// [begin, end) of tiles. gradient [pixels][padded channels_out] is that of the convolution's output.
template <class T, class S, class LoadRow, class Coming>
void convolve_backward_weights(const Tiles& tiles, Range range, long channels_in, long channels_out,
                               WeightGradientScratch<T, S>& scratch, LoadRow load_row, const S* gradient, T* sums,
                               Coming coming) {
  const long at_once = scratch.at_once, plane_in = scratch.plane_in, plane_out = scratch.plane_out;
  const long columns = tiles.columns(), ldin = padded<T>(channels_in), ldout = padded<T>(channels_out);
  Element<S> *inputs = scratch.inputs, *gradients = scratch.gradients;
  InputTiles<T, LoadRow> input_tiles(tiles, channels_in, load_row, scratch.rows);
  for (long begin = range.begin; begin < range.end; begin += at_once) {
    const long end = std::min(begin + at_once, range.end);
    input_tiles.transform(begin, end, inputs, plane_in);
    Element<S>* out = gradients;
    for (long tile_row = begin; tile_row < end; tile_row++) {
      const long first = tiles.pixel_row(tile_row), count = tiles.height - first % tiles.height;
      for (long column = 0; column < columns; column++, out += ldout)
        transform_gradient<T>(
            [&](long i, long j, long c) {
              const long x = 2 * column + j;
              if (i >= count || x >= tiles.width) return Vector<T>{};
              return load(gradient + ((first + i) * tiles.width + x) * ldout + c);
            },
            channels_out, out, plane_out);
    }
    Prefetch ahead = coming(begin, end);
    ahead.over(FREQUENCIES * register_tiles_transposed<T, Operand<S>>(channels_out, channels_in));
    const long count = (end - begin) * columns;
    for (int f = 0; f < FREQUENCIES; f++) {
      const Operand<S>*a = as_operands<S>(gradients + f * plane_out), *b = as_operands<S>(inputs + f * plane_in);
      if constexpr (IN_PAIRS<S>) {  // the sum is over tiles
        pair_rows(gradients + f * plane_out, count, ldout, scratch.gradient_pairs);
        pair_rows(inputs + f * plane_in, count, ldin, scratch.input_pairs);
        a = scratch.gradient_pairs, b = scratch.input_pairs;
      }
      const long depth = operands<S>(count);
      multiply_transposed(channels_out, channels_in, depth, left(depth, channels_out, a, ldout, scratch.left + 0), b, ldin,
                          sums + f * round_up(channels_out, MR_TRANSPOSED<Operand<S>>) * ldin, ldin, ahead);
    }
  }
}

}  // namespace dense
