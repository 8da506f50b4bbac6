// The codebook GEMM over an instruction set S. Included once by each isa_*.cpp, in an unnamed namespace: the same
// templates compiled for two instruction sets must not be merged by the linker.
//
// S gives: Element (of prepared x and decoded tiles), Acc (float32 accumulator, a vector of the compiler's or like
// one), Vec (decoded weights), PARTS (Vecs per vector of 32), LANES (elements per Vec), HEIGHT and ROWS (rows of x in a
// register block, beside weights that are decoded there and beside stored ones), DIRECT (rows of x up to which weights
// are not stored), TALL and SHALLOW (the same two for columns), CHAINS (sums of columns that are added up at once),
// AHEAD (bytes fetched ahead), COMPUTES (whether it has the codings INTEGERS and E4M3), Table<bits>, Codes<bits>,
// Wide<bits>, and the functions used below. It may give `multiply<M>`, `multiply_columns<M>`, and GRAIN with `store_row`:
// how many consecutive elements of a row are stored together where rows alternate, else LANES.
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
#ifdef __aarch64__
  __fp16 half;
  std::memcpy(&half, &value, 2);
  return half;
#else
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
#endif
}

inline uint16_t float_to_half(float value) {
#ifdef __aarch64__
  const __fp16 half = __fp16(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
#else
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
#endif
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

// Converts `count` values to float32.
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

// Sum of the values of a vector, in partial sums.
inline float total(const float* values) {
  float part[8] = {};
  for (int i = 0; i < VECTOR; i += 8) {
    for (int j = 0; j < 8; ++j) part[j] += values[i + j];
  }
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

// As many scales or zeros of neighbouring channels as Acc has lanes.
template <class Acc>
inline INLINE Acc lanes_of(const void* from, Float type, int64_t first) {
  constexpr int LANES = sizeof(Acc) / sizeof(float);
#ifdef __AVX512F__
  if constexpr (LANES == 16) {
    if (type == Float::f32) return (Acc)_mm512_loadu_ps(static_cast<const float*>(from) + first);
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + first));
    if (type == Float::f16) return (Acc)_mm512_cvtph_ps(words);
    return (Acc)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
  }
#endif
#ifdef __AVX2__
  if constexpr (LANES == 8) {
    if (type == Float::f32) return (Acc)_mm256_loadu_ps(static_cast<const float*>(from) + first);
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + first));
    if (type == Float::f16) return (Acc)_mm256_cvtph_ps(words);
    return (Acc)_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
  }
#endif
  Acc out;
  float values[LANES];
  widen(from, type, first, LANES, values);
  std::memcpy(&out, values, sizeof out);
  return out;
}

inline const float* table_of(const Weight& w, int64_t row) { return w.columns ? w.table : w.table + (row << w.bits); }

// --- few rows of x: decoded weights stay in registers -----------------------------------------------------------------

// The side data of a tile are short pieces of long arrays, which the hardware does not foresee.
template <class S>
void prefetch_side_data(const Weight& w, int64_t tile) {
  const int64_t first = tile * w.tile(), last = std::min(first + w.tile(), w.n);
  if (first >= w.n) return;
  const auto range = [](const void* base, int64_t begin, int64_t end) {
    const char* from = static_cast<const char*>(base);
    for (int64_t at = begin; at < end; at += 64) S::prefetch(from + at);
  };
  if (!w.columns) range(w.table, first << w.bits << 2, last << w.bits << 2);
  const int64_t size = (w.scale_type == Float::f32 ? 4 : 2) * w.groups;
  if (w.scales) range(w.scales, first * size, (first + w.tile()) * size);
  if (w.zeros) range(w.zeros, first * size, (first + w.tile()) * size);
}

// Vector J's share of fetching the tile's codes that come AHEAD bytes later: all at once they would block other loads.
template <class S, int BITS, int J>
inline INLINE void prefetch_share(const uint8_t* codes) {
  constexpr int LINES = TILE * block_bytes(BITS) / 64, V = block_vectors(BITS);
  unrolled<LINES*(J + 1) / V - LINES * J / V>([&](auto line) INLINE {
    S::prefetch(codes + (LINES * J / V + line) * 64 + S::AHEAD);
  });
}

// Blocks of codes, which a slice of the input features consists of.
struct Blocks {
  int64_t begin, end;
};

