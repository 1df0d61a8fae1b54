#include "../kernels/pivoted_cholesky.h"

#include <tuple>
#include <vector>

#include "../checks.h"
#include "../shapes.h"
#include "parallel.h"

namespace torch_kronlik {
namespace {

// One matrix: the columns of F, one after the other, and its rest's diagonal.
template <typename T>
struct Work {
  const PivotedCholesky& c;
  const T* m;
  T* f;
  std::vector<double> rest;  // whole tiles, zeros beyond T

  double entry(int64_t i, int64_t j) const {
    return static_cast<double>(m[i * c.row_stride + j * c.col_stride]);
  }
};

constexpr int64_t kTile = 32;

// x -= Σ_k factor[k] F_k for the `rows` entries from `begin` on, which stay in registers.
template <typename T>
KRON_HD void subtract_columns(const Work<T>& w, const double* factor, int64_t count, int64_t begin,
                              int64_t rows, double* x) {
  if (rows == kTile) {
    for (int64_t k = 0; k < count; ++k) {
      const T* column = w.f + k * w.c.T + begin;
      for (int64_t i = 0; i < kTile; ++i) x[i] -= factor[k] * static_cast<double>(column[i]);
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < count; ++k) {
        x[i] -= factor[k] * static_cast<double>(w.f[k * w.c.T + begin + i]);
      }
    }
  }
}

// The rows begin to end of column k, from pivot p with the row `pivot` of F.
template <typename T>
KRON_CLONES void new_column(Work<T>& w, int64_t p, int64_t k, double scale, const double* pivot,
                            int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t rows = std::min(kTile, end - first);
    double x[kTile] = {};
    for (int64_t i = 0; i < rows; ++i) x[i] = w.entry(p, first + i);
    subtract_columns(w, pivot, k, first, rows, x);
    T* column = w.f + k * w.c.T + first;
    double* rest = w.rest.data() + first;
    for (int64_t i = 0; i < rows; ++i) {
      // An earlier pivot's rest is zero and stays so.
      column[i] = rest[i] == 0 ? T(0) : static_cast<T>(x[i] * scale);
      rest[i] -= static_cast<double>(column[i]) * static_cast<double>(column[i]);
    }
  }
}

// |M v - F Fᵀ v| within tolerance in rows begin to end.
template <typename T>
KRON_CLONES bool rest_is_small(const Work<T>& w, const double* v, const double* fv, int64_t rank,
                               double tolerance, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t rows = std::min(kTile, end - first);
    double x[kTile] = {};
    for (int64_t i = 0; i < rows; ++i) {
      if (w.c.col_stride == 1) {
        x[i] = lane_dot(w.m + (first + i) * w.c.row_stride, v, w.c.T);
      } else {
        for (int64_t j = 0; j < w.c.T; ++j) x[i] += w.entry(first + i, j) * v[j];
      }
    }
    subtract_columns(w, fv, rank, first, rows, x);
    for (int64_t i = 0; i < rows; ++i) {
      if (!(std::fabs(x[i]) <= tolerance)) return false;
    }
  }
  return true;
}

template <typename T>
KRON_CLONES bool is_positive_semidefinite(const Work<T>& w, int64_t rank, double tolerance) {
  const int64_t n = w.c.T;
  std::vector<double> v(n), fv(rank);
  for (int64_t i = 0; i < n; ++i) v[i] = test_entry(i);
  for (int64_t k = 0; k < rank; ++k) fv[k] = lane_dot(w.f + k * n, v.data(), n);
  std::vector<char> good((n + kTile - 1) / kTile);
  parallel_items(static_cast<int64_t>(good.size()), kTile * n, [&](int64_t item) {
    const int64_t begin = item * kTile, end = std::min(n, begin + kTile);
    good[item] = rest_is_small(w, v.data(), fv.data(), rank, tolerance, begin, end);
  });
  return std::all_of(good.begin(), good.end(), [](char x) { return x; });
}

