#pragma once

#include <cstdint>

#include "macros.h"

namespace torch_kronlik {

// Where the elements of a broadcast batch start in one tensor. A plain struct, so that it can be
// an argument of a CUDA kernel; mergeable dimensions are merged, so that few are left.
struct BatchLayout {
  static constexpr int kMaxDims = 16;

  int dims = 0;
  int64_t count = 1;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  KRON_HD int64_t offset(int64_t index) const {
    int64_t result = 0;
    for (int d = dims - 1; d >= 0; --d) {
      result += (index % size[d]) * stride[d];
      index /= size[d];
    }
    return result;
  }
};

}  // namespace torch_kronlik
