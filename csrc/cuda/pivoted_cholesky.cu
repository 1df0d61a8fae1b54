#include <tuple>

#include "../kernels/pivoted_cholesky.h"
#include "../shapes.h"
#include "launch.h"

namespace torch_kronlik {
namespace {

struct Pivot {
  double rest;
  int64_t index;
};

// The largest rest of the block's threads, the first of equals; every thread gets it.
__device__ Pivot block_largest(Pivot mine) {
  __shared__ Pivot shared[kThreads];
  shared[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      Pivot& a = shared[threadIdx.x];
      const Pivot b = shared[threadIdx.x + half];
      if (b.rest > a.rest || (b.rest == a.rest && b.index < a.index)) a = b;
    }
  }
  __syncthreads();
  const Pivot largest = shared[0];
  __syncthreads();
  return largest;
}

__device__ double block_total(double mine) {
  __shared__ double total;
  mine = block_sum(mine);
  if (threadIdx.x == 0) total = mine;
  __syncthreads();
  mine = total;
  __syncthreads();
  return mine;
}

// One block of threads for each matrix: the columns of F, one after the other, the rest of the
// diagonal (T), Fᵀ v (max_rank), all in global memory.
template <typename T>
struct Matrix {
  const T* m;
  T* f;
  double* rest;
  double* fv;
};

// (F x)_i, over the first `count` columns.
template <typename T, typename X>
__device__ double row_product(const T* f, int64_t size, int64_t i, const X* x, int64_t x_stride,
                              int64_t count) {
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) {
    sum += static_cast<double>(f[k * size + i]) * static_cast<double>(x[k * x_stride]);
  }
  return sum;
}

template <typename T>
__device__ void new_column(const PivotedCholesky& c, const Matrix<T>& x, Pivot p, int64_t k) {
  const double scale = 1 / sqrt(p.rest);
  for (int64_t i = threadIdx.x; i < c.T; i += kThreads) {
    if (x.rest[i] == 0) continue;
    const double entry = static_cast<double>(x.m[p.index * c.row_stride + i * c.col_stride]);
    const double known = row_product(x.f, c.T, i, x.f + p.index, c.T, k);
    const T value = static_cast<T>((entry - known) * scale);
    x.f[k * c.T + i] = value;
    x.rest[i] -= static_cast<double>(value) * static_cast<double>(value);
  }
  __syncthreads();
  if (threadIdx.x == 0) x.rest[p.index] = 0;
  __syncthreads();
}

// The number of entries of M v - F Fᵀ v above tolerance (a NaN is above).
template <typename T>
__device__ double large_products(const PivotedCholesky& c, const Matrix<T>& x, int64_t rank,
                                 double tolerance) {
  for (int64_t k = threadIdx.x; k < rank; k += kThreads) {
    double sum = 0;
    for (int64_t i = 0; i < c.T; ++i) {
      sum += test_entry(i) * static_cast<double>(x.f[k * c.T + i]);
    }
    x.fv[k] = sum;
  }
  __syncthreads();
  double bad = 0;
  for (int64_t i = threadIdx.x; i < c.T; i += kThreads) {
    double product = 0;
    // Along a column: M is symmetric, and neighbouring threads then read neighbouring entries.
    for (int64_t j = 0; j < c.T; ++j) {
      product += test_entry(j) * static_cast<double>(x.m[j * c.row_stride + i * c.col_stride]);
    }
    const double difference = product - row_product(x.f, c.T, i, x.fv, 1, rank);
    if (!(fabs(difference) <= tolerance)) bad += 1;
  }
  return block_total(bad);
}

template <typename T>
__device__ int64_t factorise(const PivotedCholesky& c, const Matrix<T>& x) {
  Pivot first{0, 0};
  for (int64_t i = threadIdx.x; i < c.T; i += kThreads) {
    x.rest[i] = static_cast<double>(x.m[i * (c.row_stride + c.col_stride)]);
    if (x.rest[i] > first.rest) first = Pivot{x.rest[i], i};
  }
  const double tolerance = trace_tolerance<T>(c.T, block_largest(first).rest);
  if (!isfinite(tolerance)) return -1;
  Rest rest{tolerance};
  for (int64_t k = 0;; ++k) {
    double sum = 0, absolute = 0;
    Pivot mine{0, 0};
    for (int64_t i = threadIdx.x; i < c.T; i += kThreads) {
      sum += x.rest[i];
      absolute += fabs(x.rest[i]);
      if (x.rest[i] > mine.rest) mine = Pivot{x.rest[i], i};
    }
    sum = block_total(sum);
    absolute = block_total(absolute);
    const Pivot p = block_largest(mine);
    if (rest.is_rounding(k, sum, absolute)) {
      return large_products(c, x, k, product_tolerance(c.T, tolerance)) == 0 ? k : -1;
    }
    if (k == c.max_rank || !(p.rest > 0)) return -1;
    new_column(c, x, p, k);
  }
}

template <typename T>
__global__ void pivoted_cholesky_blocks(PivotedCholesky c, const T* __restrict__ m,
                                        T* __restrict__ f, double* __restrict__ work,
                                        int64_t* __restrict__ rank) {
  const int64_t b = blockIdx.x;
  double* own = work + b * (c.T + c.max_rank);
  const Matrix<T> x{m + c.batch.offset(b), f + b * c.T * c.max_rank, own, own + c.T};
  const int64_t found = factorise(c, x);
  if (threadIdx.x == 0) rank[b] = found;
}

std::tuple<Tensor, Tensor> pivoted_cholesky(const Tensor& M, int64_t max_rank) {
  const PivotedCholesky c = pivoted_cholesky_of(M, max_rank);
  const Sizes batch = batch_sizes(M, 2);
  Tensor F = torch::stable::new_zeros(M, concat(batch, {max_rank, c.T}));
  Tensor rank = torch::stable::new_empty(M, batch, ScalarType::Long);
  const Launcher launcher(M);
  Tensor work = scratch(M, c.batch.count * (c.T + max_rank));
  dispatch_floating(M, "pivoted_cholesky", [&](auto zero) {
    using T = decltype(zero);
    launcher.blocks(c.batch.count, pivoted_cholesky_blocks<T>, c, M.const_data_ptr<T>(),
                    F.mutable_data_ptr<T>(), work.mutable_data_ptr<double>(),
                    rank.mutable_data_ptr<int64_t>());
  });
  return {torch::stable::transpose(F, -2, -1), rank};
}

STABLE_TORCH_LIBRARY_IMPL(torch_kronlik, CUDA, m) {
  m.impl("pivoted_cholesky", TORCH_BOX(&pivoted_cholesky));
}

}  // namespace
}  // namespace torch_kronlik
