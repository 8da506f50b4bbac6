// ARMv8.6's bfloat16: two byte planes of a bfloat16 table and `tbl` decode 16 weights, `bfdot` multiplies eight. Beside
// stored weights `bfmmla` multiplies four features of two channels by those of two rows of x.
#include "neon.h"

namespace quantserve {
namespace {

struct NeonBf16 {
  using Element = uint16_t;
  using Acc = Sums<2>;
  using Vec = bfloat16x8x2_t;
  static constexpr int PARTS = 2, LANES = 16, GRAIN = 4, ROWS = 16, HEIGHT = 4, DIRECT = 4, AHEAD = 4096;
  static constexpr int TALL = 4, SHALLOW = 8, SPREAD = 1, CHAINS = 8, COLUMN_DIRECT = 8;
  static constexpr bool COMPUTES = false;

  static bfloat16x8_t rounded(float32x4_t low, float32x4_t high) {
    return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high);
  }
  static Vec rounded(const float32x4x4_t& from) {
    return {rounded(from.val[0], from.val[1]), rounded(from.val[2], from.val[3])};
  }

  template <int BITS>
  struct Table {
    uint8x16_t low, high;

    void set(const float* from) {
      const Vec all = rounded({four_entries<BITS, 0>(from), four_entries<BITS, 1>(from), four_entries<BITS, 2>(from),
                               four_entries<BITS, 3>(from)});
      const uint8x16_t first = vreinterpretq_u8_bf16(all.val[0]), second = vreinterpretq_u8_bf16(all.val[1]);
      low = vuzp1q_u8(first, second);
      high = vuzp2q_u8(first, second);
    }
    Vec at(uint8x16_t index) const {
      const uint8x16_t a = vqtbl1q_u8(low, index), b = vqtbl1q_u8(high, index);
      return {vreinterpretq_bf16_u8(vzip1q_u8(a, b)), vreinterpretq_bf16_u8(vzip2q_u8(a, b))};
    }
  };

  // The same in float32, for weights that are scaled before they are rounded.
  template <int BITS>
  using Wide = FloatTable<BITS>;
  template <int BITS>
  using Codes = NeonCodes<BITS, true>;

  static Acc zero() { return Acc::each([](auto) INLINE { return vdupq_n_f32(0); }); }
  static INLINE void prefetch(const void* at) { prefetch_line(at); }
  static bfloat16x8_t load_eight(const uint16_t* from) { return vreinterpretq_bf16_u16(vld1q_u16(from)); }
  static Vec load(const uint16_t* from) { return {load_eight(from), load_eight(from + 8)}; }
  static void store(uint16_t* to, Vec value) {
    unrolled<2>([&](auto i) INLINE { vst1q_u16(to + 8 * i, vreinterpretq_u16_bf16(value.val[i])); });
  }
  // The weights of a row of a tile, whose rows alternate.
  static void store_row(uint16_t* to, Vec value) {
    unrolled<2>([&](auto i) INLINE {
      const uint16x8_t eight = vreinterpretq_u16_bf16(value.val[i]);
      vst1_u16(to + 2 * i * TILE * GRAIN, vget_low_u16(eight));
      vst1_u16(to + (2 * i + 1) * TILE * GRAIN, vget_high_u16(eight));
    });
  }
  static Acc mac(Acc acc, Vec weights, Vec x) {
    unrolled<2>([&](auto i) INLINE { acc.val[0] = vbfdotq_f32(acc.val[0], weights.val[i], x.val[i]); });
    return acc;
  }
  // Two features of x in the first lane, which `bfdot` spreads itself.
  static bfloat16x4_t spread(const uint16_t* pair) {
    uint32_t both;
    std::memcpy(&both, pair, sizeof both);
    return vcreate_bf16(both);
  }
  static Acc mac(const Acc& acc, Vec weights, bfloat16x4_t x) {
    return Acc::each([&](auto i) INLINE { return vbfdotq_lane_f32(acc.val[i], weights.val[i], x, 0); });
  }
  // Part P of vector J of columns, scaled in float32.
  template <int BITS, int J, int P>
  static Vec scaled(const Codes<BITS>& code, const Wide<BITS>& table, const Acc& scale, const Acc& offset) {
    float32x4x4_t weights = code.template get<J, P>(table);
    unrolled<4>([&](auto i) INLINE {
      const auto twice = [&](float32x4_t four) INLINE {
        return i % 2 ? vzip2q_f32(four, four) : vzip1q_f32(four, four);
      };
      weights.val[i] = vfmaq_f32(twice(offset.val[i / 2]), weights.val[i], twice(scale.val[i / 2]));
    });
    return rounded(weights);
  }
  static void add_sums(const Acc& a, const Acc& b, const Acc& c, const Acc& d, float* out) {
    add_four_sums(a.val[0], b.val[0], c.val[0], d.val[0], out);
  }
  static bool same(Float type) { return type == Float::bf16; }  // whether x is stored as it comes
  static int64_t position(int64_t k) { return k; }
  static void order(const float* from, uint16_t* to) {
    for (int i = 0; i < VECTOR; i += 8) {
      vst1q_u16(to + i, vreinterpretq_u16_bf16(rounded(vld1q_f32(from + i), vld1q_f32(from + i + 4))));
    }
  }
  static void add(uint16_t* to, float value) { *to = float_to_bf16(bf16_to_float(*to) + value); }

