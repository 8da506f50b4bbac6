// What both ARM kernels share: registers of sums, the codes of 16 words as 16 bytes, and tables of 16 entries that these
// index. Tables are stored by *planes* (byte 0 of all entries, byte 1 of all entries, ...), so that one `tbl` looks up a
// byte of 16 weights.
#pragma once
#include <arm_neon.h>

#include "gemm.h"

namespace quantserve {
namespace {

// The sums of 4 N channels of columns. A row has one channel and takes the first register.
template <int N>
struct Sums {
  float32x4_t val[N];

  template <class Body>
  static INLINE Sums each(Body&& body) {
    Sums out;
    unrolled<N>([&](auto i) INLINE { out.val[i] = body(i); });
    return out;
  }
  Sums operator-() const { return each([&](auto i) INLINE { return -val[i]; }); }
  Sums operator+(float b) const { return each([&](auto i) INLINE { return val[i] + b; }); }
  Sums operator*(float b) const { return each([&](auto i) INLINE { return val[i] * b; }); }
  Sums operator*(const Sums& b) const { return each([&](auto i) INLINE { return val[i] * b.val[i]; }); }
  Sums& operator+=(const Sums& b) { return *this = each([&](auto i) INLINE { return val[i] + b.val[i]; }); }
  Sums& operator-=(const Sums& b) { return *this = each([&](auto i) INLINE { return val[i] - b.val[i]; }); }
};

// Part P of a vector is 16 words: with PAIRS words 16 P + i, of columns both features of eight channels; else words
// 2 i + P, of columns one feature of all channels.
template <int BITS, bool PAIRS>
struct NeonCodes {
  const uint8_t* from;

  explicit NeonCodes(const uint8_t* at) : from(at) {}

  template <int J, int P, class Table>
  INLINE auto get(const Table& table) const {
    if constexpr (BITS == 8) return table.template at<PAIRS ? 2 : 4>(from + (PAIRS ? 32 : 2) * P + J);
    else return table.at(index<J, P>());
  }

 private:
  // The low or the high bytes of part P.
  template <int P, int HIGH>
  uint8x16_t bytes(int load) const {
    if constexpr (PAIRS) return vld2q_u8(from + 64 * load + 32 * P).val[HIGH];
    else return vld4q_u8(from + 64 * load).val[2 * P + HIGH];
  }

  // Codes of vector J. `tbl` gives 0 beyond 16 entries, so more than four bits are masked.
  template <int J, int P>
  INLINE uint8x16_t index() const {
    if constexpr (BITS == 3 && J == 15) {  // the top bits of three words, the last one first
      return vshrq_n_u8(vsriq_n_u8(vsriq_n_u8(bytes<P, 1>(2), bytes<P, 1>(1), 1), bytes<P, 1>(0), 2), 5);
    } else {
      constexpr int LOAD = BITS == 3 ? J / 5 : 0, SHIFT = BITS == 3 ? 3 * (J % 5) : BITS * J;
      if constexpr (SHIFT == 6 && BITS == 3) {  // across the bytes of a word
        return four_bits<0>(vsliq_n_u8(vshrq_n_u8(bytes<P, 0>(LOAD), 6), bytes<P, 1>(LOAD), 2));
      } else {
        return four_bits<SHIFT % 8>(bytes<P, SHIFT / 8>(LOAD));
      }
    }
  }

  template <int SHIFT>
  static uint8x16_t four_bits(uint8x16_t bytes) {
    if constexpr (SHIFT > 0) bytes = vshrq_n_u8(bytes, SHIFT);
    return SHIFT < 4 ? vandq_u8(bytes, vdupq_n_u8(15)) : bytes;
  }
};

// Entries 4 I to 4 I + 3 of a table that is repeated up to 16 entries.
template <int BITS, int I>
inline float32x4_t four_entries(const float* table) {
  return vld1q_f32(table + (4 * I & ((1 << BITS) - 1)));
}

template <int BITS>
struct FloatTable {
  uint8x16_t plane[4];

  void set(const float* from) {
    const uint8x16_t a = bytes<0>(from), b = bytes<1>(from), c = bytes<2>(from), d = bytes<3>(from);
    const uint8x16_t ab = vuzp1q_u8(a, b), cd = vuzp1q_u8(c, d);  // bytes 0 and 2
    const uint8x16_t ab_odd = vuzp2q_u8(a, b), cd_odd = vuzp2q_u8(c, d);
    plane[0] = vuzp1q_u8(ab, cd);
    plane[1] = vuzp1q_u8(ab_odd, cd_odd);
    plane[2] = vuzp2q_u8(ab, cd);
    plane[3] = vuzp2q_u8(ab_odd, cd_odd);
  }
  template <int I>
  static uint8x16_t bytes(const float* from) {
    return vreinterpretq_u8_f32(four_entries<BITS, I>(from));
  }
  float32x4x4_t at(uint8x16_t index) const {
    const uint8x16_t a = vqtbl1q_u8(plane[0], index), b = vqtbl1q_u8(plane[1], index);
    const uint8x16_t c = vqtbl1q_u8(plane[2], index), d = vqtbl1q_u8(plane[3], index);
    const uint16x8_t low = vreinterpretq_u16_u8(vzip1q_u8(a, b)), high = vreinterpretq_u16_u8(vzip1q_u8(c, d));
    const uint16x8_t low2 = vreinterpretq_u16_u8(vzip2q_u8(a, b)), high2 = vreinterpretq_u16_u8(vzip2q_u8(c, d));
    return {vreinterpretq_f32_u16(vzip1q_u16(low, high)), vreinterpretq_f32_u16(vzip2q_u16(low, high)),
            vreinterpretq_f32_u16(vzip1q_u16(low2, high2)), vreinterpretq_f32_u16(vzip2q_u16(low2, high2))};
  }
};

// 256 entries are read one by one. The codes are STEP bytes apart.
template <>
struct FloatTable<8> {
  const float* entries;

  void set(const float* from) { entries = from; }
  template <int STEP>
  float32x4x4_t at(const uint8_t* codes) const {
    const auto four = [&](int i) INLINE {
      const uint8_t* code = codes + 4 * STEP * i;
      return float32x4_t{entries[code[0]], entries[code[STEP]], entries[code[2 * STEP]], entries[code[3 * STEP]]};
    };
    return {four(0), four(1), four(2), four(3)};
  }
};

inline INLINE void prefetch_line(const void* at) { __builtin_prefetch(at); }

// out[i] += the sum of the lanes of the i-th.
inline void add_four_sums(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d, float* out) {
  vst1q_f32(out, vaddq_f32(vld1q_f32(out), vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))));
}

}  // namespace
}  // namespace quantserve
