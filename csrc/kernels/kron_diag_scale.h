#pragma once

// Z = W ⊙ Y with W_ij = 1 / (1 + s_i λ_j), and inv_quad = ⟨Y, Z⟩, in one pass over Y.

#include "kron_diag_sums.h"

namespace torch_kronlik {

struct KronDiagScale {
  KronDiag grid;
  int64_t row_stride, col_stride;
  BatchLayout y_batch;
};

// One entry of Z; returns its part of inv_quad.
template <typename T>
KRON_HD double scale_entry(double s, double lam, T y, T* z) {
  const double scaled = static_cast<double>(y) / (1 + s * lam);
  *z = static_cast<T>(scaled);
  return scaled * static_cast<double>(y);
}

}  // namespace torch_kronlik
