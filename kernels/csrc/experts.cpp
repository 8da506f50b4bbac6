// Mixtures of experts: the pairs of a token and one of its choices, sorted by expert, go through two products. The work
// of a product is one list of pieces, each some strips of one expert, which the threads share.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "operator.h"

namespace quantserve {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t PAIRS_AT_ONCE = 8192;      // bounds the memory beside the result
constexpr int64_t PIECES_PER_THREAD = 8;     // so that threads end at nearly the same time
constexpr int64_t CHUNK = 256;               // values that a loop has at once
constexpr int64_t VALUES_PER_TASK = 1 << 13;  // of element-wise work; less is not worth another thread

// body(a value of the type): calls what is written for each.
template <class Body>
void typed(Float type, const Body& body) {
  switch (type) {
    case Float::f32: return body(float{});
    case Float::f16: return body(c10::Half{});
    case Float::bf16: return body(c10::BFloat16{});
  }
}

// --- which rows an expert has -------------------------------------------------------------------------------------

// The rows [first, first + count) of the sorted pairs.
struct Share {
  int64_t expert, first, count;
};

struct Sorted {
  std::vector<Share> shares;   // of the experts that have any
  std::vector<int64_t> row;    // of each pair, or -1
  std::vector<int64_t> token;  // of each row
};

// Pairs of one expert keep their order.
template <class Id>
Sorted sort(const Id* ids, int64_t first, int64_t tokens, int64_t choices, int64_t experts) {
  std::vector<int64_t> next(experts + 1, 0);
  for (int64_t i = 0; i < tokens * choices; ++i) {
    TORCH_CHECK_VALUE(ids[i] >= -1 && ids[i] < experts, "topk_ids[", first + i / choices, ", ", i % choices, "] is ",
                      ids[i], ", expected -1 to ", experts - 1);
    if (ids[i] >= 0) ++next[ids[i] + 1];
  }
  Sorted out;
  for (int64_t e = 0; e < experts; ++e) {
    if (next[e + 1]) out.shares.push_back({e, next[e], next[e + 1]});
    next[e + 1] += next[e];
  }
  out.row.resize(tokens * choices);
  out.token.resize(next[experts]);
  for (int64_t i = 0; i < tokens * choices; ++i) {
    out.row[i] = ids[i] < 0 ? -1 : next[ids[i]]++;
    if (ids[i] >= 0) out.token[out.row[i]] = i / choices;
  }
  return out;
}

// --- a product ----------------------------------------------------------------------------------------------------

// The n channels of one expert, a multiple of the tile.
Weight slice(const Weight& stack, int64_t n, int64_t expert) {
  Weight w = stack;
  const int64_t first = expert * n, side = first * w.groups * (w.scale_type == Float::f32 ? 4 : 2);
  w.n = n;
  w.codes += first * w.k_padded * w.bits / 8;
  if (!w.columns) w.table += first << w.bits;
  if (w.scales) w.scales = static_cast<const char*>(w.scales) + side;
  if (w.zeros) w.zeros = static_cast<const char*>(w.zeros) + side;
  if (w.rows) w.rows += first;
  return w;
}

// body(0) ... body(count - 1): whichever thread is free takes the next.
template <class Body>
void share_out(int64_t count, int64_t threads, const Body& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(count, threads), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < count;) body(i);
  });
}

// One expert's part of a product.
struct Part {
  Weight w;
  Share share;
  Input in;
  Plan plan;
};

// Some panels of x or tasks of one part.
struct Piece {
  const Part* part;
  int64_t begin, end;
};