// c[m * width + r] += x[m] . W[tile * TILE + r] for `rows` <= M rows of x, without scales and sparse part.
template <class S, int BITS, int M>
void small_tile(const Weight& w, const Input& in, int64_t row, int64_t rows, int64_t tile, Blocks slice, float* c,
                int64_t width) {
  using Acc = typename S::Acc;
  constexpr int V = block_vectors(BITS);
  const int64_t blocks = w.k_padded / (V * VECTOR);
  typename S::template Table<BITS> table[TILE];
  for (int r = 0; r < TILE; ++r) table[r].set(table_of(w, std::min(tile * TILE + r, w.n - 1)));
  const typename S::Element* x[M];
  for (int m = 0; m < M; ++m) {
    x[m] = static_cast<const typename S::Element*>(in.x) + (row + std::min<int64_t>(m, rows - 1)) * w.k_padded;
  }
  const uint8_t* codes = w.codes + (tile * blocks + slice.begin) * TILE * block_bytes(BITS);
  Acc acc[TILE][M];
  unrolled<TILE * M>([&](auto i) INLINE { acc[i / M][i % M] = S::zero(); });
  for (int64_t b = slice.begin; b < slice.end; ++b, codes += TILE * block_bytes(BITS)) {
    using Codes = typename S::template Codes<BITS>;
    constexpr int64_t NEXT = block_bytes(BITS);
    const int64_t at = b * V * VECTOR;
    const Codes code[TILE] = {Codes(codes), Codes(codes + NEXT), Codes(codes + 2 * NEXT), Codes(codes + 3 * NEXT)};
    unrolled<V * S::PARTS>([&](auto i) INLINE {
      constexpr int j = i / S::PARTS, p = i % S::PARTS;
      if constexpr (p == 0) prefetch_share<S, BITS, j>(codes);
      typename S::Vec input[M];
      unrolled<M>([&](auto m) INLINE { input[m] = S::load(x[m] + at + j * VECTOR + p * S::LANES); });
      // The channels alternate: each is a chain of additions of its own, and a load of x serves all.
      unrolled<TILE>([&](auto r) INLINE {
        const auto weights = code[r].template get<j, p>(table[r]);
        unrolled<M>([&](auto m) INLINE { acc[r][m] = S::mac(acc[r][m], weights, input[m]); });
      });
    });
  }
  unrolled<M>([&](auto m) INLINE {
    if (m < rows) S::add_sums(acc[0][m], acc[1][m], acc[2][m], acc[3][m], c + m * width);
  });
}

// A panel of three rows is computed as one of four.
template <class S, int BITS>
void small_rows(const Weight& w, const Input& in, int64_t row, int64_t rows, int64_t tile, Blocks slice, float* c,
                int64_t width) {
  if (rows == 1) return small_tile<S, BITS, 1>(w, in, row, rows, tile, slice, c, width);
  if (rows == 2) return small_tile<S, BITS, 2>(w, in, row, rows, tile, slice, c, width);
  if constexpr (S::HEIGHT > 2) small_tile<S, BITS, 4>(w, in, row, rows, tile, slice, c, width);
}

// --- columns: the lanes of an accumulator are channels -----------------------------------------------------------------

// How the 16 channels of a tile and the two features of a vector lie in the parts of a vector.
template <class S>
struct Columns {
  static constexpr int LANES = sizeof(typename S::Acc) / sizeof(float);
  static constexpr int HALVES = COLUMNS / LANES;          // accumulators of a tile
  static constexpr int FEATURES = 2 * HALVES / S::PARTS;  // of a part: two where the products add up pairs
  // Sums of a result that are added up side by side, as one addition waits for the one before.
  static constexpr int chains(int rows) {
    int count = 4;
    while (count > 1 && count * HALVES * rows > S::CHAINS) count /= 2;
    return count;
  }
};

// What a decoded 1 stands for. E4M3 is decoded as float16 with the same bits, which has another bias.
constexpr float unit_of(int coding) { return coding == E4M3 ? 256.0f : 1.0f; }

