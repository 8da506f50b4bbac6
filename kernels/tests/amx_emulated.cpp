// The AMX kernel behind a function of plain C, for processors without AMX: with QUANTSERVE_EMULATED_TILES the tile registers
// are memory, and everything else is the code that is shipped. Without that macro the same calls use the instructions.
#include "../csrc/isa_amx.cpp"
#include "../csrc/isa_avx512bf16.cpp"

#include <thread>
#include <vector>

using namespace quantserve;

namespace {

// Tiles as another library may have left them in this thread.
tiles::Shapes foreign() {
  tiles::Shapes shapes;
  shapes.palette = 1;
  shapes.row_bytes[3] = 32;
  shapes.rows[3] = 5;
  return shapes;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT bool allowed() { return may_use_amx(); }

EXPORT int64_t tasks(int bits, int64_t n, int64_t k, int64_t m, int64_t threads, bool columns) {
  Weight w{};
  w.columns = columns;
  w.bits = bits;
  w.n = n;
  w.k = w.group = w.k_padded = w.group_padded = k;
  w.groups = 1;
  return amx.plan(w, m, threads).tasks();
}

// y = x times the weight whose plain members are filled in, on so many threads. 0: done; 1: a sparse index is out of range;
// 2: the threads' tiles were not left as they were.
EXPORT int linear(Weight* w, const Source* x, const Output* y, int64_t threads, bool configured) {
  const auto round_up = [](int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; };
  w->groups = w->k / w->group;
  w->group_padded = round_up(w->group, w->columns ? w->block() : VECTOR);
  w->k_padded = round_up(w->groups * w->group_padded, w->block());
  const bool direct = amx.direct(*w, x->m);
  // Exactly as long as the kernel may write and read, for AddressSanitizer.
  std::vector<uint8_t> prepared(x->m * w->k_padded * amx.element);
  std::vector<float> sums(direct && w->zeros ? x->m * w->groups : 0), plain(direct && w->rows ? x->m * w->k_padded : 0);
  float* const to_sums = sums.empty() ? nullptr : sums.data();
  float* const to_plain = plain.empty() ? nullptr : plain.data();
  for (int64_t panel = 0; panel < amx.panels(*w, x->m); ++panel) {
    amx.prepare(*w, *x, panel, prepared.data(), to_sums, to_plain);
  }
  const Input in{prepared.data(), to_sums, to_plain, x->m};
  const Plan plan = amx.plan(*w, x->m, threads);
  std::vector<float> slices(plan.slices > 1 ? plan.slices * x->m * w->n : 0);
  const Output out = plan.slices > 1 ? Output{slices.data(), Float::f32, nullptr} : *y;
  std::vector<int> failures(threads, 0);
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t) {
    running.emplace_back([&, t] {
      const tiles::Shapes before = configured ? foreign() : tiles::Shapes{};
      if (configured) tiles::load_shapes(before);
      std::vector<char> scratch(amx.scratch(*w, x->m, plan), char(0xff));  // NaN wherever nothing was written
      const int64_t begin = plan.tasks() * t / threads, end = plan.tasks() * (t + 1) / threads;
      if (!amx.run(*w, in, out, plan, begin, end, scratch.data())) failures[t] = 1;
      tiles::Shapes after;
      tiles::store_shapes(after);
      if (std::memcmp(&after, &before, sizeof after) != 0) failures[t] = 2;
      tiles::release();
    });
  }
  for (auto& one : running) one.join();
  if (plan.slices > 1) amx.join(slices.data(), *y, plan, x->m, w->n, 0, x->m * w->n);
  return *std::max_element(failures.begin(), failures.end());
}
