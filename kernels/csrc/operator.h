// What the torch operators share: the checks of a packed weight, the instruction set in use, memory of a thread.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "kernel.h"

namespace quantserve {

constexpr int64_t PRODUCTS_PER_TASK = 1 << 17;  // less work than this is not worth another thread

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The kernel of the instruction set in use for activations of this type.
const Kernel& kernel_for(at::ScalarType type);

// Checks raise ValueError or TypeError that begin with `name`.
Float float_type(const at::Tensor& tensor, const std::string& name);
void check(const at::Tensor& tensor, const std::string& name, at::IntArrayRef shape);
void check(const at::Tensor& tensor, const std::string& name, at::IntArrayRef shape, at::ScalarType type);

// The fields of a PackedWeight as an operator gets them. `owner` goes before their names in errors.
struct Packed {
  const char* owner;
  const at::Tensor &codes, &table;
  const std::optional<at::Tensor>&scales, &zeros, &rows, &cols, &vals;
  int64_t bits, n, k, group_size;
};

// The weight as kernels read it, checked; it points into the tensors.
Weight weight_of(const Packed& packed);

// Bytes of all codes.
int64_t code_bytes(const Weight& w);

// The bias in float32, checked; undefined where there is none.
at::Tensor bias_of(const std::optional<at::Tensor>& bias, const std::string& name, at::IntArrayRef shape);

// Memory that the thread keeps; the next call may move it.
char* scratch_of_this_thread(size_t bytes);

bool finite(const float* values, int64_t count);  // also where values is null

// Whether the kernel reads m rows of x in its own type from where they are: in whole blocks, one after the other, with
// nothing beside them.
bool reads_as_is(const Kernel& kernel, const Weight& w, int64_t m);

}  // namespace quantserve
