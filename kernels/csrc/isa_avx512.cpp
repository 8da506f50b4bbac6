// AVX-512F in float32: `vpermps` decodes 16 weights. Serves float32 and float16 activations, and processors without
// bfloat16 dot products. A 32-bit lane holds two words, so even and odd input features are decoded in turn and x is
// prepared in that order.
#include <immintrin.h>

#include "gemm.h"

namespace quantserve {
namespace {

struct Avx512 {
  using Element = float;
  using Acc = __m512;
  using Vec = __m512;
  static constexpr int PARTS = 2, LANES = 16, ROWS = 6, HEIGHT = 4, DIRECT = 8, AHEAD = 4096;
  static constexpr int TALL = 8, SHALLOW = 6, SPREAD = 4, CHAINS = 12, COLUMN_DIRECT = 16;
  static constexpr bool COMPUTES = true;

  template <int BITS>
  struct Table {
    __m512 entries;

    void set(const float* from) {
      if constexpr (BITS == 4) entries = _mm512_loadu_ps(from);
      if constexpr (BITS == 3) entries = _mm512_broadcast_f32x8(_mm256_loadu_ps(from));
      if constexpr (BITS == 2) entries = _mm512_broadcast_f32x4(_mm_loadu_ps(from));
    }
    __m512 operator[](__m512i index) const { return _mm512_permutexvar_ps(index, entries); }
  };

  template <int BITS>
  using Wide = Table<BITS>;

  template <int BITS>
  struct Codes {
    __m512i words[BITS == 3 ? 3 : 1];

    explicit Codes(const uint8_t* from) {
      for (int i = 0; i < (BITS == 3 ? 3 : 1); ++i) words[i] = _mm512_loadu_si512(from + 64 * i);
    }
    template <int J, int P>
    __m512 get(const Table<BITS>& table) const {
      if constexpr (BITS == E4M3) return table.template at<J, P>(words[0]);
      else if constexpr (BITS != 3) return table[_mm512_srli_epi32(words[0], (BITS < 8 ? BITS : 8) * J + 16 * P)];
      else return three<J, P>(table);
    }
    template <int J, int P>
    __m512 three(const Table<BITS>& table) const {
      if constexpr (J < 15) return table[_mm512_srli_epi32(words[J / 5], 3 * (J % 5) + 16 * P)];
      // What a shift brings down from the lane's other word is masked off before the next bit is added.
      const __m512i first = _mm512_and_si512(_mm512_srli_epi32(words[0], 15 + 16 * P), _mm512_set1_epi32(1));
      const __m512i second =
          _mm512_ternarylogic_epi32(_mm512_srli_epi32(words[1], 14 + 16 * P), first, _mm512_set1_epi32(2), 0xec);
      return table[_mm512_ternarylogic_epi32(_mm512_srli_epi32(words[2], 13 + 16 * P), second, _mm512_set1_epi32(4),
                                             0xec)];
    }
  };

  static __m512 zero() { return _mm512_setzero_ps(); }
  static INLINE void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }
  static __m512 load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, __m512 value) { _mm512_storeu_ps(to, value); }
  static __m512 mac(__m512 acc, __m512 weights, __m512 x) { return _mm512_fmadd_ps(weights, x, acc); }
  static __m512 spread(const float* feature) { return _mm512_set1_ps(*feature); }
  template <int BITS, int J, int P>
  static __m512 scaled(const Codes<BITS>& code, const Table<BITS>& table, __m512 scale, __m512 offset) {
    return _mm512_fmadd_ps(code.template get<J, P>(table), scale, offset);
  }
  static void add_sums(__m512 a, __m512 b, __m512 c, __m512 d, float* out) {
    out[0] += _mm512_reduce_add_ps(a);
    out[1] += _mm512_reduce_add_ps(b);
    out[2] += _mm512_reduce_add_ps(c);
    out[3] += _mm512_reduce_add_ps(d);
  }
  static bool same(Float) { return false; }  // whether x is stored as it comes
  static int64_t position(int64_t k) { return (k & ~int64_t(31)) + (k & 1) * 16 + (k & 31) / 2; }
  static void order(const float* from, float* to) {
    for (int i = 0; i < VECTOR; ++i) to[position(i)] = from[i];
  }
  static void add(float* to, float value) { *to += value; }
};

template <>
struct Avx512::Table<8> {
  const float* entries;

  void set(const float* from) { entries = from; }
  __m512 operator[](__m512i index) const {
    return _mm512_i32gather_ps(_mm512_and_si512(index, _mm512_set1_epi32(255)), entries, 4);
  }
};

// Integers as the last bits of 2^23.
template <>
struct Avx512::Table<INTEGERS> {
  __m512i bits;
  __m512 offset;

  void set(const float* from) {
    const bool flips = from[128] < from[0];
    bits = _mm512_set1_epi32(0x4b000000 | (flips ? 128 : 0));
    offset = _mm512_set1_ps(8388608.0f - (flips ? from[128] : from[0]));
  }
  __m512 operator[](__m512i index) const {  // (index & 255) ^ bits is ternary logic 0x6a
    return _mm512_sub_ps((__m512)_mm512_ternarylogic_epi32(index, _mm512_set1_epi32(255), bits, 0x6a), offset);
  }
};

template <>
struct Avx512::Table<E4M3> {
  void set(const float*) {}
  // Feature P of 16 channels, byte J of their words: E4M3 as float16 with the same bits.
  template <int J, int P>
  __m512 at(__m512i words) const {
    const __m128i high =
        _mm_setr_epi8(-1, J, -1, 4 + J, -1, 8 + J, -1, 12 + J, -1, 2 + J, -1, 6 + J, -1, 10 + J, -1, 14 + J);
    const __m512i codes = _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(high));
    const __m512i halves = _mm512_and_si512(_mm512_srai_epi16(codes, 1), _mm512_set1_epi16(int16_t(0xbfff)));
    const __m512i features = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), halves);
    return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(features, P));
  }
};

}  // namespace

const Kernel avx512 = Gemm<Avx512>::kernel("avx512");

}  // namespace quantserve
