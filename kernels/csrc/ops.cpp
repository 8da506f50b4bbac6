// The torch operators: every argument is checked here, then plain pointers go to one instruction set's kernel.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "operator.h"

#if defined(__linux__)
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace quantserve {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t ROWS_AT_ONCE = 1024;  // bounds what a thread needs beside the result

// --- instruction sets ---------------------------------------------------------------------------------------------

std::vector<const Kernel*> available() {  // best last
  std::vector<const Kernel*> kernels{&portable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back(&avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    kernels.push_back(&avx512);
    // Cooper Lake has the first and not the second, and is rare.
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) {
      kernels.push_back(&avx512bf16);
      if (may_use_amx()) kernels.push_back(&amx);
    }
  }
#elif defined(__aarch64__)
  kernels.push_back(&neon);
  if (has_neonbf16()) kernels.push_back(&neonbf16);
#endif
  return kernels;
}

std::atomic<const Kernel*>& chosen() {
  static std::atomic<const Kernel*> kernel{available().back()};
  return kernel;
}

// Sets the instruction set where `name` is not empty; returns the names, the one in use first.
std::vector<std::string> isa(const std::string& name) {
  std::vector<std::string> names;
  const auto kernels = available();
  for (const Kernel* kernel : kernels) {
    names.push_back(kernel->name);
    if (name == kernel->name) chosen() = kernel;
  }
  TORCH_CHECK_VALUE(name.empty() || name == chosen().load()->name, "instruction set ", name,
                    " is not available on this processor; known here: ", c10::Join(", ", names));
  names.insert(names.begin(), chosen().load()->name);
  return names;
}

}  // namespace

const Kernel& kernel_for(at::ScalarType type) {
#if defined(__x86_64__)
  // float32 and float16 activations keep their precision.
  if ((chosen() == &avx512bf16 || chosen() == &amx) && type != at::kBFloat16) return avx512;
#elif defined(__aarch64__)
  if (chosen() == &neonbf16 && type != at::kBFloat16) return neon;
#endif
  return *chosen();
}

// --- checks -------------------------------------------------------------------------------------------------------

Float float_type(const Tensor& tensor, const std::string& name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Float::f32;
    case at::kHalf: return Float::f16;
    case at::kBFloat16: return Float::bf16;
    default: TORCH_CHECK_TYPE(false, name, " is ", tensor.scalar_type(), "; known: float32, float16, bfloat16");
  }
}

void check(const Tensor& tensor, const std::string& name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " is on ", tensor.device(), ", expected the CPU");
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), ", expected ", shape);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " is not contiguous. Fix: pass ", name, ".contiguous()");
}

void check(const Tensor& tensor, const std::string& name, at::IntArrayRef shape, at::ScalarType type) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(), ", expected ", type);
  check(tensor, name, shape);
}

namespace {

// The part of a weight that follows from numbers alone.
Weight shape_of(int64_t bits, int64_t n, int64_t k, int64_t group_size, bool columns) {
  TORCH_CHECK_VALUE(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits is ", bits, "; known: 2, 3, 4, 8");
  TORCH_CHECK_VALUE(n >= 1 && k >= 1 && n <= INT32_MAX && k <= INT32_MAX, "n ", n, " and k ", k,
                    " must be at least 1 and below 2^31");
  const int64_t group = group_size == -1 ? k : group_size;
  TORCH_CHECK_VALUE(group >= 1 && k % group == 0, "group_size ", group_size, " does not divide k ", k);
  Weight w{};
  w.bits = w.coding = int(bits);
  w.n = n;
  w.k = k;
  w.group = group;
  w.groups = k / group;
  w.columns = columns;
  w.group_padded = round_up(group, columns ? w.block() : VECTOR);
  w.k_padded = round_up(w.groups * w.group_padded, w.block());
  return w;
}

// What makes the table of 256 entries, or 8 where they have to be looked up.
int coding_of(const float* table) {
  const float first = std::min(table[0], table[128]);
  const bool flips = table[128] < table[0];
  bool integers = first == std::floor(first) && std::fabs(first) <= 1 << 20, floats = true;
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15, fraction = code & 7;
    const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(float(fraction), -9);
    integers &= table[code] == first + (flips ? code ^ 128 : code);
    floats &= table[code] == (code < 128 ? size : -size);
  }
  return integers ? INTEGERS : floats ? E4M3 : 8;
}

}  // namespace

