#pragma once

// C_j = λ_j M + I for the non-zero λ_j (docs/maths.md, section 4): the factor of each, and what the
// gradients of log det need of the inverses,
//   rows = Σ_j λ_j C_j⁻¹    with_M_j = ⟨M, C_j⁻¹⟩    plain_j = tr C_j⁻¹
// M is taken by its symmetric part. Matrices are row-major and only their lower triangles are
// computed; LAPACK, which counts by columns, calls them upper.

#include "../batch.h"

namespace torch_kronlik {

struct ShiftedCholesky {
  int64_t T, n;  // n: how many λ_j
  int64_t m_row, m_col, lam_stride;
  BatchLayout m_batch, lam_batch;
};

// The rows begin to end of C = λ (M + Mᵀ)/2 + I, zeros above the diagonal: in tiles, since M is
// read along its columns too. Halves first: the sum of two entries may exceed the range of T.
template <typename T>
KRON_HD void shifted_rows(const T* m, int64_t m_row, int64_t m_col, T lam, int64_t begin,
                          int64_t end, int64_t size, T* C) {
  constexpr int64_t kWide = 32;
  for (int64_t k0 = 0; k0 < end; k0 += kWide) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = k0 + kWide < i + 1 ? k0 + kWide : i + 1;
      for (int64_t k = k0; k < last; ++k) {
        C[i * size + k] =
            lam * (T(0.5) * m[i * m_row + k * m_col] + T(0.5) * m[k * m_row + i * m_col]);
      }
    }
  }
  for (int64_t i = begin; i < end; ++i) {
    C[i * size + i] += T(1);
    for (int64_t k = i + 1; k < size; ++k) C[i * size + k] = T(0);
  }
}

// Adds λ times row i of an inverse, and returns the part of ⟨M, C⁻¹⟩ on and below the diagonal.
template <typename T>
KRON_HD double add_row(const T* inverse, const T* m, int64_t m_col, T lam, int64_t i, T* rows) {
  constexpr int kLanes = 8;
  double lane[kLanes] = {};
  int64_t k = 0;
  if (m_col == 1) {
    for (; k + kLanes <= i; k += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        rows[k + l] += lam * inverse[k + l];
        lane[l] += static_cast<double>(inverse[k + l]) * static_cast<double>(m[k + l]);
      }
    }
  }
  for (; k < i; ++k) {
    rows[k] += lam * inverse[k];
    lane[0] += static_cast<double>(inverse[k]) * static_cast<double>(m[k * m_col]);
  }
  rows[i] += lam * inverse[i];
  double below = 0;
  for (double x : lane) below += x;
  return below + static_cast<double>(inverse[i]) * static_cast<double>(m[i * m_col]);
}

// The part of ⟨M, C⁻¹⟩ above the diagonal in the columns begin to end of M, from the lower triangle
// of the inverse: in tiles, since one of the two is read along its columns.
template <typename T>
KRON_HD double above_diagonal(const T* inverse, const T* m, int64_t m_row, int64_t m_col,
                              int64_t begin, int64_t end, int64_t size) {
  constexpr int64_t kWide = 32;
  double sum = 0;
  for (int64_t k0 = 0; k0 < end; k0 += kWide) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = k0 + kWide < i ? k0 + kWide : i;
      double part = 0;
      for (int64_t k = k0; k < last; ++k) {
        part += static_cast<double>(inverse[i * size + k]) *
                static_cast<double>(m[k * m_row + i * m_col]);
      }
      sum += part;
    }
  }
  return sum;
}

}  // namespace torch_kronlik
