// The kernels without torch: packs weights as kernel.h says, runs every instruction set that this processor has and
// compares each result with float64. run.py builds it for ARM and runs it under QEMU.
//
//   harness                                     all checks; prints a line for each instruction set, the best last
//   harness count NAME BITS GROUP M K PRODUCTS  multiplies 16 channels PRODUCTS times by the same x, to count instructions
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/gemm.h"

namespace quantserve {
namespace {

std::vector<const Kernel*> available() {
  std::vector<const Kernel*> kernels{&portable};
#if defined(__aarch64__)
  kernels.push_back(&neon);
  if (has_neonbf16()) kernels.push_back(&neonbf16);
#endif
  return kernels;
}

// What a result may be off by, as a share of the sum of its products' magnitudes: in bfloat16 the weight, its sparse
// addition and the result are each rounded by 2^-8.
double rounding(Float type) { return type == Float::f32 ? 2e-6 : type == Float::bf16 ? 3.0 / 256 : 1.0 / 1024; }

const char* name_of(Float type) { return type == Float::f32 ? "float32" : type == Float::bf16 ? "bfloat16" : "float16"; }

// Values of a dtype, in memory of exactly their size.
struct Values {
  Float type;
  std::vector<char> bytes;

  Values(Float type, size_t count) : type(type), bytes(count * (type == Float::f32 ? 4 : 2)) {}
  void set(size_t i, float value) { narrow(&value, 1, type, bytes.data(), int64_t(i)); }
  double operator[](size_t i) const { return load_float(bytes.data(), type, int64_t(i)); }
};

struct Shape {
  int64_t n, k;
  int bits;
  int64_t group;  // 0: no scales
  bool zeros, columns;
  double sparse;  // share of entries
  Float scale_type = Float::f16;
};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A packed weight and the float64 matrix [n, k] that it means.
struct Case {
  Shape shape;
  Weight w{};
  std::vector<uint8_t> packed;
  std::vector<float> table, vals;
  std::vector<int32_t> rows, cols;
  Values scales, zeros;
  std::vector<double> matrix;

  Case(const Shape& s, std::mt19937& random)
      : shape(s), scales(s.scale_type, groups(s) * round_up(s.n, COLUMNS)), zeros(scales) {
    std::normal_distribution<float> normal;
    w.bits = s.bits;
    w.n = s.n;
    w.k = s.k;
    w.groups = groups(s);
    w.group = s.k / w.groups;
    w.columns = s.columns;
    w.group_padded = round_up(w.group, s.columns ? w.block() : VECTOR);
    w.k_padded = round_up(w.groups * w.group_padded, w.block());
    const int64_t tile = w.tile(), channels = round_up(s.n, tile);
    table.resize((s.columns ? 1 : s.n) << s.bits);
    for (float& entry : table) entry = normal(random);
    for (int64_t i = 0; i < channels * w.groups; ++i) {
      scales.set(i, std::uniform_real_distribution<float>(0.5f, 1.5f)(random));
      zeros.set(i, normal(random));
    }
    std::vector<uint8_t> codes(s.n * s.k);
    for (uint8_t& code : codes) code = uint8_t(random() & ((1u << s.bits) - 1));
    packed.resize(channels * w.k_padded * s.bits / 8);
    rows.push_back(0);
    for (int64_t n = 0; n < s.n; ++n) {
      for (int64_t k = 0; k < s.k; ++k) {
        const int64_t g = k / w.group, at = g * w.group_padded + k % w.group;
        const int64_t side = (n / tile * w.groups + g) * tile + n % tile;
        pack(n, at, codes[n * s.k + k]);
        double value = table[(s.columns ? 0 : n << s.bits) + codes[n * s.k + k]];
        if (s.group) value = (value - (s.zeros ? zeros[side] : 0.0)) * scales[side];
        if (std::uniform_real_distribution<double>()(random) < s.sparse) {
          cols.push_back(int32_t(at));
          vals.push_back(normal(random));
          value += vals.back();
        }
        matrix.push_back(value);
      }
      rows.push_back(int32_t(cols.size()));
    }
    w.codes = packed.data();
    w.table = table.data();
    w.scales = s.group ? scales.bytes.data() : nullptr;
    w.zeros = s.zeros ? zeros.bytes.data() : nullptr;
    w.scale_type = s.scale_type;
    w.rows = s.sparse > 0 ? rows.data() : nullptr;
    w.cols = cols.data();
    w.vals = vals.data();
    w.nnz = int64_t(cols.size());
  }

  static int64_t groups(const Shape& s) { return s.group > 0 ? s.k / s.group : 1; }