// y [rows, n] in float32: each row of x [rows, k] times the weight of its expert, plus that expert's bias. False: a
// sparse part is no CSR matrix.
bool product(const Kernel& kernel, const Weight& stack, int64_t n, const Tensor& bias, const std::vector<Share>& shares,
             const Tensor& x, Float type, Tensor& y) {
  const int64_t rows = x.size(0), k = stack.k, threads = at::get_num_threads();
  std::vector<Part> parts;
  bool copies = false, sums = false, plain = false;
  for (const Share& share : shares) {
    const Weight& w = parts.emplace_back(Part{slice(stack, n, share.expert), share, {}, {}}).w;
    const bool direct = kernel.direct(w, share.count);
    copies |= !reads_as_is(kernel, w, share.count);
    sums |= direct && w.zeros;
    plain |= direct && w.rows;
  }

  // x as the kernel reads it.
  const auto bytes = x.options().dtype(at::kByte), floats = x.options().dtype(at::kFloat);
  const int64_t row_bytes = stack.k_padded * kernel.element;
  const Tensor held = at::empty({copies ? rows : 0, row_bytes}, bytes);
  const Tensor held_sums = at::empty({sums ? rows : 0, stack.groups}, floats);
  const Tensor held_plain = at::empty({plain ? rows : 0, stack.k_padded}, floats);
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = held.mutable_data_ptr<uint8_t>();
  auto* to_sums = held_sums.mutable_data_ptr<float>();
  auto* to_plain = held_plain.mutable_data_ptr<float>();
  const auto prepare = [&](const Part& part, int64_t begin, int64_t end) {
    const int64_t first = part.share.first;
    const Source source{from + first * k * int64_t(x.element_size()), type, part.share.count};
    for (int64_t panel = begin; panel < end; ++panel) {
      kernel.prepare(part.w, source, panel, to + first * row_bytes,
                     part.in.sums ? to_sums + first * stack.groups : nullptr,
                     part.in.plain ? to_plain + first * stack.k_padded : nullptr);
    }
  };
  std::vector<Piece> pieces;
  const int64_t at_once = std::max<int64_t>(1, VALUES_PER_TASK / k);
  for (Part& part : parts) {
    const int64_t m = part.share.count, first = part.share.first;
    if (reads_as_is(kernel, part.w, m)) {
      part.in = {from + first * row_bytes, nullptr, nullptr, m};
      continue;
    }
    const bool direct = kernel.direct(part.w, m);
    part.in = {to + first * row_bytes, direct && part.w.zeros ? to_sums + first * stack.groups : nullptr,
               direct && part.w.rows ? to_plain + first * stack.k_padded : nullptr, m};
    for (int64_t panels = kernel.panels(part.w, m), begin = 0; begin < panels; begin += at_once) {
      pieces.push_back({&part, begin, std::min(begin + at_once, panels)});
    }
  }
  share_out(pieces.size(), threads, [&](int64_t i) { prepare(*pieces[i].part, pieces[i].begin, pieces[i].end); });
  for (Part& part : parts) {
    const int64_t m = part.share.count;
    if (finite(part.in.sums, m * stack.groups) && finite(part.in.plain, m * stack.k_padded)) continue;
    part.w.stored = true;  // as in codebook_linear
    part.in.sums = part.in.plain = nullptr;
    prepare(part, 0, kernel.panels(part.w, m));
  }

  // Strips cost what their weights take to decode, about as much as a few rows, and the products.
  constexpr int64_t DECODING = 4;
  const int64_t products = n * k * rows, total = n * k * (rows + DECODING * int64_t(parts.size()));
  const int64_t workers = std::clamp<int64_t>(products / PRODUCTS_PER_TASK, 1, threads);
  const int64_t wanted = std::max<int64_t>(1, total / (workers * PIECES_PER_THREAD));
  size_t scratch = 0;
  pieces.clear();
  for (Part& part : parts) {
    const int64_t m = part.share.count;
    part.plan = kernel.plan(part.w, m, (threads * m + rows - 1) / rows);
    part.plan.slices = 1;  // experts and strips are tasks enough
    scratch = std::max(scratch, kernel.scratch(part.w, m, part.plan));
    const int64_t tasks = part.plan.tasks(), cost = n * k * (m + DECODING);
    const int64_t count = std::clamp<int64_t>(cost / wanted, 1, tasks);
    for (int64_t i = 0; i < count; ++i) pieces.push_back({&part, tasks * i / count, tasks * (i + 1) / count});
  }
  std::atomic<bool> fine{true};
  share_out(pieces.size(), workers, [&](int64_t i) {
    const Part& part = *pieces[i].part;
    const Output out{y.mutable_data_ptr<float>() + part.share.first * n, Float::f32,
                     bias.defined() ? bias.const_data_ptr<float>() + part.share.expert * n : nullptr};
    char* memory = scratch_of_this_thread(scratch);
    if (!kernel.run(part.w, part.in, out, part.plan, pieces[i].begin, pieces[i].end, memory)) fine = false;
  });
  return fine;
}

