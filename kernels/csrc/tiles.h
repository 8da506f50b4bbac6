// Tile registers of AMX as isa_amx.cpp uses them: each holds 16 rows of 64 bytes. Two back ends: the instructions, and with
// QUANTSERVE_EMULATED_TILES plain C++ after the pseudo-code of Intel's manual (SDM volume 2), which tests run on every
// processor. The instructions are written as assembly, because the intrinsics of GCC take no template arguments as numbers
// of registers, and because their loads do not say that they read memory.
#pragma once
#include <cstdint>

#ifdef QUANTSERVE_EMULATED_TILES
#include <cmath>
#include <cstdlib>
#include <cstring>
#endif

namespace quantserve {
namespace {
namespace tiles {

constexpr int ROWS = 16, ROW_BYTES = 64, BYTES = ROWS * ROW_BYTES;

// The operand of LDTILECFG and STTILECFG.
struct alignas(64) Shapes {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Shapes) == 64);

constexpr Shapes whole() {
  Shapes shapes;
  shapes.palette = 1;
  for (int i = 0; i < 8; ++i) {
    shapes.row_bytes[i] = ROW_BYTES;
    shapes.rows[i] = ROWS;
  }
  return shapes;
}

#ifndef QUANTSERVE_EMULATED_TILES

inline void load_shapes(const Shapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void store_shapes(Shapes& shapes) { asm volatile("sttilecfg %0" : "=m"(shapes)); }
inline void release() { asm volatile("tilerelease"); }

template <int T>
void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Rows follow one another in memory.
template <int T>
void load(const void* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t(ROW_BYTES)), "i"(T) : "memory");
}
template <int T>
void store(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t(ROW_BYTES)), "i"(T) : "memory");
}
// C[16, 16] of float32 += A[16, 32] of bfloat16 times B, whose row i holds elements 2i and 2i + 1 of 16 columns.
template <int C, int A, int B>
void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct State {
  Shapes shapes;
  uint8_t tile[8][ROWS][ROW_BYTES];
};
inline thread_local State state{};

// An instruction on a tile that has not this shape is a defect of the kernel; the processor would fault, or shorten rows.
inline void expect_whole(int tile) {
  const Shapes& shapes = state.shapes;
  if (shapes.palette != 1 || shapes.rows[tile] != ROWS || shapes.row_bytes[tile] != ROW_BYTES) std::abort();
}

inline void load_shapes(const Shapes& shapes) {
  state = {};
  state.shapes = shapes;
}
inline void store_shapes(Shapes& shapes) { shapes = state.shapes; }
inline void release() { state = {}; }

template <int T>
void zero() {
  expect_whole(T);
  std::memset(state.tile[T], 0, BYTES);
}
template <int T>
void load(const void* from) {
  expect_whole(T);
  std::memcpy(state.tile[T], from, BYTES);
}
template <int T>
void store(void* to) {
  expect_whole(T);
  std::memcpy(to, state.tile[T], BYTES);
}

// Denormals are zero, as operands and as results.
inline float flushed(float value) { return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.0f, value) : value; }
inline float widened(uint16_t value) {
  const uint32_t word = uint32_t(value) << 16;
  float out;
  std::memcpy(&out, &word, 4);
  return flushed(out);
}

template <int C, int A, int B>
void multiply() {
  expect_whole(C);
  expect_whole(A);
  expect_whole(B);
  uint16_t a[ROWS][32], b[ROWS][32];
  float c[ROWS][16];
  std::memcpy(a, state.tile[A], BYTES);
  std::memcpy(b, state.tile[B], BYTES);
  std::memcpy(c, state.tile[C], BYTES);
  for (int m = 0; m < ROWS; ++m) {
    float sums[32] = {};  // of the even and of the odd elements
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 32; ++n) {
        sums[n] = flushed(std::fma(widened(a[m][2 * k + n % 2]), widened(b[k][n]), sums[n]));
      }
    }
    for (int n = 0; n < 16; ++n) c[m][n] = flushed(flushed(c[m][n]) + flushed(sums[2 * n] + sums[2 * n + 1]));
  }
  std::memcpy(state.tile[C], c, BYTES);
}

#endif

// Whole tiles in this thread while it lives. What another library configured before is back afterwards: some configure
// tiles once and look at each call whether that still holds. Contents of tiles are lost, as by any call.
class Whole {
 public:
  Whole() {
    store_shapes(before_);
    load_shapes(SHAPES);
  }
  ~Whole() {
    if (before_.palette) load_shapes(before_);
    else release();  // the processor may save power again, and the system need not save 8 KiB at a switch of threads
  }
  Whole(const Whole&) = delete;
  Whole& operator=(const Whole&) = delete;

 private:
  static constexpr Shapes SHAPES = whole();
  Shapes before_;
};

}  // namespace tiles
}  // namespace
}  // namespace quantserve
