// The codebook GEMM over an instruction set S. Included once by each isa_*.cpp, in an unnamed namespace: the same
// templates compiled for two instruction sets must not be merged by the linker.
//
// S gives: Element (of prepared x and decoded tiles), Acc (float32 accumulator), Vec (decoded weights), PARTS (Vecs per
// vector of 32), LANES (elements per Vec), HEIGHT and ROWS (rows of x in a register block, beside weights that are decoded
// there and beside stored ones), DIRECT (rows of x up to which weights are not stored), AHEAD (bytes fetched ahead),
// Table<bits>, Codes<bits>, and the functions used below.
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

typedef float Four __attribute__((vector_size(16)));  // a value for each channel of a tile

// Four scales or zeros, those of a tile in one group.
inline void widen_four(const void* from, Float type, int64_t first, float* to) {
#ifdef __F16C__
  if (type == Float::f16) {
    const auto* half = static_cast<const uint16_t*>(from) + first;
    _mm_storeu_ps(to, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(half))));
    return;
  }
#endif
  widen(from, type, first, TILE, to);
}

// Walks along the groups of a tile, one unit of vectors at a time.
class Groups {
 public:
  Groups(const Weight& w, int64_t tile, int unit, int64_t first_unit)
      : w_(w), per_group_(w.group_padded / VECTOR / unit), base_(tile * w.groups * TILE),
        group(first_unit / per_group_ - 1), left_(first_unit % per_group_ ? 0 : 1) {
    if (left_ == 0) {  // within a group
      left_ = per_group_ - first_unit % per_group_ + 1;
      ++group;
      load();
    }
  }

  // True where a group begins. `scale` holds its scales then, and `offset` -zero * scale.
  INLINE bool step() {
    if (--left_ > 0) return false;
    left_ = per_group_;
    ++group;
    load();
    return true;
  }

 private:
  const Weight& w_;
  const int64_t per_group_, base_;

 public:
  int64_t group;
  float scale[TILE] = {};
  Four offset = {};

 private:
  int64_t left_;

  INLINE void load() {
    if (!w_.scales || group >= w_.groups) {  // beyond them is padding up to a whole block, where x is zero
      std::fill_n(scale, TILE, 0.0f);
      offset = Four{};
      return;
    }
    widen_four(w_.scales, w_.scale_type, base_ + group * TILE, scale);
    if (!w_.zeros) return;
    float zero[TILE];
    widen_four(w_.zeros, w_.scale_type, base_ + group * TILE, zero);
    Four scales, zeros;
    std::memcpy(&scales, scale, sizeof scales);
    std::memcpy(&zeros, zero, sizeof zeros);
    offset = -scales * zeros;
  }
};

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
  const int64_t size = (w.scale_type == Float::f32 ? 4 : 2) * w.groups;
  if (w.scales) range(w.scales, first * size, (first + TILE) * size);
  if (w.zeros) range(w.zeros, first * size, (first + TILE) * size);
}

// Vector J's share of fetching the tile's codes that come AHEAD bytes later: all at once they would block other loads.
template <class S, int BITS, int J>
inline INLINE void prefetch_share(const uint8_t* codes) {
  constexpr int LINES = TILE * block_bytes(BITS) / 64, V = block_vectors(BITS);
  unrolled<LINES*(J + 1) / V - LINES * J / V>([&](auto line) INLINE {
    S::prefetch(codes + (LINES * J / V + line) * 64 + S::AHEAD);
  });
}

