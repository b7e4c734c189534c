// The matrix products of which every kernel here is made.
//
// The names are the usual ones of matrix products: a micro-kernel computes a register tile of MR rows by NR vectors of
// columns; the right-hand matrix is packed into panels of NR vectors. The depth is not cut (there is no KC): it is at
// most a few thousand channels.
//
// A product multiplies operands. In float and double an operand is a number. In bfloat16 it is a pair of numbers that
// follow each other in the summed dimension, where the processor multiplies pairs fast (AVX512_BF16, AMX) and adds in
// float; else it is a float, and bfloat16 is a format of storage alone. The depth of a product counts operands.
#pragma once

#include <type_traits>

#include "matrix_unit.h"

namespace dense {

// For maps stored in S: in what the left-hand matrix is written, and what is multiplied.
template <class S> struct Operands {
  typedef S Element, Operand;
};
#if defined(PAIRS)
template <> struct Operands<bf16> {
  typedef bf16 Element;
  typedef Pair Operand;
};
#else
template <> struct Operands<bf16> {
  typedef float Element, Operand;
};
#endif
template <class S> using Element = typename Operands<S>::Element;
template <class S> using Operand = typename Operands<S>::Operand;
template <class S> constexpr long PER_OPERAND = sizeof(Operand<S>) / sizeof(Element<S>);  // elements: 1 or 2
template <class S> constexpr bool IN_PAIRS = PER_OPERAND<S> == 2;

// A register tile has MR x NR vectors of accumulators. Beside them, registers hold NR vectors of the panel and one
// broadcast element.
template <class O> constexpr int MR = 6;
constexpr int NR = REGISTERS == 32 ? 4 : 2;
// The same where the left-hand matrix is transposed, so that its MR elements lie side by side in memory.
template <class O> constexpr int MR_TRANSPOSED = 8;
template <class O> constexpr int NR_TRANSPOSED = REGISTERS == 32 ? 2 : 1;
#if defined(MATRIX_UNIT)
template <> constexpr int MR<Pair> = TILE_SIDE;
template <> constexpr int MR_TRANSPOSED<Pair> = TILE_SIDE;
template <> constexpr int NR_TRANSPOSED<Pair> = 4;
#endif

// Operands that hold so many elements; the last one is filled up with a zero.
template <class S> long operands(long depth) { return (depth + PER_OPERAND<S> - 1) / PER_OPERAND<S>; }

// The operand of elements element(0) and, where it is a pair, element(1).
template <class S, class ElementAt> inline Operand<S> operand(ElementAt element) {
  if constexpr (IN_PAIRS<S>) return narrow(element(0)) >> 16 | narrow(element(1));
  else return element(0);
}

template <class S> inline const Operand<S>* as_operands(const Element<S>* p) {
  return reinterpret_cast<const Operand<S>*>(p);
}

template <class T> inline Vector<T> multiply_add(T element, Vector<T> row, Vector<T> sum) { return sum + element * row; }
#if defined(PAIRS)
inline Vector<float> multiply_add(Pair element, Words row, Vector<float> sum) {
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Words{} + element), (__m512bh)row);
}

// A vector of pairs (first, second) from two rows that follow each other in the summed dimension.
inline Words as_pairs(Vector<float> first, Vector<float> second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Words)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

// Rows [rows][ld] as operands of a product over the rows: two rows become one of pairs, an odd last one with zeros.
inline void pair_rows(const bf16* in, long rows, long ld, Pair* out) {
  constexpr long N = LANES<float>;
  for (long r = 0; r < rows; r += 2)
    for (long c = 0; c < ld; c += N) {
      Halves first, second = {};
      std::memcpy(&first, in + r * ld + c, sizeof first);
      if (r + 1 < rows) std::memcpy(&second, in + (r + 1) * ld + c, sizeof second);
      store<Pair>(out + r / 2 * ld + c, __builtin_convertvector(first, Words) | __builtin_convertvector(second, Words) << 16);
    }
}
#endif

