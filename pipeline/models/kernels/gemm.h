// Vectors of the machine's width, and the matrix products of which every kernel here is made.
//
// Written with the vector extensions of GCC and Clang, so that one source serves AVX-512, AVX2, SSE and NEON. The
// names are the usual ones of matrix products: a micro-kernel computes a register tile of MR rows by NR vectors of
// columns; the right-hand matrix is packed into panels of NR vectors. The depth is not cut (there is no KC): it is at
// most a few thousand channels.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>

namespace dense {

static_assert(sizeof(long) == 8 && sizeof(void*) == 8, "sizes and offsets are long, which must have 64 bits");

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif

// A register tile has MR x NR vectors of accumulators. Beside them, registers hold NR vectors of the panel and one
// broadcast element.
constexpr int MR = 6, NR = REGISTERS == 32 ? 4 : 2;
// The same where the left-hand matrix is transposed, so that its MR elements lie side by side in memory.
constexpr int MR_TRANSPOSED = 8, NR_TRANSPOSED = REGISTERS == 32 ? 2 : 1;

template <class T> struct Simd {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr long LANES = VECTOR_BYTES / sizeof(T);
};
template <class T> using Vector = typename Simd<T>::Vector;
template <class T> constexpr long LANES = Simd<T>::LANES;

inline long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
template <class T> long padded(long channels) { return round_up(channels, LANES<T>); }

template <class T> inline Vector<T> load(const T* p) { return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p); }
template <class T> inline void store(T* p, Vector<T> v) { *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v; }

// The first `count` lanes of a vector, if it is that short; a load leaves zero in the others. Memory beyond is not touched.
template <class T> inline Vector<T> load(const T* p, long count) {
  if (count >= LANES<T>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps((1u << count) - 1, p);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_loadu_pd((1u << count) - 1, p);
#endif
  Vector<T> v = {};
  std::memcpy(&v, p, count * sizeof(T));
  return v;
}
template <class T> inline void store(T* p, Vector<T> v, long count) {
  if (count >= LANES<T>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, (1u << count) - 1, v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, (1u << count) - 1, v);
#endif
  std::memcpy(p, &v, count * sizeof(T));
}
template <class T> inline void copy(const T* from, long count, T* to) {
  for (long i = 0; i < count; i += LANES<T>) store(to + i, load(from + i, count - i), count - i);
}

// As torch's: a NaN passes, in both directions.
template <class T> inline Vector<T> relu(Vector<T> z) { return z < 0 ? Vector<T>{} : z; }
template <class T> inline Vector<T> relu_backward(Vector<T> z, Vector<T> gradient) {
  return z <= 0 ? Vector<T>{} : gradient;
}

// The micro-kernel: c[rows][width vectors] (+)= a b. a(i, k) is a[i * lda + k], transposed a[k * lda + i].
template <class T, int rows, int width, bool transposed>
inline void micro_kernel(long depth, const T* a, long lda, const T* b, long ldb, T* c, long ldc, bool add) {
  Vector<T> sum[rows][width];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < width; j++) sum[i][j] = add ? load(c + i * ldc + j * LANES<T>) : Vector<T>{};
  for (long k = 0; k < depth; k++) {
    Vector<T> row[width];
    for (int j = 0; j < width; j++) row[j] = load(b + k * ldb + j * LANES<T>);
    for (int i = 0; i < rows; i++) {
      const T element = transposed ? a[k * lda + i] : a[i * lda + k];
      for (int j = 0; j < width; j++) sum[i][j] += element * row[j];
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

template <class T, int width>
void multiply_rows(long rows, long depth, const T* a, long lda, const T* b, T* c, long ldc, Prefetch& ahead) {
  constexpr long columns = width * LANES<T>;
  for (long i = 0; i < rows; i += MR) {
    ahead.some();
    if (i + MR <= rows) {
      micro_kernel<T, MR, width, false>(depth, a + i * lda, lda, b, columns, c + i * ldc, ldc, false);
    } else {
      T last[MR * columns];
      micro_kernel<T, MR, width, false>(depth, a + i * lda, lda, b, columns, last, columns, false);
      for (long r = i; r < rows; r++) std::copy_n(last + (r - i) * columns, columns, c + r * ldc);
    }
  }
}

// c = a b for one packed panel b [depth][width vectors]. Reads rows of a up to a multiple of MR.
template <class T>
void multiply_panel(long rows, long width, long depth, const T* a, long lda, const T* b, T* c, long ldc,
                    Prefetch& ahead) {
  switch (width) {
    case 1: return multiply_rows<T, 1>(rows, depth, a, lda, b, c, ldc, ahead);
    case 2: return multiply_rows<T, 2>(rows, depth, a, lda, b, c, ldc, ahead);
    case 3: return multiply_rows<T, 3>(rows, depth, a, lda, b, c, ldc, ahead);
    case 4: return multiply_rows<T, 4>(rows, depth, a, lda, b, c, ldc, ahead);
  }
}

// Register tiles of `multiply`.
template <class T> long register_tiles(long rows, long columns) {
  constexpr long PANEL = NR * LANES<T>;
  return (rows + MR - 1) / MR * ((columns + PANEL - 1) / PANEL);
}

// c = a b for all panels of b, packed NR vectors wide.
template <class T>
void multiply(long rows, long columns, long depth, const T* a, long lda, const T* b, T* c, long ldc, Prefetch& ahead) {
  constexpr long PANEL = NR * LANES<T>;
  for (long j = 0; j < columns; j += PANEL) {
    const long width = std::min<long>(NR, padded<T>(columns - j) / LANES<T>);
    multiply_panel(rows, width, depth, a, lda, b + j * depth, c + j, ldc, ahead);
  }
}

// c += a' b with a [depth][rows] and b [depth][columns]. Reads and writes rows up to a multiple of MR_TRANSPOSED.
template <class T>
void multiply_transposed(long rows, long columns, long depth, const T* a, long lda, const T* b, long ldb, T* c, long ldc,
                         Prefetch& ahead) {
  constexpr long PANEL = NR_TRANSPOSED * LANES<T>;
  long j = 0;
  for (; j + PANEL <= padded<T>(columns); j += PANEL)
    for (long i = 0; i < rows; i += MR_TRANSPOSED) {
      ahead.some();
      micro_kernel<T, MR_TRANSPOSED, NR_TRANSPOSED, true>(depth, a + i, lda, b + j, ldb, c + i * ldc + j, ldc, true);
    }
  for (; j < columns; j += LANES<T>)
    for (long i = 0; i < rows; i += MR_TRANSPOSED) {
      ahead.some();
      micro_kernel<T, MR_TRANSPOSED, 1, true>(depth, a + i, lda, b + j, ldb, c + i * ldc + j, ldc, true);
    }
}

// Pack rows [begin, end) of b [depth][columns], where b(k, j) = element(k, j), into panels `wide` vectors wide; the
// last is as narrow as its columns allow, and filled up with zeros.
template <class T, class Element>
void pack(long depth, long columns, long wide, long begin, long end, T* panels, Element element) {
  for (long j = 0; j < padded<T>(columns); j += wide * LANES<T>) {
    const long width = std::min(wide * LANES<T>, padded<T>(columns - j));
    for (long k = begin; k < end; k++)
      for (long i = 0; i < width; i++) panels[j * depth + k * width + i] = j + i < columns ? element(k, j + i) : T(0);
  }
}

}  // namespace dense