// c[m * width + r] += x[m] . W[tile * TILE + r] for `rows` <= M rows of x, without the sparse part; UNIT 0: no scales.
// The sum over a group is scaled, not the weights, and zero points are taken off with the sums of x: nothing is rounded.
template <class S, int BITS, int UNIT, int M>
void small_tile(const Weight& w, const Input& in, int64_t row, int64_t rows, int64_t tile, float* c, int64_t width) {
  using Acc = typename S::Acc;
  constexpr int V = block_vectors(BITS);
  constexpr int U = UNIT ? UNIT : V;
  constexpr int R = UNIT != 0 && M > 2 ? TILE / 2 : TILE;  // channels whose sums over a group fit the registers
  const int64_t blocks = w.k_padded / (V * VECTOR);
  typename S::template Table<BITS> table[TILE];
  for (int r = 0; r < TILE; ++r) table[r].set(table_of(w, std::min(tile * TILE + r, w.n - 1)));
  const typename S::Element* x[M];
  const float* sums[M];
  for (int m = 0; m < M; ++m) {
    const int64_t at = row + std::min<int64_t>(m, rows - 1);
    x[m] = static_cast<const typename S::Element*>(in.x) + at * w.k_padded;
    sums[m] = in.sums + at * w.groups;
  }
  const uint8_t* codes = w.codes + tile * TILE * blocks * block_bytes(BITS);
  Four correction[M] = {};
  Acc acc[TILE][M];
  unrolled<TILE * M>([&](auto i) INLINE { acc[i / M][i % M] = S::zero(); });
  Groups groups(w, tile, UNIT ? UNIT : 1, 0);
  for (int64_t b = 0; b < blocks; ++b, codes += TILE * block_bytes(BITS)) {
    using Codes = typename S::template Codes<BITS>;
    constexpr int64_t NEXT = block_bytes(BITS);
    const int64_t at = b * V * VECTOR;
    const Codes code[TILE] = {Codes(codes), Codes(codes + NEXT), Codes(codes + 2 * NEXT), Codes(codes + 3 * NEXT)};
    unrolled<V / U>([&](auto u) INLINE {
      if (UNIT != 0 && groups.step() && w.zeros && groups.group < w.groups) {
        unrolled<M>([&](auto m) INLINE { correction[m] += groups.offset * sums[m][groups.group]; });
      }
      unrolled<TILE / R>([&](auto half) INLINE {
        Acc part[R][M];
        unrolled<R * M>([&](auto i) INLINE {
          part[i / M][i % M] = UNIT ? S::zero() : acc[half * R + i / M][i % M];
        });
        unrolled<U * S::PARTS>([&](auto i) INLINE {
          constexpr int j = u * U + i / S::PARTS, p = i % S::PARTS;
          if constexpr (p == 0 && half == 0) prefetch_share<S, BITS, j>(codes);
          typename S::Vec input[M];
          unrolled<M>([&](auto m) INLINE { input[m] = S::load(x[m] + at + j * VECTOR + p * S::LANES); });
          // The channels alternate: each is a chain of additions of its own, and a load of x serves all.
          unrolled<R>([&](auto r) INLINE {
            const auto weights = code[half * R + r].template get<j, p>(table[half * R + r]);
            unrolled<M>([&](auto m) INLINE { part[r][m] = S::mac(part[r][m], weights, input[m]); });
          });
        });
        unrolled<R * M>([&](auto i) INLINE {
          constexpr int r = i / M, m = i % M;
          Acc& total = acc[half * R + r][m];
          total = UNIT ? S::scale(part[r][m], groups.scale[half * R + r], total) : part[r][m];
        });
      });
    });
  }
  unrolled<M>([&](auto m) INLINE {
    if (m >= rows) return;
    for (int r = 0; UNIT && r < TILE; ++r) c[m * width + r] += correction[m][r];
    S::add_sums(acc[0][m], acc[1][m], acc[2][m], acc[3][m], c + m * width);
  });
}

// A panel of three rows is computed as one of four.
template <class S, int BITS, int UNIT>
void small_rows(const Weight& w, const Input& in, int64_t row, int64_t rows, int64_t tile, float* c, int64_t width) {
  if (rows == 1) return small_tile<S, BITS, UNIT, 1>(w, in, row, rows, tile, c, width);
  if (rows == 2) return small_tile<S, BITS, UNIT, 2>(w, in, row, rows, tile, c, width);
  if constexpr (S::HEIGHT > 2) small_tile<S, BITS, UNIT, 4>(w, in, row, rows, tile, c, width);
}

// --- many rows of x: a decoded tile is reused by all of them ----------------------------------------------------------