int64_t code_bytes(const Weight& w) { return round_up(w.n, w.tile()) * w.k_padded * w.bits / 8; }

Weight weight_of(const Packed& p) {
  const auto named = [&](const char* name) { return std::string(p.owner) + name; };
  const int64_t n = p.n;
  const int64_t channels = p.table.dim() == 2 ? p.table.size(0) : 0, entries = int64_t(1) << p.bits;
  Weight w = shape_of(p.bits, n, p.k, p.group_size, channels == 1);
  const int64_t tile = w.tile(), tiles = round_up(n, tile) / tile;
  TORCH_CHECK_VALUE(p.codes.scalar_type() != at::kInt, named("codes"), " are packed for GPUs (", p.codes.scalar_type(),
                    " ", p.codes.sizes(),
                    ") and x is on the CPU. Fix: move the checkpoint's tensors and pack them again there");
  check(p.codes, named("codes"), {code_bytes(w)}, at::kByte);
  TORCH_CHECK_VALUE(channels == n || channels == 1, named("table"), " has shape ", p.table.sizes(), ", expected [", n,
                    ", ", entries, "] (per channel) or [1, ", entries, "]");
  check(p.table, named("table"), {channels, entries}, at::kFloat);
  w.codes = p.codes.const_data_ptr<uint8_t>();
  w.table = p.table.const_data_ptr<float>();
  if (w.columns && w.bits == 8) w.coding = coding_of(w.table);
  TORCH_CHECK_VALUE(p.scales.has_value() || !p.zeros.has_value(), named("zeros"), " need scales");
  if (p.scales) {
    w.scale_type = float_type(*p.scales, named("scales"));
    check(*p.scales, named("scales"), {tiles, w.groups, tile});
    w.scales = p.scales->const_data_ptr();
  }
  if (p.zeros) {
    check(*p.zeros, named("zeros"), {tiles, w.groups, tile}, p.scales->scalar_type());
    w.zeros = p.zeros->const_data_ptr();
  }
  if (p.rows) {
    TORCH_CHECK_VALUE(p.cols.has_value() && p.vals.has_value(), named("rows"), ", cols and vals come together");
    check(*p.rows, named("rows"), {n + 1}, at::kInt);
    check(*p.cols, named("cols"), {p.cols->numel()}, at::kInt);
    check(*p.vals, named("vals"), {p.cols->numel()}, at::kFloat);
    w.rows = p.rows->const_data_ptr<int32_t>();
    w.cols = p.cols->const_data_ptr<int32_t>();
    w.vals = p.vals->const_data_ptr<float>();
    w.nnz = p.cols->numel();
  }
  return w;
}

Tensor bias_of(const optional<Tensor>& bias, const std::string& name, at::IntArrayRef shape) {
  if (!bias) return {};
  float_type(*bias, name);
  check(*bias, name, shape);
  return bias->to(at::kFloat);
}

