// AMX: many rows of x times tiles of weights that are decoded with AVX-512-BF16. Few rows go to that kernel itself; the
// codes are stored once for both.
//
// Decoded weights are tiles as they come out of the decoder, so no weight is transposed:
//
//   rows     [16 channels, 32 features] is the left operand. x is the right one: `prepare` transposes its pairs of
//            features once, to panels of [k_padded / 2, rows, 2]. Results are [channels, rows].
//   columns  [16 pairs of features, 16 channels, 2] is the right operand, and x the left one, in panels of
//            [k_padded / 32, rows, 32]. Results are [rows, channels].
//
// A panel is 16 rows of x, the last one those that are left.
#include "avx512bf16.h"
#include "tiles.h"

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace quantserve {
namespace {

using S = Avx512Bf16;
using tiles::ROWS;

constexpr int64_t FEW = 4;               // rows of x up to which AVX-512-BF16 computes, where that takes them in one panel
constexpr int64_t DEPTH = 512;           // input features of a round: two panels of x fit the L1 cache
constexpr int64_t NARROW = 64, WIDE = 256;  // output channels of a strip: few rows, or what fits the L2 cache
constexpr int64_t PANELS_FOR_WIDE = 8;
constexpr int64_t PANELS_OF_A_PART = 32;  // at most: the results of a task stay in the L2 cache
constexpr int64_t TASKS = 2;              // that a thread should get at least
constexpr int64_t RESULTS = ROWS * ROWS;  // of a tile

int64_t divided(int64_t value, int64_t by) { return (value + by - 1) / by; }

bool direct(const Weight& w, int64_t m) { return m <= FEW && avx512bf16.direct(w, m); }

int64_t panels(const Weight& w, int64_t m) { return direct(w, m) ? avx512bf16.panels(w, m) : divided(m, ROWS); }

// lanes[i] of rows[j] becomes lanes[j] of rows[i].
void transpose(__m512i* rows) {
  __m512i pairs[ROWS], fours[ROWS];
  unrolled<ROWS / 2>([&](auto i) INLINE {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  unrolled<ROWS / 4>([&](auto i) INLINE {  // 128 bits of fours[4 i + j] are lane 4 t + j of four rows
    fours[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    fours[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
  });
  unrolled<4>([&](auto j) INLINE {
    const __m512i even_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  });
}

__mmask16 first(int64_t lanes) { return __mmask16((1u << lanes) - 1); }

__mmask32 words(int64_t count) { return __mmask32((uint64_t(1) << count) - 1); }

// 32 input features of a row of x from `at` on, as codes are stored: with zeros in the gaps of groups, and at the end.
__m512i window(const Weight& w, const Source& source, int64_t row, int64_t at) {
  if (S::same(source.type) && w.group == w.group_padded) {
    const auto* x = static_cast<const uint16_t*>(source.x) + row * w.k + at;
    return _mm512_maskz_loadu_epi16(words(std::clamp<int64_t>(w.k - at, 0, VECTOR)), x);
  }
  uint16_t out[VECTOR] = {};
  for (int64_t i = 0, size; i < VECTOR; i += size) {
    const int64_t g = (at + i) / w.group_padded, offset = (at + i) % w.group_padded;
    size = std::min(VECTOR - i, w.group_padded - offset);
    const int64_t filled = g < w.groups ? std::clamp<int64_t>(w.group - offset, 0, size) : 0;
    float values[VECTOR];
    widen(source.x, source.type, row * w.k + g * w.group + offset, filled, values);
    for (int64_t j = 0; j < filled; ++j) out[i + j] = float_to_bf16(values[j]);
  }
  return S::load(out);
}

void prepare(const Weight& w, const Source& source, int64_t panel, void* out, float* sums, float* plain) {
  if (direct(w, source.m)) return avx512bf16.prepare(w, source, panel, out, sums, plain);
  const int64_t begin = panel * ROWS, rows = std::min<int64_t>(ROWS, source.m - begin);
  auto* to = static_cast<uint16_t*>(out) + begin * w.k_padded;
  for (int64_t at = 0; at < w.k_padded; at += VECTOR) {
    const int64_t width = std::min<int64_t>(VECTOR, w.k_padded - at);
    __m512i lines[ROWS] = {};
    for (int64_t r = 0; r < rows; ++r) lines[r] = window(w, source, begin + r, at);
    if (w.columns) {
      for (int64_t r = 0; r < rows; ++r, to += width) _mm512_mask_storeu_epi16(to, words(width), lines[r]);
    } else {
      transpose(lines);
      for (int i = 0; i < ROWS; ++i, to += 2 * rows) _mm512_mask_storeu_epi32(to, first(rows), lines[i]);
    }
  }
}

// `features` of a panel that is no whole number of tiles, filled up with zeros.
void fill_up(const Weight& w, const uint16_t* from, int64_t rows, int64_t features, uint16_t* to) {
  if (!w.columns) {
    for (int64_t i = 0; i < features / 2; ++i, from += 2 * rows, to += 2 * ROWS) {
      _mm512_store_si512(to, _mm512_maskz_loadu_epi32(first(rows), from));
    }
    return;
  }
  for (int64_t at = 0; at < features; at += VECTOR) {
    const int64_t width = std::min<int64_t>(VECTOR, features - at);
    for (int64_t r = 0; r < ROWS; ++r, to += VECTOR) {
      _mm512_store_si512(to, r < rows ? _mm512_maskz_loadu_epi16(words(width), from + r * width) : _mm512_setzero_si512());
    }
    from += rows * width;
  }
}

// Strips stay whole tiles: narrower ones would take the same time. Where they are too few for the threads, the rows are
// divided, down to a panel each; every part decodes its weights anew.
Plan plan(const Weight& w, int64_t m, int64_t threads) {
  if (direct(w, m)) return avx512bf16.plan(w, m, threads);
  const int64_t all = panels(w, m);
  int64_t strip = all < PANELS_FOR_WIDE ? NARROW : WIDE, parts = divided(all, PANELS_OF_A_PART);
  const auto strips = [&] { return divided(w.n, strip); };
  while (strips() * parts < TASKS * threads) {
    if (all >= 2 * parts * PANELS_FOR_WIDE / 2) parts *= 2;
    else if (strip > ROWS) strip /= 2;
    else if (all >= 2 * parts) parts *= 2;
    else break;
  }
  return {strip, strips(), parts};
}

// Input features of a round: whole blocks of codes, and but for the last round whole tiles.
int64_t depth(const Weight& w) {
  return std::min(w.k_padded, std::max(w.block(), DEPTH / w.block() * w.block()));
}

int64_t whole_tiles(int64_t features) { return divided(features, VECTOR) * VECTOR; }

struct Scratch {
  float* results;     // [strip / 16, panels of a part] tiles
  uint16_t* weights;  // [strip / 16, depth / 32] tiles
  uint16_t* x;        // [2 panels, depth / 32] tiles: what is filled up with zeros

  static int64_t count(const Weight& w, int64_t m, const Plan& plan) {
    return divided(plan.strip, ROWS) * divided(panels(w, m), plan.parts) * RESULTS;
  }
  static size_t bytes(const Weight& w, int64_t m, const Plan& plan) {
    const int64_t decoded = (divided(plan.strip, ROWS) + 2) * ROWS * whole_tiles(depth(w));
    return 64 + count(w, m, plan) * sizeof(float) + decoded * sizeof(uint16_t);
  }
  Scratch(const Weight& w, int64_t m, const Plan& plan, char* memory)
      : results(reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t(63))),
        weights(reinterpret_cast<uint16_t*>(results + count(w, m, plan))),
        x(weights + divided(plan.strip, ROWS) * ROWS * whole_tiles(depth(w))) {}
};

size_t scratch(const Weight& w, int64_t m, const Plan& plan) {
  return direct(w, m) ? avx512bf16.scratch(w, m, plan) : Scratch::bytes(w, m, plan);
}

template <int BITS>
void decode_bits(const Weight& w, int64_t tile, int64_t begin, int64_t end, uint16_t* out) {
  if (w.columns) return decode_columns<S, BITS>(w, tile, begin, end, out);
  if (w.scales) return decode_tile<S, BITS, true, ROWS>(w, tile, begin, end, out);
  decode_tile<S, BITS, false, ROWS>(w, tile, begin, end, out);
}

void decode(const Weight& w, int64_t tile, int64_t begin, int64_t end, uint16_t* out) {
  switch (w.bits) {
    case 2: return decode_bits<2>(w, tile, begin, end, out);
    case 3: return decode_bits<3>(w, tile, begin, end, out);
    case 4: return decode_bits<4>(w, tile, begin, end, out);
    default: return decode_bits<8>(w, tile, begin, end, out);
  }
}

// Decodes input features [k, k + features) of a strip, sparse entries included, to tiles of whole[ROWS, features].
bool decode_strip(const Weight& w, int64_t channel, int64_t channels, int64_t k, int64_t features, uint16_t* out) {
  const int64_t whole = whole_tiles(features), size = w.tile(), together = ROWS / size;
  bool fine = true;
  for (int64_t i = 0; i < divided(channels, size); ++i) {
    const int64_t tile = channel / size + i;
    uint16_t* to = out + i / together * ROWS * whole + i % together * size * VECTOR;
    decode(w, tile, k / w.block(), (k + features) / w.block(), to);
    if (features < whole) std::fill(to + ROWS * features, to + ROWS * whole, uint16_t(0));  // columns alone have such rests
    if (w.rows) fine &= add_sparse<S, ROWS>(w, tile, k, features, to);
  }
  return fine;
}

// N tiles of channels times M panels of x over `features`: results[n, m] = weights[n] . x[m] in the first round, else +=.
// `between` is the distance of results of neighbouring tiles of channels. Registers: results 0 to 3, weights 4 and 5 in turn,
// x 6 and 7.
template <bool COLUMNS_LAYOUT, int N, int M>
void multiply(const uint16_t* weights, const uint16_t* const* x, int64_t features, bool begins, float* results,
              int64_t between) {
  static_assert(N * M <= 4);
  unrolled<N * M>([&](auto i) INLINE {
    if (begins) tiles::zero<i>();
    else tiles::load<i>(results + i / M * between + i % M * RESULTS);
  });
  for (int64_t at = 0; at < ROWS * features; at += ROWS * VECTOR) {
    unrolled<M>([&](auto m) INLINE { tiles::load<6 + m>(x[m] + at); });
    unrolled<N>([&](auto n) INLINE {
      constexpr int W = 4 + n % 2;
      tiles::load<W>(weights + n * ROWS * features + at);
      unrolled<M>([&](auto m) INLINE {
        if constexpr (COLUMNS_LAYOUT) tiles::multiply<n * M + m, 6 + m, W>();
        else tiles::multiply<n * M + m, W, 6 + m>();
      });
    });
  }
  unrolled<N * M>([&](auto i) INLINE { tiles::store<i>(results + i / M * between + i % M * RESULTS); });
}

template <bool COLUMNS_LAYOUT>
constexpr decltype(&multiply<false, 1, 1>) BLOCKS[2][4] = {
    {multiply<COLUMNS_LAYOUT, 1, 1>, multiply<COLUMNS_LAYOUT, 2, 1>, multiply<COLUMNS_LAYOUT, 3, 1>,
     multiply<COLUMNS_LAYOUT, 4, 1>},
    {multiply<COLUMNS_LAYOUT, 1, 2>, multiply<COLUMNS_LAYOUT, 2, 2>}};

// Adds the bias and writes the results of a tile: 16 channels of up to 16 rows.
void write(const Weight& w, const Output& out, int64_t channel, int64_t row, int64_t rows, const float* results) {
  const int64_t count = std::min<int64_t>(ROWS, w.n - channel);
  __m512i lines[ROWS];
  for (int i = 0; i < ROWS; ++i) lines[i] = _mm512_loadu_si512(results + i * ROWS);
  if (!w.columns) transpose(lines);
  const __m512 bias = out.bias ? _mm512_maskz_loadu_ps(first(count), out.bias + channel) : _mm512_setzero_ps();
  for (int64_t m = 0; m < rows; ++m) {
    alignas(64) float values[ROWS];
    _mm512_store_ps(values, _mm512_add_ps((__m512)lines[m], bias));
    narrow(values, count, out.type, out.y, (row + m) * w.n + channel);
  }
}

bool compute(const Weight& w, const Input& in, const Output& out, const Plan& plan, int64_t task, const Scratch& at) {
  const int64_t channel = task % plan.strips * plan.strip, part = task / plan.strips, all = panels(w, in.m);
  const int64_t channels = std::min(plan.strip, w.n - channel), heights = divided(channels, ROWS);
  const int64_t from = all * part / plan.parts, to = all * (part + 1) / plan.parts, between = (to - from) * RESULTS;
  const auto& blocks = w.columns ? BLOCKS<true> : BLOCKS<false>;
  bool fine = true;
  for (int64_t k = 0; k < w.k_padded; k += depth(w)) {
    const int64_t features = std::min(depth(w), w.k_padded - k), whole = whole_tiles(features);
    fine &= decode_strip(w, channel, channels, k, features, at.weights);
    for (int64_t panel = from; panel < to; panel += 2) {
      const int64_t count = std::min<int64_t>(2, to - panel), step = 4 / count;
      const uint16_t* x[2] = {};
      for (int64_t p = 0; p < count; ++p) {
        const int64_t row = (panel + p) * ROWS, rows = std::min<int64_t>(ROWS, in.m - row);
        x[p] = static_cast<const uint16_t*>(in.x) + row * w.k_padded + k * rows;
        if (rows == ROWS && features == whole) continue;
        uint16_t* filled = at.x + p * ROWS * whole;
        fill_up(w, x[p], rows, features, filled);
        x[p] = filled;
      }
      for (int64_t t = 0; t < heights; t += step) {
        const auto multiply = blocks[count - 1][std::min(step, heights - t) - 1];
        float* results = at.results + t * between + (panel - from) * RESULTS;
        multiply(at.weights + t * ROWS * whole, x, whole, k == 0, results, between);
      }
    }
  }
  for (int64_t panel = from; panel < to; ++panel) {
    const int64_t row = panel * ROWS, rows = std::min<int64_t>(ROWS, in.m - row);
    for (int64_t t = 0; t < heights; ++t) {
      write(w, out, channel + t * ROWS, row, rows, at.results + t * between + (panel - from) * RESULTS);
    }
  }
  return fine;
}

bool run(const Weight& w, const Input& in, const Output& out, const Plan& plan, int64_t begin, int64_t end, char* memory) {
  if (direct(w, in.m)) return avx512bf16.run(w, in, out, plan, begin, end, memory);
  const tiles::Whole whole;
  const Scratch at(w, in.m, plan, memory);
  bool fine = true;
  for (int64_t task = begin; task < end; ++task) fine &= compute(w, in, out, plan, task, at);
  return fine;
}

}  // namespace

const Kernel amx = {"amx", sizeof(uint16_t), direct, panels, prepare, plan, scratch, run, Gemm<S>::join};

bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned TILES_AND_BF16 = 1u << 24 | 1u << 22;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILES_AND_BF16) != TILES_AND_BF16) return false;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

}  // namespace quantserve
