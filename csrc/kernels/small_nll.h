#pragma once

// The negative log likelihood and its gradients for small problems, one T×T Cholesky factorisation
// of C_j = λ_j M + I for each output j of the whitened basis:
//   nll = ½ (Σ_j log det C_j + T log det Σ + Σ_j ỹ_jᵀ x_j + T D log 2π),  x_j = C_j⁻¹ ỹ_j,  Ỹ = Y R
//   with A = X Rᵀ:  gY = A,  gM = ½ (Σ_j λ_j C_j⁻¹ - A K Aᵀ),
//   gK = ½ (R Diag(tr M C_j⁻¹) Rᵀ - Aᵀ M A),  gΣ = ½ (R Diag(tr C_j⁻¹) Rᵀ - Aᵀ A).

#include "../batch.h"
#include "whiten_small.h"

namespace torch_kronlik {

struct SmallNll {
  int64_t T, D;
  bool full_noise;
  int64_t y_row, y_col, m_row, m_col, k_row, k_col, noise_row, noise_col;
  BatchLayout y_batch, m_batch, k_batch, noise_batch;
};

// The data of the arguments and of the results.
template <typename T>
struct SmallTensors {
  const T *y, *m, *k, *noise;
  T *nll, *gy, *gm, *gk, *gnoise;
  int64_t* status;

  KRON_HD SmallOutputs<T> outputs(const SmallNll& s, int64_t b) const {
    return {k + s.k_batch.offset(b),
            s.k_row,
            s.k_col,
            noise + s.noise_batch.offset(b),
            s.noise_row,
            s.noise_col,
            s.full_noise};
  }
};

// An entry of the symmetric part of M. Halves first: the sum may exceed the range of T.
template <typename T>
KRON_HD T symmetric_entry(const SmallNll& s, const T* m, int64_t i, int64_t k) {
  return T(0.5) * m[i * s.m_row + k * s.m_col] + T(0.5) * m[k * s.m_row + i * s.m_col];
}

// Zero for an entry of M whose products with every λ_j are in the range of T, else NaN.
template <typename T>
KRON_HD double range_test(const Whitened& basis, T m) {
  return static_cast<double>(T(0) * (static_cast<T>(basis.largest) * m));
}

}  // namespace torch_kronlik