// c[m * width + i] += x[m] . W[tile * COLUMNS + i] for M rows of x, without the sparse part. `x` is a panel:
// [features / 2, M, 2]. The sums over a group are scaled, not the weights, and zero points are taken off with the sums of
// x: nothing is rounded.
template <class S, int BITS, int M>
void column_tile(const Weight& w, const typename S::Element* x, const float* sums, int64_t tile, Blocks slice, float* c,
                 int64_t width) {
  using Acc = typename S::Acc;
  using Shape = Columns<S>;
  constexpr int V = block_vectors(BITS), BYTES = block_bytes(BITS), H = Shape::HALVES, CHAINS = Shape::chains(M);
  const int64_t per_group = w.group_padded / (2 * V);
  typename S::template Table<BITS> table;
  table.set(w.table);
  const uint8_t* codes = w.codes + (tile * w.groups * per_group + slice.begin) * BYTES;
  x += slice.begin * 2 * V * M;
  Acc total[H][M];
  unrolled<H * M>([&](auto i) INLINE { total[i / M][i % M] = S::zero(); });
  for (int64_t b = slice.begin; b < slice.end;) {
    const int64_t g = b / per_group, last = std::min((g + 1) * per_group, slice.end);
    const bool whole = b == g * per_group;  // else zero points are taken off where the group begins
    Acc part[CHAINS][H][M];
    unrolled<CHAINS * H * M>([&](auto i) INLINE { part[i / (H * M)][i / M % H][i % M] = S::zero(); });
    for (; b < last; ++b, codes += BYTES, x += 2 * V * M) {
      unrolled<BYTES / 64>([&](auto line) INLINE { S::prefetch(codes + S::AHEAD / 2 + 64 * line); });
      const typename S::template Codes<BITS> code(codes);
      unrolled<V * S::PARTS>([&](auto i) INLINE {
        constexpr int j = i / S::PARTS, p = i % S::PARTS, chain = j % CHAINS, h = p % H;
        const auto weights = code.template get<j, p>(table);
        unrolled<M>([&](auto m) INLINE {
          part[chain][h][m] = S::mac(part[chain][h][m], weights, S::spread(x + (j * M + m) * 2 + p / H));
        });
      });
    }
    unrolled<H>([&](auto h) INLINE {
      unrolled<(CHAINS - 1) * M>([&](auto i) INLINE { part[0][h][i % M] += part[1 + i / M][h][i % M]; });
      if (!w.scales) {
        unrolled<M>([&](auto m) INLINE { total[h][m] += part[0][h][m] * unit_of(BITS); });
        return;
      }
      const int64_t at = (tile * w.groups + g) * COLUMNS + h * Shape::LANES;
      const Acc scale = lanes_of<Acc>(w.scales, w.scale_type, at) * unit_of(BITS);
      if (w.zeros && whole) {
        const Acc zero = lanes_of<Acc>(w.zeros, w.scale_type, at) * (1.0f / unit_of(BITS));
        unrolled<M>([&](auto m) INLINE { part[0][h][m] -= zero * sums[m * w.groups + g]; });
      }
      unrolled<M>([&](auto m) INLINE { total[h][m] += part[0][h][m] * scale; });
    });
  }
  unrolled<M>([&](auto m) INLINE {
    unrolled<H>([&](auto h) INLINE {
      float* to = c + m * width + h * Shape::LANES;
      Acc sum;
      std::memcpy(&sum, to, sizeof sum);
      sum += total[h][m];
      std::memcpy(to, &sum, sizeof sum);
    });
  });
}

template <class S, int BITS, int M = S::TALL>
void column_rows(const Weight& w, const typename S::Element* x, const float* sums, int64_t rows, int64_t tile,
                 Blocks slice, float* c, int64_t width) {
  if (rows == M) return column_tile<S, BITS, M>(w, x, sums, tile, slice, c, width);
  if constexpr (M > 1) column_rows<S, BITS, M - 1>(w, x, sums, rows, tile, slice, c, width);
}

// Decodes blocks [begin, end) of a tile, scaled, to out[features / 2, 16, 2]; in float32 each part keeps its own order.
template <class S, int BITS>
void decode_columns(const Weight& w, int64_t tile, int64_t begin, int64_t end, typename S::Element* out) {
  using Acc = typename S::Acc;
  using Shape = Columns<S>;
  constexpr int V = block_vectors(BITS), H = Shape::HALVES;
  const int64_t per_group = w.group_padded / (2 * V), blocks = w.groups * per_group;
  typename S::template Wide<BITS> table;
  table.set(w.table);
  const uint8_t* codes = w.codes + (tile * blocks + begin) * block_bytes(BITS);
  Acc scale[H], offset[H];
  for (int64_t b = begin; b < end; ++b, codes += block_bytes(BITS), out += V * VECTOR) {
    if (b == begin || b % per_group == 0) {
      unrolled<H>([&](auto h) INLINE {
        const int64_t at = (tile * w.groups + b / per_group) * COLUMNS + h * Shape::LANES;
        scale[h] = w.scales ? lanes_of<Acc>(w.scales, w.scale_type, at) : S::zero() + 1.0f;
        offset[h] = w.zeros ? -scale[h] * lanes_of<Acc>(w.zeros, w.scale_type, at) : S::zero();
        scale[h] = scale[h] * unit_of(BITS);
      });
    }
    const typename S::template Codes<BITS> code(codes);
    unrolled<V * S::PARTS>([&](auto i) INLINE {
      constexpr int j = i / S::PARTS, p = i % S::PARTS;
      S::store(out + i * S::LANES, S::template scaled<BITS, j, p>(code, table, scale[p % H], offset[p % H]));
    });
  }
}