namespace {

// --- packing ------------------------------------------------------------------------------------------------------

Tensor pack_codes(const Tensor& codes, int64_t bits, int64_t group_size, bool columns) {
  TORCH_CHECK_VALUE(codes.dim() == 2, "codes has shape ", codes.sizes(), ", expected [n, k]");
  const Weight w = shape_of(bits, codes.size(0), codes.size(1), group_size, columns);
  check(codes, "codes", {w.n, w.k}, at::kByte);
  Tensor packed = at::zeros({code_bytes(w)}, codes.options());
  const auto* from = codes.const_data_ptr<uint8_t>();
  auto* to = packed.mutable_data_ptr<uint8_t>();
  const int64_t features = w.block(), blocks = w.k_padded / features, bytes = block_bytes(w.bits);
  const int64_t span = columns ? 2 : VECTOR;  // words of a channel in a load
  std::atomic<int> largest{0};
  at::parallel_for(0, w.n, 16, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> row(w.k_padded, 0);
    uint8_t seen = 0;
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t g = 0; g < w.groups; ++g) {
        const uint8_t* source = from + n * w.k + g * w.group;
        std::copy(source, source + w.group, row.begin() + g * w.group_padded);
      }
      for (const uint8_t code : row) seen = std::max(seen, code);
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* code = row.data() + b * features;
        uint8_t* out = columns ? to + (n / COLUMNS * blocks + b) * bytes + n % COLUMNS * 2 * span
                               : to + ((n / TILE * blocks + b) * TILE + n % TILE) * bytes;
        for (int64_t i = 0; i < span; ++i) {
          uint16_t words[3] = {0, 0, 0};
          for (int64_t j = 0; j < block_vectors(w.bits); ++j) {
            const unsigned value = code[j * span + i] & ((1u << w.bits) - 1);
            if (w.bits != 3) words[0] |= uint16_t(value << (w.bits * j));
            else if (j < 15) words[j / 5] |= uint16_t(value << (3 * (j % 5)));
            else for (int t = 0; t < 3; ++t) words[t] |= uint16_t((value >> t & 1) << 15);
          }
          for (int64_t t = 0; t < bytes / 64; ++t) {
            out[64 * t + 2 * i] = uint8_t(words[t]);
            out[64 * t + 2 * i + 1] = uint8_t(words[t] >> 8);
          }
        }
      }
    }
    int known = largest;
    while (seen > known && !largest.compare_exchange_weak(known, seen)) {
    }
  });
  TORCH_CHECK_VALUE(largest < 1 << bits, "codes go up to ", largest.load(), ", which does not fit ", bits, " bits (0..",
                    (1 << bits) - 1, ")");
  return packed;
}

// Memory for codes, in huge pages where the system grants them: weights are read once per token from end to end, and
// small pages cost a fifth of the bandwidth.
Tensor allocate_codes(int64_t bytes) {
  constexpr size_t HUGE_PAGE = size_t(1) << 21;
  TORCH_CHECK_VALUE(bytes >= 0, "cannot allocate ", bytes, " bytes");
#if defined(__GLIBC__)
  // The tensors of the layers packed before this one are free now: their pages are given back first. That takes
  // milliseconds, so layers that are small, as the thousands of experts of a mixture, share it.
  constexpr int64_t TRIM_EVERY = int64_t(64) << 20;
  static std::atomic<int64_t> since{TRIM_EVERY};
  if (since.fetch_add(bytes) >= TRIM_EVERY) {
    since = 0;
    malloc_trim(0);
  }
#endif
  const auto options = at::TensorOptions().dtype(at::kByte).device(at::kCPU);
  void* memory = nullptr;
  if (size_t(bytes) < HUGE_PAGE || posix_memalign(&memory, HUGE_PAGE, size_t(bytes)) != 0) {
    return at::empty({bytes}, options);
  }
#if defined(MADV_HUGEPAGE)
  madvise(memory, size_t(bytes), MADV_HUGEPAGE);  // advice: nothing is lost where it is not taken
#endif
  // Where memory has nodes, a page lies near the thread that writes it first. The thread that will read it does: products
  // divide the codes among the threads in the same way.
  constexpr int64_t PAGE = 4096;
  at::parallel_for(0, (bytes + PAGE - 1) / PAGE, int64_t(HUGE_PAGE) / PAGE, [&](int64_t begin, int64_t end) {
    for (int64_t page = begin; page < end; ++page) static_cast<volatile char*>(memory)[page * PAGE] = 0;
  });
  return at::from_blob(memory, {bytes}, [](void* data) { free(data); }, options);
}

