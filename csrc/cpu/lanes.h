#pragma once

// Linear algebra on several small symmetric positive definite matrices at once, one in each lane:
// every inner loop is over contiguous lanes. A matrix is [row][column][lane], its lower triangle.

#include <cmath>
#include <cstdint>

#include "../macros.h"

namespace torch_kronlik {

// One value for each of the (problem, j) pairs that are worked on together: 64 bytes, a register.
template <typename T>
struct Lanes {
  static constexpr int kCount = 64 / sizeof(T);
  T v[kCount];
};

template <typename T>
struct LaneInfo {
  T lam[Lanes<T>::kCount];
  const T* m[Lanes<T>::kCount];
};

template <typename T>
KRON_CLONES void load_C(Lanes<T>* C, int64_t n, const LaneInfo<T>& info) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k <= i; ++k) {
      Lanes<T>& c = C[i * n + k];
      for (int l = 0; l < Lanes<T>::kCount; ++l) c.v[l] = info.lam[l] * info.m[l][i * n + k];
    }
    for (int l = 0; l < Lanes<T>::kCount; ++l) C[i * n + i].v[l] += 1;
  }
}

// C = L Lᵀ in place, row by row; a pivot that is not positive turns into a NaN.
template <typename T>
KRON_CLONES void cholesky(Lanes<T>* C, int64_t n) {
  using V = Lanes<T>;
  for (int64_t i = 0; i < n; ++i) {
    V* row = C + i * n;
    for (int64_t k = 0; k <= i; ++k) {
      const V* other = C + k * n;
      V sum = row[k];
      for (int64_t q = 0; q < k; ++q) {
        for (int l = 0; l < V::kCount; ++l) sum.v[l] -= row[q].v[l] * other[q].v[l];
      }
      if (k < i) {
        for (int l = 0; l < V::kCount; ++l) row[k].v[l] = sum.v[l] * other[k].v[l];
      } else {
        // The diagonal holds 1 / L_ii.
        for (int l = 0; l < V::kCount; ++l) row[i].v[l] = 1 / std::sqrt(sum.v[l]);
      }
    }
  }
}

// L -> L⁻¹ in place: row i is -(1 / L_ii) Σ_{k<i} L_ik (L⁻¹)_k.
template <typename T>
KRON_CLONES void invert(Lanes<T>* C, Lanes<T>* acc, int64_t n) {
  using V = Lanes<T>;
  for (int64_t i = 0; i < n; ++i) {
    V* row = C + i * n;
    for (int64_t j = 0; j < i; ++j) acc[j] = V{};
    for (int64_t k = 0; k < i; ++k) {
      const V* other = C + k * n;
      const V factor = row[k];
      for (int64_t j = 0; j <= k; ++j) {
        for (int l = 0; l < V::kCount; ++l) acc[j].v[l] += factor.v[l] * other[j].v[l];
      }
    }
    for (int64_t j = 0; j < i; ++j) {
      for (int l = 0; l < V::kCount; ++l) row[j].v[l] = -acc[j].v[l] * row[i].v[l];
    }
  }
}

// x = L⁻¹ y by substitution, on L with 1 / L_ii on its diagonal.
template <typename T>
KRON_CLONES void substitute(const Lanes<T>* C, Lanes<T>* x, int64_t n) {
  using V = Lanes<T>;
  for (int64_t i = 0; i < n; ++i) {
    V sum = x[i];
    for (int64_t k = 0; k < i; ++k) {
      for (int l = 0; l < V::kCount; ++l) sum.v[l] -= C[i * n + k].v[l] * x[k].v[l];
    }
    for (int l = 0; l < V::kCount; ++l) x[i].v[l] = sum.v[l] * C[i * n + i].v[l];
  }
}

// x = L⁻ᵀ w, with L⁻¹ in C.
template <typename T>
KRON_CLONES void back_multiply(const Lanes<T>* C, const Lanes<T>* w, Lanes<T>* x, int64_t n) {
  using V = Lanes<T>;
  for (int64_t j = 0; j < n; ++j) x[j] = V{};
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      for (int l = 0; l < V::kCount; ++l) x[j].v[l] += C[i * n + j].v[l] * w[i].v[l];
    }
  }
}

// (L⁻ᵀ L⁻¹)_ab for four columns b of row a.
template <typename T>
KRON_CLONES void inverse_entries(const Lanes<T>* C, int64_t n, int64_t a, int64_t b,
                                 Lanes<T>* out) {
  using V = Lanes<T>;
  V sum[4] = {};
  for (int64_t i = a; i < n; ++i) {
    const V factor = C[i * n + a];
    const V* other = C + i * n + b;
    for (int c = 0; c < 4; ++c) {
      for (int l = 0; l < V::kCount; ++l) sum[c].v[l] += factor.v[l] * other[c].v[l];
    }
  }
  for (int c = 0; c < 4; ++c) out[c] = sum[c];
}

}  // namespace torch_kronlik
