// AMX for processors that have AVX512_BF16 but no matrix unit: the compiler takes this file before the kernels. Ends the
// process where the unit would raise an error: at registers without shapes, and at products of shapes that do not fit.
// What it cannot see is tiles that stay loaded after a kernel; on a real unit torch's products then fail (test_bf16.py).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define MAY_USE_AMX

namespace amx {

struct Shapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
inline thread_local Shapes shapes = {};
inline thread_local float registers[8][16][16];  // or pairs of bfloat16

inline void demand(bool fits, const char* what) {
  if (fits) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline void load_shapes(const void* from) {
  std::memcpy(&shapes, from, sizeof shapes);
  std::memset(registers, 0, sizeof registers);
}
inline void release() { shapes = {}; }

inline void demand_shape(int of) {
  demand(shapes.palette == 1 && shapes.rows[of] && shapes.row_bytes[of], "a register without a shape");
}

inline void zero(int to) {
  demand_shape(to);
  std::memset(registers[to], 0, sizeof registers[to]);
}
inline void load(int to, const void* from, long stride) {
  zero(to);
  for (int i = 0; i < shapes.rows[to]; i++)
    std::memcpy(registers[to][i], static_cast<const char*>(from) + i * stride, shapes.row_bytes[to]);
}
inline void store(int from, void* to, long stride) {
  demand_shape(from);
  for (int i = 0; i < shapes.rows[from]; i++)
    std::memcpy(static_cast<char*>(to) + i * stride, registers[from][i], shapes.row_bytes[from]);
}

inline float number(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline void multiply(int sum, int left, int right) {
  for (int of : {sum, left, right}) demand_shape(of);
  demand(shapes.rows[sum] == shapes.rows[left] && shapes.row_bytes[sum] == shapes.row_bytes[right] &&
             shapes.row_bytes[left] == 4 * shapes.rows[right],
         "shapes that do not fit");
  for (int i = 0; i < shapes.rows[sum]; i++)
    for (int k = 0; k < shapes.rows[right]; k++)
      for (int j = 0; j < shapes.row_bytes[sum] / 4; j++) {
        uint32_t a, b;
        std::memcpy(&a, &registers[left][i][k], sizeof a);
        std::memcpy(&b, &registers[right][k][j], sizeof b);
        registers[sum][i][j] += number(a << 16) * number(b << 16);
        registers[sum][i][j] += number(a & 0xffff0000u) * number(b & 0xffff0000u);
      }
}

}  // namespace amx

#define _tile_loadconfig amx::load_shapes
#define _tile_release amx::release
#define _tile_zero amx::zero
#define _tile_loadd amx::load
#define _tile_stored amx::store
#define _tile_dpbf16ps amx::multiply