// --- the product --------------------------------------------------------------------------------------------------

}  // namespace

char* scratch_of_this_thread(size_t bytes) {
  static thread_local std::vector<char> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return memory.data();
}

bool finite(const float* values, int64_t count) {
  uint32_t carries = 0;  // of an exponent of ones, plus one
  for (int64_t i = 0; values && i < count; ++i) {
    carries |= (std::bit_cast<uint32_t>(values[i]) & 0x7f800000) + 0x00800000;
  }
  return carries < 0x80000000;
}

bool reads_as_is(const Kernel& kernel, const Weight& w, int64_t m) {
  return kernel.element == 2 && w.k_padded == w.k && w.group == w.group_padded && kernel.direct(w, m) && !w.zeros &&
         !w.rows && (m == 1 || !w.columns);
}

namespace {

// Some rows of x as the kernel reads them; `hold` owns what is no part of x itself.
struct Prepared {
  Input in;
  Tensor hold, sums, plain;
};

Prepared prepare(const Kernel& kernel, const Weight& w, const Source& source, const at::TensorOptions& bytes) {
  const int64_t m = source.m;
  const bool direct = kernel.direct(w, m), with_sums = direct && w.zeros, with_plain = direct && w.rows;
  Prepared out{{source.x, nullptr, nullptr, m}, {}, {}, {}};
  if (reads_as_is(kernel, w, m)) return out;
  const auto floats = bytes.dtype(at::kFloat);
  out.hold = at::empty({m, int64_t(w.k_padded * kernel.element)}, bytes);
  if (with_sums) out.sums = at::empty({m, w.groups}, floats);
  if (with_plain) out.plain = at::empty({m, w.k_padded}, floats);
  auto* to = out.hold.mutable_data_ptr<uint8_t>();
  float* sums = with_sums ? out.sums.mutable_data_ptr<float>() : nullptr;
  float* plain = with_plain ? out.plain.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, kernel.panels(w, m), std::max<int64_t>(1, (1 << 14) / w.k), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) kernel.prepare(w, source, panel, to, sums, plain);
  });
  out.in = {to, sums, plain, m};
  return out;
}

// Tasks that a thread takes at least.
int64_t grain_of(const Weight& w, int64_t m, const Plan& plan) {
  return std::max<int64_t>(1, PRODUCTS_PER_TASK * plan.parts * plan.slices / (plan.strip * w.k * m));
}

