// Any processor: eight lanes in float32, which the compiler maps to what there is. The order of x is that of
// isa_avx2.cpp.
#include "gemm.h"

namespace quantserve {
namespace {

typedef float Lanes __attribute__((vector_size(32)));

struct Portable {
  using Element = float;
  using Acc = Lanes;
  using Vec = Lanes;
  static constexpr int PARTS = 4, LANES = 8, ROWS = 1, HEIGHT = 2, DIRECT = 2, AHEAD = 0;
  static constexpr int TALL = 2, SHALLOW = 1, SPREAD = 1, CHAINS = 4, COLUMN_DIRECT = 2;
  static constexpr bool COMPUTES = false;

  template <int BITS>
  struct Table {
    const float* entries;
    void set(const float* from) { entries = from; }
  };

  template <int BITS>
  using Wide = Table<BITS>;

  template <int BITS>
  struct Codes {
    const uint8_t* from;

    explicit Codes(const uint8_t* at) : from(at) {}
    unsigned word(int load, int i) const { return from[64 * load + 2 * i] | unsigned(from[64 * load + 2 * i + 1]) << 8; }
    template <int J, int P>
    Lanes get(const Table<BITS>& table) const {
      Lanes out;
      for (int i = 0; i < LANES; ++i) {
        const int at = P % 2 * 16 + 2 * i + P / 2;
        unsigned code;
        if (BITS != 3) code = word(0, at) >> (BITS * J);
        else if (J < 15) code = word(J / 5, at) >> (3 * (J % 5));
        else code = word(0, at) >> 15 | (word(1, at) >> 14 & 2) | (word(2, at) >> 13 & 4);
        out[i] = table.entries[code & ((1u << BITS) - 1)];
      }
      return out;
    }
  };

  static Lanes zero() { return Lanes{}; }
  static void prefetch(const void*) {}
  static Lanes load(const float* from) {
    Lanes out;
    std::memcpy(&out, from, sizeof out);
    return out;
  }
  static void store(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }
  static Lanes mac(Lanes acc, Lanes weights, Lanes x) { return acc + weights * x; }
  static Lanes spread(const float* feature) { return Lanes{} + *feature; }
  template <int BITS, int J, int P>
  static Lanes scaled(const Codes<BITS>& code, const Table<BITS>& table, Lanes scale, Lanes offset) {
    return code.template get<J, P>(table) * scale + offset;
  }
  static void add_sums(const Lanes& a, const Lanes& b, const Lanes& c, const Lanes& d, float* out) {
    for (const Lanes* lanes : {&a, &b, &c, &d}) {
      const Lanes& v = *lanes;
      *out++ += ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
    }
  }
  static bool same(Float) { return false; }  // whether x is stored as it comes
  static int64_t position(int64_t k) { return (k & ~int64_t(31)) + (k & 1) * 16 + (k & 31) / 2; }
  static void order(const float* from, float* to) {
    for (int i = 0; i < VECTOR; ++i) to[position(i)] = from[i];
  }
  static void add(float* to, float value) { *to += value; }
};

}  // namespace

const Kernel portable = Gemm<Portable>::kernel("portable");

}  // namespace quantserve
