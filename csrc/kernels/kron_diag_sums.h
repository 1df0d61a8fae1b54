#pragma once

// W_ij = 1 / (1 + s_i λ_j) and the sums over it that need no data:
//   logdet = Σ_ij log(1 + s_i λ_j)     row_sum_i   = Σ_j W_ij λ_j
//   col_sum_s_j = Σ_i W_ij s_i         col_sum_1_j = Σ_i W_ij
// Rows and columns are the same body with the roles of s and λ exchanged.

#include <cmath>

#include "../batch.h"

namespace torch_kronlik {

// Sums over rows are taken in chunks of this many, and the chunks are added in order: the result
// does not depend on the number of threads.
constexpr int64_t kRowsPerChunk = 64;

struct KronDiag {
  int64_t T, D;
  int64_t s_stride, lam_stride;
  BatchLayout s_batch, lam_batch;

  KRON_HD int64_t chunks() const { return (T + kRowsPerChunk - 1) / kRowsPerChunk; }
  KRON_HD int64_t chunk_begin(int64_t chunk) const { return chunk * kRowsPerChunk; }
  KRON_HD int64_t chunk_size(int64_t chunk) const {
    const int64_t left = T - chunk_begin(chunk);
    return left < kRowsPerChunk ? left : kRowsPerChunk;
  }
};

// For L values v: plain = Σ_u W(u, v), weighted = Σ_u W(u, v) u, log = Σ_u log(1 + u v).
template <int L>
struct LineSums {
  double plain[L] = {}, weighted[L] = {}, log[L] = {};
};

// How many factors 1 + u v can be multiplied before a logarithm is due: none if some u v is
// negative or not a number, otherwise so many that the product stays below 2^1000.
template <int L, typename T>
KRON_HD int64_t log_group(const T* u, int64_t stride, int64_t count, const double* v) {
  double u_max = 0, v_max = 0;
  bool ordinary = true;
  for (int64_t i = 0; i < count; ++i) {
    const double ui = static_cast<double>(u[i * stride]);
    ordinary = ordinary && ui >= 0;
    u_max = ui > u_max ? ui : u_max;
  }
  for (int l = 0; l < L; ++l) {
    ordinary = ordinary && v[l] >= 0;
    v_max = v[l] > v_max ? v[l] : v_max;
  }
  const double largest = 1 + u_max * v_max;
  if (!ordinary || !(largest < 0x1p500)) return 1;
  return 1000 / (std::ilogb(largest) + 1);
}

// c holds Π(1 + u v) - 1, so that a product of factors near one keeps its small difference.
template <int L, bool kLog, typename T>
KRON_HD LineSums<L> line_sums(const T* u, int64_t stride, int64_t count, const double* v) {
  LineSums<L> sums;
  const int64_t group = kLog ? log_group<L>(u, stride, count, v) : count;
  for (int64_t begin = 0; begin < count; begin += group) {
    const int64_t end = begin + group < count ? begin + group : count;
    double c[L] = {};
    for (int64_t i = begin; i < end; ++i) {
      const double ui = static_cast<double>(u[i * stride]);
      for (int l = 0; l < L; ++l) {
        const double x = ui * v[l], w = 1 / (1 + x);
        sums.plain[l] += w;
        sums.weighted[l] += w * ui;
        if (kLog) c[l] += x + c[l] * x;
      }
    }
    for (int l = 0; kLog && l < L; ++l) sums.log[l] += std::log1p(c[l]);
  }
  return sums;
}

}  // namespace torch_kronlik