// c[m, i] += x[m] . W[i] over `features` of M rows of x and C decoded tiles, which lie `stride` elements apart.
template <class S, int M, int C>
void multiply_columns(const typename S::Element* weights, int64_t stride, const typename S::Element* x, int64_t features,
                      float* c, int64_t width) {
  using Shape = Columns<S>;
  constexpr int H = Shape::HALVES;
  typename S::Acc acc[C * H][M];
  unrolled<C * H * M>([&](auto i) INLINE { acc[i / M][i % M] = S::zero(); });
  for (int64_t k = 0; k < features; k += 2, weights += VECTOR, x += 2 * M) {
    unrolled<S::PARTS>([&](auto p) INLINE {
      typename S::Vec column[C];
      unrolled<C>([&](auto t) INLINE { column[t] = S::load(weights + t * stride + p * S::LANES); });
      unrolled<M>([&](auto m) INLINE {
        const auto input = S::spread(x + 2 * m + p / H);
        unrolled<C>([&](auto t) INLINE {
          auto& sum = acc[t * H + p % H][m];
          sum = S::mac(sum, column[t], input);
        });
      });
    });
  }
  unrolled<M>([&](auto m) INLINE {
    unrolled<C * H>([&](auto i) INLINE {
      float* to = c + m * width + i * Shape::LANES;
      typename S::Acc sum;
      std::memcpy(&sum, to, sizeof sum);
      sum += acc[i][m];
      std::memcpy(to, &sum, sizeof sum);
    });
  });
}

template <class S, int M = S::SHALLOW>
void multiply_column_rows(const typename S::Element* weights, int64_t stride, const typename S::Element* x,
                          int64_t features, float* c, int64_t width, int64_t rows, int64_t tiles) {
  if (rows == M) {
    constexpr int C = S::SPREAD;
    int64_t t = 0;
    for (; t + C <= tiles; t += C) {
      const auto* from = weights + t * stride;
      float* to = c + t * COLUMNS;
      if constexpr (requires { S::template multiply_columns<M>(from, x, features, to, width); }) {
        S::template multiply_columns<M>(from, x, features, to, width);
      } else {
        multiply_columns<S, M, C>(from, stride, x, features, to, width);
      }
    }
    for (; t < tiles; ++t) multiply_columns<S, M, 1>(weights + t * stride, stride, x, features, c + t * COLUMNS, width);
    return;
  }
  if constexpr (M > 1) multiply_column_rows<S, M - 1>(weights, stride, x, features, c, width, rows, tiles);
}

// --- many rows of x: a decoded tile is reused by all of them ----------------------------------------------------------

// Elements of a row that are stored together where rows alternate.
template <class S>
constexpr int grain() {
  if constexpr (requires { S::GRAIN; }) return S::GRAIN;
  else return S::LANES;
}