// --- the activation -----------------------------------------------------------------------------------------------

// 1 / (1 + e^-x) to 2e-7; no branch, so that compilers make vectors of it.
inline float sigmoid(float x) {
  float t = x * -1.44269504f;
  t = t < -126.0f ? -126.0f : t;
  t = t > 126.0f ? 126.0f : t;
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = t + MAGIC, r = (t - (shifted - MAGIC)) * 0.693147181f;
  const float power = std::bit_cast<float>((std::bit_cast<int32_t>(shifted) << 23) + 0x3f800000);
  const float high = 1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f));
  const float e = 1.0f + r * (1.0f + r * (0.5f + r * high));  // e^r as its series: |r| < 0.35
  return 1.0f / (1.0f + e * power);
}

struct Silu {
  static constexpr bool ALTERNATE = false;  // whether gate and up take turns; else they are halves
  static float apply(float gate, float up) { return gate * sigmoid(gate) * up; }
};
struct Gelu {
  static constexpr bool ALTERNATE = false;
  static float apply(float gate, float up) { return 0.5f * gate * (1.0f + std::erf(gate * 0.707106781f)) * up; }
};
struct GeluTanh {
  static constexpr bool ALTERNATE = false;
  static float apply(float gate, float up) {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    return gate * sigmoid(1.59576912f * (gate + 0.044715f * gate * gate * gate)) * up;
  }
};
struct SwigluOai {
  static constexpr bool ALTERNATE = true;
  static float apply(float gate, float up) {
    gate = gate > 7.0f ? 7.0f : gate;
    up = up > 7.0f ? 7.0f : up;
    up = up < -7.0f ? -7.0f : up;
    return gate * sigmoid(1.702f * gate) * (up + 1.0f);
  }
};

// to [rows, width] from h [rows, 2 * width]
template <class Act, class T>
void activate(const Tensor& h, Tensor& out) {
  const int64_t width = out.size(1);
  const float* from = h.const_data_ptr<float>();
  T* to = out.mutable_data_ptr<T>();
  at::parallel_for(0, out.numel(), VALUES_PER_TASK, [&](int64_t begin, int64_t end) {
    constexpr int64_t STEP = Act::ALTERNATE ? 2 : 1;
    float values[CHUNK];
    while (begin < end) {
      const int64_t row = begin / width, i = begin - row * width, count = std::min({CHUNK, end - begin, width - i});
      const float *gate = from + 2 * row * width + STEP * i, *up = gate + (Act::ALTERNATE ? 1 : width);
      for (int64_t j = 0; j < count; ++j) values[j] = Act::apply(gate[STEP * j], up[STEP * j]);
      for (int64_t j = 0; j < count; ++j) to[begin + j] = T(values[j]);
      begin += count;
    }
  });
}

template <class T>
void activate(const std::string& activation, const Tensor& h, Tensor& out) {
  if (activation == "silu") return activate<Silu, T>(h, out);
  if (activation == "gelu") return activate<Gelu, T>(h, out);
  if (activation == "gelu_tanh") return activate<GeluTanh, T>(h, out);
  activate<SwigluOai, T>(h, out);
}

// --- the sum over a token's choices -------------------------------------------------------------------------------

