// The codebook GEMM over an instruction set S. Included once by each isa_*.cpp, in an unnamed namespace: the same
// templates compiled for two instruction sets must not be merged by the linker.
//
// S gives: Element (of prepared x and decoded tiles), Acc (float32 accumulator), Vec (decoded weights), PARTS (Vecs per
// vector of 32), LANES (elements per Vec), ROWS (rows of x in the register block), Table<bits>, Codes<bits>, and the
// functions used below.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernel.h"

// Arrays of accumulators stay in registers only where every index is a constant: loops over them are `unrolled`, with
// bodies that must be inlined.
#define INLINE __attribute__((always_inline))

namespace quantserve {
namespace {

inline float bf16_to_float(uint16_t value) {
  uint32_t word = uint32_t(value) << 16;
  float out;
  std::memcpy(&out, &word, 4);
  return out;
}

inline uint16_t float_to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16, quiet = word >> 16 | 0x40;  // NaN stays NaN
  return uint16_t((word & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

inline float half_to_float(uint16_t value) {
  uint32_t sign = uint32_t(value & 0x8000) << 16, rest = value & 0x7fff, word;
  if (rest >= 0x7c00) {
    word = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    word = sign | ((rest << 13) + (112u << 23));
  } else {  // subnormal: exact as an integer times 2^-24
    float small = float(int(rest)) * 5.9604644775390625e-8f;
    std::memcpy(&word, &small, 4);
    word |= sign;
  }
  float out;
  std::memcpy(&out, &word, 4);
  return out;
}

inline uint16_t float_to_half(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint16_t sign = uint16_t(word >> 16 & 0x8000);
  word &= 0x7fffffff;
  if (word > 0x7f800000) return sign | 0x7e00;
  if (word >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (word < 0x38800000) {                       // below 2^-14: let the adder round to a multiple of 2^-24
    float magic = 0.5f, small;
    std::memcpy(&small, &word, 4);
    small += magic;
    std::memcpy(&word, &small, 4);
    return sign | uint16_t(word - 0x3f000000);
  }
  return sign | uint16_t((word - (112u << 23) + 0xfff + (word >> 13 & 1)) >> 13);
}

inline float load_float(const void* data, Float type, int64_t i) {
  if (type == Float::f32) return static_cast<const float*>(data)[i];
  const uint16_t value = static_cast<const uint16_t*>(data)[i];
  return type == Float::bf16 ? bf16_to_float(value) : half_to_float(value);
}

// Converts `count` results.
inline void narrow(const float* from, int64_t count, Float type, void* to, int64_t first) {
  if (type == Float::f32) {
    std::copy(from, from + count, static_cast<float*>(to) + first);
    return;
  }
  auto* words = static_cast<uint16_t*>(to) + first;
  if (type == Float::bf16) {
    for (int64_t i = 0; i < count; ++i) words[i] = float_to_bf16(from[i]);
    return;
  }
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  for (; i < count; ++i) words[i] = float_to_half(from[i]);
}

// body(integral_constant<int, 0>) ... body(integral_constant<int, N - 1>): indices known at compile time.
template <int N, class Body, int... I>
inline INLINE void unrolled(Body&& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
inline INLINE void unrolled(Body&& body) {
  unrolled<N>(std::forward<Body>(body), std::make_integer_sequence<int, N>{});
}

// How many vectors share one scale at most, so that a unit never crosses a group or a block: 1, 2 or 4.
inline int unit_of(const Weight& w) {
  const int64_t both = (w.group_padded / VECTOR) | block_vectors(w.bits);
  return both % 4 == 0 ? 4 : both % 2 == 0 ? 2 : 1;
}

// Converts `count` scales or zeros to float32.
inline void widen(const void* from, Float type, int64_t first, int64_t count, float* to) {
  if (type == Float::f32) {
    std::copy_n(static_cast<const float*>(from) + first, count, to);
    return;
  }
  int64_t i = 0;
  if (type == Float::bf16) {
    const auto* words = static_cast<const uint16_t*>(from) + first;
    for (; i + 16 <= count; i += 16) {
      for (int j = 0; j < 16; ++j) to[i + j] = bf16_to_float(words[i + j]);
    }
  }
#ifdef __F16C__
  if (type == Float::f16) {
    const auto* half = static_cast<const uint16_t*>(from) + first;
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
    }
  }
#endif
  for (; i < count; ++i) to[i] = load_float(from, type, first + i);
}

// Spreads one value per group to one per unit, in place; the padding up to a whole block becomes 0, as x is there.
inline void spread(float* values, int64_t groups, int64_t per_group, int64_t units) {
  std::fill(values + std::min(groups * per_group, units), values + units, 0.0f);
  if (per_group == 1) return;
  for (int64_t g = groups - 1; g >= 0; --g) {
    const float value = values[g];
    std::fill(values + std::min(g * per_group, units), values + std::min((g + 1) * per_group, units), value);
  }
}

// Sum of a few values, in partial sums. Rows of a sparse part are short, and of every length: no branch on the length up
// to 32 where the processor can mask.
inline float total(const float* values, int64_t count) {
#ifdef __AVX512F__
  const auto some = [&](int64_t from) {
    const int64_t left = std::clamp<int64_t>(count - from, 0, 16);
    return _mm512_maskz_loadu_ps(__mmask16((1u << left) - 1), values + from);
  };
  __m512 sum = _mm512_add_ps(some(0), some(16));
  for (int64_t i = 32; i < count; i += 16) sum = _mm512_add_ps(sum, some(i));
  return _mm512_reduce_add_ps(sum);
#else
  float part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) part[j] += values[i + j];
  }
  for (int64_t j = 0; j < count - i; ++j) part[j] += values[i + j];
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
#endif
}

// Sum of -scale * zero * sum of x over the groups, in sixteen partial sums.
inline float zero_correction(const float* scales, const float* zeros, const float* sums, int64_t groups) {
  float part[16] = {};
  int64_t g = 0;
  for (; g + 16 <= groups; g += 16) {
    for (int i = 0; i < 16; ++i) part[i] -= scales[g + i] * zeros[g + i] * sums[g + i];
  }
  for (; g < groups; ++g) part[g % 16] -= scales[g] * zeros[g] * sums[g];
  return total(part, 16);
}

inline const float* table_of(const Weight& w, int64_t row) {
  return w.per_channel ? w.table + (row << w.bits) : w.table;
}

// --- few rows of x: decoded weights stay in registers -----------------------------------------------------------------

// The side data of a tile are short pieces of long arrays, which the hardware does not foresee.
template <class S>
void prefetch_side_data(const Weight& w, int64_t tile) {
  const int64_t first = tile * TILE, last = std::min(first + TILE, w.n);
  if (first >= w.n) return;
  const auto range = [](const void* base, int64_t begin, int64_t end) {
    const char* from = static_cast<const char*>(base);
    for (int64_t at = begin; at < end; at += 64) S::prefetch(from + at);
  };
  if (w.per_channel) range(w.table, first << w.bits << 2, last << w.bits << 2);
  const int64_t size = w.scale_type == Float::f32 ? 4 : 2;
  if (w.scales) range(w.scales, first * w.groups * size, last * w.groups * size);
  if (w.zeros) range(w.zeros, first * w.groups * size, last * w.groups * size);
}

// Vector J's share of fetching the tile's codes that come AHEAD bytes later: all at once they would block other loads.
template <class S, int BITS, int J>
inline INLINE void prefetch_share(const uint8_t* codes) {
  constexpr int LINES = TILE * block_bytes(BITS) / 64, V = block_vectors(BITS);
  unrolled<LINES*(J + 1) / V - LINES * J / V>([&](auto line) INLINE {
    S::prefetch(codes + (LINES * J / V + line) * 64 + S::AHEAD);
  });
}

// c[m * width + r] += x[m] . W[tile * TILE + r] without the sparse part; UNIT 0: no scales. `scales` holds
// TILE * k_padded / VECTOR floats, `zeros` as many.
template <class S, int BITS, int UNIT, int M>
void small_tile(const Weight& w, const Input& in, int64_t tile, float* scales, float* zeros, float* c, int64_t width) {
  using Acc = typename S::Acc;
  constexpr int V = block_vectors(BITS);
  constexpr int U = UNIT ? UNIT : V;
  const int64_t blocks = w.k_padded / (V * VECTOR), units = blocks * (V / U), stride = w.k_padded;
  typename S::template Table<BITS> table[TILE];
  float correction[TILE][M] = {};
  for (int r = 0; r < TILE; ++r) {
    const int64_t channel = std::min(tile * TILE + r, w.n - 1);
    table[r].set(table_of(w, channel));
    if constexpr (UNIT != 0) {
      widen(w.scales, w.scale_type, channel * w.groups, w.groups, scales + r * units);
      if (w.zeros) {
        widen(w.zeros, w.scale_type, channel * w.groups, w.groups, zeros);
        for (int m = 0; m < M; ++m) {
          correction[r][m] = zero_correction(scales + r * units, zeros, in.sums + m * w.groups, w.groups);
        }
      }
      spread(scales + r * units, w.groups, w.group_padded / VECTOR / UNIT, units);
    }
  }
  const auto* x = static_cast<const typename S::Element*>(in.x);
  const uint8_t* codes = w.codes + tile * TILE * blocks * block_bytes(BITS);
  Acc acc[TILE][M];
  unrolled<TILE * M>([&](auto i) INLINE { acc[i / M][i % M] = S::zero(); });
  for (int64_t b = 0; b < blocks; ++b, codes += TILE * block_bytes(BITS), x += V * VECTOR) {
    using Codes = typename S::template Codes<BITS>;
    constexpr int64_t NEXT = block_bytes(BITS);
    const Codes code[TILE] = {Codes(codes), Codes(codes + NEXT), Codes(codes + 2 * NEXT), Codes(codes + 3 * NEXT)};
    unrolled<V / U>([&](auto u) INLINE {
      Acc part[TILE][M];
      unrolled<TILE * M>([&](auto i) INLINE { part[i / M][i % M] = UNIT ? S::zero() : acc[i / M][i % M]; });
      unrolled<U * S::PARTS>([&](auto i) INLINE {
        constexpr int j = u * U + i / S::PARTS, p = i % S::PARTS;
        if constexpr (p == 0) prefetch_share<S, BITS, j>(codes);
        typename S::Vec input[M];
        unrolled<M>([&](auto m) INLINE { input[m] = S::load(x + m * stride + j * VECTOR + p * S::LANES); });
        // The channels alternate: each is a chain of additions of its own, and a load of x serves all.
        unrolled<TILE>([&](auto r) INLINE {
          const auto weights = code[r].template get<j, p>(table[r]);
          unrolled<M>([&](auto m) INLINE { part[r][m] = S::mac(part[r][m], weights, input[m]); });
        });
      });
      unrolled<TILE * M>([&](auto i) INLINE {
        constexpr int r = i / M, m = i % M;
        acc[r][m] = UNIT ? S::scale(part[r][m], scales[r * units + b * (V / U) + u], acc[r][m]) : part[r][m];
      });
    });
  }
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < TILE; ++r) c[m * width + r] += correction[r][m];
  }
  unrolled<M>([&](auto m) INLINE { S::add_sums(acc[0][m], acc[1][m], acc[2][m], acc[3][m], c + m * width); });
}

// --- many rows of x: a decoded tile is reused by all of them ----------------------------------------------------------

// Decodes blocks [begin, end) of a tile to out[features / LANES, TILE, LANES]; `scales` and `offsets` are expanded.
template <class S, int BITS, int UNIT>
void decode_tile(const Weight& w, int64_t tile, int64_t begin, int64_t end, const float* scales, const float* offsets,
                 typename S::Element* out) {
  constexpr int V = block_vectors(BITS);
  constexpr int U = UNIT ? UNIT : V;
  const int64_t blocks = w.k_padded / (V * VECTOR), units = blocks * (V / U);
  const float* entries[TILE];
  typename S::template Table<BITS> table[TILE];
  for (int r = 0; r < TILE; ++r) {
    entries[r] = table_of(w, std::min(tile * TILE + r, w.n - 1));
    table[r].set(entries[r]);
  }
  const uint8_t* codes = w.codes + (tile * blocks + begin) * TILE * block_bytes(BITS);
  for (int64_t b = begin; b < end; ++b, codes += TILE * block_bytes(BITS), out += TILE * V * VECTOR) {
    unrolled<TILE>([&](auto r) INLINE {
      for (int line = 0; line < block_bytes(BITS); line += 64) {
        S::prefetch(codes + r * block_bytes(BITS) + line + S::AHEAD);
      }
      const typename S::template Codes<BITS> code(codes + r * block_bytes(BITS));
      unrolled<V / U>([&](auto u) INLINE {
        float scale = 1.0f, offset = 0.0f;
        if constexpr (UNIT != 0) {
          scale = scales[r * units + b * (V / U) + u];
          offset = offsets[r * units + b * (V / U) + u];
          if constexpr (S::SCALES_TABLE) table[r].set_scaled(entries[r], scale, offset);
        }
        unrolled<U * S::PARTS>([&](auto i) INLINE {
          constexpr int j = u * U + i / S::PARTS, p = i % S::PARTS;
          auto weights = code.template get<j, p>(table[r]);
          if constexpr (UNIT != 0 && !S::SCALES_TABLE) weights = S::affine(weights, scale, offset);
          S::store(out + ((j * S::PARTS + p) * TILE + r) * S::LANES, weights);
        });
      });
    });
  }
}

// The scales of a tile's channels, and -zero * scale, one per unit.
inline void expand(const Weight& w, int64_t tile, int unit, float* scales, float* offsets) {
  const int64_t units = w.k_padded / VECTOR / unit, per_group = w.group_padded / VECTOR / unit;
  for (int r = 0; r < TILE; ++r, scales += units, offsets += units) {
    const int64_t channel = std::min(tile * TILE + r, w.n - 1);
    widen(w.scales, w.scale_type, channel * w.groups, w.groups, scales);
    if (w.zeros) {
      widen(w.zeros, w.scale_type, channel * w.groups, w.groups, offsets);
      for (int64_t g = 0; g < w.groups; ++g) offsets[g] *= -scales[g];
    } else {
      std::fill_n(offsets, w.groups, 0.0f);
    }
    spread(scales, w.groups, per_group, units);
    spread(offsets, w.groups, per_group, units);
  }
}

// Where element i of row r is in a block whose rows alternate, LANES elements at a time.
template <class S>
int64_t interleaved(int64_t i, int64_t r, int64_t rows) {
  return (i / S::LANES * rows + r) * S::LANES + i % S::LANES;
}

// Adds the sparse entries of input features [from, from + width) to a decoded tile.
template <class S>
bool add_sparse(const Weight& w, int64_t tile, int64_t from, int64_t width, typename S::Element* decoded) {
  bool fine = true;
  for (int r = 0; r < TILE && tile * TILE + r < w.n; ++r) {
    const int64_t channel = tile * TILE + r, begin = w.rows[channel], end = w.rows[channel + 1];
    if (begin < 0 || end < begin || end > w.nnz) {
      fine = false;
      continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = w.cols[i];
      if (k < 0 || k >= w.k_padded) fine = false;
      else if (k >= from && k < from + width) S::add(decoded + interleaved<S>(S::position(k - from), r, TILE), w.vals[i]);
    }
  }
  return fine;
}

// c[m, r] += x[m] . weights[r] over `width` elements of M rows of x, both interleaved; c has `strip` floats a row.
template <class S, int M>
void multiply(const typename S::Element* weights, const typename S::Element* x, int64_t width, float* c, int64_t strip) {
  typename S::Acc acc[TILE][M];
  unrolled<TILE * M>([&](auto i) INLINE { acc[i / M][i % M] = S::zero(); });
  for (int64_t i = 0; i < width; i += S::LANES, weights += TILE * S::LANES, x += M * S::LANES) {
    typename S::Vec row[TILE];
    unrolled<TILE>([&](auto r) INLINE { row[r] = S::load(weights + r * S::LANES); });
    unrolled<M>([&](auto m) INLINE {
      const typename S::Vec input = S::load(x + m * S::LANES);
      unrolled<TILE>([&](auto r) INLINE { acc[r][m] = S::mac(acc[r][m], row[r], input); });
    });
  }
  unrolled<M>([&](auto m) INLINE { S::add_sums(acc[0][m], acc[1][m], acc[2][m], acc[3][m], c + m * strip); });
}

template <class S, int M = S::ROWS>
void multiply_rows(const typename S::Element* weights, const typename S::Element* x, int64_t width, float* c,
                   int64_t strip, int64_t rows) {
  if (rows == M) return multiply<S, M>(weights, x, width, c, strip);
  if constexpr (M > 1) multiply_rows<S, M - 1>(weights, x, width, c, strip, rows);
}

// --- the strips of one thread -----------------------------------------------------------------------------------------

template <class S>
struct Gemm {
  using Element = typename S::Element;

