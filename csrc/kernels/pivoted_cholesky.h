#pragma once

// M ≈ F Fᵀ by Cholesky with the largest remaining diagonal entry as pivot, stopped where the rest
// E = M - F Fᵀ is rounding: Σ|E_ii| <= T eps max M_ii. Then E is positive semidefinite with that
// trace, if M is; and that M is, is tested on one vector: |E v| is bounded by the trace. A generic
// vector: a matrix of repeated patterns cannot cancel in its product with it.
//
// The entries of M are rounded themselves (a kernel's by several eps, after its distances), which
// no factor of low rank can follow: there the rest stays at some 3 to 20 T eps max M_ii, indefinite
// and no further from M than what an eigendecomposition rounds away. It is taken for that where it
// has come near the tolerance, does not fall any more, and has no positive trace: that would be a
// part of M, such as a multiple of I on its diagonal.

#include <cmath>
#include <limits>

#include "../batch.h"

namespace torch_kronlik {

struct PivotedCholesky {
  int64_t T, max_rank;
  int64_t row_stride, col_stride;
  BatchLayout batch;
};

// The tolerance on the trace of the rest.
template <typename T>
KRON_HD double trace_tolerance(int64_t size, double largest) {
  return static_cast<double>(size) * static_cast<double>(std::numeric_limits<T>::epsilon()) *
         largest;
}

// Whether the rest after k columns is rounding, given the sums of its diagonal, with signs and of
// the absolute values, and the latter after 0, …, k - 1 columns.
KRON_HD bool is_rounding(int64_t k, double sum, double absolute, const double* absolutes,
                         double tolerance) {
  constexpr int kColumns = 4;
  constexpr double kNear = 64;
  if (absolute <= tolerance) return true;
  return k >= kColumns && absolute <= kNear * tolerance && 2 * absolute > absolutes[k - kColumns] &&
         sum <= tolerance;
}

// The tolerance on an entry of E v: |E v|_i <= sqrt(E_ii) Σ_j sqrt(E_jj) <= sqrt(T) tr E for a
// semidefinite E, and rounding in M and in F Fᵀ of the same order.
KRON_HD double product_tolerance(int64_t size, double trace_tolerance) {
  return 8 * std::sqrt(static_cast<double>(size)) * trace_tolerance;
}

// The entries of v, in (-1, 1): the bits of i well mixed (the finaliser of splitmix64).
KRON_HD double test_entry(int64_t i) {
  uint64_t z = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>(static_cast<int64_t>(z ^ (z >> 31))) * 0x1p-63;
}

// Σ_k a_k b_k in eight lanes, added in a fixed order.
template <typename A, typename B>
KRON_HD double lane_dot(const A* a, const B* b, int64_t count) {
  constexpr int kLanes = 8;
  double lane[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      lane[l] += static_cast<double>(a[k + l]) * static_cast<double>(b[k + l]);
    }
  }
  for (int l = 0; k < count; ++k, ++l) {
    lane[l] += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  }
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

}  // namespace torch_kronlik
