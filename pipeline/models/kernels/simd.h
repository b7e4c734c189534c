// Vectors of the machine's width, and how numbers are stored.
//
// Written with the vector extensions of GCC and Clang, so that one source serves AVX-512, AVX2, SSE and NEON. Kernels
// compute in float or double (T) and store maps in the same type or in bfloat16 (S): a load gives a vector of T, a store
// rounds to S.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
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

// Whether bfloat16 is multiplied in pairs, and by the matrix unit (matrix_unit.h). What the compiler cannot know is told by
// kernels/__init__.py: whether this process may use the unit, and whether the processor's other instruction is slow.
#if (defined(__AMX_TILE__) && defined(__AMX_BF16__)) || (defined(__AMXTILE__) && defined(__AMXBF16__))  // older clang
#define COMPILER_KNOWS_AMX
#endif
#if defined(__AVX512BF16__) && defined(COMPILER_KNOWS_AMX) && defined(MAY_USE_AMX)
#define MATRIX_UNIT
#define PAIRS
#elif defined(__AVX512BF16__) && !defined(SLOW_PAIRS)
#define PAIRS
#endif

// A format of storage: the upper half of a float.
struct bf16 {
  uint16_t bits;
};
typedef uint32_t Pair;  // of bfloat16: the first in the lower half

template <class T> struct Simd {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr long LANES = VECTOR_BYTES / sizeof(T);
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));  // one a lane
};
template <> struct Simd<bf16> : Simd<float> {};
template <class T> using Vector = typename Simd<T>::Vector;
template <class T> constexpr long LANES = Simd<T>::LANES;

constexpr long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
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

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));       // the bits of a vector of floats
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));  // as many numbers in bfloat16

inline Vector<float> widen(Halves h) {
#if defined(__AVX512F__)  // one instruction, of which GCC 12 makes four
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
  return (Vector<float>)(__builtin_convertvector(h, Words) << 16);
#endif
}

// To the nearest, ties to even, as torch does. A NaN stays one.
inline Halves narrow(Vector<float> v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const Words bits = (Words)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector((v == v ? rounded : bits | 0x400000u) >> 16, Halves);
#endif
}
// The same of one number, in the upper half of a word.
inline uint32_t narrow(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return (v == v ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000u) & 0xffff0000u;
}

inline Vector<float> load(const bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}
inline void store(bf16* p, Vector<float> v) {
  const Halves h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}
inline Vector<float> load(const bf16* p, long count) {
  if (count >= LANES<float>) return load(p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return widen((Halves)_mm256_maskz_loadu_epi16((1u << count) - 1, p));
#endif
  Halves h = {};
  std::memcpy(&h, p, count * sizeof(bf16));
  return widen(h);
}
inline void store(bf16* p, Vector<float> v, long count) {
  if (count >= LANES<float>) return store(p, v);
  const Halves h = narrow(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return _mm256_mask_storeu_epi16(p, (1u << count) - 1, (__m256i)h);
#endif
  std::memcpy(p, &h, count * sizeof(bf16));
}

// Store vector(i) for i = 0, LANES, 2 LANES, ... < count; two at a time, for which there is an instruction in bfloat16.
template <class S, class VectorAt> inline void store_all(S* to, long count, VectorAt vector) {
  constexpr long N = LANES<S>;
  long i = 0;
  for (; i + 2 * N <= count; i += 2 * N) {
    const auto low = vector(i), high = vector(i + N);
#if defined(__AVX512BF16__)
    if constexpr (sizeof(S) == 2) {
      _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      continue;
    }
#endif
    store(to + i, low);
    store(to + i + N, high);
  }
  if (i < count) store(to + i, vector(i));
}

// As many bytes as a vector has lanes, of which the first `count` lie in memory, from and to a vector of numbers.
template <class T> inline Vector<T> widen_bytes(const uint8_t* p, long count) {
  typename Simd<T>::Bytes bytes = {};
  if (count >= LANES<T>) std::memcpy(&bytes, p, sizeof bytes);  // a copy of a fixed size is one instruction
  else std::memcpy(&bytes, p, count);
  return __builtin_convertvector(bytes, Vector<T>);
}
template <class T> inline void narrow_to_bytes(uint8_t* p, Vector<T> v, long count) {
  const auto bytes = __builtin_convertvector(v, typename Simd<T>::Bytes);
  if (count >= LANES<T>) std::memcpy(p, &bytes, sizeof bytes);
  else std::memcpy(p, &bytes, count);
}

template <class T> inline void copy(const T* from, long count, T* to) {
  for (long i = 0; i < count; i += LANES<T>) store(to + i, load(from + i, count - i), count - i);
}
inline void copy(const bf16* from, long count, bf16* to) { std::memcpy(to, from, count * sizeof(bf16)); }

// As torch's: a NaN passes, in both directions.
template <class T> inline Vector<T> relu(Vector<T> z) { return z < 0 ? Vector<T>{} : z; }
template <class T> inline Vector<T> relu_backward(Vector<T> z, Vector<T> gradient) {
  return z <= 0 ? Vector<T>{} : gradient;
}

}  // namespace dense