  static constexpr int64_t SMALL = 2;     // rows of x up to which small_tile is used
  static constexpr int64_t RUN = 64;      // tiles finished at once then
  static constexpr int64_t WIDE = 32;     // rows of x from which a strip is several tiles, so that x is read less often
  static constexpr int64_t DEPTH = 2048;  // input features decoded at once: a tile and some rows of x fit the L1 cache

  static int64_t strip(int64_t m) { return m < WIDE ? TILE : 16 * TILE; }

  static int64_t depth(const Weight& w) {
    const int64_t block = block_vectors(w.bits) * VECTOR;
    return std::min(w.k_padded, DEPTH / block * block);
  }

  static size_t scale_floats(const Weight& w) { return w.scales ? size_t(TILE * w.k_padded / VECTOR) : 0; }

  static size_t scratch(const Weight& w, int64_t m) {
    const size_t tiles = size_t(strip(m) / TILE), results = size_t((m <= SMALL ? RUN * TILE : strip(m)) * m);
    const size_t floats = 2 * tiles * scale_floats(w) + results;
    return floats * sizeof(float) + size_t(strip(m) * depth(w)) * sizeof(Element) + 192;
  }

  // Rows of x are stored in panels of nearly equal height, ROWS at most; few rows one by one.
  static int64_t panels(int64_t m) { return m <= SMALL ? m : (m + S::ROWS - 1) / S::ROWS; }
  static int64_t panel_begin(int64_t m, int64_t panel) { return m * panel / panels(m); }

