#pragma once

// What every native op asks of its tensors. The Python functions validate first and raise errors
// that name the argument; these checks are the last defence of a direct call.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "batch.h"

namespace torch_kronlik {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline std::string text(const char* words) { return words; }
inline std::string text(int64_t number) { return std::to_string(number); }

// Throws what becomes a RuntimeError in Python, unless the condition holds. No stream: in a library
// linked with a C++ runtime of its own, as some compilers do, writing a number to one crashes.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error((text(parts) + ...));
}

// Calls f with a value of the C++ type of dtype.
template <typename F>
void dispatch_floating(const Tensor& t, const char* op, F&& f) {
  if (t.scalar_type() == ScalarType::Double) return f(double{});
  if (t.scalar_type() == ScalarType::Float) return f(float{});
  check(false, op, ": expected float32 or float64");
}

inline void check_alike(const Tensor& a, const Tensor& b, const char* op) {
  check(a.scalar_type() == b.scalar_type(), op, ": tensors differ in dtype");
  check(a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(), op,
        ": tensors are on different devices");
}

inline void check_min_dim(const Tensor& t, int64_t dim, const char* op) {
  check(t.dim() >= dim, op, ": expected at least ", dim, " dimensions, got ", t.dim());
}

inline int64_t product(const Sizes& sizes) {
  int64_t result = 1;
  for (int64_t size : sizes) result *= size;
  return result;
}

// All sizes but the last core_dims.
inline Sizes batch_sizes(const Tensor& t, int64_t core_dims) {
  auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end() - core_dims);
}

inline Sizes concat(Sizes a, std::initializer_list<int64_t> b) {
  a.insert(a.end(), b);
  return a;
}

inline Sizes broadcast(const Sizes& a, const Sizes& b, const char* op) {
  const Sizes& longer = a.size() >= b.size() ? a : b;
  const Sizes& shorter = a.size() >= b.size() ? b : a;
  Sizes result = longer;
  const size_t shift = longer.size() - shorter.size();
  for (size_t d = 0; d < shorter.size(); ++d) {
    int64_t& size = result[shift + d];
    check(size == shorter[d] || size == 1 || shorter[d] == 1, op, ": batch sizes ", size, " and ",
          shorter[d], " do not broadcast");
    if (size == 1) size = shorter[d];
  }
  return result;
}

// The layout in t of a batch to which t's leading sizes broadcast.
inline BatchLayout batch_layout(const Tensor& t, int64_t core_dims, const Sizes& batch) {
  BatchLayout layout;
  layout.count = product(batch);
  if (layout.count == 0) return layout;
  const int64_t own = t.dim() - core_dims;
  const int64_t shift = static_cast<int64_t>(batch.size()) - own;
  for (int64_t d = 0; d < static_cast<int64_t>(batch.size()); ++d) {
    if (batch[d] == 1) continue;
    const bool expanded = d < shift || t.size(d - shift) == 1;
    const int64_t stride = expanded ? 0 : t.stride(d - shift);
    const int last = layout.dims - 1;
    if (last >= 0 && layout.stride[last] == stride * batch[d]) {
      layout.size[last] *= batch[d];
      layout.stride[last] = stride;
      continue;
    }
    check(layout.dims < BatchLayout::kMaxDims, "more than ", BatchLayout::kMaxDims,
          " batch dimensions that cannot be merged");
    layout.size[layout.dims] = batch[d];
    layout.stride[layout.dims] = stride;
    ++layout.dims;
  }
  return layout;
}

}  // namespace torch_kronlik