  // Feature `at` of a channel's row as stored.
  void pack(int64_t n, int64_t at, unsigned code) {
    const int64_t span = w.columns ? 2 : VECTOR, tile = w.tile();
    const int64_t block = at / w.block(), blocks = w.k_padded / w.block();
    const int64_t j = at % w.block() / span, i = w.columns ? 2 * (n % tile) + at % 2 : at % VECTOR;
    const int64_t before = w.columns ? n / tile * blocks + block : (n / tile * blocks + block) * tile + n % tile;
    uint8_t* to = packed.data() + before * block_bytes(w.bits);
    const auto set = [&](int64_t load, int64_t bit, unsigned value) {
      const unsigned word = value << bit;
      to[64 * load + 2 * i] |= uint8_t(word);
      to[64 * load + 2 * i + 1] |= uint8_t(word >> 8);
    };
    if (w.bits != 3) set(0, w.bits * j, code);
    else if (j < 15) set(j / 5, 3 * (j % 5), code);
    else for (int t = 0; t < 3; ++t) set(t, 15, code >> t & 1);
  }
};

struct Rows {
  int64_t m;
  Values x;
  std::vector<float> bias;
};

Rows random_rows(const Case& c, int64_t m, Float type, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Rows rows{m, Values(type, m * c.w.k), {}};
  for (int64_t i = 0; i < m * c.w.k; ++i) rows.x.set(i, normal(random));
  if (m % 2) {
    for (int64_t n = 0; n < c.w.n; ++n) rows.bias.push_back(normal(random));
  }
  return rows;
}

// The product, as ops.cpp asks for it. `parts` calls of `run` share the tasks of a plan for `threads` threads; all that is
// done `times` times.
bool multiply(const Kernel& kernel, const Weight& w, const Rows& rows, int64_t threads, int64_t parts, Values& y,
              int64_t times = 1) {
  const bool direct = kernel.direct(w, rows.m);
  std::vector<char> prepared(rows.m * w.k_padded * kernel.element);
  std::vector<float> sums(direct && w.zeros ? rows.m * w.groups : 0), plain(direct && w.rows ? rows.m * w.k_padded : 0);
  const auto given = [](std::vector<float>& of) { return of.empty() ? nullptr : of.data(); };
  const Source source{rows.x.bytes.data(), rows.x.type, rows.m};
  for (int64_t panel = 0; panel < kernel.panels(w, rows.m); ++panel) {
    kernel.prepare(w, source, panel, prepared.data(), given(sums), given(plain));
  }
  const Input in{prepared.data(), given(sums), given(plain), rows.m};
  const Output out{y.bytes.data(), y.type, rows.bias.empty() ? nullptr : rows.bias.data()};
  const Plan plan = kernel.plan(w, rows.m, threads);
  std::vector<float> slices(plan.slices > 1 ? plan.slices * rows.m * w.n : 0);
  const Output sliced{slices.data(), Float::f32, nullptr};
  std::vector<char> scratch(kernel.scratch(w, rows.m, plan));
  bool fine = true;
  for (int64_t i = 0; i < parts * times; ++i) {
    const int64_t part = i % parts, begin = plan.tasks() * part / parts, end = plan.tasks() * (part + 1) / parts;
    if (begin < end) fine &= kernel.run(w, in, plan.slices > 1 ? sliced : out, plan, begin, end, scratch.data());
  }
  if (plan.slices > 1) kernel.join(slices.data(), out, plan, rows.m, w.n, 0, rows.m * w.n);
  return fine;
}

// The largest error of a result over what its dtype allows.
double worst_error(const Case& c, const Rows& rows, const Values& y) {
  double worst = 0;
  for (int64_t m = 0; m < rows.m; ++m) {
    for (int64_t n = 0; n < c.w.n; ++n) {
      double sum = rows.bias.empty() ? 0.0 : rows.bias[n], magnitude = std::abs(sum);
      for (int64_t k = 0; k < c.w.k; ++k) {
        const double product = rows.x[m * c.w.k + k] * c.matrix[n * c.w.k + k];
        sum += product;
        magnitude += std::abs(product);
      }
      const double error = std::abs(y[m * c.w.n + n] - sum) / std::max(magnitude, 1e-12) / rounding(y.type);
      worst = std::isfinite(error) ? std::max(worst, error) : HUGE_VAL;
    }
  }
  return worst;
}

[[noreturn]] void fail(const Kernel& kernel, const Case& c, const Rows& rows, const std::string& what) {
  const Shape& s = c.shape;
  std::printf("%s: %d bits, n %ld, k %ld, group %ld, zeros %d, columns %d, sparse %g, m %ld of %s: %s\n",
              kernel.name, s.bits, long(s.n), long(s.k), long(s.group), s.zeros, s.columns, s.sparse, long(rows.m),
              name_of(rows.x.type), what.c_str());
  std::exit(1);
}

struct Checks {
  const Kernel& kernel;
  std::mt19937 random{7};
  int products = 0;
  double worst[3] = {0, 0, 0};  // by dtype

