// Decoding and multiplying with AVX-512-BF16: a bfloat16 codebook in one register, `vpermw` to decode 32 weights, `vdpbf16ps`
// to multiply them. isa_amx.cpp decodes with it too.
#pragma once
#include <immintrin.h>

#include "gemm.h"

namespace quantserve {
namespace {

struct Avx512Bf16 {
  using Element = uint16_t;
  using Acc = __m512;
  using Vec = __m512i;
  static constexpr int PARTS = 1, LANES = 32, ROWS = 6, HEIGHT = 4, DIRECT = 32, AHEAD = 8192;
  static constexpr int TALL = 8, SHALLOW = 6, SPREAD = 4, CHAINS = 12, COLUMN_DIRECT = 32;
  static constexpr bool COMPUTES = false;

  template <int BITS>
  struct Table {
    __m512i entries;

    void set(const float* from) { entries = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(load<BITS>(from))); }
    __m512i operator[](__m512i index) const { return _mm512_permutexvar_epi16(index, entries); }
  };

  // The same in float32, for weights that are scaled before they are rounded.
  template <int BITS>
  struct Wide {
    __m512 entries;

    void set(const float* from) { entries = load<BITS>(from); }
    __m512 even(__m512i index) const { return _mm512_permutexvar_ps(index, entries); }
    __m512 odd(__m512i index) const { return _mm512_permutexvar_ps(_mm512_srli_epi32(index, 16), entries); }
  };

  template <int BITS>
  static __m512 load(const float* from) {
    if constexpr (BITS == 4) return _mm512_loadu_ps(from);
    if constexpr (BITS == 3) return _mm512_broadcast_f32x8(_mm256_loadu_ps(from));
    return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
  }

  template <int BITS>
  struct Codes {
    __m512i words[BITS == 3 ? 3 : 1];

    explicit Codes(const uint8_t* from) {
      for (int i = 0; i < (BITS == 3 ? 3 : 1); ++i) words[i] = _mm512_loadu_si512(from + 64 * i);
    }
    // The codes of vector J, with other bits above them.
    template <int J>
    __m512i index() const {
      if constexpr (BITS != 3) return _mm512_srli_epi16(words[0], BITS * J);
      if constexpr (BITS == 3 && J < 15) return _mm512_srli_epi16(words[J / 5], 3 * (J % 5));
      // Bit 0 of the first word's top bit, bits 1 and 2 of the others': (a & mask) | b is ternary logic 0xec.
      const __m512i middle = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words[BITS == 3 ? 1 : 0], 14),
                                                       _mm512_srli_epi16(words[0], 15), _mm512_set1_epi16(2), 0xec);
      return _mm512_ternarylogic_epi32(_mm512_srli_epi16(words[BITS == 3 ? 2 : 0], 13), middle, _mm512_set1_epi16(4),
                                       0xec);
    }
    template <int J, int P>
    __m512i get(const Table<BITS>& table) const {
      if constexpr (BITS == 8) return table.template at<J>(words[0]);
      else return table[index<J>()];
    }
  };

  // Vector J of columns, scaled in float32.
  template <int BITS, int J, int P>
  static __m512i scaled(const Codes<BITS>& code, const Wide<BITS>& table, __m512 scale, __m512 offset) {
    __m512 even, odd;
    if constexpr (BITS == 8) {
      const __m512i both = table.template at<J>(code.words[0]);
      even = (__m512)_mm512_slli_epi32(both, 16);
      odd = (__m512)_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000)));
    } else {
      const __m512i index = code.template index<J>();
      even = table.even(index);
      odd = table.odd(index);
    }
    even = _mm512_fmadd_ps(even, scale, offset);
    odd = _mm512_fmadd_ps(odd, scale, offset);
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
  }

  static __m512 zero() { return _mm512_setzero_ps(); }
  static INLINE void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }
  static __m512i load(const uint16_t* from) { return _mm512_loadu_si512(from); }
  static void store(uint16_t* to, __m512i value) { _mm512_storeu_si512(to, value); }
  static __m512 mac(__m512 acc, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)weights, (__m512bh)x);
  }
  static __m512i spread(const uint16_t* pair) {
    int32_t both;
    std::memcpy(&both, pair, sizeof both);
    return _mm512_set1_epi32(both);
  }
  static void add_sums(__m512 a, __m512 b, __m512 c, __m512 d, float* out) {
    const __m256 low = _mm256_hadd_ps(halves(a), halves(b)), high = _mm256_hadd_ps(halves(c), halves(d));
    const __m256 all = _mm256_hadd_ps(low, high);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
  }
  static __m256 halves(__m512 a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
  static bool same(Float type) { return type == Float::bf16; }  // whether x is stored as it comes
  static int64_t position(int64_t k) { return k; }
  static void order(const float* from, uint16_t* to) {
    for (int i = 0; i < VECTOR; ++i) to[i] = float_to_bf16(from[i]);
  }
  static void add(uint16_t* to, float value) { *to = float_to_bf16(bf16_to_float(*to) + value); }
};

// 256 entries are eight registers: the low bytes of all entries, and the high ones. Four two-register permutations of
// bytes look up the low seven bits of 64 codes, the top bit chooses among them. Both vectors of a block share that.
template <>
struct Avx512Bf16::Table<8> {
  __m512i low[4], high[4];

  void set(const float* from) {
    for (int i = 0; i < 4; ++i) {
      const __m512i first = words(from + 64 * i), second = words(from + 64 * i + 32);
      low[i] = bytes(first, second);
      high[i] = bytes(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
    }
  }
  template <int J>
  __m512i at(__m512i codes) const {
    const __m512i below = look_up(low, codes), above = look_up(high, codes);
    const __m512i even = J ? _mm512_srli_epi16(below, 8) : below, odd = J ? above : _mm512_slli_epi16(above, 8);
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, odd);
  }

 private:
  static __m512i words(const float* from) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
  }
  static __m512i bytes(__m512i first, __m512i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(first)), _mm512_cvtepi16_epi8(second), 1);
  }
  static __m512i look_up(const __m512i* table, __m512i codes) {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                  _mm512_permutex2var_epi8(table[2], codes, table[3]));
  }
};

// Of eight bits, tables in use are exact in bfloat16: integers and 8-bit floats.
template <>
struct Avx512Bf16::Wide<8> : Table<8> {};

}  // namespace
}  // namespace quantserve
