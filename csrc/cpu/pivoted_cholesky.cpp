#include "../kernels/pivoted_cholesky.h"

#include <tuple>
#include <vector>

#include "../checks.h"
#include "../shapes.h"
#include "parallel.h"

namespace torch_kronlik {
namespace {

// One matrix: F (T, max_rank), and its rest's diagonal.
template <typename T>
struct Work {
  const PivotedCholesky& c;
  const T* m;
  T* f;
  std::vector<double> rest;

  double entry(int64_t i, int64_t j) const {
    return static_cast<double>(m[i * c.row_stride + j * c.col_stride]);
  }
};

// Column k for rows begin to end; `pivot` is F's row of the pivot, copied.
template <typename T>
KRON_CLONES void new_column(Work<T>& w, int64_t p, int64_t k, double scale, const double* pivot,
                            int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* row = w.f + i * w.c.max_rank;
    // An earlier pivot's rest is zero and stays so.
    if (w.rest[i] == 0) continue;
    const T entry = static_cast<T>((w.entry(p, i) - lane_dot(row, pivot, k)) * scale);
    row[k] = entry;
    w.rest[i] -= static_cast<double>(entry) * static_cast<double>(entry);
  }
}

// |M v - F Fᵀ v| within tolerance in rows begin to end.
template <typename T>
KRON_CLONES bool rest_is_small(const Work<T>& w, const double* v, const double* fv, int64_t rank,
                               double tolerance, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    double product = 0;
    if (w.c.col_stride == 1) {
      product = lane_dot(w.m + i * w.c.row_stride, v, w.c.T);
    } else {
      for (int64_t j = 0; j < w.c.T; ++j) product += w.entry(i, j) * v[j];
    }
    const double difference = product - lane_dot(w.f + i * w.c.max_rank, fv, rank);
    if (!(std::fabs(difference) <= tolerance)) return false;
  }
  return true;
}

template <typename T>
bool is_positive_semidefinite(const Work<T>& w, int64_t rank, double tolerance) {
  const int64_t n = w.c.T;
  std::vector<double> v(n), fv(rank, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    v[i] = test_entry(i);
    for (int64_t k = 0; k < rank; ++k)
      fv[k] += v[i] * static_cast<double>(w.f[i * w.c.max_rank + k]);
  }
  constexpr int64_t kRows = 64;
  std::vector<char> good((n + kRows - 1) / kRows);
  parallel_items(static_cast<int64_t>(good.size()), kRows * n, [&](int64_t item) {
    const int64_t begin = item * kRows, end = std::min(n, begin + kRows);
    good[item] = rest_is_small(w, v.data(), fv.data(), rank, tolerance, begin, end);
  });
  return std::all_of(good.begin(), good.end(), [](char x) { return x; });
}

// The rank, or -1 where M is not positive semidefinite of a rank up to max_rank.
template <typename T>
int64_t factorise(Work<T>& w) {
  const int64_t n = w.c.T;
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    w.rest[i] = w.entry(i, i);
    largest = std::max(largest, w.rest[i]);
  }
  const double tolerance = trace_tolerance<T>(n, largest);
  if (!std::isfinite(tolerance)) return -1;
  std::vector<double> pivot_row(w.c.max_rank);
  Rest rest{tolerance};
  for (int64_t k = 0;; ++k) {
    double trace = 0;
    int64_t p = 0;
    for (int64_t i = 0; i < n; ++i) {
      trace += std::fabs(w.rest[i]);
      if (w.rest[i] > w.rest[p]) p = i;
    }
    if (rest.is_rounding(k, trace)) {
      return is_positive_semidefinite(w, k, product_tolerance(n, tolerance)) ? k : -1;
    }
    if (k == w.c.max_rank || !(w.rest[p] > 0)) return -1;
    for (int64_t l = 0; l < k; ++l) pivot_row[l] = static_cast<double>(w.f[p * w.c.max_rank + l]);
    const double scale = 1 / std::sqrt(w.rest[p]);
    constexpr int64_t kRows = 256;
    parallel_items((n + kRows - 1) / kRows, kRows * (k + 8), [&](int64_t item) {
      const int64_t begin = item * kRows, end = std::min(n, begin + kRows);
      new_column(w, p, k, scale, pivot_row.data(), begin, end);
    });
    w.rest[p] = 0;
  }
}

std::tuple<Tensor, Tensor> pivoted_cholesky(const Tensor& M, int64_t max_rank) {
  const PivotedCholesky c = pivoted_cholesky_of(M, max_rank);
  const Sizes batch = batch_sizes(M, 2);
  Tensor F = torch::stable::new_zeros(M, concat(batch, {c.T, max_rank}));
  Tensor rank = torch::stable::new_empty(M, batch, ScalarType::Long);
  int64_t* ranks = rank.mutable_data_ptr<int64_t>();
  dispatch_floating(M, "pivoted_cholesky", [&](auto zero) {
    using T = decltype(zero);
    const T* m = M.const_data_ptr<T>();
    T* f = F.mutable_data_ptr<T>();
    // Inside a parallel region the loops over rows run on their own thread.
    parallel_items(c.batch.count, c.T * c.T, [&](int64_t b) {
      Work<T> w{c, m + c.batch.offset(b), f + b * c.T * max_rank, std::vector<double>(c.T)};
      ranks[b] = factorise(w);
    });
  });
  return {F, rank};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CPU, m) {
  m.impl("pivoted_cholesky", TORCH_BOX(&pivoted_cholesky));
}

}  // namespace
}  // namespace torch_kronlik