  static void prepare(const Weight& w, const Source& source, int64_t panel, void* out, float* sums, float* plain) {
    const int64_t begin = panel_begin(source.m, panel), rows = panel_begin(source.m, panel + 1) - begin;
    const int64_t vectors = w.k_padded / VECTOR, per_group = w.group_padded / VECTOR;
    for (int64_t r = 0; r < rows; ++r) {
      auto* to = static_cast<Element*>(out) + begin * w.k_padded + r * S::LANES;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t g = v / per_group, offset = v % per_group * VECTOR;
        const int64_t count = g < w.groups ? std::clamp<int64_t>(w.group - offset, 0, VECTOR) : 0;
        if (S::same(source.type) && count == VECTOR && !sums && !plain) {
          const auto* from = static_cast<const Element*>(source.x) + (begin + r) * w.k + g * w.group + offset;
          std::memcpy(to, from, sizeof(Element) * VECTOR);
          to += rows * VECTOR;
          continue;
        }
        float values[VECTOR];
        if (count < VECTOR) std::fill_n(values, VECTOR, 0.0f);
        widen(source.x, source.type, (begin + r) * w.k + g * w.group + offset, count, values);
        Element ordered[VECTOR];
        S::order(values, ordered);
        for (int p = 0; p < S::PARTS; ++p, to += rows * S::LANES) {
          std::memcpy(to, ordered + p * S::LANES, sizeof(Element) * S::LANES);
        }
        if (plain) std::memcpy(plain + (begin + r) * w.k_padded + v * VECTOR, values, sizeof values);
        if (sums && count) {
          float& sum = sums[(begin + r) * w.groups + g];
          sum = total(values, VECTOR) + (offset ? sum : 0.0f);
        }
      }
    }
  }

