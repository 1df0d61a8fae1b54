#pragma once

// K and Σ of a small problem diagonalised together: RᵀΣR = I, RᵀKR = Diag(λ). In double for every
// dtype, outputs in descending order of noise (so that grading is kept), eigenvalues by Jacobi
// rotations, which find the small ones of a graded matrix to high relative accuracy.

#include <cmath>

#include "../batch.h"

namespace torch_kronlik {

constexpr int kMaxSmallD = 16;

enum SmallStatus { kFine = 0, kNoisePositive = 1, kCovariancePositive = 2, kNotFinite = 3 };

// Scratch, in shared memory on a GPU.
struct WhitenWork {
  int order[kMaxSmallD];
  double L[kMaxSmallD * kMaxSmallD], A[kMaxSmallD * kMaxSmallD], B[kMaxSmallD * kMaxSmallD];
};

struct Whitened {
  double lam[kMaxSmallD], largest;  // the λ_j, and the largest |λ_j|
  double R[kMaxSmallD * kMaxSmallD];
  double logdet_noise;
};

// Rotates rows and columns p, q of the symmetric A, and the columns of Q, so that A_pq = 0.
KRON_HD void jacobi_rotate(double* A, double* Q, int n, int p, int q) {
  const double theta = (A[q * n + q] - A[p * n + p]) / (2 * A[p * n + q]);
  const double t = (theta >= 0 ? 1 : -1) / (fabs(theta) + sqrt(theta * theta + 1));
  const double c = 1 / sqrt(t * t + 1), s = t * c, move = t * A[p * n + q];
  A[p * n + p] -= move;
  A[q * n + q] += move;
  A[p * n + q] = A[q * n + p] = 0;
  for (int k = 0; k < n; ++k) {
    if (k != p && k != q) {
      const double a = A[k * n + p], b = A[k * n + q];
      A[k * n + p] = A[p * n + k] = c * a - s * b;
      A[k * n + q] = A[q * n + k] = s * a + c * b;
    }
    const double a = Q[k * n + p], b = Q[k * n + q];
    Q[k * n + p] = c * a - s * b;
    Q[k * n + q] = s * a + c * b;
  }
}

// A = Q Diag(A_ii) Qᵀ on return. Off-diagonal entries go until they are small against their own
// diagonal entries; for singular A, where rounding can keep that from happening, 30 sweeps do.
KRON_HD void jacobi_eigen(double* A, double* Q, int n) {
  for (int i = 0; i < n * n; ++i) Q[i] = i % (n + 1) == 0 ? 1 : 0;
  constexpr double kTiny = 1e-17;
  for (int sweep = 0; sweep < 30; ++sweep) {
    bool rotated = false;
    for (int p = 0; p < n; ++p) {
      for (int q = p + 1; q < n; ++q) {
        const double off = fabs(A[p * n + q]);
        // Roots one by one: products of entries leave the range of doubles.
        const double size = sqrt(fabs(A[p * n + p])) * sqrt(fabs(A[q * n + q]));
        if (off > kTiny * size && off > 1e-307) {
          jacobi_rotate(A, Q, n, p, q);
          rotated = true;
        }
      }
    }
    if (!rotated) return;
  }
}

// Where the entries of K and of the noise are. K and Sigma are taken by their symmetric parts.
template <typename T>
struct SmallOutputs {
  const T* k;
  int64_t k_row, k_col;
  const T* noise;
  int64_t noise_row, noise_col;
  bool full;  // noise is Σ, else the logarithms of its diagonal

  KRON_HD double K(int i, int j) const { return mean(k, k_row, k_col, i, j); }
  KRON_HD double Sigma(int i, int j) const { return mean(noise, noise_row, noise_col, i, j); }
  KRON_HD double log_noise(int i) const { return static_cast<double>(noise[i * noise_row]); }
  KRON_HD double size(int i) const { return full ? Sigma(i, i) : log_noise(i); }