// Decodes blocks [begin, end) of a tile to out[features / LANES, TILE, LANES].
template <class S, int BITS, int UNIT>
void decode_tile(const Weight& w, int64_t tile, int64_t begin, int64_t end, typename S::Element* out) {
  constexpr int V = block_vectors(BITS);
  constexpr int U = UNIT ? UNIT : V;
  const int64_t blocks = w.k_padded / (V * VECTOR);
  const float* entries[TILE];
  typename S::template Table<BITS> table[TILE];
  for (int r = 0; r < TILE; ++r) {
    entries[r] = table_of(w, std::min(tile * TILE + r, w.n - 1));
    table[r].set(entries[r]);
  }
  Groups groups(w, tile, UNIT ? UNIT : 1, begin * (V / U));
  if constexpr (UNIT != 0 && S::SCALES_TABLE) {
    for (int r = 0; r < TILE; ++r) table[r].set_scaled(entries[r], groups.scale[r], groups.offset[int(r)]);
  }
  const uint8_t* codes = w.codes + (tile * blocks + begin) * TILE * block_bytes(BITS);
  for (int64_t b = begin; b < end; ++b, codes += TILE * block_bytes(BITS), out += TILE * V * VECTOR) {
    unrolled<V / U>([&](auto u) INLINE {
      if (UNIT != 0 && groups.step()) {
        if constexpr (S::SCALES_TABLE) {
          unrolled<TILE>([&](auto r) INLINE { table[r].set_scaled(entries[r], groups.scale[r], groups.offset[int(r)]); });
        }
      }
      unrolled<TILE>([&](auto r) INLINE {
        const typename S::template Codes<BITS> code(codes + r * block_bytes(BITS));
        unrolled<U * S::PARTS>([&](auto i) INLINE {
          constexpr int j = u * U + i / S::PARTS, p = i % S::PARTS;
          if constexpr (p == 0 && r == 0) prefetch_share<S, BITS, j>(codes);
          auto weights = code.template get<j, p>(table[r]);
          if constexpr (UNIT != 0 && !S::SCALES_TABLE) weights = S::affine(weights, groups.scale[r], groups.offset[int(r)]);
          S::store(out + ((j * S::PARTS + p) * TILE + r) * S::LANES, weights);
        });
      });
    });
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
    if (begin == end) continue;
    if (w.cols[begin] < 0 || w.cols[end - 1] >= w.k_padded) {
      fine = false;
      continue;
    }
    // Columns rise within a row.
    int64_t i = std::lower_bound(w.cols + begin, w.cols + end, int32_t(from)) - w.cols;
    for (; i < end && w.cols[i] >= from && w.cols[i] < from + width; ++i) {
      S::add(decoded + interleaved<S>(S::position(w.cols[i] - from), r, TILE), w.vals[i]);
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

  static constexpr int64_t RUN = 64;      // tiles finished at once where weights go from registers into the products
  static constexpr int64_t BROAD = 64;    // rows of x from which strips are broad, so that x is read less often
  static constexpr int64_t WIDE = 128;    // rows of x from which they are wide, and x comes from the third cache level
  static constexpr int64_t TASKS = 2;     // that a thread should get at least
  static constexpr int64_t DEPTH = 2048;  // input features decoded at once: a tile and a panel of x fit the L1 cache

  // Whether each panel of x decodes the weights anew: better than storing them up to some rows, fewer with a sparse
  // part, which is then added to the stored weights once for all rows.
  static bool direct(const Weight& w, int64_t m) {
    return !w.stored && m <= (w.rows ? 2 : w.scales ? S::HEIGHT : S::DIRECT);
  }

  // Where the strips are too few for the threads, the rows are divided, and then the strips. A part decodes its weights
  // anew, which BROAD rows make up for; a narrower strip reads x more often.
  static Plan plan(const Weight& w, int64_t m, int64_t threads) {
    int64_t strip = direct(w, m) || m < BROAD ? TILE : m < WIDE ? 16 * TILE : 32 * TILE, parts = 1;
    const auto strips = [&] { return (w.n + strip - 1) / strip; };
    while (strip > TILE && strips() * parts < TASKS * threads) {
      if (m >= 2 * parts * BROAD) parts *= 2;
      else strip /= 2;
    }
    return {strip, strips(), parts};
  }

  static int64_t depth(const Weight& w) {
    const int64_t block = block_vectors(w.bits) * VECTOR;
    return std::min(w.k_padded, DEPTH / block * block);
  }

  // Floats that a task's results take; of stored weights at most, as the parts of the panels differ by one.
  static int64_t results(const Weight& w, int64_t m, const Plan& plan) {
    if (direct(w, m)) return RUN * TILE * m;
    return plan.strip * S::ROWS * ((count_panels(m, S::ROWS) + plan.parts - 1) / plan.parts);
  }

  static size_t scratch(const Weight& w, int64_t m, const Plan& plan) {
    const size_t decoded = direct(w, m) ? 0 : size_t(plan.strip * depth(w)) * sizeof(Element);
    return size_t(results(w, m, plan)) * sizeof(float) + decoded + 128;
  }

  // Rows of x are handled in panels of nearly equal height. Prepared, the rows of a panel alternate, but for `direct` they
  // stay whole: each is prepared as a panel of its own.
  static int64_t count_panels(int64_t m, int64_t height) { return (m + height - 1) / height; }
  static int64_t panels(const Weight& w, int64_t m) { return direct(w, m) ? m : count_panels(m, S::ROWS); }
  static int64_t panel_begin(int64_t m, int64_t panel, int64_t count) { return m * panel / count; }

  static void prepare(const Weight& w, const Source& source, int64_t panel, void* out, float* sums, float* plain) {
    const int64_t count = panels(w, source.m), begin = panel_begin(source.m, panel, count);
    const int64_t rows = panel_begin(source.m, panel + 1, count) - begin;
    const int64_t vectors = w.k_padded / VECTOR, per_group = w.group_padded / VECTOR;
    for (int64_t r = 0; r < rows; ++r) {
      auto* to = static_cast<Element*>(out) + begin * w.k_padded + r * S::LANES;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t g = v / per_group, offset = v % per_group * VECTOR;
        const int64_t filled = g < w.groups ? std::clamp<int64_t>(w.group - offset, 0, VECTOR) : 0;
        if (S::same(source.type) && filled == VECTOR && !sums && !plain) {
          const auto* from = static_cast<const Element*>(source.x) + (begin + r) * w.k + g * w.group + offset;
          std::memcpy(to, from, sizeof(Element) * VECTOR);
          to += rows * VECTOR;
          continue;
        }
        float values[VECTOR];
        if (filled < VECTOR) std::fill_n(values, VECTOR, 0.0f);
        widen(source.x, source.type, (begin + r) * w.k + g * w.group + offset, filled, values);
        Element ordered[VECTOR];
        S::order(values, ordered);
        for (int p = 0; p < S::PARTS; ++p, to += rows * S::LANES) {
          std::memcpy(to, ordered + p * S::LANES, sizeof(Element) * S::LANES);
        }
        if (plain) std::memcpy(plain + (begin + r) * w.k_padded + v * VECTOR, values, sizeof values);
        if (sums && filled) {
          float& sum = sums[(begin + r) * w.groups + g];
          sum = total(values, VECTOR) + (offset ? sum : 0.0f);
        }
      }
    }
  }

  static bool run(const Weight& w, const Input& in, const Output& out, const Plan& plan, int64_t begin, int64_t end,
                  char* scratch) {
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
    // Vectors that share a scale: those of 128 input features where groups allow (64 with 8 bits), else each has its own.
    constexpr int UNIT = BITS == 8 ? 2 : 4;
    if (!w.scales) return run_unit<BITS, 0>(w, in, out, plan, begin, end, scratch);
    if (w.group_padded / VECTOR % UNIT == 0) return run_unit<BITS, UNIT>(w, in, out, plan, begin, end, scratch);
    return run_unit<BITS, 1>(w, in, out, plan, begin, end, scratch);
  }

  template <int BITS, int UNIT>
  static bool run_unit(const Weight& w, const Input& in, const Output& out, const Plan& plan, int64_t begin,
                       int64_t end, char* scratch) {
    auto* c = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
    float* after = c + results(w, in.m, plan);
    auto* decoded = reinterpret_cast<Element*>((reinterpret_cast<uintptr_t>(after) + 63) & ~uintptr_t(63));
    bool fine = true;
    if (direct(w, in.m)) {
      for (int64_t tile = begin; tile < end; tile += RUN) {
        fine &= direct_run<BITS, UNIT>(w, in, out, tile, std::min(tile + RUN, end), c);
      }
    } else {
      for (int64_t task = begin; task < end; ++task) fine &= stored_task<BITS, UNIT>(w, in, out, plan, task, c, decoded);
    }
    return fine;
  }

  // The tiles [begin, end), after the sparse part of all their channels: the two read memory in different ways.
  template <int BITS, int UNIT>
  static bool direct_run(const Weight& w, const Input& in, const Output& out, int64_t begin, int64_t end, float* c) {
    const int64_t first = begin * TILE, channels = std::min(end * TILE, w.n) - first, width = (end - begin) * TILE;
    const int64_t panels = count_panels(in.m, S::HEIGHT);
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
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t m = panel_begin(in.m, p, panels), rows = panel_begin(in.m, p + 1, panels) - m;
        small_rows<S, BITS, UNIT>(w, in, m, rows, tile, c + m * width + (tile - begin) * TILE, width);
      }
    }
    finish(w, out, 0, in.m, first, width, c);
    return fine;
  }

  template <int BITS, int UNIT>
  static bool stored_task(const Weight& w, const Input& in, const Output& out, const Plan& plan, int64_t task, float* c,
                          Element* decoded) {
    constexpr int64_t BLOCK = block_vectors(BITS) * VECTOR;
    const int64_t width = plan.strip, channel = task % plan.strips * width, part = task / plan.strips;
    const int64_t tiles = std::min(width, w.n - channel + TILE - 1) / TILE;
    const int64_t blocks = w.k_padded / BLOCK, rounds = (w.k_padded + depth(w) - 1) / depth(w);
    const int64_t step = (blocks + rounds - 1) / rounds, panels = count_panels(in.m, S::ROWS);
    const int64_t first = panels * part / plan.parts, last = panels * (part + 1) / plan.parts;
    const int64_t row = panel_begin(in.m, first, panels), count = panel_begin(in.m, last, panels) - row;
    bool fine = true;
    std::fill_n(c, count * width, 0.0f);
    for (int64_t b = 0; b < blocks; b += step) {
      const int64_t end = std::min(b + step, blocks), features = (end - b) * BLOCK;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t tile = channel / TILE + t;
        auto* to = decoded + t * TILE * features;
        decode_tile<S, BITS, UNIT>(w, tile, b, end, to);
        if (w.rows) fine &= add_sparse<S>(w, tile, b * BLOCK, features, to);
      }
      for (int64_t p = first; p < last; ++p) {
        const int64_t m = panel_begin(in.m, p, panels), rows = panel_begin(in.m, p + 1, panels) - m;
        const auto* x = static_cast<const Element*>(in.x) + m * w.k_padded + b * BLOCK * rows;
        const int64_t share = features * rows / tiles;
        for (int64_t t = 0; t < tiles; ++t) {
          // A part of the next panel for every tile, while this one is multiplied.
          const auto* next = x + rows * w.k_padded + t * share;
          for (int64_t i = 0; in.m >= WIDE && i < share; i += 64 / int64_t(sizeof(Element))) {
            __builtin_prefetch(next + i, 0, 2);
          }
          float* to = c + (m - row) * width + t * TILE;
          multiply_rows<S>(decoded + t * TILE * features, x, features, to, width, rows);
        }
      }
    }
    finish(w, out, row, count, channel, width, c);
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

  static void finish(const Weight& w, const Output& out, int64_t row, int64_t rows, int64_t first, int64_t width,
                     float* c) {
    const int64_t count = std::min(width, w.n - first);
    for (int64_t m = row; m < row + rows; ++m, c += width) {
      for (int64_t i = 0; out.bias && i < count; ++i) c[i] += out.bias[first + i];
      narrow(c, count, out.type, out.y, m * w.n + first);
    }
  }

  static constexpr Kernel kernel(const char* name) {
    return {name, sizeof(Element), direct, panels, prepare, plan, scratch, run};
  }
};

}  // namespace
}  // namespace quantserve