Tensor codebook_linear(const Tensor& x, const Tensor& codes, const Tensor& table, const optional<Tensor>& scales,
                       const optional<Tensor>& zeros, const optional<Tensor>& rows, const optional<Tensor>& cols,
                       const optional<Tensor>& vals, const optional<Tensor>& bias, int64_t bits, int64_t n, int64_t k,
                       int64_t group_size) {
  shape_of(bits, n, k, group_size, false);
  const Float type = float_type(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == k, "x has shape ", x.sizes(), ", expected [..., ", k, "] (k)");
  TORCH_CHECK_VALUE(x.device().is_cpu(), "x is on ", x.device(), ", expected the CPU");
  Weight w = weight_of({"", codes, table, scales, zeros, rows, cols, vals, bits, n, k, group_size});
  const Tensor bias32 = bias_of(bias, "bias", {n});

  auto shape = x.sizes().vec();
  shape.back() = n;
  Tensor y = at::empty(shape, x.options());
  const int64_t total = x.numel() / k;
  if (total == 0) return y;
  const Tensor input = x.contiguous();
  const Kernel& kernel = kernel_for(x.scalar_type());
  const size_t width = x.element_size();
  std::atomic<bool> fine{true};
  for (int64_t first = 0; first < total; first += ROWS_AT_ONCE) {
    const int64_t m = std::min(ROWS_AT_ONCE, total - first);
    const Source source{static_cast<const char*>(input.const_data_ptr()) + first * k * width, type, m};
    w.stored = false;
    Prepared prepared = prepare(kernel, w, source, codes.options());
    if (!finite(prepared.in.sums, m * w.groups) || !finite(prepared.in.plain, m * w.k_padded)) {
      // Zero points and sparse entries apart from the codebook would make inf - inf of what the sum of both has as inf.
      w.stored = true;
      prepared = prepare(kernel, w, source, codes.options());
    }
    const Output out{static_cast<char*>(y.mutable_data_ptr()) + first * n * width, type,
                     bias32.defined() ? bias32.const_data_ptr<float>() : nullptr};
    const Plan plan = kernel.plan(w, m, at::get_num_threads());
    const Tensor sums = plan.slices > 1 ? at::empty({plan.slices, m, n}, codes.options().dtype(at::kFloat)) : Tensor();
    const Output sliced{sums.defined() ? sums.mutable_data_ptr() : nullptr, Float::f32, nullptr};
    at::parallel_for(0, plan.tasks(), grain_of(w, m, plan), [&](int64_t begin, int64_t end) {
      char* scratch = scratch_of_this_thread(kernel.scratch(w, m, plan));
      if (!kernel.run(w, prepared.in, plan.slices > 1 ? sliced : out, plan, begin, end, scratch)) fine = false;
    });
    if (plan.slices > 1) {
      at::parallel_for(0, m * n, PRODUCTS_PER_TASK / 16, [&](int64_t begin, int64_t end) {
        kernel.join(sums.const_data_ptr<float>(), out, plan, m, n, begin, end);
      });
    }
  }
  TORCH_CHECK_VALUE(fine, "the sparse part is no CSR matrix of ", n, " rows and ", w.k_padded, " columns");
  return y;
}

// The tasks of a product of m rows on so many threads, then the bytes of codes that each thread reads.
std::vector<int64_t> shares(int64_t bits, int64_t n, int64_t k, int64_t group_size, int64_t m, int64_t threads,
                            bool columns) {
  TORCH_CHECK_VALUE(m >= 1 && threads >= 1, "m ", m, " and threads ", threads, " must be at least 1");
  const Weight w = shape_of(bits, n, k, group_size, columns);
  const Plan plan = chosen().load()->plan(w, m, threads);
  const int64_t tasks = plan.tasks(), grain = grain_of(w, m, plan);
  const int64_t used = std::min(threads, (tasks + grain - 1) / grain), each = (tasks + used - 1) / used;  // parallel_for
  std::vector<int64_t> found(1 + threads, 0);
  found[0] = tasks;
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t channels = std::min(plan.strip, w.n - task % plan.strips * plan.strip);
    found[1 + task / each] += round_up(channels, w.tile()) * w.k_padded * w.bits / 8 / plan.slices;
  }
  return found;
}

TORCH_LIBRARY(quantserve_kernels, library) {
  library.def(
      "codebook_linear(Tensor x, Tensor codes, Tensor table, Tensor? scales, Tensor? zeros, Tensor? rows, Tensor? cols, "
      "Tensor? vals, Tensor? bias, int bits, int n, int k, int group_size) -> Tensor");
  library.def("pack_codes(Tensor codes, int bits, int group_size, bool columns=False) -> Tensor");
  library.def("allocate_codes(int bytes) -> Tensor", allocate_codes);
  library.def("isa(str name) -> str[]", isa);
  library.def("shares(int bits, int n, int k, int group_size, int m, int threads, bool columns) -> int[]", shares);
}

TORCH_LIBRARY_IMPL(quantserve_kernels, CPU, library) {
  library.impl("codebook_linear", codebook_linear);
  library.impl("pack_codes", pack_codes);
}

}  // namespace
}  // namespace quantserve