template <class T>
void combine(const float* y, const Sorted& sorted, const float* weights, int64_t tokens, int64_t choices, int64_t n,
             T* out) {
  at::parallel_for(0, tokens * n, VALUES_PER_TASK, [&](int64_t begin, int64_t end) {
    float sum[CHUNK];
    while (begin < end) {
      const int64_t token = begin / n, first = begin - token * n, count = std::min({CHUNK, end - begin, n - first});
      std::fill_n(sum, count, 0.0f);
      for (int64_t pair = token * choices; pair < (token + 1) * choices; ++pair) {
        if (sorted.row[pair] < 0) continue;
        const float* from = y + sorted.row[pair] * n + first;
        for (int64_t i = 0; i < count; ++i) sum[i] += weights[pair] * from[i];
      }
      for (int64_t i = 0; i < count; ++i) out[begin + i] = T(sum[i]);
      begin += count;
    }
  });
}

// --- the operator -------------------------------------------------------------------------------------------------

Tensor gather(const Tensor& x, int64_t first, const std::vector<int64_t>& token) {
  Tensor out = at::empty({int64_t(token.size()), x.size(1)}, x.options());
  const size_t bytes = x.size(1) * x.element_size();
  const auto* from = static_cast<const char*>(x.const_data_ptr()) + first * bytes;
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 4 * VALUES_PER_TASK / x.size(1));
  at::parallel_for(0, token.size(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) std::memcpy(to + row * bytes, from + token[row] * bytes, bytes);
  });
  return out;
}