struct Diagonal {
  double sum = 0, absolute = 0, largest = -1;
  int64_t pivot = 0;  // where it is the largest, the first of equals
};

KRON_CLONES Diagonal diagonal_of(const std::vector<double>& rest) {
  Diagonal d;
  double sum[kTile] = {}, absolute[kTile] = {};
  for (size_t first = 0; first < rest.size(); first += kTile) {
    const double* tile = rest.data() + first;
    double largest = -1;
    for (int64_t i = 0; i < kTile; ++i) {
      sum[i] += tile[i];
      absolute[i] += std::fabs(tile[i]);
      largest = tile[i] > largest ? tile[i] : largest;
    }
    if (!(largest > d.largest)) continue;
    d.largest = largest;
    d.pivot = static_cast<int64_t>(first) + (std::find(tile, tile + kTile, largest) - tile);
  }
  for (double x : sum) d.sum += x;
  for (double x : absolute) d.absolute += x;
  return d;
}

// The rank, or -1 where M is not positive semidefinite of a rank up to max_rank.
template <typename T>
int64_t factorise(Work<T>& w) {
  const int64_t n = w.c.T;
  for (int64_t i = 0; i < n; ++i) w.rest[i] = w.entry(i, i);
  Diagonal d = diagonal_of(w.rest);
  const double tolerance = trace_tolerance<T>(n, std::max(d.largest, 0.0));
  if (!std::isfinite(tolerance)) return -1;
  std::vector<double> pivot_row(w.c.max_rank);
  std::vector<double> absolutes;
  for (int64_t k = 0;; ++k, d = diagonal_of(w.rest)) {
    if (is_rounding(k, d.sum, d.absolute, absolutes.data(), tolerance)) {
      return is_positive_semidefinite(w, k, product_tolerance(n, tolerance)) ? k : -1;
    }
    if (k == w.c.max_rank || !(d.largest > 0)) return -1;
    absolutes.push_back(d.absolute);
    for (int64_t l = 0; l < k; ++l) pivot_row[l] = static_cast<double>(w.f[l * n + d.pivot]);
    const double scale = 1 / std::sqrt(d.largest);
    constexpr int64_t kRows = 8 * kTile;
    parallel_items((n + kRows - 1) / kRows, kRows * (k + 8), [&](int64_t item) {
      const int64_t begin = item * kRows, end = std::min(n, begin + kRows);
      new_column(w, d.pivot, k, scale, pivot_row.data(), begin, end);
    });
    w.rest[d.pivot] = 0;
  }
}

std::tuple<Tensor, Tensor> pivoted_cholesky(const Tensor& M, int64_t max_rank) {
  const PivotedCholesky c = pivoted_cholesky_of(M, max_rank);
  const Sizes batch = batch_sizes(M, 2);
  Tensor F = torch::stable::new_zeros(M, concat(batch, {max_rank, c.T}));
  Tensor rank = torch::stable::new_empty(M, batch, ScalarType::Long);
  int64_t* ranks = rank.mutable_data_ptr<int64_t>();
  dispatch_floating(M, "pivoted_cholesky", [&](auto zero) {
    using T = decltype(zero);
    const T* m = M.const_data_ptr<T>();
    T* f = F.mutable_data_ptr<T>();
    // Inside a parallel region the loops over rows run on their own thread.
    parallel_items(c.batch.count, c.T * c.T, [&](int64_t b) {
      Work<T> w{c, m + c.batch.offset(b), f + b * c.T * max_rank,
                std::vector<double>((c.T + kTile - 1) / kTile * kTile)};
      ranks[b] = factorise(w);
    });
  });
  return {torch::stable::transpose(F, -2, -1), rank};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) {
  m.impl("pivoted_cholesky", TORCH_BOX(&pivoted_cholesky));
}

}  // namespace
}  // namespace torch_kronlik