  // A sum's four lanes are two channels times two rows of x. The last of an odd number of rows is paired with zeros.
  template <int M>
  static void multiply(const uint16_t* weights, const uint16_t* x, int64_t width, float* c, int64_t strip) {
    constexpr int PAIRS = (M + 1) / 2;
    float32x4_t first[PAIRS], second[PAIRS];  // channels 0 and 1, 2 and 3
    unrolled<PAIRS>([&](auto p) INLINE { first[p] = second[p] = vdupq_n_f32(0); });
    for (int64_t i = 0; i < width; i += GRAIN, weights += TILE * GRAIN, x += M * GRAIN) {
      const bfloat16x8_t upper = load_eight(weights), lower = load_eight(weights + 2 * GRAIN);
      unrolled<PAIRS>([&](auto p) INLINE {
        bfloat16x8_t rows;
        if constexpr (2 * p + 1 < M) rows = load_eight(x + 2 * p * GRAIN);
        else rows = vreinterpretq_bf16_u16(vcombine_u16(vld1_u16(x + 2 * p * GRAIN), vdup_n_u16(0)));
        first[p] = vbfmmlaq_f32(first[p], rows, upper);
        second[p] = vbfmmlaq_f32(second[p], rows, lower);
      });
    }
    unrolled<PAIRS>([&](auto p) INLINE {
      const auto add_row = [&](int m, float32x2_t upper, float32x2_t lower) {
        float* to = c + m * strip;
        vst1q_f32(to, vaddq_f32(vld1q_f32(to), vcombine_f32(upper, lower)));
      };
      add_row(2 * p, vget_low_f32(first[p]), vget_low_f32(second[p]));
      if (2 * p + 1 < M) add_row(2 * p + 1, vget_high_f32(first[p]), vget_high_f32(second[p]));
    });
  }

  // The same for columns, whose features lie two by two: `zip` joins four. Eight channels at a time, for the registers.
  template <int M>
  static void multiply_columns(const uint16_t* weights, const uint16_t* x, int64_t features, float* c, int64_t width) {
    multiply_eight<M>(weights, x, features, c, width);
    multiply_eight<M>(weights + VECTOR / 2, x, features, c + COLUMNS / 2, width);
  }

  template <int M>
  static void multiply_eight(const uint16_t* weights, const uint16_t* x, int64_t features, float* c, int64_t width) {
    constexpr int PAIRS = (M + 1) / 2;
    float32x4_t acc[4][PAIRS];  // by two channels and two rows
    unrolled<4 * PAIRS>([&](auto i) INLINE { acc[i / PAIRS][i % PAIRS] = vdupq_n_f32(0); });
    for (int64_t k = 0; k < features; k += 4, weights += 2 * VECTOR, x += 4 * M) {
      bfloat16x8_t rows[PAIRS];
      unrolled<PAIRS>([&](auto p) INLINE { rows[p] = four_features<p % 2>(x_of<M, p>(x), x_of<M, p>(x + 2 * M)); });
      unrolled<4>([&](auto i) INLINE {
        const uint16_t* from = weights + i / 2 * 8;
        const bfloat16x8_t channels = four_features<i % 2>(load_eight(from), load_eight(from + VECTOR));
        unrolled<PAIRS>([&](auto p) INLINE { acc[i][p] = vbfmmlaq_f32(acc[i][p], rows[p], channels); });
      });
    }
    unrolled<2 * PAIRS>([&](auto at) INLINE {
      constexpr int p = at / 2, i = at % 2 * 2;
      const auto add_four = [&](int m, float32x2_t low, float32x2_t high) {
        float* to = c + m * width + 2 * i;
        vst1q_f32(to, vaddq_f32(vld1q_f32(to), vcombine_f32(low, high)));
      };
      add_four(2 * p, vget_low_f32(acc[i][p]), vget_low_f32(acc[i + 1][p]));
      if (2 * p + 1 < M) add_four(2 * p + 1, vget_high_f32(acc[i][p]), vget_high_f32(acc[i + 1][p]));
    });
  }

  // Lanes 2 HIGH and 2 HIGH + 1 of two registers of feature pairs, each with the pair that follows it.
  template <int HIGH>
  static bfloat16x8_t four_features(bfloat16x8_t first, bfloat16x8_t second) {
    const uint32x4_t a = vreinterpretq_u32_bf16(first), b = vreinterpretq_u32_bf16(second);
    return vreinterpretq_bf16_u32(HIGH ? vzip2q_u32(a, b) : vzip1q_u32(a, b));
  }

  // Two features of rows 2 P and 2 P + 1 of M, in the half that four_features<P % 2> takes.
  template <int M, int P>
  static bfloat16x8_t x_of(const uint16_t* x) {
    if constexpr (4 * (P / 2) + 4 <= M) return load_eight(x + 8 * (P / 2));
    bfloat16x4_t rows;
    if constexpr (2 * P + 1 < M) rows = vreinterpret_bf16_u16(vld1_u16(x + 4 * P));
    else rows = spread(x + 4 * P);
    return P % 2 ? vcombine_bf16(vcreate_bf16(0), rows) : vcombine_bf16(rows, vcreate_bf16(0));
  }
};

template <>
struct NeonBf16::Table<8> : FloatTable<8> {
  template <int STEP>
  Vec at(const uint8_t* codes) const {
    return rounded(FloatTable<8>::at<STEP>(codes));
  }
};

}  // namespace

const Kernel neonbf16 = Gemm<NeonBf16>::kernel("neonbf16");

}  // namespace quantserve