// Decodes blocks [begin, end) of a tile of rows to its place among ROWS channels: out[features / grain, ROWS, grain].
template <class S, int BITS, bool SCALED, int ROWS = TILE>
void decode_tile(const Weight& w, int64_t tile, int64_t begin, int64_t end, typename S::Element* out) {
  constexpr int V = block_vectors(BITS);
  const int64_t blocks = w.k_padded / (V * VECTOR), per_group = w.group_padded / VECTOR;
  const float* entries[TILE];
  typename S::template Table<BITS> table[TILE];
  float scaled[TILE][SCALED ? 1 << BITS : 1];
  for (int r = 0; r < TILE; ++r) {
    entries[r] = table_of(w, std::min(tile * TILE + r, w.n - 1));
    table[r].set(entries[r]);
  }
  const uint8_t* codes = w.codes + (tile * blocks + begin) * TILE * block_bytes(BITS);
  for (int64_t b = begin; b < end; ++b, codes += TILE * block_bytes(BITS), out += ROWS * V * VECTOR) {
    unrolled<V>([&](auto j) INLINE {
      const int64_t vector = b * V + j, group = vector / per_group;
      if (SCALED && group < w.groups && (vector == begin * V || vector % per_group == 0)) {
        for (int r = 0; r < TILE; ++r) {
          const int64_t at = (tile * w.groups + group) * TILE + r;
          const float scale = load_float(w.scales, w.scale_type, at);
          const float zero = w.zeros ? load_float(w.zeros, w.scale_type, at) : 0.0f;
          for (int i = 0; i < 1 << BITS; ++i) scaled[r][i] = (entries[r][i] - zero) * scale;
          table[r].set(scaled[r]);
        }
      }
      prefetch_share<S, BITS, j>(codes);
      unrolled<TILE>([&](auto r) INLINE {
        const typename S::template Codes<BITS> code(codes + r * block_bytes(BITS));
        unrolled<S::PARTS>([&](auto p) INLINE {
          auto* to = out + (j * S::PARTS + p) * ROWS * S::LANES + r * grain<S>();
          const auto weights = code.template get<j, p>(table[r]);
          if constexpr (grain<S>() < S::LANES) S::store_row(to, weights);
          else S::store(to, weights);
        });
      });
    });
  }
}

// Where element i of row r is in a block whose rows alternate.
template <class S>
int64_t interleaved(int64_t i, int64_t r, int64_t rows) {
  return (i / grain<S>() * rows + r) * grain<S>() + i % grain<S>();
}

// Where input feature i of channel r of a decoded tile is; one of rows has its place among ROWS channels.
template <class S, int ROWS>
int64_t decoded_at(const Weight& w, int64_t i, int64_t r) {
  if (!w.columns) return interleaved<S>(S::position(i), r, ROWS);
  return i / 2 * VECTOR + (Columns<S>::FEATURES == 2 ? 2 * r + i % 2 : i % 2 * COLUMNS + r);
}