  static bool run(const Weight& w, const Input& in, const Output& out, int64_t begin, int64_t end, char* scratch) {
    switch (w.bits) {
      case 2: return run_bits<2>(w, in, out, begin, end, scratch);
      case 3: return run_bits<3>(w, in, out, begin, end, scratch);
      case 4: return run_bits<4>(w, in, out, begin, end, scratch);
      default: return run_bits<8>(w, in, out, begin, end, scratch);
    }
  }

  template <int BITS>
  static bool run_bits(const Weight& w, const Input& in, const Output& out, int64_t begin, int64_t end, char* scratch) {
    if (!w.scales) return run_unit<BITS, 0>(w, in, out, begin, end, scratch);
    switch (unit_of(w)) {
      case 1: return run_unit<BITS, 1>(w, in, out, begin, end, scratch);
      case 2: return run_unit<BITS, 2>(w, in, out, begin, end, scratch);
      default:
        if constexpr (BITS != 8) return run_unit<BITS, 4>(w, in, out, begin, end, scratch);
        return false;  // a block of 8-bit codes has two vectors
    }
  }

  template <int BITS, int UNIT>
  static bool run_unit(const Weight& w, const Input& in, const Output& out, int64_t begin, int64_t end, char* scratch) {
    const int64_t tiles = strip(in.m) / TILE;
    auto* scales = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
    float* offsets = scales + tiles * scale_floats(w);
    float* c = offsets + tiles * scale_floats(w);
    float* after = c + (in.m <= SMALL ? RUN * TILE : strip(in.m)) * in.m;
    auto* decoded = reinterpret_cast<Element*>((reinterpret_cast<uintptr_t>(after) + 63) & ~uintptr_t(63));
    bool fine = true;
    if (in.m <= SMALL) {
      for (int64_t tile = begin; tile < end; tile += RUN) {
        fine &= small_run<BITS, UNIT>(w, in, out, tile, std::min(tile + RUN, end), scales, offsets, c);
      }
    } else {
      for (int64_t s = begin; s < end; ++s) fine &= large_strip<BITS, UNIT>(w, in, out, s, scales, offsets, c, decoded);
    }
    return fine;
  }

