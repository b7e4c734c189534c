// Intel's AMX: a unit that multiplies tiles of up to 16 rows of 16 pairs of bfloat16 and adds in float (Intel, "Architecture
// Instruction Set Extensions", Chapter 3: TDPBF16PS). A left-hand tile has rows of pairs along the summed dimension; a
// right-hand tile has a row for each pair, as `pack` and `pair_rows` lay them out.
//
// Linux gives the unit's registers only to a process that has asked for them, as kernels/__init__.py does.
#pragma once

#include "simd.h"

#if defined(MATRIX_UNIT)

namespace dense {

constexpr long TILE_SIDE = 16;  // rows of a tile, and pairs or floats in a row

// Rest of the depth, in pairs, for which this thread's tile registers are shaped; -1: they are not.
static thread_local long tiles_shaped_for = -1;

// Registers 0 to 3 hold sums, 4 and 5 whole left-hand and right-hand tiles, 6 and 7 the last ones of a depth, which are
// shorter. A change of shapes empties all registers.
inline void shape_tiles(long depth) {
  const long rest = depth % TILE_SIDE;
  if (tiles_shaped_for == rest || (rest == 0 && tiles_shaped_for > 0)) return;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; i++) shapes.rows[i] = TILE_SIDE, shapes.row_bytes[i] = 64;
  if (rest) shapes.row_bytes[6] = rest * sizeof(Pair), shapes.rows[7] = rest;
  // GCC's _tile_loadconfig does not say that it reads all of them, so that they would not be written before.
  asm volatile("" : : "m"(shapes));
  _tile_loadconfig(&shapes);
  tiles_shaped_for = rest;
}

// What follows on this thread, as torch's own products, finds the unit unused.
inline void release_tiles() {
  if (tiles_shaped_for < 0) return;
  _tile_release();
  tiles_shaped_for = -1;
}

// c[16][width tiles] (+)= a b. The numbers of registers are part of the instructions, hence the macros.
template <int width>
inline void multiply_tiles(long depth, const Pair* a, long lda, const Pair* b, long ldb, float* c, long ldc, bool add) {
  constexpr long PAIR = sizeof(Pair), FLOAT = sizeof(float), N = TILE_SIDE;
#define FOR_EACH_SUM(STATEMENT)             \
  STATEMENT(0)                              \
  if constexpr (width > 1) { STATEMENT(1) } \
  if constexpr (width > 2) { STATEMENT(2) } \
  if constexpr (width > 3) { STATEMENT(3) }
#define CLEAR(SUM) _tile_zero(SUM);
#define LOAD(SUM) _tile_loadd(SUM, c + SUM * N, ldc * FLOAT);
#define ADD_WHOLE(SUM) _tile_loadd(5, b + k * ldb + SUM * N, ldb * PAIR); _tile_dpbf16ps(SUM, 4, 5);
#define ADD_REST(SUM) _tile_loadd(7, b + k * ldb + SUM * N, ldb * PAIR); _tile_dpbf16ps(SUM, 6, 7);
#define STORE(SUM) _tile_stored(SUM, c + SUM * N, ldc * FLOAT);
  asm volatile("" : : : "memory");  // nor does GCC's _tile_loadd say what it reads
  shape_tiles(depth);
  if (add) { FOR_EACH_SUM(LOAD) } else { FOR_EACH_SUM(CLEAR) }
  long k = 0;
  for (; k + N <= depth; k += N) {
    _tile_loadd(4, a + k, lda * PAIR);
    FOR_EACH_SUM(ADD_WHOLE)
  }
  if (k < depth) {
    _tile_loadd(6, a + k, lda * PAIR);
    FOR_EACH_SUM(ADD_REST)
  }
  FOR_EACH_SUM(STORE)
#undef FOR_EACH_SUM
#undef CLEAR
#undef LOAD
#undef ADD_WHOLE
#undef ADD_REST
#undef STORE
}

// out [columns rounded up][ldout] = in' with in [rows][ld], in squares of 16: ld is a multiple of it, and ldout at least
// the rows rounded up to one. What stands for missing rows is the last row.
inline void transpose(const Pair* in, long rows, long columns, long ld, Pair* out, long ldout) {
  constexpr long N = TILE_SIDE;
  for (long r = 0; r < rows; r += N)
    for (long c = 0; c < columns; c += N) {
      __m512i x[N], y[N];  // x[4 i + j]: of rows 4 i to 4 i + 3, columns j, 4 + j, 8 + j and 12 + j
      for (long i = 0; i < N; i++) y[i] = _mm512_loadu_si512(in + std::min(r + i, rows - 1) * ld + c);
      for (long i = 0; i < N; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(y[i], y[i + 1]), b = _mm512_unpackhi_epi32(y[i], y[i + 1]),
                      p = _mm512_unpacklo_epi32(y[i + 2], y[i + 3]), q = _mm512_unpackhi_epi32(y[i + 2], y[i + 3]);
        x[i] = _mm512_unpacklo_epi64(a, p), x[i + 1] = _mm512_unpackhi_epi64(a, p);
        x[i + 2] = _mm512_unpacklo_epi64(b, q), x[i + 3] = _mm512_unpackhi_epi64(b, q);
      }
      Pair* to = out + c * ldout + r;
      for (long j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), b = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd),
                      p = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88),
                      q = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
        _mm512_storeu_si512(to + j * ldout, _mm512_shuffle_i32x4(a, p, 0x88));
        _mm512_storeu_si512(to + (4 + j) * ldout, _mm512_shuffle_i32x4(b, q, 0x88));
        _mm512_storeu_si512(to + (8 + j) * ldout, _mm512_shuffle_i32x4(a, p, 0xdd));
        _mm512_storeu_si512(to + (12 + j) * ldout, _mm512_shuffle_i32x4(b, q, 0xdd));
      }
    }
}

}  // namespace dense
#endif