// The micro-kernel: c[rows][width vectors] (+)= a b. a(i, k) is a[i * lda + k], transposed a[k * lda + i]; for the matrix
// unit it is always the former.
// Here and below, O is the type of an operand; lda and ldb count operands.
template <class T, class O, int rows, int width, bool transposed>
inline void micro_kernel(long depth, const O* a, long lda, const O* b, long ldb, T* c, long ldc, bool add) {
#if defined(MATRIX_UNIT)
  if constexpr (std::is_same_v<O, Pair>) return multiply_tiles<width>(depth, a, lda, b, ldb, c, ldc, add);
#endif
  Vector<T> sum[rows][width];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < width; j++) sum[i][j] = add ? load(c + i * ldc + j * LANES<T>) : Vector<T>{};
  for (long k = 0; k < depth; k++) {
    Vector<O> row[width];
    for (int j = 0; j < width; j++) row[j] = load(b + k * ldb + j * LANES<T>);
    for (int i = 0; i < rows; i++) {
      const O element = transposed ? a[k * lda + i] : a[i * lda + k];
      for (int j = 0; j < width; j++) sum[i][j] = multiply_add(element, row[j], sum[i][j]);
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < width; j++) store(c + i * ldc + j * LANES<T>, sum[i][j]);
}

// Memory to fetch into the cache: `rows` of `bytes`, `stride` apart. A product fetches a few cache lines with each of its
// register tiles, so that the next tile's data come while this one is computed.
class Prefetch {
 public:
  Prefetch() = default;
  template <class T> Prefetch(const T* p, long rows, long columns, long ld)  // elements; none if rows is not positive
      : row_(reinterpret_cast<const char*>(p)), bytes_(columns * sizeof(T)), stride_(ld * sizeof(T)), rows_(rows) {}

  // Spread the lines over so many register tiles.
  Prefetch& over(long tiles) {
    lines_ = (rows_ * ((bytes_ + LINE - 1) / LINE) + tiles - 1) / tiles;
    return *this;
  }

  void some() {
    for (long i = 0; i < lines_ && rows_ > 0; i++) {
      __builtin_prefetch(row_ + offset_, 0, 2);
      offset_ += LINE;
      if (offset_ >= bytes_) offset_ = 0, row_ += stride_, rows_--;
    }
  }

 private:
  static constexpr long LINE = 64;
  const char* row_ = nullptr;
  long bytes_ = 0, stride_ = 0, rows_ = 0, offset_ = 0, lines_ = 0;
};

template <class T, int width, class O>
void multiply_rows(long rows, long depth, const O* a, long lda, const O* b, T* c, long ldc, Prefetch& ahead) {
  constexpr long columns = width * LANES<T>, MR = dense::MR<O>;
  for (long i = 0; i < rows; i += MR) {
    ahead.some();
    if (i + MR <= rows) {
      micro_kernel<T, O, MR, width, false>(depth, a + i * lda, lda, b, columns, c + i * ldc, ldc, false);
    } else {
      T last[MR * columns];
      micro_kernel<T, O, MR, width, false>(depth, a + i * lda, lda, b, columns, last, columns, false);
      for (long r = i; r < rows; r++) std::copy_n(last + (r - i) * columns, columns, c + r * ldc);
    }
  }
}

// c = a b for one packed panel b [depth][width vectors]. Reads rows of a up to a multiple of MR.
template <class T, class O>
void multiply_panel(long rows, long width, long depth, const O* a, long lda, const O* b, T* c, long ldc,
                    Prefetch& ahead) {
  switch (width) {
    case 1: return multiply_rows<T, 1>(rows, depth, a, lda, b, c, ldc, ahead);
    case 2: return multiply_rows<T, 2>(rows, depth, a, lda, b, c, ldc, ahead);
    case 3: return multiply_rows<T, 3>(rows, depth, a, lda, b, c, ldc, ahead);
    case 4: return multiply_rows<T, 4>(rows, depth, a, lda, b, c, ldc, ahead);
  }
}