  // The tiles [begin, end), after the sparse part of all their channels: the two read memory in different ways.
  template <int BITS, int UNIT>
  static bool small_run(const Weight& w, const Input& in, const Output& out, int64_t begin, int64_t end, float* scales,
                        float* offsets, float* c) {
    const int64_t first = begin * TILE, channels = std::min(end * TILE, w.n) - first, width = (end - begin) * TILE;
    bool fine = true;
    std::fill_n(c, in.m * width, 0.0f);
    for (int64_t m = 0; w.rows && m < in.m; ++m) {
      fine &= sparse_rows(w, first, channels, in.plain + m * w.k_padded, c + m * width);
    }
    // While the codes are read, what the next run needs of the sparse part is fetched a little with every tile.
    const int64_t next = w.rows && fine ? w.rows[first + channels] : 0;
    const int64_t later = w.rows && fine ? w.rows[std::min(first + channels + width, w.n)] : 0;
    const int64_t slice = (std::clamp<int64_t>(later, next, w.nnz) - next + end - begin - 1) / (end - begin);
    for (int64_t tile = begin; tile < end; ++tile) {
      prefetch_side_data<S>(w, tile + 1);
      for (int64_t i = 0; i < slice; i += 16) {
        S::prefetch(w.cols + next + (tile - begin) * slice + i);
        S::prefetch(w.vals + next + (tile - begin) * slice + i);
      }
      float* to = c + (tile - begin) * TILE;
      if (in.m == 1) small_tile<S, BITS, UNIT, 1>(w, in, tile, scales, offsets, to, width);
      else small_tile<S, BITS, UNIT, 2>(w, in, tile, scales, offsets, to, width);
    }
    finish(w, out, in.m, first, width, c);
    return fine;
  }

