// Any processor: plain loops over eight lanes, in float32, left to the compiler to vectorize.
#include "gemm.h"

namespace quantserve {
namespace {

struct Lanes {
  float value[8];
};

struct Portable {
  using Element = float;
  using Acc = Lanes;
  using Vec = Lanes;
  static constexpr int PARTS = 4, LANES = 8, ROWS = 1, HEIGHT = 2, DIRECT = 2, AHEAD = 0;
  static constexpr bool SCALES_TABLE = false;

  template <int BITS>
  struct Table {
    const float* entries;
    void set(const float* from) { entries = from; }
  };

  template <int BITS>
  struct Codes {
    const uint8_t* from;

    explicit Codes(const uint8_t* at) : from(at) {}
    unsigned word(int load, int i) const { return from[64 * load + 2 * i] | unsigned(from[64 * load + 2 * i + 1]) << 8; }
    template <int J, int P>
    Lanes get(const Table<BITS>& table) const {
      Lanes out;
      for (int i = 0; i < LANES; ++i) {
        const int at = P * LANES + i;
        unsigned code;
        if (BITS != 3) code = word(0, at) >> (BITS * J);
        else if (J < 15) code = word(J / 5, at) >> (3 * (J % 5));
        else code = word(0, at) >> 15 | (word(1, at) >> 14 & 2) | (word(2, at) >> 13 & 4);
        out.value[i] = table.entries[code & ((1u << BITS) - 1)];
      }
      return out;
    }
  };

  static Lanes zero() { return {}; }
  static void prefetch(const void*) {}
  static Lanes load(const float* from) {
    Lanes out;
    std::memcpy(out.value, from, sizeof out.value);
    return out;
  }
  static void store(float* to, Lanes value) { std::memcpy(to, value.value, sizeof value.value); }
  static Lanes mac(Lanes acc, Lanes weights, Lanes x) {
    for (int i = 0; i < LANES; ++i) acc.value[i] += weights.value[i] * x.value[i];
    return acc;
  }
  static Lanes affine(Lanes weights, float scale, float offset) {
    for (int i = 0; i < LANES; ++i) weights.value[i] = weights.value[i] * scale + offset;
    return weights;
  }
  static Lanes scale(Lanes part, float scale, Lanes acc) {
    for (int i = 0; i < LANES; ++i) acc.value[i] += part.value[i] * scale;
    return acc;
  }
  static void add_sums(const Lanes& a, const Lanes& b, const Lanes& c, const Lanes& d, float* out) {
    for (const Lanes* lanes : {&a, &b, &c, &d}) {
      const float* v = lanes->value;
      *out++ += ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
    }
  }
  static bool same(Float) { return false; }  // whether x is stored as it comes
  static int64_t position(int64_t k) { return k; }
  static void order(const float* from, float* to) { std::memcpy(to, from, sizeof(float) * VECTOR); }
  static void add(float* to, float value) { *to += value; }
};

}  // namespace

const Kernel portable = Gemm<Portable>::kernel("portable");

}  // namespace quantserve