Tensor codebook_experts(
    const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights, std::string activation,
    const Tensor& w13_codes, const Tensor& w13_table, const optional<Tensor>& w13_scales,
    const optional<Tensor>& w13_zeros, const optional<Tensor>& w13_rows, const optional<Tensor>& w13_cols, const optional<Tensor>& w13_vals,
    const optional<Tensor>& w13_bias, const Tensor& w2_codes, const Tensor& w2_table, const optional<Tensor>& w2_scales,
    const optional<Tensor>& w2_zeros, const optional<Tensor>& w2_rows, const optional<Tensor>& w2_cols,
    const optional<Tensor>& w2_vals, const optional<Tensor>& w2_bias, int64_t w13_bits, int64_t w13_n, int64_t w13_k,
    int64_t w13_group_size, int64_t w2_bits, int64_t w2_n, int64_t w2_k, int64_t w2_group_size) {
  const Float type = float_type(x, "x");
  const auto known = {"silu", "gelu", "gelu_tanh", "swigluoai"};
  TORCH_CHECK_VALUE(std::find(known.begin(), known.end(), activation) != known.end(), "activation is ", activation,
                    "; known: ", c10::Join(", ", known));
  const Weight w13 = weight_of({"w13_", w13_codes, w13_table, w13_scales, w13_zeros, w13_rows, w13_cols, w13_vals,
                                w13_bits, w13_n, w13_k, w13_group_size});
  const Weight w2 = weight_of({"w2_", w2_codes, w2_table, w2_scales, w2_zeros, w2_rows, w2_cols, w2_vals, w2_bits, w2_n,
                               w2_k, w2_group_size});
  const int64_t hidden = w13.k, width = w2.k, experts = w2.n / hidden;
  TORCH_CHECK_VALUE(2 * width % w13.tile() == 0 && hidden % w2.tile() == 0, "2 * w2_k, ", 2 * width,
                    ", must be a multiple of ", w13.tile(), " and w13_k ", hidden, " one of ", w2.tile());
  TORCH_CHECK_VALUE(w2.n == experts * hidden && w13.n == experts * 2 * width, "w13 is [", w13.n, ", ", hidden,
                    "] and w2 [", w2.n, ", ", width, "], expected [experts * ", 2 * width, ", ", hidden,
                    "] and [experts * ", hidden, ", ", width, "]");
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == hidden, "x has shape ", x.sizes(), ", expected [tokens, ", hidden,
                    "] (w13_k)");
  TORCH_CHECK_VALUE(x.device().is_cpu(), "x is on ", x.device(), ", expected the CPU");
  TORCH_CHECK_VALUE(topk_ids.dim() == 2 && topk_ids.size(0) == x.size(0), "topk_ids has shape ", topk_ids.sizes(),
                    ", expected [", x.size(0), ", choices]");
  const bool narrow = topk_ids.scalar_type() == at::kInt;
  TORCH_CHECK_TYPE(narrow || topk_ids.scalar_type() == at::kLong, "topk_ids is ", topk_ids.scalar_type(),
                   ", expected Int or Long");
  const Tensor ids = topk_ids.contiguous(), weights = topk_weights.contiguous(), input = x.contiguous();
  check(ids, "topk_ids", topk_ids.sizes());
  check(weights, "topk_weights", topk_ids.sizes(), at::kFloat);
  const Tensor bias13 = bias_of(w13_bias, "w13_bias", {experts, 2 * width});
  const Tensor bias2 = bias_of(w2_bias, "w2_bias", {experts, hidden});

  Tensor y = at::empty(x.sizes(), x.options());
  const Kernel& kernel = kernel_for(x.scalar_type());
  // Between the products values are float32, but where the kernel would round them anyway: rounded here, the sums that
  // take zero points off are of the values that are multiplied.
  const Float between = kernel.element == 2 ? type : Float::f32;
  const auto floats = x.options().dtype(at::kFloat);
  const int64_t choices = ids.size(1), at_once = std::max<int64_t>(1, PAIRS_AT_ONCE / std::max<int64_t>(1, choices));
  bool fine = true;
  for (int64_t first = 0; first < x.size(0); first += at_once) {
    const int64_t tokens = std::min(at_once, x.size(0) - first), pairs = first * choices;
    const Sorted sorted = narrow ? sort(ids.const_data_ptr<int32_t>() + pairs, first, tokens, choices, experts)
                                 : sort(ids.const_data_ptr<int64_t>() + pairs, first, tokens, choices, experts);
    const int64_t rows = sorted.token.size();
    Tensor h = at::empty({rows, 2 * width}, floats), sums = at::empty({rows, hidden}, floats);
    Tensor activated = at::empty({rows, width}, between == Float::f32 ? floats : x.options());
    fine &= product(kernel, w13, 2 * width, bias13, sorted.shares, gather(input, first, sorted.token), type, h);
    typed(between, [&](auto value) { activate<decltype(value)>(activation, h, activated); });
    fine &= product(kernel, w2, hidden, bias2, sorted.shares, activated, between, sums);
    typed(type, [&](auto value) {
      combine(sums.const_data_ptr<float>(), sorted, weights.const_data_ptr<float>() + pairs, tokens, choices, hidden,
              y.mutable_data_ptr<decltype(value)>() + first * hidden);
    });
  }
  TORCH_CHECK_VALUE(fine, "the sparse part of w13 or w2 is no CSR matrix");
  return y;
}

std::string schema() {
  const auto tensors = [](const std::string& w) {
    return "Tensor " + w + "_codes, Tensor " + w + "_table, Tensor? " + w + "_scales, Tensor? " + w +
           "_zeros, Tensor? " + w + "_rows, Tensor? " + w + "_cols, Tensor? " + w + "_vals, Tensor? " + w + "_bias, ";
  };
  const auto numbers = [](const std::string& w) {
    return "int " + w + "_bits, int " + w + "_n, int " + w + "_k, int " + w + "_group_size";
  };
  return "codebook_experts(Tensor x, Tensor topk_ids, Tensor topk_weights, str activation, " + tensors("w13") +
         tensors("w2") + numbers("w13") + ", " + numbers("w2") + ") -> Tensor";
}

TORCH_LIBRARY_FRAGMENT(quantserve_kernels, library) { library.def(schema().c_str()); }

TORCH_LIBRARY_IMPL(quantserve_kernels, CPU, library) { library.impl("codebook_experts", codebook_experts); }

}  // namespace
}  // namespace quantserve