// Register tiles of `multiply`.
template <class T, class O> long register_tiles(long rows, long columns) {
  constexpr long PANEL = NR * LANES<T>, MR = dense::MR<O>;
  return (rows + MR - 1) / MR * ((columns + PANEL - 1) / PANEL);
}

// c = a b for all panels of b, packed NR vectors wide.
template <class T, class O>
void multiply(long rows, long columns, long depth, const O* a, long lda, const O* b, T* c, long ldc, Prefetch& ahead) {
  constexpr long PANEL = NR * LANES<T>;
  for (long j = 0; j < columns; j += PANEL) {
    const long width = std::min<long>(NR, padded<T>(columns - j) / LANES<T>);
    multiply_panel(rows, width, depth, a, lda, b + j * depth, c + j, ldc, ahead);
  }
}

// The left-hand matrix of `multiply_transposed`, [depth][rows], as the micro-kernels read it.
template <class O> struct Left {
  const O* data;
  long row, ld;  // from one row of the product to the next, and what the micro-kernel takes as lda
};

// Of a [depth][lda]. `memory` for `left_size` operands is written where the matrix unit multiplies.
template <class O> Left<O> left(long depth, long rows, const O* a, long lda, O* memory) {
#if defined(MATRIX_UNIT)
  if constexpr (std::is_same_v<O, Pair>) {
    const long ld = round_up(depth, TILE_SIDE);
    transpose(a, depth, rows, lda, memory, ld);
    return {memory, ld, ld};
  }
#endif
  return {a, 1, lda};
}
template <class O> constexpr long left_size(long depth, long rows) {
#if defined(MATRIX_UNIT)
  if constexpr (std::is_same_v<O, Pair>) return round_up(depth, TILE_SIDE) * round_up(rows, TILE_SIDE);
#endif
  return 0;
}

// Register tiles of `multiply_transposed`.
template <class T, class O> long register_tiles_transposed(long rows, long columns) {
  constexpr long MR = MR_TRANSPOSED<O>, NR = NR_TRANSPOSED<O>;
  const long vectors = padded<T>(columns) / LANES<T>;
  return (rows + MR - 1) / MR * (vectors / NR + vectors % NR);
}

// c += a' b with b [depth][columns]. Reads and writes rows up to a multiple of MR_TRANSPOSED.
template <class T, class O>
void multiply_transposed(long rows, long columns, long depth, Left<O> a, const O* b, long ldb, T* c, long ldc,
                         Prefetch& ahead) {
  constexpr long MR = MR_TRANSPOSED<O>, NR = NR_TRANSPOSED<O>, PANEL = NR * LANES<T>;
  long j = 0;
  for (; j + PANEL <= padded<T>(columns); j += PANEL)
    for (long i = 0; i < rows; i += MR) {
      ahead.some();
      micro_kernel<T, O, MR, NR, true>(depth, a.data + i * a.row, a.ld, b + j, ldb, c + i * ldc + j, ldc, true);
    }
  for (; j < columns; j += LANES<T>)
    for (long i = 0; i < rows; i += MR) {
      ahead.some();
      micro_kernel<T, O, MR, 1, true>(depth, a.data + i * a.row, a.ld, b + j, ldb, c + i * ldc + j, ldc, true);
    }
}

// Pack operands [begin, end) of the rows of b [depth][columns], where b(k, j) = element(k, j), into panels `wide` vectors
// wide; the last is as narrow as its columns allow, and filled up with zeros.
template <class S, class ElementAt>
void pack(long depth, long columns, long wide, long begin, long end, Operand<S>* panels, ElementAt element) {
  using T = decltype(element(0, 0));
  for (long j = 0; j < padded<T>(columns); j += wide * LANES<T>) {
    const long width = std::min(wide * LANES<T>, padded<T>(columns - j));
    for (long k = begin; k < end; k++)
      for (long i = 0; i < width; i++)
        panels[j * operands<S>(depth) + k * width + i] = operand<S>([&](long p) {
          const long row = k * PER_OPERAND<S> + p;
          return row < depth && j + i < columns ? element(row, j + i) : T(0);
        });
  }
}

}  // namespace dense