  void check(Case& c, int64_t m, Float type) {
    const Rows rows = random_rows(c, m, type, random);
    for (const bool stored : {false, true}) {
      c.w.stored = stored;
      Values y(type, m * c.w.n), cut(y);
      if (!multiply(kernel, c.w, rows, 1, 1, y)) fail(kernel, c, rows, "the sparse part was refused");
      const double error = worst_error(c, rows, y);
      worst[int(type)] = std::max(worst[int(type)], error);
      if (error > 1.01) fail(kernel, c, rows, "the error is " + std::to_string(error) + " times what is allowed");
      multiply(kernel, c.w, rows, 9, 3, cut);
      if (cut.bytes != y.bytes) fail(kernel, c, rows, "nine threads give another result than one");
      ++products;
    }
  }

  void shapes(Float type) {
    for (const int bits : {2, 3, 4, 8}) {
      const Shape all[] = {
          {1, 1, bits, 0, false, false, 0},
          {1, 37, bits, 0, false, false, 0},
          {5, 40, bits, 0, false, false, 0.1},
          {67, 331, bits, 0, false, false, 0.02},
          {6, 130, bits, 0, false, true, 0},
          {3, 128, bits, 128, true, true, 0},
          {18, 384, bits, 64, true, true, 0.02},
          {39, 331, bits, 0, false, true, 0.02},
          {7, 96, bits, 96, true, true, 0, Float::f32},
          {9, 96, bits, 48, true, true, 0, Float::bf16},
          {6, 80, bits, 16, true, true, 0.1},
          {17, 70, bits, 7, true, true, 0},
          {4, 256, bits, 32, false, false, 0},
          {7, 96, bits, 24, true, false, 0.05, Float::bf16},
          {37, 512, bits, 128, false, true, 0, Float::f32},
      };
      for (const Shape& shape : all) {
        Case c(shape, random);
        for (const int64_t m : {1, 2, 3, 4, 5, 8, 17, 33, 70}) {
          if (shape.n * shape.k > 20000 && m > 33) continue;
          check(c, m, type);
        }
      }
    }
  }

  void every_number_of_rows(Float type) {
    for (const bool columns : {false, true}) {
      Case c({20, 160, 4, columns ? 32 : 0, columns, columns, 0.05}, random);
      for (int64_t m = 1; m <= 70; ++m) check(c, m, type);
      check(c, 130, type);
      Case deep({5, 4160, 3, 0, false, columns, 0.01}, random);  // deeper than what is decoded at once
      for (const int64_t m : {1, 4, 19}) check(deep, m, type);
    }
  }

  // What these checks must notice: codes that changed, and a sparse part that points outside.
  void damage() {
    for (const bool columns : {false, true}) {
      Case c({8, 16, 4, 0, false, columns, 0.3}, random);
      for (const int64_t m : {2, 20}) {
        const Rows rows = random_rows(c, m, Float::bf16, random);
        Values y(Float::bf16, m * c.w.n);
        c.packed[8] ^= 0x88;
        multiply(kernel, c.w, rows, 1, 1, y);
        if (worst_error(c, rows, y) < 1.01) fail(kernel, c, rows, "changed codes changed nothing");
        c.packed[8] ^= 0x88;
        const int32_t last = std::exchange(c.cols.back(), int32_t(c.w.k_padded));
        if (multiply(kernel, c.w, rows, 1, 1, y)) fail(kernel, c, rows, "a column outside was taken");
        c.cols.back() = last;
      }
    }
  }

  void run() {
    shapes(Float::bf16);
    every_number_of_rows(Float::bf16);
    if (kernel.element == 4) {  // the other kernels are never given these
      for (const Float type : {Float::f32, Float::f16}) every_number_of_rows(type);
      shapes(Float::f32);
    }
    damage();
    std::printf("%s: %d products; largest error, of what is allowed:", kernel.name, products);
    for (const Float type : {Float::f32, Float::f16, Float::bf16}) {
      if (worst[int(type)] > 0) std::printf(" %s %.3f", name_of(type), worst[int(type)]);
    }
    std::puts("");
    std::fflush(stdout);
  }
};

void count(const Kernel& kernel, char** arguments) {
  std::mt19937 random{7};
  const int64_t group = std::atoi(arguments[1]), m = std::atoi(arguments[2]), k = std::atoi(arguments[3]);
  Case c({COLUMNS, k, std::atoi(arguments[0]), group, group > 0, group > 0, 0}, random);
  const Rows rows = random_rows(c, m, Float::bf16, random);
  Values y(Float::bf16, m * c.w.n);
  multiply(kernel, c.w, rows, 1, 1, y, std::atoi(arguments[4]));
}

}  // namespace
}  // namespace quantserve

int main(int arguments, char** argument) {
  for (const quantserve::Kernel* kernel : quantserve::available()) {
    if (arguments == 1) quantserve::Checks{*kernel}.run();
    else if (arguments == 8 && std::string(argument[2]) == kernel->name) quantserve::count(*kernel, argument + 3);
  }
}