  template <int BITS, int UNIT>
  static bool large_strip(const Weight& w, const Input& in, const Output& out, int64_t index, float* scales,
                          float* offsets, float* c, Element* decoded) {
    constexpr int64_t BLOCK = block_vectors(BITS) * VECTOR;
    const int64_t width = strip(in.m), tiles = std::min(width, w.n - index * width + TILE - 1) / TILE;
    const int64_t blocks = w.k_padded / BLOCK, step = depth(w) / BLOCK, expanded = scale_floats(w);
    bool fine = true;
    std::fill_n(c, in.m * width, 0.0f);
    for (int64_t t = 0; UNIT && t < tiles; ++t) {
      expand(w, index * (width / TILE) + t, UNIT ? UNIT : 1, scales + t * expanded, offsets + t * expanded);
    }
    for (int64_t b = 0; b < blocks; b += step) {
      const int64_t end = std::min(b + step, blocks), features = (end - b) * BLOCK;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t tile = index * (width / TILE) + t;
        auto* to = decoded + t * TILE * features;
        decode_tile<S, BITS, UNIT>(w, tile, b, end, scales + t * expanded, offsets + t * expanded, to);
        if (w.rows) fine &= add_sparse<S>(w, tile, b * BLOCK, features, to);
      }
      for (int64_t p = 0; p < panels(in.m); ++p) {
        const int64_t m = panel_begin(in.m, p), rows = panel_begin(in.m, p + 1) - m;
        const auto* x = static_cast<const Element*>(in.x) + m * w.k_padded + b * BLOCK * rows;
        const int64_t share = features * rows / tiles;
        for (int64_t t = 0; t < tiles; ++t) {
          // A part of the next panel for every tile: it comes from the third cache level while this one is multiplied.
          const auto* next = x + rows * w.k_padded + t * share;
          for (int64_t i = 0; tiles > 1 && i < share; i += 64 / int64_t(sizeof(Element))) __builtin_prefetch(next + i, 0, 2);
          multiply_rows<S>(decoded + t * TILE * features, x, features, c + m * width + t * TILE, width, rows);
        }
      }
    }
    finish(w, out, in.m, index * width, width, c);
    return fine;
  }

  // Adds the sparse part of `count` channels times x to y[count]. All products first, many channels at a time, then each
  // channel's sum.
  static bool sparse_rows(const Weight& w, int64_t first, int64_t count, const float* x, float* y) {
    constexpr int64_t CHUNK = 1024;
    const int32_t* rows = w.rows + first;
    bool fine = rows[0] >= 0 && rows[count] <= w.nnz;
    for (int64_t r = 0; r < count; ++r) fine &= rows[r] <= rows[r + 1];
    if (!fine) return false;
    for (int64_t begin = rows[0], r = 0; begin < rows[count]; begin += CHUNK) {
      const int64_t size = std::min<int64_t>(CHUNK, rows[count] - begin), end = begin + size;
      const int32_t* cols = w.cols + begin;
      const float* vals = w.vals + begin;
      uint32_t highest = 0;
      for (int64_t i = 0; i < size; ++i) highest = std::max(highest, uint32_t(cols[i]));
      if (highest >= w.k_padded) return false;
      float products[CHUNK];
      for (int64_t i = 0; i < size; ++i) {
        int64_t k = cols[i];
        asm("" : "+r"(k));  // keeps the compiler from gather instructions, which are slower than single loads
        products[i] = vals[i] * x[k];
      }
      for (; r < count && rows[r] < end; ++r) {
        const int64_t from = std::max<int64_t>(rows[r], begin), to = std::min<int64_t>(rows[r + 1], end);
        y[r] += total(products + (from - begin), to - from);
        if (rows[r + 1] > end) break;  // the rest is in the next chunk
      }
    }
    return true;
  }

  static void finish(const Weight& w, const Output& out, int64_t rows, int64_t first, int64_t width, float* c) {
    const int64_t count = std::min(width, w.n - first);
    for (int64_t m = 0; m < rows; ++m, c += width) {
      for (int64_t i = 0; out.bias && i < count; ++i) c[i] += out.bias[first + i];
      narrow(c, count, out.type, out.y, m * w.n + first);
    }
  }

  static constexpr Kernel kernel(const char* name) {
    return {name, sizeof(Element), SMALL, panels, prepare, scratch, strip, run};
  }
};

}  // namespace
}  // namespace quantserve