 private:
  // Halves first: the sum of two entries may exceed the range of doubles.
  KRON_HD static double mean(const T* x, int64_t row, int64_t col, int i, int j) {
    return 0.5 * static_cast<double>(x[i * row + j * col]) +
           0.5 * static_cast<double>(x[j * row + i * col]);
  }
};

template <typename T>
KRON_HD void descending(const SmallOutputs<T>& x, int D, int* order) {
  for (int i = 0; i < D; ++i) {
    int at = i;
    for (; at > 0 && x.size(order[at - 1]) < x.size(i); --at) order[at] = order[at - 1];
    order[at] = i;
  }
}

// L (D×D, lower) of the noise in that order; false if it is not positive definite.
template <typename T>
KRON_HD bool noise_root(const SmallOutputs<T>& x, int D, const int* order, double* L) {
  for (int i = 0; i < D; ++i) {
    for (int j = 0; j <= i; ++j) {
      if (!x.full) {
        L[i * D + j] = i == j ? exp(0.5 * x.log_noise(order[i])) : 0;
        continue;
      }
      double sum = x.Sigma(order[i], order[j]);
      for (int k = 0; k < j; ++k) sum -= L[i * D + k] * L[j * D + k];
      if (i == j && !(sum > 0)) return false;
      L[i * D + j] = i == j ? sqrt(sum) : sum / L[j * D + j];
    }
  }
  return true;
}

// B <- L⁻¹ B for B (D×D).
KRON_HD void solve_lower(const double* L, int D, double* B) {
  for (int i = 0; i < D; ++i) {
    for (int c = 0; c < D; ++c) {
      double sum = B[i * D + c];
      for (int k = 0; k < i; ++k) sum -= L[i * D + k] * B[k * D + c];
      B[i * D + c] = sum / L[i * D + i];
    }
  }
}

// What a problem that failed computes on with: NaN for all its results.
KRON_HD void spoil(Whitened* basis, int D) {
  for (int i = 0; i < D * D; ++i) basis->R[i] = NAN;
  for (int j = 0; j < D; ++j) basis->lam[j] = 0;
  basis->largest = basis->logdet_noise = NAN;
}

template <typename T>
KRON_HD SmallStatus whiten_small(const SmallOutputs<T>& x, int D, double eps, WhitenWork* work,
                                 Whitened* out) {
  int* order = work->order;
  double *L = work->L, *A = work->A, *B = work->B;
  descending(x, D, order);
  double zero = 0;  // unless an entry is not finite; the sum of the entries could overflow
  for (int i = 0; i < D; ++i) {
    for (int j = 0; j < D; ++j) {
      A[i * D + j] = x.K(order[i], order[j]);
      zero += 0 * A[i * D + j] + 0 * (x.full ? x.Sigma(i, j) : x.log_noise(i));
    }
  }
  if (!(zero == 0)) return kNotFinite;
  if (!noise_root(x, D, order, L)) return kNoisePositive;
  // L⁻¹ K L⁻ᵀ = L⁻¹ (L⁻¹ K)ᵀ, K symmetric.
  solve_lower(L, D, A);
  for (int i = 0; i < D; ++i) {
    for (int j = 0; j < D; ++j) B[i * D + j] = A[j * D + i];
  }
  solve_lower(L, D, B);
  for (int i = 0; i < D; ++i) {
    for (int j = 0; j < i; ++j) B[i * D + j] = B[j * D + i] = 0.5 * (B[i * D + j] + B[j * D + i]);
  }
  jacobi_eigen(B, A, D);
  double largest = 0;
  out->logdet_noise = 0;
  for (int j = 0; j < D; ++j) {
    out->lam[j] = B[j * D + j];
    largest = fabs(out->lam[j]) > largest ? fabs(out->lam[j]) : largest;
    out->logdet_noise += x.full ? 2 * log(L[j * D + j]) : x.log_noise(j);
  }
  for (int j = 0; j < D; ++j) {
    // Rounding below zero is zero.
    if (out->lam[j] < 0 && out->lam[j] >= -D * eps * largest) out->lam[j] = 0;
    // R = L⁻ᵀ Q, column by column.
    for (int i = D - 1; i >= 0; --i) {
      double sum = A[i * D + j];
      for (int k = i + 1; k < D; ++k) sum -= L[k * D + i] * out->R[order[k] * D + j];
      out->R[order[i] * D + j] = sum / L[i * D + i];
    }
  }
  out->largest = largest;
  // L_11 is the largest root of a noise variance, which may exceed the range of doubles.
  return std::isfinite(largest + out->logdet_noise + L[0]) ? kFine : kNotFinite;
}

// The noise in its own batch: log det Σ, not a number where Σ is not positive definite.
template <typename T>
KRON_HD double noise_logdet(const SmallOutputs<T>& x, int D, WhitenWork* work) {
  descending(x, D, work->order);
  if (x.full && !noise_root(x, D, work->order, work->L)) return NAN;
  double sum = 0;
  for (int i = 0; i < D; ++i) sum += x.full ? 2 * log(work->L[i * D + i]) : x.log_noise(i);
  return sum;
}

// A batch of them.
struct WhitenSmall {
  int64_t D;
  bool full_noise;
  int64_t k_row, k_col, noise_row, noise_col;
  BatchLayout k_batch, noise_batch, own_noise_batch;

  template <typename T>
  KRON_HD SmallOutputs<T> outputs(const T* k, const T* noise, int64_t b) const {
    const T* own = noise + noise_batch.offset(b);
    return {k + k_batch.offset(b), k_row, k_col, own, noise_row, noise_col, full_noise};
  }
  template <typename T>
  KRON_HD SmallOutputs<T> noise_alone(const T* noise, int64_t b) const {
    const T* own = noise + own_noise_batch.offset(b);
    return {nullptr, 0, 0, own, noise_row, noise_col, full_noise};
  }
};

// λ_j and column j of R to where they belong in ascending order of λ; whether the dtype of the
// result can hold them.
template <typename T>
KRON_HD bool store_ascending(const Whitened& from, int D, int j, T* lam, T* R) {
  int at = 0;
  for (int k = 0; k < D; ++k) {
    at += from.lam[k] < from.lam[j] || (from.lam[k] == from.lam[j] && k < j);
  }
  lam[at] = static_cast<T>(from.lam[j]);
  bool finite = std::isfinite(lam[at]);
  for (int i = 0; i < D; ++i) {
    R[i * D + at] = static_cast<T>(from.R[i * D + j]);
    finite = finite && std::isfinite(R[i * D + at]);
  }
  return finite;
}

// All of them.
template <typename T>
KRON_HD SmallStatus store_ascending(const Whitened& from, int D, T* lam, T* R) {
  for (int j = 0; j < D; ++j) {
    if (!store_ascending(from, D, j, lam, R)) return kNotFinite;
  }
  return kFine;
}

}  // namespace torch_kronlik
