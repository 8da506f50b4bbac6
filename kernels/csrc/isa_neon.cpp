// ARMv8.0 in float32: four byte planes of a table and `tbl` decode 16 weights, `fmla` multiplies four. The order of x is
// that of isa_avx2.cpp.
#include "neon.h"

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace quantserve {
namespace {

struct Neon {
  using Element = float;
  using Acc = Sums<4>;
  using Vec = float32x4x4_t;
  static constexpr int PARTS = 2, LANES = 16, ROWS = 6, HEIGHT = 2, DIRECT = 2, AHEAD = 2048;
  static constexpr int TALL = 4, SHALLOW = 6, SPREAD = 1, CHAINS = 4, COLUMN_DIRECT = 8;
  static constexpr bool COMPUTES = false;

  template <int BITS>
  using Table = FloatTable<BITS>;
  template <int BITS>
  using Wide = FloatTable<BITS>;
  template <int BITS>
  using Codes = NeonCodes<BITS, false>;

  static Acc zero() { return Acc::each([](auto) INLINE { return vdupq_n_f32(0); }); }
  static INLINE void prefetch(const void* at) { prefetch_line(at); }
  static Vec load(const float* from) {
    return {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)};
  }
  static void store(float* to, Vec value) {
    unrolled<4>([&](auto i) INLINE { vst1q_f32(to + 4 * i, value.val[i]); });
  }
  static Acc mac(Acc acc, Vec weights, Vec x) {
    unrolled<4>([&](auto i) INLINE { acc.val[0] = vfmaq_f32(acc.val[0], weights.val[i], x.val[i]); });
    return acc;
  }
  static float32x4_t spread(const float* feature) { return vld1q_dup_f32(feature); }
  static Acc mac(const Acc& acc, Vec weights, float32x4_t x) {
    return Acc::each([&](auto i) INLINE { return vfmaq_f32(acc.val[i], weights.val[i], x); });
  }
  template <int BITS, int J, int P>
  static Vec scaled(const Codes<BITS>& code, const Wide<BITS>& table, const Acc& scale, const Acc& offset) {
    Vec weights = code.template get<J, P>(table);
    unrolled<4>([&](auto i) INLINE { weights.val[i] = vfmaq_f32(offset.val[i], weights.val[i], scale.val[i]); });
    return weights;
  }
  static void add_sums(const Acc& a, const Acc& b, const Acc& c, const Acc& d, float* out) {
    add_four_sums(a.val[0], b.val[0], c.val[0], d.val[0], out);
  }
  static bool same(Float) { return false; }  // whether x is stored as it comes
  static int64_t position(int64_t k) { return (k & ~int64_t(31)) + (k & 1) * 16 + (k & 31) / 2; }
  static void order(const float* from, float* to) {
    for (int i = 0; i < VECTOR; ++i) to[position(i)] = from[i];
  }
  static void add(float* to, float value) { *to += value; }

  // Stored weights are multiplied four at a time: 16 of four channels would leave no registers for the sums.
  template <int M>
  static void multiply(const float* weights, const float* x, int64_t width, float* c, int64_t strip) {
    float32x4_t acc[TILE][M];
    unrolled<TILE * M>([&](auto i) INLINE { acc[i / M][i % M] = vdupq_n_f32(0); });
    for (int64_t i = 0; i < width; i += LANES, weights += TILE * LANES, x += M * LANES) {
      unrolled<4>([&](auto four) INLINE {
        float32x4_t row[TILE];
        unrolled<TILE>([&](auto r) INLINE { row[r] = vld1q_f32(weights + r * LANES + 4 * four); });
        unrolled<M>([&](auto m) INLINE {
          const float32x4_t input = vld1q_f32(x + m * LANES + 4 * four);
          unrolled<TILE>([&](auto r) INLINE { acc[r][m] = vfmaq_f32(acc[r][m], row[r], input); });
        });
      });
    }
    unrolled<M>([&](auto m) INLINE { add_four_sums(acc[0][m], acc[1][m], acc[2][m], acc[3][m], c + m * strip); });
  }
};

}  // namespace

const Kernel neon = Gemm<Neon>::kernel("neon");

bool has_neonbf16() {
#if defined(__linux__)
  constexpr unsigned long BF16 = 1ul << 14;  // HWCAP2_BF16
  return getauxval(AT_HWCAP2) & BF16;
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, nullptr, 0) == 0 && value;
#else
  return false;
#endif
}

}  // namespace quantserve