// Adds the sparse entries of input features [from, from + width) to a decoded tile.
template <class S, int ROWS = TILE>
bool add_sparse(const Weight& w, int64_t tile, int64_t from, int64_t width, typename S::Element* decoded) {
  bool fine = true;
  for (int r = 0; r < w.tile() && tile * w.tile() + r < w.n; ++r) {
    const int64_t channel = tile * w.tile() + r, begin = w.rows[channel], end = w.rows[channel + 1];
    if (begin < 0 || end < begin || end > w.nnz) {
      fine = false;
      continue;
    }
    if (begin == end) continue;
    if (w.cols[begin] < 0 || w.cols[end - 1] >= w.k_padded) {
      fine = false;
      continue;
    }
    // Columns rise within a row.
    int64_t i = std::lower_bound(w.cols + begin, w.cols + end, int32_t(from)) - w.cols;
    for (; i < end && w.cols[i] >= from && w.cols[i] < from + width; ++i) {
      S::add(decoded + decoded_at<S, ROWS>(w, w.cols[i] - from, r), w.vals[i]);
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
  if (rows == M) {
    if constexpr (requires { S::template multiply<M>(weights, x, width, c, strip); }) {
      return S::template multiply<M>(weights, x, width, c, strip);
    } else {
      return multiply<S, M>(weights, x, width, c, strip);
    }
  }
  if constexpr (M > 1) multiply_rows<S, M - 1>(weights, x, width, c, strip, rows);
}

// --- the strips of one thread -----------------------------------------------------------------------------------------

template <class S>
struct Gemm {
  using Element = typename S::Element;

  static constexpr int64_t RUN = 256;     // channels finished at once where weights go from registers into the products
  static constexpr int64_t BROAD = 64;    // rows of x from which strips are broad, so that x is read less often
  static constexpr int64_t WIDE = 128;    // rows of x from which they are wide, and x comes from the third cache level
  static constexpr int64_t TASKS = 2;     // that a thread should get at least
  static constexpr int64_t DEPTH = 2048;  // input features of a slice: decoded, a tile and a panel of x fit the L1 cache

  // Whether each panel of x decodes the weights anew: better than storing them up to some rows, fewer with a sparse
  // part, which is otherwise added to the stored weights once for all rows. Rows with scales are always stored.
  static bool direct(const Weight& w, int64_t m) {
    if (w.stored || (w.scales && !w.columns)) return false;
    return m <= std::min<int64_t>(w.columns ? S::COLUMN_DIRECT : S::DIRECT, w.rows ? 8 : m);
  }

  // Rows of x in a panel. Rows stay whole where they meet weights in registers: each is prepared as a panel of its own.
  static int64_t height(const Weight& w, int64_t m) {
    if (direct(w, m)) return w.columns ? S::TALL : 1;
    return w.columns ? S::SHALLOW : S::ROWS;
  }

  // Input features are added up in slices, whole blocks each.
  static int64_t depth(const Weight& w) { return std::min(w.k_padded, DEPTH / w.block() * w.block()); }
  static int64_t count_slices(const Weight& w) { return (w.k_padded + depth(w) - 1) / depth(w); }
  static Blocks blocks_of(const Weight& w, int64_t slice) {
    const int64_t blocks = w.k_padded / w.block(), count = count_slices(w), step = (blocks + count - 1) / count;
    return {std::min(slice * step, blocks), std::min((slice + 1) * step, blocks)};
  }

  // Where the strips are too few for the threads, the rows are divided, then the strips, and at last the input features.
  // A part decodes its weights anew, which BROAD rows make up for; a narrower strip reads x more often; slices are joined.
  static Plan plan(const Weight& w, int64_t m, int64_t threads) {
    const int64_t tile = w.tile();
    int64_t strip = direct(w, m) ? tile : m < BROAD ? (w.columns ? 4 * tile : tile) : m < WIDE ? 64 : 128, parts = 1;
    const auto strips = [&] { return (w.n + strip - 1) / strip; };
    while (strip > tile && strips() * parts < TASKS * threads) {
      if (m >= 2 * parts * BROAD) parts *= 2;
      else strip /= 2;
    }
    return {strip, strips(), parts, strips() * parts < TASKS * threads ? count_slices(w) : 1};
  }

  // Floats that a task's results take; of stored weights at most, as the parts of the panels differ by one.
  static int64_t results(const Weight& w, int64_t m, const Plan& plan) {
    if (direct(w, m)) return RUN * m;
    const int64_t height = Gemm::height(w, m);
    return plan.strip * height * ((count_panels(m, height) + plan.parts - 1) / plan.parts);
  }

  static size_t scratch(const Weight& w, int64_t m, const Plan& plan) {
    const size_t decoded = direct(w, m) ? 0 : size_t(plan.strip * depth(w)) * sizeof(Element);
    return size_t(results(w, m, plan)) * sizeof(float) + decoded + 128;
  }

  // Rows of x are handled in panels of nearly equal height. Prepared, the rows of a panel alternate.
  static int64_t count_panels(int64_t m, int64_t height) { return (m + height - 1) / height; }
  static int64_t panels(const Weight& w, int64_t m) { return count_panels(m, height(w, m)); }
  static int64_t panel_begin(int64_t m, int64_t panel, int64_t count) { return m * panel / count; }

  static void prepare(const Weight& w, const Source& source, int64_t panel, void* out, float* sums, float* plain) {
    const int64_t count = panels(w, source.m), begin = panel_begin(source.m, panel, count);
    const int64_t rows = panel_begin(source.m, panel + 1, count) - begin, piece = w.columns ? 2 : grain<S>();
    for (int64_t r = 0; r < rows; ++r) {
      auto* to = static_cast<Element*>(out) + begin * w.k_padded + r * piece;
      const auto put = [&](const Element* from, int64_t size) {
        if (rows == 1) {
          std::memcpy(to, from, sizeof(Element) * size);
          to += size;
          return;
        }
        for (int64_t i = 0; i < size; i += piece, to += rows * piece) std::memcpy(to, from + i, sizeof(Element) * piece);
      };
      for (int64_t at = 0, size; at < w.k_padded; at += size) {
        const int64_t g = at / w.group_padded, offset = at % w.group_padded;
        size = std::min<int64_t>(VECTOR, w.group_padded - offset);
        const int64_t filled = g < w.groups ? std::clamp<int64_t>(w.group - offset, 0, size) : 0;
        const int64_t from = (begin + r) * w.k + g * w.group + offset;
        const bool as_is = S::same(source.type) && filled == size;
        float values[VECTOR] = {};
        if (!as_is || sums || plain) widen(source.x, source.type, from, filled, values);
        if (as_is) {
          put(static_cast<const Element*>(source.x) + from, size);
        } else {
          Element ordered[VECTOR];
          if constexpr (sizeof(Element) == sizeof(float)) {
            if (w.columns) std::memcpy(ordered, values, sizeof values);
            else S::order(values, ordered);
          } else {
            S::order(values, ordered);
          }
          put(ordered, size);
        }
        if (plain) std::memcpy(plain + (begin + r) * w.k_padded + at, values, sizeof(float) * size);
        if (sums && filled) {
          float& sum = sums[(begin + r) * w.groups + g];
          sum = total(values) + (offset ? sum : 0.0f);
        }
      }
    }
  }

  static bool run(const Weight& w, const Input& in, const Output& out, const Plan& plan, int64_t begin, int64_t end,
                  char* scratch) {
    if constexpr (S::COMPUTES) {
      if (w.coding == INTEGERS) return run_bits<INTEGERS>(w, in, out, plan, begin, end, scratch);
      if (w.coding == E4M3) return run_bits<E4M3>(w, in, out, plan, begin, end, scratch);
    }
    switch (w.bits) {
      case 2: return run_bits<2>(w, in, out, plan, begin, end, scratch);
      case 3: return run_bits<3>(w, in, out, plan, begin, end, scratch);
      case 4: return run_bits<4>(w, in, out, plan, begin, end, scratch);
      default: return run_bits<8>(w, in, out, plan, begin, end, scratch);
    }
  }

  template <int BITS>
  static bool run_bits(const Weight& w, const Input& in, const Output& out, const Plan& plan, int64_t begin,
                       int64_t end, char* scratch) {
    auto* c = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
    float* after = c + results(w, in.m, plan);
    auto* decoded = reinterpret_cast<Element*>((reinterpret_cast<uintptr_t>(after) + 63) & ~uintptr_t(63));
    bool fine = true;
    if (direct(w, in.m)) {
      const int64_t tiles = RUN / w.tile();
      for (int64_t task = begin, last; task < end; task = last) {
        const int64_t i = task / plan.strips, tile = task % plan.strips;
        last = std::min({task + tiles, end, (i + 1) * plan.strips});
        fine &= direct_run<BITS>(w, in, out, plan, i, tile, tile + last - task, c);
      }
    } else {
      for (int64_t task = begin; task < end; ++task) fine &= stored_task<BITS>(w, in, out, plan, task, c, decoded);
    }
    return fine;
  }

  // The tiles [begin, end), after the sparse part of all their channels: the two read memory in different ways. Of all
  // slices, or where they are tasks of their own, of slice `alone`, the first of which has the sparse part.
  template <int BITS>
  static bool direct_run(const Weight& w, const Input& in, const Output& out, const Plan& plan, int64_t alone,
                         int64_t begin, int64_t end, float* c) {
    const int64_t first = begin * w.tile(), channels = std::min(end * w.tile(), w.n) - first;
    const int64_t width = (end - begin) * w.tile(), panels = count_panels(in.m, w.columns ? S::TALL : S::HEIGHT);
    bool fine = true;
    std::fill_n(c, in.m * width, 0.0f);
    const int64_t slices = plan.slices > 1 ? alone + 1 : count_slices(w);
    for (int64_t m = 0; w.rows && alone == 0 && m < in.m; ++m) {
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
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t m = panel_begin(in.m, p, panels), rows = panel_begin(in.m, p + 1, panels) - m;
        float* to = c + m * width + (tile - begin) * w.tile();
        for (int64_t i = alone; i < slices; ++i) {
          if (w.columns) {
            const auto* x = static_cast<const Element*>(in.x) + m * w.k_padded;
            const float* sums = w.zeros ? in.sums + m * w.groups : nullptr;
            column_rows<S, BITS>(w, x, sums, rows, tile, blocks_of(w, i), to, width);
          } else if constexpr (BITS <= 8) {
            small_rows<S, BITS>(w, in, m, rows, tile, blocks_of(w, i), to, width);
          }
        }
      }
    }
    finish(w, out, alone * in.m, 0, in.m, first, width, c);
    return fine;
  }

  template <int BITS>
  static bool stored_task(const Weight& w, const Input& in, const Output& out, const Plan& plan, int64_t task, float* c,
                          Element* decoded) {
    const int64_t block = w.block(), height = Gemm::height(w, in.m), size = w.tile();
    const int64_t width = plan.strip, channel = task % plan.strips * width, part = task / plan.strips % plan.parts;
    const int64_t alone = task / plan.strips / plan.parts, slices = plan.slices > 1 ? alone + 1 : count_slices(w);
    const int64_t tiles = (std::min(width, w.n - channel) + size - 1) / size;
    const int64_t panels = count_panels(in.m, height);
    const int64_t first = panels * part / plan.parts, last = panels * (part + 1) / plan.parts;
    const int64_t row = panel_begin(in.m, first, panels), count = panel_begin(in.m, last, panels) - row;
    bool fine = true;
    std::fill_n(c, count * width, 0.0f);
    for (int64_t i = alone; i < slices; ++i) {
      const auto [b, end] = blocks_of(w, i);
      const int64_t features = (end - b) * block;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t tile = channel / size + t;
        auto* to = decoded + t * size * features;
        if (w.columns) {
          decode_columns<S, BITS>(w, tile, b, end, to);
        } else if constexpr (BITS <= 8) {
          if (w.scales) decode_tile<S, BITS, true>(w, tile, b, end, to);
          else decode_tile<S, BITS, false>(w, tile, b, end, to);
        }
        if (w.rows) fine &= add_sparse<S>(w, tile, b * block, features, to);
      }
      for (int64_t p = first; p < last; ++p) {
        const int64_t m = panel_begin(in.m, p, panels), rows = panel_begin(in.m, p + 1, panels) - m;
        const auto* x = static_cast<const Element*>(in.x) + m * w.k_padded + b * block * rows;
        float* to = c + (m - row) * width;
        const int64_t group = w.columns ? S::SPREAD : 1;  // tiles multiplied at once
        for (int64_t t = 0; t < tiles; t += group) {
          // A part of the next panel for every tile, while this one is multiplied.
          const int64_t share = features * rows * std::min(group, tiles - t) / tiles;
          const auto* next = x + rows * w.k_padded + features * rows * t / tiles;
          for (int64_t i = 0; in.m >= WIDE && i < share; i += 64 / int64_t(sizeof(Element))) {
            __builtin_prefetch(next + i, 0, 2);
          }
          const auto* weights = decoded + t * size * features;
          if (w.columns) {
            multiply_column_rows<S>(weights, size * features, x, features, to + t * size, width, rows,
                                    std::min(group, tiles - t));
          } else {
            multiply_rows<S>(weights, x, features, to + t * size, width, rows);
          }
        }
      }
    }
    finish(w, out, alone * in.m, row, count, channel, width, c);
    return fine;
  }

  // Adds the sparse part of `count` channels times x to y[count].
  static bool sparse_rows(const Weight& w, int64_t first, int64_t count, const float* x, float* y) {
    bool fine = true;
    for (int64_t r = 0; r < count; ++r) {
      int64_t i = w.rows[first + r];
      const int64_t end = w.rows[first + r + 1];
      if (i < 0 || i > end || end > w.nnz) return false;
      float sum[4] = {};  // chains of additions
      const auto add = [&](int64_t at, int chain) INLINE {
        uint64_t k = uint32_t(w.cols[at]);
        asm("" : "+r"(k));  // no gather instructions and no shuffles, which are slower than single loads
        if (k < uint64_t(w.k_padded)) sum[chain] += w.vals[at] * x[k];
        else fine = false;
      };
      for (; i + 4 <= end; i += 4) unrolled<4>([&](auto chain) INLINE { add(i + chain, chain); });
      for (; i < end; ++i) add(i, 0);
      y[r] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    return fine;
  }

  // `above` rows of the results belong to slices before this one.
  static void finish(const Weight& w, const Output& out, int64_t above, int64_t row, int64_t rows, int64_t first,
                     int64_t width, float* c) {
    const int64_t count = std::min(width, w.n - first);
    for (int64_t m = row; m < row + rows; ++m, c += width) {
      for (int64_t i = 0; out.bias && i < count; ++i) c[i] += out.bias[first + i];
      narrow(c, count, out.type, out.y, (above + m) * w.n + first);
    }
  }

  static void join(const float* sums, const Output& out, const Plan& plan, int64_t m, int64_t n, int64_t begin,
                   int64_t end) {
    constexpr int64_t PIECE = 256;
    float c[PIECE];
    for (int64_t at = begin, count; at < end; at += count) {
      count = std::min(PIECE, end - at);
      std::copy_n(sums + at, count, c);
      for (int64_t s = 1; s < plan.slices; ++s) {
        for (int64_t i = 0; i < count; ++i) c[i] += sums[s * m * n + at + i];
      }
      for (int64_t i = 0; out.bias && i < count; ++i) c[i] += out.bias[(at + i) % n];
      narrow(c, count, out.type, out.y, at);
    }
  }

  static constexpr Kernel kernel(const char* name) {
    return {name, sizeof(Element), direct, panels, prepare, plan, scratch, run, join};
  }
};

}  // namespace
}  // namespace quantserve
