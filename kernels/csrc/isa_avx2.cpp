// AVX2 and FMA in float32: `vpermps` looks up 8 entries, two of them and a blend 16. The order of x is that of
// isa_avx512.cpp: even features of a vector first, then the odd ones.
#include <immintrin.h>

#include "gemm.h"

namespace quantserve {
namespace {

struct Avx2 {
  using Element = float;
  using Acc = __m256;
  using Vec = __m256;
  static constexpr int PARTS = 4, LANES = 8, ROWS = 2, HEIGHT = 2, DIRECT = 2, AHEAD = 2048;
  static constexpr int TALL = 4, SHALLOW = 4, SPREAD = 1, CHAINS = 8, COLUMN_DIRECT = 8;
  static constexpr bool COMPUTES = true;

  template <int BITS>
  struct Table {
    __m256 low, high;

    void set(const float* from) {
      low = BITS == 2 ? _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)) : _mm256_loadu_ps(from);
      if constexpr (BITS == 4) high = _mm256_loadu_ps(from + 8);
    }
    // The code's bits start at bit SHIFT of each lane.
    template <int SHIFT>
    __m256 at(__m256i lanes) const {
      const __m256i index = _mm256_srli_epi32(lanes, SHIFT);
      const __m256 first = _mm256_permutevar8x32_ps(low, index);
      if constexpr (BITS == 4) {
        const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28 - SHIFT));  // bit 3 becomes the sign
        return _mm256_blendv_ps(first, _mm256_permutevar8x32_ps(high, index), top);
      }
      return first;
    }
  };

  template <int BITS>
  using Wide = Table<BITS>;

  template <int BITS>
  struct Codes {
    const uint8_t* from;

    explicit Codes(const uint8_t* at) : from(at) {}
    template <int HALF>
    __m256i word(int i) const {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 64 * i + 32 * HALF));
    }
    template <int J, int P>
    __m256 get(const Table<BITS>& table) const {
      constexpr int HALF = P % 2, ODD = 16 * (P / 2);
      if constexpr (BITS == E4M3) return table.template at<J, P / 2>(word<HALF>(0));
      else if constexpr (BITS != 3) return table.template at<(BITS < 8 ? BITS : 8) * J + ODD>(word<HALF>(0));
      else return three<J, HALF, ODD>(table);
    }
    template <int J, int HALF, int ODD>
    __m256 three(const Table<BITS>& table) const {
      if constexpr (J < 15) return table.template at<3 * (J % 5) + ODD>(word<HALF>(J / 5));
      const __m256i first = _mm256_and_si256(_mm256_srli_epi32(word<HALF>(0), 15 + ODD), _mm256_set1_epi32(1));
      const __m256i second = _mm256_and_si256(_mm256_srli_epi32(word<HALF>(1), 14 + ODD), _mm256_set1_epi32(2));
      const __m256i third = _mm256_and_si256(_mm256_srli_epi32(word<HALF>(2), 13 + ODD), _mm256_set1_epi32(4));
      return table.template at<0>(_mm256_or_si256(_mm256_or_si256(first, second), third));
    }
  };

  static __m256 zero() { return _mm256_setzero_ps(); }
  static INLINE void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }
  static __m256 load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, __m256 value) { _mm256_storeu_ps(to, value); }
  static __m256 mac(__m256 acc, __m256 weights, __m256 x) { return _mm256_fmadd_ps(weights, x, acc); }
  static __m256 spread(const float* feature) { return _mm256_set1_ps(*feature); }
  template <int BITS, int J, int P>
  static __m256 scaled(const Codes<BITS>& code, const Table<BITS>& table, __m256 scale, __m256 offset) {
    return _mm256_fmadd_ps(code.template get<J, P>(table), scale, offset);
  }
  static void add_sums(__m256 a, __m256 b, __m256 c, __m256 d, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
  }
  static bool same(Float) { return false; }  // whether x is stored as it comes
  static int64_t position(int64_t k) { return (k & ~int64_t(31)) + (k & 1) * 16 + (k & 31) / 2; }
  static void order(const float* from, float* to) {
    for (int i = 0; i < VECTOR; ++i) to[position(i)] = from[i];
  }
  static void add(float* to, float value) { *to += value; }
};

template <>
struct Avx2::Table<8> {
  const float* entries;

  void set(const float* from) { entries = from; }
  template <int SHIFT>
  __m256 at(__m256i lanes) const {
    const __m256i index = _mm256_and_si256(_mm256_srli_epi32(lanes, SHIFT), _mm256_set1_epi32(255));
    return _mm256_i32gather_ps(entries, index, 4);
  }
};

// Integers as the last bits of 2^23.
template <>
struct Avx2::Table<INTEGERS> {
  __m256i bits;
  __m256 offset;

  void set(const float* from) {
    const bool flips = from[128] < from[0];
    bits = _mm256_set1_epi32(0x4b000000 | (flips ? 128 : 0));
    offset = _mm256_set1_ps(8388608.0f - (flips ? from[128] : from[0]));
  }
  template <int SHIFT>
  __m256 at(__m256i lanes) const {
    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(lanes, SHIFT), _mm256_set1_epi32(255));
    return _mm256_sub_ps(_mm256_castsi256_ps(_mm256_xor_si256(code, bits)), offset);
  }
};

template <>
struct Avx2::Table<E4M3> {
  void set(const float*) {}
  // Feature ODD of 8 channels, byte J of their words: E4M3 as float16 with the same bits.
  template <int J, int ODD>
  __m256 at(__m256i words) const {
    const __m128i high =
        _mm_setr_epi8(-1, J, -1, 4 + J, -1, 8 + J, -1, 12 + J, -1, 2 + J, -1, 6 + J, -1, 10 + J, -1, 14 + J);
    const __m256i codes = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(high));
    const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(codes, 1), _mm256_set1_epi16(int16_t(0xbfff)));
    const __m256i features = _mm256_permute4x64_epi64(halves, 0xd8);
    return _mm256_cvtph_ps(ODD ? _mm256_extracti128_si256(features, 1) : _mm256_castsi256_si128(features));
  }
};

}  // namespace

const Kernel avx2 = Gemm<Avx2>::kernel("avx2");

}  // namespace quantserve
