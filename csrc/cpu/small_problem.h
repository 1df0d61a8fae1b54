#pragma once

// One small problem on its way into the lanes and out of them. Its columns are in double and in
// fours, as tiles are; x_j = C_j⁻¹ ỹ_j and MX come from the lanes, and
//   A = X Rᵀ,  gK = ½ R (Diag(tr M C_j⁻¹) - Xᵀ M X) Rᵀ,  gΣ = ½ R (Diag(tr C_j⁻¹) - XᵀX) Rᵀ.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../kernels/small_nll.h"
#include "lanes.h"

namespace torch_kronlik {

using Four = LanesOf<double, 32>::type;

template <typename T>
struct SmallProblem {
  Whitened basis;
  SmallStatus status;
  double logdet, quad;                            // Σ log det C_j, Σ ỹ_jᵀ x_j
  double trace[kMaxSmallD], trace_M[kMaxSmallD];  // tr C_j⁻¹ and tr M C_j⁻¹
  std::vector<T> m;                               // M, with zeros to whole tiles
  Buffer<double> Y, rotated, X, MX;               // columns; rotated: Y R, at last A

  SmallProblem(int64_t n, int64_t D)
      : m(padded(n) * padded(n)),
        Y(padded(n) * D),
        rotated(padded(n) * D),
        X(padded(n) * D),
        MX(padded(n) * D) {
    std::fill(&Y[0], &Y[0] + padded(n) * D, 0.0);
  }
};

inline const Four& four(const double* x) { return *reinterpret_cast<const Four*>(x); }

// out_j = Σ_d r_jd in_d for columns, r with these strides.
inline void combine(const double* r, int64_t row, int64_t col, int64_t D, int64_t n,
                    const double* in, double* out) {
  for (int64_t j = 0; j < D; ++j) {
    for (int64_t i = 0; i < n; i += kTile) {
      Four sum = {};
      for (int64_t d = 0; d < D; ++d) sum += r[j * row + d * col] * four(in + d * n + i);
      reinterpret_cast<Four&>(out[j * n + i]) = sum;
    }
  }
}

template <typename T>
KRON_CLONES KRON_FLATTEN void load_problem(const SmallNll& s, const SmallTensors<T>& t, int64_t b,
                                           SmallProblem<T>& p) {
  const T *m = t.m + s.m_batch.offset(b), *y = t.y + s.y_batch.offset(b);
  const int D = static_cast<int>(s.D);
  WhitenWork work;
  p.logdet = p.quad = 0;
  p.status = whiten_small(t.outputs(s, b), D,
                          static_cast<double>(std::numeric_limits<T>::epsilon()), &work, &p.basis);
  if (p.status != kFine) spoil(&p.basis, D);
  int outside = 0;
  for (int64_t i = 0; i < s.T; ++i) {
    T* row = &p.m[i * padded(s.T)];
    // The tiles up to the diagonal are all that is used, and they hold every entry's mean.
    const int64_t last = std::min(s.T, (i / kTile + 1) * kTile);
    for (int64_t k = 0; k < last; ++k) {
      row[k] = symmetric_entry(s, m, i, k);
      outside |= !(range_test(p.basis, row[k]) == 0);
    }
  }
  if (p.status == kFine && outside) {
    p.status = kNotFinite;
    spoil(&p.basis, D);
  }
  for (int64_t i = 0; i < s.T; ++i) {
    for (int64_t d = 0; d < D; ++d) {
      p.Y[d * padded(s.T) + i] = static_cast<double>(y[i * s.y_row + d * s.y_col]);
    }
  }
  combine(p.basis.R, 1, D, D, padded(s.T), &p.Y[0], &p.rotated[0]);
}

// Diag(trace) - XᵀY for two sets of columns whose products are symmetric.
inline void less_products(const double* trace, const double* X, const double* Y, int64_t D,
                          int64_t n, double* out) {
  for (int64_t j = 0; j < D; ++j) {
    for (int64_t k = 0; k <= j; ++k) {
      Four sum = {};
      for (int64_t i = 0; i < n; i += kTile) sum += four(X + j * n + i) * four(Y + k * n + i);
      out[j * D + k] = out[k * D + j] =
          (j == k ? trace[j] : 0) - ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }
}

// ½ (root_d R_d) S (root_e R_e)ᵀ for all rows d, e of R, or for d = e alone.
template <typename T>
void sandwich(const double* R, const double* S, const double* root, int64_t D, bool full, T* out) {
  for (int64_t d = 0; d < D; ++d) {
    double row[kMaxSmallD];
    for (int64_t k = 0; k < D; ++k) {
      row[k] = 0;
      for (int64_t j = 0; j < D; ++j) row[k] += (root[d] * R[d * D + j]) * S[j * D + k];
    }
    for (int64_t e = full ? 0 : d; e < (full ? D : d + 1); ++e) {
      double sum = 0;
      for (int64_t k = 0; k < D; ++k) sum += row[k] * (root[e] * R[e * D + k]);
      *out++ = static_cast<T>(0.5 * sum);
    }
  }
}

// From 2 gM in tiles, whose entries are `lanes` apart.
template <typename T>
KRON_CLONES KRON_FLATTEN void store_gradients(const SmallNll& s, const SmallTensors<T>& t,
                                              int64_t b, SmallProblem<T>& p, const T* G,
                                              int64_t lanes) {
  const int64_t n = s.T, D = s.D;
  const double* R = p.basis.R;
  T *gy = t.gy + b * n * D, *gm = t.gm + b * n * n;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k <= i; ++k) {
      gm[i * n + k] = gm[k * n + i] = T(0.5) * G[entry_at(i, k) * lanes];
    }
  }
  combine(R, D, 1, D, padded(n), &p.X[0], &p.rotated[0]);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < D; ++d) {
      gy[i * D + d] = static_cast<T>(p.rotated[d * padded(n) + i]);
    }
  }
  double S[kMaxSmallD * kMaxSmallD], root[kMaxSmallD];
  std::fill(root, root + D, 1.0);
  less_products(p.trace_M, &p.X[0], &p.MX[0], D, padded(n), S);
  sandwich(R, S, root, D, true, t.gk + b * D * D);
  less_products(p.trace, &p.X[0], &p.X[0], D, padded(n), S);
  if (!s.full_noise) {
    // exp(s) itself may overflow.
    for (int64_t d = 0; d < D; ++d) root[d] = std::exp(0.5 * t.outputs(s, b).log_noise(d));
  }
  sandwich(R, S, root, D, s.full_noise, t.gnoise + b * (s.full_noise ? D * D : D));
}

template <typename T>
void store_value(const SmallNll& s, const SmallTensors<T>& t, int64_t b, SmallProblem<T>& p) {
  const double log_2pi = 1.8378770664093454836;
  const double total = p.logdet + static_cast<double>(s.T) * p.basis.logdet_noise + p.quad +
                       static_cast<double>(s.T * s.D) * log_2pi;
  const T nll = static_cast<T>(0.5 * total);
  if (p.status == kFine && !std::isfinite(p.logdet)) p.status = kCovariancePositive;
  if (p.status == kFine && !std::isfinite(nll)) p.status = kNotFinite;
  t.status[b] = p.status;
  t.nll[b] = nll;
}

}  // namespace torch_kronlik
