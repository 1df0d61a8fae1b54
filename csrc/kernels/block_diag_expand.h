#pragma once

// out = I_p ⊗ S: out[k m + i, l n + j] = S[i, j] if k = l, else 0.

#include "../batch.h"

namespace torch_kronlik {

struct BlockExpand {
  int64_t p, m, n;
  int64_t row_stride, col_stride;
  BatchLayout batch;
};

// One entry of the (p m) x (p n) result.
template <typename T>
KRON_HD T expanded_entry(const BlockExpand& e, const T* s, int64_t row, int64_t col) {
  if (row / e.m != col / e.n) return T(0);
  return s[row % e.m * e.row_stride + col % e.n * e.col_stride];
}

}  // namespace torch_kronlik
